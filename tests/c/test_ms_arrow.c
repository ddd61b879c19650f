/* Arrow export and import: what consumers may do with an export (move children, release anywhere),
 * and what producers may do to an import (anything). Under ASan a lost or doubled release is a
 * failure. */
#include "ms_arrow.h"

#include <errno.h>
#include <pthread.h>

#include "check.h"

enum { ROWS = 40, THREADS = 8, ROUNDS = 2000 };

static void never_array(struct ArrowArray *array) { (void)array; }
static void never_schema(struct ArrowSchema *schema) { (void)schema; }

/* --- a batch to export ------------------------------------------------------------------------ */

typedef struct example {
  _Alignas(64) uint8_t bytes[16384];
  ms_slice values[ROWS], keys[ROWS], names[ROWS], header_values[ROWS];
  int64_t timestamps[ROWS];
  uint32_t header_starts[ROWS + 1];
  ms_view view;
} example;

static const char text[] = "abcdefghijklmnopqrstuvwxyz";

static ms_slice slice_of(size_t size) { return (ms_slice){(const uint8_t *)text, (int64_t)size}; }

enum { WITH_KEYS = 1, WITH_TIMESTAMPS = 2, WITH_HEADERS = 4 };

/* Row i: value of i % 7 bytes, null for i % 5 == 3; key of 1 + i % 3 bytes, null for i % 4 == 1;
 * one header in every second row. */
static void make_example(example *out, int with) {
  ms_records records = {.count = ROWS, .values = out->values, .timestamp = 77};
  uint32_t headers = 0;
  for (uint32_t i = 0; i < ROWS; i++) {
    out->values[i] = i % 5 == 3 ? (ms_slice){NULL, -1} : slice_of(i % 7);
    out->keys[i] = i % 4 == 1 ? (ms_slice){NULL, -1} : slice_of(1 + i % 3);
    out->timestamps[i] = 1000 + i;
    out->header_starts[i] = headers;
    out->names[headers] = slice_of(2);
    out->header_values[headers] = slice_of(i % 9);
    headers += i % 2;
  }
  out->header_starts[ROWS] = headers;
  if (with & WITH_KEYS) records.keys = out->keys;
  if (with & WITH_TIMESTAMPS) records.timestamps = out->timestamps;
  if (with & WITH_HEADERS) {
    records.header_starts = out->header_starts;
    records.header_names = out->names;
    records.header_values = out->header_values;
  }
  ms_shape shape;
  ms_place place = {.base_offset = 500};
  CHECK_EQ_U64(ms_batch_measure(&records, &shape, NULL), MS_OK);
  uint64_t length = ms_batch_length(&shape, 0);
  if (!CHECK(length <= sizeof out->bytes)) exit(1);
  ms_batch_encode(&records, &shape, &place, out->bytes);
  CHECK_EQ_U64(ms_batch_view(out->bytes, length, 0, &out->view, NULL), MS_OK);
  CHECK_EQ_U64(ms_batch_check(&out->view, 0, NULL), MS_OK);
}

static ms_arrow_source source_of(const example *from, uint32_t columns, void *pin) {
  return (ms_arrow_source){from->view, 0, from->view.count, 9, columns, pin};
}

/* Take what was released; the number of pins, each of which must be `pin`. */
static uint64_t drain(const void *pin) {
  uint64_t count = 0;
  ms_arrow_pin *released = ms_arrow_take_released();
  while (released != NULL) {
    ms_arrow_pin *after = released->next;
    CHECK(released->pin == pin);
    ms_arrow_pin_free(released);
    released = after;
    count++;
  }
  return count;
}

static void check_slices(const ms_slice *found, const ms_slice *expected, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    CHECK_EQ_U64(found[i].size, expected[i].size);
    if (found[i].size > 0 && found[i].size == expected[i].size)
      CHECK(memcmp(found[i].data, expected[i].data, (size_t)found[i].size) == 0);
  }
}

/* --- export ----------------------------------------------------------------------------------- */

static void test_schema_names_each_column_once_in_order(void) {
  static const char *const names[] = {"partition", "offset", "timestamp",
                                      "key",       "value",  "headers"};
  static const char *const formats[] = {"i", "l", "tsu:UTC", "z", "z", "+m"};
  for (uint32_t columns = 1; columns <= MS_ARROW_ALL; columns++) {
    struct ArrowSchema schema;
    if (!CHECK(ms_arrow_export_schema(&schema, columns, NULL) == MS_OK)) return;
    CHECK(strcmp(schema.format, "+s") == 0 && schema.flags == 0);
    int64_t at = 0;
    for (uint32_t i = 0; i < 6; i++) {
      if (!(columns >> i & 1)) continue;
      const struct ArrowSchema *child = schema.children[at++];
      CHECK(strcmp(child->name, names[i]) == 0 && strcmp(child->format, formats[i]) == 0);
      CHECK_EQ_U64(child->flags, i == 3 || i == 4 ? ARROW_FLAG_NULLABLE : 0);
      CHECK(child->dictionary == NULL && child->metadata == NULL);
    }
    CHECK_EQ_U64(schema.n_children, at);
    schema.release(&schema);
    CHECK(schema.release == NULL);
  }
}

static void test_schema_of_headers_is_a_map(void) {
  struct ArrowSchema schema;
  if (!CHECK(ms_arrow_export_schema(&schema, MS_ARROW_HEADERS, NULL) == MS_OK)) return;
  const struct ArrowSchema *map = schema.children[0];
  const struct ArrowSchema *entries = map->children[0];
  CHECK(map->n_children == 1 && entries->n_children == 2);
  CHECK(strcmp(entries->format, "+s") == 0 && entries->flags == 0);
  CHECK(strcmp(entries->children[0]->format, "u") == 0 && entries->children[0]->flags == 0);
  CHECK(strcmp(entries->children[1]->format, "z") == 0);
  CHECK_EQ_U64(entries->children[1]->flags, ARROW_FLAG_NULLABLE);
  struct ArrowSchema moved = *map->children[0]; /* outlives its parents */
  map->children[0]->release = NULL;
  schema.release(&schema);
  CHECK(strcmp(moved.children[1]->name, "value") == 0);
  moved.release(&moved);
}

static void test_columns_unknown_or_none_are_refused(void) {
  static example batch;
  make_example(&batch, 0);
  struct ArrowSchema schema;
  struct ArrowArray array;
  struct ArrowArrayStream stream;
  static const uint32_t wrong[] = {0, MS_ARROW_ALL + 1, UINT32_MAX};
  for (size_t i = 0; i < 3; i++) {
    ms_error err;
    ms_arrow_source source = source_of(&batch, wrong[i], &batch);
    CHECK(ms_arrow_export_schema(&schema, wrong[i], &err) == MS_INVALID && err.found == wrong[i]);
    CHECK(ms_arrow_export_array(&source, &array, &err) == MS_INVALID);
    CHECK(ms_arrow_export_stream(&source, &stream, &err) == MS_INVALID);
  }
  ms_arrow_source source = source_of(&batch, MS_ARROW_VALUE, &batch);
  source.first = 1;
  CHECK(ms_arrow_export_array(&source, &array, NULL) == MS_INVALID);
  source.first = UINT32_MAX;
  CHECK(ms_arrow_export_array(&source, &array, NULL) == MS_INVALID);
  CHECK_EQ_U64(drain(NULL), 0); /* a failure leaves the pin with the caller */
}

static void test_export_round_trips_every_range(void) {
  static example batch;
  for (int with = 0; with < 8; with++) {
    make_example(&batch, with);
    for (uint32_t first = 0; first <= ROWS; first++) {
      ms_arrow_source source = source_of(&batch, MS_ARROW_ALL, &batch);
      source.first = first;
      source.count = (ROWS - first) / (1 + first % 2);
      struct ArrowSchema schema;
      struct ArrowArray array;
      CHECK_EQ_U64(ms_arrow_export_schema(&schema, MS_ARROW_ALL, NULL), MS_OK);
      CHECK_EQ_U64(ms_arrow_export_array(&source, &array, NULL), MS_OK);
      CHECK_EQ_U64(ms_arrow_check_struct(&schema, &array, NULL), MS_OK);
      CHECK(array.length == source.count && array.offset == 0 && array.null_count == 0);
      CHECK(array.n_buffers == 1 && array.buffers[0] == NULL);

      ms_slice values[ROWS], keys[ROWS];
      int64_t timestamps[ROWS];
      const uint32_t count = source.count;
      CHECK_EQ_U64(
          ms_arrow_import_slices(schema.children[4], array.children[4], 0, count, values, NULL),
          MS_OK);
      check_slices(values, batch.values + first, count);
      CHECK_EQ_U64(
          ms_arrow_import_slices(schema.children[3], array.children[3], 0, count, keys, NULL),
          MS_OK);
      if (with & WITH_KEYS) check_slices(keys, batch.keys + first, count);
      CHECK_EQ_U64(ms_arrow_import_timestamps(schema.children[2], array.children[2], 0, count,
                                              timestamps, NULL),
                   MS_OK);
      const struct ArrowArray *offsets = array.children[1], *partitions = array.children[0];
      for (uint32_t i = 0; i < count; i++) {
        CHECK_EQ_U64(timestamps[i], with & WITH_TIMESTAMPS ? 1000 + first + i : 77);
        CHECK_EQ_U64(((const int64_t *)offsets->buffers[1])[offsets->offset + i], 500 + first + i);
        CHECK_EQ_U64(((const int32_t *)partitions->buffers[1])[partitions->offset + i], 9);
        if (!(with & WITH_KEYS)) CHECK(keys[i].size == -1);
      }
      array.release(&array);
      schema.release(&schema);
      CHECK_EQ_U64(drain(&batch), 1);
    }
  }
}

static void test_export_points_into_the_view(void) {
  static example batch;
  make_example(&batch, WITH_KEYS | WITH_TIMESTAMPS | WITH_HEADERS);
  ms_arrow_source source = source_of(&batch, MS_ARROW_ALL - MS_ARROW_PARTITION, NULL);
  source.first = 3;
  source.count = 10;
  struct ArrowArray array;
  if (!CHECK(ms_arrow_export_array(&source, &array, NULL) == MS_OK)) return;
  const struct ArrowArray *key = array.children[2], *value = array.children[3];
  CHECK(array.children[1]->buffers[1] == batch.view.timestamps && array.children[1]->offset == 3);
  CHECK(key->buffers[0] == batch.view.key_validity && key->buffers[1] == batch.view.key_offsets);
  CHECK(key->buffers[2] == batch.view.keys && key->offset == 3 && key->length == 10);
  CHECK(value->buffers[0] == batch.view.value_validity && value->buffers[2] == batch.view.values);
  CHECK(key->null_count == -1 && value->null_count == -1); /* nobody counted */
  const struct ArrowArray *map = array.children[4];
  CHECK(map->buffers[1] == batch.view.header_offsets && map->offset == 3 && map->n_buffers == 2);
  CHECK_EQ_U64(map->children[0]->length, batch.view.header_count);
  CHECK(map->children[0]->children[0]->buffers[2] == batch.view.names);
  CHECK((uintptr_t)array.children[0]->buffers[1] % 64 == 0); /* filled: aligned as Arrow wants it */
  array.release(&array);
  CHECK_EQ_U64(drain(NULL), 0); /* no pin, nothing to give back */
}

static void test_batch_without_keys_exports_null_keys(void) {
  static example batch;
  make_example(&batch, 0);
  ms_arrow_source source = source_of(&batch, MS_ARROW_KEY | MS_ARROW_HEADERS, NULL);
  source.first = 5;
  source.count = 20;
  struct ArrowArray array;
  if (!CHECK(ms_arrow_export_array(&source, &array, NULL) == MS_OK)) return;
  const struct ArrowArray *key = array.children[0], *map = array.children[1];
  CHECK(key->null_count == 20 && key->length == 20 && key->n_buffers == 3);
  for (int i = 0; i < 20; i++) CHECK(!ms_bit(key->buffers[0], (uint64_t)i));
  for (int i = 0; i <= 20; i++) {
    CHECK(((const int32_t *)key->buffers[1])[key->offset + i] == 0);
    CHECK(((const int32_t *)map->buffers[1])[map->offset + i] == 0);
  }
  CHECK(map->null_count == 0 && map->children[0]->length == 0);
  CHECK(*(const int32_t *)map->children[0]->children[0]->buffers[1] == 0);
  array.release(&array);
}

static void test_zeros_serve_any_size_and_are_shared(void) {
  const uint8_t *small = ms_zeros(1), *large = ms_zeros((3 << 20) + 5);
  if (!CHECK(small != NULL && large != NULL)) return;
  CHECK(ms_zeros(65536) == small && ms_zeros(65537) != small && ms_zeros(4 << 20) == large);
  CHECK((uintptr_t)small % 4096 == 0 && (uintptr_t)large % 4096 == 0);
  uint8_t any = 0;
  for (size_t i = 0; i < 65536; i++) any |= small[i];
  for (size_t i = 0; i < 4 << 20; i += 64) any |= large[i] | large[i + 63];
  CHECK(any == 0);
  CHECK(ms_zeros(UINT64_C(1) << 41) == NULL && ms_zeros(UINT64_MAX) == NULL);
}

static void test_compacted_batch_exports_its_own_offsets(void) {
  static example batch;
  static int64_t offsets[ROWS];
  make_example(&batch, 0);
  for (int i = 0; i < ROWS; i++) offsets[i] = 500 + 3 * i;
  batch.view.offsets = offsets;
  ms_arrow_source source = source_of(&batch, MS_ARROW_OFFSET, NULL);
  source.first = 7;
  source.count = 2;
  struct ArrowArray array;
  if (!CHECK(ms_arrow_export_array(&source, &array, NULL) == MS_OK)) return;
  CHECK(array.children[0]->buffers[1] == offsets && array.children[0]->offset == 7);
  array.release(&array);
}

/* --- release ---------------------------------------------------------------------------------- */

/* Move the children of `array` to `moved`, as a consumer may. Returns how many. */
static size_t move_children(struct ArrowArray *array, struct ArrowArray *moved) {
  size_t count = 0;
  for (int64_t i = 0; i < array->n_children; i++) {
    moved[count++] = *array->children[i];
    array->children[i]->release = NULL;
  }
  return count;
}

static void test_moved_children_keep_the_pin_in_any_order(void) {
  static example batch;
  make_example(&batch, WITH_KEYS | WITH_HEADERS);
  for (size_t last = 0; last < 7; last++) {
    ms_arrow_source source = source_of(&batch, MS_ARROW_ALL, &batch);
    struct ArrowArray arrays[7];
    if (!CHECK(ms_arrow_export_array(&source, &arrays[6], NULL) == MS_OK)) return;
    CHECK_EQ_U64(move_children(&arrays[6], arrays), 6);
    for (size_t i = 0; i < 7; i++)
      if (i != last) arrays[i].release(&arrays[i]);
    CHECK_EQ_U64(drain(&batch), 0);
    if (last < 5) CHECK(arrays[last].buffers[1] != NULL && arrays[last].length == ROWS);
    if (last == 4) {
      struct ArrowSchema value = {.format = "z", .name = "value", .release = never_schema};
      ms_slice values[ROWS];
      CHECK_EQ_U64(ms_arrow_import_slices(&value, &arrays[4], 0, ROWS, values, NULL), MS_OK);
      check_slices(values, batch.values, ROWS);
    }
    arrays[last].release(&arrays[last]);
    CHECK_EQ_U64(drain(&batch), 1);
  }
}

static void test_grandchildren_may_be_moved(void) {
  static example batch;
  make_example(&batch, WITH_HEADERS);
  ms_arrow_source source = source_of(&batch, MS_ARROW_HEADERS, &batch);
  struct ArrowArray array, entries, parts[2];
  if (!CHECK(ms_arrow_export_array(&source, &array, NULL) == MS_OK)) return;
  CHECK_EQ_U64(move_children(array.children[0], &entries), 1);
  CHECK_EQ_U64(move_children(&entries, parts), 2);
  array.release(&array);
  parts[1].release(&parts[1]);
  entries.release(&entries);
  CHECK_EQ_U64(drain(&batch), 0);
  CHECK_EQ_U64(((const int32_t *)parts[0].buffers[1])[parts[0].length],
               2 * batch.view.header_count);
  parts[0].release(&parts[0]);
  CHECK_EQ_U64(drain(&batch), 1);
}

static atomic_bool go; /* so that all threads release at once */

typedef struct releaser {
  pthread_t thread;
  struct ArrowArray (*arrays)[THREADS];
  size_t index;
} releaser;

static void *release_column(void *argument) {
  releaser *self = argument;
  while (!atomic_load(&go)) ms_cpu_relax();
  for (int round = 0; round < ROUNDS; round++) {
    struct ArrowArray *array = &self->arrays[round][self->index];
    if (array->release != NULL) array->release(array);
  }
  return NULL;
}

static void test_release_from_many_threads_gives_each_pin_back_once(void) {
  static example batch;
  static struct ArrowArray arrays[ROUNDS][THREADS];
  static releaser releasers[THREADS];
  make_example(&batch, WITH_KEYS);
  for (int round = 0; round < ROUNDS; round++) {
    ms_arrow_source source = source_of(&batch, MS_ARROW_ALL, &batch);
    if (!CHECK(ms_arrow_export_array(&source, &arrays[round][6], NULL) == MS_OK)) return;
    move_children(&arrays[round][6], arrays[round]);
    arrays[round][7].release = NULL;
  }
  for (size_t i = 0; i < THREADS; i++) {
    releasers[i] = (releaser){.arrays = arrays, .index = i};
    pthread_create(&releasers[i].thread, NULL, release_column, &releasers[i]);
  }
  atomic_store(&go, true);
  uint64_t taken = 0;
  for (int i = 0; i < 1000; i++) taken += drain(&batch); /* while they push */
  for (size_t i = 0; i < THREADS; i++) pthread_join(releasers[i].thread, NULL);
  CHECK_EQ_U64(taken + drain(&batch), ROUNDS);
  CHECK(ms_arrow_take_released() == NULL);
}

/* --- stream ----------------------------------------------------------------------------------- */

static void test_stream_gives_one_array_then_ends(void) {
  static example batch;
  make_example(&batch, WITH_KEYS);
  ms_arrow_source source = source_of(&batch, MS_ARROW_DEFAULT, &batch);
  struct ArrowArrayStream stream;
  struct ArrowSchema schema;
  struct ArrowArray array;
  if (!CHECK(ms_arrow_export_stream(&source, &stream, NULL) == MS_OK)) return;
  memset(&source, 0xff, sizeof source); /* it was copied */
  for (int i = 0; i < 3; i++) {
    CHECK_EQ_U64(stream.get_schema(&stream, &schema), 0);
    CHECK_EQ_U64(schema.n_children, 5);
    schema.release(&schema);
  }
  CHECK_EQ_U64(stream.get_next(&stream, &array), 0);
  CHECK_EQ_U64(array.length, ROWS);
  struct ArrowArray end = {.release = array.release};
  for (int i = 0; i < 2; i++) {
    CHECK_EQ_U64(stream.get_next(&stream, &end), 0);
    CHECK(end.release == NULL);
  }
  CHECK(stream.get_last_error(&stream) == NULL);
  stream.release(&stream);
  CHECK(stream.release == NULL);
  CHECK_EQ_U64(drain(&batch), 0); /* the array outlives its stream */
  array.release(&array);
  CHECK_EQ_U64(drain(&batch), 1);
}

static void test_stream_released_unread_gives_the_pin_back(void) {
  static example batch;
  make_example(&batch, 0);
  ms_arrow_source source = source_of(&batch, MS_ARROW_DEFAULT, &batch);
  struct ArrowArrayStream stream;
  if (!CHECK(ms_arrow_export_stream(&source, &stream, NULL) == MS_OK)) return;
  CHECK_EQ_U64(drain(&batch), 0);
  stream.release(&stream);
  CHECK_EQ_U64(drain(&batch), 1);
}

/* --- import ----------------------------------------------------------------------------------- */

/* A column on the stack: import looks at `release` only to see that it is there. */
typedef struct column {
  struct ArrowSchema schema;
  struct ArrowArray array;
  const void *buffers[8];
} column;

static column *make_column(column *out, const char *format, int64_t length, int64_t n_buffers) {
  memset(out, 0, sizeof *out);
  out->schema = (struct ArrowSchema){.format = format, .name = "tail", .release = never_schema};
  out->array = (struct ArrowArray){.length = length,
                                   .null_count = -1,
                                   .n_buffers = n_buffers,
                                   .buffers = out->buffers,
                                   .release = never_array};
  return out;
}

static ms_slice imported[64];

static ms_status import_all(const column *from) {
  return ms_arrow_import_slices(&from->schema, &from->array, 0, (uint64_t)from->array.length,
                                imported, NULL);
}

static void test_import_reads_offsets_and_nulls_behind_an_offset(void) {
  static const int32_t narrow[] = {0, 9, 12, 12, 17, 26};
  static const int64_t wide[] = {0, 9, 12, 12, 17, 26};
  static const uint8_t validity[] = {0x16}; /* rows 1, 2 and 4 */
  static const char *const formats[] = {"z", "u", "Z", "U"};
  for (int i = 0; i < 4; i++) {
    column c;
    make_column(&c, formats[i], 4, 3);
    c.array.offset = 1;
    c.buffers[0] = validity;
    c.buffers[1] = i < 2 ? (const void *)narrow : (const void *)wide;
    c.buffers[2] = text;
    CHECK_EQ_U64(import_all(&c), MS_OK);
    CHECK(imported[0].size == 3 && memcmp(imported[0].data, "jkl", 3) == 0);
    CHECK(imported[1].size == 0 && imported[2].size == -1);
    CHECK(imported[3].size == 9 && imported[3].data == (const uint8_t *)text + 17);
    CHECK_EQ_U64(ms_arrow_import_slices(&c.schema, &c.array, 3, 1, imported, NULL), MS_OK);
    CHECK_EQ_U64(imported[0].size, 9);
    c.array.null_count = 0; /* says that the bitmap need not be read */
    CHECK_EQ_U64(import_all(&c), MS_OK);
    CHECK_EQ_U64(imported[2].size, 5);
  }
}

static void test_import_reads_fixed_widths_as_bytes(void) {
  static const struct {
    const char *format;
    int64_t width;
  } cases[] = {
      {"c", 1},         {"S", 2},        {"i", 4},
      {"L", 8},         {"e", 2},        {"g", 8},
      {"w:3", 3},       {"w:1", 1},      {"d:38,10", 16},
      {"d:9,-2,32", 4}, {"d:9,2,64", 8}, {"d:70,0,256", 32},
      {"tdD", 4},       {"tdm", 8},      {"ttm", 4},
      {"ttn", 8},       {"tsn:", 8},     {"tss:Europe/Berlin", 8},
      {"tDu", 8},       {"tiM", 4},      {"tin", 16},
  };
  static uint8_t bytes[256];
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    column c;
    make_column(&c, cases[i].format, 3, 2);
    c.array.offset = 2;
    c.buffers[1] = bytes + 1; /* not aligned either */
    CHECK_EQ_U64(import_all(&c), MS_OK);
    for (int64_t row = 0; row < 3; row++) {
      CHECK_EQ_U64(imported[row].size, cases[i].width);
      CHECK(imported[row].data == bytes + 1 + (2 + row) * cases[i].width);
    }
  }
}

static void test_import_names_what_it_cannot_read(void) {
  static const char *const formats[] = {"b",
                                        "+l",
                                        "+L",
                                        "+s",
                                        "+m",
                                        "+r",
                                        "+w:2",
                                        "+ud:0",
                                        "+vl",
                                        "",
                                        "x",
                                        "zz",
                                        "w:",
                                        "w:0",
                                        "w:-1",
                                        "w:1x",
                                        "w:99999999999",
                                        "d:",
                                        "d:1",
                                        "d:1,",
                                        "d:1,2,",
                                        "d:1,2,7",
                                        "ts",
                                        "tsx:",
                                        "tsu",
                                        "td",
                                        "vzz"};
  for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++) {
    column c;
    ms_error err;
    make_column(&c, formats[i], 0, 2);
    CHECK_EQ_U64(ms_arrow_check_slices(&c.schema, &err), MS_UNSUPPORTED);
    CHECK(strstr(err.text, "'tail'") != NULL && strstr(err.text, "cast it to binary") != NULL);
    CHECK_EQ_U64(import_all(&c), MS_UNSUPPORTED);
  }
  column c;
  ms_error err;
  make_column(&c, "i", 0, 2);
  c.schema.dictionary = &c.schema;
  CHECK(ms_arrow_check_slices(&c.schema, &err) == MS_UNSUPPORTED);
  CHECK(strstr(err.text, "dictionary") != NULL);
}

static void test_import_of_nulls_and_of_nothing(void) {
  column c;
  for (int64_t buffers = 0; buffers < 2; buffers++) { /* polars sends one, empty */
    make_column(&c, "n", 3, buffers);
    CHECK_EQ_U64(import_all(&c), MS_OK);
    CHECK(imported[0].size == -1 && imported[2].size == -1);
  }
  static const char *const formats[] = {"z", "Z", "vz", "i"};
  static const int64_t buffers[] = {3, 3, 3, 2};
  for (int i = 0; i < 4; i++) { /* missing buffers are right where there is nothing */
    make_column(&c, formats[i], 0, buffers[i]);
    CHECK_EQ_U64(import_all(&c), MS_OK);
  }
  static const int32_t zeros[4] = {5, 5, 5, 5};
  make_column(&c, "z", 3, 3);
  c.buffers[1] = zeros;
  CHECK_EQ_U64(import_all(&c), MS_OK);
  CHECK(imported[0].size == 0 && imported[2].size == 0);
}

typedef struct binary_view {
  int32_t size;
  union {
    char inlined[12];
    struct {
      char prefix[4];
      int32_t buffer, at;
    } far;
  } is;
} binary_view;

static void test_import_follows_views_within_their_buffers_only(void) {
  static const binary_view views[] = {
      {3, {.inlined = "abc"}},
      {12, {.inlined = {'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'k', 'l'}}},
      {13, {.far = {"abcd", 0, 13}}},
      {-7, {.far = {"????", -1, -1}}}, /* null: may be anything */
      {26, {.far = {"abcd", 1, 0}}},
      {0, {.inlined = ""}},
  };
  static const uint8_t validity[] = {0x37};
  static const int64_t sizes[] = {26, 26};
  column c;
  make_column(&c, "vz", 6, 5);
  c.buffers[0] = validity;
  c.buffers[1] = views;
  c.buffers[2] = c.buffers[3] = text;
  c.buffers[4] = sizes;
  CHECK_EQ_U64(import_all(&c), MS_OK);
  CHECK(imported[0].size == 3 && memcmp(imported[0].data, "abc", 3) == 0);
  CHECK(imported[1].size == 12 && memcmp(imported[1].data, text, 12) == 0);
  CHECK(imported[2].size == 13 && memcmp(imported[2].data, text + 13, 13) == 0);
  CHECK(imported[3].size == -1 && imported[4].size == 26 && imported[5].size == 0);

  static const binary_view hostile[] = {
      {14, {.far = {"", 0, 13}}},        {13, {.far = {"", 2, 0}}},
      {13, {.far = {"", -1, 0}}},        {13, {.far = {"", 0, -1}}},
      {-1, {.far = {"", 0, 0}}},         {INT32_MIN, {.far = {"", 0, 0}}},
      {INT32_MAX, {.far = {"", 0, 0}}},  {INT32_MAX, {.far = {"", 0, INT32_MAX}}},
      {13, {.far = {"", INT32_MAX, 0}}},
  };
  c.array.length = 1;
  c.array.null_count = 0;
  for (size_t i = 0; i < sizeof hostile / sizeof hostile[0]; i++) {
    c.buffers[1] = &hostile[i];
    CHECK_EQ_U64(import_all(&c), MS_INVALID);
  }
  c.buffers[1] = &views[2];
  c.buffers[4] = NULL;
  CHECK_EQ_U64(import_all(&c), MS_INVALID);
  c.buffers[4] = sizes;
  c.buffers[2] = NULL;
  CHECK_EQ_U64(import_all(&c), MS_INVALID);
}

static void test_import_refuses_hostile_arrays(void) {
  static const int32_t offsets[] = {0, 3, 2, 9}, negative[] = {-1, 3, 4, 9},
                       rising[] = {0, 1, 2, 3};
  static const int64_t falling64[] = {0, INT64_MIN, INT64_MAX, 3};
  column good, c;
  make_column(&good, "z", 3, 3);
  good.buffers[1] = rising;
  good.buffers[2] = text;
  CHECK_EQ_U64(import_all(&good), MS_OK);
#define HOSTILE(change)                                                                          \
  do {                                                                                           \
    c = good;                                                                                    \
    c.array.buffers = c.buffers;                                                                 \
    change;                                                                                      \
    CHECK_EQ_U64(ms_arrow_import_slices(&c.schema, &c.array, 0, 3, imported, NULL), MS_INVALID); \
  } while (0)
  HOSTILE(c.array.length = -1);
  HOSTILE(c.array.length = 2);
  HOSTILE(c.array.offset = -1);
  HOSTILE(c.array.offset = INT64_MAX);
  HOSTILE(c.array.offset = INT64_MAX / 4);
  HOSTILE(c.array.n_buffers = 2);
  HOSTILE(c.array.n_buffers = INT64_MAX);
  HOSTILE(c.array.n_buffers = -1);
  HOSTILE(c.array.buffers = NULL);
  HOSTILE(c.array.release = NULL);
  HOSTILE(c.schema.release = NULL);
  HOSTILE(c.schema.format = NULL);
  HOSTILE(c.array.dictionary = &c.array);
  HOSTILE(c.array.null_count = 1); /* and no bitmap */
  HOSTILE(c.buffers[1] = NULL);
  HOSTILE(c.buffers[2] = NULL);
  HOSTILE(c.buffers[1] = offsets);
  HOSTILE(c.buffers[1] = negative);
  HOSTILE(c.schema.format = "Z"; c.buffers[1] = falling64);
  HOSTILE(c.schema.format = "vz"; c.array.n_buffers = INT32_MAX);
  HOSTILE(c.schema.format = "i");
#undef HOSTILE
  c = good;
  c.array.buffers = c.buffers;
  CHECK_EQ_U64(ms_arrow_import_slices(&c.schema, &c.array, 1, 3, imported, NULL), MS_INVALID);
  CHECK_EQ_U64(ms_arrow_import_slices(&c.schema, &c.array, UINT64_MAX, 2, imported, NULL),
               MS_INVALID);
  CHECK_EQ_U64(ms_arrow_import_slices(&c.schema, &c.array, 2, UINT64_MAX, imported, NULL),
               MS_INVALID);
}

static void test_timestamps_of_each_unit_become_microseconds(void) {
  static const int64_t values[] = {0, 1500, -1500, -1, 999, -1000, 123456789};
  static const struct {
    const char *format;
    int64_t expected[7];
  } cases[] = {
      {"l", {0, 1500, -1500, -1, 999, -1000, 123456789}},
      {"tsu:", {0, 1500, -1500, -1, 999, -1000, 123456789}},
      {"tsu:UTC", {0, 1500, -1500, -1, 999, -1000, 123456789}},
      {"tsm:", {0, 1500000, -1500000, -1000, 999000, -1000000, 123456789000}},
      {"tss:+01:00",
       {0, 1500000000, -1500000000, -1000000, 999000000, -1000000000, 123456789000000}},
      {"tsn:", {0, 1, -2, -1, 0, -1, 123456}},
  };
  int64_t out[7];
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    column c;
    make_column(&c, cases[i].format, 7, 2);
    c.buffers[1] = values;
    CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 0, 7, out, NULL), MS_OK);
    for (int row = 0; row < 7; row++) CHECK_EQ_U64(out[row], cases[i].expected[row]);
    CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 6, 1, out, NULL), MS_OK);
    CHECK_EQ_U64(out[0], cases[i].expected[6]);
  }
}

static void test_timestamps_that_cannot_be_are_refused_by_row(void) {
  static const int64_t values[] = {0, MS_ARROW_TIMESTAMP_MAX / 1000000,
                                   MS_ARROW_TIMESTAMP_MAX / 1000000 + 1, INT64_MIN};
  static const uint8_t validity[] = {0x0b};
  int64_t out[4];
  column c;
  ms_error err;
  make_column(&c, "tss:", 4, 2);
  c.buffers[1] = values;
  CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 0, 2, out, &err), MS_OK);
  CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 0, 3, out, &err), MS_LIMIT);
  CHECK(strstr(err.text, "element 2,") != NULL && strstr(err.text, "4611686018428") != NULL);
  CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 3, 1, out, &err), MS_LIMIT);
  c.schema.format = "l";
  CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 0, 3, out, &err), MS_OK);
  CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 0, 4, out, &err), MS_LIMIT);
  c.buffers[0] = validity;
  CHECK_EQ_U64(ms_arrow_import_timestamps(&c.schema, &c.array, 0, 4, out, &err), MS_INVALID);
  CHECK(strstr(err.text, "element 2 is null") != NULL);
  static const char *const formats[] = {"i", "L", "g", "z", "tdD", "tdm", "ttu", "tDu", "w:8"};
  for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++) {
    c.schema.format = formats[i];
    CHECK_EQ_U64(ms_arrow_check_timestamps(&c.schema, &err), MS_UNSUPPORTED);
    CHECK(strstr(err.text, "timestamp") != NULL);
  }
}

static void test_struct_is_checked_before_its_children(void) {
  static const uint8_t validity[] = {0xfd};
  column a, b, top;
  make_column(&a, "z", 4, 3);
  make_column(&b, "z", 4, 3);
  make_column(&top, "+s", 3, 1);
  struct ArrowSchema *schemas[] = {&a.schema, &b.schema};
  struct ArrowArray *arrays[] = {&a.array, &b.array};
  top.schema.n_children = top.array.n_children = 2;
  top.schema.children = schemas;
  top.array.children = arrays;
  top.array.offset = 1;
  a.schema.name = "key";
  CHECK_EQ_U64(ms_arrow_check_struct(&top.schema, &top.array, NULL), MS_OK);
  CHECK_EQ_U64(ms_arrow_find_child(&top.schema, "key"), 0);
  CHECK_EQ_U64(ms_arrow_find_child(&top.schema, "tail"), 1);
  CHECK_EQ_U64(ms_arrow_find_child(&top.schema, "other"), -1);
  a.schema.name = "tail";
  CHECK_EQ_U64(ms_arrow_find_child(&top.schema, "tail"), -2);
  a.schema.name = NULL;
  CHECK_EQ_U64(ms_arrow_find_child(&top.schema, "tail"), 1);
  CHECK_EQ_U64(ms_arrow_find_child(&a.schema, "tail"), -1); /* it has no children */

  top.buffers[0] = validity;
  CHECK_EQ_U64(ms_arrow_check_struct(&top.schema, &top.array, NULL), MS_UNSUPPORTED);
  top.array.offset = 2; /* the null one is not of the range */
  top.array.length = 2;
  CHECK_EQ_U64(ms_arrow_check_struct(&top.schema, &top.array, NULL), MS_OK);
  top.array.length = 3;
  CHECK_EQ_U64(ms_arrow_check_struct(&top.schema, &top.array, NULL), MS_INVALID);
  top.array.offset = 0;
  top.array.n_children = 1;
  CHECK_EQ_U64(ms_arrow_check_struct(&top.schema, &top.array, NULL), MS_INVALID);
  top.array.n_children = 2;
  arrays[1] = NULL;
  CHECK_EQ_U64(ms_arrow_check_struct(&top.schema, &top.array, NULL), MS_INVALID);
  CHECK_EQ_U64(ms_arrow_check_struct(&a.schema, &a.array, NULL), MS_INVALID);
}

static const check_test tests[] = {
    CHECK_TEST(test_schema_names_each_column_once_in_order),
    CHECK_TEST(test_schema_of_headers_is_a_map),
    CHECK_TEST(test_columns_unknown_or_none_are_refused),
    CHECK_TEST(test_export_round_trips_every_range),
    CHECK_TEST(test_export_points_into_the_view),
    CHECK_TEST(test_batch_without_keys_exports_null_keys),
    CHECK_TEST(test_zeros_serve_any_size_and_are_shared),
    CHECK_TEST(test_compacted_batch_exports_its_own_offsets),
    CHECK_TEST(test_moved_children_keep_the_pin_in_any_order),
    CHECK_TEST(test_grandchildren_may_be_moved),
    CHECK_TEST(test_release_from_many_threads_gives_each_pin_back_once),
    CHECK_TEST(test_stream_gives_one_array_then_ends),
    CHECK_TEST(test_stream_released_unread_gives_the_pin_back),
    CHECK_TEST(test_import_reads_offsets_and_nulls_behind_an_offset),
    CHECK_TEST(test_import_reads_fixed_widths_as_bytes),
    CHECK_TEST(test_import_names_what_it_cannot_read),
    CHECK_TEST(test_import_of_nulls_and_of_nothing),
    CHECK_TEST(test_import_follows_views_within_their_buffers_only),
    CHECK_TEST(test_import_refuses_hostile_arrays),
    CHECK_TEST(test_timestamps_of_each_unit_become_microseconds),
    CHECK_TEST(test_timestamps_that_cannot_be_are_refused_by_row),
    CHECK_TEST(test_struct_is_checked_before_its_children),
};
CHECK_MAIN(tests)
