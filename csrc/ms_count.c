/* Counting messages, finding one, and the check of the invariants.
 *
 * Each is one pass over the words. Beside others it sees each word as it was at some moment of the
 * pass: the sum is exact at rest alone. Changes nothing, also where there are no hints.
 */
#include "ms_count.h"
#include "ms_due.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

uint32_t ms_queue_state_swept(const ms_queue *queue, uint32_t slot, uint64_t word,
                              const ms_instant *now, const uint32_t *living) {
  if (ms_word_state(word) != MS_MESSAGE_LEASED) return ms_word_state(word);
  if (ms_ticks_until(ms_tick_floor(now->mono_ns), ms_word_tick(word)) > 0) {
    uint64_t owner = atomic_load_explicit(&queue->owners[slot], memory_order_relaxed);
    uint32_t index = ms_owner_index((uint32_t)(owner >> 16));
    bool known = (owner & 0xffff) == (word >> 34 & 0xffff) && owner >> 16 != 0;
    /* A process that takes over the number of a dead one ends its leases first: see take_part(). */
    if (known && index < MS_MEMBER_COUNT_MAX && living[index] == (uint32_t)(owner >> 16))
      return MS_MESSAGE_LEASED;
    /* Its holder has not said yet who it is: any of those that live. */
    for (uint32_t i = 0; !known && i < MS_MEMBER_COUNT_MAX; i++)
      if (living[i]) return MS_MESSAGE_LEASED;
  }
  return ms_word_attempts(word) >= queue->max_attempts ? MS_MESSAGE_DEAD : MS_MESSAGE_READY;
}

/* For how long a READY message waits: since it was put or due, where it was never leased, else
 * since its last lease ended. -1: it is not there any more. */
static int64_t waits_us(const ms_queue *queue, uint32_t slot, uint64_t word,
                        const ms_instant *now) {
  const ms_slot *content = ms_slot_at(queue, slot);
  int64_t waits = 1000 * ms_ticks_until(ms_word_tick(word), ms_tick_floor(now->boot_ns));
  if (ms_word_is_untaken(word)) {
    int64_t left = ms_slot_left_us(queue, content, now);
    waits = ms_until_us(now->time_us, ms_stamp(queue, MS_PEEK(content->put_at), now->time_us));
    if (MS_PEEK(content->due) && left > INT64_MIN && -left < waits) waits = -left;
  }
  const ms_lease read = {word, 0, slot};
  if (!ms_queue_holds(queue, &read)) return -1;
  return waits > 0 ? waits : 0;
}

enum { HINTS_TRIED = 64 };

/* The first that is READY of a lane, by its hints. */
static bool first_of_lane(const ms_queue *queue, uint32_t lane, uint32_t *out_slot,
                          uint64_t *out_word) {
  const ms_ring *ring = &queue->rings[lane];
  uint64_t hint, head = ms_ring_head(ring);
  for (uint32_t i = 0; i < HINTS_TRIED && ms_ring_at(ring, head + i, &hint); i++) {
    *out_slot = (uint32_t)(hint >> 10);
    if (*out_slot >= ms_slot_count(queue)) continue;
    *out_word = atomic_load_explicit(ms_word_at(queue, *out_slot), memory_order_acquire);
    if (ms_word_state(*out_word) == MS_MESSAGE_READY && ms_word_reuse(*out_word) == (hint & 1023))
      return true;
  }
  return false;
}

/* Of those that are READY since the same tick the first, by id: for who has no hints. */
static void first_by_id(const ms_queue *queue, uint32_t *io_slot, uint64_t *io_word) {
  uint64_t lowest = UINT64_MAX, tick = ms_word_tick(*io_word);
  for (uint32_t slot = 0, count = ms_slot_count(queue); slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire);
    if (ms_word_state(word) != MS_MESSAGE_READY || ms_word_tick(word) != tick) continue;
    uint64_t id = MS_PEEK(ms_slot_at(queue, slot)->id);
    if (id >= lowest) continue;
    lowest = id;
    *io_slot = slot;
    *io_word = word;
  }
}

/* The one that is READY since the oldest tick, or the first of a lane: the ticks of all begin anew
 * when a store is opened by its first process, their order stays. */
static int64_t oldest_us(const ms_queue *queue, uint32_t slot, uint64_t word,
                         const ms_instant *now) {
  int64_t oldest = -1;
  uint32_t first;
  uint64_t found;
  for (uint32_t lane = 0; queue->hints && lane < queue->lanes; lane++) {
    if (!first_of_lane(queue, lane, &first, &found)) continue;
    int64_t waits = waits_us(queue, first, found, now);
    if (waits > oldest) oldest = waits;
  }
  if (oldest < 0) first_by_id(queue, &slot, &word);
  int64_t waits = waits_us(queue, slot, word, now);
  return waits > oldest ? waits : oldest;
}

static uint64_t less(uint64_t from, uint64_t count) { return from > count ? from - count : 0; }

static void count_states(const ms_queue *queue, const ms_instant *now, const uint32_t *living,
                         ms_queue_counts *out) {
  memset(out, 0, sizeof(*out));
  uint32_t count = ms_slot_count(queue), by_state[32] = {0}, oldest = MS_NO_SLOT;
  uint64_t next_id = MS_PEEK(queue->slots->next_id), oldest_word = 0;
  uint64_t tick = now ? ms_tick_floor(now->boot_ns) : 0;
  int64_t oldest_ticks = INT64_MIN;
  /* The ids before the words: what is put meanwhile stands, and is not counted as done. */
  atomic_thread_fence(memory_order_acquire);
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    uint32_t state = ms_word_state(word);
    if (living) state = ms_queue_state_swept(queue, slot, word, now, living);
    by_state[state]++;
    if (state != MS_MESSAGE_READY) continue;
    out->by_lane[ms_word_lane(word)]++;
    if (now == NULL) continue;
    int64_t ticks = ms_ticks_until(ms_word_tick(word), tick);
    if (ticks <= oldest_ticks || ms_word_state(word) != MS_MESSAGE_READY) continue;
    oldest_ticks = ticks;
    oldest = slot;
    oldest_word = word;
  }
  out->ready = by_state[MS_MESSAGE_READY];
  out->delayed = by_state[MS_MESSAGE_DELAYED];
  out->held = by_state[MS_MESSAGE_HELD];
  out->leased = by_state[MS_MESSAGE_LEASED];
  out->writing = by_state[MS_MESSAGE_WRITING];
  out->dead = by_state[MS_MESSAGE_DEAD];
  out->spare = by_state[MS_MESSAGE_SPARE];
  out->free = by_state[MS_MESSAGE_FREE];
  out->prepared = by_state[MS_MESSAGE_PREPARED];
  out->acking = by_state[MS_MESSAGE_ACKING];
  out->invalid = count - out->ready - out->delayed - out->held - out->leased - out->writing -
                 out->dead - out->spare - out->free - out->prepared - out->acking;
  out->oldest_us = -1;
  if (now == NULL) return;
  if (oldest != MS_NO_SLOT) out->oldest_us = oldest_us(queue, oldest, oldest_word, now);
  atomic_thread_fence(memory_order_acquire); /* the words before what has ended */
  const ms_slots_header *slots = queue->slots;
  uint64_t from = MS_PEEK(slots->counted_from), withdrawn = MS_PEEK(slots->withdrawn);
  uint64_t otherwise =
      MS_PEEK(slots->expired) + MS_PEEK(slots->evicted) + MS_PEEK(slots->cancelled);
  if (from == 0) return; /* no process of this version has opened it to write */
  out->put = less(less(next_id, from), withdrawn);
  out->done = less(out->put, otherwise + (count - out->free - out->spare));
}

void ms_queue_count(const ms_queue *queue, ms_queue_counts *out) {
  count_states(queue, NULL, NULL, out);
}

void ms_queue_count_swept(const ms_queue *queue, const ms_instant *now, const uint32_t *living,
                          ms_queue_counts *out) {
  count_states(queue, now, living, out);
}

uint32_t ms_queue_never_leased(const ms_queue *queue, uint32_t *out_slot, uint64_t *out_word) {
  uint32_t count = ms_slot_count(queue), found = 0;
  uint64_t lowest = UINT64_MAX;
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire);
    if (ms_word_state(word) != MS_MESSAGE_READY || ms_word_attempts(word)) continue;
    uint64_t id = MS_PEEK(ms_slot_at(queue, slot)->id);
    if (found++ && id >= lowest) continue;
    lowest = id;
    *out_slot = slot;
    *out_word = word;
  }
  return found;
}

uint32_t ms_queue_find(const ms_queue *queue, uint64_t id, uint64_t *out_word) {
  uint32_t count = ms_slot_count(queue);
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire);
    uint32_t state = ms_word_state(word);
    if (state == MS_MESSAGE_FREE || state == MS_MESSAGE_SPARE || state == MS_MESSAGE_WRITING)
      continue;
    if (MS_PEEK(ms_slot_at(queue, slot)->id) != id) continue;
    *out_word = word;
    return slot;
  }
  return MS_NO_SLOT;
}

/* --- the check --- */

static bool complain(char *text, size_t size, const char *what, uint32_t slot, uint64_t word) {
  if (size)
    (void)snprintf(text, size, "slot %" PRIu32 ", word %016" PRIx64 ": %s", slot, word, what);
  return false;
}

bool ms_queue_check(const ms_queue *queue, char *text, size_t size) {
  ms_queue_counts counts;
  ms_queue_count(queue, &counts);
  uint32_t count = ms_slot_count(queue);
  if (counts.invalid) return complain(text, size, "a state that there is not", 0, counts.invalid);
  uint32_t unfinished = count - counts.free - counts.spare - counts.dead;
  if (unfinished > queue->capacity)
    return complain(text, size, "more messages than the capacity", 0, unfinished);
  if (counts.dead > queue->dead_limit)
    return complain(text, size, "more dead letters than dead_limit", 0, counts.dead);
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire);
    uint32_t state = ms_word_state(word);
    if (state == MS_MESSAGE_FREE || state == MS_MESSAGE_SPARE || state == MS_MESSAGE_WRITING)
      continue;
    if (ms_word_lane(word) >= queue->lanes) return complain(text, size, "no such lane", slot, word);
    if (state == MS_MESSAGE_DEAD) continue; /* may be what a power cut tore */
    if (!ms_queue_slot_valid(queue, slot, ms_word_reuse(word)))
      return complain(text, size, "its slot holds something else", slot, word);
  }
  for (uint32_t i = 0; queue->hints && i < queue->lanes; i++)
    if (!ms_ring_check(&queue->rings[i])) return complain(text, size, "a ring is damaged", i, 0);
  if (queue->hints && !ms_wheel_check(&queue->wheel))
    return complain(text, size, "the wheel is damaged", 0, 0);
  return true;
}
