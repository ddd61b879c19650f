/* flags: -DMS_SCHEDULER
 *
 * The ring: every hint that was put comes out at least once, one that was dropped never, whoever is
 * killed or paused wherever; laps and positions wrap; damage is got over.
 */
#include "ms_ring.h"

#include <pthread.h>
#include <sched.h>

#include "check.h"
#include "scheduler.h"
#include "xorshift.h"

enum {
  SCHEDULES = 100000,
  SCHEDULE_HINTS = 32,
  THREADS = 4, /* of producers, and so many consumers */
  THREAD_CELL_BITS = 5,
  THREAD_PUTS = 60000,
  CELLS_MAX = 1 << 10
};

#define LAPS (UINT64_C(1) << 30)

static ms_lane_hints ends;
static _Atomic uint64_t cells[CELLS_MAX];
static ms_ring ring = {&ends, cells, 0};

/* An empty ring at a position, as the laps before left it. */
static void start(uint32_t cell_bits, uint64_t position) {
  ring.cell_bits = cell_bits;
  uint64_t count = UINT64_C(1) << cell_bits;
  for (uint64_t at = position - count; at != position; at++)
    atomic_store(&cells[at % count], ((at >> cell_bits) + 1) % LAPS << MS_RING_HINT_BITS);
  atomic_store(&ends.head, position);
  atomic_store(&ends.tail, position);
}

static bool take(uint64_t *hint) {
  uint64_t head = ms_ring_head(&ring);
  if (!ms_ring_at(&ring, head, hint)) return false;
  ms_ring_advance(&ring, head, head + 1);
  return true;
}

/* --- one after the other ---------------------------------------------------------------------- */

static void test_ring_of_zeros_is_empty(void) {
  uint64_t hint = 0;
  memset((void *)cells, 0, sizeof cells);
  memset((void *)&ends, 0, sizeof ends);
  ring.cell_bits = 3;
  CHECK(ms_ring_check(&ring));
  CHECK(!take(&hint));
  CHECK(ms_ring_try_put(&ring, 77));
  CHECK_EQ_U64(atomic_load(&cells[0]), UINT64_C(1) << 34 | 77);
  CHECK(take(&hint));
  CHECK_EQ_U64(hint, 77);
  CHECK(!take(&hint));
  CHECK(ms_ring_check(&ring));
}

static void test_ring_full_drops_and_goes_on(void) {
  for (uint32_t bits = 0; bits < 6; bits++) {
    uint64_t hint = 0, count = UINT64_C(1) << bits;
    start(bits, 0);
    for (uint64_t round = 0; round < 5; round++) {
      for (uint64_t i = 0; i < count; i++) CHECK(ms_ring_try_put(&ring, 100 * round + i));
      CHECK(!ms_ring_try_put(&ring, 1));
      CHECK(ms_ring_check(&ring));
      CHECK_EQ_U64(ms_ring_tail(&ring) - ms_ring_head(&ring), count);
      for (uint64_t i = 0; i < count; i++) {
        CHECK(take(&hint));
        CHECK_EQ_U64(hint, 100 * round + i);
        if (i == 0 && round % 2 == 1) { /* room for one at once */
          CHECK(ms_ring_try_put(&ring, 100 * round + count));
          CHECK(!ms_ring_try_put(&ring, 1));
        }
      }
      if (round % 2 == 1) CHECK(take(&hint));
      CHECK(!take(&hint));
    }
  }
}

static void test_ring_laps_and_positions_wrap(void) {
  for (uint32_t bits = 0; bits < 6; bits++) {
    const uint64_t count = UINT64_C(1) << bits;
    const uint64_t begins[] = {(LAPS - 3) << bits, UINT64_MAX - 2 * count};
    for (size_t i = 0; i < 2; i++) {
      uint64_t hint = 0;
      start(bits, begins[i] - next_random() % count);
      for (uint64_t n = 0; n < 6 * count; n++) {
        CHECK(ms_ring_try_put(&ring, n));
        if (n + 1 >= count) {
          CHECK(take(&hint));
          CHECK_EQ_U64(hint, n + 1 - count);
        }
        CHECK(ms_ring_check(&ring));
      }
    }
  }
}

static void test_ring_hint_of_34_bits_stays_whole(void) {
  const uint64_t all = (UINT64_C(1) << MS_RING_HINT_BITS) - 1;
  uint64_t hint = 0;
  start(2, 0);
  CHECK(ms_ring_try_put(&ring, all));
  CHECK(take(&hint));
  CHECK_EQ_U64(hint, all);
}

static void test_ring_lagging_tail_is_helped(void) {
  for (int consumed = 0; consumed < 2; consumed++) {
    uint64_t hint = 0;
    start(2, 8);
    atomic_store(&cells[0], UINT64_C(3) << MS_RING_HINT_BITS | 41); /* put, then killed */
    CHECK_EQ_U64(ms_ring_tail(&ring), 8);
    if (consumed != 0) { /* the head goes beyond the tail */
      CHECK(take(&hint));
      CHECK_EQ_U64(hint, 41);
      CHECK_EQ_U64(ms_ring_head(&ring), 9);
    }
    CHECK(ms_ring_try_put(&ring, 42));
    CHECK_EQ_U64(ms_ring_tail(&ring), 10);
    if (consumed == 0) {
      CHECK(take(&hint));
      CHECK_EQ_U64(hint, 41);
    }
    CHECK(take(&hint));
    CHECK_EQ_U64(hint, 42);
    CHECK(ms_ring_check(&ring));
  }
}

static void test_ring_overwritten_and_future_positions_are_not_there(void) {
  uint64_t hint = 0;
  start(2, 0);
  for (uint64_t n = 0; n < 6; n++) {
    CHECK(ms_ring_try_put(&ring, n));
    CHECK(take(&hint));
  }
  CHECK(!ms_ring_at(&ring, 1, &hint));
  CHECK(ms_ring_at(&ring, 2, &hint));
  CHECK(!ms_ring_at(&ring, 6, &hint));
  ms_ring_advance(&ring, 6, 5);
  ms_ring_advance(&ring, 3, 9);
  CHECK_EQ_U64(ms_ring_head(&ring), 6);
}

static void test_ring_damage_is_got_over(void) {
  for (uint32_t round = 0; round < 20000; round++) {
    uint32_t bits = (uint32_t)(next_random() % 6);
    uint64_t count = UINT64_C(1) << bits, hint = 0;
    start(bits, next_random() % 1000);
    for (uint64_t n = next_random() % (count + 1); n > 0; n--) ms_ring_try_put(&ring, n);
    for (uint64_t n = 0; n < 1 + round % 5; n++) {
      /* Nearly right words are the worst. */
      uint64_t flip = next_random() % 3 == 0 ? next_random() : UINT64_C(1) << next_random() % 64;
      switch (next_random() % 4) {
        case 0:
          atomic_fetch_xor(&ends.head, flip);
          break;
        case 1:
          atomic_fetch_xor(&ends.tail, flip);
          break;
        case 2:
          atomic_fetch_add(&ends.tail, next_random() % 9 - 4);
          break;
        default:
          atomic_fetch_xor(&cells[next_random() % count], flip);
          break;
      }
    }
    for (uint64_t n = 0; n < 6 * count + 6; n++) {
      ms_ring_try_put(&ring, 1);
      take(&hint);
    }
    for (uint64_t n = 0; n < 2 * count && take(&hint); n++) {}
    CHECK(ms_ring_try_put(&ring, 5000));
    CHECK(take(&hint));
    CHECK_EQ_U64(hint, 5000);
    if (!CHECK(ms_ring_check(&ring))) printf("  round %" PRIu32 "\n", round);
  }
}

/* --- schedules -------------------------------------------------------------------------------- */

enum { UNKNOWN, PUTTING, ACCEPTED, DROPPED };

static struct {
  uint8_t fate[SCHEDULE_HINTS], seen[SCHEDULE_HINTS];
  uint32_t hints, producers;
} schedule;

static void saw(uint64_t hint) {
  if (!CHECK(hint < SCHEDULE_HINTS)) return;
  CHECK(schedule.fate[hint] == PUTTING || schedule.fate[hint] == ACCEPTED);
  schedule.seen[hint] = 1;
}

static void produce(void) {
  uint32_t puts = 1 + (uint32_t)(scheduler_random() % 4);
  while (puts-- > 0) {
    uint32_t hint = schedule.hints++;
    schedule.fate[hint] = PUTTING;
    schedule.fate[hint] = ms_ring_try_put(&ring, hint) ? ACCEPTED : DROPPED;
  }
}

static void consume(void) {
  uint32_t takes = 1 + (uint32_t)(scheduler_random() % 6);
  while (takes-- > 0) {
    uint64_t hint, head = ms_ring_head(&ring), position = head;
    while (position - head < 2 && ms_ring_at(&ring, position, &hint)) {
      saw(hint);
      position++;
    }
    ms_ring_advance(&ring, head, position);
  }
}

static void run_process(uint32_t process) {
  if (process < schedule.producers)
    produce();
  else
    consume();
  if (scheduler_random() % 4 == 0) consume();
  if (scheduler_random() % 4 == 0) produce();
}

/* What the living find when the others stand still or are dead. */
static void drain(void) {
  uint64_t hint;
  CHECK(ms_ring_check(&ring));
  while (take(&hint)) saw(hint);
  for (uint32_t i = 0; i < schedule.hints; i++) {
    if (schedule.fate[i] == ACCEPTED) CHECK_EQ_U64(schedule.seen[i], 1);
    if (schedule.fate[i] != DROPPED) continue;
    CHECK_EQ_U64(schedule.seen[i], 0);
    CHECK(schedule.hints > 1u << ring.cell_bits); /* there was room for all */
  }
  CHECK(ms_ring_check(&ring));
}

static void test_ring_schedules_lose_no_hint(void) {
#ifdef __SANITIZE_THREAD__
  CHECK_SKIP("TSan does not know these coroutines");
#endif
  const char *wanted = getenv("MS_SEED");
  uint64_t begin = wanted != NULL ? strtoull(wanted, NULL, 0) : 1, kills = 0, pauses = 0, steps = 0;
  uint64_t end = wanted != NULL ? begin + 1 : begin + SCHEDULES, dropped = 0, unfinished = 0;
  for (uint64_t seed = begin; seed < end; seed++) {
    int failures = atomic_load(&check_failure_count);
    uint32_t bits = (uint32_t)(seed % 3), kind = (uint32_t)(seed / 3 % 4);
    memset(&schedule, 0, sizeof schedule);
    schedule.producers = 1 + (uint32_t)(seed / 12 % 3);
    start(bits, kind == 0 ? 0 : kind == 1 ? (LAPS << bits) - 3 : kind == 2 ? UINT64_MAX - 2 : seed);
    scheduler_options options = {.seed = seed,
                                 .process_count = 2 + (uint32_t)(seed / 36 % 3),
                                 .kill_one_in = seed % 5 == 0 ? 0 : 24,
                                 .pause_one_in = seed % 7 == 0 ? 0 : 16,
                                 .steps_max = 4000,
                                 .run = run_process,
                                 .at_rest = seed % 4 == 0 ? NULL : drain};
    scheduler_result result = scheduler_run(&options);
    drain();
    kills += result.kills;
    pauses += result.pauses;
    steps += result.steps;
    for (uint32_t i = 0; i < schedule.hints; i++) {
      dropped += schedule.fate[i] == DROPPED;
      unfinished += schedule.fate[i] == PUTTING;
    }
    if (atomic_load(&check_failure_count) != failures) {
      printf("  MS_SEED=%" PRIu64 "\n", seed);
      scheduler_print_trace();
      return;
    }
  }
  printf("  schedules=%" PRIu64 " kills=%" PRIu64 " pauses=%" PRIu64 " steps=%" PRIu64
         " dropped=%" PRIu64 " unfinished=%" PRIu64 " seed=%" PRIu64 "\n",
         end - begin, kills, pauses, steps, dropped, unfinished, begin);
}

/* --- threads ---------------------------------------------------------------------------------- */

static _Atomic uint8_t seen[THREADS * THREAD_PUTS], accepted[THREADS * THREAD_PUTS];
static atomic_int producing;

static void *producer(void *argument) {
  uint32_t number = (uint32_t)(uintptr_t)argument;
  for (uint32_t i = 0; i < THREAD_PUTS; i++) {
    uint32_t hint = number * THREAD_PUTS + i;
    bool put = ms_ring_try_put(&ring, hint);
    atomic_store_explicit(&accepted[hint], put, memory_order_relaxed);
    if (!put) sched_yield();
  }
  atomic_fetch_sub(&producing, 1);
  return NULL;
}

static void *consumer(void *argument) {
  uint64_t last[THREADS] = {0}, hint, past = 0;
  (void)argument;
  for (;;) {
    bool ending = atomic_load(&producing) == 0;
    uint64_t head = ms_ring_head(&ring);
    if (ms_ring_at(&ring, head, &hint)) {
      if (!CHECK(hint < THREADS * THREAD_PUTS)) return NULL;
      atomic_store_explicit(&seen[hint], 1, memory_order_relaxed);
      /* In the order of each producer. */
      uint64_t from = hint / THREAD_PUTS;
      if (head >= past) {
        CHECK(hint % THREAD_PUTS + 1 > last[from]);
        last[from] = hint % THREAD_PUTS + 1;
        past = head + 1;
      }
      ms_ring_advance(&ring, head, head + 1);
    } else if (ending && ms_ring_head(&ring) == head) {
      return NULL;
    }
  }
}

static void test_ring_threads_lose_no_hint(void) {
  pthread_t threads[2 * THREADS];
  start(THREAD_CELL_BITS, LAPS * (1u << THREAD_CELL_BITS) - 10000);
  atomic_store(&producing, THREADS);
  for (uint32_t i = 0; i < 2 * THREADS; i++)
    if (!CHECK(pthread_create(&threads[i], NULL, i < THREADS ? producer : consumer,
                              (void *)(uintptr_t)i) == 0))
      exit(1);
  for (uint32_t i = 0; i < 2 * THREADS; i++) pthread_join(threads[i], NULL);
  uint64_t put = 0;
  for (uint32_t i = 0; i < THREADS * THREAD_PUTS; i++) {
    put += accepted[i];
    CHECK_EQ_U64(seen[i], accepted[i]);
  }
  printf("  put %" PRIu64 " of %d\n", put, THREADS * THREAD_PUTS);
  CHECK(ms_ring_check(&ring));
  CHECK_EQ_U64(ms_ring_tail(&ring), ms_ring_head(&ring));
}

static void *damager(void *argument) {
  (void)argument;
  uint64_t word = 88172645463325252u;
  for (uint32_t i = 0; i < 3000; i++) {
    word ^= word << 13;
    word ^= word >> 7;
    word ^= word << 17;
    _Atomic uint64_t *at = word % 4 == 0   ? &ends.head
                           : word % 4 == 1 ? &ends.tail
                                           : &cells[word / 4 % (1u << THREAD_CELL_BITS)];
    atomic_fetch_xor(at, word % 3 == 0 ? word : UINT64_C(1) << (word >> 20) % 64);
    if (i % 8 == 0) sched_yield();
  }
  return NULL;
}

static void *unharmed(void *argument) {
  uint64_t hint;
  for (uint32_t i = 0; i < THREAD_PUTS; i++) {
    if (argument != NULL)
      ms_ring_try_put(&ring, i);
    else
      take(&hint);
  }
  return NULL;
}

static void test_ring_threads_under_damage_do_not_hang(void) {
  pthread_t threads[2 * THREADS + 1];
  uint64_t hint = 0;
  start(THREAD_CELL_BITS, 0);
  for (uint32_t i = 0; i < 2 * THREADS + 1; i++)
    if (!CHECK(pthread_create(&threads[i], NULL, i == 0 ? damager : unharmed,
                              i % 2 == 0 ? &ring : NULL) == 0))
      exit(1);
  for (uint32_t i = 0; i < 2 * THREADS + 1; i++) pthread_join(threads[i], NULL);
  for (uint32_t n = 0; n < 8u << THREAD_CELL_BITS; n++) {
    ms_ring_try_put(&ring, 1);
    take(&hint);
  }
  while (take(&hint)) {}
  CHECK(ms_ring_try_put(&ring, 7));
  CHECK(take(&hint));
  CHECK_EQ_U64(hint, 7);
  CHECK(ms_ring_check(&ring));
}

static const check_test tests[] = {
    CHECK_TEST(test_ring_of_zeros_is_empty),
    CHECK_TEST(test_ring_full_drops_and_goes_on),
    CHECK_TEST(test_ring_laps_and_positions_wrap),
    CHECK_TEST(test_ring_hint_of_34_bits_stays_whole),
    CHECK_TEST(test_ring_lagging_tail_is_helped),
    CHECK_TEST(test_ring_overwritten_and_future_positions_are_not_there),
    CHECK_TEST(test_ring_damage_is_got_over),
    CHECK_TEST(test_ring_schedules_lose_no_hint),
    CHECK_TEST(test_ring_threads_lose_no_hint),
    CHECK_TEST(test_ring_threads_under_damage_do_not_hang),
};
CHECK_MAIN(tests)
