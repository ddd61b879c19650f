/* Finishing and burying messages, failure records, and the balance of dead letters and spare slots.
 *
 * Invariants: (1) failure record g & 1 of a slot is written by the holder of grant g alone, so the
 * other one stays whole. (2) Whoever frees a message of a key readies the next one of it, under the
 * key's bucket. (3) At rest there are as many SPARE slots as the capacity leaves beside the dead.
 * Crash: the sweep does what a move to FREE or DEAD should have brought about (the next of its key,
 * a spare slot, a wake). Does no waiting, no file, no policy.
 */
#include "ms_ending.h"
#include "ms_bucket.h"
#include "ms_claim.h"
#include "ms_due.h"
#include "ms_hint.h"
#include "ms_wait.h"
#include "ms_xxh3.h"

#include <string.h>

ms_status ms_queue_finish(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now,
                          uint32_t *out_owner) {
  const ms_slot *content = ms_slot_at(queue, slot);
  uint64_t key_hash = MS_PEEK(content->key_hash);
  const uint64_t dedup[2] = {MS_PEEK(content->dedup[0]), MS_PEEK(content->dedup[1])};
  if (MS_UNLIKELY(dedup[0] != 0)) { /* of this message, if the word has not moved on meanwhile */
    const ms_lease read = {word, MS_PEEK(content->id), slot};
    if (!ms_queue_holds(queue, &read)) return MS_LOST;
    MS_TRY(ms_claim_end(queue, dedup, read.id, true, out_owner));
  }
  MS_TRY(ms_bucket_try_take(queue, key_hash, out_owner));
  /* The slot of a dead one is spare: the capacity never counted it. */
  bool spare =
      MS_UNLIKELY(ms_word_state(word) == MS_MESSAGE_DEAD) && ms_slot_count(queue) > queue->capacity;
  uint64_t to = ms_free_word(word, spare ? MS_MESSAGE_SPARE : MS_MESSAGE_FREE);
  bool moved = MS_UNLIKELY(queue->buckets != NULL)
                   ? ms_bucket_leave(queue, key_hash, slot, word, to, now)
                   : ms_move(ms_word_at(queue, slot), word, to);
  ms_bucket_release(queue, key_hash);
  if (!moved) return MS_LOST;
  ms_queue_say_freed(queue);
  return MS_OK;
}

ms_status ms_queue_try_ack(ms_queue *queue, const ms_lease *lease, const ms_instant *now,
                           uint32_t *out_owner) {
  if (MS_UNLIKELY(atomic_load_explicit(&queue->slots->poison, memory_order_relaxed)))
    return MS_POISONED;
  if (MS_UNLIKELY(ms_lease_is_over(lease, now))) return MS_LOST;
  return ms_queue_finish(queue, lease->slot, lease->word, now, out_owner);
}

/* --- why it failed --- */

bool ms_queue_failure(const ms_queue *queue, uint32_t slot, uint64_t id, ms_failure *out) {
  uint32_t reuse = ms_slot_at(queue, slot)->reuse;
  bool found = false;
  for (int i = 0; i < 2; i++) {
    ms_failure record;
    memcpy(&record, ms_failures_at(queue, slot) + i, sizeof(record));
    if (record.id != id || record.first_length > MS_QUEUE_FAILURE_TEXT ||
        record.last_length > MS_QUEUE_FAILURE_TEXT ||
        record.hash != ms_xxh3_64(&record.id, sizeof(record) - 8, ms_slot_seed(queue, slot, reuse)))
      continue;
    if (found && (record.last_at < out->last_at ||
                  (record.last_at == out->last_at && record.attempts < out->attempts)))
      continue;
    *out = record;
    found = true;
  }
  return found;
}

void ms_queue_note_failure(ms_queue *queue, uint32_t slot, uint64_t word, uint32_t kind,
                           const void *text, size_t length, const ms_instant *now) {
  ms_failure old, *out = ms_failures_at(queue, slot) + (ms_word_grant(word) & 1);
  ms_total(&queue->slots->failed);
  uint64_t id = MS_PEEK(ms_slot_at(queue, slot)->id);
  bool again = ms_queue_failure(queue, slot, id, &old);
  ms_failure next = {0};
  if (length > MS_QUEUE_FAILURE_TEXT) length = MS_QUEUE_FAILURE_TEXT;
  next.id = id;
  next.first_at = again ? old.first_at : now->time_us;
  next.last_at = now->time_us;
  next.attempts = (uint16_t)ms_word_attempts(word);
  next.kind = (uint8_t)kind;
  next.last_length = (uint8_t)length;
  if (length) memcpy(next.last, text, length);
  next.first_length = again ? old.first_length : next.last_length;
  memcpy(next.first, again ? old.first : next.last, MS_QUEUE_FAILURE_TEXT);
  next.hash =
      ms_xxh3_64(&next.id, sizeof(next) - 8, ms_slot_seed(queue, slot, ms_word_reuse(word)));
  memcpy(out, &next, sizeof(next));
}

/* --- dead letters --- */

/* Of the last slots, since claims begin at the first. True: at least one. */
static bool convert(ms_queue *queue, uint32_t from, uint32_t to, uint32_t count, uint32_t most) {
  uint32_t converted = 0;
  for (uint32_t slot = count; slot-- > 0 && converted < most;) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    if (ms_word_state(word) == from)
      converted += ms_move(ms_word_at(queue, slot), word, ms_free_word(word, to));
  }
  return converted > 0;
}

static bool evict_oldest_dead(ms_queue *queue, uint32_t count) {
  uint32_t oldest = MS_NO_SLOT, owner;
  uint64_t oldest_word = 0;
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    if (ms_word_state(word) != MS_MESSAGE_DEAD) continue;
    if (oldest != MS_NO_SLOT) {
      int64_t later = ms_ticks_until(ms_word_tick(oldest_word), ms_word_tick(word));
      if (later > 0 || (later == 0 && MS_PEEK(ms_slot_at(queue, slot)->id) >
                                          MS_PEEK(ms_slot_at(queue, oldest)->id)))
        continue;
    }
    oldest = slot;
    oldest_word = word;
  }
  ms_instant now;
  if (oldest == MS_NO_SLOT) return false;
  ms_now(queue, &now);
  if (ms_queue_finish(queue, oldest, oldest_word, &now, &owner) != MS_OK) return false;
  ms_total(&queue->slots->evicted);
  return true;
}

/* One pass, and what it asks for; false: nothing was to be done, or could be. */
static bool balance_once(ms_queue *queue) {
  uint32_t count = ms_slot_count(queue), dead = 0, spare = 0;
  for (uint32_t slot = 0; slot < count; slot++) {
    uint32_t state =
        ms_word_state(atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed));
    dead += state == MS_MESSAGE_DEAD;
    spare += state == MS_MESSAGE_SPARE;
  }
  if (dead > queue->dead_limit && evict_oldest_dead(queue, count)) return true;
  uint32_t wanted = count > queue->capacity + dead ? count - queue->capacity - dead : 0;
  if (spare > wanted)
    return convert(queue, MS_MESSAGE_SPARE, MS_MESSAGE_FREE, count, spare - wanted);
  return convert(queue, MS_MESSAGE_FREE, MS_MESSAGE_SPARE, count, wanted - spare);
}

void ms_queue_balance(ms_queue *queue) {
  /* Others may balance at the same time by the same count, so each counts again when it is done. */
  while (balance_once(queue)) {}
}

ms_status ms_queue_bury(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now,
                        uint32_t *out_owner) {
  uint64_t key_hash = MS_PEEK(ms_slot_at(queue, slot)->key_hash);
  MS_TRY(ms_bucket_try_take(queue, key_hash, out_owner));
  uint64_t to = ms_word_as(word, MS_MESSAGE_DEAD, ms_tick_floor(now->boot_ns));
  bool moved = queue->block_key ? ms_move(ms_word_at(queue, slot), word, to)
                                : ms_bucket_leave(queue, key_hash, slot, word, to, now);
  ms_bucket_release(queue, key_hash);
  if (!moved) return MS_LOST;
  ms_queue_balance(queue);
  ms_queue_say_freed(queue);
  return MS_OK;
}

ms_status ms_queue_try_cancel(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now,
                              uint32_t *out_owner) {
  uint32_t state = ms_word_state(word);
  if (state != MS_MESSAGE_READY && state != MS_MESSAGE_DELAYED && state != MS_MESSAGE_HELD &&
      state != MS_MESSAGE_DEAD)
    return MS_LOST;
  MS_TRY(ms_queue_finish(queue, slot, word, now, out_owner));
  ms_total(&queue->slots->cancelled);
  if (state == MS_MESSAGE_DEAD) ms_queue_balance(queue);
  return MS_OK;
}

/* --- back to the queue, or dead --- */

static ms_status wait_again(ms_queue *queue, const ms_lease *lease, uint64_t word, int64_t delay_ns,
                            const ms_instant *now) {
  uint64_t to = ms_waiting_word(word, MS_MESSAGE_READY, delay_ns, now);
  if (!ms_move(ms_word_at(queue, lease->slot), lease->word, to)) return MS_LOST;
  ms_queue_lower_expiry(queue, lease->slot);
  if (ms_word_state(to) == MS_MESSAGE_READY) {
    ms_queue_hint(queue, lease->slot, to);
  } else {
    ms_queue_arm(queue, lease->slot, to, now);
  }
  ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
  return MS_OK;
}

ms_status ms_queue_try_nack(ms_queue *queue, const ms_lease *lease, int64_t delay_ns, uint32_t kind,
                            const void *text, size_t length, const ms_instant *now, bool *out_dead,
                            uint32_t *out_owner) {
  if (!ms_queue_holds(queue, lease)) return MS_LOST;
  ms_queue_note_failure(queue, lease->slot, lease->word, kind, text, length, now);
  *out_dead = ms_word_attempts(lease->word) >= queue->max_attempts;
  if (*out_dead) return ms_queue_bury(queue, lease->slot, lease->word, now, out_owner);
  return wait_again(queue, lease, lease->word, delay_ns, now);
}

ms_status ms_queue_try_reject(ms_queue *queue, const ms_lease *lease, uint32_t kind,
                              const void *text, size_t length, const ms_instant *now,
                              uint32_t *out_owner) {
  if (!ms_queue_holds(queue, lease)) return MS_LOST;
  ms_queue_note_failure(queue, lease->slot, lease->word, kind, text, length, now);
  return ms_queue_bury(queue, lease->slot, lease->word, now, out_owner);
}

ms_status ms_queue_try_release(ms_queue *queue, const ms_lease *lease, int64_t delay_ns,
                               const ms_instant *now) {
  uint32_t attempts = ms_word_attempts(lease->word);
  uint64_t word = lease->word - ((uint64_t)(attempts > 0) << 50);
  return wait_again(queue, lease, word, delay_ns, now);
}
