/* Claims of deduplication ids by messages of a queue: which message has a dedup key.
 *
 * MS_BUSY with *out_owner MS_OWNER_FREE says that the table is another one now: map it.
 */
#ifndef MS_CLAIM_H
#define MS_CLAIM_H

#include "ms_queue.h"

/* Use this table of dedup keys from now on, instead of the former one. */
void ms_queue_use_dedup(ms_queue *queue, ms_dedup *table);
/* As the first opener, after ms_queue_recover: claims as the messages say. MS_ROLL: the table is
 * too small; again with a larger one. */
MS_MUST_USE ms_status ms_queue_recover_claims(ms_queue *queue, const ms_instant *now);

/* Find a dedup key. MS_OK: no message has it, MS_END: that of *out_id has, MS_BUSY. */
MS_MUST_USE ms_status ms_claim_find(ms_queue *queue, const uint64_t key[2], const ms_instant *now,
                                    uint64_t *out_id, uint32_t *out_owner);
/* Claim it for the message that is being written; also MS_ROLL. */
MS_MUST_USE ms_status ms_claim_make(ms_queue *queue, const uint64_t key[2], uint64_t id,
                                    uint32_t slot, const ms_instant *now, uint64_t *out_id,
                                    uint32_t *out_owner);
/* Free the words of the table that the dead (owner words) held. */
void ms_claim_mend(ms_queue *queue, const uint32_t *dead, uint32_t dead_count);
/* End a claim. `done`: its message is or was visible; else it is void. MS_OK, MS_BUSY. */
ms_status ms_claim_end(ms_queue *queue, const uint64_t key[2], uint64_t id, bool done,
                       uint32_t *out_owner);

#endif
