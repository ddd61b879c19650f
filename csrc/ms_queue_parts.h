/* What the files of the queue share: where words, slots and records lie, and the small steps.
 *
 * Not for callers: ms_queue.h is the contract.
 */
#ifndef MS_QUEUE_PARTS_H
#define MS_QUEUE_PARTS_H

#include "ms_due.h"

/* Take the bucket of a key, spinning shortly. MS_OK also where the queue has no buckets. */
MS_MUST_USE ms_status ms_bucket_try_take(ms_queue *queue, uint64_t key_hash, uint32_t *out_owner);
void ms_bucket_release(ms_queue *queue, uint64_t key_hash);
/* Put the slot last; true: it is the only one. Take it out, and ready the next one if it was the
 * first. Holder of the bucket. */
bool ms_bucket_append(ms_queue *queue, uint64_t key_hash, uint32_t slot);
void ms_bucket_remove(ms_queue *queue, uint64_t key_hash, uint32_t slot, const ms_instant *now);
/* Is it the first of its key? Also where there are no buckets. Holder. */
bool ms_bucket_is_first(const ms_queue *queue, uint64_t key_hash, uint32_t slot);
/* Does a message with this word belong into a list? */
bool ms_bucket_has(const ms_queue *queue, uint64_t word);
/* Make the list anew from the words; what a dead owner left is not trusted. Holder. */
void ms_bucket_rebuild(ms_queue *queue, uint32_t bucket, const ms_instant *now);

/* Of a dedup key: MS_OK: no message has it, MS_END: that of *out_id has, MS_BUSY. */
MS_MUST_USE ms_status ms_claim_find(ms_queue *queue, const uint64_t key[2], const ms_instant *now,
                                    uint64_t *out_id, uint32_t *out_owner);
/* Claim it for the message that is being written; also MS_ROLL. */
MS_MUST_USE ms_status ms_claim_make(ms_queue *queue, const uint64_t key[2], uint64_t id,
                                    uint32_t slot, const ms_instant *now, uint64_t *out_id,
                                    uint32_t *out_owner);
/* Free the words of the table that the dead (owner words) held. */
void ms_claim_mend(ms_queue *queue, const uint32_t *dead, uint32_t dead_count);
/* Done: its message is or was visible. Else void. MS_OK, MS_BUSY. */
ms_status ms_claim_settle(ms_queue *queue, const uint64_t key[2], uint64_t id, bool done,
                          uint32_t *out_owner);

#endif
