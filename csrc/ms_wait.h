/* Waiting at a queue: announce that one will, check again, sleep; wake those who did.
 *
 * Three places: getters (a message), putters (room), join (all is finished). A waker that finds
 * nobody announced costs a fence and a load. A sleeper may be woken for nothing, and checks again.
 */
#ifndef MS_WAIT_H
#define MS_WAIT_H

#include "ms_queue.h"

enum { MS_WAIT_MESSAGE, MS_WAIT_ROOM, MS_WAIT_FINISHED };

/* Where sleepers of a place sleep, and how many announced themselves. */
static inline _Atomic uint32_t *ms_wait_place(const ms_queue *queue, int place,
                                              _Atomic uint32_t **out_waiters) {
  ms_hints_header *hints = queue->hints;
  *out_waiters = place == MS_WAIT_MESSAGE ? &hints->waiters
                 : place == MS_WAIT_ROOM  ? &hints->room_waiters
                                          : &hints->finished_waiters;
  return place == MS_WAIT_MESSAGE ? &hints->wake
         : place == MS_WAIT_ROOM  ? &hints->room
                                  : &hints->finished;
}

/* Say that one will wait; check again after it, then sleep with the ticket. */
uint32_t ms_queue_announce(ms_queue *queue, int place);
/* Sleep at most timeout_ns. 0 or an errno (EINTR, ETIMEDOUT). Without the GIL. */
int ms_queue_sleep(ms_queue *queue, int place, uint32_t ticket, int64_t timeout_ns);
/* Wake up to count who announced themselves: the slow part, where `seen` of them, not 0, did. */
void ms_queue_wake_announced(_Atomic uint32_t *word, _Atomic uint32_t *waiters, uint32_t seen,
                             int32_t count);
/* Wake up to count who announced themselves. */
static inline void ms_queue_wake(ms_queue *queue, int place, int32_t count) {
  _Atomic uint32_t *waiters, *word = ms_wait_place(queue, place, &waiters);
  atomic_thread_fence(memory_order_seq_cst); /* pairs with the one in ms_queue_announce */
  uint32_t seen = atomic_load_explicit(waiters, memory_order_relaxed);
  if (MS_UNLIKELY(seen != 0)) ms_queue_wake_announced(word, waiters, seen, count);
}

/* After a move to FREE: wake those that wait for room, or for the end. The move of a word is
 * sequentially consistent: so are these loads, and the fence in ms_queue_announce: either we see
 * the waiter, or they see the word. */
static inline void ms_queue_say_freed(ms_queue *queue) {
  if (MS_UNLIKELY(atomic_load(&queue->hints->room_waiters))) ms_queue_wake(queue, MS_WAIT_ROOM, 1);
  if (MS_UNLIKELY(atomic_load(&queue->hints->finished_waiters)))
    ms_queue_wake(queue, MS_WAIT_FINISHED, INT32_MAX);
}

#endif
