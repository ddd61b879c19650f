/* A segment file: opened, walked, searched, read, gathered, exported, compacted.
 *
 * Flags: 1 mends the header's checksum, 2 the activation's, 4 the hashes of batches (so that what
 * comes behind them is reached), 8 opens for writing.
 */
#include "fuzz.h"
#include "ms_arrow.h"
#include "ms_compact.h"
#include "ms_producer.h"

enum { FILE_BYTES = 1 << 16, KEYS = 256, PRODUCERS = 64 };

static void mend_batches(uint8_t *bytes, uint32_t data_position, uint64_t salt,
                         const ms_activation *record) {
  uint64_t at = data_position, base = record->base_position;
  uint32_t first = (uint32_t)record->predecessor_hash;
  memcpy(bytes + at + offsetof(ms_batch_header, chain), &first, 4);
  while (at + sizeof(ms_batch_header) <= FILE_BYTES) {
    ms_batch_header header;
    memcpy(&header, bytes + at, sizeof header);
    uint64_t length = header.length;
    if (length < sizeof header || length % 8 || length > FILE_BYTES - at) return;
    uint64_t hashed = header.flags & MS_BATCH_FILLER ? sizeof header : length;
    uint64_t hash = ms_xxh3_64(bytes + at + 8, hashed - 8, salt + base + at - data_position);
    memcpy(bytes + at, &hash, 8);
    at += length;
    if (at + sizeof header <= FILE_BYTES) { /* the next one's chain repeats the low half */
      uint32_t chain = (uint32_t)hash;
      memcpy(bytes + at + offsetof(ms_batch_header, chain), &chain, 4);
    }
  }
}

static void mend(uint8_t *bytes, uint8_t flags) {
  ms_segment_header *header = (ms_segment_header *)(void *)bytes;
  ms_activation *record = (ms_activation *)(void *)(bytes + MS_SEGMENT_ACTIVATION_AT);
  if (flags & 1) {
    header->size = FILE_BYTES;
    ms_segment_geometry(FILE_BYTES, &header->index_count, &header->data_position);
    header->checksum = ms_xxh3_64(header, offsetof(ms_segment_header, checksum), 0);
  }
  uint32_t data_position = header->data_position;
  if (flags & 4 && data_position >= 4096 && data_position < FILE_BYTES - 64)
    mend_batches(bytes, data_position, header->salt, record);
  if (flags & 2)
    record->checksum =
        ms_xxh3_64((const uint8_t *)record + 8, sizeof(ms_activation) - 8, header->salt);
}

static uint64_t sum; /* so that reads are not left out */

/* Out as Arrow, and in again: what was checked is taken as it is. */
static void export_view(const ms_view *view) {
  ms_error err;
  struct ArrowSchema schema;
  struct ArrowArray array;
  ms_arrow_source source = {.view = *view, .count = view->count, .columns = MS_ARROW_ALL};
  if (ms_arrow_export_schema(&schema, source.columns, &err) != MS_OK ||
      ms_arrow_export_array(&source, &array, &err) != MS_OK ||
      ms_arrow_check_struct(&schema, &array, &err) != MS_OK)
    abort();
  ms_slice *out = zeros((uint64_t)view->count * sizeof *out + 1);
  for (int64_t column = 3; column < 5; column++) { /* key, value */
    if (ms_arrow_import_slices(schema.children[column], array.children[column], 0, view->count, out,
                               &err) != MS_OK)
      abort();
    for (uint32_t i = 0; i < view->count; i++)
      for (int64_t byte = 0; byte < out[i].size; byte++) sum += out[i].data[byte];
  }
  free(out);
  array.release(&array);
  schema.release(&schema);
}

static void read_view(const ms_view *view) {
  export_view(view);
  for (uint32_t i = 0; i < view->count; i++) {
    if (view->timestamps) sum += (uint64_t)view->timestamps[i];
    if (view->offsets) sum += (uint64_t)view->offsets[i];
    for (int32_t at = view->value_offsets[i]; at < view->value_offsets[i + 1]; at++)
      sum += view->values[at];
    if (view->key_offsets)
      for (int32_t at = view->key_offsets[i]; at < view->key_offsets[i + 1]; at++)
        sum += view->keys[at];
  }
  sum += ms_view_find_offset(view, view->base_offset + 1);
  sum += ms_view_find_timestamp(view, view->timestamp_max);
}

static void gather(ms_segment *segment, uint64_t limit) {
  ms_error err;
  uint64_t position = segment->base_position;
  uint32_t skip = 0;
  for (int run = 0; run < 8; run++) {
    ms_gather measured;
    uint64_t from = position;
    uint32_t skipped = skip;
    if (ms_segment_measure_run(segment, &position, &skip, limit, 100, 4096, &measured, &err) !=
        MS_OK)
      return;
    if (measured.count == 0) return;
    ms_view gathered;
    uint8_t *room = zeros(ms_gather_bytes(&measured));
    ms_gather_begin(&measured, room, &gathered);
    ms_segment_gather_run(segment, from, skipped, &measured, &gathered);
    read_view(&gathered);
    free(room);
  }
}

static void compact(ms_segment *segment, uint64_t end) {
  ms_error err;
  ms_key_entry *entries = zeros(KEYS * sizeof(ms_key_entry));
  ms_key_table table = {.entries = entries, .capacity = KEYS, .seed = {1, 2}};
  uint64_t position = segment->base_position, full, records, bytes;
  bool whole =
      ms_compact_scan(&table, segment, &position, end, 0, UINT64_MAX, &full, &err) == MS_OK;
  if (whole && ms_compact_count(segment, end, &records, &err) == MS_OK && records < 1 << 20) {
    ms_survivors survivors = {.room = records, .end = end};
    survivors.bits = zeros(records / 8 + 8);
    if (ms_compact_select(&table, segment, true, &survivors, &err) == MS_OK &&
        ms_compact_measure(segment, &survivors, &bytes, &err) == MS_OK) {
      _Atomic uint32_t checked[8] = {0};
      uint8_t *copy = zeros(FILE_BYTES);
      memcpy(copy, segment->bytes, sizeof(ms_segment_header));
      ms_segment target;
      ms_segment_header *header = (ms_segment_header *)(void *)copy;
      ms_identity same = {
          .stream_id = header->stream_id, .partition = header->partition, .number = header->number};
      memcpy(same.store_id, header->store_id, 16);
      if (ms_segment_open(&target, copy, FILE_BYTES, true, &same, checked, &err) == MS_OK &&
          ms_compact_copy(segment, &survivors, &target, &err) == MS_OK)
        sum += copy[header->data_position];
      free(copy);
    }
    if (ms_compact_leave(&table, segment, &survivors, &err) == MS_OK) sum++;
    free(survivors.bits);
  }
  free(entries);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  uint8_t flags = *data++;
  size--;
  uint8_t *bytes = zeros(FILE_BYTES);
  while (piece(bytes, FILE_BYTES, &data, &size)) {}
  mend(bytes, flags);
  ms_error err;
  _Atomic uint32_t checked[8] = {0};
  ms_segment segment;
  const ms_segment_header *header = (const ms_segment_header *)(void *)bytes;
  ms_identity identity = {
      .stream_id = header->stream_id, .partition = header->partition, .number = header->number};
  memcpy(identity.store_id, header->store_id, 16);
  if (ms_segment_open(&segment, bytes, FILE_BYTES, (flags & 8) != 0, &identity, checked, &err) ==
          MS_OK &&
      segment.activated) {
    ms_compaction record;
    if (ms_compaction_load(&segment, &record)) sum += record.records;
    ms_mark mark = {segment.base_position, segment.base_offset, segment.predecessor_hash,
                    segment.timestamp_max};
    uint64_t end = ms_segment_capacity_end(&segment), found, synced;
    ms_status walked = ms_segment_walk(&segment, &mark, end, (flags & 8) != 0, &err);
    sum += (uint64_t)walked;
    if (ms_segment_search(&segment, mark.position, end, &found, &synced) == MS_OK) sum += found;
    uint64_t position = segment.base_position, limit = mark.position;
    ms_view view;
    while (ms_segment_view(&segment, position, limit, &view, &err) == MS_OK) {
      if (!(view.flags & MS_BATCH_FILLER)) read_view(&view);
      position += view.length;
    }
    for (uint64_t offset = segment.base_offset; offset < segment.base_offset + 4; offset++)
      if (ms_segment_find_offset(&segment, offset, limit, &found, &err) == MS_OK) sum += found;
    if (ms_segment_find_timestamp(&segment, mark.timestamp_max, limit, &found, &err) == MS_OK)
      sum += found;
    ms_mark at;
    if (ms_segment_mark_at(&segment, limit, &at, &err) == MS_OK) sum += at.offset;
    gather(&segment, limit);
    compact(&segment, limit);
    ms_producer_entry known[PRODUCERS] = {{0, 0}};
    ms_producers producers = {known, PRODUCERS, segment.base_position};
    uint32_t producer;
    if (ms_producers_walk(&producers, &segment, limit, &producer, &err) == MS_OK) sum++;
  }
  free(bytes);
  return 0;
}
