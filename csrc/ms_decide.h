/* What a transaction does to the messages of a queue: prepare, then be decided.
 *
 * A word PREPARED or ACKING ends in the low 40 bits of the transaction, ms_word_transaction().
 */
#ifndef MS_DECIDE_H
#define MS_DECIDE_H

#include "ms_queue.h"

/* LEASED -> ACKING; *out_word is what to decide. MS_LOST, also where the lease is over. */
MS_MUST_USE ms_status ms_queue_try_prepare_ack(ms_queue *queue, const ms_lease *lease,
                                               uint64_t transaction, const ms_instant *now,
                                               uint64_t *out_word);
/* ACKING -> LEASED as it was: the transaction did not come to its record. */
MS_MUST_USE ms_status ms_queue_try_undo_ack(ms_queue *queue, const ms_lease *lease, uint64_t word);
/* As the first opener, alone: a message whose content is damaged never was; it is put again. First
 * wipe, then sync: a free word over the old id would say that the message was finished. */
void ms_queue_wipe(ms_queue *queue, uint32_t slot);
void ms_queue_forget(ms_queue *queue, uint32_t slot, const ms_instant *now);
/* Committed: PREPARED -> READY, DELAYED, HELD; ACKING -> FREE. Else PREPARED -> FREE, ACKING ->
 * READY. MS_LOST: the word is another one; MS_BUSY. */
MS_MUST_USE ms_status ms_queue_try_decide(ms_queue *queue, uint32_t slot, uint64_t word,
                                          bool committed, const ms_instant *now,
                                          uint32_t *out_owner);

#endif
