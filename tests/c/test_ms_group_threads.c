/* Threads, each with an ms_group of its own over one mapping, as processes would: what one has done
 * in a partition is seen by whoever gets it next, every commit counts once, and whoever was ended
 * commits nothing. Under TSan by `check.py tsan`.
 */
#include "check.h"
#include "ms_group.h"

#include <pthread.h>

enum { PARTITIONS = 8, THREADS = 4, ROUNDS = 400, STEPS = 12 };
#define NEVER UINT64_MAX

static const uint8_t store_id[16] = "store identity 1";
static uint64_t memory[32 * 4096 / 8] __attribute__((aligned(4096)));

/* Of each partition the offset that was committed: plain, and only its owner's to touch. */
static uint64_t reached[PARTITIONS];
static _Atomic uint64_t commits[PARTITIONS];
static _Atomic uint64_t now = 1;
static _Atomic uint32_t left;
static pthread_mutex_t journal = PTHREAD_MUTEX_INITIALIZER;
static uint64_t transactions; /* under the journal's mutex */

typedef struct member {
  ms_group group;
  uint32_t slot, number, changes, owner;
  uint64_t processing;
  uint64_t fences[PARTITIONS];
  uint8_t flags[PARTITIONS];
} member;

static ms_group open_as(uint32_t process) {
  ms_group group = {0};
  CHECK(ms_group_attach(&group, memory, ms_group_size(PARTITIONS), store_id, 7, NULL) == MS_OK);
  group.self = ms_owner_word(process, 1);
  group.generation = 1;
  return group;
}

static void make(void) {
  memset(memory, 0, sizeof memory);
  CHECK(ms_group_size(PARTITIONS) <= sizeof memory);
  ms_group_init(memory, store_id, 7, 99, 12345, 1, PARTITIONS / 2);
  memset(reached, 0, sizeof reached);
  memset((void *)commits, 0, sizeof commits);
  atomic_store(&left, THREADS);
}

/* Somebody has the word, and lives. */
static bool waited(const member *self, ms_status status) {
  uint32_t owner;
  if (status != MS_BUSY) return false;
  if (ms_owner_wait(&self->group.header->word, self->group.self, 1000000, &owner) == MS_OK)
    ms_owner_release(&self->group.header->word);
  return true;
}

/* Make a call until nobody is in its way. */
#define CALL(status, self, call) \
  do (status) = (call);          \
  while (waited((self), (status)))

static ms_status join(member *self, uint64_t processing) {
  ms_status status;
  self->processing = processing;
  CALL(
      status, self,
      ms_group_try_join(&self->group, NEVER, processing, &self->slot, &self->number, &self->owner));
  CHECK(status == MS_OK);
  return status;
}

static ms_status look(member *self) {
  ms_status status;
  CALL(status, self,
       ms_group_try_take_up(&self->group, self->slot, self->number, self->fences, self->flags,
                            PARTITIONS, &self->changes, &self->owner));
  return status;
}

static void leave(member *self, ms_status expected) {
  ms_status status;
  CALL(status, self, ms_group_try_leave(&self->group, self->slot, self->number, &self->owner));
  CHECK(status == MS_OK || status == expected);
}

static uint64_t offset_of(const ms_group *group, uint32_t partition) {
  ms_group_position position = {0};
  ms_status status = ms_group_position_of(group, partition, &position);
  CHECK(status == MS_OK || status == MS_END);
  return position.offset;
}

static ms_status commit(member *self, uint32_t partition, uint64_t offset) {
  const ms_group_claim claim = {self->slot, partition, self->fences[partition]};
  ms_status status;
  CALL(status, self, ms_group_try_commit(&self->group, &claim, 1, offset, false, &self->owner));
  if (status == MS_OK) atomic_fetch_add(&commits[partition], 1);
  return status;
}

static void release(member *self, uint32_t partition) {
  const ms_group_claim claim = {self->slot, partition, self->fences[partition]};
  ms_status status;
  CALL(status, self, ms_group_try_release(&self->group, &claim, &self->owner));
  CHECK(status == MS_OK || status == MS_FENCED);
}

static void grow(member *self) {
  ms_status status;
  CALL(status, self, ms_group_try_grow(&self->group, PARTITIONS, &self->owner));
  CHECK(status == MS_OK);
}

static void check_at_rest(void) {
  ms_group group = open_as(1);
  char text[200] = "";
  if (!CHECK(ms_group_check(&group, text, sizeof text))) printf("  %s\n", text);
  uint64_t all = 0;
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    uint64_t fence, transaction;
    uint32_t slot;
    bool taken;
    ms_group_position position;
    CHECK_EQ_U64(offset_of(&group, i), atomic_load(&commits[i]));
    CHECK(ms_group_pending(&group, i, &transaction, &fence, &position) == MS_END);
    ms_group_holder(&group, i, &slot, &fence, &taken);
    CHECK(slot == 0);
    all += atomic_load(&commits[i]);
  }
  CHECK(all > 0);
  printf("  commits=%" PRIu64 " transactions=%" PRIu64 "\n", all, transactions);
}

static void run(void *(*const works[])(void *), uint32_t count) {
  pthread_t threads[THREADS + 2];
  make();
  for (uint32_t i = 0; i < count; i++)
    if (!CHECK(pthread_create(&threads[i], NULL, works[i], (void *)(uintptr_t)(i + 1)) == 0))
      exit(1);
  for (uint32_t i = 0; i < count; i++) pthread_join(threads[i], NULL);
  check_at_rest();
}

/* --- handing over --- */

static void step_alone(member *self) {
  CHECK(look(self) == MS_OK);
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    if (self->fences[i] == 0) continue;
    CHECK_EQ_U64(offset_of(&self->group, i), reached[i]);
    CHECK(commit(self, i, ++reached[i]) == MS_OK);
    if (self->flags[i] & MS_GROUP_LEAVING) release(self, i);
  }
}

static void *hand_over(void *argument) {
  uint32_t index = (uint32_t)(uintptr_t)argument;
  member self = {.group = open_as(index)};
  for (uint32_t round = 0; round < ROUNDS; round++) {
    if (join(&self, NEVER) != MS_OK) break;
    for (uint32_t i = 0; i < 1 + (round + index) % STEPS; i++) step_alone(&self);
    if (round == ROUNDS / 2) grow(&self);
    leave(&self, MS_OK);
  }
  return NULL;
}

static void test_group_threads_hand_over_all_that_was_done(void) {
  void *(*const works[])(void *) = {hand_over, hand_over, hand_over, hand_over};
  run(works, THREADS);
}

/* --- being ended, and transactions --- */

/* The journal's word is held; the mark of whoever is ended meanwhile stands until this is over. */
static void transact(member *self, bool commits_it) {
  ms_group_claim claims[PARTITIONS];
  ms_group_position positions[PARTITIONS];
  uint32_t count = 0;
  ms_status status;
  pthread_mutex_lock(&journal);
  uint64_t number = ++transactions;
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    if (self->fences[i] == 0) continue;
    claims[count] = (ms_group_claim){self->slot, i, self->fences[i]};
    positions[count++] = (ms_group_position){1, offset_of(&self->group, i) + 1, 0};
  }
  CALL(status, self,
       ms_group_try_prepare(&self->group, number, claims, positions, count, &self->owner));
  CHECK(status == MS_OK || status == MS_FENCED);
  for (uint32_t i = 0; i < count && status == MS_OK; i++) {
    uint32_t partition = claims[i].partition;
    ms_status ended;
    if (commits_it) {
      CALL(ended, self,
           ms_group_try_apply(&self->group, partition, number, 1, positions[i].offset,
                              &self->owner));
      atomic_fetch_add(&commits[partition], 1);
    } else {
      CALL(ended, self, ms_group_try_revert(&self->group, partition, number, &self->owner));
    }
    CHECK(ended == MS_OK);
  }
  pthread_mutex_unlock(&journal);
}

static bool step_among_others(member *self, uint32_t number) {
  uint64_t to = atomic_load(&now) + number % 3;
  if (number % 4 == 0 &&
      ms_group_renew(&self->group.members[self->slot].processing, &self->processing, to) != MS_OK)
    return false;
  if (look(self) != MS_OK) return false;
  if (number % 5 == 0) transact(self, number % 2);
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    if (self->fences[i] == 0) continue;
    ms_status status = commit(self, i, offset_of(&self->group, i) + 1);
    CHECK(status == MS_OK || status == MS_FENCED || status == MS_PENDING);
    if (self->flags[i] & MS_GROUP_LEAVING) release(self, i);
  }
  return true;
}

static void *be_ended(void *argument) {
  uint32_t index = (uint32_t)(uintptr_t)argument;
  member self = {.group = open_as(index)};
  for (uint32_t round = 0; round < ROUNDS; round++) {
    if (join(&self, atomic_load(&now) + 1) != MS_OK) break;
    uint32_t number = round;
    while (number < round + STEPS && step_among_others(&self, number)) number++;
    if (round == ROUNDS / 2) grow(&self);
    leave(&self, MS_LOST);
  }
  atomic_fetch_sub(&left, 1);
  return NULL;
}

/* Ends whoever is late; the clock goes on with each look. */
static void *watch(void *argument) {
  member self = {.group = open_as((uint32_t)(uintptr_t)argument)};
  uint64_t all = 0;
  while (atomic_load(&left) > 0) {
    uint64_t at = atomic_fetch_add(&now, 1);
    uint32_t ended = 0;
    ms_status status;
    if (!ms_group_claim_watch(&self.group, at, 1) || !ms_group_overdue(&self.group, at)) continue;
    CALL(status, &self, ms_group_try_end(&self.group, at, NULL, 0, &ended, &self.owner));
    CHECK(status == MS_OK);
    all += ended;
  }
  CHECK(all > 0);
  printf("  ended=%" PRIu64 "\n", all);
  return NULL;
}

/* Looks without the word: what it sees of a position never goes back. */
static void *observe(void *argument) {
  ms_group group = open_as((uint32_t)(uintptr_t)argument);
  uint64_t seen[PARTITIONS] = {0}, fences[PARTITIONS] = {0};
  while (atomic_load(&left) > 0)
    for (uint32_t i = 0; i < PARTITIONS; i++) {
      ms_group_position mark;
      uint64_t offset = offset_of(&group, i), fence, transaction;
      uint32_t slot;
      bool taken;
      CHECK(offset >= seen[i]);
      seen[i] = offset;
      ms_group_holder(&group, i, &slot, &fence, &taken);
      CHECK(fence >= fences[i] && slot <= MS_GROUP_MEMBERS);
      fences[i] = fence;
      CHECK(ms_group_pending(&group, i, &transaction, &fence, &mark) >= 0);
    }
  return NULL;
}

static void test_group_threads_that_are_ended_commit_nothing_late(void) {
  void *(*const works[])(void *) = {be_ended, be_ended, be_ended, be_ended, watch, observe};
  run(works, THREADS + 2);
}

static const check_test tests[] = {
    CHECK_TEST(test_group_threads_hand_over_all_that_was_done),
    CHECK_TEST(test_group_threads_that_are_ended_commit_nothing_late),
};
CHECK_MAIN(tests)
