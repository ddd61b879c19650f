/* How a lease and a message end: acknowledged, taken back, dead; why an attempt failed; how many
 * dead letters are kept.
 *
 * Each end of a lease is MS_OK, MS_LOST (nothing was changed), or MS_BUSY (*out_owner holds the
 * key's bucket, or a word of the table of dedup keys: wait, try again).
 */
#ifndef MS_ENDING_H
#define MS_ENDING_H

#include "ms_queue.h"

/* Why an attempt failed (ms_failure.kind). */
enum {
  MS_FAILED = 1,      /* nack */
  MS_FAILED_LEASE,    /* the lease ran out */
  MS_FAILED_DEATH,    /* its holder died */
  MS_FAILED_REJECTED, /* reject */
  MS_FAILED_DECODE,   /* the codec could not read it */
  MS_FAILED_CORRUPT   /* torn by a power cut, or damaged */
};

MS_MUST_USE ms_status ms_queue_try_ack(ms_queue *queue, const ms_lease *lease,
                                       const ms_instant *now, uint32_t *out_owner);
/* Counted: to READY or DELAYED, or DEAD where attempts are spent (*out_dead). */
MS_MUST_USE ms_status ms_queue_try_nack(ms_queue *queue, const ms_lease *lease, int64_t delay_ns,
                                        uint32_t kind, const void *text, size_t length,
                                        const ms_instant *now, bool *out_dead, uint32_t *out_owner);
MS_MUST_USE ms_status ms_queue_try_reject(ms_queue *queue, const ms_lease *lease, uint32_t kind,
                                          const void *text, size_t length, const ms_instant *now,
                                          uint32_t *out_owner);
/* Not counted. */
MS_MUST_USE ms_status ms_queue_try_release(ms_queue *queue, const ms_lease *lease, int64_t delay_ns,
                                           const ms_instant *now);
/* READY, DELAYED, HELD or DEAD -> FREE. MS_LOST: it is in another state now. */
MS_MUST_USE ms_status ms_queue_try_cancel(ms_queue *queue, uint32_t slot, uint64_t word,
                                          const ms_instant *now, uint32_t *out_owner);
/* The newest valid failure record of the message in the slot; false: none. */
bool ms_queue_failure(const ms_queue *queue, uint32_t slot, uint64_t id, ms_failure *out);

/* --- for the files above --- */

/* A state that nobody has leased (or the caller has) -> FREE. */
MS_MUST_USE ms_status ms_queue_finish(ms_queue *queue, uint32_t slot, uint64_t word,
                                      const ms_instant *now, uint32_t *out_owner);
/* LEASED -> DEAD. Status as of the ends of a lease. */
MS_MUST_USE ms_status ms_queue_bury(ms_queue *queue, uint32_t slot, uint64_t word,
                                    const ms_instant *now, uint32_t *out_owner);
/* Write why this attempt failed, keeping the first error. The caller holds the lease `word`. */
void ms_queue_note_failure(ms_queue *queue, uint32_t slot, uint64_t word, uint32_t kind,
                           const void *text, size_t length, const ms_instant *now);
/* Keep SPARE and DEAD to what capacity and dead_limit say: one pass. */
void ms_queue_balance(ms_queue *queue);

#endif
