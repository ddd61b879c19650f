/* What the files of the queue share: where words, slots and records lie, and the small steps.
 *
 * Not for callers: ms_queue.h is the contract.
 */
#ifndef MS_QUEUE_PARTS_H
#define MS_QUEUE_PARTS_H

#include "ms_slots.h"

/* then - now, without overflow where one of them is damage. */
static inline int64_t ms_until_us(int64_t then, int64_t now) {
  int64_t left;
  if (MS_LIKELY(!__builtin_sub_overflow(then, now, &left))) return left;
  return then > 0 ? INT64_MAX : INT64_MIN;
}

/* The tick at which left_us have passed: never early, at most MS_TICK_REACH from now. */
static inline uint64_t ms_tick_after(const ms_instant *now, int64_t left_us) {
  if (left_us > MS_TICK_REACH * 1000) left_us = MS_TICK_REACH * 1000;
  return ms_tick_ceil(now->boot_ns + left_us * 1000);
}

/* What a time in a file counts as: itself, unless the store's clock cannot have given it. */
int64_t ms_stamp(const ms_queue *queue, int64_t stamp, int64_t time_us);
/* Microseconds until a message that was never leased is due; 0 or less: it is. */
int64_t ms_slot_left_us(const ms_queue *queue, const ms_slot *content, const ms_instant *now);
/* When it expires, on the store's clock; 0: never. */
int64_t ms_slot_expiry(const ms_queue *queue, const ms_slot *content, const ms_instant *now);

/* Before a message becomes visible that waits for a time of the wall clock: from now on sweeps see
 * to it that the clock is set. */
void ms_queue_note_absolute(ms_queue *queue, const ms_slot *content);
/* Has the wall clock been set since? *out_offset: to note when all that depends on it was seen. */
bool ms_queue_wall_was_set(const ms_queue *queue, int64_t *out_offset);

/* Is a lease over? Also where nobody has taken the message back: who is late always knows. */
static inline bool ms_lease_is_over(const ms_lease *lease, const ms_instant *now) {
  return ms_ticks_until(ms_tick_floor(now->mono_ns), ms_word_tick(lease->word)) < 0;
}

static inline void ms_lower(_Atomic uint64_t *due, uint64_t value) {
  uint64_t found = atomic_load_explicit(due, memory_order_relaxed);
  while (value < found && !atomic_compare_exchange_weak_explicit(
                              due, &found, value, memory_order_relaxed, memory_order_relaxed)) {}
}

/* After a message came where it can expire: a sweep is due when its time is over. No sweep minds
 * that while it is leased. */
static inline void ms_queue_note_expiry(ms_queue *queue, uint32_t slot) {
  int64_t expires = MS_PEEK(ms_slot_at(queue, slot)->expires);
  if (expires) ms_lower(&queue->hints->expiry_due, (uint64_t)expires);
}

/* Hint that the slot is READY. What finds no room is found by a sweep. */
void ms_queue_hint(ms_queue *queue, uint32_t slot, uint64_t word);

/* Put a DELAYED slot into the wheel, or leave it to a sweep when the wheel is busy. */
void ms_queue_arm(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now);

/* State and tick that a message has which may be taken after delay_ns: never early. */
uint64_t ms_waiting_word(uint64_t word, uint32_t state, int64_t delay_ns, const ms_instant *now);

/* After a move to FREE: wake who waits for room, or for the end. */
void ms_queue_say_freed(ms_queue *queue);

/* DELAYED -> READY | DELAYED (parked), once its tick is reached. True: it is READY. */
bool ms_queue_fall_due(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now);

/* Take the bucket of a key, spinning shortly. MS_OK also where the queue has no buckets. */
MS_MUST_USE ms_status ms_bucket_try_take(ms_queue *queue, uint64_t key_hash, uint32_t *out_owner);
void ms_bucket_release(ms_queue *queue, uint64_t key_hash);
/* Put the slot last; true: it is the only one. Take it out, and ready the next one if it was the
 * first. Holder of the bucket. */
bool ms_bucket_append(ms_queue *queue, uint64_t key_hash, uint32_t slot);
void ms_bucket_remove(ms_queue *queue, uint64_t key_hash, uint32_t slot, const ms_instant *now);
/* Is it the first of its key? Also where there are no buckets. Holder. */
bool ms_bucket_is_first(const ms_queue *queue, uint64_t key_hash, uint32_t slot);
/* Does a message with this word belong into a list? */
bool ms_bucket_has(const ms_queue *queue, uint64_t word);
/* Make the list anew from the words; what a dead owner left is not trusted. Holder. */
void ms_bucket_rebuild(ms_queue *queue, uint32_t bucket, const ms_instant *now);

/* Of a dedup key: MS_OK: no message has it, MS_END: that of *out_id has, MS_BUSY. */
MS_MUST_USE ms_status ms_claim_find(ms_queue *queue, const uint64_t key[2], const ms_instant *now,
                                    uint64_t *out_id, uint32_t *out_owner);
/* Claim it for the message that is being written; also MS_ROLL. */
MS_MUST_USE ms_status ms_claim_make(ms_queue *queue, const uint64_t key[2], uint64_t id,
                                    uint32_t slot, const ms_instant *now, uint64_t *out_id,
                                    uint32_t *out_owner);
/* Free the words of the table that the dead (owner words) held. */
void ms_claim_mend(ms_queue *queue, const uint32_t *dead, uint32_t dead_count);
/* Done: its message is or was visible. Else void. MS_OK, MS_BUSY. */
ms_status ms_claim_settle(ms_queue *queue, const uint64_t key[2], uint64_t id, bool done,
                          uint32_t *out_owner);

/* Write why this attempt failed, keeping the first error. The caller holds the lease `word`. */
void ms_queue_note_failure(ms_queue *queue, uint32_t slot, uint64_t word, uint32_t kind,
                           const void *text, size_t length, const ms_instant *now);

/* Keep SPARE and DEAD to what capacity and dead_limit say: one pass. */
void ms_queue_balance(ms_queue *queue);

/* LEASED -> DEAD. Status as of the ends of a lease. */
MS_MUST_USE ms_status ms_queue_bury(ms_queue *queue, uint32_t slot, uint64_t word,
                                    const ms_instant *now, uint32_t *out_owner);

/* A state that nobody has leased (or the caller has) -> FREE. */
MS_MUST_USE ms_status ms_queue_finish(ms_queue *queue, uint32_t slot, uint64_t word,
                                      const ms_instant *now, uint32_t *out_owner);

#endif
