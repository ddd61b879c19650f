/* Claims of deduplication ids by messages of a queue.
 *
 * A claim in the table is PENDING from when its message has a slot until the message is visible,
 * then DONE. Invariants: (1) whoever frees a visible message makes its claim DONE first: a claim
 * that is PENDING while its message is not visible was never delivered, and is void. (2) A claim
 * names the slot, so that what became of its message is seen there without a search.
 * Crash: a putter that dies leaves PENDING. Whoever meets that reads the slot: visible, so it is
 * DONE; WRITING, so it asks whether that owner lives; else void.
 * Knows the words of slots and the table of ms_dedup; neither waits nor allocates.
 */
#include "ms_claim.h"
#include "ms_due.h"

static ms_dedup *table_of(const ms_queue *queue) {
  /* Acquire: pairs with the release of ms_queue_use_dedup, behind the table's pointers. */
  return atomic_load_explicit(&queue->dedup, memory_order_acquire);
}

void ms_queue_use_dedup(ms_queue *queue, ms_dedup *table) {
  atomic_store_explicit(&queue->dedup, table, memory_order_release);
}

/* To the caller a table that was replaced is a busy word: it maps the new one and tries again. */
static ms_status moved_as_busy(ms_status status, uint32_t *out_owner) {
  if (status != MS_MOVED) return status;
  *out_owner = MS_OWNER_FREE;
  return MS_BUSY;
}

/* State of the message that made a claim: 0, where it has none, else that of its word. */
static uint32_t read_message(const ms_queue *queue, const ms_dedup_claim *claim,
                             uint64_t *out_word) {
  if (claim->slot >= ms_slot_count(queue)) return MS_MESSAGE_FREE;
  _Atomic uint64_t *at = ms_word_at(queue, claim->slot);
  /* Acquire: pairs with the release in ms_move that made it visible. */
  *out_word = atomic_load_explicit(at, memory_order_acquire);
  uint32_t state = ms_word_state(*out_word);
  if (state == MS_MESSAGE_FREE || state == MS_MESSAGE_SPARE) return MS_MESSAGE_FREE;
  if (state == MS_MESSAGE_WRITING) return state;
  uint64_t id = MS_PEEK(ms_slot_at(queue, claim->slot)->id);
  atomic_thread_fence(memory_order_acquire); /* the id before the second load */
  uint64_t again = atomic_load_explicit(at, memory_order_relaxed);
  /* Freed and taken anew in between: the id may be that of the writer now. */
  if (ms_word_reuse(again) != ms_word_reuse(*out_word)) return MS_MESSAGE_FREE;
  return id == claim->id ? state : MS_MESSAGE_FREE;
}

/* Judge a claim that is there. MS_END: it stands. MS_OK: it was void, and is gone. */
static ms_status judge(ms_queue *queue, const uint64_t key[2], const ms_dedup_claim *claim,
                       uint32_t *out_owner) {
  uint64_t word = 0;
  if (claim->state == MS_DEDUP_DONE) return MS_END;
  uint32_t state = read_message(queue, claim, &word);
  /* By its putter, or by another one since: a moment tells; so it does of a transaction. */
  if (state == MS_MESSAGE_WRITING || state == MS_MESSAGE_PREPARED) {
    *out_owner = state == MS_MESSAGE_WRITING ? (uint32_t)word & 0x7fffffff : queue->self;
    return MS_BUSY;
  }
  ms_status status = ms_dedup_try_end(table_of(queue), queue->self, key, claim->id,
                                      state != MS_MESSAGE_FREE, out_owner);
  if (status == MS_BUSY || status == MS_MOVED) return moved_as_busy(status, out_owner);
  return state == MS_MESSAGE_FREE ? MS_OK : MS_END;
}

ms_status ms_claim_find(ms_queue *queue, const uint64_t key[2], const ms_instant *now,
                        uint64_t *out_id, uint32_t *out_owner) {
  ms_dedup_claim there;
  ms_status status =
      ms_dedup_try_find(table_of(queue), queue->self, key, now->time_us, &there, out_owner);
  if (status == MS_END) return MS_OK;
  if (status != MS_OK) return moved_as_busy(status, out_owner);
  *out_id = there.id;
  return judge(queue, key, &there, out_owner);
}

ms_status ms_claim_make(ms_queue *queue, const uint64_t key[2], uint64_t id, uint32_t slot,
                        const ms_instant *now, uint64_t *out_id, uint32_t *out_owner) {
  ms_dedup_claim there,
      claim = {.id = id, .slot = slot, .expires = now->time_us + queue->dedup_window_us};
  for (;;) {
    ms_status status = ms_dedup_try_claim(table_of(queue), queue->self, key, &claim, now->time_us,
                                          &there, out_owner);
    if (status != MS_END) return moved_as_busy(status, out_owner);
    *out_id = there.id;
    if (there.id == id) return MS_OK; /* put again, as a transaction says */
    status = judge(queue, key, &there, out_owner);
    if (status != MS_OK) return status;
  }
}

ms_status ms_claim_end(ms_queue *queue, const uint64_t key[2], uint64_t id, bool done,
                       uint32_t *out_owner) {
  if (key[0] == 0 || table_of(queue) == NULL) return MS_OK;
  ms_status status = ms_dedup_try_end(table_of(queue), queue->self, key, id, done, out_owner);
  return status == MS_END ? MS_OK : moved_as_busy(status, out_owner);
}

void ms_claim_mend(ms_queue *queue, const uint32_t *dead, uint32_t dead_count) {
  ms_dedup *table = table_of(queue);
  for (uint32_t i = 0; table != NULL && i < table->stripes; i++) {
    uint32_t owner, held = atomic_load_explicit(&table->words[i], memory_order_relaxed);
    for (uint32_t j = 0; held != MS_OWNER_FREE && j < dead_count; j++)
      if ((held & ~MS_OWNER_WAITERS) == dead[j] &&
          ms_dedup_take_over(table, &table->words[i], queue->self, held, &owner) == MS_OK)
        break;
  }
}

/* Claims as the slots that are left say, after all processes have ended, maybe by a power cut. */
ms_status ms_queue_recover_claims(ms_queue *queue, const ms_instant *now) {
  ms_dedup *table = table_of(queue);
  uint32_t owner, count = ms_slot_count(queue);
  if (table == NULL) return MS_OK;
  ms_dedup_recover(table);
  for (uint32_t i = 0; i < table->stripes * MS_DEDUP_STRIPE_ENTRIES; i++) {
    uint64_t key[2], word = 0;
    ms_dedup_claim claim;
    if (!ms_dedup_entry_at(table, i, key, &claim)) continue;
    int64_t made = ms_until_us(claim.expires, queue->dedup_window_us);
    int64_t counts = ms_stamp(queue, made, now->time_us);
    if (counts != made) ms_dedup_end_at(table, i, counts + queue->dedup_window_us);
    uint32_t state = read_message(queue, &claim, &word);
    bool was_there = claim.state == MS_DEDUP_DONE && ms_queue_had(queue, claim.slot, claim.id);
    if (state == MS_MESSAGE_FREE && !was_there) ms_dedup_drop(table, i);
  }
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    const ms_slot *content = ms_slot_at(queue, slot);
    const uint64_t key[2] = {MS_PEEK(content->dedup[0]), MS_PEEK(content->dedup[1])};
    uint32_t state = ms_word_state(word);
    if (state == MS_MESSAGE_FREE || state == MS_MESSAGE_SPARE || key[0] == 0) continue;
    ms_dedup_claim there, claim = {.id = MS_PEEK(content->id), .slot = slot};
    claim.expires =
        ms_stamp(queue, MS_PEEK(content->put_at), now->time_us) + queue->dedup_window_us;
    if (claim.expires <= now->time_us) continue;
    ms_status status =
        ms_dedup_try_claim(table, queue->self, key, &claim, now->time_us, &there, &owner);
    if (status == MS_ROLL) return MS_ROLL;
    /* A claim of an undecided transaction stays PENDING. */
    if (state != MS_MESSAGE_PREPARED && (status == MS_OK || there.id == claim.id))
      ms_claim_end(queue, key, claim.id, true, &owner);
  }
  return MS_OK;
}
