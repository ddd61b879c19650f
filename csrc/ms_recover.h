/* The hints of a queue made anew: by the first opener after all processes have ended, or as
 * larger ones.
 */
#ifndef MS_RECOVER_H
#define MS_RECOVER_H

#include "ms_queue.h"

/* Bytes of `scratch` that the two below need, with slots as they are published now. Never 0. */
size_t ms_queue_scratch_size(const ms_queue *queue);

/* The first opener, alone: free what was being written, void leases, recompute ticks, bury what a
 * power cut tore, and fill zeroed hints in order. `verify`: check each message's hash. */
void ms_queue_recover(ms_queue *queue, bool verify, const ms_instant *now, void *scratch);

/* Fill the hints of `to`, larger and not shared yet, from the words and the hints of `from`, which
 * go out of use: the caller has said so in their state, and holds their maintenance. Takes the
 * wheel and the buckets of `from`, and keeps them: MS_BUSY: *out_owner has one of them; again with
 * *io_taken, which begins at 0. What others do meanwhile with hints of `from` is found by sweeps.
 */
MS_MUST_USE ms_status ms_queue_move_hints(ms_queue *from, ms_queue *to, const ms_instant *now,
                                          uint32_t *io_taken, void *scratch, uint32_t *out_owner);
/* It is given up: let go what was taken. */
void ms_queue_give_back_hints(ms_queue *from, uint32_t taken);

/* As the first opener, alone: ids go on from `least` at least, and put counts on over that. Then,
 * after recovery, totals that cannot be (an earlier version, a power cut, damage) begin
 * with what is there. */
void ms_queue_begin_ids(ms_queue *queue, uint64_t least);
void ms_queue_begin_totals(ms_queue *queue);

#endif
