/* When: the clocks of a queue, and what the times in slots and words mean by them.
 *
 * A lease ends on the monotonic clock; a delay, a time to live and a failure record are of the
 * store's clock (docs/design.md, Time); `due` of an absolute message alone is of the wall clock.
 */
#ifndef MS_DUE_H
#define MS_DUE_H

#include "ms_slots.h"

void ms_now(const ms_queue *queue, ms_instant *out_now);
/* mono as it is; boot from mono by an offset that is at most 50 ms old: one clock is read, and boot
 * is never ahead of the truth. */
void ms_now_near(ms_queue *queue, ms_instant *out_now);

/* then - now, without overflow where one of them is damage. */
static inline int64_t ms_until_us(int64_t then, int64_t now) {
  int64_t left;
  if (MS_LIKELY(!__builtin_sub_overflow(then, now, &left))) return left;
  return then > 0 ? INT64_MAX : INT64_MIN;
}

/* The tick at which left_us have passed: never early, at most MS_TICK_REACH from now. */
static inline uint64_t ms_tick_after(const ms_instant *now, int64_t left_us) {
  if (left_us > MS_TICK_REACH * 1000) left_us = MS_TICK_REACH * 1000;
  return ms_tick_ceil(now->boot_ns + left_us * 1000);
}

/* What a time in a file counts as: itself, unless the store's clock cannot have given it. */
int64_t ms_stamp(const ms_queue *queue, int64_t stamp, int64_t time_us);
/* Microseconds until a message that was never leased is due; 0 or less: it is. */
int64_t ms_slot_left_us(const ms_queue *queue, const ms_slot *content, const ms_instant *now);
/* When it expires, on the store's clock; 0: never. */
int64_t ms_slot_expiry(const ms_queue *queue, const ms_slot *content, const ms_instant *now);

/* Before a message becomes visible that waits for a time of the wall clock: from now on sweeps see
 * to it that the clock is set. */
void ms_queue_note_wall(ms_queue *queue, const ms_slot *content);
/* Has the wall clock been set since? *out_offset: to note when all that depends on it was seen. */
bool ms_queue_wall_was_set(const ms_queue *queue, int64_t *out_offset);

/* Is a lease over? The holder can always tell, also before another takes the message back. */
static inline bool ms_lease_is_over(const ms_lease *lease, const ms_instant *now) {
  return ms_ticks_until(ms_tick_floor(now->mono_ns), ms_word_tick(lease->word)) < 0;
}

/* State and tick that a message has which may be taken after delay_ns: never early. */
static inline uint64_t ms_waiting_word(uint64_t word, uint32_t state, int64_t delay_ns,
                                       const ms_instant *now) {
  if (delay_ns <= 0) return ms_word_as(word, state, ms_tick_floor(now->boot_ns));
  int64_t reach = MS_TICK_REACH * MS_NS_PER_TICK;
  return ms_word_as(word, state == MS_MESSAGE_HELD ? state : MS_MESSAGE_DELAYED,
                    ms_tick_ceil(now->boot_ns + (delay_ns < reach ? delay_ns : reach)));
}

/* Bring forward when something is due. */
static inline void ms_lower(_Atomic uint64_t *due, uint64_t value) {
  uint64_t found = atomic_load_explicit(due, memory_order_relaxed);
  while (value < found && !atomic_compare_exchange_weak_explicit(
                              due, &found, value, memory_order_relaxed, memory_order_relaxed)) {}
}

/* After a message came where it can expire: a sweep is due when its time is over. No sweep minds
 * that while it is leased. */
static inline void ms_queue_lower_expiry(ms_queue *queue, uint32_t slot) {
  int64_t expires = MS_PEEK(ms_slot_at(queue, slot)->expires);
  if (expires) ms_lower(&queue->hints->expiry_due, (uint64_t)expires);
}

#endif
