/* The clocks of a queue, and times that a clock cannot have given.
 *
 * Stored times are of the store's clock, which runs on: one that lies a day ahead of it, or before
 * any machine of today, was of a wrong wall clock, and counts as when the store's clock began.
 * Only while a message waits for a time of the wall clock is that clock read.
 */
#include "ms_due.h"

enum { OFFSET_NS = 50000000, WALL_SET_US = 10000 };

#define DAY_US INT64_C(86400000000)
#define LEAST_TIME_US INT64_C(1577836800000000) /* 2020: a clock that is before it was never set */

void ms_now(const ms_queue *queue, ms_instant *out_now) {
  out_now->mono_ns = ms_clock_monotonic_ns();
  out_now->boot_ns = ms_clock_boot_ns();
  out_now->time_us = out_now->boot_ns / 1000 + queue->clock_offset_us;
}

void ms_now_near(ms_queue *queue, ms_instant *out_now) {
  int64_t mono = ms_clock_monotonic_ns();
  if (MS_UNLIKELY(mono - queue->offset_at > OFFSET_NS || mono < queue->offset_at)) {
    ms_instant now;
    ms_now(queue, &now);
    mono = now.mono_ns;
    queue->offset_at = mono;
    queue->boot_offset = now.boot_ns - mono;
  }
  out_now->mono_ns = mono;
  out_now->boot_ns = mono + queue->boot_offset;
  out_now->time_us = out_now->boot_ns / 1000 + queue->clock_offset_us;
}

int64_t ms_stamp(const ms_queue *queue, int64_t stamp, int64_t time_us) {
  if (MS_UNLIKELY(stamp > time_us + DAY_US)) { /* or time_us was read by who slept for a day */
    ms_instant now;
    ms_now(queue, &now);
    return stamp > now.time_us + DAY_US ? queue->clock_since_us : stamp;
  }
  bool unset = stamp < LEAST_TIME_US && queue->clock_since_us >= LEAST_TIME_US;
  return MS_UNLIKELY(unset) ? queue->clock_since_us : stamp;
}

/* `time` of a slot, moved as far as the time of its put is. */
static int64_t moved(const ms_queue *queue, const ms_slot *content, int64_t time,
                     const ms_instant *now) {
  int64_t put_at = MS_PEEK(content->put_at), counts = ms_stamp(queue, put_at, now->time_us);
  return MS_LIKELY(counts == put_at) ? time : ms_until_us(time, ms_until_us(put_at, counts));
}

int64_t ms_slot_left_us(const ms_queue *queue, const ms_slot *content, const ms_instant *now) {
  int64_t due = MS_PEEK(content->due);
  if (due == 0) return 0;
  if (ms_slot_is_absolute(content)) return ms_until_us(due, ms_clock_wall_us());
  return ms_until_us(moved(queue, content, due, now), now->time_us);
}

int64_t ms_slot_expiry(const ms_queue *queue, const ms_slot *content, const ms_instant *now) {
  int64_t expires = MS_PEEK(content->expires);
  return expires == 0 ? 0 : moved(queue, content, expires, now);
}

static int64_t wall_offset(void) { return ms_clock_wall_us() - ms_clock_boot_ns() / 1000; }

void ms_queue_note_wall(ms_queue *queue, const ms_slot *content) {
  if (MS_LIKELY(!ms_slot_is_absolute(content)) || MS_PEEK(queue->hints->absolute)) return;
  MS_POKE(queue->hints->wall_offset, wall_offset());
  /* Release: pairs with the acquire in ms_queue_wall_was_set. */
  atomic_store_explicit(&queue->hints->absolute, 1, memory_order_release);
}

bool ms_queue_wall_was_set(const ms_queue *queue, int64_t *out_offset) {
  if (MS_LIKELY(!atomic_load_explicit(&queue->hints->absolute, memory_order_acquire))) return false;
  *out_offset = wall_offset();
  int64_t by = *out_offset - MS_PEEK(queue->hints->wall_offset);
  return by > WALL_SET_US || by < -WALL_SET_US; /* less lies between two readings of clocks */
}
