/* The files of a queue and its table of dedup ids: recovered by a first opener into new hints, then
 * worked on until nothing is left, counted and swept.
 *
 * Flags: 1 mends the hashes of slots, 2 of the dedup table's header, 4 orders by key, 8 does not
 * verify (the store was closed in order), 16 blocks a key whose message is dead.
 */
#include "fuzz.h"
#include "ms_claim.h"
#include "ms_count.h"
#include "ms_decide.h"
#include "ms_delivery.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_recover.h"
#include "ms_sweep.h"

enum { SLOT_BYTES = 256, CAPACITY = 40, DEAD_LIMIT = 6, LANES = 3, BLOCKS = 16, STRIPES = 2 };
enum { SLOTS = CAPACITY + DEAD_LIMIT, ROUNDS = SLOTS + 8 };

static void mend_slots(ms_queue *queue) {
  for (uint32_t i = 0; i < SLOTS; i++) {
    ms_slot *slot = (ms_slot *)(uintptr_t)ms_queue_slot(queue, i);
    uint64_t content = (uint64_t)slot->key_length + slot->headers_length + slot->payload_length;
    bool in_slot = content <= SLOT_BYTES - sizeof(ms_slot);
    uint64_t seed = queue->salt ^ ((uint64_t)i << 10 | slot->reuse);
    uint64_t hashed = sizeof(ms_slot) - 8 + (in_slot ? content : 0);
    slot->hash = ms_xxh3_64((const uint8_t *)slot + 8, hashed, seed);
  }
}

static void work(ms_queue *queue, ms_instant *now) {
  ms_error err;
  ms_lease lease;
  uint32_t owner;
  int64_t next;
  static uint8_t content[1 << 20];
  for (int i = 0; i < ROUNDS; i++) {
    now->mono_ns += 1000000000;
    now->boot_ns += 1000000000;
    now->time_us += 1000000;
    ms_queue_try_advance(queue, now, &next);
    ms_queue_sweep(queue, now, NULL, 0);
    if (ms_queue_try_get(queue, 500, now, NULL, &lease) != MS_OK) break;
    const ms_slot *slot = ms_queue_slot(queue, lease.slot);
    uint64_t size = (uint64_t)slot->key_length + slot->headers_length + slot->payload_length;
    const uint8_t *in_slot = ms_queue_inline(queue, slot);
    if (in_slot != NULL && size > 0) content[0] = in_slot[size - 1];
    if (in_slot == NULL && size <= 1 << 20)
      (void)!ms_queue_copy_content(queue, lease.slot, content, (size_t)size, &err);
    bool dead;
    if (i % 4 == 0)
      (void)!ms_queue_try_nack(queue, &lease, 1000, MS_FAILED, "x", 1, now, &dead, &owner);
    else if (i % 4 == 1)
      (void)!ms_queue_try_reject(queue, &lease, MS_FAILED_REJECTED, "x", 1, now, &owner);
    else if (i % 4 == 2)
      (void)!ms_queue_try_release(queue, &lease, 0, now);
    (void)!ms_queue_try_ack(queue, &lease, now, &owner);
  }
  ms_message message = {.payload = content, .payload_length = 5000, .key_hash = 9};
  if (queue->dedup != NULL) message.dedup[0] = message.dedup[1] = 5;

  memset(content, 1, 5000);
  (void)!ms_queue_try_put(queue, &message, now, &lease, &owner, &err);
  for (uint32_t i = 0; i < queue->slots->slot_count; i++) {
    ms_failure failure;
    uint64_t word = *ms_queue_word(queue, i);
    (void)ms_queue_failure(queue, i, ms_queue_slot(queue, i)->id, &failure);
    (void)ms_queue_had(queue, i, 1);
    if (i % 3 == 0)
      (void)!ms_queue_try_redrive(queue, i, word, now, &owner);
    else if (i % 3 == 1)
      (void)!ms_queue_try_cancel(queue, i, word, now, &owner);
    else
      (void)!ms_queue_try_decide(queue, i, word, i % 2, now, &owner);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  uint8_t flags = *data++;
  size--;
  uint64_t sizes[3] = {ms_slots_size(SLOT_BYTES, SLOTS), ms_blocks_size(BLOCKS),
                       ms_dedup_size(STRIPES)};
  uint64_t start[3] = {0, (sizes[0] + 4095) / 4096 * 4096, 0};
  start[2] = start[1] + (sizes[1] + 4095) / 4096 * 4096;
  uint64_t whole = start[2] + sizes[2], hints_size = ms_hints_size(SLOTS, LANES, (flags & 4) != 0);
  static void *files, *plain_hints, *ordered_hints;
  uint8_t *bytes = zeros_again(&files, whole);
  uint8_t *hints = zeros_again(flags & 4 ? &ordered_hints : &plain_hints, hints_size);
  while (piece(bytes, whole, &data, &size)) {}
  ms_error err;
  ms_queue queue = {.slots = (ms_slots_header *)(void *)bytes,
                    .blocks = (ms_blocks_header *)(void *)(bytes + start[1]),
                    .hints = (ms_hints_header *)(void *)hints,
                    .slot_bytes = SLOT_BYTES,
                    .slot_max = SLOTS,
                    .capacity = CAPACITY,
                    .dead_limit = DEAD_LIMIT,
                    .block_max = BLOCKS,
                    .lanes = LANES,
                    .self = 1u | 7u << 15,
                    .max_attempts = 3,
                    .block_key = (flags & 16) != 0,
                    .dedup_window_us = 1000000};
  queue.salt = queue.slots->salt;
  queue.hints->slot_max = SLOTS;
  queue.hints->lanes = LANES;
  queue.hints->cell_bits = 7;
  queue.hints->ordered = (flags & 4) != 0;
  /* What the layer above checks before it calls us (queues/slots.py). */
  if (queue.slots->slot_count > SLOTS) queue.slots->slot_count = SLOTS;
  if (queue.blocks->block_count > BLOCKS) queue.blocks->block_count = BLOCKS;
  if (ms_queue_attach(&queue, sizes[0], sizes[1], hints_size, &err) != MS_OK) abort();
  if (flags & 1) mend_slots(&queue);
  ms_instant now = {INT64_C(5000000000), INT64_C(9000000000), INT64_C(1700000000000000)};
  void *scratch = malloc(ms_queue_scratch_size(&queue));
  if (scratch == NULL) abort();
  ms_queue_recover(&queue, !(flags & 8), &now, scratch);
  free(scratch);
  ms_dedup table;
  ms_dedup_header *header = (ms_dedup_header *)(void *)(bytes + start[2]);
  if (flags & 2) {
    header->stripes = STRIPES;
    header->checksum = ms_xxh3_64(header, offsetof(ms_dedup_header, checksum), 0);
  }
  if (ms_dedup_open(&table, header, sizes[2], header->store_id, header->queue_id, &err) == MS_OK) {
    ms_dedup_recover(&table);
    ms_queue_use_dedup(&queue, &table);
    (void)!ms_queue_recover_claims(&queue, &now);
    if (!ms_dedup_check(&table)) abort();
  }
  work(&queue, &now);
  ms_queue_counts counts;
  ms_queue_count(&queue, &counts);
  char text[200];
  (void)!ms_queue_check(&queue, text, sizeof text);
  return 0;
}
