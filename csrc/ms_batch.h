/* One batch: encode it from columns in memory, view its buffers, check its bytes.
 *
 * Pure functions on bytes; no state, any thread. The layout is in docs/format.md. `file_position`
 * is where the batch lies in its segment file; it decides the alignment of buffers and nothing
 * else.
 */
#ifndef MS_BATCH_H
#define MS_BATCH_H

#include "ms_format.h"
#include "ms_status.h"

/* One value, key or header part. size < 0 is null. The bytes belong to the caller and must stay
 * until the call that reads them has returned. */
typedef struct ms_slice {
  const uint8_t *data;
  int64_t size;
} ms_slice;

/* Columns that become one batch. Record i of the batch is row rows[i] of the columns, or row i
 * when rows is NULL. All pointers but values may be NULL. */
typedef struct ms_records {
  uint32_t count; /* at least 1 */
  const uint32_t *rows;
  const ms_slice *values;
  const ms_slice *keys;
  const int64_t *timestamps; /* NULL: every record has `timestamp` */
  int64_t timestamp;
  const uint32_t *header_starts; /* headers of row r: [header_starts[r], header_starts[r + 1]) */
  const ms_slice *header_names;
  const ms_slice *header_values;
  uint64_t first_sequence; /* of the first record; only where a producer appends */
  int64_t called_us;       /* the wall clock, coarsely, when this was asked for */
} ms_records;

/* What measuring found out; everything that encoding needs besides the records. */
typedef struct ms_shape {
  uint64_t key_bytes, value_bytes, name_bytes, header_bytes;
  uint32_t count, header_count;
  uint16_t flags; /* without ALIGN64, which the length decides */
  int64_t timestamp_min, timestamp_max;
} ms_shape;

/* What the log says about a batch that is to be encoded. */
typedef struct ms_place {
  uint64_t position; /* in the log */
  uint64_t file_position;
  uint64_t seed; /* salt + position */
  uint64_t base_offset;
  uint64_t durable; /* position */
  uint32_t chain;
  uint32_t producer;
  uint64_t sequence;
} ms_place;

/* The buffers of a batch, in place. Pointers into the batch's own bytes (or into a gathering
 * buffer), NULL for buffers that are not there; they live as long as those bytes stay mapped. */
typedef struct ms_view {
  const uint8_t *bytes; /* the batch; NULL: gathered from several */
  uint32_t length;
  uint32_t count;
  uint32_t flags;
  uint32_t header_count;
  uint64_t base_offset;
  int64_t timestamp_min, timestamp_max;
  const int64_t *timestamps;
  const int64_t *offsets;
  const uint8_t *key_validity;
  const int32_t *key_offsets;
  const uint8_t *keys;
  const uint8_t *value_validity;
  const int32_t *value_offsets;
  const uint8_t *values;
  const int32_t *header_offsets;
  const int32_t *name_offsets;
  const uint8_t *names;
  const int32_t *header_value_offsets;
  const uint8_t *header_values;
} ms_view;

/* Measure records and hold them to the limits. MS_LIMIT names the row and the limit. */
MS_MUST_USE ms_status ms_batch_measure(const ms_records *records, ms_shape *out_shape,
                                       ms_error *err);

/* Length of the batch when it begins at file_position; a multiple of 8. */
uint64_t ms_batch_length(const ms_shape *shape, uint64_t file_position);

/* Upper bound of ms_batch_length over all file positions. */
uint64_t ms_batch_length_max(const ms_shape *shape);

/* Write the batch to `at`, which has room for ms_batch_length() bytes behind it. Returns its hash.
 */
uint64_t ms_batch_encode(const ms_records *records, const ms_shape *shape, const ms_place *place,
                         uint8_t *at);

/* Is the header at bytes sane and does the batch fit `available` bytes? O(1): buffers are located
 * by their first and last offsets, their content and hash are not read. Reads every length
 * once. *out_view means nothing unless MS_OK. MS_END: the length is 0, nothing is here.
 * MS_VERSION: an unknown format or flag. */
MS_MUST_USE ms_status ms_batch_view(const uint8_t *bytes, uint64_t available,
                                    uint64_t file_position, ms_view *out_view, ms_error *err);

/* Is the hash right and do all offsets rise within their buffers? MS_CORRUPT otherwise. After it
 * has returned MS_OK every read through the view stays within the batch. */
MS_MUST_USE ms_status ms_batch_check(const ms_view *view, uint64_t seed, ms_error *err);

/* How much a run of batches takes when they are gathered into one. */
typedef struct ms_gather {
  uint64_t key_bytes, value_bytes, name_bytes, header_bytes;
  uint32_t count, header_count;
  uint32_t flags;     /* columns that any of them has; FIXED when all have it with one length */
  int32_t value_size; /* of FIXED */
  uint64_t base_offset, next_offset;
  int64_t timestamp_min, timestamp_max;
} ms_gather;

/* Add records [first, first + count) of a checked view to what is measured. False: it would not fit
 * (more than 2 GiB in a column), and nothing was added. */
bool ms_gather_measure(ms_gather *gather, const ms_view *view, uint32_t first, uint32_t count);

/* Bytes of the buffer that a gathered batch needs. */
uint64_t ms_gather_bytes(const ms_gather *gather);

/* Lay out an empty gathered batch in `buffer` (64-byte aligned, ms_gather_bytes() long) as a view;
 * then copy the runs that were measured into it, in order. */
void ms_gather_begin(const ms_gather *gather, uint8_t *buffer, ms_view *out_view);
void ms_gather_add(ms_view *gathered, const ms_gather *gather, const ms_view *view, uint32_t first,
                   uint32_t count);

/* The same for batches of a single record, one behind the other, that were found valid: as many as
 * are such, at most `records`, until `most` bytes of keys and values are measured, within
 * `available` bytes. Returns how many bytes they take. What is added must have been measured. */
uint64_t ms_gather_measure_singles(ms_gather *gather, const uint8_t *bytes, uint64_t available,
                                   uint64_t records, uint64_t most);
uint64_t ms_gather_add_singles(ms_view *gathered, const ms_gather *gather, const uint8_t *bytes,
                               uint64_t available);

/* The same into a segment: the length of the batch that what was measured becomes at a file
 * position; an empty one laid out at `at`, in zeroed memory; and, once all was added to it, its
 * header. Returns the hash. Timestamps of the header are those of the records that were added. */
uint64_t ms_gather_length(const ms_gather *gather, uint64_t file_position);
void ms_gather_place(const ms_gather *gather, uint64_t file_position, uint8_t *at,
                     ms_view *out_view);
uint64_t ms_gather_finish(const ms_gather *gather, const ms_view *gathered, const ms_place *place,
                          uint8_t *at);

static inline bool ms_bit(const uint8_t *bitmap, uint64_t i) {
  return bitmap[i >> 3] >> (i & 7) & 1;
}

#endif
