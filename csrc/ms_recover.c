/* Hints from the words alone: after all processes have ended, and into larger ones.
 *
 * Both put what stands in the queue in order: along a key by id, among all by how long each waits.
 * Recovery is alone with the files and may store words; moving is not, and reads them. Crash: hints
 * that were not finished are not in use, and are made again from the beginning.
 */
#include "ms_recover.h"
#include "ms_bucket.h"
#include "ms_due.h"
#include "ms_ending.h"
#include "ms_hint.h"

#include <stdlib.h>

typedef struct standing {
  int64_t order; /* the older tick first; what was leased before all */
  uint64_t id;
  uint32_t slot;
  uint32_t place; /* among those of its key: the lower first, then the older id */
} standing;

static int by_age(const void *a, const void *b) {
  const standing *x = a, *y = b;
  if (x->order != y->order) return x->order < y->order ? -1 : 1;
  return x->id < y->id ? -1 : x->id > y->id;
}

static int by_place(const void *a, const void *b) {
  const standing *x = a, *y = b;
  if (x->place != y->place) return x->place < y->place ? -1 : 1;
  return x->id < y->id ? -1 : x->id > y->id;
}

size_t ms_queue_scratch_size(const ms_queue *queue) {
  return ((size_t)ms_slot_count(queue) + 1) * sizeof(standing);
}

/* --- the first opener --- */

static void set_word(ms_queue *queue, uint32_t slot, uint64_t word) {
  atomic_store_explicit(ms_word_at(queue, slot), word, memory_order_release);
}

/* Microseconds until the tick of a word that was set under another first opener, maybe before a
 * reboot: by the time that its ticks began at, and of all ticks modulo 2^34 the nearest. */
static int64_t left_of(const ms_queue *queue, uint64_t word, const ms_instant *now) {
  int64_t began = atomic_load_explicit(&queue->slots->time_of_boot, memory_order_relaxed);
  uint64_t then = (uint64_t)(ms_until_us(now->time_us, began) / 1000); /* their clock, now */
  return (ms_ticks_until(then, ms_word_tick(word)) + 1) * 1000;
}

/* What the word of a slot is after all processes have gone: also what to hint. */
static uint64_t recovered_word(ms_queue *queue, uint32_t slot, uint64_t word, bool verify,
                               const ms_instant *now) {
  uint64_t tick = ms_tick_floor(now->boot_ns);
  const ms_slot *content = ms_slot_at(queue, slot);
  switch (ms_word_state(word)) {
    case MS_MESSAGE_FREE:
    case MS_MESSAGE_SPARE:
      return ms_free_word(word, ms_word_state(word));
    case MS_MESSAGE_WRITING:
      return ms_free_word(word, MS_MESSAGE_FREE);
    case MS_MESSAGE_READY:
    case MS_MESSAGE_DELAYED:
    case MS_MESSAGE_HELD:
    case MS_MESSAGE_LEASED:
    case MS_MESSAGE_DEAD:
    case MS_MESSAGE_PREPARED:
    case MS_MESSAGE_ACKING:
      break;
    default: /* a flipped bit: keep what is whole, as dead */
      if (!ms_queue_slot_valid(queue, slot, content->reuse))
        return ms_make_word(MS_MESSAGE_FREE, 0, 0, content->reuse & 1023u, 0, 0);
      return ms_make_word(MS_MESSAGE_DEAD, MS_PEEK(content->lane) & 7u, ms_word_attempts(word),
                          content->reuse & 1023u, ms_word_grant(word), tick);
  }
  /* The word reached the disk and the slot did not: a put that never was. */
  if (content->reuse != ms_word_reuse(word) || content->slot != slot)
    return ms_free_word(word, MS_MESSAGE_FREE);
  if (ms_word_state(word) == MS_MESSAGE_DEAD) return ms_word_as(word, MS_MESSAGE_DEAD, tick);
  if (ms_word_state(word) == MS_MESSAGE_PREPARED || ms_word_state(word) == MS_MESSAGE_ACKING)
    return word; /* the journal decides, after this */
  bool spent =
      ms_word_state(word) == MS_MESSAGE_LEASED && ms_word_attempts(word) >= queue->max_attempts;
  if (spent || (verify && !ms_queue_slot_valid(queue, slot, ms_word_reuse(word)))) {
    static const char torn[] = "torn by a power cut, or damaged", ended[] = "all processes ended";
    ms_queue_note_failure(queue, slot, word, spent ? MS_FAILED_DEATH : MS_FAILED_CORRUPT,
                          spent ? ended : torn, spent ? sizeof(ended) - 1 : sizeof(torn) - 1, now);
    if (!spent) ms_total(&queue->slots->corrupt);
    return ms_word_as(word, MS_MESSAGE_DEAD, tick);
  }
  bool waits = ms_word_state(word) == MS_MESSAGE_DELAYED || ms_word_state(word) == MS_MESSAGE_HELD;
  int64_t left_us = !waits                     ? 0
                    : ms_word_is_untaken(word) ? ms_slot_left_us(queue, content, now)
                                               : left_of(queue, word, now);
  if (left_us <= 0) return ms_word_as(word, MS_MESSAGE_READY, tick);
  ms_queue_note_wall(queue, content);
  return ms_word_as(word, MS_MESSAGE_DELAYED, ms_tick_after(now, left_us));
}

void ms_queue_begin_ids(ms_queue *queue, uint64_t least) {
  uint64_t next = MS_PEEK(queue->slots->next_id), from = MS_PEEK(queue->slots->counted_from);
  if (next >= least) return;
  if (from) MS_POKE(queue->slots->counted_from, from + (least - next));
  MS_POKE(queue->slots->next_id, least);
}

void ms_queue_begin_totals(ms_queue *queue) {
  ms_slots_header *slots = queue->slots;
  uint64_t next = MS_PEEK(slots->next_id), from = MS_PEEK(slots->counted_from), known = 0;
  uint64_t ended = MS_PEEK(slots->withdrawn) + MS_PEEK(slots->expired) + MS_PEEK(slots->evicted) +
                   MS_PEEK(slots->cancelled);
  for (uint32_t slot = 0, count = ms_slot_count(queue); slot < count; slot++) {
    uint32_t state =
        ms_word_state(atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed));
    known += state != MS_MESSAGE_FREE && state != MS_MESSAGE_SPARE;
  }
  if (from == 0 || from > next || next - from < known + ended)
    MS_POKE(slots->counted_from, next - (known + ended));
}

void ms_queue_recover(ms_queue *queue, bool verify, const ms_instant *now, void *scratch) {
  ms_hints_header *hints = queue->hints;
  standing *all = scratch;
  uint32_t count = ms_slot_count(queue), standing_count = 0;
  uint64_t newest = 0;
  atomic_store(&hints->lease_due, UINT64_MAX);
  atomic_store(&hints->expiry_due, UINT64_MAX);
  atomic_store(&hints->noted, ms_tick_floor(now->boot_ns));
  ms_wheel_init(&queue->wheel, ms_tick_floor(now->boot_ns));
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    uint64_t to = recovered_word(queue, slot, word, verify, now);
    const ms_slot *content = ms_slot_at(queue, slot);
    if (to != word) set_word(queue, slot, to);
    if (ms_word_state(to) == MS_MESSAGE_FREE && ms_word_state(word) != MS_MESSAGE_FREE)
      ms_total(&queue->slots->withdrawn); /* it had an id */
    if (ms_word_state(to) == MS_MESSAGE_DEAD) {
      if (queue->block_key && queue->buckets)
        all[standing_count++] = (standing){0, MS_PEEK(content->id), slot, 0};
      continue;
    }
    if (ms_word_state(to) == MS_MESSAGE_PREPARED || ms_word_state(to) == MS_MESSAGE_ACKING) {
      if (queue->buckets) all[standing_count++] = (standing){0, MS_PEEK(content->id), slot, 1};
      continue;
    }
    if (ms_word_state(to) != MS_MESSAGE_READY && ms_word_state(to) != MS_MESSAGE_DELAYED) continue;
    if (MS_PEEK(content->expires))
      ms_lower(&hints->expiry_due, (uint64_t)ms_slot_expiry(queue, content, now));
    if (newest == 0) newest = ms_word_tick(word);
    int64_t order = ms_word_state(word) == MS_MESSAGE_LEASED
                        ? INT64_MIN
                        : ms_ticks_until(newest, ms_word_tick(word));
    all[standing_count++] = (standing){order, MS_PEEK(content->id), slot, 1};
  }
  if (queue->buckets) qsort(all, standing_count, sizeof(*all), by_place);
  for (uint32_t i = 0; queue->buckets && i < standing_count; i++) {
    uint32_t slot = all[i].slot;
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    if (!ms_bucket_append(queue, MS_PEEK(ms_slot_at(queue, slot)->key_hash), slot) &&
        (ms_word_state(word) == MS_MESSAGE_READY || ms_word_state(word) == MS_MESSAGE_DELAYED))
      set_word(queue, slot, ms_word_as(word, MS_MESSAGE_HELD, ms_word_tick(word)));
  }
  qsort(all, standing_count, sizeof(*all), by_age);
  for (uint32_t i = 0; i < standing_count; i++) {
    uint32_t slot = all[i].slot;
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    if (ms_word_state(word) == MS_MESSAGE_READY) {
      ms_queue_hint(queue, slot, word);
    } else if (ms_word_state(word) == MS_MESSAGE_DELAYED) {
      int64_t left = ms_ticks_until(ms_tick_floor(now->boot_ns), ms_word_tick(word));
      ms_wheel_add(&queue->wheel, slot, ms_word_reuse(word),
                   ms_tick_floor(now->boot_ns) + (uint64_t)(left > 0 ? left : 0));
    }
  }
  atomic_store(&hints->wheel_due, ms_wheel_next(&queue->wheel));
  atomic_store(&queue->slots->time_of_boot, now->time_us - now->boot_ns / 1000);
  ms_queue_balance(queue);
}

/* --- larger hints --- */

ms_status ms_queue_move_hints(ms_queue *from, ms_queue *to, const ms_instant *now,
                              uint32_t *io_taken, void *scratch, uint32_t *out_owner) {
  uint64_t tick = ms_tick_floor(now->boot_ns);
  uint32_t buckets = from->buckets ? MS_QUEUE_BUCKETS : 0, standing_count = 0;
  if (*io_taken == 0) {
    MS_TRY(ms_owner_try_take(&from->hints->wheel, from->self, out_owner));
    *io_taken = 1;
  }
  for (; *io_taken <= buckets; ++*io_taken)
    MS_TRY(ms_owner_try_take(&from->buckets[*io_taken - 1].word, from->self, out_owner));
  standing *all = scratch;
  uint32_t count = ms_slot_count(from);
  for (uint32_t i = 0; i < MS_MEMBER_COUNT_MAX; i++)
    MS_POKE(to->participants[i], MS_PEEK(from->participants[i]));
  ms_wheel_init(&to->wheel, tick);
  uint64_t newest = 0;
  for (uint32_t slot = 0; slot < count; slot++) {
    MS_POKE(to->owners[slot], MS_PEEK(from->owners[slot]));
    /* Acquire: pairs with the release in ms_move. */
    uint64_t word = atomic_load_explicit(ms_word_at(from, slot), memory_order_acquire);
    bool stands =
        ms_word_state(word) == MS_MESSAGE_READY || ms_word_state(word) == MS_MESSAGE_DELAYED;
    if (!stands && !(to->buckets && ms_bucket_has(to, word))) continue;
    if (newest == 0) newest = ms_word_tick(word);
    bool behind =
        ms_word_state(word) == MS_MESSAGE_HELD || ms_word_state(word) == MS_MESSAGE_PREPARED;
    int64_t order = ms_ticks_until(newest, ms_word_tick(word));
    all[standing_count++] = (standing){order, MS_PEEK(ms_slot_at(from, slot)->id), slot, behind};
  }
  if (to->buckets) qsort(all, standing_count, sizeof(*all), by_place);
  for (uint32_t i = 0; to->buckets && i < standing_count; i++)
    (void)ms_bucket_append(to, MS_PEEK(ms_slot_at(to, all[i].slot)->key_hash), all[i].slot);
  qsort(all, standing_count, sizeof(*all), by_age);
  for (uint32_t i = 0; i < standing_count; i++) {
    uint32_t slot = all[i].slot;
    uint64_t word = atomic_load_explicit(ms_word_at(to, slot), memory_order_acquire);
    if (ms_word_state(word) == MS_MESSAGE_READY) ms_queue_hint(to, slot, word);
    int64_t left = ms_ticks_until(tick, ms_word_tick(word));
    if (ms_word_state(word) == MS_MESSAGE_DELAYED)
      ms_wheel_add(&to->wheel, slot, ms_word_reuse(word), tick + (uint64_t)(left > 0 ? left : 0));
  }
  ms_hints_header *hints = to->hints;
  MS_POKE(hints->wheel_due, ms_wheel_next(&to->wheel));
  MS_POKE(hints->gets, MS_PEEK(from->hints->gets));
  MS_POKE(hints->wall_offset, MS_PEEK(from->hints->wall_offset));
  MS_POKE(hints->absolute, MS_PEEK(from->hints->absolute));
  for (uint32_t i = 0; i < to->lanes; i++)
    MS_POKE(hints->noted_tail[i], ms_ring_tail(&to->rings[i]));
  MS_POKE(hints->noted, tick);
  /* lease_due and expiry_due are 0: the first upkeep sweeps. A call that began before may still put
   * a hint where nobody reads: so search as after a death, and arm again all that is delayed. */
  MS_POKE(hints->suspect, 1);
  MS_POKE(hints->missed, 1);
  ms_queue_balance(to);
  return MS_OK;
}

void ms_queue_give_back_hints(ms_queue *from, uint32_t taken) {
  if (taken == 0) return;
  while (--taken > 0) ms_owner_release(&from->buckets[taken - 1].word);
  MS_POKE(from->hints->missed, 1); /* some could not arm meanwhile */
  ms_owner_release(&from->hints->wheel);
}
