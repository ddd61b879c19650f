/* Counting messages, finding one, and the check of the invariants.
 *
 * Each is one pass over the words. Beside others it sees each word as it was at some moment of the
 * pass: the sum is exact at rest alone. Changes nothing, also where there are no hints.
 */
#include "ms_count.h"
#include "ms_slots.h"

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

static void count_states(const ms_queue *queue, const ms_instant *now, const uint32_t *living,
                         ms_queue_counts *out) {
  memset(out, 0, sizeof(*out));
  uint32_t count = ms_slot_count(queue), by_state[32] = {0};
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    uint32_t state = ms_word_state(word);
    if (living) state = ms_queue_state_swept(queue, slot, word, now, living);
    by_state[state]++;
    if (state == MS_MESSAGE_READY) out->by_lane[ms_word_lane(word)]++;
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
