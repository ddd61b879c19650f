/* Tables of producers over segments on plain memory: what was read is the maximum of the headers,
 * however it is read; nothing that is there already is admitted; no header makes a table grow by
 * itself, or a reader leave its bytes (the sanitizers watch). */
#include "ms_producer.h"
#include "segment_log.h"
#include "xorshift.h"

enum { PRODUCERS = 9, ROUNDS = 60, MUTANTS = 20000 };

/* Of each producer the last sequence, and that of the last whole call; each + 1. */
static struct {
  uint64_t last[PRODUCERS], whole[PRODUCERS];
} model;

static void build(log *log) {
  const ms_mark begin = {.timestamp_max = INT64_MIN};
  begin_log(log, 42, &begin);
  memset(&model, 0, sizeof model);
}

/* One batch behind the end; false when there is no room. */
static bool put(log *log, uint32_t producer, uint64_t sequence) {
  uint64_t at = ms_segment_file_position(&log->segment, log->end.position);
  const ms_slice value = {(const uint8_t *)"0123456789", (int64_t)(next_random() % 11)};
  const ms_records records = {.count = 1, .values = &value, .timestamp = 1};
  ms_shape shape;
  CHECK(ms_batch_measure(&records, &shape, NULL) == MS_OK);
  uint64_t length = ms_batch_length(&shape, at);
  if (length > SEGMENT_BYTES - at) return false;
  const ms_place place = {.position = log->end.position,
                          .file_position = at,
                          .seed = log->segment.salt + log->end.position,
                          .base_offset = log->end.offset,
                          .chain = (uint32_t)log->end.hash,
                          .producer = producer,
                          .sequence = sequence};
  log->end.hash = ms_batch_encode(&records, &shape, &place, log->bytes + at);
  log->end.position += length;
  log->end.offset += 1;
  return true;
}

static void note(uint32_t producer, uint64_t sequence) {
  uint64_t value = (sequence & ~MS_SEQUENCE_MORE) + 1;
  if (value > model.last[producer]) model.last[producer] = value;
  if (!(sequence & MS_SEQUENCE_MORE) && value > model.whole[producer])
    model.whole[producer] = value;
}

static void check_table(const log *log, const ms_producers *table) {
  CHECK(table->position == log->end.position);
  for (uint32_t i = 1; i < PRODUCERS; i++) {
    CHECK(table->entries[i].last == model.last[i]);
    CHECK(table->entries[i].whole == model.whole[i]);
  }
}

/* Three tables of one log: one that appends, one that looks now and then, one that reads anew. */
static void test_tables_agree_with_the_headers(void) {
  log log;
  build(&log);
  ms_producer_entry entries[3][PRODUCERS];
  memset(entries, 0, sizeof entries);
  ms_producers own = {.entries = entries[0], .count = PRODUCERS};
  ms_producers other = {.entries = entries[1], .count = PRODUCERS};
  uint64_t admitted = 0, resent = 0, behind = 0;
  uint32_t unknown = 0;
  for (bool room = true; room;) {
    uint32_t producer = (uint32_t)(next_random() % PRODUCERS);
    uint64_t first = model.last[producer] + next_random() % 6, last = 0, begin = log.end.position;
    if (first >= 3) first -= 3;
    if (producer == 0) {
      room = put(&log, 0, next_random());
      if (room) ms_producers_passed(&own, begin, log.end.position, 0, 0);
      continue;
    }
    ms_status status = ms_producers_try_admit(&own, &log.segment, begin, producer, first, &last);
    if (model.last[producer] > first) {
      CHECK(status == MS_RESENT && last == model.last[producer] - 1);
      resent++;
    } else if (CHECK(status == MS_OK)) {
      uint64_t sequence = (first + next_random() % 5) | (next_random() % 3 ? 0 : MS_SEQUENCE_MORE);
      room = put(&log, producer, sequence);
      if (!room) break;
      note(producer, sequence);
      /* Whoever forgets to say so reads it later. */
      if (next_random() % 2) ms_producers_passed(&own, begin, log.end.position, producer, sequence);
      admitted++;
    }
    /* It looks often for a time, and then after more batches than it may read in one admission. */
    if (log.end.offset > 1700 || (log.end.offset < 200 && next_random() % 20 == 0)) {
      status = ms_producers_try_admit(&other, &log.segment, log.end.position, 1, 1u << 30, &last);
      if (status == MS_BEHIND) {
        behind++;
        CHECK(other.position < log.end.position);
        CHECK(ms_producers_walk(&other, &log.segment, log.end.position, &unknown, NULL) == MS_OK);
      } else {
        CHECK(status == MS_OK);
      }
      check_table(&log, &other);
    }
  }
  CHECK(admitted > 100 && resent > 100 && behind > 0);
  ms_producers anew = {.entries = entries[2], .count = PRODUCERS};
  CHECK(ms_producers_walk(&anew, &log.segment, log.end.position, &unknown, NULL) == MS_OK);
  check_table(&log, &anew);
  anew.position = 0; /* reading twice changes nothing */
  CHECK(ms_producers_walk(&anew, &log.segment, log.end.position, &unknown, NULL) == MS_OK);
  check_table(&log, &anew);
  free(log.bytes);
}

static void test_nobody_is_admitted_by_a_table_that_is_not_complete(void) {
  log log;
  build(&log);
  ms_producer_entry entries[PRODUCERS] = {{0, 0}};
  ms_producers table = {.entries = entries, .count = 2};
  uint64_t last = 0;
  uint32_t unknown = 0;
  CHECK(ms_producers_try_admit(NULL, &log.segment, 0, 1, 0, &last) == MS_BEHIND);
  CHECK(ms_producers_try_admit(&table, &log.segment, 0, 2, 0, &last) == MS_BEHIND);
  CHECK(ms_producers_try_admit(&table, NULL, 0, 1, 0, &last) == MS_OK); /* an empty log */
  CHECK(put(&log, 5, 17));
  CHECK(ms_producers_try_admit(&table, NULL, log.end.position, 1, 0, &last) == MS_BEHIND);
  CHECK(ms_producers_try_admit(&table, &log.segment, log.end.position, 1, 0, &last) == MS_BEHIND);
  CHECK(ms_producers_walk(&table, &log.segment, log.end.position, &unknown, NULL) == MS_BEHIND);
  CHECK(unknown == 5 && table.position == 0);
  table.count = PRODUCERS;
  CHECK(ms_producers_walk(&table, &log.segment, log.end.position, &unknown, NULL) == MS_OK);
  CHECK(ms_producers_try_admit(&table, &log.segment, log.end.position, 5, 17, &last) == MS_RESENT);
  CHECK(last == 17);
  CHECK(ms_producers_try_admit(&table, &log.segment, log.end.position, 5, 18, &last) == MS_OK);
  /* The log goes on in another segment: what lies between is not in this one. */
  table.position = 0;
  log.segment.base_position = 64;
  CHECK(ms_producers_try_admit(&table, &log.segment, log.end.position + 64, 5, 18, &last) ==
        MS_BEHIND);
  free(log.bytes);
}

static void test_no_damage_leads_out_of_the_segment(void) {
  log log;
  build(&log);
  for (int i = 0; i < ROUNDS; i++) CHECK(put(&log, 1 + (uint32_t)i % 8, (uint64_t)i));
  uint8_t *sound = malloc(SEGMENT_BYTES);
  memcpy(sound, log.bytes, SEGMENT_BYTES);
  uint64_t begin = log.segment.data_position, corrupt = 0, behind = 0;
  for (int i = 0; i < MUTANTS; i++) {
    uint64_t at = begin + next_random() % log.end.position;
    log.bytes[at] = (uint8_t)next_random();
    memset((void *)log.checked, 0, sizeof log.checked);
    ms_producer_entry entries[PRODUCERS] = {{0, 0}};
    ms_producers table = {.entries = entries, .count = PRODUCERS};
    uint64_t last = 0;
    uint32_t unknown = 0;
    ms_error err;
    ms_status status =
        ms_producers_try_admit(&table, &log.segment, log.end.position, 1, 1u << 20, &last);
    CHECK(status == MS_OK || status == MS_RESENT || status == MS_BEHIND);
    CHECK(table.position <= log.end.position);
    behind += status == MS_BEHIND;
    table.position = 0;
    status = ms_producers_walk(&table, &log.segment, log.end.position, &unknown, &err);
    CHECK(status == MS_OK || status == MS_CORRUPT || status == MS_VERSION);
    corrupt += status != MS_OK;
    log.bytes[at] = sound[at];
  }
  CHECK(corrupt > MUTANTS / 2 && behind > 0);
  /* A number that no file of ids gives, under a right hash */
  CHECK(put(&log, MS_PRODUCER_MAX + 1, 1));
  memset((void *)log.checked, 0, sizeof log.checked);
  ms_producer_entry entries[PRODUCERS] = {{0, 0}};
  ms_producers table = {.entries = entries, .count = PRODUCERS};
  uint32_t unknown = 0;
  ms_error err;
  CHECK(ms_producers_walk(&table, &log.segment, log.end.position, &unknown, &err) == MS_CORRUPT);
  CHECK(err.found == MS_PRODUCER_MAX + 1);
  free(sound);
  free(log.bytes);
}

static const check_test tests[] = {
    CHECK_TEST(test_tables_agree_with_the_headers),
    CHECK_TEST(test_nobody_is_admitted_by_a_table_that_is_not_complete),
    CHECK_TEST(test_no_damage_leads_out_of_the_segment),
};
CHECK_MAIN(tests)
