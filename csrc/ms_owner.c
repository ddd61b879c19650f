/* The slow paths of the owner word.
 *
 * Invariants: (1) the word is changed by compare-and-swap or exchange only. (2) A sleeper has set
 * the waiters bit on the very value it sleeps on, so the release that ends that ownership sees the
 * bit. (3) A sleeper that takes the word keeps the bit, since others may still sleep: at worst one
 * wake too many. Crash: a dead owner's value stays in the word; nothing else remembers the owner.
 */
#include "ms_owner.h"

#include <errno.h>

enum { SPINS = 200 };

static ms_status try_take_keeping(_Atomic uint32_t *word, uint32_t self, uint32_t keep,
                                  uint32_t *out_owner) {
  uint32_t found = atomic_load_explicit(word, memory_order_relaxed);
  if ((found & ~MS_OWNER_WAITERS) == MS_OWNER_FREE) {
    /* Acquire: pairs with the release in ms_owner_release. */
    if (atomic_compare_exchange_strong_explicit(word, &found,
                                                self | keep | (found & MS_OWNER_WAITERS),
                                                memory_order_acquire, memory_order_relaxed))
      return MS_OK;
  }
  *out_owner = found;
  return MS_BUSY;
}

ms_status ms_owner_wait(_Atomic uint32_t *word, uint32_t self, int64_t timeout_ns,
                        uint32_t *out_owner) {
  uint32_t found = 0;
  for (int i = 0; i < SPINS; i++) {
    if (try_take_keeping(word, self, 0, &found) == MS_OK) return MS_OK;
    ms_cpu_relax();
  }
  int64_t slice = MS_OWNER_WAIT_SLICE_NS;
  if (timeout_ns >= 0 && timeout_ns < slice) slice = timeout_ns;
  int64_t end = ms_clock_monotonic_ns() + slice;
  for (;;) {
    MS_YIELD("owner_wait");
    if (try_take_keeping(word, self, MS_OWNER_WAITERS, &found) == MS_OK) return MS_OK;
    if ((found & ~MS_OWNER_WAITERS) == MS_OWNER_FREE) continue;
    if (!(found & MS_OWNER_WAITERS)) {
      if (!atomic_compare_exchange_weak_explicit(word, &found, found | MS_OWNER_WAITERS,
                                                 memory_order_relaxed, memory_order_relaxed))
        continue;
      found |= MS_OWNER_WAITERS;
    }
    int64_t left = end - ms_clock_monotonic_ns();
    if (left <= 0) break;
    if (ms_futex_wait(word, found, left) == EINTR) {
      *out_owner = found & ~MS_OWNER_WAITERS;
      return MS_INTERRUPTED;
    }
  }
  *out_owner = found & ~MS_OWNER_WAITERS;
  return MS_BUSY;
}

ms_status ms_owner_take_over(_Atomic uint32_t *word, uint32_t self, uint32_t dead,
                             uint32_t *out_owner) {
  uint32_t found = atomic_load_explicit(word, memory_order_relaxed);
  while ((found & ~MS_OWNER_WAITERS) == (dead & ~MS_OWNER_WAITERS)) {
    MS_YIELD("owner_take_over");
    /* Acquire: pairs with nothing the dead owner did in order; what it half did is mended by the
     * caller. */
    if (atomic_compare_exchange_weak_explicit(word, &found, self | (found & MS_OWNER_WAITERS),
                                              memory_order_acquire, memory_order_relaxed))
      return MS_OK;
  }
  *out_owner = found & ~MS_OWNER_WAITERS;
  return MS_BUSY;
}

void ms_owner_give_back(_Atomic uint32_t *word, uint32_t dead) {
  uint32_t found = atomic_load_explicit(word, memory_order_relaxed);
  /* Release: pairs with the acquire of the next owner. Sleepers may have come meanwhile. */
  while (!atomic_compare_exchange_weak_explicit(
      word, &found, (dead & ~MS_OWNER_WAITERS) | (found & MS_OWNER_WAITERS), memory_order_release,
      memory_order_relaxed)) {}
}
