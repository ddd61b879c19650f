/* One partition: its control block and the segments that this process has mapped.
 *
 * One writer at a time (append word), any number of readers in any process. Functions named try_
 * touch memory only and never block; their caller keeps the GIL, which is what keeps two threads
 * of one process apart in the fields of ms_partition. Knows no file names.
 */
#ifndef MS_PARTITION_H
#define MS_PARTITION_H

#include "ms_owner.h"
#include "ms_producer.h"

/* What the caller should do after an append, none of it urgent. */
enum {
  MS_EVENT_WRITTEN = 1 << 0,  /* first append since `written` was cleared: a sync will be due */
  MS_EVENT_ROLLED = 1 << 1,   /* `active` is what was `next` */
  MS_EVENT_SPARE = 1 << 2,    /* half full without a successor: make one */
  MS_EVENT_PREPARE = 1 << 3,  /* the tail has come near `ready` */
  MS_EVENT_UNSYNCED = 1 << 4, /* more than `unsynced_max` bytes are not synced */
  MS_EVENT_LATE = 1 << 5      /* `written` was not cleared for `late_us` */
};

typedef struct ms_partition {
  ms_control_header *header;
  ms_control_block *block;
  uint64_t generation;
  uint32_t self;      /* owner word of this process */
  bool written;       /* this process appended since it last synced */
  int64_t written_us; /* when `written` was set, or MS_EVENT_LATE said, by the wall clock */
  uint64_t late_us;   /* UINT64_MAX: never late */
  bool spare_wanted;  /* MS_EVENT_SPARE was said and not answered */
  ms_segment *active; /* mapped writable; NULL: none yet */
  ms_segment *next;   /* mapped writable, not activated when it was mapped; NULL: none */
  ms_mark end;        /* as this process left it; valid while end.position is the tail */
  bool end_valid;
  uint64_t ready; /* position up to which pages of `active` are ready; said by the caller */
  uint64_t
      ready_low; /* MS_EVENT_PREPARE when less than this is ready ahead of the tail; 0: never */
  uint64_t unsynced_max;   /* 0: no bound */
  int64_t clock_offset_us; /* of the store's clock, which segments are stamped with, to boot */
  ms_producers *producers; /* NULL: not known in this process, or being walked */
} ms_partition;

typedef struct ms_appended {
  uint64_t first_offset;
  uint64_t epoch;
  uint64_t end; /* position behind the batch: what must be durable */
  uint32_t events;
  uint32_t owner;         /* with MS_BUSY: who holds the append word */
  uint64_t need_bytes;    /* with MS_ROLL: data bytes that the successor must have */
  uint64_t last_sequence; /* with MS_RESENT: of the producer, in this partition */
} ms_appended;

/* Append one batch and publish it with one store of the tail. When it returns MS_OK the batch
 * survives the death of any process; whether it survives a power cut is the business of the one
 * that syncs. MS_BUSY: take the word by ms_owner_wait() or ms_partition_take_over(), release it,
 * try again. MS_ROLL: map a successor of at least need_bytes of data as `next`, try again.
 * MS_MOVED: map block->active. MS_WALK: recover first. MS_POISONED, MS_CORRUPT: refused until all
 * have closed, or until repair. MS_CLOSED: the stream was dropped or its control file replaced.
 * With a producer (0: none), also MS_RESENT and MS_BEHIND of ms_producers_try_admit(): nothing was
 * appended. out is written also on those. */
MS_MUST_USE ms_status ms_partition_try_append(ms_partition *partition, const ms_records *records,
                                              const ms_shape *shape, uint32_t producer,
                                              uint64_t sequence, ms_appended *out, ms_error *err);

/* Take the append word to write zeros to the file from position `begin` on, which nobody may store
 * to meanwhile; ms_owner_release() gives it back. Killed in between, zeros lie behind the tail,
 * where bytes mean nothing. MS_BUSY: somebody appends. MS_END: the tail is behind `begin` already,
 * `segment` is not the active one any more, or appends are refused. */
MS_MUST_USE ms_status ms_partition_begin_fill(ms_partition *partition, const ms_segment *segment,
                                              uint64_t begin);

/* The same for the whole pages, [*out_begin, *out_end) of the active segment's file, that a batch
 * of this shape would take next: at least MS_CLEAR_LEAST bytes, where an append would be admitted,
 * by all the questions that it asks. Else the word is free again, and the status says why. */
#define MS_CLEAR_LEAST (8 * 4096u)
MS_MUST_USE ms_status ms_partition_begin_clear(ms_partition *partition, const ms_shape *shape,
                                               uint64_t *out_begin, uint64_t *out_end);

/* Take the append word from a dead owner and mend what it left: finish a roll whose record is
 * valid, else zero the header at the tail, so that no ghost of its batch can be walked into. The
 * caller has mapped block->active as `active` and, where that file exists, its successor as
 * `next`. The word is free again on return. MS_BUSY: somebody else was faster. MS_MOVED: `active`
 * is not what the block says: map it, try again. */
MS_MUST_USE ms_status ms_partition_take_over(ms_partition *partition, uint32_t dead,
                                             uint32_t *out_owner);

/* Tail, next offset and hash as they belong together, without a lock. MS_BUSY: a writer is (or
 * died) between them, use ms_segment_mark_at() on the tail. */
MS_MUST_USE ms_status ms_partition_try_end(const ms_control_block *block, ms_mark *out_end);

/* Group commit, by the holder of the sync word. It calls begin_sync with the position up to which
 * its sync will reach; syncs; calls set_durable (the mark never falls); gives the word back; and
 * calls ms_partition_end_sync(). That wakes one of the followers that the sync covered, who then
 * wake each other, and one of the rest to lead the next sync. */
void ms_partition_begin_sync(ms_control_block *block, uint64_t target);
void ms_partition_set_durable(ms_control_block *block, const ms_mark *mark);
void ms_partition_end_sync(ms_control_block *block);

/* Become the leader of a sync or sleep until `position` is durable, at most timeout_ns, maybe
 * less. MS_OK: it is. MS_BUSY: check again (time-out, signal, poison or another's end). With `lead`
 * set the caller now holds the sync word. Blocks: call without the GIL. */
MS_MUST_USE ms_status ms_partition_lead_or_wait(ms_control_block *block, uint32_t self,
                                                uint64_t position, int64_t timeout_ns,
                                                bool *out_lead);

/* Sleep, without leading, until a sync ends after `durable_wake` was `round`, at most timeout_ns;
 * maybe less. The caller has set durable_waiters, fenced, and read `durable` in between.
 * Blocks: call without the GIL. */
void ms_partition_follow(ms_control_block *block, uint32_t round, int64_t timeout_ns);

/* Write what recovery found, and open the partition for this generation. Holder of the walk word.
 */
void ms_partition_recovered(ms_control_block *block, uint64_t generation, const ms_mark *end,
                            uint64_t active, uint64_t first_segment, uint64_t first_offset,
                            uint32_t poison);

/* Tell all readers that sleep on the stream's wake word. */
void ms_stream_wake(ms_control_header *header);

#endif
