/* One mapped segment: identity, index, and walks over its batches.
 *
 * Invariants: (1) nothing is read behind `size`. (2) An index entry is believed only where the
 * batch it names is valid and has the offset it says; otherwise the walk begins at the segment's
 * base. (3) checked[b] only rises, and only over batches that lie one behind the other from the
 * first that begins in block b. Crash: ms_segment_walk(mend) mends all that needs it.
 */
#include "ms_segment.h"

#include <inttypes.h>
#include <string.h>

#include "ms_xxh3.h"

enum { ACTIVATION_HASHED = sizeof(ms_activation) - 8 };
enum { AHEAD = 16 };                 /* batches, of a walk over headers */
enum { GATHER_BYTES_MAX = 4 << 20 }; /* of one gathered batch: it is a copy in memory */

void ms_segment_geometry(uint64_t size, uint32_t *out_index_count, uint32_t *out_data_position) {
  uint64_t count = (size + MS_INDEX_BLOCK_BYTES - 1) / MS_INDEX_BLOCK_BYTES;
  uint64_t data = MS_SEGMENT_INDEX_AT + count * sizeof(ms_index_entry);
  *out_index_count = (uint32_t)count;
  *out_data_position = (uint32_t)((data + MS_PAGE_BYTES - 1) & ~(uint64_t)(MS_PAGE_BYTES - 1));
}

ms_status ms_segment_open(ms_segment *segment, void *bytes, uint64_t size, bool writable,
                          const ms_identity *identity, _Atomic uint32_t *checked, ms_error *err) {
  ms_segment_header header;
  uint32_t index_count, data_position;
  if (size < MS_SEGMENT_INDEX_AT + MS_PAGE_BYTES || size > UINT32_MAX)
    return ms_fail(err, MS_CORRUPT, 0, MS_SEGMENT_INDEX_AT, size,
                   "a segment file of %" PRIu64 " bytes", size);
  memcpy(&header, bytes, sizeof header);
  if (header.magic != MS_MAGIC_SEGMENT)
    return ms_fail(err, MS_CORRUPT, 0, MS_MAGIC_SEGMENT, header.magic,
                   "not a segment file: wrong magic");
  if (header.version != MS_FORMAT_VERSION)
    return ms_fail(err, MS_VERSION, 8, MS_FORMAT_VERSION, header.version,
                   "segment format %u, this version reads format %u", header.version,
                   MS_FORMAT_VERSION);
  uint64_t sum = ms_xxh3_64(&header, offsetof(ms_segment_header, checksum), 0);
  if (sum != header.checksum)
    return ms_fail(err, MS_CORRUPT, 0, header.checksum, sum,
                   "the checksum of the segment header is wrong");
  ms_segment_geometry(header.size, &index_count, &data_position);
  if (header.size > size || header.index_count != index_count ||
      header.data_position != data_position || data_position >= header.size)
    return ms_fail(err, MS_CORRUPT, 56, header.size, size,
                   "the file has %" PRIu64 " bytes, its header says %" PRIu64, size, header.size);
  if (memcmp(header.store_id, identity->store_id, sizeof header.store_id) != 0 ||
      header.stream_id != identity->stream_id || header.partition != identity->partition ||
      header.number != identity->number)
    return ms_fail(err, MS_CORRUPT, 16, identity->number, header.number,
                   "a segment of another store, stream or partition, or under another number");
  *segment = (ms_segment){
      .bytes = bytes,
      .size = header.size,
      .number = header.number,
      .salt = header.salt,
      .data_position = data_position,
      .index_count = index_count,
      .writable = writable,
      .checked = checked,
  };
  (void)!ms_segment_load_activation(segment);
  return MS_OK;
}

static ms_activation *activation_of(const ms_segment *segment) {
  return (ms_activation *)(void *)(segment->bytes + MS_SEGMENT_ACTIVATION_AT);
}

ms_status ms_segment_load_activation(ms_segment *segment) {
  ms_activation *record = activation_of(segment);
  /* Acquire: pairs with the release store that ms_segment_activate ends with. */
  uint64_t checksum = atomic_load_explicit(&record->checksum, memory_order_acquire);
  if (checksum == 0) return MS_END;
  ms_activation copy;
  memcpy((uint8_t *)&copy + 8, (const uint8_t *)record + 8, ACTIVATION_HASHED);
  if (ms_xxh3_64((const uint8_t *)&copy + 8, ACTIVATION_HASHED, segment->salt) != checksum ||
      copy.number != segment->number || copy.base_position % 8 != 0 ||
      copy.predecessor >= copy.number || copy.base_position > MS_POSITION_MAX ||
      copy.base_offset > MS_OFFSET_MAX)
    return MS_END;
  segment->base_offset = copy.base_offset;
  segment->base_position = copy.base_position;
  segment->epoch = copy.epoch;
  segment->predecessor = copy.predecessor;
  segment->predecessor_hash = copy.predecessor_hash;
  segment->activated_at = copy.activated;
  segment->timestamp_max = copy.timestamp_max;
  segment->activated = true;
  return MS_OK;
}

void ms_segment_activate(ms_segment *segment, const ms_mark *end, uint64_t predecessor,
                         uint64_t epoch, int64_t now_us) {
  ms_activation *record = activation_of(segment);
  ms_activation copy = {
      .number = segment->number,
      .base_offset = end->offset,
      .base_position = end->position,
      .epoch = epoch,
      .predecessor = predecessor,
      .predecessor_hash = end->hash,
      .activated = now_us,
      .timestamp_max = end->timestamp_max,
  };
  /* A record that a dead owner half wrote must not be valid while we write over it. */
  atomic_store_explicit(&record->checksum, 0, memory_order_relaxed);
  atomic_thread_fence(memory_order_release);
  memcpy((uint8_t *)record + 8, (const uint8_t *)&copy + 8, ACTIVATION_HASHED);
  MS_YIELD("segment_activate");
  /* Release: pairs with the acquire load in ms_segment_load_activation. */
  atomic_store_explicit(&record->checksum,
                        ms_xxh3_64((const uint8_t *)&copy + 8, ACTIVATION_HASHED, segment->salt),
                        memory_order_release);
  (void)!ms_segment_load_activation(segment);
}

/* --- index --- */

static ms_index_entry *index_of(const ms_segment *segment) {
  return (ms_index_entry *)(void *)(segment->bytes + MS_SEGMENT_INDEX_AT);
}

void ms_segment_index_put(ms_segment *segment, uint64_t begin, const ms_mark *end) {
  ms_index_entry *index = index_of(segment);
  uint64_t first = (begin - segment->base_position) / MS_INDEX_BLOCK_BYTES + 1;
  uint64_t last = (end->position - segment->base_position) / MS_INDEX_BLOCK_BYTES;
  /* Every block whose first byte lies in (begin, end] has its first batch at `end`. */
  for (uint64_t k = first; k <= last && k < segment->index_count; k++) {
    index[k] = (ms_index_entry){.offset = (uint32_t)(end->offset - segment->base_offset),
                                .position = (uint32_t)(end->position - segment->base_position) + 1,
                                .timestamp_max = end->timestamp_max};
  }
}

/* Entry k as a mark without hash, if it can be one below the limit; entry 0 is the segment's base.
 */
static bool index_mark(const ms_segment *segment, uint64_t k, uint64_t limit, ms_mark *out) {
  if (k == 0) {
    *out = (ms_mark){segment->base_position, segment->base_offset, segment->predecessor_hash,
                     segment->timestamp_max};
    return true;
  }
  ms_index_entry entry;
  memcpy(&entry, index_of(segment) + k, sizeof entry);
  if (entry.position == 0) return false;
  uint64_t position = segment->base_position + entry.position - 1;
  if (position % 8 != 0 || position > limit || entry.position - 1 < k * MS_INDEX_BLOCK_BYTES)
    return false;
  *out = (ms_mark){position, segment->base_offset + entry.offset, 0, entry.timestamp_max};
  return true;
}

typedef bool (*mark_is_before)(const ms_mark *mark, const void *key);

static bool offset_is_before(const ms_mark *mark, const void *key) {
  return mark->offset <= *(const uint64_t *)key;
}
static bool timestamp_is_before(const ms_mark *mark, const void *key) {
  return mark->timestamp_max < *(const int64_t *)key;
}
static bool position_is_before(const ms_mark *mark, const void *key) {
  return mark->position < *(const uint64_t *)key;
}

/* The last index mark that is `before` the key and is confirmed by the batch at its position.
 * Without one, the segment's base. An empty or wild entry counts as not before: at worst the walk
 * is longer. */
static ms_mark index_search(ms_segment *segment, uint64_t limit, mark_is_before before,
                            const void *key) {
  uint64_t low = 0, high = (limit - segment->base_position) / MS_INDEX_BLOCK_BYTES;
  ms_mark mark;
  if (high >= segment->index_count) high = segment->index_count - 1;
  while (low < high) {
    uint64_t middle = low + (high - low + 1) / 2;
    if (index_mark(segment, middle, limit, &mark) && before(&mark, key))
      low = middle;
    else
      high = middle - 1;
  }
  ms_mark found = {0};
  if (low > 0 && index_mark(segment, low, limit, &found)) {
    ms_view view;
    if (found.position < limit &&
        ms_segment_view(segment, found.position, limit, &view, NULL) == MS_OK &&
        view.base_offset == found.offset)
      return found;
  }
  (void)index_mark(segment, 0, limit, &found);
  return found;
}

/* --- checked views --- */

static ms_status view_unchecked(const ms_segment *segment, uint64_t position, uint64_t limit,
                                ms_view *out_view, ms_error *err) {
  uint64_t at = ms_segment_file_position(segment, position);
  ms_status status = ms_batch_view(segment->bytes + at, limit - position, at, out_view, err);
  if (status < 0 && err != NULL) err->position = position;
  return status;
}

/* Is the batch at byte `at` of the data the first that begins in its block? */
static bool first_in_block(const ms_segment *segment, uint64_t at) {
  ms_index_entry entry;
  if (at == 0) return true;
  memcpy(&entry, index_of(segment) + at / MS_INDEX_BLOCK_BYTES, sizeof entry);
  return entry.position == at + 1;
}

static void note_checked(ms_segment *segment, uint64_t at, uint64_t length) {
  _Atomic uint32_t *checked = &segment->checked[at / MS_INDEX_BLOCK_BYTES];
  uint32_t until = atomic_load_explicit(checked, memory_order_relaxed);
  if (until == at || (until == 0 && first_in_block(segment, at)))
    atomic_compare_exchange_strong_explicit(checked, &until, (uint32_t)(at + length),
                                            memory_order_relaxed, memory_order_relaxed);
}

/* How many bytes from `position` on are checked batches that begin in its block, below `limit`. */
static uint64_t checked_from(const ms_segment *segment, uint64_t position, uint64_t limit) {
  uint64_t at = position - segment->base_position, end = limit - segment->base_position;
  uint64_t until =
      atomic_load_explicit(&segment->checked[at / MS_INDEX_BLOCK_BYTES], memory_order_relaxed);
  if (until > end) until = end;
  return until > at ? until - at : 0;
}

ms_status ms_segment_view(ms_segment *segment, uint64_t position, uint64_t limit, ms_view *out_view,
                          ms_error *err) {
  uint64_t end = ms_segment_capacity_end(segment);
  if (limit > end) limit = end;
  if (position >= limit) return MS_END;
  if (position < segment->base_position || position % 8 != 0)
    return ms_fail(err, MS_CORRUPT, position, segment->base_position, position,
                   "position %" PRIu64 " is not in segment %" PRIu64, position, segment->number);
  ms_status status = view_unchecked(segment, position, limit, out_view, err);
  if (status == MS_END)
    return ms_fail(err, MS_CORRUPT, position, limit, 0,
                   "no batch at position %" PRIu64 ", the log goes on to %" PRIu64, position,
                   limit);
  if (status != MS_OK) return status;
  uint64_t at = position - segment->base_position;
  if (MS_LIKELY(at < atomic_load_explicit(&segment->checked[at / MS_INDEX_BLOCK_BYTES],
                                          memory_order_relaxed)))
    return MS_OK;
  status = ms_batch_check(out_view, segment->salt + position, err);
  if (status != MS_OK) {
    if (err != NULL) err->position = position;
    return status;
  }
  note_checked(segment, at, out_view->length);
  return MS_OK;
}

/* --- search --- */

static uint64_t view_next_offset(const ms_view *view) {
  if (view->count == 0) return view->base_offset;
  return view->offsets != NULL ? (uint64_t)view->offsets[view->count - 1] + 1
                               : view->base_offset + view->count;
}

/* From a batch to the last one of its block that is checked and begins at or before the offset. The
 * batches between lie wholly before it, and two fields of a header are enough to pass one; what
 * cannot be a header is left to ms_segment_view(). */
static uint64_t skip_checked(const ms_segment *segment, uint64_t position, uint64_t limit,
                             uint64_t offset) {
  uint64_t at = position - segment->base_position, end = limit - segment->base_position;
  uint64_t until =
      atomic_load_explicit(&segment->checked[at / MS_INDEX_BLOCK_BYTES], memory_order_relaxed);
  const uint8_t *data = segment->bytes + segment->data_position;
  if (until > end) until = end;
  while (at < until) {
    uint32_t length;
    uint64_t base_offset;
    memcpy(&length, data + at + offsetof(ms_batch_header, length), sizeof length);
    uint64_t next = at + length;
    /* Each step waits for the one before it, but batches of one log are much of a length. */
    __builtin_prefetch(data + at + AHEAD * (uint64_t)length);
    if (length < sizeof(ms_batch_header) || next + sizeof(ms_batch_header) > until) break;
    memcpy(&base_offset, data + next + offsetof(ms_batch_header, base_offset), sizeof base_offset);
    if (base_offset > offset) break;
    at = next;
  }
  return segment->base_position + at;
}

ms_status ms_segment_seek(ms_segment *segment, uint64_t offset, uint64_t limit,
                          uint64_t *out_position, ms_view *out_view, ms_error *err) {
  uint64_t position = index_search(segment, limit, offset_is_before, &offset).position;
  if (position < limit) position = skip_checked(segment, position, limit, offset);
  for (;;) {
    MS_TRY(ms_segment_view(segment, position, limit, out_view, err));
    if (out_view->count > 0 && offset < view_next_offset(out_view)) break;
    position += out_view->length;
  }
  *out_position = position;
  return MS_OK;
}

ms_status ms_segment_find_offset(ms_segment *segment, uint64_t offset, uint64_t limit,
                                 uint64_t *out_position, ms_error *err) {
  ms_view view;
  return ms_segment_seek(segment, offset, limit, out_position, &view, err);
}

ms_status ms_segment_find_timestamp(ms_segment *segment, int64_t timestamp, uint64_t limit,
                                    uint64_t *out_position, ms_error *err) {
  uint64_t position = index_search(segment, limit, timestamp_is_before, &timestamp).position;
  ms_view view;
  for (;;) {
    MS_TRY(ms_segment_view(segment, position, limit, &view, err));
    if (view.count > 0 && view.timestamp_max >= timestamp) break;
    position += view.length;
  }
  *out_position = position;
  return MS_OK;
}

static uint64_t stored_hash(const ms_view *view) {
  uint64_t hash;
  if (view->flags & MS_BATCH_FILLER)
    memcpy(&hash, view->bytes + offsetof(ms_batch_header, sequence), sizeof hash);
  else
    memcpy(&hash, view->bytes, sizeof hash);
  return hash;
}

static void mark_after(ms_mark *mark, const ms_view *view) {
  mark->position += view->length;
  mark->offset = view_next_offset(view);
  mark->hash = stored_hash(view);
  if (view->count > 0 && view->timestamp_max > mark->timestamp_max)
    mark->timestamp_max = view->timestamp_max;
}

ms_status ms_segment_mark_at(ms_segment *segment, uint64_t position, ms_mark *out_mark,
                             ms_error *err) {
  ms_mark mark = index_search(segment, position, position_is_before, &position);
  ms_view view;
  while (mark.position < position) {
    MS_TRY(ms_segment_view(segment, mark.position, position, &view, err));
    mark_after(&mark, &view);
  }
  if (mark.position != position)
    return ms_fail(err, MS_CORRUPT, position, mark.position, position,
                   "position %" PRIu64 " is not in segment %" PRIu64, position, segment->number);
  *out_mark = mark;
  return MS_OK;
}

ms_status ms_segment_walk(ms_segment *segment, ms_mark *mark, uint64_t limit, bool mend,
                          ms_error *err) {
  uint64_t end = ms_segment_capacity_end(segment);
  if (limit > end) limit = end;
  while (mark->position < limit) {
    ms_view view;
    ms_batch_header header;
    MS_TRY(view_unchecked(segment, mark->position, limit, &view, err));
    memcpy(&header, view.bytes, sizeof header);
    if (header.chain != (uint32_t)mark->hash)
      return ms_fail(err, MS_CORRUPT, mark->position, (uint32_t)mark->hash, header.chain,
                     "the batch at position %" PRIu64 " does not follow the one before it",
                     mark->position);
    if (header.base_offset < mark->offset)
      return ms_fail(err, MS_CORRUPT, mark->position, mark->offset, header.base_offset,
                     "the batch at position %" PRIu64 " repeats offsets", mark->position);
    ms_status status = ms_batch_check(&view, segment->salt + mark->position, err);
    if (status != MS_OK) {
      if (err != NULL) err->position = mark->position;
      return status;
    }
    uint64_t begin = mark->position;
    mark_after(mark, &view);
    if (mend && ms_segment_index_due(segment, begin, mark->position))
      ms_segment_index_put(segment, begin, mark);
    note_checked(segment, begin - segment->base_position, view.length);
  }
  return limit == end && mark->position == end ? MS_END : MS_OK;
}

ms_status ms_segment_search(ms_segment *segment, uint64_t from, uint64_t limit,
                            uint64_t *out_position, uint64_t *out_synced) {
  uint64_t end = ms_segment_capacity_end(segment);
  if (limit > end) limit = end;
  for (uint64_t position = (from + 7) & ~(uint64_t)7;
       position + sizeof(ms_batch_header) <= end && position < limit; position += 8) {
    ms_view view;
    if (view_unchecked(segment, position, end, &view, NULL) != MS_OK ||
        ms_batch_check(&view, segment->salt + position, NULL) != MS_OK)
      continue;
    ms_batch_header header;
    memcpy(&header, view.bytes, sizeof header);
    uint64_t distance = 8 * (uint64_t)header.synced_distance;
    *out_position = position;
    *out_synced = distance < position ? position - distance : 0;
    return MS_OK;
  }
  return MS_END;
}

/* --- records within a batch, runs of small batches --- */

uint32_t ms_view_find_offset(const ms_view *view, uint64_t offset) {
  if (view->offsets == NULL) {
    if (offset <= view->base_offset) return 0;
    uint64_t index = offset - view->base_offset;
    return index < view->count ? (uint32_t)index : view->count;
  }
  uint32_t low = 0, high = view->count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if ((uint64_t)view->offsets[middle] < offset)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

uint32_t ms_view_find_timestamp(const ms_view *view, int64_t timestamp) {
  if (view->timestamps == NULL) return view->timestamp_min >= timestamp ? 0 : view->count;
  uint32_t i = 0; /* timestamps need not rise */
  while (i < view->count && view->timestamps[i] < timestamp) i++;
  return i;
}

ms_status ms_segment_measure_run(ms_segment *segment, uint64_t *position, uint32_t *skip,
                                 uint64_t limit, uint64_t records, uint32_t large,
                                 ms_gather *out_gather, ms_error *err) {
  ms_gather gather = {0};
  uint64_t at = *position;
  uint32_t taken = *skip;
  while (at < limit && gather.count < records &&
         gather.value_bytes + gather.key_bytes + gather.header_bytes < GATHER_BYTES_MAX) {
    uint64_t singles = 0;
    if (taken == 0)
      singles =
          ms_gather_measure_singles(&gather, segment->bytes + ms_segment_file_position(segment, at),
                                    checked_from(segment, at, limit), records - gather.count,
                                    GATHER_BYTES_MAX - gather.header_bytes);
    if (singles > 0) {
      at += singles;
      continue;
    }
    ms_view view;
    ms_status status = ms_segment_view(segment, at, limit, &view, err);
    if (status == MS_END) break;
    /* What was gathered is handed out; the next read meets the damage at its first batch. */
    if (status != MS_OK && gather.count > 0) break;
    MS_TRY(status);
    if (view.length >= large) break;
    uint64_t count = view.count - taken, room = records - gather.count;
    uint32_t take = (uint32_t)(count < room ? count : room);
    if (take > 0 && !ms_gather_measure(&gather, &view, taken, take)) break;
    if (count > room) {
      taken += take;
      break;
    }
    taken = 0;
    at += view.length;
  }
  *out_gather = gather;
  *position = at;
  *skip = taken;
  return MS_OK;
}

void ms_segment_gather_run(ms_segment *segment, uint64_t position, uint32_t skip,
                           const ms_gather *gather, ms_view *gathered) {
  uint64_t limit = ms_segment_capacity_end(segment);
  while (gathered->count < gather->count) {
    uint64_t singles = 0;
    if (skip == 0)
      singles = ms_gather_add_singles(gathered, gather,
                                      segment->bytes + ms_segment_file_position(segment, position),
                                      checked_from(segment, position, limit));
    if (singles > 0) {
      position += singles;
      continue;
    }
    ms_view view;
    if (view_unchecked(segment, position, limit, &view, NULL) != MS_OK)
      break; /* measured just now */
    uint32_t count = view.count - skip, room = gather->count - gathered->count;
    if (view.count > 0) ms_gather_add(gathered, gather, &view, skip, count < room ? count : room);
    skip = 0;
    position += view.length;
  }
}
