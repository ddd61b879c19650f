/* Compaction of sealed segments: the last offset of each key, which records of a segment stay, and
 * a segment without the others.
 *
 * Works on mapped segments and on memory of the caller; allocates nothing, never blocks. One thread
 * at a time for a table and for the survivors of a segment. Everything that walks a segment takes
 * long: call it without the GIL.
 */
#ifndef MS_COMPACT_H
#define MS_COMPACT_H

#include "ms_segment.h"

/* A key by the 128 bits of its hash, and the last offset that it was seen at: last is
 * 2 * (offset + 1), + 1 where a superseded record of it had to stay. 0: no key. */
typedef struct ms_key_entry {
  uint64_t hash[2];
  uint64_t last;
} ms_key_entry;
_Static_assert(sizeof(ms_key_entry) == 24, "with 3 entries in 4 used: 32 bytes a key");

typedef struct ms_key_table {
  ms_key_entry *entries; /* capacity of them, all 0 at first */
  uint64_t capacity;     /* at least 4, below 2^32 */
  uint64_t count;        /* at most 3/4 of capacity */
  uint64_t seed[2];      /* random, so that nobody can choose keys that collide */
} ms_key_table;

/* Enter the keys of records at or behind offset `from`, from the batch at *position on, until
 * `limit` (MS_OK with *position there) or until about `bytes` were walked (MS_OK). MS_FULL: the
 * record at *out_full and those behind it found no room. */
MS_MUST_USE ms_status ms_compact_scan(ms_key_table *table, ms_segment *segment, uint64_t *position,
                                      uint64_t limit, uint64_t from, uint64_t bytes,
                                      uint64_t *out_full, ms_error *err);

enum { MS_COMPACT_PRODUCERS = 1024 };

/* Which records of one segment stay. The caller sets bits, room and end; ms_compact_count and
 * ms_compact_select the rest. */
typedef struct ms_survivors {
  uint64_t *bits;          /* one a record, rounded up to 64 */
  uint64_t room;           /* how many bits there are */
  uint64_t end;            /* position at which the segment ends */
  uint64_t records;        /* that stay */
  uint64_t dead;           /* that do not */
  uint64_t tombstones;     /* that stay */
  uint64_t tombstones_end; /* behind the last tombstone that does not stay; 0: none */
  uint64_t tombstones_removed;
  uint32_t damaged;                        /* fillers of `repair` */
  bool producers_full;                     /* more producers than the list has room for */
  uint32_t producer[MS_COMPACT_PRODUCERS]; /* by number, and where its last batch is */
  uint64_t producer_last[MS_COMPACT_PRODUCERS];
} ms_survivors;

/* Records of these keys, from the batch at *position on, lie in a segment of another partition and
 * count again if a tombstone goes: those of keys in the table stay. Ends as the scan does. */
MS_MUST_USE ms_status ms_compact_hold(ms_key_table *table, ms_segment *segment, uint64_t *position,
                                      uint64_t limit, uint64_t bytes, ms_error *err);

/* How many records a segment has up to `end`. */
MS_MUST_USE ms_status ms_compact_count(ms_segment *segment, uint64_t end, uint64_t *out_records,
                                       ms_error *err);

/* Set the bits of records that are the last of their key as far as the table knows, or have no
 * key. With `drop` a tombstone goes as well, unless a record that it supersedes had to stay. */
MS_MUST_USE ms_status ms_compact_select(const ms_key_table *table, ms_segment *segment, bool drop,
                                        ms_survivors *survivors, ms_error *err);

/* The segment stays as it is: remember the keys whose superseded records stay in it, so that their
 * tombstones do. */
MS_MUST_USE ms_status ms_compact_leave(ms_key_table *table, ms_segment *segment,
                                       const ms_survivors *survivors, ms_error *err);

/* The bytes of data that the records that stay take, with what follows them. MS_FULL: not less
 * than now. */
MS_MUST_USE ms_status ms_compact_measure(ms_segment *segment, const ms_survivors *survivors,
                                         uint64_t *out_bytes, ms_error *err);

/* Write them into `target`: an opened, writable segment file of the same size, zeroed, not
 * activated. It begins and ends where the other one does, with a filler over what is saved.
 * Blocks must lie behind the bytes that were measured, and behind the 64 bytes at each further
 * multiple of MS_COMPACT_FILLER_BYTES. */
#define MS_COMPACT_FILLER_BYTES (MS_BATCH_BYTES_MAX / 2)
MS_MUST_USE ms_status ms_compact_copy(ms_segment *segment, const ms_survivors *survivors,
                                      ms_segment *target, ms_error *err);

/* The compaction record. False: the segment has no valid one. Storing it is for the holder of the
 * compact word; the segment must be writable. */
bool ms_compaction_load(const ms_segment *segment, ms_compaction *out);
void ms_compaction_store(ms_segment *segment, const ms_compaction *record);

#endif
