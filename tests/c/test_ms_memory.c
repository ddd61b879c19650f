/* flags: -Wl,--wrap=malloc,--wrap=calloc,--wrap=aligned_alloc
 * The core without memory: each allocation of a call is refused once. What the call was to change
 * is as before, and the next one works. */
#include <errno.h>

#include "check.h"
#include "ms_arrow.h"
#include "ms_latest.h"

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);

static int before_refusal = -1; /* allocations; below 0: none is refused */

static bool is_refused(void) { return before_refusal >= 0 && before_refusal-- == 0; }

void *__wrap_malloc(size_t size) { return is_refused() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) {
  return is_refused() ? NULL : __real_calloc(count, size);
}
void *__wrap_aligned_alloc(size_t alignment, size_t size) {
  return is_refused() ? NULL : __real_aligned_alloc(alignment, size);
}

/* --- Arrow ------------------------------------------------------------------------------------ */

static _Alignas(64) uint8_t batch[4096];

static ms_arrow_source make_source(void *pin) {
  const ms_slice values[] = {{(const uint8_t *)"one", 3}, {NULL, -1}};
  const ms_records records = {.count = 2, .values = values, .timestamp = 77};
  const ms_place place = {.base_offset = 500};
  ms_shape shape;
  ms_view view = {0};
  CHECK_EQ_U64(ms_batch_measure(&records, &shape, NULL), MS_OK);
  uint64_t length = ms_batch_length(&shape, 0);
  if (!CHECK(length <= sizeof batch)) exit(1);
  ms_batch_encode(&records, &shape, &place, batch);
  CHECK_EQ_U64(ms_batch_view(batch, length, 0, &view, NULL), MS_OK);
  return (ms_arrow_source){view, 0, view.count, 9, MS_ARROW_ALL, pin};
}

static uint64_t drain(const void *pin) {
  uint64_t count = 0;
  for (ms_arrow_pin *next, *it = ms_arrow_take_released(); it != NULL; it = next, count++) {
    CHECK(it->pin == pin);
    next = it->next;
    ms_arrow_pin_free(it);
  }
  return count;
}

static void test_export_without_memory_leaves_the_pin_with_the_caller(void) {
  ms_arrow_source source = make_source(batch);
  struct ArrowSchema schema;
  struct ArrowArray array;
  struct ArrowArrayStream stream;
  ms_error err;
  before_refusal = 0;
  CHECK_EQ_U64(ms_arrow_export_schema(&schema, MS_ARROW_ALL, &err), MS_NOMEM);
  CHECK(strstr(err.text, "no memory") != NULL);
  for (int refused = 0; refused < 2; refused++) { /* the pin, the array */
    before_refusal = refused;
    CHECK_EQ_U64(ms_arrow_export_array(&source, &array, &err), MS_NOMEM);
    CHECK(before_refusal == -1 && strstr(err.text, "no memory") != NULL);
  }
  for (int refused = 0; refused < 2; refused++) { /* the stream, the pin */
    before_refusal = refused;
    CHECK_EQ_U64(ms_arrow_export_stream(&source, &stream, &err), MS_NOMEM);
    CHECK(before_refusal == -1 && strstr(err.text, "no memory") != NULL);
  }
  CHECK_EQ_U64(drain(batch), 0);
  if (!CHECK(ms_arrow_export_array(&source, &array, &err) == MS_OK)) return;
  array.release(&array);
  CHECK_EQ_U64(drain(batch), 1);
}

static void test_stream_without_memory_says_so_and_goes_on(void) {
  ms_arrow_source source = make_source(batch);
  struct ArrowSchema schema;
  struct ArrowArray array;
  struct ArrowArrayStream stream;
  if (!CHECK(ms_arrow_export_stream(&source, &stream, NULL) == MS_OK)) return;
  CHECK(stream.get_last_error(&stream) == NULL);
  before_refusal = 0;
  CHECK(stream.get_schema(&stream, &schema) == ENOMEM);
  CHECK(stream.get_last_error(&stream) != NULL);
  before_refusal = 0;
  CHECK(stream.get_next(&stream, &array) == ENOMEM);
  if (!CHECK(stream.get_next(&stream, &array) == 0)) return;
  CHECK(array.length == 2 && stream.get_last_error(&stream) == NULL);
  stream.release(&stream);
  CHECK_EQ_U64(drain(batch), 0);
  array.release(&array);
  CHECK_EQ_U64(drain(batch), 1);
}

/* --- the table of a view ---------------------------------------------------------------------- */

static void test_put_without_memory_changes_nothing(void) {
  enum { KEYS = 2000 };
  static uint8_t value[3000];
  ms_latest table = {.seed = 99};
  uint32_t refused = 0;
  for (uint32_t key = 0; key < KEYS; key++) {
    const ms_latest before = table;
    const uint8_t *bytes = (const uint8_t *)&key;
    before_refusal = 0;
    ms_status status = ms_latest_put(&table, bytes, 4, value, sizeof value, MS_LATEST_HOME);
    if (status == MS_NOMEM) {
      refused++;
      CHECK_EQ_U64(table.count, before.count);
      CHECK_EQ_U64(table.live_bytes, before.live_bytes);
      CHECK(ms_latest_find(&table, bytes, 4) == NULL);
      before_refusal = 1; /* the second one, where a table grows and needs room as well */
      status = ms_latest_put(&table, bytes, 4, value, sizeof value, MS_LATEST_HOME);
      if (status == MS_NOMEM) {
        CHECK(ms_latest_find(&table, bytes, 4) == NULL);
        before_refusal = -1;
        status = ms_latest_put(&table, bytes, 4, value, sizeof value, MS_LATEST_HOME);
      }
    }
    before_refusal = -1;
    CHECK_EQ_U64(status, MS_OK);
    CHECK_EQ_U64(table.count, key + 1);
  }
  CHECK(refused > 10);
  for (uint32_t key = 0; key < KEYS; key++)
    CHECK(ms_latest_find(&table, (const uint8_t *)&key, 4) != NULL);
  ms_latest_clear(&table);
}

static void test_without_memory_to_move_them_together_records_stay(void) {
  enum { KEYS = 3000 };
  static uint8_t value[3000];
  ms_latest table = {.seed = 99};
  for (uint32_t round = 0; round < 4; round++) /* each a size of its own, so that it moves */
    for (uint32_t key = 0; key < KEYS; key++) {
      uint32_t size = 2000 + 250 * round;
      ms_status status;
      for (int refused = 3; refused >= -1; refused--) {
        before_refusal = refused;
        status = ms_latest_put(&table, (const uint8_t *)&key, 4, value, size, MS_LATEST_HOME);
        if (status == MS_OK) break;
      }
      before_refusal = -1;
      CHECK_EQ_U64(status, MS_OK);
      const ms_latest_record *found = ms_latest_find(&table, (const uint8_t *)&key, 4);
      CHECK(found != NULL && found->value_size == size);
    }
  CHECK_EQ_U64(table.count, KEYS);
  ms_latest_clear(&table);
}

static const check_test tests[] = {
    CHECK_TEST(test_export_without_memory_leaves_the_pin_with_the_caller),
    CHECK_TEST(test_stream_without_memory_says_so_and_goes_on),
    CHECK_TEST(test_put_without_memory_changes_nothing),
    CHECK_TEST(test_without_memory_to_move_them_together_records_stay),
};
CHECK_MAIN(tests)
