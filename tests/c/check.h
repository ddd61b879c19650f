/* The assert header of the C tests. One program is one table of named functions:
 *
 *   static void test_subject_situation_outcome(void) { CHECK(1 + 1 == 2); }
 *   static const check_test tests[] = {CHECK_TEST(test_subject_situation_outcome)};
 *   CHECK_MAIN(tests)
 *
 * Prints each name and outcome. Exit code 0: all passed, 1: one failed, 77: none failed, none
 * passed, some skipped. An argument runs only the tests whose name contains it. A failed check is
 * counted and the test goes on, so checks may be made from any thread; `if (!CHECK(p)) return;`
 * where going on is no use. After 20 failures the program gives up.
 */
#ifndef CHECK_H
#define CHECK_H

#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef CHECK_FAILURE_COUNT_MAX
#define CHECK_FAILURE_COUNT_MAX 20
#endif

typedef struct check_test {
  const char *name;
  void (*run)(void);
} check_test;

static atomic_int check_failure_count; /* over all tests */
static const char *check_skip_reason;  /* of the running test; NULL: not skipped */

static inline void check_failed(void) {
  if (atomic_fetch_add(&check_failure_count, 1) + 1 < CHECK_FAILURE_COUNT_MAX) return;
  printf("giving up after %d failed checks\n", CHECK_FAILURE_COUNT_MAX);
  fflush(stdout);
  _Exit(1);
}

static inline bool check_that(bool holds, const char *text, const char *file, int line) {
  if (holds) return true;
  printf("  %s:%d: %s\n", file, line, text);
  fflush(stdout); /* a crash may follow */
  check_failed();
  return false;
}

static inline bool check_equal_u64(uint64_t found, uint64_t expected, const char *text,
                                   const char *file, int line) {
  if (found == expected) return true;
  printf("  %s:%d: %s is %" PRIu64 " (0x%" PRIx64 "), expected %" PRIu64 " (0x%" PRIx64 ")\n", file,
         line, text, found, found, expected, expected);
  fflush(stdout);
  check_failed();
  return false;
}

/* Each gives true if the check holds, and evaluates its arguments once. */
#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)
#define CHECK_EQ_U64(found, expected) \
  check_equal_u64((uint64_t)(found), (uint64_t)(expected), #found, __FILE__, __LINE__)

/* How many of them: MILLSTREAM_FULL=1 asks for all that there are. */
static inline uint64_t check_count(uint64_t usual, uint64_t full) {
  const char *wanted = getenv("MILLSTREAM_FULL");
  return wanted != NULL && *wanted != 0 ? full : usual;
}

/* Leave the running test: this machine cannot tell. */
#define CHECK_SKIP(reason)        \
  do {                            \
    check_skip_reason = (reason); \
    return;                       \
  } while (0)

#define CHECK_TEST(function) {#function, function}
#define CHECK_MAIN(tests)                                                                   \
  int main(int argc, char **argv) {                                                         \
    return check_run((tests), sizeof(tests) / sizeof((tests)[0]), argc > 1 ? argv[1] : ""); \
  }

static inline int check_run(const check_test *tests, size_t test_count, const char *wanted) {
  size_t passed_count = 0, skipped_count = 0, failed_count = 0;
  for (size_t i = 0; i < test_count; i++) {
    if (strstr(tests[i].name, wanted) == NULL) continue;
    int failures_before = atomic_load(&check_failure_count);
    check_skip_reason = NULL;
    tests[i].run();
    if (atomic_load(&check_failure_count) != failures_before) {
      failed_count++;
      printf("FAILED  %s\n", tests[i].name);
    } else if (check_skip_reason != NULL) {
      skipped_count++;
      printf("skipped %s: %s\n", tests[i].name, check_skip_reason);
    } else {
      passed_count++;
      printf("passed  %s\n", tests[i].name);
    }
    fflush(stdout);
  }
  if (failed_count == 0 && passed_count + skipped_count > 0) return passed_count > 0 ? 0 : 77;
  if (failed_count == 0) printf("no test is named like \"%s\"\n", wanted);
  return 1;
}

#endif
