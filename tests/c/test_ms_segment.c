/* Segments on plain memory: what is written is found again, and no damage makes a reader leave the
 * bytes that it was given (the sanitizers watch). */
#include "segment_log.h"
#include "xorshift.h"

enum { RECORDS = 600, MUTANTS = 20000 };

/* Batches of 1 to 30 records with every kind of column, values that say their offset. */
static void build(log *log) {
  const ms_mark begin = {.timestamp_max = INT64_MIN};
  begin_log(log, 42, &begin);
  uint64_t values[30];
  ms_slice value[30], key[30], name = {(const uint8_t *)"n", 1};
  int64_t timestamps[30];
  uint32_t starts[31];
  while (log->end.offset < RECORDS) {
    uint32_t count = 1 + (uint32_t)(next_random() % 30), kind = (uint32_t)(next_random() % 16);
    for (uint32_t i = 0; i < count; i++) {
      values[i] = log->end.offset + i;
      value[i] = (ms_slice){(const uint8_t *)&values[i], (kind & 1) && i % 3 == 1 ? -1 : 8};
      key[i] = (ms_slice){(const uint8_t *)"key", (kind & 2) && i % 4 == 1 ? -1 : 3};
      timestamps[i] = (int64_t)(log->end.offset + i) * 10;
      starts[i + 1] = i + 1;
    }
    starts[0] = 0;
    ms_slice names[30];
    for (uint32_t i = 0; i < count; i++) names[i] = name;
    ms_records records = {.count = count, .values = value, .timestamp = timestamps[0]};
    if (kind & 4) records.keys = key;
    if (kind & 8) records.timestamps = timestamps;
    if (kind == 15) {
      records.header_starts = starts;
      records.header_names = names;
      records.header_values = names;
    }
    ms_shape shape;
    CHECK(ms_batch_measure(&records, &shape, NULL) == MS_OK);
    uint64_t at = ms_segment_file_position(&log->segment, log->end.position);
    ms_place place = {.position = log->end.position,
                      .file_position = at,
                      .seed = log->segment.salt + log->end.position,
                      .base_offset = log->end.offset,
                      .chain = (uint32_t)log->end.hash};
    uint64_t begin_position = log->end.position;
    log->end.hash = ms_batch_encode(&records, &shape, &place, log->bytes + at);
    log->end.position += ms_batch_length(&shape, at);
    log->end.offset += count;
    if (shape.timestamp_max > log->end.timestamp_max) log->end.timestamp_max = shape.timestamp_max;
    ms_segment_index_put(&log->segment, begin_position, &log->end);
  }
}

static void test_walk_ends_where_the_log_ends(void) {
  log log;
  build(&log);
  ms_mark mark = {.timestamp_max = INT64_MIN};
  CHECK(ms_segment_walk(&log.segment, &mark, UINT64_MAX, false, NULL) == MS_END);
  CHECK_EQ_U64(mark.position, log.end.position);
  CHECK_EQ_U64(mark.offset, log.end.offset);
  CHECK_EQ_U64(mark.hash, log.end.hash);
  ms_mark found;
  CHECK(ms_segment_mark_at(&log.segment, log.end.position, &found, NULL) == MS_OK);
  CHECK_EQ_U64(found.hash, log.end.hash);
  free(log.bytes);
}

static void test_find_names_the_batch_of_each_offset(void) {
  log log;
  build(&log);
  /* Backwards first, so that little is checked before it is looked for; then all of it is. */
  for (uint64_t step = 0; step < 2 * log.end.offset; step++) {
    uint64_t offset = step % log.end.offset;
    if (step < log.end.offset) offset = log.end.offset - 1 - offset;
    uint64_t position;
    ms_view view;
    if (!CHECK(ms_segment_find_offset(&log.segment, offset, log.end.position, &position, NULL) ==
               MS_OK))
      break;
    CHECK(ms_segment_view(&log.segment, position, log.end.position, &view, NULL) == MS_OK);
    CHECK(view.base_offset <= offset && offset < view.base_offset + view.count);
  }
  uint64_t position;
  CHECK(ms_segment_find_offset(&log.segment, log.end.offset, log.end.position, &position, NULL) ==
        MS_END);
  free(log.bytes);
}

static void test_gathered_run_has_every_value_in_order(void) {
  log log;
  build(&log);
  uint64_t position = 0, offset = 0;
  uint32_t skip = 0;
  while (position < log.end.position) {
    uint64_t first = position;
    uint32_t first_skip = skip;
    ms_gather gather;
    CHECK(ms_segment_measure_run(&log.segment, &position, &skip, log.end.position,
                                 1 + next_random() % 50, UINT32_MAX, &gather, NULL) == MS_OK);
    if (!CHECK(gather.count > 0)) break;
    uint8_t *buffer = aligned_alloc(64, (ms_gather_bytes(&gather) + 63) & ~UINT64_C(63));
    ms_view view;
    ms_gather_begin(&gather, buffer, &view);
    ms_segment_gather_run(&log.segment, first, first_skip, &gather, &view);
    CHECK_EQ_U64(view.count, gather.count);
    for (uint32_t i = 0; i < view.count; i++, offset++) {
      if (view.value_validity != NULL && !ms_bit(view.value_validity, i)) continue;
      uint64_t value;
      memcpy(&value, view.values + view.value_offsets[i], sizeof value);
      CHECK_EQ_U64(value, offset);
    }
    free(buffer);
  }
  CHECK_EQ_U64(offset, log.end.offset);
  free(log.bytes);
}

static void test_segment_of_another_place_is_refused(void) {
  static const ms_identity others[] = {
      {.store_id = {1}, .stream_id = 7, .partition = 3, .number = 1},
      {.stream_id = 8, .partition = 3, .number = 1},
      {.stream_id = 7, .partition = 4, .number = 1},
      {.stream_id = 7, .partition = 3, .number = 2},
  };
  log log;
  build(&log);
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    CHECK(ms_segment_open(&log.segment, log.bytes, SEGMENT_BYTES, true, &others[i], log.checked,
                          NULL) == MS_CORRUPT);
  free(log.bytes);
}

static void test_view_of_a_position_of_no_batch_is_refused(void) {
  const ms_mark begin = {.timestamp_max = INT64_MIN, .position = 4096};
  log log;
  ms_view view;
  begin_log(&log, 42, &begin);
  CHECK(ms_segment_view(&log.segment, 4088, 8192, &view, NULL) == MS_CORRUPT);
  CHECK(ms_segment_view(&log.segment, 4100, 8192, &view, NULL) == MS_CORRUPT);
  CHECK(ms_segment_view(&log.segment, 4096, 8192, &view, NULL) == MS_CORRUPT); /* nothing there */
  CHECK(ms_segment_view(&log.segment, 4096, 4096, &view, NULL) == MS_END);
  free(log.bytes);
}

/* Everything a reader does, on bytes that may be anything. Results do not matter, staying within
 * the bytes does, and that what is found valid has the right hash. */
static void read_all(log *log, uint64_t end) {
  ms_mark mark = {.timestamp_max = INT64_MIN};
  ms_view view;
  uint64_t position, synced;
  (void)!ms_segment_walk(&log->segment, &mark, UINT64_MAX, next_random() % 2, NULL);
  for (int i = 0; i < 8; i++) {
    uint64_t offset = next_random() % (RECORDS + 50);
    if (ms_segment_find_offset(&log->segment, offset, end, &position, NULL) == MS_OK &&
        ms_segment_view(&log->segment, position, end, &view, NULL) == MS_OK)
      CHECK(ms_batch_check(&view, log->segment.salt + position, NULL) == MS_OK);
    (void)!ms_segment_find_timestamp(&log->segment, (int64_t)offset * 10, end, &position, NULL);
    (void)!ms_segment_mark_at(&log->segment, next_random() % (end + 8), &mark, NULL);
  }
  position = 0;
  uint32_t skip = 0;
  ms_gather gather;
  if (ms_segment_measure_run(&log->segment, &position, &skip, end, 1000, 4096, &gather, NULL) ==
          MS_OK &&
      gather.count > 0) {
    uint8_t *buffer = aligned_alloc(64, (ms_gather_bytes(&gather) + 63) & ~UINT64_C(63));
    ms_gather_begin(&gather, buffer, &view);
    ms_segment_gather_run(&log->segment, 0, 0, &gather, &view);
    free(buffer);
  }
  if (next_random() % 64 == 0)
    (void)!ms_segment_search(&log->segment, next_random() % end, UINT64_MAX, &position, &synced);
}

/* Lengths and counts that programs stumble over. */
static const uint32_t hostile[] = {0,  1,          7,          8,          63,
                                   64, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffff8};

static void test_no_damage_leads_a_reader_out_of_the_segment(void) {
  log log;
  build(&log);
  uint8_t *sound = malloc(SEGMENT_BYTES);
  memcpy(sound, log.bytes, SEGMENT_BYTES);
  uint64_t used = ms_segment_file_position(&log.segment, log.end.position);
  for (int mutant = 0; mutant < MUTANTS; mutant++) {
    memcpy(log.bytes, sound, used);
    /* The header stays: a damaged one is refused by its checksum, which others test. */
    for (uint64_t n = 1 + next_random() % 3; n > 0; n--) {
      uint64_t at = 4096 + next_random() % (used - 4096 - 8);
      if (next_random() % 2) {
        log.bytes[at] = (uint8_t)(log.bytes[at] ^ 1u << next_random() % 8);
      } else {
        uint32_t value = hostile[next_random() % (sizeof hostile / sizeof *hostile)];
        memcpy(log.bytes + (at & ~UINT64_C(3)), &value, sizeof value);
      }
    }
    open_log(&log);
    if (log.segment.activated) read_all(&log, log.end.position);
  }
  printf("ops=%d faults=%d\n", MUTANTS, MUTANTS);
  free(sound);
  free(log.bytes);
}

/* The same with a right hash over hostile fields: a writer that is not honest. */
static void test_no_signed_lie_leads_a_reader_out_of_the_segment(void) {
  log log;
  build(&log);
  uint8_t *sound = malloc(SEGMENT_BYTES);
  memcpy(sound, log.bytes, SEGMENT_BYTES);
  uint64_t used = ms_segment_file_position(&log.segment, log.end.position);
  for (int mutant = 0; mutant < MUTANTS; mutant++) {
    memcpy(log.bytes, sound, used);
    open_log(&log);
    uint64_t position;
    if (ms_segment_find_offset(&log.segment, next_random() % RECORDS, log.end.position, &position,
                               NULL) != MS_OK)
      continue;
    uint8_t *batch = log.bytes + ms_segment_file_position(&log.segment, position);
    ms_batch_header header;
    memcpy(&header, batch, sizeof header);
    uint64_t at = 8 + next_random() % (header.length - 8 - 4);
    uint32_t value = hostile[next_random() % (sizeof hostile / sizeof *hostile)];
    memcpy(batch + (at & ~UINT64_C(3)), &value, sizeof value);
    uint32_t length = header.length;
    memcpy(&header, batch, sizeof header);
    if (header.length <= length && header.length >= 64) length = header.length;
    uint64_t hash = ms_xxh3_64(batch + 8, length - 8, log.segment.salt + position);
    memcpy(batch, &hash, sizeof hash);
    open_log(&log);
    read_all(&log, log.end.position);
  }
  printf("ops=%d faults=%d\n", MUTANTS, MUTANTS);
  free(sound);
  free(log.bytes);
}

static const check_test tests[] = {
    CHECK_TEST(test_walk_ends_where_the_log_ends),
    CHECK_TEST(test_find_names_the_batch_of_each_offset),
    CHECK_TEST(test_gathered_run_has_every_value_in_order),
    CHECK_TEST(test_segment_of_another_place_is_refused),
    CHECK_TEST(test_view_of_a_position_of_no_batch_is_refused),
    CHECK_TEST(test_no_damage_leads_a_reader_out_of_the_segment),
    CHECK_TEST(test_no_signed_lie_leads_a_reader_out_of_the_segment),
};
CHECK_MAIN(tests)
