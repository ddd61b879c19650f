/* The table of a view against a plain list: put, replace, remove, find, grow. */
#include "check.h"
#include "ms_latest.h"
#include "xorshift.h"

enum { KEYS = 3000, STEPS = 200000 };

static uint8_t values[KEYS][40];
static int32_t sizes[KEYS]; /* -1: not there */

static uint32_t key_into(uint8_t *key, uint32_t i) {
  memset(key, 'k', 12);
  memcpy(key, &i, sizeof i);
  return 4 + i % 8; /* keys that are the beginning of others */
}

static void test_table_has_what_was_put_last(void) {
  ms_latest table = {.seed = 99};
  uint8_t key[12];
  uint64_t count = 0;
  for (uint32_t i = 0; i < KEYS; i++) sizes[i] = -1;
  for (uint32_t step = 0; step < STEPS; step++) {
    uint32_t i = (uint32_t)(next_random() % (1 + next_random() % KEYS));
    uint32_t key_size = key_into(key, i), kind = (uint32_t)(next_random() % 8);
    const ms_latest_record *found = ms_latest_find(&table, key, key_size);
    CHECK((found != NULL) == (sizes[i] >= 0));
    if (found != NULL) {
      CHECK_EQ_U64(found->value_size, (uint64_t)sizes[i]);
      CHECK(memcmp(ms_latest_value(found), values[i], found->value_size) == 0);
    }
    if (kind < 4) {
      if (kind > 0 || sizes[i] < 0) sizes[i] = (int32_t)(next_random() % 40);
      for (int32_t b = 0; b < sizes[i]; b++) values[i][b] = (uint8_t)next_random();
      count += found == NULL;
      CHECK(ms_latest_put(&table, key, key_size, values[i], (uint32_t)sizes[i], MS_LATEST_HOME) ==
            MS_OK);
    } else if (kind < 7) {
      CHECK(ms_latest_remove(&table, key, key_size) == (sizes[i] >= 0));
      count -= sizes[i] >= 0;
      sizes[i] = -1;
    }
    CHECK_EQ_U64(table.count, count);
  }
  ms_latest_clear(&table);
  CHECK(ms_latest_find(&table, key, 4) == NULL);
  CHECK(!ms_latest_remove(&table, key, 4));
}

static const check_test tests[] = {CHECK_TEST(test_table_has_what_was_put_last)};
CHECK_MAIN(tests)
