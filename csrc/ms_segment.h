/* One mapped segment file: its header, activation record, sparse index and batches
 * (docs/format.md).
 *
 * Works on memory that the caller mapped and keeps mapped; allocates nothing, never blocks. A
 * segment may be read by any number of threads; activate, walk with `mend` and put are for whoever
 * holds the partition's append or walk word. Bytes below the tail never change, so what was
 * checked once stays checked.
 */
#ifndef MS_SEGMENT_H
#define MS_SEGMENT_H

#include "ms_batch.h"

/* A place between two batches of a log. */
typedef struct ms_mark {
  uint64_t position;     /* of the next batch */
  uint64_t offset;       /* of the next record */
  uint64_t hash;         /* whose low half the next batch's chain repeats; 0: nothing before it */
  int64_t timestamp_max; /* of all records of the partition before it; INT64_MIN: none */
} ms_mark;

/* What a header must say to be the file that the caller meant. */
typedef struct ms_identity {
  uint8_t store_id[16];
  uint64_t stream_id;
  uint32_t partition;
  uint64_t number;
} ms_identity;

typedef struct ms_segment {
  uint8_t *bytes;
  uint64_t size;
  uint64_t number;
  uint64_t salt;
  uint32_t data_position;
  uint32_t index_count;
  bool writable;
  bool activated; /* the fields below are valid */
  uint64_t base_offset, base_position, epoch, predecessor, predecessor_hash;
  int64_t activated_at, timestamp_max;
  /* checked[b]: batches that begin in block b of the data before this byte were found valid by
   * this process; index_count entries, all 0 at first. Relaxed atomics: threads may check a batch
   * twice, never too little. */
  _Atomic uint32_t *checked;
} ms_segment;

/* File positions for a segment of `size` bytes: the caller writes these into a new header. */
void ms_segment_geometry(uint64_t size, uint32_t *out_index_count, uint32_t *out_data_position);

/* Take a mapped file as a segment, and load its activation record if it has a valid one. `checked`
 * must have room for ms_segment_geometry(size)'s index_count. MS_CORRUPT, MS_VERSION: the header.
 */
MS_MUST_USE ms_status ms_segment_open(ms_segment *segment, void *bytes, uint64_t size,
                                      bool writable, const ms_identity *identity,
                                      _Atomic uint32_t *checked, ms_error *err);

/* Read the activation record again. MS_END: there is no valid one. */
MS_MUST_USE ms_status ms_segment_load_activation(ms_segment *segment);

/* Write the activation record. Holder of the append word, segment writable and not activated. */
void ms_segment_activate(ms_segment *segment, const ms_mark *end, uint64_t predecessor,
                         uint64_t epoch, int64_t now_us);

static inline uint64_t ms_segment_file_position(const ms_segment *segment, uint64_t position) {
  return position - segment->base_position + segment->data_position;
}
/* The position behind the last byte of the file. */
static inline uint64_t ms_segment_capacity_end(const ms_segment *segment) {
  return segment->base_position + (segment->size - segment->data_position);
}

/* The checked batch at `position`; it ends at or before `limit`. Checks it once a process. MS_END:
 * the position is at the limit. MS_CORRUPT otherwise when there is no valid batch. */
MS_MUST_USE ms_status ms_segment_view(ms_segment *segment, uint64_t position, uint64_t limit,
                                      ms_view *out_view, ms_error *err);

/* The batch that holds `offset`, or the first one behind it: its position, and itself. MS_END: none
 * below the limit. */
MS_MUST_USE ms_status ms_segment_seek(ms_segment *segment, uint64_t offset, uint64_t limit,
                                      uint64_t *out_position, ms_view *out_view, ms_error *err);
/* Its position alone. */
MS_MUST_USE ms_status ms_segment_find_offset(ms_segment *segment, uint64_t offset, uint64_t limit,
                                             uint64_t *out_position, ms_error *err);

/* Position of the first batch with a record at or after `timestamp`. MS_END: none below the limit.
 */
MS_MUST_USE ms_status ms_segment_find_timestamp(ms_segment *segment, int64_t timestamp,
                                                uint64_t limit, uint64_t *out_position,
                                                ms_error *err);

/* The mark at `position`, which is the end of a batch or the segment's base. MS_CORRUPT: it is
 * neither. */
MS_MUST_USE ms_status ms_segment_mark_at(ms_segment *segment, uint64_t position, ms_mark *out_mark,
                                         ms_error *err);

/* Walk valid batches that continue the log from *mark, moving it, until `limit` (MS_OK), until a
 * zero length or no room (MS_END), or until a batch that does not continue the log (MS_CORRUPT,
 * err says why). With `mend` the index is written anew on the way. Long: call without the GIL. */
MS_MUST_USE ms_status ms_segment_walk(ms_segment *segment, ms_mark *mark, uint64_t limit, bool mend,
                                      ms_error *err);

/* Index of the first record of a checked view at or after an offset, or a timestamp; count when
 * there is none. */
uint32_t ms_view_find_offset(const ms_view *view, uint64_t offset);
uint32_t ms_view_find_timestamp(const ms_view *view, int64_t timestamp);

/* The first valid batch in [from, limit), whatever its chain. *out_synced: the position up to which
 * the log was synced when it was written. MS_END: none. Long: call without the GIL. */
MS_MUST_USE ms_status ms_segment_search(ms_segment *segment, uint64_t from, uint64_t limit,
                                        uint64_t *out_position, uint64_t *out_synced);

/* Index the batch that begins at `begin` and ends at *end. Holder of the append or walk word. */
static inline bool ms_segment_index_due(const ms_segment *segment, uint64_t begin, uint64_t end) {
  uint64_t base = segment->base_position;
  return (begin - base) / MS_INDEX_BLOCK_BYTES != (end - base) / MS_INDEX_BLOCK_BYTES;
}
void ms_segment_index_put(ms_segment *segment, uint64_t begin, const ms_mark *end);

/* A run of small batches from `position`, for gathering: stops at a batch of `large` bytes or
 * more, at the limit, at `records` records, and before a column outgrows int32. *skip records of
 * the first batch are left out. *position becomes the place behind the run, or the batch that
 * `records` cut, of which *skip were taken. */
MS_MUST_USE ms_status ms_segment_measure_run(ms_segment *segment, uint64_t *position,
                                             uint32_t *skip, uint64_t limit, uint64_t records,
                                             uint32_t large, ms_gather *out_gather, ms_error *err);
/* Gather what ms_segment_measure_run measured, from where it began, into a buffer laid out for it.
 */
void ms_segment_gather_run(ms_segment *segment, uint64_t position, uint32_t skip,
                           const ms_gather *gather, ms_view *gathered);

#endif
