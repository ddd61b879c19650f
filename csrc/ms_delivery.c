/* Putting and taking messages.
 *
 * Threads: callers keep the GIL, processes meet only in atomics. Invariants: (1) what a word
 * publishes was written before it, with release. (2) nobody changes a word but by a
 * compare-and-swap from the whole value it has seen. (3) a hint (ring, wheel, owner, bucket list)
 * is only ever a reason to read the word. Crash: WRITING without its owner, LEASED without its
 * holder, a hint that is not there: the sweep (ms_sweep.c) mends each.
 * Does no waiting, no file, no policy.
 */
#include "ms_delivery.h"
#include "ms_bucket.h"
#include "ms_claim.h"
#include "ms_due.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_sweep.h"
#include "ms_wait.h"

/* Say that this process takes part. A process that did so under the same number before is dead,
 * since the number is ours now: what it held is given on first, or nobody would know whose that
 * was. */
static void take_part(ms_queue *queue, const ms_instant *now) {
  _Atomic uint32_t *entry = &queue->participants[ms_owner_index(queue->self)];
  uint32_t found = atomic_load_explicit(entry, memory_order_relaxed);
  if (MS_LIKELY(found == queue->self)) return;
  if (found) (void)ms_queue_sweep(queue, now, &found, 1);
  atomic_store_explicit(entry, queue->self, memory_order_relaxed);
}

/* --- putting --- */

void ms_queue_refuse(ms_queue *queue) { ms_total(&queue->slots->refused); }

ms_status ms_queue_try_put(ms_queue *queue, const ms_message *message, const ms_instant *now,
                           ms_lease *out, uint32_t *out_owner, ms_error *err) {
  uint32_t slot;
  uint64_t word;
  if (message->lane >= queue->lanes)
    return ms_fail(err, MS_INVALID, 0, queue->lanes - 1, message->lane,
                   "priority %u: expected 0 to %u", message->lane, queue->lanes - 1);
  if (MS_UNLIKELY(atomic_load_explicit(&queue->slots->poison, memory_order_relaxed)))
    return ms_fail(err, MS_POISONED, 0, 0, 0,
                   "an earlier sync failed; close the store in every process and open it again");
  take_part(queue, now);
  bool dedup = message->dedup[0] != 0;
  /* First, so that a double is told also where the queue is full. */
  if (dedup) {
    ms_status found = ms_claim_find(queue, message->dedup, now, &out->id, out_owner);
    bool again = found == MS_END && message->id && out->id == message->id; /* its own claim */
    if (found != MS_OK && !again) return found;
  }
  slot = message->slot;
  if (!message->id || slot >= ms_slot_count(queue) ||
      !ms_slot_claim_if_free(queue, slot, message->lane, &word))
    MS_TRY(ms_slot_claim(queue, message->lane, &slot, &word));
  ms_status status = ms_bucket_try_take(queue, message->key_hash, out_owner);
  if (status != MS_OK) {
    (void)ms_move(ms_word_at(queue, slot), word, ms_free_word(word, MS_MESSAGE_FREE));
    return status;
  }
  /* Under the bucket, so that ids rise along a key. */
  uint64_t id = message->id
                    ? message->id
                    : atomic_fetch_add_explicit(&queue->slots->next_id, 1, memory_order_relaxed);
  if (dedup) status = ms_claim_make(queue, message->dedup, id, slot, now, &out->id, out_owner);
  if (status == MS_OK) {
    status = ms_slot_write(queue, slot, word, message, id, now);
    /* Left PENDING where the table is busy: void, since nothing becomes visible. */
    if (status != MS_OK && dedup) ms_claim_end(queue, message->dedup, id, false, out_owner);
  }
  if (status != MS_OK) {
    if (!message->id) ms_total(&queue->slots->withdrawn);
    (void)ms_move(ms_word_at(queue, slot), word, ms_free_word(word, MS_MESSAGE_FREE));
    ms_bucket_release(queue, message->key_hash);
    return status;
  }
  uint64_t plain = ms_make_word(MS_MESSAGE_READY, message->lane, 0, ms_word_reuse(word), 0, 0);
  uint32_t state = MS_MESSAGE_READY;
  if (queue->buckets && !ms_bucket_append(queue, message->key_hash, slot)) state = MS_MESSAGE_HELD;
  uint64_t to = ms_waiting_word(ms_word_as(plain, state, 0), state, message->delay_ns, now);
  if (MS_UNLIKELY(message->absolute)) ms_queue_note_wall(queue, ms_slot_at(queue, slot));
  if (message->transaction)
    to = ms_word_as(plain, MS_MESSAGE_PREPARED, 0) | ms_word_transaction(message->transaction);
  bool moved = ms_move(ms_word_at(queue, slot), word, to);
  ms_bucket_release(queue, message->key_hash);
  if (dedup && message->transaction == 0) {
    uint32_t busy; /* left PENDING where the table is busy: whoever meets it sees the message */
    ms_claim_end(queue, message->dedup, id, true, &busy);
  }
  if (!moved)
    return ms_fail(err, MS_CORRUPT, slot, word, 0, "slot %u was taken from its living owner", slot);
  if (ms_word_state(to) == MS_MESSAGE_READY) ms_queue_hint(queue, slot, to);
  if (ms_word_state(to) == MS_MESSAGE_DELAYED) ms_queue_arm(queue, slot, to, now);
  if (!message->transaction) ms_queue_lower_expiry(queue, slot);
  *out = (ms_lease){to, id, slot};
  return MS_OK;
}

/* --- taking --- */

static uint32_t next_grant(uint64_t word) { return (ms_word_grant(word) + 1) % 63; }

static uint64_t leased_word(uint64_t word, uint32_t attempts, int64_t lease_ms, int64_t mono_ns) {
  return ms_make_word(MS_MESSAGE_LEASED, ms_word_lane(word), attempts < 63 ? attempts : 63,
                      ms_word_reuse(word), next_grant(word),
                      ms_tick_ceil(mono_ns) + (uint64_t)lease_ms);
}

static void own(ms_queue *queue, uint32_t slot, uint64_t word, int64_t lease_ms, int64_t mono_ns) {
  atomic_store_explicit(&queue->owners[slot], (uint64_t)queue->self << 16 | (word >> 34 & 0xffff),
                        memory_order_relaxed);
  ms_lower(&queue->hints->lease_due, (uint64_t)(mono_ns + (lease_ms + 1) * MS_NS_PER_TICK));
}

/* What was leased must be what was put, and still be wanted. */
static bool lease_is_good(ms_queue *queue, const ms_lease *lease, const ms_instant *now) {
  const ms_slot *slot = ms_slot_at(queue, lease->slot);
  uint32_t owner;
  if (MS_UNLIKELY(!ms_queue_slot_valid(queue, lease->slot, ms_word_reuse(lease->word)))) {
    static const char text[] = "its bytes are not what was put";
    if (ms_queue_try_reject(queue, lease, MS_FAILED_CORRUPT, text, sizeof(text) - 1, now, &owner) ==
        MS_OK)
      ms_total(&queue->slots->corrupt);
    return false;
  }
  if (MS_UNLIKELY(MS_PEEK(slot->expires)) && ms_slot_expiry(queue, slot, now) <= now->time_us) {
    if (ms_queue_finish(queue, lease->slot, lease->word, now, &owner) == MS_OK)
      ms_total(&queue->slots->expired);
    return false;
  }
  return true;
}

/* Strict by lane; with ageing every 64th get begins with the lane whose first waits longest. */
static uint32_t oldest_lane(ms_queue *queue, const ms_instant *now) {
  uint64_t tick = ms_tick_floor(now->boot_ns);
  int64_t oldest = INT64_MAX;
  uint64_t oldest_id = 0; /* of those of one tick, the one that was put first */
  uint32_t lane = 0;
  for (uint32_t i = 0; i < queue->lanes; i++) {
    uint64_t hint;
    if (!ms_ring_at(&queue->rings[i], ms_ring_head(&queue->rings[i]), &hint)) continue;
    if (hint >> 10 >= ms_slot_count(queue)) continue;
    uint64_t word =
        atomic_load_explicit(ms_word_at(queue, (uint32_t)(hint >> 10)), memory_order_relaxed);
    int64_t age = ms_ticks_until(tick, ms_word_tick(word));
    uint64_t id = MS_PEEK(ms_slot_at(queue, (uint32_t)(hint >> 10))->id);
    if (ms_word_state(word) != MS_MESSAGE_READY) continue;
    if (age > oldest || (age == oldest && id > oldest_id)) continue;
    oldest = age;
    oldest_id = id;
    lane = i;
  }
  return lane;
}

static ms_status get_from_lane(ms_queue *queue, uint32_t lane, int64_t lease_ms,
                               const ms_instant *now, bool *io_alone, ms_lease *out) {
  const ms_ring *ring = &queue->rings[lane];
  uint32_t count = ms_slot_count(queue);
  uint64_t head = ms_ring_head(ring), hint;
  while (ms_ring_at(ring, head, &hint)) {
    uint32_t slot = (uint32_t)(hint >> 10);
    bool leased = false;
    if (MS_LIKELY(slot < count)) {
      _Atomic uint64_t *at = ms_word_at(queue, slot);
      /* Acquire: pairs with the release in ms_move that made it READY. */
      uint64_t word = atomic_load_explicit(at, memory_order_acquire);
      if (ms_word_state(word) == MS_MESSAGE_READY && ms_word_reuse(word) == (hint & 1023)) {
        if (io_alone && *io_alone && ms_word_attempts(word) > 0) return MS_END;
        uint64_t to = leased_word(word, ms_word_attempts(word) + 1, lease_ms, now->mono_ns);
        leased = ms_move(at, word, to);
        if (leased) {
          own(queue, slot, to, lease_ms, now->mono_ns);
          *out = (ms_lease){to, MS_PEEK(ms_slot_at(queue, slot)->id), slot};
        }
      }
    }
    MS_YIELD("queue_get_advance");
    ms_ring_advance(ring, head, head + 1);
    if (leased && lease_is_good(queue, out, now)) return MS_OK;
    uint64_t moved = ms_ring_head(ring);
    head = (int64_t)(moved - head) > 1 ? moved : head + 1;
  }
  return MS_EMPTY;
}

ms_status ms_queue_try_get(ms_queue *queue, int64_t lease_ms, const ms_instant *now, bool *io_alone,
                           ms_lease *out) {
  if (MS_UNLIKELY(atomic_load_explicit(&queue->slots->paused, memory_order_relaxed)))
    return MS_EMPTY;
  take_part(queue, now);
  if (queue->ageing && queue->lanes > 1 &&
      atomic_fetch_add_explicit(&queue->hints->gets, 1, memory_order_relaxed) % 64 == 63) {
    uint32_t lane = oldest_lane(queue, now);
    ms_status status = get_from_lane(queue, lane, lease_ms, now, io_alone, out);
    if (status != MS_EMPTY) return status == MS_END ? MS_EMPTY : status;
  }
  for (uint32_t lane = 0; lane < queue->lanes; lane++) {
    ms_status status = get_from_lane(queue, lane, lease_ms, now, io_alone, out);
    if (status == MS_OK) return MS_OK;
    if (status == MS_END) return MS_EMPTY; /* the next one failed before: *io_alone stays true */
  }
  if (io_alone) *io_alone = false;
  return MS_EMPTY;
}

ms_status ms_lease_renew(_Atomic uint64_t *word, uint64_t *io_token, int64_t lease_ms,
                         int64_t mono_ns) {
  uint64_t to =
      ms_word_as(*io_token, MS_MESSAGE_LEASED, ms_tick_ceil(mono_ns) + (uint64_t)lease_ms);
  if (!ms_move(word, *io_token, to)) return MS_LOST;
  *io_token = to;
  return MS_OK;
}

ms_status ms_queue_try_extend(ms_queue *queue, ms_lease *io_lease, int64_t lease_ms,
                              const ms_instant *now) {
  uint64_t before = ms_word_tick(io_lease->word);
  MS_TRY(
      ms_lease_renew(ms_word_at(queue, io_lease->slot), &io_lease->word, lease_ms, now->mono_ns));
  own(queue, io_lease->slot, io_lease->word, lease_ms, now->mono_ns);
  if (ms_ticks_until(before, ms_word_tick(io_lease->word)) < 0) /* it ends sooner: tell a sleeper */
    ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
  return MS_OK;
}

ms_status ms_queue_try_redrive(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now,
                               uint32_t *out_owner) {
  if (ms_word_state(word) != MS_MESSAGE_DEAD) return MS_LOST;
  uint32_t reserved = MS_NO_SLOT, lane = ms_word_lane(word);
  uint64_t mine = 0, key_hash = MS_PEEK(ms_slot_at(queue, slot)->key_hash);
  /* One more that is not finished: a free slot becomes a spare one in its place. */
  MS_TRY(ms_slot_claim(queue, lane, &reserved, &mine));
  ms_status status = ms_bucket_try_take(queue, key_hash, out_owner);
  /* Only the holder of the bucket may free it: it stays what it is while it enters the list. */
  if (status == MS_OK &&
      atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire) != word) {
    ms_bucket_release(queue, key_hash);
    status = MS_LOST;
  }
  if (status == MS_OK) {
    uint64_t to = ms_make_word(MS_MESSAGE_READY, lane, 0, ms_word_reuse(word), ms_word_grant(word),
                               ms_tick_floor(now->boot_ns));
    if (queue->buckets && !queue->block_key && !ms_bucket_append(queue, key_hash, slot))
      to = ms_word_as(to, MS_MESSAGE_HELD, ms_word_tick(to));
    bool moved = ms_move(ms_word_at(queue, slot), word, to);
    ms_bucket_release(queue, key_hash);
    if (moved && ms_word_state(to) == MS_MESSAGE_READY) ms_queue_hint(queue, slot, to);
    if (moved) ms_queue_lower_expiry(queue, slot);
    status = moved ? MS_OK : MS_LOST;
  }
  uint32_t state = status == MS_OK && ms_slot_count(queue) > queue->capacity ? MS_MESSAGE_SPARE
                                                                             : MS_MESSAGE_FREE;
  (void)ms_move(ms_word_at(queue, reserved), mine, ms_free_word(mine, state));
  ms_queue_balance(queue);
  if (status == MS_OK) ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
  return status;
}
