/* Announcing, sleeping and waking at a queue.
 *
 * Invariant: a sleeper announces itself before it checks for the last time; so a waker whose work
 * came too late for that check sees the announcement, and its wake changes the word that the
 * sleeper sleeps on. Crash: the number of waiters is then too high, until a wake finds nobody
 * asleep.
 */
#include "ms_wait.h"

uint32_t ms_queue_announce(ms_queue *queue, int place) {
  _Atomic uint32_t *waiters, *word = ms_wait_place(queue, place, &waiters);
  uint32_t ticket = atomic_load_explicit(word, memory_order_relaxed);
  MS_YIELD("queue_announce");
  if (atomic_fetch_add_explicit(waiters, 1, memory_order_seq_cst) == UINT32_MAX)
    atomic_fetch_add_explicit(waiters, 1, memory_order_seq_cst); /* never 0 while one waits */
  /* Pairs with the fence in ms_queue_wake: either the waker sees us, or we see what it did. */
  atomic_thread_fence(memory_order_seq_cst);
  return ticket;
}

int ms_queue_sleep(ms_queue *queue, int place, uint32_t ticket, int64_t timeout_ns) {
  _Atomic uint32_t *waiters, *word = ms_wait_place(queue, place, &waiters);
  return ms_futex_wait(word, ticket, timeout_ns);
}

void ms_queue_wake_announced(_Atomic uint32_t *word, _Atomic uint32_t *waiters, uint32_t seen,
                             int32_t count) {
  MS_YIELD("queue_wake");
  atomic_fetch_add_explicit(word, 1, memory_order_seq_cst);
  /* Nobody slept, so the announcements that were seen are of the dead, or of those that will find
   * the word changed: forget them. An announcement since has raised the number, and stays. */
  if (ms_futex_wake(word, count) == 0)
    atomic_compare_exchange_strong_explicit(waiters, &seen, 0, memory_order_seq_cst,
                                            memory_order_relaxed);
}
