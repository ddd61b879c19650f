/* Putting a message and taking it; making a lease longer; making a dead letter a message again. */
#ifndef MS_DELIVERY_H
#define MS_DELIVERY_H

#include "ms_slots.h"

/* Put a message; visible and kept over any process's death when it returns MS_OK. Wakes nobody:
 * ms_queue_wake() after one or many. MS_FULL, MS_GROW_SLOTS, MS_GROW_BLOCKS, MS_POISONED; MS_END: a
 * message with its dedup key was put before: its id is out->id, nothing was put; MS_ROLL: the table
 * of those keys is too small.
 * MS_BUSY, of all functions: *out_owner has a word that was needed; MS_OWNER_FREE: the table of
 * dedup keys is another one now, map it. `slot` of out is the slot. */
MS_MUST_USE ms_status ms_queue_try_put(ms_queue *queue, const ms_message *message,
                                       const ms_instant *now, ms_lease *out, uint32_t *out_owner,
                                       ms_error *err);
/* A put found it full: count it, once, however often it tries again. */
void ms_queue_refuse(ms_queue *queue);

/* Lease the next message until now + lease_ms. MS_EMPTY: none is ready, or paused. *io_alone: in:
 * only one that never failed; out on MS_EMPTY: the next one failed before, take it alone. NULL:
 * any.
 */
MS_MUST_USE ms_status ms_queue_try_get(ms_queue *queue, int64_t lease_ms, const ms_instant *now,
                                       bool *io_alone, ms_lease *out);

/* The lease ends lease_ms from now; io_lease gets the new token. MS_LOST. */
MS_MUST_USE ms_status ms_queue_try_extend(ms_queue *queue, ms_lease *io_lease, int64_t lease_ms,
                                          const ms_instant *now);
/* One compare-and-swap of any thread, also without the GIL (the heartbeat). */
MS_MUST_USE ms_status ms_lease_renew(_Atomic uint64_t *word, uint64_t *io_token, int64_t lease_ms,
                                     int64_t mono_ns);

/* DEAD -> READY, attempts 0. MS_FULL: no room for one more that is not finished. */
MS_MUST_USE ms_status ms_queue_try_redrive(ms_queue *queue, uint32_t slot, uint64_t word,
                                           const ms_instant *now, uint32_t *out_owner);

#endif
