/* flags: -DMS_SCHEDULER
 *
 * Two to four virtual processes join, take up, commit, release and leave one group, and end each
 * other; any of them may be killed or paused at any yield point. Whatever happens: a position is
 * the last one that was committed, or the one that its writer was killed at; no member commits
 * after another has the partition; the shares are fair and complete at rest.
 */
#include "ms_group.h"
#include "scheduler.h"

enum { PROCESSES = 4, PARTITIONS = 5, STEPS = 14, HANGS = 16 };
#define NEVER UINT64_MAX

static uint64_t memory[8 * 4096 / 8] __attribute__((aligned(4096)));
static const uint8_t store_id[16] = "store identity 1";
static ms_group groups[PROCESSES + 1]; /* the last one belongs to the checker */

/* What the outside world knows of a partition. */
static uint64_t committed[PARTITIONS], fences[PARTITIONS], in_flight[PROCESSES][PARTITIONS];
static uint64_t now_ns;
static uint64_t kills, pauses, commits, takeovers, fenced;

typedef struct member {
  uint32_t slot, number, changes;
  bool joined;
  uint64_t processing, fences[PARTITIONS], positions[PARTITIONS];
} member;

static uint32_t self_of(uint32_t process) { return ms_owner_word(process, 1); }

static uint32_t the_dead(uint32_t *dead) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < scheduler_now->options->process_count; i++)
    if (scheduler_now->result.states[i] == SCHEDULER_KILLED) dead[count++] = self_of(i);
  return count;
}

/* Is the call to be made again? Not where a paused one has the word: it is given up. */
static bool again(ms_group *group, ms_status status, uint32_t owner) {
  if (status != MS_BUSY) return false;
  uint32_t dead[PROCESSES], count = the_dead(dead);
  for (uint32_t i = 0; i < count; i++)
    if (dead[i] == (owner & ~MS_OWNER_WAITERS)) {
      takeovers += ms_group_take_over(group, owner, &owner) == MS_OK;
      return true;
    }
  for (uint32_t i = 0; i < scheduler_now->options->process_count; i++)
    if (self_of(i) == (owner & ~MS_OWNER_WAITERS))
      return scheduler_now->result.states[i] == SCHEDULER_RUNS;
  return true;
}

static uint64_t position_of(const ms_group *group, uint32_t partition) {
  ms_group_position position;
  ms_status status = ms_group_position_of(group, partition, &position);
  CHECK(status == MS_OK || status == MS_END);
  return status == MS_OK ? position.offset : 0;
}

static void look(ms_group *group, member *self) {
  uint64_t found[PARTITIONS];
  uint8_t flags[PARTITIONS];
  uint32_t owner;
  ms_status status;
  do {
    status = ms_group_try_take_up(group, self->slot, self->number, found, flags, PARTITIONS,
                                  &self->changes, &owner);
  } while (again(group, status, owner));
  if (status == MS_LOST) self->joined = false;
  if (status != MS_OK) return;
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    bool is_new = found[i] != 0 && found[i] != self->fences[i];
    self->fences[i] = found[i];
    if (is_new) self->positions[i] = position_of(group, i);
    if (!(flags[i] & MS_GROUP_LEAVING)) continue;
    ms_group_claim claim = {self->slot, i, found[i]};
    do {
      status = ms_group_try_release(group, &claim, &owner);
    } while (again(group, status, owner));
    if (status == MS_OK) self->fences[i] = 0;
  }
}

/* The position, if what the killed were at got there. */
static uint64_t most_of(uint32_t partition) {
  uint64_t most = committed[partition];
  for (uint32_t i = 0; i < PROCESSES; i++)
    if (scheduler_now->result.states[i] == SCHEDULER_KILLED && in_flight[i][partition] > most)
      most = in_flight[i][partition];
  return most;
}

static void commit(ms_group *group, member *self, uint32_t process) {
  uint32_t partition = (uint32_t)(scheduler_random() % PARTITIONS), owner;
  if (self->fences[partition] == 0) return;
  ms_group_claim claim = {self->slot, partition, self->fences[partition]};
  uint64_t next = self->positions[partition] + 1;
  ms_status status;
  MS_YIELD("work");
  in_flight[process][partition] = next;
  do {
    status = ms_group_try_commit(group, &claim, 1, next, false, &owner);
  } while (again(group, status, owner));
  in_flight[process][partition] = 0;
  fenced += status == MS_FENCED;
  if (status != MS_OK) {
    CHECK(status == MS_FENCED || status == MS_BUSY);
    return;
  }
  commits++;
  /* Fences rise: nobody commits after a later owner has, and nothing is left out. */
  CHECK(claim.fence >= fences[partition]);
  fences[partition] = claim.fence;
  CHECK(next > committed[partition]);
  CHECK(next <= most_of(partition) + 1);
  committed[partition] = next;
  self->positions[partition] = next;
}

static void end_members(ms_group *group) {
  uint32_t dead[PROCESSES], count = the_dead(dead), ended, owner;
  ms_status status;
  do {
    status = ms_group_try_end(group, now_ns, dead, count, &ended, &owner);
  } while (again(group, status, owner));
}

static void run(uint32_t process) {
  ms_group *group = &groups[process];
  member self = {0};
  uint32_t owner;
  for (uint32_t step = 0; step < STEPS; step++) {
    now_ns++;
    uint32_t what = (uint32_t)(scheduler_random() % 16);
    ms_status status;
    if (!self.joined) {
      memset(&self, 0, sizeof self);
      do {
        self.processing = now_ns + HANGS;
        status = ms_group_try_join(group, NEVER, self.processing, &self.slot, &self.number, &owner);
      } while (again(group, status, owner));
      self.joined = status == MS_OK;
    } else if (what < 5) {
      look(group, &self);
      if (ms_group_renew(&group->members[self.slot].processing, &self.processing, now_ns + HANGS) !=
          MS_OK)
        self.joined = false;
    } else if (what < 13) {
      commit(group, &self, process);
    } else if (what < 15) {
      end_members(group);
    } else {
      do {
        status = ms_group_try_leave(group, self.slot, self.number, &owner);
      } while (again(group, status, owner));
      if (status == MS_OK || status == MS_LOST) self.joined = false;
    }
  }
}

static void at_rest(void) {}

static void reset(void) {
  memset(memory, 0, sizeof memory);
  ms_group_init(memory, store_id, 7, 99, 12345, 1, PARTITIONS);
  for (uint32_t i = 0; i <= PROCESSES; i++) {
    CHECK(ms_group_attach(&groups[i], memory, sizeof memory, store_id, 7, NULL) == MS_OK);
    groups[i].self = self_of(i);
    groups[i].generation = 1;
  }
  memset(committed, 0, sizeof committed);
  memset(in_flight, 0, sizeof in_flight);
  now_ns = 1;
  memset(fences, 0, sizeof fences);
}

/* Everybody is dead or has ended: the dead are ended, and a newcomer has it all. */
static void check_the_end(uint64_t seed) {
  ms_group *group = &groups[PROCESSES];
  int before = atomic_load(&check_failure_count);
  char text[200] = "";
  member self = {0};
  uint32_t owner;
  ms_status status;
  do {
    status = ms_group_try_join(group, NEVER, NEVER, &self.slot, &self.number, &owner);
  } while (again(group, status, owner));
  self.joined = true;
  end_members(group);
  CHECK(ms_group_check(group, text, sizeof text));
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    uint64_t found = position_of(group, i);
    CHECK(found >= committed[i]);
    CHECK(found <= most_of(i));
  }
  if (atomic_load(&check_failure_count) == before) return;
  printf("  seed %" PRIu64 ": %s\n", seed, text);
  scheduler_print_trace();
}

static void test_group_any_schedule_with_kills_keeps_positions_and_shares(void) {
  enum { SCHEDULES = 30000 };
  for (uint64_t seed = 1; seed <= SCHEDULES; seed++) {
    reset();
    scheduler_options options = {.seed = seed,
                                 .process_count = 2 + (uint32_t)(seed % 3),
                                 .kill_one_in = seed % 2 ? 100 : 400,
                                 .pause_one_in = seed % 5 == 0 ? 200 : 0,
                                 .run = run,
                                 .at_rest = at_rest};
    scheduler_result result = scheduler_run(&options);
    kills += result.kills;
    pauses += result.pauses;
    check_the_end(seed);
  }
  printf("  schedules=%d kills=%" PRIu64 " pauses=%" PRIu64 " takeovers=%" PRIu64
         " commits=%" PRIu64 " fenced=%" PRIu64 " seed=1\n",
         SCHEDULES, kills, pauses, takeovers, commits, fenced);
  CHECK(takeovers > 100 && commits > 1000 && fenced > 10);
}

/* One commit, its process killed at each yield point in turn: the old position or the new one. */

static void commit_once(uint32_t process) {
  ms_group *group = &groups[process];
  uint32_t owner, slot, number, changes;
  uint64_t found[PARTITIONS];
  uint8_t flags[PARTITIONS];
  if (ms_group_try_join(group, NEVER, NEVER, &slot, &number, &owner) != MS_OK) return;
  if (ms_group_try_take_up(group, slot, number, found, flags, PARTITIONS, &changes, &owner) !=
      MS_OK)
    return;
  ms_group_claim claim = {slot, 2, found[2]};
  for (uint64_t offset = 1; offset <= 3; offset++) {
    in_flight[process][2] = offset;
    if (ms_group_try_commit(group, &claim, 1, offset, false, &owner) != MS_OK) return;
    in_flight[process][2] = 0;
    committed[2] = offset;
  }
}

static void test_group_killed_at_each_step_leaves_the_old_position_or_the_new(void) {
  uint32_t points = 0;
  /* A kill rate of one in n, over many seeds, comes to every point: counted by what was reached. */
  bool reached[4] = {false};
  for (uint64_t seed = 1; seed <= 4000; seed++) {
    reset();
    scheduler_options options = {.seed = seed,
                                 .process_count = 1,
                                 .kill_one_in = 2 + (uint32_t)(seed % 90),
                                 .run = commit_once};
    scheduler_result result = scheduler_run(&options);
    points = result.steps > points ? result.steps : points;
    reached[committed[2]] = true;
    check_the_end(seed);
  }
  CHECK(reached[0] && reached[1] && reached[2] && reached[3]);
  printf("  yield points of join, look and three commits: %u\n", points);
}

/* One commits, the others look without the word: what they see never goes back. */

static void commit_or_look(uint32_t process) {
  ms_group *group = &groups[process];
  uint64_t seen = 0;
  if (process == 0) {
    uint32_t owner, slot, number, changes;
    uint64_t found[PARTITIONS];
    uint8_t flags[PARTITIONS];
    CHECK(ms_group_try_join(group, NEVER, NEVER, &slot, &number, &owner) == MS_OK);
    CHECK(ms_group_try_take_up(group, slot, number, found, flags, PARTITIONS, &changes, &owner) ==
          MS_OK);
    ms_group_claim claim = {slot, 2, found[2]};
    for (uint64_t offset = 1; offset <= 8; offset++)
      CHECK(ms_group_try_commit(group, &claim, 1, offset, false, &owner) == MS_OK);
    return;
  }
  for (uint32_t look = 0; look < 20; look++) {
    uint64_t found = position_of(group, 2);
    CHECK(found >= seen);
    seen = found;
  }
}

static void test_group_position_that_is_seen_without_the_word_never_goes_back(void) {
  for (uint64_t seed = 1; seed <= 20000; seed++) {
    reset();
    scheduler_options options = {.seed = seed, .process_count = 3, .run = commit_or_look};
    (void)scheduler_run(&options);
  }
}

static const check_test tests[] = {
    CHECK_TEST(test_group_any_schedule_with_kills_keeps_positions_and_shares),
    CHECK_TEST(test_group_killed_at_each_step_leaves_the_old_position_or_the_new),
    CHECK_TEST(test_group_position_that_is_seen_without_the_word_never_goes_back),
};
CHECK_MAIN(tests)
