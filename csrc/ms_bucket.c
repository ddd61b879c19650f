/* The messages of a key in their order: lists of slots, a bucket of keys each, under a short word.
 *
 * Only the first of a bucket is READY, DELAYED or LEASED; the others are HELD, so that no hint can
 * lead to them. Invariants, at rest: (1) each slot of a key stands once in its bucket's list. (2)
 * the list's first is not HELD. Crash: what a dead owner left is made anew from the slots.
 */
#include "ms_bucket.h"
#include "ms_due.h"
#include "ms_hint.h"
#include "ms_wait.h"

enum { BUCKET_SPINS = 2000 };

static ms_bucket *bucket_of(const ms_queue *queue, uint64_t key_hash) {
  return &queue->buckets[key_hash % MS_QUEUE_BUCKETS];
}

/* Messages without a key wait for nobody. */
static bool is_ordered(const ms_queue *queue, uint64_t key_hash) {
  return MS_UNLIKELY(queue->buckets != NULL) && key_hash != 0;
}

ms_status ms_bucket_try_take(ms_queue *queue, uint64_t key_hash, uint32_t *out_owner) {
  if (!is_ordered(queue, key_hash)) return MS_OK;
  ms_bucket *bucket = bucket_of(queue, key_hash);
  for (int i = 0; i < BUCKET_SPINS; i++) {
    if (ms_owner_try_take(&bucket->word, queue->self, out_owner) == MS_OK) return MS_OK;
    ms_cpu_relax();
  }
  return MS_BUSY;
}

void ms_bucket_release(ms_queue *queue, uint64_t key_hash) {
  if (is_ordered(queue, key_hash)) ms_owner_release(&bucket_of(queue, key_hash)->word);
}

bool ms_bucket_append(ms_queue *queue, uint64_t key_hash, uint32_t slot) {
  if (!is_ordered(queue, key_hash)) return true;
  ms_bucket *bucket = bucket_of(queue, key_hash);
  bool only = bucket->head == 0 || bucket->head > queue->slot_max;
  queue->links[slot] = 0;
  MS_YIELD("bucket_append");
  if (only) {
    bucket->head = slot + 1;
    bucket->length = 0;
  } else if (bucket->tail - 1 < queue->slot_max) {
    queue->links[bucket->tail - 1] = slot + 1;
  }
  bucket->tail = slot + 1;
  bucket->length++;
  return only;
}

bool ms_bucket_is_first(const ms_queue *queue, uint64_t key_hash, uint32_t slot) {
  return !is_ordered(queue, key_hash) || bucket_of(queue, key_hash)->head == slot + 1;
}

/* HELD -> READY | DELAYED: it is the first of its key now. */
static void let_go(ms_queue *queue, uint32_t slot, const ms_instant *now) {
  uint64_t tick = ms_tick_floor(now->boot_ns);
  _Atomic uint64_t *at = ms_word_at(queue, slot);
  uint64_t word = atomic_load_explicit(at, memory_order_acquire);
  if (ms_word_state(word) != MS_MESSAGE_HELD) return;
  int64_t left = ms_ticks_until(tick, ms_word_tick(word));
  if (left > 2 * MS_TICK_REACH) left = 0; /* no tick is set so far ahead: it passed, long ago */
  uint64_t due = tick + (uint64_t)(left > 0 ? left : 0);
  if (ms_word_is_untaken(word)) { /* its slot tells more than a tick */
    int64_t left_us = ms_slot_left_us(queue, ms_slot_at(queue, slot), now);
    due = left_us > 0 ? ms_tick_after(now, left_us) : tick;
  }
  bool early = due != tick;
  uint64_t to = ms_word_as(word, early ? MS_MESSAGE_DELAYED : MS_MESSAGE_READY, due);
  if (early) ms_queue_note_wall(queue, ms_slot_at(queue, slot));
  if (!ms_move(at, word, to)) return;
  if (early) {
    ms_queue_arm(queue, slot, to, now);
  } else {
    ms_queue_hint(queue, slot, to);
  }
  ms_queue_wake(queue, MS_WAIT_MESSAGE, 1); /* so that a sleeper wakes when this one is due */
}

bool ms_bucket_leave(ms_queue *queue, uint64_t key_hash, uint32_t slot, uint64_t word, uint64_t to,
                     const ms_instant *now) {
  if (!is_ordered(queue, key_hash)) return ms_move(ms_word_at(queue, slot), word, to);
  ms_bucket *bucket = bucket_of(queue, key_hash);
  uint32_t before = 0, at = bucket->head;
  for (uint32_t i = 0; at != slot + 1 && at != 0; i++) {
    if (at > queue->slot_max || i > bucket->length) at = 0; /* damaged, and not in it */
    before = at;
    if (at) at = queue->links[at - 1];
  }
  /* Read before the move: behind it the slot is anybody's, and its link may be of another list. */
  uint32_t next = queue->links[slot] <= queue->slot_max ? queue->links[slot] : 0;
  if (!ms_move(ms_word_at(queue, slot), word, to)) return false;
  MS_YIELD("bucket_leave");
  if (at == 0) return true;
  if (before) {
    queue->links[before - 1] = next;
  } else {
    bucket->head = next;
  }
  if (bucket->tail == slot + 1) bucket->tail = before;
  bucket->length--;
  if (!before && next) let_go(queue, next - 1, now);
  return true;
}

bool ms_bucket_has(const ms_queue *queue, uint64_t word) {
  uint32_t state = ms_word_state(word);
  return state == MS_MESSAGE_READY || state == MS_MESSAGE_DELAYED || state == MS_MESSAGE_HELD ||
         state == MS_MESSAGE_LEASED || state == MS_MESSAGE_PREPARED || state == MS_MESSAGE_ACKING ||
         (state == MS_MESSAGE_DEAD && queue->block_key);
}

static bool stands_behind(const ms_queue *queue, uint32_t slot) {
  uint32_t state = ms_word_state(atomic_load(ms_word_at(queue, slot)));
  return state == MS_MESSAGE_HELD || state == MS_MESSAGE_PREPARED;
}

/* Does the slot come before the other? The one that is in flight does, then ids. */
static bool comes_before(const ms_queue *queue, uint32_t slot, uint32_t other) {
  bool held = stands_behind(queue, slot), other_held = stands_behind(queue, other);
  if (held != other_held) return !held;
  return MS_PEEK(ms_slot_at(queue, slot)->id) < MS_PEEK(ms_slot_at(queue, other)->id);
}

void ms_bucket_rebuild(ms_queue *queue, uint32_t index, const ms_instant *now) {
  ms_bucket *bucket = &queue->buckets[index];
  uint32_t count = ms_slot_count(queue);
  bucket->head = bucket->tail = bucket->length = 0;
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_acquire);
    if (!ms_bucket_has(queue, word)) continue;
    uint64_t key_hash = MS_PEEK(ms_slot_at(queue, slot)->key_hash);
    if (key_hash == 0 || key_hash % MS_QUEUE_BUCKETS != index) continue;
    uint32_t before = bucket->tail; /* most often it comes last */
    if (before && comes_before(queue, slot, before - 1)) {
      before = 0;
      uint32_t at = bucket->head;
      while (at && !comes_before(queue, slot, at - 1)) {
        before = at;
        at = queue->links[at - 1];
      }
    }
    queue->links[slot] = before ? queue->links[before - 1] : bucket->head;
    if (before) {
      queue->links[before - 1] = slot + 1;
    } else {
      bucket->head = slot + 1;
    }
    if (bucket->tail == before) bucket->tail = slot + 1;
    bucket->length++;
  }
  if (bucket->head) let_go(queue, bucket->head - 1, now);
}
