/* The hints of a queue to messages that can be taken: now (rings), or at their time (the wheel).
 *
 * A hint is only ever a reason to read the word, which is the truth: it may be seen twice, be
 * out of date, or be missing, which a sweep mends.
 */
#ifndef MS_HINT_H
#define MS_HINT_H

#include "ms_queue.h"

/* Hint that the slot is READY. What finds no room is found by a sweep. */
static inline void ms_queue_hint(ms_queue *queue, uint32_t slot, uint64_t word) {
  uint32_t lane = ms_word_lane(word);
  if (lane >= queue->lanes) lane = queue->lanes - 1;
  MS_YIELD("queue_hint");
  /* What finds no room is found by the sweep, when the heads have passed what it noted. */
  (void)ms_ring_try_put(&queue->rings[lane], (uint64_t)slot << 10 | ms_word_reuse(word));
}

/* Put a DELAYED slot into the wheel, or leave it to a sweep when the wheel is busy. */
void ms_queue_arm(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now);

/* DELAYED -> READY | DELAYED (parked), once its tick is reached. True: it is READY. */
bool ms_queue_fall_due(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now);

/* Move due messages from the wheel to the rings; how many became ready. *out_next_ns: nothing is
 * due before that instant of CLOCK_BOOTTIME (INT64_MAX: never). */
uint32_t ms_queue_try_advance(ms_queue *queue, const ms_instant *now, int64_t *out_next_ns);

#endif
