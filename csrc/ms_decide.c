/* What a transaction does to the messages of a queue: prepare, then be decided.
 *
 * A word that is PREPARED or ACKING belongs to the transaction whose low bits it ends in, whatever
 * becomes of the process: leases, deaths and sweeps do not touch it. Only the holder of the store's
 * journal moves it on, since the journal alone knows whether the transaction is committed; deciding
 * twice changes nothing. Crash: what a dead committer left is found by a sweep (hints->undecided).
 * Knows no journal. Putting PREPARED is ms_queue_try_put's.
 */
#include "ms_decide.h"
#include "ms_bucket.h"
#include "ms_claim.h"
#include "ms_due.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_wait.h"

ms_status ms_queue_try_prepare_ack(ms_queue *queue, const ms_lease *lease, uint64_t transaction,
                                   const ms_instant *now, uint64_t *out_word) {
  if (ms_lease_is_over(lease, now)) return MS_LOST;
  uint64_t to = ms_make_word(MS_MESSAGE_ACKING, ms_word_lane(lease->word),
                             ms_word_attempts(lease->word), ms_word_reuse(lease->word), 0, 0) |
                ms_word_transaction(transaction);
  if (!ms_move(ms_word_at(queue, lease->slot), lease->word, to)) return MS_LOST;
  *out_word = to;
  return MS_OK;
}

ms_status ms_queue_try_undo_ack(ms_queue *queue, const ms_lease *lease, uint64_t word) {
  if (!ms_move(ms_word_at(queue, lease->slot), word, lease->word)) return MS_LOST;
  /* A sweep that came meanwhile saw no lease here, whose end it would have to wait for. */
  ms_lower(&queue->hints->lease_due, 0);
  return MS_OK;
}

static ms_status show(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now,
                      uint32_t *out_owner) {
  const ms_slot *content = ms_slot_at(queue, slot);
  uint64_t key_hash = MS_PEEK(content->key_hash), id = MS_PEEK(content->id);
  const uint64_t dedup[2] = {MS_PEEK(content->dedup[0]), MS_PEEK(content->dedup[1])};
  int64_t expires = ms_slot_expiry(queue, content, now);
  MS_TRY(ms_bucket_try_take(queue, key_hash, out_owner));
  uint32_t state = ms_bucket_is_first(queue, key_hash, slot) ? MS_MESSAGE_READY : MS_MESSAGE_HELD;
  int64_t left_us = ms_slot_left_us(queue, content, now);
  if (left_us > MS_TICK_REACH * 1000) left_us = MS_TICK_REACH * 1000;
  uint64_t plain = ms_make_word(state, ms_word_lane(word), 0, ms_word_reuse(word), 0, 0);
  uint64_t to = ms_waiting_word(plain, state, left_us > 0 ? left_us * 1000 : 0, now);
  ms_queue_note_wall(queue, content);
  bool moved = ms_move(ms_word_at(queue, slot), word, to);
  ms_bucket_release(queue, key_hash);
  if (!moved) return MS_LOST;
  ms_claim_end(queue, dedup, id, true, out_owner); /* busy: the next to meet it sees the message */
  if (ms_word_state(to) == MS_MESSAGE_READY) ms_queue_hint(queue, slot, to);
  if (ms_word_state(to) == MS_MESSAGE_DELAYED) ms_queue_arm(queue, slot, to, now);
  if (expires) ms_lower(&queue->hints->expiry_due, (uint64_t)expires);
  ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
  return MS_OK;
}

static ms_status withdraw(ms_queue *queue, uint32_t slot, uint64_t word, const ms_instant *now,
                          uint32_t *out_owner) {
  const ms_slot *content = ms_slot_at(queue, slot);
  uint64_t key_hash = MS_PEEK(content->key_hash), id = MS_PEEK(content->id);
  const uint64_t dedup[2] = {MS_PEEK(content->dedup[0]), MS_PEEK(content->dedup[1])};
  MS_TRY(ms_bucket_try_take(queue, key_hash, out_owner));
  uint64_t to = ms_free_word(word, MS_MESSAGE_FREE);
  bool moved = ms_bucket_leave(queue, key_hash, slot, word, to, now);
  ms_bucket_release(queue, key_hash);
  if (!moved) return MS_LOST;
  ms_total(&queue->slots->withdrawn);
  ms_claim_end(queue, dedup, id, false, out_owner); /* busy: it is void, as nothing shows */
  ms_queue_say_freed(queue);
  return MS_OK;
}

ms_status ms_queue_try_decide(ms_queue *queue, uint32_t slot, uint64_t word, bool committed,
                              const ms_instant *now, uint32_t *out_owner) {
  uint32_t state = ms_word_state(word);
  if (state == MS_MESSAGE_PREPARED)
    return committed ? show(queue, slot, word, now, out_owner)
                     : withdraw(queue, slot, word, now, out_owner);
  if (state != MS_MESSAGE_ACKING) return MS_LOST;
  if (committed) return ms_queue_finish(queue, slot, word, now, out_owner);
  uint64_t to = ms_word_as(word, MS_MESSAGE_READY, ms_tick_floor(now->boot_ns));
  if (!ms_move(ms_word_at(queue, slot), word, to)) return MS_LOST;
  ms_queue_lower_expiry(queue, slot); /* which a sweep that came meanwhile did not see */
  ms_queue_hint(queue, slot, to);
  ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
  return MS_OK;
}

void ms_queue_wipe(ms_queue *queue, uint32_t slot) { MS_POKE(ms_slot_at(queue, slot)->id, 0); }

void ms_queue_forget(ms_queue *queue, uint32_t slot, const ms_instant *now) {
  uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
  (void)ms_bucket_leave(queue, MS_PEEK(ms_slot_at(queue, slot)->key_hash), slot, word,
                        ms_free_word(word, MS_MESSAGE_FREE), now);
  ms_queue_balance(queue);
}
