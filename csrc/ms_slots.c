/* Claiming slots and blocks, writing and reading what lies in them.
 *
 * Invariants: (1) a slot and its blocks are written by the owner of WRITING alone. (2) A block
 * belongs to the message that its word names, as long as that slot has the same reuse: so no list
 * of free blocks, and nothing to free. Crash: WRITING without its owner is found by a sweep; blocks
 * that it had taken are free again with the slot. Does no waiting, no file, no policy.
 */
#include "ms_slots.h"
#include "ms_xxh3.h"

#include <string.h>

/* --- claiming --- */

bool ms_slot_claim_if_free(ms_queue *queue, uint32_t slot, uint32_t lane, uint64_t *out_word) {
  _Atomic uint64_t *word = ms_word_at(queue, slot);
  uint64_t found = atomic_load_explicit(word, memory_order_relaxed);
  if (ms_word_state(found) != MS_MESSAGE_FREE) return false;
  uint64_t mine =
      ms_make_word(MS_MESSAGE_WRITING, lane, 0, (ms_word_reuse(found) + 1) & 1023, 0, 0) |
      queue->self;
  if (!ms_move(word, found, mine)) return false;
  *out_word = mine;
  return true;
}

/* Claim the first free slot of the extent, from the cursor on. Extents that were mostly free on the
 * last round are kept, so that a queue that is never long stays within a few cache lines. */
static bool claim_in_region(ms_queue *queue, uint32_t count, uint32_t lane, uint32_t *out_slot,
                            uint64_t *out_word) {
  uint32_t begin = queue->region * MS_QUEUE_EXTENT_SLOTS;
  uint32_t end = begin + MS_QUEUE_EXTENT_SLOTS < count ? begin + MS_QUEUE_EXTENT_SLOTS : count;
  for (uint32_t slot = begin + queue->cursor; slot < end; slot++) {
    if (!ms_slot_claim_if_free(queue, slot, lane, out_word)) continue;
    queue->cursor = slot - begin + 1;
    queue->region_taken++;
    *out_slot = slot;
    return true;
  }
  return false;
}

/* Slots past the capacity are there for the dead: more of them help only where the dead have taken
 * what there is. */
static bool growth_helps(const ms_queue *queue, uint32_t count) {
  uint32_t dead = 0;
  for (uint32_t slot = 0; slot < count; slot++)
    dead += ms_word_state(atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed)) ==
            MS_MESSAGE_DEAD;
  return count < queue->slot_max && count < queue->capacity + dead;
}

ms_status ms_slot_claim(ms_queue *queue, uint32_t lane, uint32_t *out_slot, uint64_t *out_word) {
  uint32_t count = ms_slot_count(queue);
  uint32_t extents = (count + MS_QUEUE_EXTENT_SLOTS - 1) / MS_QUEUE_EXTENT_SLOTS;
  if (extents == 0) return MS_GROW_SLOTS;
  if (queue->region >= extents) queue->region %= extents;
  for (uint32_t tried = 0; tried <= extents + 1; tried++) {
    if (MS_LIKELY(claim_in_region(queue, count, lane, out_slot, out_word))) return MS_OK;
    if (queue->region_taken < MS_QUEUE_EXTENT_SLOTS / 4)
      queue->region = (queue->region + 1) % extents;
    queue->cursor = queue->region_taken = 0;
  }
  return growth_helps(queue, count) ? MS_GROW_SLOTS : MS_FULL;
}

/* --- blocks --- */

static bool block_is_free(const ms_queue *queue, uint64_t word, uint32_t count) {
  uint32_t owner = (uint32_t)(word >> 24 & 0x3ffffff);
  if (owner == 0) return true;
  if (owner > count && owner > ms_slot_count(queue)) return true; /* it may have grown since */
  uint64_t slot = atomic_load_explicit(ms_word_at(queue, owner - 1), memory_order_acquire);
  uint32_t state = ms_word_state(slot);
  return state == MS_MESSAGE_FREE || state == MS_MESSAGE_SPARE ||
         ms_word_reuse(slot) != (uint32_t)(word >> 50 & 1023);
}

/* Fill blocks from the content's end, so that each names its successor. Out of line: few messages
 * need it, and what it saves on the stack all others would pay for. */
__attribute__((noinline)) static ms_status write_blocks(ms_queue *queue, uint32_t slot,
                                                        uint32_t reuse, size_t size,
                                                        const ms_message *message,
                                                        uint32_t *out_first) {
  const uint8_t *parts[3] = {message->key, message->headers, message->payload};
  size_t lengths[3] = {message->key_length, message->headers_length, message->payload_length};
  uint32_t block_count =
      queue->blocks ? atomic_load_explicit(&queue->blocks->block_count, memory_order_acquire) : 0;
  if (block_count > queue->block_max) block_count = queue->block_max;
  uint32_t needed = (uint32_t)((size + MS_QUEUE_BLOCK_BYTES - 1) / MS_QUEUE_BLOCK_BYTES);
  uint32_t next = 0, count = ms_slot_count(queue);
  uint32_t tried = 0;
  while (needed > 0) {
    if (tried++ == block_count) return block_count < queue->block_max ? MS_GROW_BLOCKS : MS_FULL;
    if (queue->block_cursor >= block_count) queue->block_cursor = 0;
    uint32_t block = queue->block_cursor++;
    _Atomic uint64_t *word = ms_block_word(queue, block);
    uint64_t found = atomic_load_explicit(word, memory_order_relaxed);
    if (!block_is_free(queue, found, count)) continue;
    uint64_t mine = (uint64_t)next | (uint64_t)(slot + 1) << 24 | (uint64_t)reuse << 50 |
                    ((found >> 60) + 1) << 60; /* a tag, so that no old value comes back */
    if (!ms_move(word, found, mine)) continue;
    needed--;
    uint8_t *out = ms_block_data(queue, block);
    size_t begin = (size_t)needed * MS_QUEUE_BLOCK_BYTES, base = 0;
    for (int i = 0; i < 3; base += lengths[i++]) {
      size_t from = begin > base ? begin - base : 0, to = begin + MS_QUEUE_BLOCK_BYTES;
      if (from >= lengths[i] || to <= base) continue;
      to = to - base < lengths[i] ? to - base : lengths[i];
      memcpy(out + (base + from - begin), parts[i] + from, to - from);
    }
    next = block + 1;
  }
  *out_first = next;
  return MS_OK;
}

/* --- the slot --- */

static uint64_t slot_hash(const ms_queue *queue, const ms_slot *slot, size_t inline_size,
                          uint64_t seed) {
  (void)queue;
  return ms_xxh3_64((const uint8_t *)slot + 8, sizeof(ms_slot) - 8 + inline_size, seed);
}

static size_t content_size(const ms_slot *slot) {
  return (size_t)slot->key_length + slot->headers_length + slot->payload_length;
}

static void copy_part(uint8_t **out, const uint8_t *part, size_t length) {
  if (length) memcpy(*out, part, length);
  *out += length;
}

ms_status ms_slot_write(ms_queue *queue, uint32_t slot, uint64_t word, const ms_message *message,
                        uint64_t id, const ms_instant *now) {
  ms_slot *out = ms_slot_at(queue, slot);
  uint32_t reuse = ms_word_reuse(word);
  uint64_t seed = ms_slot_seed(queue, slot, reuse);
  size_t size = (size_t)message->key_length + message->headers_length + message->payload_length;
  size_t inline_size = size <= queue->slot_bytes - sizeof(ms_slot) ? size : 0;
  uint32_t first_block = 0;
  if (size > inline_size) MS_TRY(write_blocks(queue, slot, reuse, size, message, &first_block));
  MS_POKE(out->id, id);
  MS_POKE(out->put_at, now->time_us);
  MS_POKE(out->due, message->due_us);
  MS_POKE(out->expires, message->expires_us);
  MS_POKE(out->key_hash, message->key_hash);
  MS_POKE(out->dedup[0], message->dedup[0]);
  MS_POKE(out->dedup[1], message->dedup[1]);
  out->payload_length = message->payload_length;
  out->key_length = message->key_length;
  out->headers_length = message->headers_length;
  out->first_block = first_block;
  out->content_hash = 0;
  out->slot = slot;
  out->reuse = (uint16_t)reuse;
  MS_POKE(out->lane, (uint16_t)(message->lane | (message->absolute ? MS_SLOT_ABSOLUTE : 0)));
  MS_YIELD("queue_write_slot");
  if (size == inline_size) {
    uint8_t *content = (uint8_t *)(out + 1);
    copy_part(&content, message->key, message->key_length);
    copy_part(&content, message->headers, message->headers_length);
    copy_part(&content, message->payload, message->payload_length);
  } else { /* over the three parts as they lie: hashes of each, folded */
    out->content_hash = ms_xxh3_64(message->payload, message->payload_length,
                                   ms_xxh3_64(message->headers, message->headers_length,
                                              ms_xxh3_64(message->key, message->key_length, seed)));
  }
  out->hash = slot_hash(queue, out, inline_size, seed);
  return MS_OK;
}

const ms_slot *ms_queue_slot(const ms_queue *queue, uint32_t slot) {
  return ms_slot_at(queue, slot);
}

const uint8_t *ms_queue_inline(const ms_queue *queue, const ms_slot *slot) {
  (void)queue;
  return slot->first_block ? NULL : (const uint8_t *)(slot + 1);
}

_Atomic uint64_t *ms_queue_word(const ms_queue *queue, uint32_t slot) {
  return ms_word_at(queue, slot);
}

bool ms_queue_slot_valid(const ms_queue *queue, uint32_t slot, uint32_t reuse) {
  const ms_slot *found = ms_slot_at(queue, slot);
  size_t room = queue->slot_bytes - sizeof(ms_slot);
  size_t inline_size = found->first_block ? 0 : content_size(found);
  if (inline_size > room || found->reuse != reuse || found->slot != slot) return false;
  return found->hash == slot_hash(queue, found, inline_size, ms_slot_seed(queue, slot, reuse));
}

ms_status ms_queue_copy_content(const ms_queue *queue, uint32_t slot, void *out, size_t size,
                                ms_error *err) {
  const ms_slot *found = ms_slot_at(queue, slot);
  uint32_t key_length = found->key_length, headers_length = found->headers_length;
  uint64_t seed = ms_slot_seed(queue, slot, found->reuse);
  uint32_t block_count =
      queue->blocks ? atomic_load_explicit(&queue->blocks->block_count, memory_order_acquire) : 0;
  if (block_count > queue->block_max) block_count = queue->block_max;
  if (size != content_size(found))
    return ms_fail(err, MS_CORRUPT, slot, size, content_size(found), "slot %u: length", slot);
  uint32_t next = found->first_block;
  for (size_t at = 0; at < size; at += MS_QUEUE_BLOCK_BYTES) {
    if (next == 0 || next > block_count)
      return ms_fail(err, MS_CORRUPT, slot, size, at, "slot %u: its blocks end too early", slot);
    uint64_t word = atomic_load_explicit(ms_block_word(queue, next - 1), memory_order_relaxed);
    if ((word >> 24 & 0x3ffffff) != slot + 1u || (word >> 50 & 1023) != found->reuse)
      return ms_fail(err, MS_CORRUPT, slot, slot, word, "slot %u: block %u is not its own", slot,
                     next - 1);
    size_t piece = size - at < MS_QUEUE_BLOCK_BYTES ? size - at : MS_QUEUE_BLOCK_BYTES;
    memcpy((uint8_t *)out + at, ms_block_data(queue, next - 1), piece);
    next = (uint32_t)(word & 0xffffff);
  }
  const uint8_t *content = out;
  if ((size_t)key_length + headers_length > size)
    return ms_fail(err, MS_CORRUPT, slot, size, key_length, "slot %u: length", slot);
  uint64_t hash = ms_xxh3_64(content, key_length, seed);
  hash = ms_xxh3_64(content + key_length, headers_length, hash);
  hash =
      ms_xxh3_64(content + key_length + headers_length, size - key_length - headers_length, hash);
  if (hash != found->content_hash)
    return ms_fail(err, MS_CORRUPT, slot, found->content_hash, hash, "slot %u: wrong hash", slot);
  return MS_OK;
}

/* Was a message there that is not any more? Then it or a later one lies in the slot. Where neither
 * does, or the word never came to it, the put was lost with the power. */
bool ms_queue_had(const ms_queue *queue, uint32_t slot, uint64_t id) {
  if (slot >= ms_slot_count(queue)) return false;
  const ms_slot *content = ms_slot_at(queue, slot);
  uint64_t found = MS_PEEK(content->id);
  if (found != id) return found > id;
  uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
  return ((ms_word_reuse(word) - content->reuse) & 1023) < 512;
}
