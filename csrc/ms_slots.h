/* The slots of a queue: where words, messages, failure records and blocks lie; claiming a free
 * slot, writing a message into it, reading it.
 *
 * A slot and its blocks are written by the owner of its word in WRITING alone, before the word says
 * that they may be read. So what is read without a lease counts only if the word is the same after.
 */
#ifndef MS_SLOTS_H
#define MS_SLOTS_H

#include "ms_queue.h"

#define MS_NO_SLOT UINT32_MAX

/* Fields that are read without a lease too: what was read counts once the word has been moved. */
#define MS_PEEK(field) atomic_load_explicit(&(field), memory_order_relaxed)
#define MS_POKE(field, value) atomic_store_explicit(&(field), (value), memory_order_relaxed)

static inline uint8_t *ms_extent(const ms_queue *queue, uint32_t slot) {
  uint64_t stride =
      (uint64_t)MS_QUEUE_EXTENT_SLOTS * (8u + queue->slot_bytes + 2u * sizeof(ms_failure));
  return (uint8_t *)queue->slots + MS_QUEUE_EXTENTS_AT + (slot / MS_QUEUE_EXTENT_SLOTS) * stride;
}

static inline _Atomic uint64_t *ms_word_at(const ms_queue *queue, uint32_t slot) {
  return (_Atomic uint64_t *)(void *)ms_extent(queue, slot) + slot % MS_QUEUE_EXTENT_SLOTS;
}

static inline ms_slot *ms_slot_at(const ms_queue *queue, uint32_t slot) {
  return (ms_slot *)(void *)(ms_extent(queue, slot) + 8u * MS_QUEUE_EXTENT_SLOTS +
                             (size_t)queue->slot_bytes * (slot % MS_QUEUE_EXTENT_SLOTS));
}

static inline ms_failure *ms_failures_at(const ms_queue *queue, uint32_t slot) {
  return (ms_failure *)(void *)(ms_extent(queue, slot) +
                                (8u + (size_t)queue->slot_bytes) * MS_QUEUE_EXTENT_SLOTS) +
         2u * (slot % MS_QUEUE_EXTENT_SLOTS);
}

static inline _Atomic uint64_t *ms_block_word(const ms_queue *queue, uint32_t block) {
  uint64_t stride = (uint64_t)MS_QUEUE_EXTENT_BLOCKS * (8u + MS_QUEUE_BLOCK_BYTES);
  return (_Atomic uint64_t *)(void *)((uint8_t *)queue->blocks + MS_QUEUE_EXTENTS_AT +
                                      block / MS_QUEUE_EXTENT_BLOCKS * stride) +
         block % MS_QUEUE_EXTENT_BLOCKS;
}

static inline uint8_t *ms_block_data(const ms_queue *queue, uint32_t block) {
  uint64_t stride = (uint64_t)MS_QUEUE_EXTENT_BLOCKS * (8u + MS_QUEUE_BLOCK_BYTES);
  return (uint8_t *)queue->blocks + MS_QUEUE_EXTENTS_AT + block / MS_QUEUE_EXTENT_BLOCKS * stride +
         8u * MS_QUEUE_EXTENT_BLOCKS +
         (size_t)MS_QUEUE_BLOCK_BYTES * (block % MS_QUEUE_EXTENT_BLOCKS);
}

/* Slots that may be touched: published, and mapped here. */
static inline uint32_t ms_slot_count(const ms_queue *queue) {
  /* Acquire: pairs with the release in ms_queue_publish_slots, behind the allocation. */
  uint32_t count = atomic_load_explicit(&queue->slots->slot_count, memory_order_acquire);
  return count < queue->slot_max ? count : queue->slot_max;
}

/* Another one of what a total counts (ms_slots_header). */
static inline void ms_total(_Atomic uint64_t *total) {
  atomic_fetch_add_explicit(total, 1, memory_order_relaxed);
}

static inline uint64_t ms_slot_seed(const ms_queue *queue, uint32_t slot, uint32_t reuse) {
  return queue->salt ^ ((uint64_t)slot << 10 | reuse);
}

static inline bool ms_slot_is_absolute(const ms_slot *content) {
  return (MS_PEEK(content->lane) & MS_SLOT_ABSOLUTE) != 0;
}

/* --- a message, and how it comes into a slot --- */

typedef struct ms_message {
  const uint8_t *key;
  const uint8_t *headers;
  const uint8_t *payload;
  uint32_t key_length;
  uint32_t headers_length;
  uint32_t payload_length;
  uint32_t lane;
  int64_t delay_ns;   /* 0: at once */
  int64_t due_us;     /* on the store's clock; 0: at once */
  bool absolute;      /* due_us is a time of the wall clock: delay_ns is as of now */
  int64_t expires_us; /* 0: never */
  uint64_t key_hash;  /* with buckets: which; 0: no key, so in no order. Taken by the caller */
  uint64_t dedup[2];
  uint64_t id;          /* 0: the next; else it was given by a transaction that is done again */
  uint32_t slot;        /* with an id given: it lay here, and gets this slot if that is free */
  uint64_t transaction; /* not 0: PREPARED, until ms_queue_try_decide */
} ms_message;

/* FREE -> WRITING of this slot; false: it is not free. *out_word is the word that it has now. */
bool ms_slot_claim_if_free(ms_queue *queue, uint32_t slot, uint32_t lane, uint64_t *out_word);
/* The same of any free slot. MS_GROW_SLOTS: more slots would help; MS_FULL: they would not. */
MS_MUST_USE ms_status ms_slot_claim(ms_queue *queue, uint32_t lane, uint32_t *out_slot,
                                    uint64_t *out_word);
/* Write the message into the slot and, where it is too long for that, into blocks. The caller has
 * it in WRITING. MS_FULL and MS_GROW_BLOCKS, of blocks. */
MS_MUST_USE ms_status ms_slot_write(ms_queue *queue, uint32_t slot, uint64_t word,
                                    const ms_message *message, uint64_t id, const ms_instant *now);

/* --- reading it --- */

/* The slot's header, and its content (key, headers, payload); NULL when that is in blocks: then
 * ms_queue_copy_content() copies it. Both pointers hold while the lease does. */
const ms_slot *ms_queue_slot(const ms_queue *queue, uint32_t slot);
const uint8_t *ms_queue_inline(const ms_queue *queue, const ms_slot *slot);
MS_MUST_USE ms_status ms_queue_copy_content(const ms_queue *queue, uint32_t slot, void *out,
                                            size_t size, ms_error *err);
/* Does the slot's header and content carry the right hash (content in blocks: see copy)? */
bool ms_queue_slot_valid(const ms_queue *queue, uint32_t slot, uint32_t reuse);
_Atomic uint64_t *ms_queue_word(const ms_queue *queue, uint32_t slot);
/* Was the message with this id ever in this slot: is it there, or is it over? At rest. */
bool ms_queue_had(const ms_queue *queue, uint32_t slot, uint64_t id);

/* Is the word still the token? */
static inline bool ms_queue_holds(const ms_queue *queue, const ms_lease *lease) {
  /* Orders the reads of the content before this load of the word. */
  atomic_thread_fence(memory_order_acquire);
  return atomic_load_explicit(ms_word_at(queue, lease->slot), memory_order_acquire) == lease->word;
}

#endif
