/* Rings and wheel as the queue uses them: hints to READY slots, and to DELAYED ones by their time.
 *
 * Invariant: what is READY or DELAYED has a hint, or a sweep will find that it has none: a caller
 * that could not put one says so (hints->missed), and the tails that sweeps note show where one
 * died before it did. The wheel is under a short word, which is spun for and never waited for.
 * Crash: a dead owner's wheel is emptied and filled anew by the sweep.
 */
#include "ms_hint.h"
#include "ms_due.h"
#include "ms_wait.h"

enum { POP_MAX = 64, WHEEL_SPINS = 200 };

static bool wheel_try_take(ms_queue *queue) {
  uint32_t owner;
  for (int i = 0; i < WHEEL_SPINS; i++) {
    if (ms_owner_try_take(&queue->hints->wheel, queue->self, &owner) == MS_OK) return true;
    ms_cpu_relax();
  }
  return false;
}

void ms_queue_arm(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now) {
  uint64_t tick = ms_tick_floor(now->boot_ns);
  bool taken = wheel_try_take(queue);
  /* Since the move it may have been ended, and the slot have another message, which is in the wheel
   * by its own time. Acquire: pairs with the release in ms_move. */
  if (taken) word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire);
  int64_t left = ms_ticks_until(tick, ms_word_tick(word));
  if (left < 0) left = 0;
  if (!taken) { /* its owner is paused or dead: the sweep finds what is due */
    atomic_store_explicit(&queue->hints->missed, 1, memory_order_relaxed);
    ms_lower(&queue->hints->lease_due, (uint64_t)(now->mono_ns + left * MS_NS_PER_TICK));
    return;
  }
  if (ms_word_state(word) == MS_MESSAGE_DELAYED) {
    ms_wheel_add(&queue->wheel, slot, ms_word_reuse(word), tick + (uint64_t)left);
    atomic_store_explicit(&queue->hints->wheel_due, ms_wheel_next(&queue->wheel),
                          memory_order_release);
  }
  ms_owner_release(&queue->hints->wheel);
}

bool ms_queue_fall_due(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now) {
  /* A long delay is parked by steps; and where the wall clock was set back, `at` is later. */
  int64_t early_us = 0;
  if (ms_word_is_untaken(word)) early_us = ms_slot_left_us(queue, ms_slot_at(queue, slot), now);
  if (early_us > 0) {
    uint64_t later = ms_word_as(word, MS_MESSAGE_DELAYED, ms_tick_after(now, early_us));
    if (ms_move(ms_word_at(queue, slot), word, later))
      atomic_store_explicit(&queue->hints->missed, 1, memory_order_relaxed);
    return false;
  }
  uint64_t to = ms_word_as(word, MS_MESSAGE_READY, ms_tick_floor(now->boot_ns));
  if (!ms_move(ms_word_at(queue, slot), word, to)) return false;
  ms_queue_hint(queue, slot, to);
  return true;
}

uint32_t ms_queue_try_advance(ms_queue *queue, const ms_instant *now, int64_t *out_next_ns) {
  uint64_t tick = ms_tick_floor(now->boot_ns), due;
  uint32_t owner, slots[POP_MAX], popped, ready = 0;
  due = atomic_load_explicit(&queue->hints->wheel_due, memory_order_acquire);
  if (due <= tick && ms_owner_try_take(&queue->hints->wheel, queue->self, &owner) == MS_OK) {
    do {
      popped = ms_wheel_pop(&queue->wheel, tick, slots, POP_MAX);
      for (uint32_t i = 0; i < popped; i++) {
        uint64_t word = atomic_load_explicit(ms_word_at(queue, slots[i]), memory_order_acquire);
        if (ms_word_state(word) != MS_MESSAGE_DELAYED) continue;
        int64_t left = ms_ticks_until(tick, ms_word_tick(word));
        /* The node has all of the tick, the word its end: after months they tell more together. */
        uint64_t due_of_node = queue->wheel.nodes[slots[i]].due;
        if ((due_of_node & MS_TICK_MASK) == ms_word_tick(word) && due_of_node <= tick) left = 0;
        if (left > 0) {
          ms_wheel_add(&queue->wheel, slots[i], ms_word_reuse(word), tick + (uint64_t)left);
        } else {
          ready += ms_queue_fall_due(queue, slots[i], word, now);
        }
      }
    } while (popped == POP_MAX);
    due = ms_wheel_next(&queue->wheel);
    atomic_store_explicit(&queue->hints->wheel_due, due, memory_order_release);
    ms_owner_release(&queue->hints->wheel);
  }
  *out_next_ns =
      due >= (uint64_t)(INT64_MAX / MS_NS_PER_TICK) ? INT64_MAX : (int64_t)due * MS_NS_PER_TICK;
  if (ready) ms_queue_wake(queue, MS_WAIT_MESSAGE, (int32_t)ready);
  return ready;
}
