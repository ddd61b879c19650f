/* A log of one segment on plain memory. */
#ifndef SEGMENT_LOG_H
#define SEGMENT_LOG_H

#include "check.h"
#include "ms_segment.h"
#include "ms_xxh3.h"

enum { SEGMENT_BYTES = 1 << 18 };

static const ms_identity identity = {.stream_id = 7, .partition = 3, .number = 1};

typedef struct log {
  uint8_t *bytes;
  ms_segment segment;
  _Atomic uint32_t checked[64];
  ms_mark end;
} log;

static inline void write_header(uint8_t *bytes, uint64_t salt) {
  ms_segment_header header = {.magic = MS_MAGIC_SEGMENT,
                              .version = MS_FORMAT_VERSION,
                              .partition = identity.partition,
                              .stream_id = identity.stream_id,
                              .number = identity.number,
                              .salt = salt,
                              .size = SEGMENT_BYTES};
  ms_segment_geometry(SEGMENT_BYTES, &header.index_count, &header.data_position);
  header.checksum = ms_xxh3_64(&header, offsetof(ms_segment_header, checksum), 0);
  memcpy(bytes, &header, sizeof header);
}

/* What the bytes hold is opened; nothing of it was checked. */
static inline void open_log(log *log) {
  memset((void *)log->checked, 0, sizeof log->checked);
  CHECK(ms_segment_open(&log->segment, log->bytes, SEGMENT_BYTES, true, &identity, log->checked,
                        NULL) == MS_OK);
}

/* A new segment, not activated. */
static inline void make_log(log *log, uint64_t salt) {
  log->bytes = aligned_alloc(4096, SEGMENT_BYTES);
  memset(log->bytes, 0, SEGMENT_BYTES);
  write_header(log->bytes, salt);
  open_log(log);
}

/* A new segment that is appended to from a mark on. */
static inline void begin_log(log *log, uint64_t salt, const ms_mark *begin) {
  make_log(log, salt);
  ms_segment_activate(&log->segment, begin, 0, 1, 1);
  log->end = *begin;
}

#endif
