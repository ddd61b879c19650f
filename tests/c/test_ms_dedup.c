/* flags: -DMS_SCHEDULER
 *
 * The table of deduplication keys: a key is claimed once until it expires, whoever dies where;
 * torn entries count as empty; a copy has all that has not expired.
 */
#include "ms_dedup.h"

#include <pthread.h>
#include <sched.h>

#include "check.h"
#include "ms_xxh3.h"
#include "scheduler.h"

enum {
  ENTRIES = MS_DEDUP_STRIPE_ENTRIES,
  STRIPES_MAX = 16,
  ENTRIES_AT = 2 * MS_PAGE_BYTES,
  TABLE_BYTES = ENTRIES_AT + STRIPES_MAX * ENTRIES * (int)sizeof(ms_dedup_entry),
  NOW = 1700000000,
  SCHEDULES = 20000,
  SCHEDULE_KEYS = 3,
  THREADS = 8,
  THREAD_KEYS = 400
};

static const uint8_t store_id[16] = "0123456789abcde";
static _Alignas(4096) uint8_t memory[2][TABLE_BYTES];
static ms_dedup tables[2];
static ms_dedup *const table = &tables[0];
static uint32_t self, owner;

static ms_dedup *make(uint32_t number, uint32_t stripes) {
  memset(memory[number], 0, TABLE_BYTES);
  ms_dedup_init(memory[number], stripes, store_id, 77);
  CHECK_EQ_U64(
      ms_dedup_open(&tables[number], memory[number], ms_dedup_size(stripes), store_id, 77, NULL),
      MS_OK);
  self = ms_owner_word(3, 9);
  return &tables[number];
}

typedef struct key {
  uint64_t words[2];
} key;

/* Keys of one stripe have equal low bits. */
static key key_in(uint32_t stripe, uint64_t number) {
  return (key){{number << 20 | stripe, number * 0x9e3779b97f4a7c15u}};
}

static ms_dedup_claim existing;

static ms_status claim_in(const ms_dedup *in, key at, uint64_t id, uint32_t now, uint32_t expires) {
  const ms_dedup_claim claim = {.id = id, .slot = (uint32_t)id + 100, .expires = expires};
  return ms_dedup_try_claim(in, self, at.words, &claim, now, &existing, &owner);
}
static ms_status claim(key at, uint64_t id, uint32_t now, uint32_t expires) {
  return claim_in(table, at, id, now, expires);
}
static ms_status settle(key at, uint64_t id, bool done) {
  return ms_dedup_try_end(table, self, at.words, id, done, &owner);
}
static ms_status look(const ms_dedup *in, key at, uint32_t now) {
  return ms_dedup_try_find(in, self, at.words, now, &existing, &owner);
}

/* --- one after the other ---------------------------------------------------------------------- */

static void test_dedup_claim_is_refused_until_it_expires(void) {
  make(0, 4);
  key at = key_in(1, 5);
  CHECK_EQ_U64(look(table, at, NOW), MS_END);
  CHECK_EQ_U64(claim(at, 42, NOW, NOW + 10), MS_OK);
  CHECK_EQ_U64(claim(at, 43, NOW, NOW + 99), MS_END);
  CHECK_EQ_U64(existing.id, 42);
  CHECK_EQ_U64(existing.slot, 142);
  CHECK_EQ_U64(existing.expires, NOW + 10);
  CHECK_EQ_U64(existing.state, MS_DEDUP_PENDING);
  CHECK_EQ_U64(settle(at, 43, true), MS_END);
  CHECK_EQ_U64(settle(at, 42, true), MS_OK);
  CHECK_EQ_U64(claim(at, 43, NOW + 9, NOW + 99), MS_END);
  CHECK_EQ_U64(existing.state, MS_DEDUP_DONE);
  CHECK_EQ_U64(look(table, at, NOW + 10), MS_END);
  CHECK_EQ_U64(claim(at, 43, NOW + 10, NOW + 99), MS_OK);
  CHECK_EQ_U64(look(table, at, NOW), MS_OK); /* the clock set back: once all the same */
  CHECK_EQ_U64(existing.id, 43);
  CHECK(ms_dedup_check(table));
}

static void test_dedup_entry_lies_as_the_format_says(void) {
  make(0, 4);
  key at = key_in(2, 5);
  CHECK_EQ_U64(claim(at, 42, NOW, NOW + 10), MS_OK);
  const uint8_t *bytes = memory[0] + ENTRIES_AT + 2 * ENTRIES * 40;
  uint32_t words[10];
  memcpy(words, bytes, sizeof words);
  CHECK(memcmp(bytes, at.words, 16) == 0);
  CHECK_EQ_U64(words[4], 42);
  CHECK_EQ_U64(words[5], 0);
  CHECK_EQ_U64(words[6], NOW + 10);
  CHECK_EQ_U64(words[7], 0);
  CHECK_EQ_U64(words[8], ms_xxh3_64(bytes, 32, 142) & 0xffffffffu);
  CHECK_EQ_U64(words[9], 142 << 2 | MS_DEDUP_PENDING);
}

static void test_dedup_void_claim_may_be_claimed_again(void) {
  make(0, 1);
  key at = key_in(0, 1);
  CHECK_EQ_U64(claim(at, 1, NOW, NOW + 10), MS_OK);
  CHECK_EQ_U64(settle(at, 1, false), MS_OK);
  CHECK_EQ_U64(settle(at, 1, true), MS_END);
  CHECK_EQ_U64(claim(at, 2, NOW, NOW + 10), MS_OK);
  CHECK(ms_dedup_check(table));
}

static void test_dedup_expired_claim_of_the_key_is_written_over_before_others(void) {
  make(0, 1);
  CHECK_EQ_U64(claim(key_in(0, 1), 1, NOW, NOW + 5), MS_OK);
  CHECK_EQ_U64(claim(key_in(0, 2), 2, NOW, NOW + 10), MS_OK);
  CHECK_EQ_U64(claim(key_in(0, 2), 3, NOW + 10, NOW + 20), MS_OK);
  CHECK(ms_dedup_check(table)); /* the key is there once */
  CHECK_EQ_U64(table->entries[0].id, 1);
  CHECK_EQ_U64(table->entries[1].id, 3);
}

static void test_dedup_full_stripe_says_so_until_one_expires(void) {
  make(0, 4);
  for (uint32_t i = 0; i < ENTRIES; i++)
    CHECK_EQ_U64(claim(key_in(3, i + 1), i, NOW, NOW + 10 + i), MS_OK);
  CHECK_EQ_U64(claim(key_in(3, 900), 900, NOW + 9, NOW + 99), MS_ROLL);
  CHECK_EQ_U64(claim(key_in(3, 7), 900, NOW + 9, NOW + 99), MS_END);
  CHECK_EQ_U64(claim(key_in(2, 900), 900, NOW + 9, NOW + 99), MS_OK); /* another stripe */
  CHECK_EQ_U64(claim(key_in(3, 900), 900, NOW + 10, NOW + 99), MS_OK);
  CHECK_EQ_U64(claim(key_in(3, 901), 901, NOW + 10, NOW + 99), MS_ROLL);
  CHECK(ms_dedup_check(table));
}

static void test_dedup_torn_entry_is_empty(void) {
  make(0, 1);
  for (uint32_t i = 0; i < ENTRIES; i++)
    CHECK_EQ_U64(claim(key_in(0, i + 1), i, NOW, NOW + 10), MS_OK);
  const ms_dedup_entry whole = table->entries[9];
  for (size_t at = 0; at < sizeof whole; at++)
    for (uint32_t bit = 0; bit < 8; bit++) {
      table->entries[9] = whole;
      ((uint8_t *)&table->entries[9])[at] ^= (uint8_t)(1u << bit);
      CHECK_EQ_U64(look(table, key_in(0, 10), NOW), MS_END);
      CHECK_EQ_U64(claim(key_in(0, 555), 555, NOW, NOW + 10), MS_OK); /* in its place */
      CHECK(ms_dedup_check(table));
    }
}

static void test_dedup_recover_frees_words_and_empties_torn_entries(void) {
  make(0, 4);
  CHECK_EQ_U64(claim(key_in(0, 1), 1, NOW, NOW + 10), MS_OK);
  CHECK_EQ_U64(claim(key_in(0, 2), 2, NOW, NOW + 10), MS_OK);
  table->entries[0].place ^= 4;
  atomic_store(&table->words[0], ms_owner_word(7, 7) | MS_OWNER_WAITERS);
  CHECK_EQ_U64(claim(key_in(0, 1), 1, NOW, NOW + 10), MS_BUSY);
  CHECK(!ms_dedup_check(table));
  ms_dedup_recover(table);
  CHECK(ms_dedup_check(table));
  CHECK_EQ_U64(look(table, key_in(0, 1), NOW), MS_END);
  CHECK_EQ_U64(look(table, key_in(0, 2), NOW), MS_OK);
}

static void test_dedup_word_of_a_dead_owner_is_taken_over(void) {
  make(0, 4);
  key at = key_in(2, 1);
  uint32_t dead = ms_owner_word(7, 7);
  CHECK_EQ_U64(claim(at, 1, NOW, NOW + 10), MS_OK);
  CHECK_EQ_U64(claim(key_in(2, 2), 2, NOW, NOW + 10), MS_OK);
  table->entries[2 * ENTRIES + 1].id ^= 1;
  atomic_store(&table->words[2], dead);
  CHECK_EQ_U64(claim(at, 2, NOW, NOW + 10), MS_BUSY);
  CHECK_EQ_U64(owner, dead);
  CHECK_EQ_U64(settle(at, 1, true), MS_BUSY);
  CHECK_EQ_U64(look(table, at, NOW), MS_BUSY);
  CHECK_EQ_U64(claim(key_in(1, 1), 2, NOW, NOW + 10), MS_OK);
  _Atomic uint32_t *word = ms_dedup_word(table, at.words);
  CHECK(word == &table->words[2]);
  CHECK_EQ_U64(ms_dedup_take_over(table, word, self, ms_owner_word(8, 7), &owner), MS_BUSY);
  CHECK_EQ_U64(ms_dedup_take_over(table, word, self, dead, &owner), MS_OK);
  CHECK_EQ_U64(claim(at, 2, NOW, NOW + 10), MS_END);
  CHECK(ms_dedup_check(table));
}

static void test_dedup_copy_has_all_that_has_not_expired(void) {
  ms_dedup *from = make(0, 2), *to = make(1, 16);
  uint32_t stripe = 0;
  for (uint32_t i = 0; i < 2 * ENTRIES; i++)
    CHECK_EQ_U64(claim(key_in(i % 16, i + 1), i, NOW, NOW + 10 + i % 3), MS_OK);
  CHECK_EQ_U64(claim(key_in(0, 999), 1, NOW, NOW + 10), MS_ROLL);
  for (uint32_t i = 0; i < 2 * ENTRIES; i += 5)
    CHECK_EQ_U64(settle(key_in(i % 16, i + 1), i, true), MS_OK);
  atomic_store(&from->words[1], ms_owner_word(7, 7)); /* somebody is at work in stripe 1 */
  CHECK_EQ_U64(ms_dedup_copy(from, to, self, NOW + 10, &stripe, &owner), MS_BUSY);
  CHECK_EQ_U64(stripe, 1);
  CHECK_EQ_U64(owner, ms_owner_word(7, 7));
  CHECK_EQ_U64(claim(key_in(0, 999), 1, NOW, NOW + 10), MS_MOVED);
  CHECK_EQ_U64(settle(key_in(0, 1), 0, false), MS_MOVED);
  CHECK_EQ_U64(look(from, key_in(0, 1), NOW), MS_MOVED);
  atomic_store(&from->words[1], MS_OWNER_FREE);
  for (int again = 0; again < 2; again++) {
    CHECK_EQ_U64(ms_dedup_copy(from, to, self, NOW + 10, &stripe, &owner), MS_OK);
    stripe = 0; /* once more, as when the first one had died */
    for (uint32_t i = 0; i < 2 * ENTRIES; i++) {
      bool expired = i % 3 == 0;
      CHECK_EQ_U64(look(to, key_in(i % 16, i + 1), NOW), expired ? MS_END : MS_OK);
      if (expired) continue;
      CHECK_EQ_U64(existing.id, i);
      CHECK_EQ_U64(existing.slot, i + 100);
      CHECK_EQ_U64(existing.expires, NOW + 10 + i % 3);
      CHECK_EQ_U64(existing.state, i % 5 == 0 ? MS_DEDUP_DONE : MS_DEDUP_PENDING);
    }
    CHECK(ms_dedup_check(to));
  }
  CHECK_EQ_U64(claim_in(to, key_in(0, 999), 1, NOW, NOW + 10), MS_OK);
  CHECK_EQ_U64(ms_dedup_copy(to, from, self, NOW, &stripe, &owner), MS_INVALID);
  ms_dedup_thaw(from);
  CHECK_EQ_U64(look(from, key_in(0, 1), NOW), MS_OK);
}

static void test_dedup_open_refuses_what_is_not_this_table(void) {
  ms_dedup out;
  uint8_t other[16] = "another";
  uint64_t size = ms_dedup_size(4);
  CHECK_EQ_U64(size, ENTRIES_AT + 4 * ENTRIES * 40);
  CHECK_EQ_U64(ms_dedup_size(0), 0);
  CHECK_EQ_U64(ms_dedup_size(3), 0);
  CHECK_EQ_U64(ms_dedup_size(1u << 21), 0);
  CHECK_EQ_U64(ms_dedup_size(2048), 4096 + 8192 + 2048u * ENTRIES * 40);
  make(0, 4);
  CHECK_EQ_U64(ms_dedup_open(&out, memory[0], size - 1, store_id, 77, NULL), MS_CORRUPT);
  CHECK_EQ_U64(ms_dedup_open(&out, memory[0], 64, store_id, 77, NULL), MS_CORRUPT);
  CHECK_EQ_U64(ms_dedup_open(&out, memory[0], size, other, 77, NULL), MS_CORRUPT);
  CHECK_EQ_U64(ms_dedup_open(&out, memory[0], size, store_id, 78, NULL), MS_CORRUPT);
  for (size_t at = 0; at < offsetof(ms_dedup_header, state); at++) {
    memory[0][at] ^= 0x10;
    ms_status status = ms_dedup_open(&out, memory[0], size, store_id, 77, NULL);
    CHECK(status == MS_CORRUPT || (status == MS_VERSION && at / 4 == 2));
    memory[0][at] ^= 0x10;
  }
  /* A checksum that is right over a number of stripes that is not. */
  for (uint32_t stripes = 0; stripes < 40; stripes++) {
    ms_dedup_init(memory[0], stripes, store_id, 77);
    ms_status status = ms_dedup_open(&out, memory[0], size, store_id, 77, NULL);
    CHECK_EQ_U64(status, stripes == 1 || stripes == 2 || stripes == 4 ? MS_OK : MS_CORRUPT);
  }
}

/* --- schedules: deaths under the word --------------------------------------------------------- */

static struct {
  uint8_t won[SCHEDULE_KEYS], begun[SCHEDULE_KEYS];
  uint64_t winner[SCHEDULE_KEYS];
  bool is_void[SCHEDULER_PROCESSES_MAX * 10];
} schedule;

static uint32_t word_of(uint32_t process) { return ms_owner_word(process, 5); }

/* The owner is dead if the scheduler killed it; else go on trying. */
static void deal_with(key at, uint32_t process, uint32_t found) {
  uint32_t dead = ms_owner_index(found & ~MS_OWNER_WAITERS), other = 0;
  if (!CHECK(dead < SCHEDULER_PROCESSES_MAX)) return;
  if (scheduler_now->result.states[dead] == SCHEDULER_KILLED)
    (void)!ms_dedup_take_over(table, ms_dedup_word(table, at.words), word_of(process), found,
                              &other);
  else
    ms_scheduler_yield("wait");
}

static void run_process(uint32_t process) {
  for (uint32_t round = 0; round < 3; round++) {
    uint32_t number = (uint32_t)(scheduler_random() % SCHEDULE_KEYS), found = 0;
    key at = key_in(0, number + 1);
    uint64_t id = process * 10 + round + 1;
    ms_dedup_claim there = {0}, mine = {.id = id, .slot = (uint32_t)id, .expires = NOW + 10};
    ms_status status;
    schedule.begun[number] = 1;
    while ((status = ms_dedup_try_claim(table, word_of(process), at.words, &mine, NOW, &there,
                                        &found)) == MS_BUSY)
      deal_with(at, process, found);
    if (status == MS_OK) {
      CHECK_EQ_U64(schedule.won[number], 0); /* nobody else has it */
      bool done = scheduler_random() % 3 != 0;
      schedule.won[number] = done;
      schedule.winner[number] = id;
      while ((status = ms_dedup_try_end(table, word_of(process), at.words, id, done, &found)) ==
             MS_BUSY)
        deal_with(at, process, found);
      CHECK_EQ_U64(status, MS_OK);
      schedule.is_void[id] = !done;
    } else {
      CHECK_EQ_U64(status, MS_END);
      CHECK(there.id != 0 && there.slot == there.id && there.expires == NOW + 10);
      CHECK(!schedule.is_void[there.id % (SCHEDULER_PROCESSES_MAX * 10)]);
      if (schedule.won[number]) CHECK_EQ_U64(there.id, schedule.winner[number]);
    }
  }
}

static void test_dedup_schedules_claim_each_key_once(void) {
#ifdef __SANITIZE_THREAD__
  CHECK_SKIP("TSan does not know these coroutines");
#endif
  const char *wanted = getenv("MS_SEED");
  uint64_t begin = wanted != NULL ? strtoull(wanted, NULL, 0) : 1, kills = 0, takers = 0;
  uint64_t end = wanted != NULL ? begin + 1 : begin + SCHEDULES;
  for (uint64_t seed = begin; seed < end; seed++) {
    int failures = atomic_load(&check_failure_count);
    memset(&schedule, 0, sizeof schedule);
    make(0, 1);
    scheduler_options options = {.seed = seed,
                                 .process_count = 2 + (uint32_t)(seed % 3),
                                 .kill_one_in = 12,
                                 .spared = 1,
                                 .steps_max = 20000,
                                 .run = run_process};
    scheduler_result result = scheduler_run(&options);
    kills += result.kills;
    uint32_t word = atomic_load(&table->words[0]);
    if (word != MS_OWNER_FREE) {
      takers++;
      CHECK_EQ_U64(result.states[ms_owner_index(word)], SCHEDULER_KILLED);
      CHECK_EQ_U64(ms_dedup_take_over(table, &table->words[0], self, word, &owner), MS_OK);
    }
    CHECK(ms_dedup_check(table));
    for (uint32_t number = 0; number < SCHEDULE_KEYS; number++) {
      ms_status status = look(table, key_in(0, number + 1), NOW);
      if (schedule.won[number]) {
        CHECK_EQ_U64(status, MS_OK);
        CHECK_EQ_U64(existing.id, schedule.winner[number]);
      }
      if (!schedule.begun[number]) CHECK_EQ_U64(status, MS_END);
      if (status == MS_OK) CHECK(!schedule.is_void[existing.id % (SCHEDULER_PROCESSES_MAX * 10)]);
    }
    if (atomic_load(&check_failure_count) != failures) {
      printf("  MS_SEED=%" PRIu64 "\n", seed);
      scheduler_print_trace();
      return;
    }
  }
  printf("  schedules=%" PRIu64 " kills=%" PRIu64 " words_left=%" PRIu64 " seed=%" PRIu64 "\n",
         end - begin, kills, takers, begin);
}

/* --- threads ---------------------------------------------------------------------------------- */

static atomic_uint thread_wins[THREAD_KEYS];
static atomic_bool copied;

static void *claimer(void *argument) {
  uint32_t index = (uint32_t)(uintptr_t)argument, found = 0;
  const ms_dedup *here = &tables[0];
  for (uint32_t i = 0; i < THREAD_KEYS; i++) {
    uint32_t number = (i + index * 13) % THREAD_KEYS;
    key at = key_in(number % 16, number + 1);
    ms_dedup_claim there = {0}, mine = {.id = index * 1000 + number, .expires = NOW + 10};
    ms_status status;
    while ((status = ms_dedup_try_claim(here, ms_owner_word(index, 1), at.words, &mine, NOW, &there,
                                        &found)) != MS_OK &&
           status != MS_END) {
      if (!CHECK(status == MS_BUSY || status == MS_MOVED)) return NULL;
      if (status == MS_MOVED && atomic_load(&copied))
        here = &tables[1];
      else
        sched_yield();
    }
    if (status == MS_OK)
      atomic_fetch_add(&thread_wins[number], 1);
    else
      CHECK_EQ_U64(there.id % 1000, number);
  }
  return NULL;
}

static void *mover(void *argument) {
  (void)argument;
  uint32_t stripe = 0, found = 0;
  while (atomic_load(&thread_wins[THREAD_KEYS / 3]) == 0) sched_yield(); /* in the midst of it */
  while (ms_dedup_copy(&tables[0], &tables[1], ms_owner_word(100, 1), NOW, &stripe, &found) !=
         MS_OK)
    sched_yield();
  atomic_store(&copied, true);
  return NULL;
}

static void run_threads(bool moving) {
  pthread_t threads[THREADS + 1];
  uint32_t count = THREADS + (moving ? 1 : 0);
  memset((void *)thread_wins, 0, sizeof thread_wins);
  atomic_store(&copied, false);
  make(0, 8);
  make(1, 16);
  for (uint32_t i = 0; i < count; i++)
    if (!CHECK(pthread_create(&threads[i], NULL, i == THREADS ? mover : claimer,
                              (void *)(uintptr_t)i) == 0))
      exit(1);
  for (uint32_t i = 0; i < count; i++) pthread_join(threads[i], NULL);
  for (uint32_t number = 0; number < THREAD_KEYS; number++) {
    CHECK_EQ_U64(thread_wins[number], 1);
    CHECK_EQ_U64(look(&tables[moving], key_in(number % 16, number + 1), NOW), MS_OK);
  }
  CHECK(ms_dedup_check(&tables[moving]));
}

static void test_dedup_threads_claim_each_key_once(void) { run_threads(false); }

static void test_dedup_threads_claim_each_key_once_across_a_copy(void) {
  for (int round = 0; round < 10; round++) run_threads(true);
}

static const check_test tests[] = {
    CHECK_TEST(test_dedup_claim_is_refused_until_it_expires),
    CHECK_TEST(test_dedup_entry_lies_as_the_format_says),
    CHECK_TEST(test_dedup_void_claim_may_be_claimed_again),
    CHECK_TEST(test_dedup_expired_claim_of_the_key_is_written_over_before_others),
    CHECK_TEST(test_dedup_full_stripe_says_so_until_one_expires),
    CHECK_TEST(test_dedup_torn_entry_is_empty),
    CHECK_TEST(test_dedup_recover_frees_words_and_empties_torn_entries),
    CHECK_TEST(test_dedup_word_of_a_dead_owner_is_taken_over),
    CHECK_TEST(test_dedup_copy_has_all_that_has_not_expired),
    CHECK_TEST(test_dedup_open_refuses_what_is_not_this_table),
    CHECK_TEST(test_dedup_schedules_claim_each_key_once),
    CHECK_TEST(test_dedup_threads_claim_each_key_once),
    CHECK_TEST(test_dedup_threads_claim_each_key_once_across_a_copy),
};
CHECK_MAIN(tests)
