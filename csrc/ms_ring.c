/* The ring of hints. Any number of processes put and take at the same time; nobody waits for
 * anybody.
 *
 * Invariants: (1) A cell holds lap(p) exactly when ticket p is the last that was filled there.
 * (2) Tickets are filled in order: p + 1 only after the tail was seen behind p, so at most one
 * filled ticket lies at the tail or behind it. (3) head <= tail + 1 and tail <= head + cells,
 * when the tail is read before the head. (4) Both only grow.
 * Crash: filling a cell is the put; what is left of the call after it, the next caller does as
 * well. Laps are compared modulo 1 << 30: a process that sleeps through a
 * multiple of so many laps inside a put may lose one hint.
 * Damage is noticed where (1) or (3) fail for one unchanged tail, and mended by the next put: hints
 * are lost, the ring goes on. Knows nothing of slots.
 */
#include "ms_ring.h"

#define LAP_MASK ((UINT64_C(1) << (64 - MS_RING_HINT_BITS)) - 1)
#define HINT_MASK ((UINT64_C(1) << MS_RING_HINT_BITS) - 1)

static inline uint64_t lap_of_ticket(const ms_ring *ring, uint64_t ticket) {
  return ((ticket >> ring->cell_bits) + 1) & LAP_MASK;
}

static inline uint64_t lap_of_cell(uint64_t cell) { return cell >> MS_RING_HINT_BITS; }

static inline _Atomic uint64_t *cell_at(const ms_ring *ring, uint64_t ticket) {
  return &ring->cells[ticket & ((UINT64_C(1) << ring->cell_bits) - 1)];
}

static inline uint64_t load_tail(const ms_ring *ring) {
  /* Acquire: pairs with the release in move_tail, so that the cells before it are seen filled, and
   * the head is seen at least where the one who filled them saw it. */
  return atomic_load_explicit(&ring->ends->tail, memory_order_acquire);
}

static inline uint64_t load_head(const ms_ring *ring) {
  /* Acquire: pairs with the release in ms_ring_advance, so that a reader of the tail after the head
   * finds it no further behind than (3) says. */
  return atomic_load_explicit(&ring->ends->head, memory_order_acquire);
}

static inline void move_tail(const ms_ring *ring, uint64_t tail) {
  /* Release: pairs with the acquire in load_tail. Fails when another one moved it for us. */
  atomic_compare_exchange_strong_explicit(&ring->ends->tail, &tail, tail + 1, memory_order_release,
                                          memory_order_relaxed);
}

static inline void move_head(const ms_ring *ring, uint64_t from, uint64_t to) {
  /* Release: pairs with the acquire in load_head of a put, which overwrites the cell: we have read
   * it before. */
  atomic_compare_exchange_strong_explicit(&ring->ends->head, &from, to, memory_order_release,
                                          memory_order_relaxed);
}

bool ms_ring_try_put(const ms_ring *ring, uint64_t hint) {
  const int64_t cell_count = INT64_C(1) << ring->cell_bits;
  for (int64_t attempts = 2 * cell_count + 64; attempts > 0; attempts--) {
    uint64_t tail = load_tail(ring);
    MS_YIELD("ring_put_tail");
    _Atomic uint64_t *cell = cell_at(ring, tail);
    /* Acquire: pairs with the release below, and keeps the second load of the tail behind it. */
    uint64_t found = atomic_load_explicit(cell, memory_order_acquire);
    uint64_t lap = lap_of_ticket(ring, tail);
    MS_YIELD("ring_put_cell");
    if (MS_UNLIKELY(lap_of_cell(found) == lap)) { /* filled, the tail lags: help */
      move_tail(ring, tail);
      continue;
    }
    /* Another lap than the one before: our tail is old, or else the cell is damaged. */
    bool damaged = lap_of_cell(found) != ((lap - 1) & LAP_MASK);
    if (MS_UNLIKELY(damaged) && load_tail(ring) != tail) continue;

    uint64_t head = load_head(ring);
    int64_t used = (int64_t)(tail - head);
    MS_YIELD("ring_put_head");
    if (MS_UNLIKELY(used >= cell_count || used < -1)) {
      if (used == cell_count && !damaged) return false;
      /* Full, and the head stands at a damaged cell, which no consumer gets over: we do. Or an
       * end is damaged: the ring begins anew, empty. */
      if (used >= cell_count || load_tail(ring) == tail)
        move_head(ring, head, used == cell_count ? head + 1 : tail);
      continue;
    }
    /* Release: pairs with the acquire in ms_ring_at: a reader of the hint sees what it speaks of.
     * Succeeds only while the tail is ours: the cell has the lap in it. */
    if (MS_LIKELY(atomic_compare_exchange_strong_explicit(
            cell, &found, lap << MS_RING_HINT_BITS | (hint & HINT_MASK), memory_order_release,
            memory_order_relaxed))) {
      MS_YIELD("ring_put_filled");
      move_tail(ring, tail);
      return true;
    }
  }
  return false;
}

uint64_t ms_ring_head(const ms_ring *ring) { return load_head(ring); }

uint64_t ms_ring_tail(const ms_ring *ring) { return load_tail(ring); }

bool ms_ring_at(const ms_ring *ring, uint64_t ticket, uint64_t *out_hint) {
  MS_YIELD("ring_at");
  /* Acquire: pairs with the release in ms_ring_try_put. */
  uint64_t cell = atomic_load_explicit(cell_at(ring, ticket), memory_order_acquire);
  if (lap_of_cell(cell) != lap_of_ticket(ring, ticket)) return false;
  *out_hint = cell & HINT_MASK;
  return true;
}

void ms_ring_advance(const ms_ring *ring, uint64_t from, uint64_t to) {
  MS_YIELD("ring_advance");
  if ((int64_t)(to - from) > 0) move_head(ring, from, to);
}

bool ms_ring_check(const ms_ring *ring) {
  const uint64_t cell_count = UINT64_C(1) << ring->cell_bits;
  uint64_t tail = load_tail(ring), hint;
  if (ms_ring_at(ring, tail, &hint)) move_tail(ring, tail++);
  if (tail - load_head(ring) > cell_count) return false;
  /* Tickets below 0 have lap 0, as an empty cell has. */
  for (uint64_t ticket = tail - cell_count; ticket != tail; ticket++)
    if (!ms_ring_at(ring, ticket, &hint)) return false;
  return true;
}
