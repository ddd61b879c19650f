/* The owner word: the one lock of the system.
 *
 * 32 bits in a mapped file (docs/format.md): 0 is free, otherwise the owner's member index + 1 and
 * the low bits of its incarnation, and one bit that says somebody sleeps on it. It is never taken
 * from the living: a waiter whose slice of waiting ended finds out whether the owner is dead, and
 * takes over only with that proof. Knows members by number alone. All functions are thread-safe;
 * two threads of one process are told apart by whoever holds the GIL or a lock of its own, the word
 * only tells processes apart.
 */
#ifndef MS_OWNER_H
#define MS_OWNER_H

#include "ms_status.h"

#define MS_OWNER_FREE 0u
#define MS_OWNER_WAITERS 0x80000000u
#define MS_OWNER_WAIT_SLICE_NS 10000000 /* 10 ms, then the caller asks whether the owner is alive */

/* The word of a member. index < 32,767. Never 0. */
static inline uint32_t ms_owner_word(uint32_t index, uint32_t incarnation) {
  return (index + 1) | (incarnation & 0xffffu) << 15;
}
static inline uint32_t ms_owner_index(uint32_t word) { return (word & 0x7fffu) - 1; }
static inline uint32_t ms_owner_incarnation(uint32_t word) { return word >> 15 & 0xffffu; }

/* Take the word if it is free. MS_BUSY: *out_owner is what it held. Never blocks. */
static inline ms_status ms_owner_try_take(_Atomic uint32_t *word, uint32_t self,
                                          uint32_t *out_owner) {
  uint32_t found = MS_OWNER_FREE;
  MS_YIELD("owner_try_take");
  /* Acquire: pairs with the release in ms_owner_release, so that we see all that the last owner
   * wrote. */
  if (MS_LIKELY(atomic_compare_exchange_strong_explicit(word, &found, self, memory_order_acquire,
                                                        memory_order_relaxed)))
    return MS_OK;
  *out_owner = found;
  return MS_BUSY;
}

/* Give the word back and wake one sleeper if there may be one. The caller must be the owner. */
static inline void ms_owner_release(_Atomic uint32_t *word) {
  MS_YIELD("owner_release");
  /* Release: pairs with the acquire of the next taker. An exchange, since the waiters bit may have
   * come. */
  if (MS_UNLIKELY(atomic_exchange_explicit(word, MS_OWNER_FREE, memory_order_release) &
                  MS_OWNER_WAITERS))
    ms_futex_wake(word, 1);
}

/* Take the word, spinning shortly, then sleeping at most one slice (or timeout_ns, when that is
 * less). MS_BUSY: *out_owner held it all the time: find out whether it is dead, then call again or
 * ms_owner_take_over(). MS_INTERRUPTED: a signal. Blocks: call without the GIL. */
MS_MUST_USE ms_status ms_owner_wait(_Atomic uint32_t *word, uint32_t self, int64_t timeout_ns,
                                    uint32_t *out_owner);

/* Take the word from an owner that is proved dead. MS_BUSY: it has changed hands since. Never
 * blocks. */
MS_MUST_USE ms_status ms_owner_take_over(_Atomic uint32_t *word, uint32_t self, uint32_t dead,
                                         uint32_t *out_owner);

/* Give a word that was taken over back to its dead owner: what that half did is not mended, and
 * whoever comes next finds the proof again. Wakes nobody. The caller must be the owner. */
void ms_owner_give_back(_Atomic uint32_t *word, uint32_t dead);

#endif
