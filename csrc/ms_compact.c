/* What of a sealed segment stays, and the segment that has only that.
 *
 * Invariants: (1) a record goes only if the table has a later offset of its key, or if it is a
 * tombstone, `drop` was said, and no older record of its key is left. (2) The copy begins and ends
 * at the positions of its original; each record has the offset that it had. (3) The last batch of
 * each producer keeps its header, without records where need be. Does not know which segments
 * there are, nor when to compact. Crash: the copy is not published before it is whole and synced.
 */
#include "ms_compact.h"

#include <inttypes.h>
#include <string.h>

#include "ms_xxh3.h"

enum { GROUP = 32 };             /* keys whose entries are fetched together */
enum { MERGED_BYTES = 1 << 20 }; /* and records of batches that are put together */
enum { MERGED_RECORDS = 1 << 16 };
enum { LONG_RUN = 128 }; /* its own batch costs less than the offset column that it would need */
enum { COMPACTION_HASHED = sizeof(ms_compaction) - 8 };

/* --- the table --- */

typedef struct pending_key {
  uint64_t hash[2];
  uint64_t slot;
  uint64_t offset;
  uint64_t bit;
  bool tombstone;
} pending_key;

static void hash_key(const ms_key_table *table, const ms_view *view, uint32_t i, pending_key *out) {
  const uint8_t *key = view->keys + view->key_offsets[i];
  size_t size = (size_t)(view->key_offsets[i + 1] - view->key_offsets[i]);
  out->hash[0] = ms_xxh3_64(key, size, table->seed[0]);
  out->hash[1] = ms_xxh3_64(key, size, table->seed[1]);
  out->slot = (out->hash[0] >> 32) * table->capacity >> 32;
  __builtin_prefetch(&table->entries[out->slot]);
}

/* The entry of the key, or the free one where it would be. There is always a free one. */
static ms_key_entry *entry_of(const ms_key_table *table, const pending_key *key) {
  uint64_t at = key->slot;
  for (;;) {
    ms_key_entry *entry = &table->entries[at];
    if (entry->last == 0 || (entry->hash[0] == key->hash[0] && entry->hash[1] == key->hash[1]))
      return entry;
    if (++at == table->capacity) at = 0;
  }
}

static bool has_key(const ms_view *view, uint32_t i) {
  return view->key_offsets != NULL && (view->key_validity == NULL || ms_bit(view->key_validity, i));
}

static bool is_tombstone(const ms_view *view, uint32_t i) {
  return view->value_validity != NULL && !ms_bit(view->value_validity, i);
}

static uint64_t offset_of(const ms_view *view, uint32_t i) {
  return view->offsets != NULL ? (uint64_t)view->offsets[i] : view->base_offset + i;
}

static bool enter(ms_key_table *table, const pending_key *keys, uint32_t count,
                  uint64_t *out_full) {
  for (uint32_t i = 0; i < count; i++) {
    ms_key_entry *entry = entry_of(table, &keys[i]);
    if (entry->last == 0) {
      if (table->count >= table->capacity / 4 * 3) {
        *out_full = keys[i].offset;
        return false;
      }
      table->count++;
      entry->hash[0] = keys[i].hash[0];
      entry->hash[1] = keys[i].hash[1];
    }
    entry->last = (keys[i].offset + 1) << 1;
  }
  return true;
}

/* What is done with a group of keys; false: there was no room for that at *out_full. */
typedef bool key_work(ms_key_table *table, const pending_key *keys, uint32_t count,
                      uint64_t *out_full);

/* Do `work` with the keys of records at or behind offset `from`, a group at a time. */
static inline ms_status each_key(ms_key_table *table, ms_segment *segment, uint64_t *position,
                                 uint64_t limit, uint64_t from, uint64_t bytes, key_work *work,
                                 uint64_t *out_full, ms_error *err) {
  pending_key keys[GROUP];
  uint32_t waiting = 0;
  const uint64_t begin = *position;
  while (*position < limit && *position - begin < bytes) {
    ms_view view;
    MS_TRY(ms_segment_view(segment, *position, limit, &view, err));
    uint32_t first = view.count > 0 ? ms_view_find_offset(&view, from) : 0;
    for (uint32_t i = first; i < view.count; i++) {
      if (!has_key(&view, i)) continue;
      hash_key(table, &view, i, &keys[waiting]);
      keys[waiting].offset = offset_of(&view, i);
      if (++waiting < GROUP) continue;
      if (!work(table, keys, waiting, out_full)) return MS_FULL;
      waiting = 0;
    }
    *position += view.length;
  }
  return work(table, keys, waiting, out_full) ? MS_OK : MS_FULL;
}

ms_status ms_compact_scan(ms_key_table *table, ms_segment *segment, uint64_t *position,
                          uint64_t limit, uint64_t from, uint64_t bytes, uint64_t *out_full,
                          ms_error *err) {
  return each_key(table, segment, position, limit, from, bytes, enter, out_full, err);
}

static void hold(const ms_key_table *table, const pending_key *keys, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) {
    ms_key_entry *entry = entry_of(table, &keys[i]);
    if (entry->last != 0) entry->last |= 1;
  }
}

static bool hold_all(ms_key_table *table, const pending_key *keys, uint32_t count,
                     uint64_t *out_full) {
  (void)out_full; /* it enters nothing, so there is always room */
  hold(table, keys, count);
  return true;
}

ms_status ms_compact_hold(ms_key_table *table, ms_segment *segment, uint64_t *position,
                          uint64_t limit, uint64_t bytes, ms_error *err) {
  return each_key(table, segment, position, limit, 0, bytes, hold_all, NULL, err);
}

/* --- which records stay --- */

ms_status ms_compact_count(ms_segment *segment, uint64_t end, uint64_t *out_records,
                           ms_error *err) {
  uint64_t records = 0;
  for (uint64_t position = segment->base_position; position < end;) {
    ms_view view;
    MS_TRY(ms_segment_view(segment, position, end, &view, err));
    records += view.count;
    position += view.length;
  }
  *out_records = records;
  return MS_OK;
}

static void note_producer(ms_survivors *survivors, uint32_t producer, uint64_t position) {
  uint32_t at = producer * UINT32_C(2654435761) % MS_COMPACT_PRODUCERS;
  for (uint32_t i = 0; i < MS_COMPACT_PRODUCERS; i++) {
    if (survivors->producer[at] == 0) survivors->producer[at] = producer;
    if (survivors->producer[at] == producer) {
      survivors->producer_last[at] = position;
      return;
    }
    at = (at + 1) % MS_COMPACT_PRODUCERS;
  }
  survivors->producers_full = true;
}

static bool is_last_of_producer(const ms_survivors *survivors, uint32_t producer,
                                uint64_t position) {
  uint32_t at = producer * UINT32_C(2654435761) % MS_COMPACT_PRODUCERS;
  for (uint32_t i = 0; i < MS_COMPACT_PRODUCERS && survivors->producer[at] != 0; i++) {
    if (survivors->producer[at] == producer) return survivors->producer_last[at] == position;
    at = (at + 1) % MS_COMPACT_PRODUCERS;
  }
  return true; /* not in the list: keep it */
}

static void judge(const ms_key_table *table, const pending_key *keys, uint32_t count, bool drop,
                  ms_survivors *survivors) {
  for (uint32_t i = 0; i < count; i++) {
    const ms_key_entry *entry = entry_of(table, &keys[i]);
    uint64_t own = (keys[i].offset + 1) << 1;
    bool stays = entry->last <= (own | 1); /* also 0: the table did not have room for it */
    if (stays && keys[i].tombstone) {
      if (drop && entry->last == own) {
        stays = false;
        survivors->tombstones_end = keys[i].offset + 1;
        survivors->tombstones_removed++;
      } else {
        survivors->tombstones++;
      }
    }
    if (stays)
      survivors->records++;
    else
      survivors->bits[keys[i].bit / 64] &= ~(UINT64_C(1) << keys[i].bit % 64);
  }
}

ms_status ms_compact_select(const ms_key_table *table, ms_segment *segment, bool drop,
                            ms_survivors *survivors, ms_error *err) {
  pending_key keys[GROUP];
  uint32_t waiting = 0;
  uint64_t bit = 0;
  survivors->records = survivors->dead = survivors->tombstones = 0;
  survivors->tombstones_end = survivors->tombstones_removed = 0;
  survivors->damaged = 0;
  survivors->producers_full = false;
  memset(survivors->producer, 0, sizeof survivors->producer);
  memset(survivors->bits, 0xff, (survivors->room + 63) / 64 * 8);
  for (uint64_t position = segment->base_position; position < survivors->end;) {
    ms_view view;
    ms_batch_header header;
    MS_TRY(ms_segment_view(segment, position, survivors->end, &view, err));
    memcpy(&header, view.bytes, sizeof header);
    if ((view.flags & MS_BATCH_FILLER) && !(view.flags & MS_BATCH_OFFSETS)) survivors->damaged++;
    if (header.producer != 0) note_producer(survivors, header.producer, position);
    if (view.count > survivors->room - bit)
      return ms_fail(err, MS_INVALID, position, survivors->room, bit + view.count,
                     "segment %" PRIu64 " has more records than were counted", segment->number);
    for (uint32_t i = 0; i < view.count; i++) {
      if (!has_key(&view, i)) {
        survivors->records++;
        continue;
      }
      hash_key(table, &view, i, &keys[waiting]);
      keys[waiting].offset = offset_of(&view, i);
      keys[waiting].bit = bit + i;
      keys[waiting].tombstone = is_tombstone(&view, i);
      if (++waiting < GROUP) continue;
      judge(table, keys, waiting, drop, survivors);
      waiting = 0;
    }
    bit += view.count;
    position += view.length;
  }
  judge(table, keys, waiting, drop, survivors);
  survivors->dead = bit - survivors->records;
  return MS_OK;
}

static bool survives(const ms_survivors *survivors, uint64_t bit) {
  return survivors->bits[bit / 64] >> bit % 64 & 1;
}

ms_status ms_compact_leave(ms_key_table *table, ms_segment *segment, const ms_survivors *survivors,
                           ms_error *err) {
  uint64_t bit = 0;
  for (uint64_t position = segment->base_position; position < survivors->end;) {
    ms_view view;
    MS_TRY(ms_segment_view(segment, position, survivors->end, &view, err));
    for (uint32_t i = 0; i < view.count && bit + i < survivors->room; i++) {
      if (survives(survivors, bit + i) || !has_key(&view, i)) continue;
      pending_key key;
      hash_key(table, &view, i, &key);
      hold(table, &key, 1);
    }
    bit += view.count;
    position += view.length;
  }
  return MS_OK;
}

/* --- copying --- */

/* A place in the original: record `index` of the batch at `position`, whose first record has the
 * bit `bit`. */
typedef struct place_of_record {
  uint64_t position;
  uint64_t bit;
  uint32_t index;
} place_of_record;

typedef enum source_event { RUN, EMPTY, NOTHING } source_event;

typedef struct source {
  ms_segment *segment;
  const ms_survivors *survivors;
  place_of_record at;
  ms_view view; /* of the batch that the last run, or empty batch, is of */
  ms_batch_header header;
  uint32_t first, count; /* the run */
} source;

/* The next record from `i` on that stays (or does not, as wanted). */
static uint32_t seek_bit(const source *from, uint32_t i, bool wanted) {
  const uint64_t flip = wanted ? 0 : UINT64_MAX;
  while (i < from->view.count) {
    uint64_t bit = from->at.bit + i;
    uint64_t word = (from->survivors->bits[bit / 64] ^ flip) >> bit % 64;
    if (word != 0) {
      uint32_t found = i + (uint32_t)__builtin_ctzll(word);
      return found < from->view.count ? found : from->view.count;
    }
    i += 64 - (uint32_t)(bit % 64);
  }
  return from->view.count;
}

/* The next run of records that stay, or the next batch that stays without any. */
static ms_status next_of_source(source *from, source_event *out_event, ms_error *err) {
  while (from->at.position < from->survivors->end) {
    MS_TRY(
        ms_segment_view(from->segment, from->at.position, from->survivors->end, &from->view, err));
    if (from->view.count > from->survivors->room - from->at.bit)
      return ms_fail(err, MS_INVALID, from->at.position, from->survivors->room, from->view.count,
                     "segment %" PRIu64 " has more records than were counted",
                     from->segment->number);
    memcpy(&from->header, from->view.bytes, sizeof from->header);
    uint32_t first = seek_bit(from, from->at.index, true);
    if (first < from->view.count) {
      from->first = first;
      from->count = seek_bit(from, first, false) - first;
      from->at.index = first + from->count;
      *out_event = RUN;
      return MS_OK;
    }
    bool whole = from->at.index == 0; /* nothing of it stays */
    uint64_t position = from->at.position;
    from->at = (place_of_record){position + from->view.length, from->at.bit + from->view.count, 0};
    if (whole && from->header.producer != 0 &&
        is_last_of_producer(from->survivors, from->header.producer, position)) {
      *out_event = EMPTY;
      return MS_OK;
    }
  }
  *out_event = NOTHING;
  return MS_OK;
}

/* May the run be put into the batch that `gather` is to become, which began with `header`? */
static bool joins(const ms_gather *gather, const ms_batch_header *header, const source *from) {
  const ms_batch_header *other = &from->header;
  bool same = header->base_offset == other->base_offset;
  bool plain = header->producer == 0 && header->sequence == 0 && other->producer == 0 &&
               other->sequence == 0;
  if (!same && !plain) return false;
  uint64_t last = offset_of(&from->view, from->first + from->count - 1);
  if (gather->count + (uint64_t)from->count > MERGED_RECORDS ||
      last - gather->base_offset > UINT32_MAX)
    return false;
  uint64_t bytes = gather->key_bytes + gather->value_bytes + gather->header_bytes;
  if (bytes + (uint64_t)from->view.length * from->count / from->view.count > MERGED_BYTES)
    return false;
  if (offset_of(&from->view, from->first) == gather->next_offset) return true;
  bool long_so_far = !(gather->flags & MS_BATCH_OFFSETS) && gather->count >= LONG_RUN;
  return !long_so_far && from->count < LONG_RUN;
}

/* Where the copy is written. `segment` NULL: it is only measured. */
typedef struct sink {
  ms_segment *segment;
  ms_mark mark;
  uint64_t end;
} sink;

static ms_place place_in(const sink *to, uint64_t file_position, const ms_batch_header *header,
                         uint64_t base_offset) {
  return (ms_place){.position = to->mark.position,
                    .file_position = file_position,
                    .seed = to->segment != NULL ? to->segment->salt + to->mark.position : 0,
                    .base_offset = base_offset,
                    .durable = to->mark.position, /* all of the original was */
                    .chain = (uint32_t)to->mark.hash,
                    .producer = header->producer,
                    .sequence = header->sequence};
}

static void pass_batch(sink *to, uint64_t length, uint64_t hash, uint64_t next_offset,
                       int64_t timestamp_max) {
  uint64_t begin = to->mark.position;
  to->mark.position += length;
  to->mark.hash = hash;
  to->mark.offset = next_offset;
  if (timestamp_max > to->mark.timestamp_max) to->mark.timestamp_max = timestamp_max;
  if (to->segment != NULL && ms_segment_index_due(to->segment, begin, to->mark.position))
    ms_segment_index_put(to->segment, begin, &to->mark);
}

/* Write one batch of `runs` runs from `start` on, measured as `gather`. */
static ms_status put_gathered(sink *to, source *from, place_of_record start, uint32_t runs,
                              const ms_gather *gather, const ms_batch_header *header,
                              ms_error *err) {
  uint64_t file_position = ms_segment_file_position(from->segment, to->mark.position);
  uint64_t length = ms_gather_length(gather, file_position);
  if (length > to->end - to->mark.position) return MS_FULL;
  if (to->segment == NULL) {
    pass_batch(to, length, 0, gather->next_offset, gather->timestamp_max);
    return MS_OK;
  }
  uint8_t *at = to->segment->bytes + file_position;
  ms_view gathered;
  source again = *from;
  again.at = start;
  ms_gather_place(gather, file_position, at, &gathered);
  while (runs > 0) {
    source_event event;
    MS_TRY(next_of_source(&again, &event, err));
    if (event != RUN || gathered.count + (uint64_t)again.count > gather->count)
      return ms_fail(err, MS_CORRUPT, start.position, runs, gathered.count,
                     "segment %" PRIu64 " changed while it was compacted", from->segment->number);
    ms_gather_add(&gathered, gather, &again.view, again.first, again.count);
    runs--;
  }
  ms_place place = place_in(to, file_position, header, gather->base_offset);
  uint64_t hash = ms_gather_finish(gather, &gathered, &place, at);
  ms_batch_header written;
  memcpy(&written, at, sizeof written);
  pass_batch(to, length, hash, gather->next_offset, written.timestamp_max);
  return MS_OK;
}

/* A batch that keeps the header of its original and none of its records. */
static ms_status put_empty(sink *to, const source *from) {
  const ms_gather gather = {.flags = MS_BATCH_OFFSETS,
                            .base_offset = from->header.base_offset,
                            .next_offset = from->header.base_offset,
                            .timestamp_min = from->header.timestamp_max, /* without a column */
                            .timestamp_max = from->header.timestamp_max};
  uint64_t file_position = ms_segment_file_position(from->segment, to->mark.position);
  uint64_t length = ms_gather_length(&gather, file_position), hash = 0;
  if (length > to->end - to->mark.position) return MS_FULL;
  if (to->segment != NULL) {
    uint8_t *at = to->segment->bytes + file_position;
    ms_view gathered;
    ms_gather_place(&gather, file_position, at, &gathered);
    ms_place place = place_in(to, file_position, &from->header, gather.base_offset);
    hash = ms_gather_finish(&gather, &gathered, &place, at);
  }
  pass_batch(to, length, hash, gather.base_offset, INT64_MIN);
  return MS_OK;
}

static ms_status copy_survivors(source *from, sink *to, ms_error *err) {
  for (;;) {
    const place_of_record start = from->at;
    ms_gather gather = {0};
    ms_batch_header header = {0};
    uint32_t runs = 0;
    source_event event;
    place_of_record before = start;
    for (;;) {
      MS_TRY(next_of_source(from, &event, err));
      if (event != RUN || (runs > 0 && !joins(&gather, &header, from))) break;
      if (!ms_gather_measure(&gather, &from->view, from->first, from->count)) {
        if (runs == 0) return MS_FULL; /* larger than a batch may be: none is */
        break;
      }
      if (runs++ == 0) header = from->header;
      before = from->at;
    }
    if (runs == 0 && event == NOTHING) return MS_OK;
    if (runs == 0) {
      MS_TRY(put_empty(to, from));
      continue;
    }
    MS_TRY(put_gathered(to, from, start, runs, &gather, &header, err));
    from->at = before;
  }
}

static ms_status copy_from(ms_segment *segment, const ms_survivors *survivors, ms_segment *target,
                           sink *to, ms_error *err) {
  source from = {
      .segment = segment, .survivors = survivors, .at = {.position = segment->base_position}};
  *to = (sink){.segment = target,
               .mark = {segment->base_position, segment->base_offset, segment->predecessor_hash,
                        segment->timestamp_max},
               .end = survivors->end};
  MS_TRY(copy_survivors(&from, to, err));
  return survivors->end - to->mark.position < sizeof(ms_batch_header) ? MS_FULL : MS_OK;
}

ms_status ms_compact_measure(ms_segment *segment, const ms_survivors *survivors,
                             uint64_t *out_bytes, ms_error *err) {
  sink to;
  MS_TRY(copy_from(segment, survivors, NULL, &to, err));
  *out_bytes = to.mark.position - segment->base_position;
  return MS_OK;
}

ms_status ms_compact_copy(ms_segment *segment, const ms_survivors *survivors, ms_segment *target,
                          ms_error *err) {
  sink to;
  ms_mark end;
  const ms_mark begin = {segment->base_position, segment->base_offset, segment->predecessor_hash,
                         segment->timestamp_max};
  if (!target->writable || target->activated || target->size != segment->size)
    return ms_fail(err, MS_INVALID, 0, segment->size, target->size,
                   "not a file to compact segment %" PRIu64 " into", segment->number);
  MS_TRY(ms_segment_mark_at(segment, survivors->end, &end, err));
  ms_segment_activate(target, &begin, segment->predecessor, segment->epoch, segment->activated_at);
  MS_TRY(copy_from(segment, survivors, target, &to, err));
  while (to.mark.position < to.end) {
    uint64_t length = to.end - to.mark.position;
    if (length > MS_COMPACT_FILLER_BYTES) length = MS_COMPACT_FILLER_BYTES;
    ms_batch_header filler = {.length = (uint32_t)length,
                              .format = MS_FORMAT_VERSION,
                              .flags = MS_BATCH_FILLER | MS_BATCH_OFFSETS,
                              .base_offset = end.offset,
                              .chain = (uint32_t)to.mark.hash,
                              .sequence = (uint32_t)end.hash};
    if (to.end - to.mark.position - length > 0 &&
        to.end - to.mark.position - length < sizeof filler)
      filler.length -= (uint32_t)sizeof filler;
    uint8_t *at = target->bytes + ms_segment_file_position(target, to.mark.position);
    memcpy(at, &filler, sizeof filler);
    uint64_t hash = ms_xxh3_64(at + 8, sizeof filler - 8, target->salt + to.mark.position);
    memcpy(at, &hash, sizeof hash);
    pass_batch(&to, filler.length, (uint32_t)end.hash, end.offset, INT64_MIN);
  }
  return MS_OK;
}

/* --- the compaction record --- */

static ms_compaction *record_of(const ms_segment *segment) {
  return (ms_compaction *)(void *)(segment->bytes + MS_SEGMENT_COMPACTION_AT);
}

bool ms_compaction_load(const ms_segment *segment, ms_compaction *out) {
  const ms_compaction *record = record_of(segment);
  /* Acquire: pairs with the release store in ms_compaction_store. */
  uint64_t checksum = atomic_load_explicit(&record->checksum, memory_order_acquire);
  if (checksum == 0) return false;
  memcpy((uint8_t *)out + 8, (const uint8_t *)record + 8, COMPACTION_HASHED);
  return ms_xxh3_64((const uint8_t *)out + 8, COMPACTION_HASHED, segment->salt) == checksum;
}

void ms_compaction_store(ms_segment *segment, const ms_compaction *record) {
  ms_compaction *to = record_of(segment);
  atomic_store_explicit(&to->checksum, 0, memory_order_relaxed);
  atomic_thread_fence(memory_order_release);
  memcpy((uint8_t *)to + 8, (const uint8_t *)record + 8, COMPACTION_HASHED);
  /* Release: pairs with the acquire load in ms_compaction_load. */
  atomic_store_explicit(&to->checksum,
                        ms_xxh3_64((const uint8_t *)record + 8, COMPACTION_HASHED, segment->salt),
                        memory_order_release);
}
