/* The sweep: what time and deaths bring.
 *
 * The sweep is one pass over the state words. It needs no lock: each thing it does is one
 * compare-and-swap from what it saw, so a second one beside it, or one that was paused half-way,
 * does no harm. Hints that were lost are put again; twice is harmless.
 */
#include "ms_sweep.h"
#include "ms_bucket.h"
#include "ms_claim.h"
#include "ms_due.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_wait.h"

enum { SWEPT_NS = 1000000, NOTED_MS = 1000, SUSPECT_MS = 20, RETRY_NS = 10000000 };

static bool is_among(uint32_t owner, const uint32_t *dead, uint32_t dead_count) {
  for (uint32_t i = 0; i < dead_count; i++)
    if (dead[i] == owner && owner) return true;
  return false;
}

typedef struct pass {
  ms_queue *queue;
  const ms_instant *now;
  const uint32_t *dead;
  uint32_t dead_count;
  uint64_t mono_tick, boot_tick;
  int64_t lease_due; /* mono ns */
  int64_t expiry_due;
  uint64_t noted; /* READY since before this tick and all hints of then gone: its hint was lost */
  bool reconcile, expire, rearm, undecided, wall_set;
  uint32_t ready;
} pass;

static void due_at(pass *p, int64_t mono_ns) {
  if (mono_ns < p->lease_due) p->lease_due = mono_ns;
}

/* Lease it ourselves, so that the record is ours to write; then end that lease. */
static void end_lease(pass *p, uint32_t slot, uint64_t word, uint32_t kind) {
  ms_queue *queue = p->queue;
  uint32_t owner, attempts = ms_word_attempts(word);
  uint64_t mine =
      ms_make_word(MS_MESSAGE_LEASED, ms_word_lane(word), attempts, ms_word_reuse(word),
                   (ms_word_grant(word) + 1) % 63, ms_tick_ceil(p->now->mono_ns) + 1000);
  if (!ms_move(ms_word_at(queue, slot), word, mine)) return;
  atomic_store_explicit(&queue->owners[slot], (uint64_t)queue->self << 16 | (mine >> 34 & 0xffff),
                        memory_order_relaxed);
  static const char ran_out[] = "the lease ran out", died[] = "its holder died";
  if (kind == MS_FAILED_LEASE)
    ms_queue_note_failure(queue, slot, mine, kind, ran_out, sizeof(ran_out) - 1, p->now);
  else
    ms_queue_note_failure(queue, slot, mine, kind, died, sizeof(died) - 1, p->now);
  if (attempts >= queue->max_attempts) {
    if (ms_queue_bury(queue, slot, mine, p->now, &owner) == MS_BUSY)
      due_at(p, p->now->mono_ns + RETRY_NS + 1000 * MS_NS_PER_TICK);
    return;
  }
  uint64_t to = ms_word_as(mine, MS_MESSAGE_READY, p->boot_tick);
  if (!ms_move(ms_word_at(queue, slot), mine, to)) return;
  ms_queue_lower_expiry(queue, slot);
  ms_queue_hint(queue, slot, to);
  ms_total(&queue->slots->redelivered);
  p->ready++;
}

static void sweep_leased(pass *p, uint32_t slot, uint64_t word) {
  int64_t left = ms_ticks_until(p->mono_tick, ms_word_tick(word));
  if (left <= 0) {
    end_lease(p, slot, word, MS_FAILED_LEASE);
    return;
  }
  uint64_t owner = atomic_load_explicit(&p->queue->owners[slot], memory_order_relaxed);
  if (p->dead_count && (owner & 0xffff) == (word >> 34 & 0xffff) &&
      is_among((uint32_t)(owner >> 16), p->dead, p->dead_count)) {
    end_lease(p, slot, word, MS_FAILED_DEATH);
    return;
  }
  due_at(p, p->now->mono_ns + left * MS_NS_PER_TICK);
}

/* The wall clock was set: the message is due sooner, or later, than its tick says. Returns the word
 * as it is now; 0: another has moved it, or it is ready. */
static uint64_t follow_wall(pass *p, uint32_t slot, uint64_t word) {
  const ms_slot *content = ms_slot_at(p->queue, slot);
  if (!ms_word_is_untaken(word) || !ms_slot_is_absolute(content)) return word;
  int64_t left_us = ms_slot_left_us(p->queue, content, p->now);
  if (left_us <= 0) {
    p->ready += ms_queue_fall_due(p->queue, slot, word, p->now);
    return 0;
  }
  uint64_t to = ms_word_as(word, MS_MESSAGE_DELAYED, ms_tick_after(p->now, left_us));
  if (!ms_move(ms_word_at(p->queue, slot), word, to)) return 0;
  if (!p->rearm) ms_queue_arm(p->queue, slot, to, p->now);
  return to;
}

static void sweep_delayed(pass *p, uint32_t slot, uint64_t word) {
  if (p->wall_set) word = follow_wall(p, slot, word);
  if (word == 0) return;
  int64_t left = ms_ticks_until(p->boot_tick, ms_word_tick(word));
  if (left <= 0) {
    p->ready += ms_queue_fall_due(p->queue, slot, word, p->now);
  } else if (p->rearm) {
    ms_wheel_add(&p->queue->wheel, slot, ms_word_reuse(word), p->boot_tick + (uint64_t)left);
  } else if (atomic_load_explicit(&p->queue->hints->missed, memory_order_relaxed)) {
    due_at(p, p->now->mono_ns + left * MS_NS_PER_TICK);
  }
}

static void sweep_expiry(pass *p, uint32_t slot, uint64_t word) {
  uint32_t owner;
  int64_t expires = ms_slot_expiry(p->queue, ms_slot_at(p->queue, slot), p->now);
  if (expires == 0) return;
  if (expires > p->now->time_us) {
    if (expires < p->expiry_due) p->expiry_due = expires;
    return;
  }
  /* A damaged time ends no message: the next get makes it a dead letter, and says so. */
  if (!ms_queue_slot_valid(p->queue, slot, ms_word_reuse(word))) return;
  ms_status status = ms_queue_finish(p->queue, slot, word, p->now, &owner);
  if (status == MS_OK) ms_total(&p->queue->slots->expired);
  if (status == MS_BUSY) p->expiry_due = p->now->time_us;
}

static void sweep_slot(pass *p, uint32_t slot, uint64_t word) {
  switch (ms_word_state(word)) {
    case MS_MESSAGE_LEASED:
      sweep_leased(p, slot, word);
      return;
    case MS_MESSAGE_WRITING:
      if (p->dead_count && is_among((uint32_t)word & 0x7fffffff, p->dead, p->dead_count) &&
          ms_move(ms_word_at(p->queue, slot), word, ms_free_word(word, MS_MESSAGE_FREE)))
        ms_total(&p->queue->slots->withdrawn); /* most die there with an id, all but a few ns */
      return;
    case MS_MESSAGE_DELAYED:
      if (p->expire) sweep_expiry(p, slot, word);
      sweep_delayed(p, slot, word);
      return;
    case MS_MESSAGE_READY:
      if (p->expire) sweep_expiry(p, slot, word);
      if (p->reconcile && ms_ticks_until(p->noted, ms_word_tick(word)) < 0) {
        ms_queue_hint(p->queue, slot, word);
        p->ready++;
      }
      return;
    case MS_MESSAGE_HELD:
      if (p->expire) sweep_expiry(p, slot, word);
      return;
    case MS_MESSAGE_PREPARED:
    case MS_MESSAGE_ACKING:
      p->undecided = true;
      return;
    default:
      return;
  }
}

/* A cell that says nothing, before a tail that says that something was put there, is damage. */
static void pass_damaged_cells(const ms_queue *queue) {
  for (uint32_t i = 0; i < queue->lanes; i++) {
    uint64_t hint, head = ms_ring_head(&queue->rings[i]);
    if ((int64_t)(ms_ring_tail(&queue->rings[i]) - head) > 0 &&
        !ms_ring_at(&queue->rings[i], head, &hint))
      ms_ring_advance(&queue->rings[i], head, head + 1); /* unless it moved by itself */
  }
}

static bool heads_passed_the_noted(const ms_queue *queue) {
  for (uint32_t i = 0; i < queue->lanes; i++) {
    uint64_t tail = atomic_load_explicit(&queue->hints->noted_tail[i], memory_order_relaxed);
    if ((int64_t)(ms_ring_head(&queue->rings[i]) - tail) < 0) return false;
  }
  return true;
}

/* Is it time to search for lost hints? Soon after a death, else seldom. */
static bool hints_are_due(const ms_queue *queue, uint64_t boot_tick) {
  uint64_t noted = atomic_load_explicit(&queue->hints->noted, memory_order_relaxed);
  bool suspect = atomic_load_explicit(&queue->hints->suspect, memory_order_relaxed) != 0;
  return boot_tick - noted >= (suspect ? SUSPECT_MS : NOTED_MS) && heads_passed_the_noted(queue);
}

static void note_tails(pass *p) {
  for (uint32_t i = 0; i < p->queue->lanes; i++)
    atomic_store_explicit(&p->queue->hints->noted_tail[i], ms_ring_tail(&p->queue->rings[i]),
                          memory_order_relaxed);
  atomic_store_explicit(&p->queue->hints->noted, p->boot_tick, memory_order_relaxed);
}

/* Words that the dead held. True: this process holds the wheel, which is empty. */
static bool mend_words(pass *p) {
  ms_queue *queue = p->queue;
  uint32_t owner;
  bool wheel = false;
  if (p->dead_count) {
    uint32_t held = atomic_load_explicit(&queue->hints->wheel, memory_order_relaxed);
    if (is_among(held & ~MS_OWNER_WAITERS, p->dead, p->dead_count))
      wheel = ms_owner_take_over(&queue->hints->wheel, queue->self, held, &owner) == MS_OK;
    if (wheel) ms_wheel_init(&queue->wheel, p->boot_tick);
  }
  for (uint32_t i = 0; queue->buckets && p->dead_count && i < MS_QUEUE_BUCKETS; i++) {
    uint32_t held = atomic_load_explicit(&queue->buckets[i].word, memory_order_relaxed);
    if (!is_among(held & ~MS_OWNER_WAITERS, p->dead, p->dead_count)) continue;
    if (ms_owner_take_over(&queue->buckets[i].word, queue->self, held, &owner) != MS_OK) continue;
    /* Waiting for the wheel would be waiting for ourselves: a later sweep arms what is delayed. */
    ms_bucket_rebuild(queue, i, p->now);
    ms_owner_release(&queue->buckets[i].word);
  }
  ms_claim_mend(queue, p->dead, p->dead_count);
  return wheel;
}

uint32_t ms_queue_sweep(ms_queue *queue, const ms_instant *now, const uint32_t *dead,
                        uint32_t dead_count) {
  ms_hints_header *hints = queue->hints;
  uint32_t owner;
  pass p = {.queue = queue, .now = now, .dead = dead, .dead_count = dead_count};
  p.mono_tick = ms_tick_floor(now->mono_ns);
  p.boot_tick = ms_tick_floor(now->boot_ns);
  p.lease_due = p.expiry_due = INT64_MAX;
  atomic_store_explicit(&hints->swept, (uint64_t)now->mono_ns, memory_order_relaxed);
  /* Before the pass, so that a lease or a delay that comes meanwhile lowers it again. */
  atomic_store_explicit(&hints->lease_due, UINT64_MAX, memory_order_seq_cst);
  uint64_t expiry = atomic_load_explicit(&hints->expiry_due, memory_order_relaxed);
  p.expire = expiry <= (uint64_t)now->time_us;
  if (p.expire) atomic_store_explicit(&hints->expiry_due, UINT64_MAX, memory_order_seq_cst);
  p.rearm = mend_words(&p);
  if (!p.rearm && atomic_load_explicit(&hints->missed, memory_order_relaxed))
    p.rearm = ms_owner_try_take(&hints->wheel, queue->self, &owner) == MS_OK;
  bool held_wheel = p.rearm;
  if (p.rearm) atomic_store_explicit(&hints->missed, 0, memory_order_seq_cst);
  int64_t wall_offset;
  p.wall_set = ms_queue_wall_was_set(queue, &wall_offset);
  pass_damaged_cells(queue);
  p.noted = atomic_load_explicit(&hints->noted, memory_order_relaxed);
  p.reconcile = hints_are_due(queue, p.boot_tick);
  /* The dead may have readied a message and not hinted it. What the ring has now comes first. */
  if (p.reconcile || dead_count) note_tails(&p);
  if (p.reconcile || dead_count)
    atomic_store_explicit(&hints->suspect, dead_count > 0, memory_order_relaxed);
  if (atomic_load_explicit(&hints->suspect, memory_order_relaxed)) /* a sleeper wakes then */
    due_at(&p, now->mono_ns + 2 * SUSPECT_MS * MS_NS_PER_TICK);
  uint32_t count = ms_slot_count(queue);
  for (uint32_t slot = 0; slot < count; slot++) {
    uint64_t word = atomic_load_explicit(ms_word_at(queue, slot), memory_order_relaxed);
    uint32_t state = ms_word_state(word);
    if (state == MS_MESSAGE_FREE || state == MS_MESSAGE_SPARE || state == MS_MESSAGE_DEAD) continue;
    if (state == MS_MESSAGE_READY && !p.reconcile && !p.expire) continue; /* most of them */
    atomic_thread_fence(memory_order_acquire); /* pairs with the release in ms_move */
    sweep_slot(&p, slot, word);
  }
  if (p.wall_set) MS_POKE(hints->wall_offset, wall_offset); /* after: a death leaves it to others */
  if (held_wheel) {
    atomic_store_explicit(&hints->wheel_due, ms_wheel_next(&queue->wheel), memory_order_release);
    ms_owner_release(&hints->wheel);
  }
  /* It may be of one of the dead: only the journal tells, and the core cannot ask it. */
  if (dead_count && p.undecided) MS_POKE(hints->undecided, 1);
  if (dead_count) {
    ms_queue_balance(queue);
    for (uint32_t i = 0; i < dead_count; i++) {
      _Atomic uint32_t *entry = &queue->participants[ms_owner_index(dead[i]) % MS_MEMBER_COUNT_MAX];
      uint32_t gone = dead[i];
      atomic_compare_exchange_strong_explicit(entry, &gone, 0, memory_order_relaxed,
                                              memory_order_relaxed);
    }
  }
  if (p.lease_due != INT64_MAX) ms_lower(&hints->lease_due, (uint64_t)p.lease_due);
  if (p.expiry_due != INT64_MAX) ms_lower(&hints->expiry_due, (uint64_t)p.expiry_due);
  if (p.ready) ms_queue_wake(queue, MS_WAIT_MESSAGE, (int32_t)p.ready);
  return p.ready;
}

bool ms_queue_sweep_due(const ms_queue *queue, const ms_instant *now) {
  const ms_hints_header *hints = queue->hints;
  if (atomic_load_explicit(&hints->lease_due, memory_order_relaxed) <= (uint64_t)now->mono_ns)
    return true;
  if (atomic_load_explicit(&hints->expiry_due, memory_order_relaxed) <= (uint64_t)now->time_us)
    return true;
  int64_t wall_offset;
  if (ms_queue_wall_was_set(queue, &wall_offset)) return true;
  if (atomic_load_explicit(&hints->missed, memory_order_relaxed) &&
      atomic_load_explicit(&hints->swept, memory_order_relaxed) + RETRY_NS <=
          (uint64_t)now->mono_ns)
    return true;
  return hints_are_due(queue, ms_tick_floor(now->boot_ns));
}

bool ms_queue_claim_watch(ms_queue *queue, const ms_instant *now, int64_t interval_ns) {
  _Atomic uint64_t *watched = &queue->hints->watched;
  uint64_t last = atomic_load_explicit(watched, memory_order_relaxed);
  if (last + (uint64_t)interval_ns > (uint64_t)now->mono_ns && last <= (uint64_t)now->mono_ns)
    return false;
  return atomic_compare_exchange_strong_explicit(watched, &last, (uint64_t)now->mono_ns,
                                                 memory_order_relaxed, memory_order_relaxed);
}
