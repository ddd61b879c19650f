/* What time and deaths bring to a queue: the one pass over its words that mends. */
#ifndef MS_SWEEP_H
#define MS_SWEEP_H

#include "ms_queue.h"

/* One pass over the words: ends leases that are over or whose owner is in `dead` (owner words),
 * frees what they were writing, readies what is due, expires, repairs SPARE and lost hints, mends
 * buckets, wheel and words that the dead held. How many became ready. Safe beside anything, also a
 * second sweep. */
uint32_t ms_queue_sweep(ms_queue *queue, const ms_instant *now, const uint32_t *dead,
                        uint32_t dead_count);
/* Is a sweep due: a lease over, an expiry, hints missed? */
bool ms_queue_sweep_due(const ms_queue *queue, const ms_instant *now);
/* Claim the watch for deaths, due every interval_ns; true for one caller of all processes. */
bool ms_queue_claim_watch(ms_queue *queue, const ms_instant *now, int64_t interval_ns);

#endif
