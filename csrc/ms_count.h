/* Counting the messages of a queue in one pass that changes nothing: by state, by id, and whether
 * the invariants hold.
 */
#ifndef MS_COUNT_H
#define MS_COUNT_H

#include "ms_queue.h"

typedef struct ms_queue_counts {
  uint32_t ready, delayed, held, leased, writing, dead, spare, free, prepared, acking, invalid;
  uint32_t by_lane[MS_QUEUE_LANES_MAX]; /* ready */
  uint64_t put, done;                   /* since the queue was made, see ms_queue_count_swept() */
  int64_t oldest_us; /* for how long the one that is READY longest waits; -1: none is */
} ms_queue_counts;
void ms_queue_count(const ms_queue *queue, ms_queue_counts *out); /* states alone */
/* What a sweep would make of the words of leases that are over: for a reader, maybe where
 * nobody is left to sweep. `living`, by member index: the owner word of each participant that is
 * not proved dead, else 0. The state of one word, and all of them counted so. */
uint32_t ms_queue_state_swept(const ms_queue *queue, uint32_t slot, uint64_t word,
                              const ms_instant *now, const uint32_t *living);
/* Ids are counted before the pass, what ended otherwise than by an ack behind it, and who is being
 * put stands: so put and done may be short of what is done meanwhile, and are not beyond it.
 * `living` may be NULL: words as they are. */
void ms_queue_count_swept(const ms_queue *queue, const ms_instant *now, const uint32_t *living,
                          ms_queue_counts *out);
/* How many are READY that were never leased; of them the one with the lowest id. One pass. */
uint32_t ms_queue_never_leased(const ms_queue *queue, uint32_t *out_slot, uint64_t *out_word);
/* Slot of a message that is not finished, by id; UINT32_MAX: none. One pass over the slots. */
uint32_t ms_queue_find(const ms_queue *queue, uint64_t id, uint64_t *out_word);

/* Do the invariants hold, at rest? Text says which one does not. */
bool ms_queue_check(const ms_queue *queue, char *text, size_t size);

#endif
