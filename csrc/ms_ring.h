/* A bounded ring of hints in shared memory: any number of producers and consumers, lock-free.
 *
 * A cell is one word: lap (30 bits) | hint (34 bits: slot 24, reuse 10). Ticket p lies in cell
 * p mod cells, and belongs to lap p / cells + 1, so that zeros are an empty ring. A put is a
 * compare-and-swap of the cell and a move of the tail that anyone may finish; a consumer reads
 * the head's cell, does what the hint says, then moves the head. So a kill or a pause between any
 * two instructions blocks nobody. Hints may be seen twice or never be put (when the ring is full):
 * a taker asks the truth, a state word. All functions touch memory only and never block.
 */
#ifndef MS_RING_H
#define MS_RING_H

#include "ms_format.h"

#define MS_RING_HINT_BITS 34

typedef struct ms_ring {
  ms_lane_hints *ends;     /* head and tail: free-running tickets */
  _Atomic uint64_t *cells; /* 1 << cell_bits of them */
  uint32_t cell_bits;
} ms_ring;

/* Put a hint (below 1 << 34) behind the last. False: no room, the hint is dropped. */
bool ms_ring_try_put(const ms_ring *ring, uint64_t hint);

/* The ticket of the head, as of now. */
uint64_t ms_ring_head(const ms_ring *ring);
uint64_t ms_ring_tail(const ms_ring *ring);

/* The hint at a ticket. False: none was put there yet, or it was overwritten since. */
bool ms_ring_at(const ms_ring *ring, uint64_t ticket, uint64_t *out_hint);

/* Move the head from one ticket to a later one, unless another consumer moved it meanwhile. */
void ms_ring_advance(const ms_ring *ring, uint64_t from, uint64_t to);

/* Do the invariants hold? For tests, at rest: tail - head in 0..cells after helping, laps fit. */
bool ms_ring_check(const ms_ring *ring);

#endif
