/* What a partition has of each producer: a table from the producer's number to its last sequence.
 *
 * Lives in the memory of one process and is only ever derived from the log, whose batch headers
 * are the truth: it has read all batches before `position`. Whoever attached it to an ms_partition
 * gives it up (detaches it) before a walk; while it is attached the holder of the append word, with
 * the GIL, is the only one to change it. Allocates nothing: the caller gives it entries.
 */
#ifndef MS_PRODUCER_H
#define MS_PRODUCER_H

#include "ms_segment.h"

#define MS_PRODUCER_MAX ((UINT32_C(1) << 24) - 1)
#define MS_SEQUENCE_MAX ((UINT64_C(1) << 63) - 2)
/* Flag of the sequence in a batch header: shares of the call follow in other partitions. */
#define MS_SEQUENCE_MORE (UINT64_C(1) << 63)

typedef struct ms_producer_entry {
  uint64_t last;  /* sequence of its last record here, + 1; 0: none */
  uint64_t whole; /* sequence of the last record here that ended a call, + 1; 0: none */
} ms_producer_entry;

typedef struct ms_producers {
  ms_producer_entry *entries; /* of producer n: entries[n] */
  uint32_t count;
  uint64_t position; /* of the log, between two batches; all before it is in the entries */
} ms_producers;

/* May this producer append records from sequence `first` on, at the tail? MS_OK: all of them are
 * new. MS_RESENT: *out_last, at or above `first`, is there already. MS_BEHIND: the table (NULL:
 * there is none) lacks entries, or more batches than it may read here: detach it, walk, try again.
 * Holder of the append word; `active` is the active segment, NULL: none yet. Never blocks. */
MS_MUST_USE ms_status ms_producers_try_admit(ms_producers *table, const ms_segment *active,
                                             uint64_t tail, uint32_t producer, uint64_t first,
                                             uint64_t *out_last);

/* A batch was published: keep up with it, where nothing else lies between. */
static inline void ms_producers_passed(ms_producers *table, uint64_t begin, uint64_t end,
                                       uint32_t producer, uint64_t sequence);

/* Read the checked batches of a segment from table->position to `limit`. MS_BEHIND: *out_producer
 * has no entry: give more, call again. MS_CORRUPT. Long: call without the GIL, detached. */
MS_MUST_USE ms_status ms_producers_walk(ms_producers *table, ms_segment *segment, uint64_t limit,
                                        uint32_t *out_producer, ms_error *err);

/* Note the sequence of a batch header; producer < table->count. The highest stays. */
static inline void ms_producers_note(ms_producers *table, uint32_t producer, uint64_t sequence) {
  ms_producer_entry *entry = &table->entries[producer];
  uint64_t value = (sequence & ~MS_SEQUENCE_MORE) + 1;
  if (value > entry->last) entry->last = value;
  if (!(sequence & MS_SEQUENCE_MORE) && value > entry->whole) entry->whole = value;
}

static inline void ms_producers_passed(ms_producers *table, uint64_t begin, uint64_t end,
                                       uint32_t producer, uint64_t sequence) {
  if (table->position != begin) return; /* the next admission reads what lies between */
  if (producer != 0) ms_producers_note(table, producer, sequence);
  table->position = end;
}

#endif
