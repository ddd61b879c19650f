/* Leases of plain words: renewed by the thread in time, not after their limit, not by a child. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "ms_heartbeat.h"
#include "ms_word.h"

enum { LEASE_MS = 30, THREADS = 4, ROUNDS = 2000 };

static void sleep_ms(int64_t ms) {
  struct timespec span = {ms / 1000, ms % 1000 * 1000000};
  while (nanosleep(&span, &span) != 0) continue;
}

static uint64_t leased(void) {
  uint64_t tick = (uint64_t)(ms_clock_monotonic_ns() / 1000000 + LEASE_MS) & MS_TICK_MASK;
  return (uint64_t)MS_MESSAGE_LEASED << 59 | UINT64_C(1) << 50 | tick;
}

/* Wait until the word differs; half a minute is for ever. */
static bool changes(_Atomic uint64_t *word, uint64_t from) {
  for (int i = 0; i < 30000; i++) {
    if (atomic_load(word) != from) return true;
    sleep_ms(1);
  }
  return false;
}

static void test_lease_is_renewed_until_removed(void) {
  uint64_t token = leased();
  _Atomic uint64_t word = token;
  ms_heartbeat_entry entry;
  ms_heartbeat_state state;
  CHECK(ms_heartbeat_add(&entry, &word, token, LEASE_MS, -1) == 0);
  CHECK_EQ_U64(ms_heartbeat_count(), 1);
  CHECK(changes(&word, token));
  CHECK(changes(&word, atomic_load(&word)));
  ms_heartbeat_remove(&entry, &state);
  CHECK(!state.lost && !state.over);
  CHECK_EQ_U64(state.token, atomic_load(&word));
  CHECK_EQ_U64(ms_word_state(state.token), MS_MESSAGE_LEASED);
  CHECK_EQ_U64(ms_word_attempts(state.token), 1);
  sleep_ms(2 * LEASE_MS);
  CHECK_EQ_U64(state.token, atomic_load(&word));
  CHECK_EQ_U64(ms_heartbeat_count(), 0);
  ms_heartbeat_remove(&entry, &state); /* again: nothing */
  CHECK_EQ_U64(state.token, atomic_load(&word));
}

static void test_lease_is_not_renewed_after_its_limit(void) {
  uint64_t token = leased();
  _Atomic uint64_t word = token;
  ms_heartbeat_entry entry;
  ms_heartbeat_state state;
  CHECK(ms_heartbeat_add(&entry, &word, token, LEASE_MS, 5 * LEASE_MS * INT64_C(1000000)) == 0);
  CHECK(changes(&word, token));
  for (int i = 0; i < 30000 && ms_heartbeat_count() > 0; i++) sleep_ms(1);
  uint64_t last = atomic_load(&word);
  sleep_ms(2 * LEASE_MS);
  CHECK_EQ_U64(atomic_load(&word), last);
  ms_heartbeat_remove(&entry, &state);
  CHECK(state.over && !state.lost);
  CHECK_EQ_U64(state.token, last);
}

static void test_lease_that_another_got_is_left_alone(void) {
  uint64_t token = leased(), other = token ^ UINT64_C(1) << 34;
  _Atomic uint64_t word = token;
  ms_heartbeat_entry entry;
  ms_heartbeat_state state;
  CHECK(ms_heartbeat_add(&entry, &word, token, LEASE_MS, -1) == 0);
  atomic_store(&word, other);
  for (int i = 0; i < 30000 && ms_heartbeat_count() > 0; i++) sleep_ms(1);
  ms_heartbeat_remove(&entry, &state);
  CHECK(state.lost);
  CHECK_EQ_U64(atomic_load(&word), other);
  CHECK(ms_heartbeat_extend(&entry, LEASE_MS) == MS_LOST);
}

static void test_extend_renews_at_once_and_goes_on(void) {
  uint64_t token = leased();
  _Atomic uint64_t word = token;
  ms_heartbeat_entry entry;
  ms_heartbeat_state state;
  CHECK(ms_heartbeat_add(&entry, &word, token, 60000, -1) == 0);
  CHECK(ms_heartbeat_extend(&entry, 2 * LEASE_MS) == MS_OK);
  uint64_t extended = atomic_load(&word);
  CHECK(extended != token);
  CHECK(changes(&word, extended));
  ms_heartbeat_check(&entry, &state);
  CHECK(!state.lost);
  ms_heartbeat_remove(&entry, &state);
  CHECK_EQ_U64(state.token, atomic_load(&word));
}

static void test_jump_of_the_virtual_clock_renews_soon(void) {
  ms_clock_set(true, 0, 0);
  uint64_t token = leased();
  _Atomic uint64_t word = token;
  ms_heartbeat_entry entry;
  ms_heartbeat_state state;
  CHECK(ms_heartbeat_add(&entry, &word, token, 3600000, -1) == 0);
  sleep_ms(5);
  CHECK_EQ_U64(atomic_load(&word), token);
  ms_clock_set(true, INT64_C(2000) * 1000000000, 0);
  CHECK(changes(&word, token));
  ms_heartbeat_remove(&entry, &state);
  ms_clock_set(false, 0, 0);
}

static void test_thread_starts_again_after_a_stop(void) {
  ms_heartbeat_stop();
  ms_heartbeat_stop();
  test_lease_is_renewed_until_removed();
  ms_heartbeat_stop();
}

static void test_child_renews_its_own_and_not_its_parents(void) {
#if defined(__SANITIZE_THREAD__)
  CHECK_SKIP("TSan cannot follow threads that begin after a fork of many");
#endif
  uint64_t token = leased();
  _Atomic uint64_t word = token;
  ms_heartbeat_entry entry;
  ms_heartbeat_state state;
  CHECK(ms_heartbeat_add(&entry, &word, token, LEASE_MS, -1) == 0);
  pid_t child = fork();
  if (child == 0) {
    bool empty = ms_heartbeat_count() == 0;
    uint64_t before = atomic_load(&word); /* a copy: the memory is private */
    test_lease_is_renewed_until_removed();
    bool untouched = atomic_load(&word) == before;
    ms_heartbeat_remove(&entry, &state);
    _Exit(empty && untouched && atomic_load(&check_failure_count) == 0 ? 0 : 1);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK_EQ_U64(status, 0);
  CHECK(changes(&word, atomic_load(&word)));
  ms_heartbeat_remove(&entry, &state);
  CHECK(!state.lost);
}

static void *hold_leases(void *unused) {
  (void)unused;
  for (int i = 0; i < ROUNDS; i++) {
    uint64_t token = leased();
    _Atomic uint64_t word = token;
    ms_heartbeat_entry entry;
    ms_heartbeat_state state;
    if (ms_heartbeat_add(&entry, &word, token, 1, -1) != 0) {
      CHECK(false);
      break;
    }
    if (i % 100 == 0) sleep_ms(2);
    ms_heartbeat_remove(&entry, &state);
    CHECK_EQ_U64(atomic_load(&word), state.token);
    CHECK(!state.lost);
  }
  return NULL;
}

static void test_many_threads_add_and_remove_beside_stops(void) {
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; i++) {
    CHECK(pthread_create(&threads[i], NULL, hold_leases, NULL) == 0);
  }
  for (int i = 0; i < 20; i++) {
    sleep_ms(1);
    ms_heartbeat_stop();
  }
  for (int i = 0; i < THREADS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
  CHECK_EQ_U64(ms_heartbeat_count(), 0);
  ms_heartbeat_stop();
}

static const check_test tests[] = {
    CHECK_TEST(test_lease_is_renewed_until_removed),
    CHECK_TEST(test_lease_is_not_renewed_after_its_limit),
    CHECK_TEST(test_lease_that_another_got_is_left_alone),
    CHECK_TEST(test_extend_renews_at_once_and_goes_on),
    CHECK_TEST(test_jump_of_the_virtual_clock_renews_soon),
    CHECK_TEST(test_thread_starts_again_after_a_stop),
    CHECK_TEST(test_child_renews_its_own_and_not_its_parents),
    CHECK_TEST(test_many_threads_add_and_remove_beside_stops),
};
CHECK_MAIN(tests)
