/* One batch as bytes (docs/format.md). Pure functions, any thread.
 *
 * Invariants: (1) encode writes exactly ms_batch_length() bytes, all of them, so that no stale
 * byte is hashed or kept. (2) view reads each length of the file once, into a local, and checks it
 * by subtraction before use. (3) after check, offsets rise from 0 to the size of their buffer.
 * Does not know where batches come from, nor what a tail is.
 */
#include "ms_batch.h"

#include <inttypes.h>
#include <string.h>

#include "ms_xxh3.h"

enum { ALIGN64_BODY_BYTES = 4096 };

static uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) & ~(alignment - 1);
}

static uint64_t row_of(const ms_records *records, uint32_t i) {
  return records->rows != NULL ? records->rows[i] : i;
}

/* --- a single record: what an append of one is, in a body without ALIGN64 --- */

enum {
  SINGLE_BYTES_MAX = ALIGN64_BODY_BYTES - 32
}; /* of key and value; the rest is offsets and gaps */

static inline bool is_single(const ms_shape *shape) {
  return shape->count == 1 && (shape->flags & ~(MS_BATCH_FIXED | MS_BATCH_KEYS)) == 0 &&
         shape->key_bytes + shape->value_bytes < SINGLE_BYTES_MAX;
}

static inline uint64_t single_column_length(uint64_t bytes) {
  return 2 * sizeof(int32_t) + align_up(bytes, 8);
}

/* As lay_out() has it, wherever it lies. */
static inline uint64_t single_length(const ms_shape *shape) {
  uint64_t keys = shape->flags & MS_BATCH_KEYS ? single_column_length(shape->key_bytes) : 0;
  return sizeof(ms_batch_header) + keys + single_column_length(shape->value_bytes);
}

static inline bool measure_single(const ms_records *records, ms_shape *out_shape) {
  if (records->count != 1 || records->rows != NULL || records->header_starts != NULL ||
      records->timestamps != NULL)
    return false;
  int64_t value = records->values->size, key = records->keys != NULL ? records->keys->size : -1;
  if (value < 0 || value > SINGLE_BYTES_MAX || key > SINGLE_BYTES_MAX) return false;
  *out_shape = (ms_shape){
      .key_bytes = key < 0 ? 0 : (uint64_t)key,
      .value_bytes = (uint64_t)value,
      .count = 1,
      .flags = (uint16_t)(MS_BATCH_FIXED | (key < 0 ? 0 : MS_BATCH_KEYS)),
      .timestamp_min = records->timestamp,
      .timestamp_max = records->timestamp,
  };
  return is_single(out_shape);
}

/* Offsets, bytes, and zeros up to the next multiple of 8; the place behind it. */
static inline uint8_t *encode_single_column(uint8_t *at, const ms_slice *slice) {
  const int32_t offsets[2] = {0, (int32_t)slice->size};
  const uint64_t nothing = 0;
  uint8_t *end = at + single_column_length((uint64_t)slice->size);
  memcpy(end - sizeof nothing, &nothing, sizeof nothing); /* first: the bytes may come over it */
  memcpy(at, offsets, sizeof offsets);
  if (slice->size > 0) memcpy(at + sizeof offsets, slice->data, (size_t)slice->size);
  return end;
}

/* --- measure --- */

static ms_status too_large(ms_error *err, const char *what, uint64_t row, uint64_t limit,
                           uint64_t found) {
  return ms_fail(err, MS_LIMIT, row, limit, found,
                 "%s of element %" PRIu64 ": %" PRIu64 " bytes, the limit is %" PRIu64, what, row,
                 found, limit);
}

static ms_status measure_headers(const ms_records *records, ms_shape *shape, ms_error *err) {
  uint64_t count = 0;
  for (uint32_t i = 0; i < records->count; i++) {
    uint64_t row = row_of(records, i);
    uint32_t begin = records->header_starts[row], end = records->header_starts[row + 1];
    if (end - begin > MS_HEADER_COUNT_MAX)
      return ms_fail(err, MS_LIMIT, row, MS_HEADER_COUNT_MAX, end - begin,
                     "element %" PRIu64 " has %" PRIu32 " headers, the limit is %u", row,
                     end - begin, MS_HEADER_COUNT_MAX);
    for (uint32_t h = begin; h < end; h++) {
      uint64_t name = (uint64_t)records->header_names[h].size,
               value = (uint64_t)records->header_values[h].size;
      if (name > MS_HEADER_NAME_BYTES_MAX)
        return too_large(err, "header name", row, MS_HEADER_NAME_BYTES_MAX, name);
      if (value > MS_HEADER_VALUE_BYTES_MAX)
        return too_large(err, "header value", row, MS_HEADER_VALUE_BYTES_MAX, value);
      shape->name_bytes += name;
      shape->header_bytes += value;
    }
    count += end - begin;
  }
  if (count > 0) shape->flags |= MS_BATCH_HEADERS;
  shape->header_count = (uint32_t)(count < UINT32_MAX ? count : UINT32_MAX);
  return MS_OK;
}

static void measure_timestamps(const ms_records *records, ms_shape *shape) {
  int64_t smallest = records->timestamp, largest = records->timestamp;
  if (records->timestamps != NULL) {
    smallest = INT64_MAX;
    largest = INT64_MIN;
    for (uint32_t i = 0; i < records->count; i++) {
      int64_t timestamp = records->timestamps[row_of(records, i)];
      if (timestamp < smallest) smallest = timestamp;
      if (timestamp > largest) largest = timestamp;
    }
    if (smallest != largest) shape->flags |= MS_BATCH_TIMESTAMPS;
  }
  shape->timestamp_min = smallest;
  shape->timestamp_max = largest;
}

ms_status ms_batch_measure(const ms_records *records, ms_shape *out_shape, ms_error *err) {
  if (measure_single(records, out_shape)) return MS_OK;
  ms_shape shape = {.count = records->count};
  bool value_nulls = false, fixed = true;
  const int64_t size_first = records->values[row_of(records, 0)].size;
  for (uint32_t i = 0; i < records->count; i++) {
    uint64_t row = row_of(records, i);
    int64_t size = records->values[row].size;
    fixed &= size == size_first;
    if (MS_UNLIKELY(size < 0)) {
      value_nulls = true;
      continue;
    }
    if (MS_UNLIKELY(size > MS_VALUE_BYTES_MAX))
      return too_large(err, "value", row, MS_VALUE_BYTES_MAX, (uint64_t)size);
    shape.value_bytes += (uint64_t)size;
  }
  if (value_nulls)
    shape.flags |= MS_BATCH_VALUE_NULLS;
  else if (fixed)
    shape.flags |= MS_BATCH_FIXED;
  if (records->keys != NULL) {
    uint32_t nulls = 0;
    for (uint32_t i = 0; i < records->count; i++) {
      uint64_t row = row_of(records, i);
      int64_t size = records->keys[row].size;
      if (size < 0) {
        nulls++;
        continue;
      }
      if (MS_UNLIKELY(size > MS_KEY_BYTES_MAX))
        return too_large(err, "key", row, MS_KEY_BYTES_MAX, (uint64_t)size);
      shape.key_bytes += (uint64_t)size;
    }
    if (nulls < records->count) {
      shape.flags |= MS_BATCH_KEYS;
      if (nulls > 0) shape.flags |= MS_BATCH_KEY_NULLS;
    }
  }
  measure_timestamps(records, &shape);
  if (records->header_starts != NULL) MS_TRY(measure_headers(records, &shape, err));
  /* Each sum is below 2^60: no overflow. The whole also bounds each int32 offset. */
  uint64_t length = ms_batch_length_max(&shape);
  if (length > MS_BATCH_BYTES_MAX)
    return ms_fail(err, MS_LIMIT, 0, MS_BATCH_BYTES_MAX, length,
                   "a batch of %" PRIu64 " bytes, the limit is %u: append it in parts", length,
                   MS_BATCH_BYTES_MAX);
  *out_shape = shape;
  return MS_OK;
}

/* --- layout: one walk over the buffers for measuring, writing and viewing --- */

typedef struct batch_layout {
  uint64_t timestamps, offsets, key_validity, key_offsets, keys, value_validity, value_offsets,
      values;
  uint64_t header_offsets, name_offsets, names, header_value_offsets, header_values;
  uint64_t end; /* all are distances from the batch's first byte */
} batch_layout;

typedef struct buffer_cursor {
  uint64_t at;    /* file position of the next free byte */
  uint64_t begin; /* file position of the batch */
  uint64_t alignment;
} buffer_cursor;

static inline uint64_t place_buffer(buffer_cursor *cursor, uint64_t bytes) {
  uint64_t at = align_up(cursor->at, cursor->alignment);
  cursor->at = at + bytes;
  return at - cursor->begin;
}

static inline batch_layout lay_out(const ms_shape *shape, uint64_t file_position,
                                   uint64_t alignment) {
  buffer_cursor cursor = {file_position + sizeof(ms_batch_header), file_position, alignment};
  uint64_t count = shape->count, bitmap = (count + 7) / 8, offsets = 4 * (count + 1);
  batch_layout layout = {0};
  if (shape->flags & MS_BATCH_TIMESTAMPS) layout.timestamps = place_buffer(&cursor, 8 * count);
  if (shape->flags & MS_BATCH_OFFSETS) layout.offsets = place_buffer(&cursor, 8 * count);
  if (shape->flags & MS_BATCH_KEY_NULLS) layout.key_validity = place_buffer(&cursor, bitmap);
  if (shape->flags & MS_BATCH_KEYS) {
    layout.key_offsets = place_buffer(&cursor, offsets);
    layout.keys = place_buffer(&cursor, shape->key_bytes);
  }
  if (shape->flags & MS_BATCH_VALUE_NULLS) layout.value_validity = place_buffer(&cursor, bitmap);
  layout.value_offsets = place_buffer(&cursor, offsets);
  layout.values = place_buffer(&cursor, shape->value_bytes);
  if (shape->flags & MS_BATCH_HEADERS) {
    uint64_t header_offsets = 4 * ((uint64_t)shape->header_count + 1);
    layout.header_offsets = place_buffer(&cursor, offsets);
    layout.name_offsets = place_buffer(&cursor, header_offsets);
    layout.names = place_buffer(&cursor, shape->name_bytes);
    layout.header_value_offsets = place_buffer(&cursor, header_offsets);
    layout.header_values = place_buffer(&cursor, shape->header_bytes);
  }
  layout.end = align_up(cursor.at, 8) - file_position;
  return layout;
}

static batch_layout lay_out_best(const ms_shape *shape, uint64_t file_position, bool *out_align64) {
  batch_layout layout = lay_out(shape, file_position, 8);
  *out_align64 = layout.end - sizeof(ms_batch_header) >= ALIGN64_BODY_BYTES;
  return *out_align64 ? lay_out(shape, file_position, 64) : layout;
}

uint64_t ms_batch_length(const ms_shape *shape, uint64_t file_position) {
  bool align64;
  if (is_single(shape)) return single_length(shape);
  return lay_out_best(shape, file_position, &align64).end;
}

uint64_t ms_batch_length_max(const ms_shape *shape) { return ms_batch_length(shape, 0) + 64; }

/* --- encode --- */

/* Zero the gap that alignment left before `to`: every byte of a batch is hashed. */
static inline uint8_t *pad_to(uint8_t *end, uint8_t *to) {
  while (end < to) *end++ = 0;
  return to;
}

static uint8_t *encode_validity(uint8_t *bitmap, const ms_records *records,
                                const ms_slice *slices) {
  memset(bitmap, 0, (records->count + 7) / 8);
  for (uint32_t i = 0; i < records->count; i++) {
    unsigned present = slices[row_of(records, i)].size >= 0;
    bitmap[i >> 3] = (uint8_t)(bitmap[i >> 3] | present << (i & 7));
  }
  return bitmap + (records->count + 7) / 8;
}

/* Slices to offsets and bytes. Slices that lie one behind the other (a NumPy array, an Arrow
 * column) are copied as one run. Returns the end of the bytes. */
static uint8_t *encode_slices(int32_t *offsets, uint8_t *bytes, const ms_slice *slices,
                              uint64_t count) {
  uint64_t used = 0, i = 0;
  offsets[0] = 0;
  while (i < count) {
    const uint8_t *run = slices[i].data;
    uint64_t begin = used;
    do {
      used += slices[i].size > 0 ? (uint64_t)slices[i].size : 0;
      offsets[++i] = (int32_t)used;
    } while (i < count && (slices[i].size <= 0 || slices[i].data == run + (used - begin)));
    if (used > begin) memcpy(bytes + begin, run, used - begin);
  }
  return bytes + used;
}

static uint8_t *encode_rows(int32_t *offsets, uint8_t *bytes, const ms_slice *slices,
                            const ms_records *records) {
  if (records->rows == NULL) return encode_slices(offsets, bytes, slices, records->count);
  uint8_t *end = bytes;
  offsets[0] = 0;
  for (uint32_t i = 0; i < records->count; i++) {
    const ms_slice *slice = &slices[records->rows[i]];
    if (slice->size > 0) {
      memcpy(end, slice->data, (size_t)slice->size);
      end += slice->size;
    }
    offsets[i + 1] = (int32_t)(end - bytes);
  }
  return end;
}

static uint8_t *encode_headers(const ms_records *records, const batch_layout *layout, uint8_t *at,
                               uint8_t *end) {
  int32_t *starts = (int32_t *)(void *)pad_to(end, at + layout->header_offsets);
  uint32_t total = 0;
  starts[0] = 0;
  for (uint32_t i = 0; i < records->count; i++) {
    uint64_t row = row_of(records, i);
    total += records->header_starts[row + 1] - records->header_starts[row];
    starts[i + 1] = (int32_t)total;
  }
  end = (uint8_t *)(starts + records->count + 1);
  const ms_slice *parts[2] = {records->header_names, records->header_values};
  uint64_t offsets_at[2] = {layout->name_offsets, layout->header_value_offsets};
  uint64_t bytes_at[2] = {layout->names, layout->header_values};
  for (int part = 0; part < 2; part++) {
    int32_t *offsets = (int32_t *)(void *)pad_to(end, at + offsets_at[part]);
    uint8_t *bytes = pad_to((uint8_t *)(offsets + total + 1), at + bytes_at[part]);
    uint32_t h = 0;
    offsets[0] = 0;
    end = bytes;
    for (uint32_t i = 0; i < records->count; i++) {
      uint64_t row = row_of(records, i);
      for (uint32_t from = records->header_starts[row]; from < records->header_starts[row + 1];
           from++) {
        const ms_slice *slice = &parts[part][from];
        if (slice->size > 0) memcpy(end, slice->data, (size_t)slice->size);
        end += slice->size > 0 ? slice->size : 0;
        offsets[++h] = (int32_t)(end - bytes);
      }
    }
  }
  return end;
}

static inline void put_header(uint8_t *at, const ms_place *place, const ms_shape *shape,
                              uint64_t length, bool align64, int64_t timestamp_min,
                              int64_t timestamp_max) {
  uint64_t distance = (place->position - place->durable) / 8;
  ms_batch_header header = {
      .length = (uint32_t)length,
      .format = MS_FORMAT_VERSION,
      .flags = (uint16_t)(shape->flags | (align64 ? MS_BATCH_ALIGN64 : 0)),
      .base_offset = place->base_offset,
      .count = shape->count,
      .chain = place->chain,
      .timestamp_min = timestamp_min,
      .timestamp_max = timestamp_max,
      .producer = place->producer,
      .synced_distance = distance < UINT32_MAX ? (uint32_t)distance : UINT32_MAX,
      .sequence = place->sequence,
  };
  memcpy(at, &header, sizeof header);
}

static uint64_t put_hash(uint8_t *at, uint64_t length, uint64_t seed) {
  uint64_t hash = ms_xxh3_64(at + 8, length - 8, seed);
  memcpy(at, &hash, sizeof hash);
  return hash;
}

static uint64_t encode_single(const ms_records *records, const ms_shape *shape,
                              const ms_place *place, uint8_t *at) {
  uint64_t row = row_of(records, 0), length = single_length(shape);
  uint8_t *end = at + sizeof(ms_batch_header);
  put_header(at, place, shape, length, false, shape->timestamp_min, shape->timestamp_max);
  if (shape->flags & MS_BATCH_KEYS) end = encode_single_column(end, &records->keys[row]);
  (void)encode_single_column(end, &records->values[row]);
  return put_hash(at, length, place->seed);
}

uint64_t ms_batch_encode(const ms_records *records, const ms_shape *shape, const ms_place *place,
                         uint8_t *at) {
  bool align64;
  if (is_single(shape)) return encode_single(records, shape, place, at);
  const batch_layout layout = lay_out_best(shape, place->file_position, &align64);
  const uint32_t count = records->count;
  put_header(at, place, shape, layout.end, align64, shape->timestamp_min, shape->timestamp_max);
  uint8_t *end = at + sizeof(ms_batch_header);
  if (shape->flags & MS_BATCH_TIMESTAMPS) {
    int64_t *timestamps = (int64_t *)(void *)pad_to(end, at + layout.timestamps);
    for (uint32_t i = 0; i < count; i++) timestamps[i] = records->timestamps[row_of(records, i)];
    end = (uint8_t *)(timestamps + count);
  }
  if (shape->flags & MS_BATCH_KEY_NULLS)
    end = encode_validity(pad_to(end, at + layout.key_validity), records, records->keys);
  if (shape->flags & MS_BATCH_KEYS) {
    int32_t *offsets = (int32_t *)(void *)pad_to(end, at + layout.key_offsets);
    end = pad_to((uint8_t *)(offsets + count + 1), at + layout.keys);
    end = encode_rows(offsets, end, records->keys, records);
  }
  if (shape->flags & MS_BATCH_VALUE_NULLS)
    end = encode_validity(pad_to(end, at + layout.value_validity), records, records->values);
  int32_t *offsets = (int32_t *)(void *)pad_to(end, at + layout.value_offsets);
  end = pad_to((uint8_t *)(offsets + count + 1), at + layout.values);
  end = encode_rows(offsets, end, records->values, records);
  if (shape->flags & MS_BATCH_HEADERS) end = encode_headers(records, &layout, at, end);
  pad_to(end, at + layout.end);
  return put_hash(at, layout.end, place->seed);
}

/* --- view and check --- */

/* Take the next buffer of `bytes` at the cursor; false when it does not fit before `end`. */
MS_INLINE static inline bool take_buffer(buffer_cursor *cursor, uint64_t end, uint64_t bytes,
                                         uint64_t *out_at) {
  uint64_t at = align_up(cursor->at, cursor->alignment);
  if (at > end || bytes > end - at) return false;
  *out_at = at - cursor->begin;
  cursor->at = at + bytes;
  return true;
}

/* Take an offsets buffer and the bytes that its last offset measures. */
MS_INLINE static inline bool take_column(buffer_cursor *cursor, uint64_t end, const uint8_t *batch,
                                         uint64_t count, const int32_t **out_offsets,
                                         const uint8_t **out_bytes) {
  uint64_t at;
  if (!take_buffer(cursor, end, 4 * (count + 1), &at)) return false;
  const int32_t *offsets = (const int32_t *)(const void *)(batch + at);
  int32_t size =
      ((const volatile int32_t *)offsets)[count]; /* read once: others may write the file */
  if (size < 0 || !take_buffer(cursor, end, (uint64_t)size, &at)) return false;
  *out_offsets = offsets;
  *out_bytes = batch + at;
  return true;
}

MS_INLINE static inline bool take_all(ms_view *view, uint64_t file_position) {
  buffer_cursor cursor = {file_position + sizeof(ms_batch_header), file_position,
                          view->flags & MS_BATCH_ALIGN64 ? 64u : 8u};
  const uint64_t end = file_position + view->length, count = view->count, bitmap = (count + 7) / 8;
  const uint8_t *batch = view->bytes;
  uint64_t at;
  if (view->flags & MS_BATCH_TIMESTAMPS) {
    if (!take_buffer(&cursor, end, 8 * count, &at)) return false;
    view->timestamps = (const int64_t *)(const void *)(batch + at);
  }
  if (view->flags & MS_BATCH_OFFSETS) {
    if (!take_buffer(&cursor, end, 8 * count, &at)) return false;
    view->offsets = (const int64_t *)(const void *)(batch + at);
  }
  if (view->flags & MS_BATCH_KEY_NULLS) {
    if (!take_buffer(&cursor, end, bitmap, &at)) return false;
    view->key_validity = batch + at;
  }
  if (view->flags & MS_BATCH_KEYS) {
    if (!take_column(&cursor, end, batch, count, &view->key_offsets, &view->keys)) return false;
  }
  if (view->flags & MS_BATCH_VALUE_NULLS) {
    if (!take_buffer(&cursor, end, bitmap, &at)) return false;
    view->value_validity = batch + at;
  }
  if (!take_column(&cursor, end, batch, count, &view->value_offsets, &view->values)) return false;
  if (view->flags & MS_BATCH_HEADERS) {
    if (!take_buffer(&cursor, end, 4 * (count + 1), &at)) return false;
    view->header_offsets = (const int32_t *)(const void *)(batch + at);
    int32_t headers = ((const volatile int32_t *)view->header_offsets)[count];
    if (headers < 0) return false;
    view->header_count = (uint32_t)headers;
    if (!take_column(&cursor, end, batch, (uint32_t)headers, &view->name_offsets, &view->names))
      return false;
    if (!take_column(&cursor, end, batch, (uint32_t)headers, &view->header_value_offsets,
                     &view->header_values))
      return false;
  }
  return align_up(cursor.at, 8) == end;
}

ms_status ms_batch_view(const uint8_t *bytes, uint64_t available, uint64_t file_position,
                        ms_view *out_view, ms_error *err) {
  ms_batch_header header;
  if (available < sizeof header) return MS_END;
  memcpy(&header, bytes, sizeof header); /* the copy is what is checked and used */
  if (header.length == 0) return MS_END;
  if (header.format != MS_FORMAT_VERSION || (header.flags & ~MS_BATCH_FLAGS_KNOWN) != 0) {
    return ms_fail(
        err, header.format > MS_FORMAT_VERSION && header.format < 16 ? MS_VERSION : MS_CORRUPT,
        file_position, MS_FORMAT_VERSION, header.format,
        "batch format %u with flags 0x%x, this version reads format %u with flags 0x%x",
        header.format, header.flags, MS_FORMAT_VERSION, (unsigned)MS_BATCH_FLAGS_KNOWN);
  }
  if (header.length < sizeof header || header.length % 8 != 0 || header.length > available ||
      header.length > MS_BATCH_BYTES_MAX)
    return ms_fail(err, MS_CORRUPT, file_position, available, header.length,
                   "batch length %u does not fit the %" PRIu64 " bytes that are there",
                   header.length, available);
  bool filler = (header.flags & MS_BATCH_FILLER) != 0;
  bool compacted = (header.flags & MS_BATCH_OFFSETS) != 0; /* may have lost all its records */
  if (filler ? header.count != 0
             : (header.count == 0 && !compacted) || header.count > header.length / 4)
    return ms_fail(err, MS_CORRUPT, file_position, header.length / 4, header.count,
                   "batch of %u bytes says that it has %u records", header.length, header.count);
  /* In place, and field by field: this runs once a record in a log of single records, and what a
   * compiler makes of a struct of zeros (rep stos) takes longer than all the rest. */
  ms_view *view = out_view;
  view->bytes = bytes;
  view->length = header.length;
  view->count = header.count;
  view->flags = header.flags;
  view->header_count = 0;
  view->base_offset = header.base_offset;
  view->timestamp_min = header.timestamp_min;
  view->timestamp_max = header.timestamp_max;
  view->timestamps = view->offsets = NULL;
  view->key_validity = view->keys = NULL;
  view->key_offsets = NULL;
  view->value_validity = view->values = NULL;
  view->value_offsets = NULL;
  view->header_offsets = view->name_offsets = view->header_value_offsets = NULL;
  view->names = view->header_values = NULL;
  if (!filler && !take_all(view, file_position))
    return ms_fail(err, MS_CORRUPT, file_position, header.length, header.count,
                   "the buffers of the batch do not fit its length of %u", header.length);
  return MS_OK;
}

/* Offsets begin at 0, never fall, end at size. One pass without a branch, so that it vectorises. */
static bool offsets_rise(const int32_t *offsets, uint64_t count, int64_t size) {
  if (offsets == NULL) return true;
  int32_t falls = offsets[0];
  for (uint64_t i = 0; i < count; i++) falls |= offsets[i + 1] < offsets[i];
  return falls == 0 && offsets[count] == size;
}

static bool lengths_within(const int32_t *offsets, uint64_t count, int32_t limit) {
  int32_t over = 0;
  for (uint64_t i = 0; i < count; i++) over |= offsets[i + 1] - offsets[i] > limit;
  return over == 0;
}

static bool lengths_equal(const int32_t *offsets, uint64_t count) {
  if (count == 0) return true;
  int32_t size = offsets[1], other = 0;
  for (uint64_t i = 0; i < count; i++) other |= offsets[i + 1] - offsets[i] != size;
  return other == 0;
}

static bool record_offsets_rise(const ms_view *view) {
  int64_t base = (int64_t)view->base_offset, previous = base - 1;
  for (uint32_t i = 0; i < view->count; i++) {
    int64_t offset = view->offsets[i];
    if (offset <= previous || offset - base > (int64_t)UINT32_MAX) return false;
    previous = offset;
  }
  return true;
}

ms_status ms_batch_check(const ms_view *view, uint64_t seed, ms_error *err) {
  bool filler = (view->flags & MS_BATCH_FILLER) != 0;
  uint64_t stored, hash;
  memcpy(&stored, view->bytes, sizeof stored);
  hash = ms_xxh3_64(view->bytes + 8, (filler ? sizeof(ms_batch_header) : view->length) - 8, seed);
  if (hash != stored)
    return ms_fail(err, MS_CORRUPT, 0, stored, hash,
                   "batch of %u bytes: its hash is %016" PRIx64 ", its bytes have %016" PRIx64,
                   view->length, stored, hash);
  if (filler) return MS_OK;
  const uint64_t count = view->count;
  bool sound =
      view->timestamp_min <= view->timestamp_max && view->base_offset < MS_OFFSET_MAX &&
      (view->timestamps != NULL || view->timestamp_min == view->timestamp_max) &&
      offsets_rise(view->value_offsets, count, view->value_offsets[count]) &&
      lengths_within(view->value_offsets, count, (int32_t)MS_VALUE_BYTES_MAX) &&
      offsets_rise(view->key_offsets, count, view->key_offsets ? view->key_offsets[count] : 0) &&
      (view->key_offsets == NULL ||
       lengths_within(view->key_offsets, count, (int32_t)MS_KEY_BYTES_MAX)) &&
      (view->key_validity == NULL || view->key_offsets != NULL) &&
      (!(view->flags & MS_BATCH_FIXED) ||
       (view->value_validity == NULL && lengths_equal(view->value_offsets, count))) &&
      (view->offsets == NULL || record_offsets_rise(view));
  if (sound && view->header_offsets != NULL) {
    uint64_t headers = view->header_count;
    sound =
        offsets_rise(view->header_offsets, count, (int64_t)headers) &&
        lengths_within(view->header_offsets, count, (int32_t)MS_HEADER_COUNT_MAX) &&
        offsets_rise(view->name_offsets, headers, view->name_offsets[headers]) &&
        lengths_within(view->name_offsets, headers, (int32_t)MS_HEADER_NAME_BYTES_MAX) &&
        offsets_rise(view->header_value_offsets, headers, view->header_value_offsets[headers]) &&
        lengths_within(view->header_value_offsets, headers, (int32_t)MS_HEADER_VALUE_BYTES_MAX);
  }
  if (!sound)
    return ms_fail(err, MS_CORRUPT, 0, 0, 0,
                   "batch of %u bytes: the hash is right but its offsets are not rising",
                   view->length);
  return MS_OK;
}

/* --- gather --- */

static uint64_t column_bytes(const int32_t *offsets, uint32_t first, uint32_t count) {
  return offsets == NULL ? 0 : (uint64_t)(offsets[first + count] - offsets[first]);
}

/* Records that may be added: what ms_gather_measure() and its like know of a run of them. */
typedef struct gather_run {
  uint64_t offset_first, offset_end;
  uint64_t key_bytes, value_bytes, name_bytes, header_bytes;
  int64_t timestamp_min, timestamp_max;
  uint32_t count, header_count, flags;
  int32_t value_size; /* of the first */
} gather_run;

MS_INLINE static inline bool gather_account(ms_gather *gather, const gather_run *run) {
  uint64_t keys = gather->key_bytes + run->key_bytes;
  uint64_t values = gather->value_bytes + run->value_bytes;
  uint64_t names = gather->name_bytes + run->name_bytes;
  uint64_t header_values = gather->header_bytes + run->header_bytes;
  if (keys > INT32_MAX || values > INT32_MAX || names > INT32_MAX || header_values > INT32_MAX ||
      gather->count > INT32_MAX - run->count ||
      gather->header_count > INT32_MAX - run->header_count)
    return false;
  bool is_first = gather->count == 0;
  uint32_t flags = run->flags & (MS_BATCH_KEYS | MS_BATCH_KEY_NULLS | MS_BATCH_VALUE_NULLS |
                                 MS_BATCH_HEADERS | MS_BATCH_OFFSETS | MS_BATCH_TIMESTAMPS);
  bool fixed = (run->flags & MS_BATCH_FIXED) && (is_first || gather->value_size == run->value_size);
  if (is_first) {
    gather->flags = MS_BATCH_FIXED;
    gather->base_offset = run->offset_first;
    gather->timestamp_min = INT64_MAX;
    gather->timestamp_max = INT64_MIN;
    gather->value_size = run->value_size;
  } else {
    if (run->offset_first != gather->next_offset) flags |= MS_BATCH_OFFSETS;
    /* A batch without keys among batches with keys: its keys are null. */
    if ((flags ^ gather->flags) & MS_BATCH_KEYS) flags |= MS_BATCH_KEYS | MS_BATCH_KEY_NULLS;
  }
  if (!fixed) gather->flags &= ~(uint32_t)MS_BATCH_FIXED;
  if (run->timestamp_min < gather->timestamp_min) gather->timestamp_min = run->timestamp_min;
  if (run->timestamp_max > gather->timestamp_max) gather->timestamp_max = run->timestamp_max;
  if (gather->timestamp_min != gather->timestamp_max) flags |= MS_BATCH_TIMESTAMPS;
  gather->flags |= flags;
  gather->key_bytes = keys;
  gather->value_bytes = values;
  gather->name_bytes = names;
  gather->header_bytes = header_values;
  gather->count += run->count;
  gather->header_count += run->header_count;
  gather->next_offset = run->offset_end;
  return true;
}

bool ms_gather_measure(ms_gather *gather, const ms_view *view, uint32_t first, uint32_t count) {
  uint32_t headers = 0, header_first = 0;
  if (view->header_offsets != NULL) {
    header_first = (uint32_t)view->header_offsets[first];
    headers = (uint32_t)view->header_offsets[first + count] - header_first;
  }
  gather_run run = {
      .offset_first = view->base_offset + first,
      .offset_end = view->base_offset + first + count,
      .key_bytes = column_bytes(view->key_offsets, first, count),
      .value_bytes = column_bytes(view->value_offsets, first, count),
      .name_bytes = column_bytes(view->name_offsets, header_first, headers),
      .header_bytes = column_bytes(view->header_value_offsets, header_first, headers),
      .timestamp_min = view->timestamp_min,
      .timestamp_max = view->timestamp_max,
      .count = count,
      .header_count = headers,
      .flags = view->flags,
      .value_size = view->value_offsets[first + 1] - view->value_offsets[first],
  };
  if (view->offsets != NULL) {
    run.offset_first = (uint64_t)view->offsets[first];
    run.offset_end = (uint64_t)view->offsets[first + count - 1] + 1;
  }
  return gather_account(gather, &run);
}

/* A batch of a single record, as encode_single() makes it, in place. */
typedef struct single {
  uint64_t length, offset;
  int64_t timestamp;
  const uint8_t *key, *value; /* key NULL: there is none */
  int32_t key_size, value_size;
  uint32_t flags;
} single;

/* A column of one at `at`; the place behind it, NULL where it does not fit before `end`. */
MS_INLINE static inline const uint8_t *take_single(const uint8_t *at, const uint8_t *end,
                                                   const uint8_t **out_bytes, int32_t *out_size) {
  int32_t size;
  if (end - at < (ptrdiff_t)(2 * sizeof size)) return NULL;
  memcpy(&size, at + sizeof size, sizeof size); /* once: others may write the file */
  at += 2 * sizeof size;
  if (size < 0 || (uint64_t)(end - at) < align_up((uint64_t)size, 8)) return NULL;
  *out_bytes = at;
  *out_size = size;
  return at + align_up((uint64_t)size, 8);
}

/* Is it one, of a checked batch? */
MS_INLINE static inline bool view_single(const uint8_t *bytes, uint64_t available, single *out) {
  ms_batch_header header;
  if (available < sizeof header) return false;
  memcpy(&header, bytes, sizeof header);
  if (header.count != 1 || (header.flags & ~(MS_BATCH_FIXED | MS_BATCH_KEYS)) != 0 ||
      header.format != MS_FORMAT_VERSION || header.length > available ||
      header.length < sizeof header)
    return false;
  const uint8_t *at = bytes + sizeof header, *end = bytes + header.length;
  out->key = NULL;
  out->key_size = 0;
  if (header.flags & MS_BATCH_KEYS) at = take_single(at, end, &out->key, &out->key_size);
  if (at == NULL || take_single(at, end, &out->value, &out->value_size) == NULL) return false;
  out->length = header.length;
  out->offset = header.base_offset;
  out->timestamp = header.timestamp_min;
  out->flags = header.flags;
  return true;
}

/* More singles like the one before, which is in `gather`: nothing but sums changes. */
static uint64_t measure_alike(ms_gather *gather, uint32_t flags, const uint8_t *bytes,
                              uint64_t available, uint64_t records, uint64_t most) {
  uint64_t at = 0, count = 0, values = gather->value_bytes, keys = gather->key_bytes;
  uint64_t next_offset = gather->next_offset;
  int64_t smallest = gather->timestamp_min, largest = gather->timestamp_max;
  int32_t other_size = 0;
  single one;
  while (count < records && at < available && values + keys < most &&
         view_single(bytes + at, available - at, &one) && one.flags == flags &&
         one.offset == next_offset) {
    other_size |= one.value_size ^ gather->value_size;
    values += (uint64_t)one.value_size;
    keys += (uint64_t)one.key_size;
    if (one.timestamp < smallest) smallest = one.timestamp;
    if (one.timestamp > largest) largest = one.timestamp;
    at += one.length;
    next_offset++;
    count++;
  }
  if (other_size != 0) gather->flags &= ~(uint32_t)MS_BATCH_FIXED;
  if (smallest != largest) gather->flags |= MS_BATCH_TIMESTAMPS;
  gather->timestamp_min = smallest;
  gather->timestamp_max = largest;
  gather->value_bytes = values;
  gather->key_bytes = keys;
  gather->count += (uint32_t)count;
  gather->next_offset = next_offset;
  return at;
}

uint64_t ms_gather_measure_singles(ms_gather *gather, const uint8_t *bytes, uint64_t available,
                                   uint64_t records, uint64_t most) {
  uint64_t at = 0;
  const uint32_t before = gather->count;
  single one;
  if (records > INT32_MAX - before) records = INT32_MAX - before;
  while (gather->count - before < records && at < available &&
         gather->value_bytes + gather->key_bytes < most &&
         view_single(bytes + at, available - at, &one)) {
    gather_run run = {
        .offset_first = one.offset,
        .offset_end = one.offset + 1,
        .key_bytes = (uint64_t)one.key_size,
        .value_bytes = (uint64_t)one.value_size,
        .timestamp_min = one.timestamp,
        .timestamp_max = one.timestamp,
        .count = 1,
        .flags = one.flags,
        .value_size = one.value_size,
    };
    if (!gather_account(gather, &run)) break;
    at += one.length;
    /* It has keys, or none of those before it has: the next ones alike change no flag. */
    if ((gather->flags & MS_BATCH_KEYS) == (one.flags & MS_BATCH_KEYS))
      at += measure_alike(gather, one.flags, bytes + at, available - at,
                          records - (gather->count - before), most);
  }
  return at;
}

static ms_shape shape_of(const ms_gather *gather) {
  return (ms_shape){.key_bytes = gather->key_bytes,
                    .value_bytes = gather->value_bytes,
                    .name_bytes = gather->name_bytes,
                    .header_bytes = gather->header_bytes,
                    .count = gather->count,
                    .header_count = gather->header_count,
                    .flags = (uint16_t)gather->flags};
}

uint64_t ms_gather_bytes(const ms_gather *gather) {
  ms_shape shape = shape_of(gather);
  return lay_out(&shape, 0, 64).end;
}

static void gather_into(const ms_gather *gather, batch_layout layout, uint8_t *buffer,
                        ms_view *out_view) {
  memset(out_view, 0, sizeof *out_view);
  out_view->flags = gather->flags;
  out_view->base_offset = gather->base_offset;
  out_view->timestamp_min = gather->timestamp_min;
  out_view->timestamp_max = gather->timestamp_max;
  uint32_t flags = gather->flags;
  if (flags & MS_BATCH_TIMESTAMPS)
    out_view->timestamps = (int64_t *)(void *)(buffer + layout.timestamps);
  if (flags & MS_BATCH_OFFSETS) out_view->offsets = (int64_t *)(void *)(buffer + layout.offsets);
  if (flags & MS_BATCH_KEY_NULLS) {
    out_view->key_validity = buffer + layout.key_validity;
    memset(buffer + layout.key_validity, 0, (gather->count + 7) / 8);
  }
  if (flags & MS_BATCH_KEYS) {
    out_view->key_offsets = (int32_t *)(void *)(buffer + layout.key_offsets);
    out_view->keys = buffer + layout.keys;
    *(int32_t *)(void *)(buffer + layout.key_offsets) = 0;
  }
  if (flags & MS_BATCH_VALUE_NULLS) {
    out_view->value_validity = buffer + layout.value_validity;
    memset(buffer + layout.value_validity, 0, (gather->count + 7) / 8);
  }
  out_view->value_offsets = (int32_t *)(void *)(buffer + layout.value_offsets);
  out_view->values = buffer + layout.values;
  *(int32_t *)(void *)(buffer + layout.value_offsets) = 0;
  if (flags & MS_BATCH_HEADERS) {
    out_view->header_offsets = (int32_t *)(void *)(buffer + layout.header_offsets);
    out_view->name_offsets = (int32_t *)(void *)(buffer + layout.name_offsets);
    out_view->names = buffer + layout.names;
    out_view->header_value_offsets = (int32_t *)(void *)(buffer + layout.header_value_offsets);
    out_view->header_values = buffer + layout.header_values;
    *(int32_t *)(void *)(buffer + layout.header_offsets) = 0;
    *(int32_t *)(void *)(buffer + layout.name_offsets) = 0;
    *(int32_t *)(void *)(buffer + layout.header_value_offsets) = 0;
  }
}

void ms_gather_begin(const ms_gather *gather, uint8_t *buffer, ms_view *out_view) {
  ms_shape shape = shape_of(gather);
  gather_into(gather, lay_out(&shape, 0, 64), buffer, out_view);
}

uint64_t ms_gather_length(const ms_gather *gather, uint64_t file_position) {
  ms_shape shape = shape_of(gather);
  return ms_batch_length(&shape, file_position);
}

void ms_gather_place(const ms_gather *gather, uint64_t file_position, uint8_t *at,
                     ms_view *out_view) {
  bool align64;
  ms_shape shape = shape_of(gather);
  gather_into(gather, lay_out_best(&shape, file_position, &align64), at, out_view);
}

uint64_t ms_gather_finish(const ms_gather *gather, const ms_view *gathered, const ms_place *place,
                          uint8_t *at) {
  bool align64;
  ms_shape shape = shape_of(gather);
  const batch_layout layout = lay_out_best(&shape, place->file_position, &align64);
  int64_t smallest = gather->timestamp_min, largest = gather->timestamp_max;
  if (gathered->timestamps != NULL && gathered->count > 0) {
    smallest = largest = gathered->timestamps[0];
    for (uint32_t i = 1; i < gathered->count; i++) {
      int64_t timestamp = gathered->timestamps[i];
      if (timestamp < smallest) smallest = timestamp;
      if (timestamp > largest) largest = timestamp;
    }
  }
  put_header(at, place, &shape, layout.end, align64, smallest, largest);
  return put_hash(at, layout.end, place->seed);
}

/* The view's pointers are const for its readers; while gathering we own the buffer behind them. */
static void append_column(const int32_t *to_offsets, const uint8_t *to_bytes, uint32_t to,
                          const int32_t *offsets, const uint8_t *bytes, uint32_t first,
                          uint32_t count) {
  int32_t *out = (int32_t *)(uintptr_t)to_offsets + to;
  int32_t used = *out;
  if (offsets == NULL) {
    for (uint32_t i = 1; i <= count; i++) out[i] = used;
    return;
  }
  int32_t shift = used - offsets[first];
  for (uint32_t i = 1; i <= count; i++) out[i] = offsets[first + i] + shift;
  if (out[count] > used)
    memcpy((uint8_t *)(uintptr_t)to_bytes + used, bytes + offsets[first],
           (size_t)(out[count] - used));
}

static void append_validity(const uint8_t *to_bitmap, uint32_t to, const uint8_t *bitmap, bool all,
                            uint32_t first, uint32_t count) {
  uint8_t *out = (uint8_t *)(uintptr_t)to_bitmap;
  for (uint32_t i = 0; i < count; i++) {
    unsigned present = bitmap != NULL ? ms_bit(bitmap, first + i) : all;
    out[(to + i) >> 3] = (uint8_t)(out[(to + i) >> 3] | present << ((to + i) & 7));
  }
}

void ms_gather_add(ms_view *gathered, const ms_gather *gather, const ms_view *view, uint32_t first,
                   uint32_t count) {
  uint32_t to = gathered->count;
  if (gathered->timestamps != NULL) {
    int64_t *out = (int64_t *)(uintptr_t)gathered->timestamps + to;
    for (uint32_t i = 0; i < count; i++)
      out[i] = view->timestamps ? view->timestamps[first + i] : view->timestamp_min;
  }
  if (gathered->offsets != NULL) {
    int64_t *out = (int64_t *)(uintptr_t)gathered->offsets + to;
    for (uint32_t i = 0; i < count; i++)
      out[i] = view->offsets ? view->offsets[first + i] : (int64_t)(view->base_offset + first + i);
  }
  if (gathered->key_validity != NULL)
    append_validity(gathered->key_validity, to, view->key_validity, view->key_offsets != NULL,
                    first, count);
  if (gathered->key_offsets != NULL)
    append_column(gathered->key_offsets, gathered->keys, to, view->key_offsets, view->keys, first,
                  count);
  if (gathered->value_validity != NULL)
    append_validity(gathered->value_validity, to, view->value_validity, true, first, count);
  append_column(gathered->value_offsets, gathered->values, to, view->value_offsets, view->values,
                first, count);
  if (gathered->header_offsets != NULL) {
    int32_t *out = (int32_t *)(uintptr_t)gathered->header_offsets + to;
    uint32_t headers_to = gathered->header_count, headers = 0, headers_first = 0;
    if (view->header_offsets != NULL) {
      headers_first = (uint32_t)view->header_offsets[first];
      headers = (uint32_t)view->header_offsets[first + count] - headers_first;
    }
    for (uint32_t i = 1; i <= count; i++)
      out[i] = view->header_offsets
                   ? view->header_offsets[first + i] - (int32_t)headers_first + out[0]
                   : out[0];
    append_column(gathered->name_offsets, gathered->names, headers_to, view->name_offsets,
                  view->names, headers_first, headers);
    append_column(gathered->header_value_offsets, gathered->header_values, headers_to,
                  view->header_value_offsets, view->header_values, headers_first, headers);
    gathered->header_count += headers;
  }
  gathered->count += count;
  MS_ASSERT(gathered->count <= gather->count);
  (void)gather;
}

MS_INLINE static inline void add_single_column(const int32_t *to_offsets, const uint8_t *to_bytes,
                                               uint32_t to, const uint8_t *bytes, int32_t size) {
  int32_t *out = (int32_t *)(uintptr_t)to_offsets + to;
  out[1] = out[0] + size;
  if (size > 0) memcpy((uint8_t *)(uintptr_t)to_bytes + out[0], bytes, (size_t)size);
}

MS_INLINE static inline void set_bit(const uint8_t *bitmap, uint32_t i) {
  uint8_t *out = (uint8_t *)(uintptr_t)bitmap;
  out[i >> 3] = (uint8_t)(out[i >> 3] | 1u << (i & 7));
}

uint64_t ms_gather_add_singles(ms_view *gathered, const ms_gather *gather, const uint8_t *bytes,
                               uint64_t available) {
  uint64_t at = 0;
  uint32_t to = gathered->count;
  single one;
  for (; to < gather->count && at < available; to++) {
    if (!view_single(bytes + at, available - at, &one)) break;
    if (gathered->timestamps != NULL)
      ((int64_t *)(uintptr_t)gathered->timestamps)[to] = one.timestamp;
    if (gathered->offsets != NULL)
      ((int64_t *)(uintptr_t)gathered->offsets)[to] = (int64_t)one.offset;
    if (gathered->key_validity != NULL && one.key != NULL) set_bit(gathered->key_validity, to);
    if (gathered->key_offsets != NULL)
      add_single_column(gathered->key_offsets, gathered->keys, to, one.key, one.key_size);
    if (gathered->value_validity != NULL) set_bit(gathered->value_validity, to);
    add_single_column(gathered->value_offsets, gathered->values, to, one.value, one.value_size);
    if (gathered->header_offsets != NULL) {
      int32_t *out = (int32_t *)(uintptr_t)gathered->header_offsets + to;
      out[1] = out[0];
    }
    at += one.length;
  }
  gathered->count = to;
  return at;
}
