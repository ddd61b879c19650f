/* Compaction on plain memory: what stays is what has no later record of its key, producers keep
 * their last sequence, and no damage makes it leave the bytes that it was given. */
#include "ms_compact.h"
#include "segment_log.h"
#include "xorshift.h"

enum { RECORDS = 900, KEYS = 50, PRODUCERS = 5, MUTANTS = 3000 };
enum { TABLE_KEYS = 256 };

/* What is appended: record by offset. */
static uint32_t key_of[RECORDS + 64];
static bool null_of[RECORDS + 64], keyless[RECORDS + 64];
static uint64_t last_sequence[PRODUCERS + 1];

/* Append a batch; the sequence of its producer is the offset behind it. */
static void append(log *log, const ms_records *records, uint32_t producer) {
  ms_shape shape;
  CHECK(ms_batch_measure(records, &shape, NULL) == MS_OK);
  uint64_t at = ms_segment_file_position(&log->segment, log->end.position);
  ms_place place = {.position = log->end.position,
                    .file_position = at,
                    .seed = log->segment.salt + log->end.position,
                    .base_offset = log->end.offset,
                    .chain = (uint32_t)log->end.hash,
                    .producer = producer,
                    .sequence = producer ? log->end.offset + records->count : 0};
  uint64_t begin_position = log->end.position;
  log->end.hash = ms_batch_encode(records, &shape, &place, log->bytes + at);
  log->end.position += ms_batch_length(&shape, at);
  log->end.offset += records->count;
  if (shape.timestamp_max > log->end.timestamp_max) log->end.timestamp_max = shape.timestamp_max;
  ms_segment_index_put(&log->segment, begin_position, &log->end);
}

static void build(log *log) {
  const ms_mark begin = {.timestamp_max = INT64_MIN, .offset = 1000, .position = 1 << 20};
  begin_log(log, 42, &begin);
  memset(last_sequence, 0, sizeof last_sequence);
  uint64_t values[64];
  char names[64][8];
  ms_slice value[64], key[64];
  int64_t timestamps[64];
  uint32_t starts[65];
  while (log->end.offset - 1000 < RECORDS) {
    uint32_t kind = (uint32_t)(next_random() % 16);
    uint32_t count = kind & 1 ? 1 : 1 + (uint32_t)(next_random() % 60);
    uint32_t producer = (uint32_t)(next_random() % (PRODUCERS + 3));
    if (producer > PRODUCERS) producer = 0;
    starts[0] = 0;
    for (uint32_t i = 0; i < count; i++) {
      uint64_t at = log->end.offset - 1000 + i;
      values[i] = log->end.offset + i;
      key_of[at] = (uint32_t)(next_random() % KEYS);
      null_of[at] = next_random() % 8 == 0;
      keyless[at] = kind == 3 || next_random() % 20 == 0;
      int size = snprintf(names[i], sizeof names[i], "k%u", key_of[at]);
      value[i] = (ms_slice){(const uint8_t *)&values[i], null_of[at] ? -1 : 8};
      key[i] = (ms_slice){(const uint8_t *)names[i], keyless[at] ? -1 : size};
      timestamps[i] = (int64_t)(next_random() % 1000);
      starts[i + 1] = i + 1;
    }
    ms_records records = {.count = count, .values = value, .keys = key, .timestamp = 5};
    if (kind & 4) records.timestamps = timestamps;
    if (kind & 8) {
      records.header_starts = starts;
      records.header_names = value;
      records.header_values = value;
      for (uint32_t i = 0; i < count; i++) value[i].size = 8;
      for (uint32_t i = 0; i < count; i++) null_of[log->end.offset - 1000 + i] = false;
    }
    append(log, &records, producer);
    if (producer) last_sequence[producer] = log->end.offset;
  }
}

static ms_key_entry entries[TABLE_KEYS];

static ms_key_table new_table(uint64_t capacity) {
  memset(entries, 0, sizeof entries);
  return (ms_key_table){
      .entries = entries, .capacity = capacity, .seed = {next_random(), next_random()}};
}

static ms_status scan(ms_key_table *table, ms_segment *segment, uint64_t end, uint64_t *full) {
  uint64_t position = segment->base_position;
  ms_status status = MS_OK;
  while (position < end && status == MS_OK)
    status = ms_compact_scan(table, segment, &position, end, 0, 1 << 12, full, NULL);
  return status;
}

/* Scan, mark, measure and copy. Anything may be refused; MS_OK: `target` has the result. */
static ms_status compact(log *log, bool drop, uint64_t capacity, struct log *target,
                         ms_survivors *survivors) {
  static uint64_t bits[(SEGMENT_BYTES / 4 + 63) / 64];
  uint64_t full, bytes;
  ms_key_table table = new_table(capacity);
  *survivors = (ms_survivors){.bits = bits, .end = log->end.position};
  ms_status status = scan(&table, &log->segment, log->end.position, &full);
  if (status != MS_OK && status != MS_FULL) return status;
  MS_TRY(ms_compact_count(&log->segment, log->end.position, &survivors->room, NULL));
  if (survivors->room > SEGMENT_BYTES / 4) return MS_INVALID;
  MS_TRY(ms_compact_select(&table, &log->segment, drop, survivors, NULL));
  (void)!ms_compact_leave(&table, &log->segment, survivors, NULL);
  MS_TRY(ms_compact_measure(&log->segment, survivors, &bytes, NULL));
  make_log(target, 77 + next_random() % 1000);
  status = ms_compact_copy(&log->segment, survivors, &target->segment, NULL);
  if (status == MS_OK) {
    /* Measured is what was written: behind it lies the filler. */
    ms_view view;
    target->end = log->end;
    CHECK(ms_segment_view(&target->segment, log->segment.base_position + bytes, log->end.position,
                          &view, NULL) == MS_OK);
    CHECK(view.flags & MS_BATCH_FILLER);
    CHECK_EQ_U64(view.length, log->end.position - log->segment.base_position - bytes);
  }
  return status;
}

static bool should_stay(uint64_t at, uint64_t total, bool drop) {
  if (keyless[at]) return true;
  for (uint64_t later = at + 1; later < total; later++)
    if (!keyless[later] && key_of[later] == key_of[at]) return false;
  return !(drop && null_of[at]);
}

static void check_compacted(log *original, log *copy, bool drop) {
  ms_mark mark = {original->segment.base_position, 1000, 0, INT64_MIN};
  CHECK(ms_segment_walk(&copy->segment, &mark, original->end.position, false, NULL) == MS_OK);
  CHECK_EQ_U64(mark.position, original->end.position);
  CHECK_EQ_U64(mark.offset, original->end.offset);
  CHECK_EQ_U64((uint32_t)mark.hash, (uint32_t)original->end.hash);
  uint64_t total = original->end.offset - 1000, at = 0, sequences[PRODUCERS + 1] = {0};
  for (uint64_t position = copy->segment.base_position; position < copy->end.position;) {
    ms_view view;
    ms_batch_header header;
    if (!CHECK(ms_segment_view(&copy->segment, position, copy->end.position, &view, NULL) == MS_OK))
      return;
    memcpy(&header, view.bytes, sizeof header);
    if (header.producer != 0 && header.producer <= PRODUCERS)
      sequences[header.producer] = header.sequence;
    int64_t smallest = INT64_MAX, largest = INT64_MIN;
    for (uint32_t i = 0; i < view.count; i++) {
      uint64_t offset = view.offsets ? (uint64_t)view.offsets[i] : view.base_offset + i;
      while (at < offset - 1000) CHECK(!should_stay(at++, total, drop));
      CHECK(should_stay(at, total, drop));
      bool present = view.value_validity == NULL || ms_bit(view.value_validity, i);
      CHECK(present == !null_of[at]);
      if (present) {
        uint64_t value;
        CHECK_EQ_U64((uint64_t)(view.value_offsets[i + 1] - view.value_offsets[i]), 8);
        memcpy(&value, view.values + view.value_offsets[i], 8);
        CHECK_EQ_U64(value, offset);
      }
      int64_t timestamp = view.timestamps ? view.timestamps[i] : view.timestamp_min;
      if (timestamp < smallest) smallest = timestamp;
      if (timestamp > largest) largest = timestamp;
      at++;
    }
    if (view.count > 0) {
      CHECK(smallest == view.timestamp_min);
      CHECK(largest == view.timestamp_max);
    }
    position += view.length;
  }
  while (at < total) CHECK(!should_stay(at++, total, drop));
  for (uint32_t p = 1; p <= PRODUCERS; p++) CHECK_EQ_U64(sequences[p], last_sequence[p]);
}

static void test_copy_has_what_stays_at_its_offsets_and_the_last_of_each_producer(void) {
  for (int round = 0; round < 40; round++) {
    log original, copy, again;
    ms_survivors survivors;
    bool drop = round % 2 == 1;
    build(&original);
    if (CHECK(compact(&original, drop, TABLE_KEYS, &copy, &survivors) == MS_OK)) {
      CHECK(survivors.dead > RECORDS / 2);
      check_compacted(&original, &copy, drop);
      /* What is compacted has nothing more to go; with `drop`, its tombstones. */
      ms_status status = compact(&copy, true, TABLE_KEYS, &again, &survivors);
      if (drop) CHECK_EQ_U64(survivors.dead, 0);
      if (status == MS_OK) {
        check_compacted(&original, &again, true);
        free(again.bytes);
      } else {
        CHECK(status == MS_FULL);
      }
      free(copy.bytes);
    }
    free(original.bytes);
  }
}

static void test_offsets_are_found_in_a_copy(void) {
  log original, copy;
  ms_survivors survivors;
  build(&original);
  CHECK(compact(&original, false, TABLE_KEYS, &copy, &survivors) == MS_OK);
  uint64_t total = original.end.offset - 1000;
  for (uint64_t at = 0; at < total; at++) {
    uint64_t position, next = at;
    while (next < total && !should_stay(next, total, false)) next++;
    ms_status status =
        ms_segment_find_offset(&copy.segment, 1000 + at, copy.end.position, &position, NULL);
    if (next == total) {
      CHECK(status == MS_END);
      continue;
    }
    ms_view view;
    CHECK(status == MS_OK);
    CHECK(ms_segment_view(&copy.segment, position, copy.end.position, &view, NULL) == MS_OK);
    uint32_t i = ms_view_find_offset(&view, 1000 + at);
    CHECK(i < view.count);
    CHECK_EQ_U64(view.offsets ? (uint64_t)view.offsets[i] : view.base_offset + i, 1000 + next);
  }
  free(copy.bytes);
  free(original.bytes);
}

static void test_full_table_says_where_to_go_on_and_removes_no_more_than_it_knows(void) {
  log original;
  build(&original);
  for (uint64_t capacity = 4; capacity < 40; capacity += 3) {
    ms_key_table table = new_table(capacity);
    uint64_t full = 0;
    CHECK(scan(&table, &original.segment, original.end.position, &full) == MS_FULL);
    CHECK(table.count == capacity / 4 * 3);
    CHECK(full > 1000 && full < original.end.offset);
    log copy;
    ms_survivors survivors;
    if (compact(&original, true, capacity, &copy, &survivors) == MS_OK) {
      for (uint64_t at = 0; at < original.end.offset - 1000; at++)
        if (should_stay(at, original.end.offset - 1000, true))
          CHECK(survivors.bits[at / 64] >> at % 64 & 1);
      free(copy.bytes);
    }
  }
  free(original.bytes);
}

static void test_what_would_not_be_smaller_is_refused(void) {
  log original, copy;
  ms_survivors survivors;
  build(&original);
  memset(key_of, 0, sizeof key_of);
  ms_key_table table = new_table(TABLE_KEYS); /* knows no key: everything stays */
  static uint64_t bits[SEGMENT_BYTES / 64];
  uint64_t bytes;
  survivors = (ms_survivors){.bits = bits, .end = original.end.position};
  CHECK(ms_compact_count(&original.segment, original.end.position, &survivors.room, NULL) == MS_OK);
  CHECK(ms_compact_select(&table, &original.segment, true, &survivors, NULL) == MS_OK);
  CHECK_EQ_U64(survivors.dead, 0);
  CHECK_EQ_U64(survivors.records, original.end.offset - 1000);
  ms_status status = ms_compact_measure(&original.segment, &survivors, &bytes, NULL);
  CHECK(status == MS_OK || status == MS_FULL);
  make_log(&copy, 3);
  ms_segment_activate(&copy.segment, &original.end, 0, 1, 1);
  CHECK(ms_compact_copy(&original.segment, &survivors, &copy.segment, NULL) == MS_INVALID);
  free(copy.bytes);
  free(original.bytes);
}

static void test_segment_with_more_records_than_were_counted_is_refused(void) {
  static uint64_t bits[SEGMENT_BYTES / 64];
  log original;
  build(&original);
  ms_key_table table = new_table(TABLE_KEYS);
  uint64_t full, bytes;
  ms_survivors survivors = {.bits = bits, .end = original.end.position};
  CHECK(scan(&table, &original.segment, original.end.position, &full) == MS_OK);
  CHECK(ms_compact_count(&original.segment, original.end.position, &survivors.room, NULL) == MS_OK);
  CHECK(ms_compact_select(&table, &original.segment, false, &survivors, NULL) == MS_OK);
  survivors.room--;
  CHECK(ms_compact_measure(&original.segment, &survivors, &bytes, NULL) == MS_INVALID);
  CHECK(ms_compact_select(&table, &original.segment, false, &survivors, NULL) == MS_INVALID);
  free(original.bytes);
}

/* Records that stay with gaps between take more than before: here so much more that the batch
 * that keeps the sequence of a producer, and no record, finds no room. */
static void test_batch_without_records_that_finds_no_room_is_refused(void) {
  const ms_mark begin = {.timestamp_max = INT64_MIN, .offset = 1000, .position = 1 << 20};
  ms_slice keys[8], values[8];
  log original, copy;
  ms_survivors survivors;
  for (uint32_t i = 0; i < 8; i++) {
    keys[i] = (ms_slice){(const uint8_t *)"01234567" + i, 1};
    values[i] = (ms_slice){(const uint8_t *)"", 0};
  }
  begin_log(&original, 42, &begin);
  append(&original, &(ms_records){.count = 8, .values = values, .keys = keys, .timestamp = 5}, 0);
  const ms_slice none = {NULL, -1};
  append(&original, &(ms_records){.count = 1, .values = &none, .keys = &keys[4], .timestamp = 5},
         1);
  CHECK(compact(&original, true, TABLE_KEYS, &copy, &survivors) == MS_FULL);
  CHECK_EQ_U64(survivors.records, 7);
  CHECK_EQ_U64(survivors.tombstones_removed, 1);
  free(original.bytes);
}

static void test_damaged_bytes_are_refused_or_harmless(void) {
  log original;
  build(&original);
  uint8_t *sound = malloc(SEGMENT_BYTES);
  memcpy(sound, original.bytes, SEGMENT_BYTES);
  uint32_t refused = 0;
  for (int mutant = 0; mutant < MUTANTS; mutant++) {
    memcpy(original.bytes, sound, SEGMENT_BYTES);
    uint64_t data = original.end.position - original.segment.base_position;
    uint64_t flips = 1 + next_random() % 3;
    /* Half of them in the header of a batch, with a hash that is right for it. */
    uint64_t at = original.segment.data_position, skip = next_random() % 30;
    for (uint32_t length; skip-- > 0 && at < original.segment.data_position + data; at += length)
      memcpy(&length, original.bytes + at + 8, 4);
    uint32_t length;
    memcpy(&length, original.bytes + at + 8, 4);
    if (mutant % 2 == 0 && length >= 64 && at < original.segment.data_position + data) {
      for (; flips > 0; flips--)
        original.bytes[at + 8 + next_random() % (length - 8)] ^= (uint8_t)(1 << next_random() % 8);
      memcpy(&length, original.bytes + at + 8, 4);
      uint64_t room = original.segment.size - at;
      uint64_t seed = original.segment.salt + at - original.segment.data_position +
                      original.segment.base_position;
      uint64_t hash = ms_xxh3_64(original.bytes + at + 8,
                                 length >= 64 && length <= room ? length - 8 : 56, seed);
      memcpy(original.bytes + at, &hash, 8);
    } else {
      for (; flips > 0; flips--)
        original.bytes[8192 + next_random() % (SEGMENT_BYTES - 8192)] ^=
            (uint8_t)(1 << next_random() % 8);
    }
    memset((void *)original.checked, 0, sizeof original.checked);
    log copy;
    ms_survivors survivors;
    copy.bytes = NULL;
    ms_status status = compact(&original, mutant % 3 == 0, TABLE_KEYS, &copy, &survivors);
    refused += status != MS_OK;
    free(copy.bytes);
  }
  CHECK(refused > MUTANTS / 4);
  free(sound);
  free(original.bytes);
}

static void test_compaction_record_survives_only_whole(void) {
  log log;
  build(&log);
  ms_compaction record, found;
  CHECK(!ms_compaction_load(&log.segment, &found));
  record = (ms_compaction){
      .first = 1, .last = 2, .kept_bytes = 3, .records = 4, .tombstones = 5, .tombstones_end = 6};
  ms_compaction_store(&log.segment, &record);
  CHECK(ms_compaction_load(&log.segment, &found));
  CHECK_EQ_U64(found.kept_bytes, 3);
  CHECK_EQ_U64(found.tombstones_end, 6);
  log.bytes[MS_SEGMENT_COMPACTION_AT + 17] ^= 1;
  CHECK(!ms_compaction_load(&log.segment, &found));
  free(log.bytes);
}

static const check_test tests[] = {
    CHECK_TEST(test_copy_has_what_stays_at_its_offsets_and_the_last_of_each_producer),
    CHECK_TEST(test_offsets_are_found_in_a_copy),
    CHECK_TEST(test_full_table_says_where_to_go_on_and_removes_no_more_than_it_knows),
    CHECK_TEST(test_what_would_not_be_smaller_is_refused),
    CHECK_TEST(test_segment_with_more_records_than_were_counted_is_refused),
    CHECK_TEST(test_batch_without_records_that_finds_no_room_is_refused),
    CHECK_TEST(test_damaged_bytes_are_refused_or_harmless),
    CHECK_TEST(test_compaction_record_survives_only_whole),
};
CHECK_MAIN(tests)
