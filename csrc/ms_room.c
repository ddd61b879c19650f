/* Publishing more slots and blocks, and waking those that wait for room.
 *
 * Invariant: a number that is published never falls, and all below it may be touched. Crash: words
 * of slots above the number are of no message; the next to grow sets them anew.
 */
#include "ms_room.h"
#include "ms_ending.h"
#include "ms_slots.h"
#include "ms_wait.h"

void ms_queue_publish_slots(ms_queue *queue, uint32_t slot_count) {
  if (slot_count > queue->slot_max) slot_count = queue->slot_max;
  uint32_t count = atomic_load_explicit(&queue->slots->slot_count, memory_order_relaxed);
  /* Those past the capacity begin as SPARE; balance frees as many as the dead have taken. What a
   * power cut left here, of a growth that it took back, is no message. */
  for (uint32_t slot = count; slot < slot_count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    uint32_t state = slot < queue->capacity ? MS_MESSAGE_FREE : MS_MESSAGE_SPARE;
    (void)ms_move(ms_word_at(queue, slot), word, ms_free_word(word, state));
  }
  /* Release: pairs with the acquire in ms_slot_count. */
  if (slot_count > count)
    atomic_store_explicit(&queue->slots->slot_count, slot_count, memory_order_release);
  ms_queue_balance(queue);
  ms_queue_wake(queue, MS_WAIT_ROOM, INT32_MAX);
}

void ms_queue_publish_blocks(ms_queue *queue, uint32_t block_count) {
  if (!queue->blocks) return;
  if (block_count > queue->block_max) block_count = queue->block_max;
  uint32_t count = atomic_load_explicit(&queue->blocks->block_count, memory_order_relaxed);
  if (block_count > count)
    atomic_store_explicit(&queue->blocks->block_count, block_count, memory_order_release);
  ms_queue_wake(queue, MS_WAIT_ROOM, INT32_MAX);
}
