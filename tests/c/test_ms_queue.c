/* One queue in memory: the ends of a message, capacity, dead letters, order, blocks, recovery. */
#include "check.h"
#include "ms_claim.h"
#include "ms_count.h"
#include "ms_decide.h"
#include "ms_delivery.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_recover.h"
#include "ms_room.h"
#include "ms_sweep.h"

#include <stdlib.h>
#include <string.h>

enum { SLOT_BYTES = 256, CAPACITY = 40, DEAD_LIMIT = 6, LANES = 3, BLOCKS = 1024 };
static const uint32_t SELF = 1u | 7u << 15;
static const uint32_t OTHER = 2u | 3u << 15;
static ms_instant now;

static void *pages(uint64_t size) {
  void *memory =
      aligned_alloc(MS_PAGE_BYTES, (size + MS_PAGE_BYTES - 1) / MS_PAGE_BYTES * MS_PAGE_BYTES);
  CHECK(memory != NULL);
  memset(memory, 0, (size_t)size);
  return memory;
}

static void attach(ms_queue *queue) {
  ms_error err;
  CHECK(ms_queue_attach(
            queue, ms_slots_size(SLOT_BYTES, CAPACITY + DEAD_LIMIT), ms_blocks_size(BLOCKS),
            ms_hints_size(CAPACITY + DEAD_LIMIT, LANES, queue->hints->ordered), &err) == MS_OK);
}

static void new_hints(ms_queue *queue, bool ordered) {
  free(queue->hints);
  queue->hints = pages(ms_hints_size(CAPACITY + DEAD_LIMIT, LANES, ordered));
  queue->hints->slot_max = CAPACITY + DEAD_LIMIT;
  queue->hints->lanes = LANES;
  queue->hints->cell_bits = 7; /* twice the slots */
  queue->hints->ordered = ordered;
  attach(queue);
}

static void recover(ms_queue *queue) {
  void *scratch = malloc(ms_queue_scratch_size(queue));
  ms_queue_recover(queue, true, &now, scratch);
  free(scratch);
}

static void make(ms_queue *queue, bool ordered) {
  memset(queue, 0, sizeof(*queue));
  now = (ms_instant){INT64_C(5000000000), INT64_C(9000000000), INT64_C(1700000000000000)};
  queue->slots = pages(ms_slots_size(SLOT_BYTES, CAPACITY + DEAD_LIMIT));
  queue->blocks = pages(ms_blocks_size(BLOCKS));
  queue->slot_bytes = SLOT_BYTES;
  queue->slot_max = CAPACITY + DEAD_LIMIT;
  queue->capacity = CAPACITY;
  queue->dead_limit = DEAD_LIMIT;
  queue->block_max = BLOCKS;
  queue->lanes = LANES;
  queue->self = SELF;
  queue->max_attempts = 3;
  queue->salt = 42;
  queue->slots->next_id = 1;
  new_hints(queue, ordered);
  recover(queue);
  ms_queue_publish_slots(queue, CAPACITY + DEAD_LIMIT);
  ms_queue_publish_blocks(queue, BLOCKS);
}

static void drop(ms_queue *queue) {
  free(queue->slots);
  free(queue->blocks);
  free(queue->hints);
}

static void pass_ms(int64_t ms) {
  now.mono_ns += ms * 1000000;
  now.boot_ns += ms * 1000000;
  now.time_us += ms * 1000;
}

static void sound(const ms_queue *queue) {
  char text[200] = "";
  if (!ms_queue_check(queue, text, sizeof(text))) fprintf(stderr, "%s\n", text);
  CHECK(text[0] == 0);
}

static ms_status put(ms_queue *queue, const char *payload, uint32_t lane, int64_t delay_ms,
                     uint64_t key_hash, ms_lease *out) {
  ms_message message = {.payload = (const uint8_t *)payload,
                        .payload_length = (uint32_t)strlen(payload),
                        .lane = lane,
                        .delay_ns = delay_ms * 1000000,
                        .due_us = delay_ms ? now.time_us + delay_ms * 1000 : 0,
                        .key_hash = key_hash};
  uint32_t owner;
  ms_error err;
  return ms_queue_try_put(queue, &message, &now, out, &owner, &err);
}

static ms_status put_as(ms_queue *queue, ms_message message, ms_lease *out) {
  uint32_t owner;
  ms_error err;
  message.payload = (const uint8_t *)"x";
  message.payload_length = 1;
  return ms_queue_try_put(queue, &message, &now, out, &owner, &err);
}

static ms_status get(ms_queue *queue, ms_lease *out) {
  int64_t next;
  ms_queue_try_advance(queue, &now, &next);
  return ms_queue_try_get(queue, 1000, &now, NULL, out);
}

static bool is(const ms_queue *queue, const ms_lease *lease, const char *text) {
  const ms_slot *slot = ms_queue_slot(queue, lease->slot);
  return slot->payload_length == strlen(text) &&
         memcmp(ms_queue_inline(queue, slot), text, strlen(text)) == 0;
}

static uint32_t state_of(const ms_queue *queue, const ms_lease *lease) {
  return ms_word_state(atomic_load(ms_queue_word(queue, lease->slot)));
}

static ms_status ack(ms_queue *queue, const ms_lease *lease) {
  uint32_t owner;
  return ms_queue_try_ack(queue, lease, &now, &owner);
}

static void test_lanes_are_strict_and_each_in_order(void) {
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  const char *texts[] = {"c", "a", "d", "b"};
  uint32_t lanes[] = {1, 0, 2, 0};
  for (int i = 0; i < 4; i++) CHECK(put(&queue, texts[i], lanes[i], 0, 0, &lease) == MS_OK);
  const char *order[] = {"a", "b", "c", "d"};
  for (int i = 0; i < 4; i++) {
    CHECK(get(&queue, &lease) == MS_OK);
    CHECK(is(&queue, &lease, order[i]));
    CHECK(ms_word_attempts(lease.word) == 1);
    CHECK(ack(&queue, &lease) == MS_OK);
    CHECK(ack(&queue, &lease) == MS_LOST);
    sound(&queue);
  }
  CHECK(get(&queue, &lease) == MS_EMPTY);
  drop(&queue);
}

static void test_ageing_takes_what_waits_longest(void) {
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  queue.ageing = true;
  CHECK(put(&queue, "last", LANES - 1, 0, 0, &lease) == MS_OK);
  int gets = 0;
  do { /* all within one tick */
    CHECK(put(&queue, "first", 0, 0, 0, &lease) == MS_OK);
    CHECK(put(&queue, "first", 0, 0, 0, &lease) == MS_OK);
    CHECK(get(&queue, &lease) == MS_OK);
    gets++;
    if (!is(&queue, &lease, "first")) break;
    CHECK(ack(&queue, &lease) == MS_OK);
    CHECK(get(&queue, &lease) == MS_OK);
    gets++;
    if (!is(&queue, &lease, "first")) break;
    CHECK(ack(&queue, &lease) == MS_OK);
  } while (gets < 200);
  CHECK(gets == 64);
  drop(&queue);
}

static void test_capacity_is_exact_and_room_comes_back(void) {
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  for (int round = 0; round < 50; round++) {
    for (int i = 0; i < CAPACITY; i++) CHECK(put(&queue, "x", 0, 0, 0, &lease) == MS_OK);
    CHECK(put(&queue, "x", 0, 0, 0, &lease) == MS_FULL);
    sound(&queue);
    for (int i = 0; i < CAPACITY; i++) {
      CHECK(get(&queue, &lease) == MS_OK);
      CHECK(ack(&queue, &lease) == MS_OK);
    }
  }
  drop(&queue);
}

static void test_attempts_end_in_dead_letters_and_come_back(void) {
  ms_queue queue;
  ms_lease lease;
  ms_failure failure;
  uint32_t owner;
  make(&queue, false);
  for (int i = 0; i < DEAD_LIMIT + 3; i++) {
    CHECK(put(&queue, "poison", 0, 0, 0, &lease) == MS_OK);
    uint64_t id = lease.id;
    for (int attempt = 1; attempt <= 3; attempt++) {
      bool dead;
      char text[32];
      int length = snprintf(text, sizeof(text), "error %d", attempt);
      CHECK(get(&queue, &lease) == MS_OK && lease.id == id);
      CHECK(ms_queue_try_nack(&queue, &lease, 5000000, MS_FAILED, text, (size_t)length, &now, &dead,
                              &owner) == MS_OK);
      CHECK(dead == (attempt == 3));
      CHECK(get(&queue, &lease) == MS_EMPTY);
      pass_ms(6);
      sound(&queue);
    }
    uint64_t word;
    uint32_t slot = ms_queue_find(&queue, id, &word);
    CHECK(ms_word_state(word) == MS_MESSAGE_DEAD);
    CHECK(ms_queue_failure(&queue, slot, id, &failure));
    CHECK(failure.attempts == 3 && memcmp(failure.first, "error 1", 7) == 0 &&
          memcmp(failure.last, "error 3", 7) == 0);
  }
  ms_queue_counts counts;
  ms_queue_count(&queue, &counts);
  CHECK(counts.dead == DEAD_LIMIT && queue.slots->evicted == 3 && counts.free == CAPACITY);
  for (int i = 0; i < CAPACITY; i++) CHECK(put(&queue, "x", 1, 0, 0, &lease) == MS_OK);
  CHECK(put(&queue, "x", 0, 0, 0, &lease) == MS_FULL);
  sound(&queue);
  for (uint32_t slot = 0, left = 1; slot < CAPACITY + DEAD_LIMIT; slot++) {
    uint64_t word = atomic_load(ms_queue_word(&queue, slot));
    if (ms_word_state(word) != MS_MESSAGE_DEAD) continue;
    if (left) { /* no room: */
      CHECK(ms_queue_try_redrive(&queue, slot, word, &now, &owner) == MS_FULL);
      CHECK(get(&queue, &lease) == MS_OK && ack(&queue, &lease) == MS_OK);
      CHECK(ms_queue_try_redrive(&queue, slot, word, &now, &owner) == MS_OK);
      CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "poison"));
      CHECK(ms_word_attempts(lease.word) == 1);
      left = 0;
    }
  }
  sound(&queue);
  drop(&queue);
}

static void test_leases_end_by_time_and_by_death(void) {
  ms_queue queue;
  ms_lease first, second;
  uint32_t dead = OTHER;
  make(&queue, false);
  CHECK(put(&queue, "work", 0, 0, 0, &first) == MS_OK);
  CHECK(get(&queue, &first) == MS_OK);
  pass_ms(999);
  CHECK(!ms_queue_sweep_due(&queue, &now) || ms_queue_sweep(&queue, &now, NULL, 0) == 0);
  CHECK(ms_queue_try_extend(&queue, &first, 1000, &now) == MS_OK);
  pass_ms(999);
  ms_queue_sweep(&queue, &now, NULL, 0);
  CHECK(ms_queue_holds(&queue, &first));
  pass_ms(3);
  CHECK(ms_queue_sweep_due(&queue, &now));
  CHECK(ms_queue_sweep(&queue, &now, NULL, 0) == 1);
  CHECK(ack(&queue, &first) == MS_LOST);
  queue.self = OTHER; /* another process takes it, and dies */
  CHECK(get(&queue, &second) == MS_OK && ms_word_attempts(second.word) == 2);
  queue.self = SELF;
  CHECK(ms_queue_sweep(&queue, &now, &dead, 1) == 1);
  CHECK(get(&queue, &first) == MS_OK && ms_word_attempts(first.word) == 3);
  pass_ms(2000);
  CHECK(ms_queue_sweep(&queue, &now, NULL, 0) == 0); /* attempts spent: dead */
  uint64_t word;
  ms_queue_find(&queue, first.id, &word);
  CHECK(ms_word_state(word) == MS_MESSAGE_DEAD);
  sound(&queue);
  drop(&queue);
}

static void test_leases_of_a_former_owner_of_the_number_are_given_on(void) {
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  CHECK(put(&queue, "work", 0, 0, 0, &lease) == MS_OK);
  CHECK(get(&queue, &lease) == MS_OK);
  queue.self += 1u << 15; /* the next incarnation of the same member */
  CHECK(get(&queue, &lease) == MS_OK && ms_word_attempts(lease.word) == 2);
  drop(&queue);
}

static void test_delays_are_never_early(void) {
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  CHECK(put(&queue, "later", 0, 100, 0, &lease) == MS_OK);
  CHECK(put(&queue, "much later", 0, INT64_C(400) * 86400000, 0, &lease) == MS_OK);
  pass_ms(99);
  CHECK(get(&queue, &lease) == MS_EMPTY);
  pass_ms(2);
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "later"));
  CHECK(ack(&queue, &lease) == MS_OK);
  for (int day = 0; day < 399; day += 19) { /* parked again and again */
    pass_ms(INT64_C(19) * 86400000 - 1000);
    ms_queue_sweep(&queue, &now, NULL, 0);
    CHECK(get(&queue, &lease) == MS_EMPTY);
    sound(&queue);
  }
  for (int i = 0; i < 60; i++) {
    pass_ms(86400000);
    if (get(&queue, &lease) == MS_OK) {
      CHECK(now.time_us >= ms_queue_slot(&queue, lease.slot)->due);
      break;
    }
  }
  CHECK(is(&queue, &lease, "much later"));
  drop(&queue);
}

/* Between the move to DELAYED and the wheel it was cancelled, and the slot given to another. */
static void test_delay_is_not_made_longer_by_the_message_before_in_its_slot(void) {
  ms_queue queue;
  ms_lease first, second, taken;
  uint32_t owner;
  make(&queue, false);
  CHECK(put(&queue, "a", 0, 3600000, 0, &first) == MS_OK);
  CHECK(ms_queue_try_cancel(&queue, first.slot, first.word, &now, &owner) == MS_OK);
  do { /* until the same slot comes again */
    CHECK(put(&queue, "b", 0, 1000, 0, &second) == MS_OK);
    if (second.slot != first.slot)
      CHECK(ms_queue_try_cancel(&queue, second.slot, second.word, &now, &owner) == MS_OK);
  } while (second.slot != first.slot);
  ms_queue_arm(&queue, first.slot, first.word, &now); /* as late as that */
  pass_ms(1001);
  CHECK(get(&queue, &taken) == MS_OK && is(&queue, &taken, "b"));
  sound(&queue);
  drop(&queue);
}

static void test_long_delays_are_never_early_and_come(void) {
  static const int days[] = {29, 30, 31, 40, 90, 150, 365};
  static const int steps[] = {1, 20};
  for (size_t i = 0; i < sizeof(days) / sizeof(days[0]) * 2; i++) {
    ms_queue queue;
    ms_lease lease;
    make(&queue, false);
    int64_t delay = INT64_C(86400000) * days[i / 2], step = delay / steps[i % 2];
    CHECK(put(&queue, "x", 0, delay, 0, &lease) == MS_OK);
    int64_t due = now.time_us + delay * 1000;
    for (int turn = 0; turn < 60 && get(&queue, &lease) != MS_OK; turn++) {
      int64_t left = (due - now.time_us) / 1000;
      pass_ms(left > step ? step - 60000 : left > 1 ? left - 1 : left > -5 ? 1 : 60000);
      ms_queue_sweep(&queue, &now, NULL, 0);
    }
    if (!CHECK(now.time_us >= due && now.time_us < due + 200000000))
      printf("  %d days in %d steps: %" PRId64 " s late\n", days[i / 2], steps[i % 2],
             (now.time_us - due) / 1000000);
    CHECK(is(&queue, &lease, "x"));
    drop(&queue);
  }
}

static void test_one_of_a_key_is_in_flight(void) {
  ms_queue queue;
  ms_lease a, b, c;
  uint32_t owner;
  bool dead;
  make(&queue, true);
  CHECK(put(&queue, "a1", 0, 0, 77, &a) == MS_OK);
  CHECK(put(&queue, "a2", 0, 0, 77, &a) == MS_OK);
  CHECK(put(&queue, "a3", 0, 50, 77, &a) == MS_OK);
  CHECK(put(&queue, "b1", 0, 0, 78, &a) == MS_OK);
  CHECK(get(&queue, &a) == MS_OK && is(&queue, &a, "a1"));
  CHECK(get(&queue, &b) == MS_OK && is(&queue, &b, "b1"));
  CHECK(get(&queue, &c) == MS_EMPTY);
  CHECK(ms_queue_try_nack(&queue, &a, 10000000, MS_FAILED, "no", 2, &now, &dead, &owner) == MS_OK);
  CHECK(get(&queue, &c) == MS_EMPTY); /* a2 waits for a1's retry */
  pass_ms(11);
  CHECK(get(&queue, &a) == MS_OK && is(&queue, &a, "a1"));
  CHECK(ack(&queue, &a) == MS_OK);
  CHECK(get(&queue, &a) == MS_OK && is(&queue, &a, "a2"));
  CHECK(ack(&queue, &a) == MS_OK);
  CHECK(get(&queue, &a) == MS_EMPTY);
  sound(&queue);
  pass_ms(40);
  CHECK(get(&queue, &a) == MS_OK && is(&queue, &a, "a3"));
  /* what a dead owner of the bucket left is made anew */
  CHECK(put(&queue, "a4", 0, 0, 77, &c) == MS_OK);
  atomic_store(&queue.buckets[77].word, OTHER);
  queue.buckets[77].head = queue.buckets[77].tail = 12345;
  uint32_t gone = OTHER;
  ms_queue_sweep(&queue, &now, &gone, 1);
  CHECK(ack(&queue, &a) == MS_OK);
  CHECK(get(&queue, &a) == MS_OK && is(&queue, &a, "a4"));
  sound(&queue);
  drop(&queue);
}

static void test_order_of_a_key_is_made_anew_whatever_slots_it_lies_in(void) {
  static const uint32_t slots[] = {5, 12, 7, 3}; /* by the order of ids */
  ms_queue queue;
  ms_lease lease;
  uint32_t gone = OTHER;
  make(&queue, true);
  for (uint32_t i = 0; i < 4; i++) {
    CHECK(put_as(&queue, (ms_message){.id = 10 + i, .slot = slots[i], .key_hash = 77}, &lease) ==
          MS_OK);
    CHECK_EQ_U64(lease.slot, slots[i]);
  }
  atomic_store(&queue.buckets[77].word, OTHER);
  queue.buckets[77].head = queue.buckets[77].tail = 12345;
  ms_queue_sweep(&queue, &now, &gone, 1);
  for (uint32_t i = 0; i < 4; i++) {
    CHECK(get(&queue, &lease) == MS_OK);
    CHECK_EQ_U64(lease.id, 10 + i);
    CHECK(ack(&queue, &lease) == MS_OK);
  }
  sound(&queue);
  drop(&queue);
}

static void test_wheel_that_a_dead_process_held_is_made_anew(void) {
  ms_queue queue;
  ms_lease lease;
  uint32_t gone = OTHER;
  make(&queue, false);
  CHECK(put(&queue, "later", 0, 100, 0, &lease) == MS_OK);
  atomic_store(&queue.hints->wheel, OTHER);
  memset(queue.wheel.state, 0xff, sizeof(*queue.wheel.state));
  ms_queue_sweep(&queue, &now, &gone, 1);
  CHECK_EQ_U64(atomic_load(&queue.hints->wheel), MS_OWNER_FREE);
  sound(&queue);
  pass_ms(99);
  CHECK(get(&queue, &lease) == MS_EMPTY);
  pass_ms(2);
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "later"));
  drop(&queue);
}

/* The owner of the bucket lives: what could not be done is done by the sweep after next. */
static void test_what_time_ends_waits_for_the_bucket_of_its_key(void) {
  ms_queue queue;
  ms_lease held, expiring;
  make(&queue, true);
  queue.max_attempts = 1;
  CHECK(put(&queue, "x", 0, 0, 77, &held) == MS_OK && get(&queue, &held) == MS_OK);
  ms_message message = {.key_hash = 78, .expires_us = now.time_us + 500000};
  CHECK(put_as(&queue, message, &expiring) == MS_OK);
  atomic_store(&queue.buckets[77].word, OTHER);
  atomic_store(&queue.buckets[78].word, OTHER);
  pass_ms(2000);
  ms_queue_sweep(&queue, &now, NULL, 0);
  CHECK(state_of(&queue, &held) == MS_MESSAGE_LEASED);
  CHECK(state_of(&queue, &expiring) == MS_MESSAGE_READY);
  atomic_store(&queue.buckets[77].word, MS_OWNER_FREE);
  atomic_store(&queue.buckets[78].word, MS_OWNER_FREE);
  CHECK(ms_queue_sweep_due(&queue, &now));
  ms_queue_sweep(&queue, &now, NULL, 0);
  CHECK(state_of(&queue, &expiring) == MS_MESSAGE_FREE && queue.slots->expired == 1);
  pass_ms(1020); /* the sweep itself has leased it, to write down why it failed */
  CHECK(ms_queue_sweep_due(&queue, &now));
  ms_queue_sweep(&queue, &now, NULL, 0);
  CHECK(state_of(&queue, &held) == MS_MESSAGE_DEAD);
  sound(&queue);
  drop(&queue);
}

static void test_time_of_the_wall_clock_comes_sooner_when_that_is_set(void) {
  const int64_t half_hour = INT64_C(1800000000000);
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  ms_message message = {.absolute = true,
                        .due_us = ms_clock_wall_us() + 2 * half_hour / 1000,
                        .delay_ns = 2 * half_hour};
  CHECK(put_as(&queue, message, &lease) == MS_OK);
  ms_clock_set(true, 0, half_hour);
  CHECK(ms_queue_sweep_due(&queue, &now));
  ms_queue_sweep(&queue, &now, NULL, 0);
  pass_ms(half_hour / 1000000 - 1000);
  CHECK(get(&queue, &lease) == MS_EMPTY);
  ms_clock_set(true, half_hour, half_hour);
  pass_ms(2000);
  CHECK(get(&queue, &lease) == MS_OK);
  ms_clock_set(false, 0, 0);
  sound(&queue);
  drop(&queue);
}

static void test_word_that_is_not_the_token_ends_nothing(void) {
  ms_queue queue;
  ms_lease lease, prepared;
  uint64_t word;
  uint32_t owner;
  make(&queue, false);
  CHECK(put(&queue, "x", 0, 0, 0, &lease) == MS_OK && get(&queue, &lease) == MS_OK);
  ms_lease stale = lease;
  stale.word ^= UINT64_C(1) << 34; /* of another grant */
  CHECK(ms_queue_try_reject(&queue, &stale, MS_FAILED_REJECTED, "", 0, &now, &owner) == MS_LOST);
  CHECK(ms_queue_bury(&queue, stale.slot, stale.word, &now, &owner) == MS_LOST);
  CHECK(ms_queue_try_decide(&queue, lease.slot, lease.word, true, &now, &owner) == MS_LOST);
  CHECK(put_as(&queue, (ms_message){.transaction = 6}, &prepared) == MS_OK);
  CHECK(ms_queue_try_prepare_ack(&queue, &lease, 6, &now, &word) == MS_OK);
  for (int committed = 0; committed < 2; committed++) { /* of another transaction */
    CHECK(ms_queue_try_decide(&queue, prepared.slot, prepared.word ^ 1, committed, &now, &owner) ==
          MS_LOST);
    CHECK(ms_queue_try_decide(&queue, lease.slot, word ^ 1, committed, &now, &owner) == MS_LOST);
  }
  CHECK(ms_queue_try_undo_ack(&queue, &lease, word ^ 1) == MS_LOST);
  CHECK(atomic_load(ms_queue_word(&queue, lease.slot)) == word);
  CHECK(state_of(&queue, &prepared) == MS_MESSAGE_PREPARED);
  CHECK(ms_queue_try_undo_ack(&queue, &lease, word) == MS_OK && ms_queue_holds(&queue, &lease));
  sound(&queue);
  drop(&queue);
}

static void test_put_and_ack_of_a_poisoned_queue_are_refused(void) {
  ms_queue queue;
  ms_lease lease, other;
  make(&queue, false);
  CHECK(put(&queue, "x", LANES, 0, 0, &other) == MS_INVALID);
  CHECK(put(&queue, "x", 0, 0, 0, &lease) == MS_OK && get(&queue, &lease) == MS_OK);
  atomic_store(&queue.slots->poison, 1);
  CHECK(put(&queue, "x", 0, 0, 0, &other) == MS_POISONED);
  CHECK(ack(&queue, &lease) == MS_POISONED);
  CHECK(ms_queue_holds(&queue, &lease));
  drop(&queue);
}

static void test_maps_of_other_sizes_are_refused(void) {
  const uint64_t slots = ms_slots_size(SLOT_BYTES, CAPACITY + DEAD_LIMIT);
  const uint64_t blocks = ms_blocks_size(BLOCKS);
  const uint64_t hints = ms_hints_size(CAPACITY + DEAD_LIMIT, LANES, true);
  ms_queue queue;
  ms_error err;
  make(&queue, true);
  CHECK(ms_queue_attach(&queue, slots, blocks, hints, &err) == MS_OK);
  CHECK(ms_queue_attach(&queue, slots - 1, blocks, hints, &err) == MS_CORRUPT);
  CHECK(ms_queue_attach(&queue, slots, blocks - 1, hints, &err) == MS_CORRUPT);
  CHECK(ms_queue_attach(&queue, slots, blocks, hints - 1, &err) == MS_CORRUPT);
  ms_queue other = queue;
  other.lanes--;
  CHECK(ms_queue_attach(&other, slots, blocks, hints, &err) == MS_CORRUPT);
  other.lanes = 0;
  CHECK(ms_queue_attach(&other, slots, blocks, hints, &err) == MS_INVALID);
  other = queue;
  other.slot_bytes = 100;
  CHECK(ms_queue_attach(&other, slots, blocks, hints, &err) == MS_INVALID);
  other = queue;
  other.slot_max = 1u << 24;
  CHECK(ms_queue_attach(&other, UINT64_MAX, blocks, hints, &err) == MS_INVALID);
  drop(&queue);
}

static void test_hints_that_cannot_be_moved_are_given_back(void) {
  enum { BUSY = 200 };
  ms_queue queue;
  ms_lease lease;
  uint32_t owner, taken = 0;
  make(&queue, true);
  CHECK(put(&queue, "x", 0, 0, 5, &lease) == MS_OK);
  ms_queue to = queue;
  to.hints = NULL;
  new_hints(&to, true);
  void *scratch = malloc(ms_queue_scratch_size(&queue));
  atomic_store(&queue.buckets[BUSY].word, OTHER);
  CHECK(ms_queue_move_hints(&queue, &to, &now, &taken, scratch, &owner) == MS_BUSY);
  CHECK(owner == OTHER);
  CHECK_EQ_U64(taken, 1 + BUSY);
  CHECK(put(&queue, "y", 0, 0, 5, &lease) == MS_BUSY);
  CHECK(put(&queue, "later", 0, 100, 0, &lease) == MS_OK); /* and not armed */
  ms_queue_give_back_hints(&queue, taken);
  for (uint32_t i = 0; i < BUSY; i++) CHECK(atomic_load(&queue.buckets[i].word) == MS_OWNER_FREE);
  CHECK(atomic_load(&queue.buckets[BUSY].word) == OTHER);
  CHECK(put(&queue, "y", 0, 0, 5, &lease) == MS_OK);
  ms_queue_give_back_hints(&queue, 0); /* of nothing: the bucket is still the other's */
  CHECK(atomic_load(&queue.buckets[BUSY].word) == OTHER);
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "x") && ack(&queue, &lease) == MS_OK);
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "y"));
  pass_ms(101);
  CHECK(ms_queue_sweep_due(&queue, &now));
  ms_queue_sweep(&queue, &now, NULL, 0);
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "later"));
  sound(&queue);
  free(scratch);
  free(to.hints);
  drop(&queue);
}

static void test_long_content_lies_in_blocks(void) {
  ms_queue queue;
  ms_lease lease;
  ms_error err;
  make(&queue, false);
  size_t sizes[] = {0, 1, 159, 160, 161, 4095, 4096, 4097, 100000, 1 << 20};
  for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
    char *text = malloc(sizes[i] + 1), *copy = malloc(sizes[i] + 1);
    for (size_t j = 0; j < sizes[i]; j++) text[j] = (char)('a' + j % 23);
    text[sizes[i]] = 0;
    for (int round = 0; round < 12; round++) {
      CHECK(put(&queue, text, 0, 0, 0, &lease) == MS_OK);
      CHECK(get(&queue, &lease) == MS_OK);
      const ms_slot *slot = ms_queue_slot(&queue, lease.slot);
      const uint8_t *content = ms_queue_inline(&queue, slot);
      CHECK((content != NULL) == (sizes[i] <= 160));
      if (!content) {
        CHECK(ms_queue_copy_content(&queue, lease.slot, copy, sizes[i] - 1, &err) == MS_CORRUPT);
        CHECK(ms_queue_copy_content(&queue, lease.slot, copy, sizes[i], &err) == MS_OK);
        CHECK(memcmp(copy, text, sizes[i]) == 0);
      } else {
        CHECK(memcmp(content, text, sizes[i]) == 0);
      }
      CHECK(ack(&queue, &lease) == MS_OK);
    }
    free(text);
    free(copy);
  }
  char *large = malloc((5u << 20) + 1);
  memset(large, 'x', 5u << 20);
  large[5u << 20] = 0;
  CHECK(put(&queue, large, 0, 0, 0, &lease) == MS_FULL); /* 4 MiB of blocks */
  free(large);
  sound(&queue);
  drop(&queue);
}

static void test_recovery_keeps_what_was_put(void) {
  ms_queue queue;
  ms_lease lease;
  make(&queue, false);
  CHECK(ms_queue_recover_claims(&queue, &now) == MS_OK); /* it has no deduplication */
  for (int i = 0; i < 10; i++) {
    char text[8] = {(char)('0' + i)};
    CHECK(put(&queue, text, 0, i == 3 ? 60000 : 0, 0, &lease) == MS_OK);
  }
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "0"));
  uint64_t word;
  uint32_t slot = ms_queue_find(&queue, lease.id + 5, &word);
  ((uint8_t *)(uintptr_t)ms_queue_slot(&queue, slot))[96] ^= 1; /* torn: "5" */
  new_hints(&queue, false);
  now.boot_ns = 77; /* a reboot */
  now.mono_ns = 78;
  pass_ms(1);
  recover(&queue);
  ms_queue_counts counts;
  ms_queue_count(&queue, &counts);
  CHECK(counts.ready == 8 && counts.delayed == 1 && counts.dead == 1);
  const char *order[] = {"0", "1", "2", "4", "6", "7", "8", "9"};
  for (int i = 0; i < 8; i++) {
    CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, order[i]));
    CHECK(ms_word_attempts(lease.word) == (i == 0 ? 2 : 1));
    CHECK(ack(&queue, &lease) == MS_OK);
  }
  CHECK(get(&queue, &lease) == MS_EMPTY);
  pass_ms(59990);
  CHECK(get(&queue, &lease) == MS_EMPTY);
  pass_ms(20);
  CHECK(get(&queue, &lease) == MS_OK && is(&queue, &lease, "3"));
  sound(&queue);
  drop(&queue);
}

static void test_the_check_catches_planted_faults(void) {
  ms_queue queue;
  ms_lease lease;
  char text[200];
  uint32_t owner;
  make(&queue, false);
  CHECK(put(&queue, "dead", 0, 0, 0, &lease) == MS_OK && get(&queue, &lease) == MS_OK);
  CHECK(ms_queue_try_reject(&queue, &lease, MS_FAILED_REJECTED, "", 0, &now, &owner) == MS_OK);
  CHECK(put(&queue, "x", LANES - 1, 0, 0, &lease) == MS_OK);
  _Atomic uint64_t *word = ms_queue_word(&queue, lease.slot);
  for (int bit = 59; bit < 64; bit++) { /* one flipped bit is no state */
    *word ^= UINT64_C(1) << bit;
    CHECK(!ms_queue_check(&queue, text, sizeof(text)));
    uint64_t damaged = *word;
    ms_queue_sweep(&queue, &now, NULL, 0);
    CHECK(*word == damaged); /* it is nobody's to mend */
    *word ^= UINT64_C(1) << bit;
  }
  *word += UINT64_C(1) << 40;
  CHECK(!ms_queue_check(&queue, text, sizeof(text)));
  *word -= UINT64_C(1) << 40;
  queue.capacity = 0;
  CHECK(!ms_queue_check(&queue, text, sizeof(text)) && strstr(text, "than the capacity"));
  queue.capacity = CAPACITY;
  queue.dead_limit = 0;
  CHECK(!ms_queue_check(&queue, text, sizeof(text)) && strstr(text, "than dead_limit"));
  queue.dead_limit = DEAD_LIMIT;
  queue.lanes--;
  CHECK(!ms_queue_check(&queue, text, sizeof(text)) && strstr(text, "no such lane"));
  queue.lanes++;
  queue.rings[0].ends->head += UINT64_C(1) << 40;
  CHECK(!ms_queue_check(&queue, text, sizeof(text)) && strstr(text, "ring is damaged"));
  queue.rings[0].ends->head -= UINT64_C(1) << 40;
  queue.wheel.state->count++;
  CHECK(!ms_queue_check(&queue, text, sizeof(text)) && strstr(text, "wheel is damaged"));
  queue.wheel.state->count--;
  sound(&queue);
  drop(&queue);
}

static const check_test tests[] = {
    CHECK_TEST(test_lanes_are_strict_and_each_in_order),
    CHECK_TEST(test_ageing_takes_what_waits_longest),
    CHECK_TEST(test_capacity_is_exact_and_room_comes_back),
    CHECK_TEST(test_attempts_end_in_dead_letters_and_come_back),
    CHECK_TEST(test_leases_end_by_time_and_by_death),
    CHECK_TEST(test_leases_of_a_former_owner_of_the_number_are_given_on),
    CHECK_TEST(test_delays_are_never_early),
    CHECK_TEST(test_delay_is_not_made_longer_by_the_message_before_in_its_slot),
    CHECK_TEST(test_long_delays_are_never_early_and_come),
    CHECK_TEST(test_one_of_a_key_is_in_flight),
    CHECK_TEST(test_order_of_a_key_is_made_anew_whatever_slots_it_lies_in),
    CHECK_TEST(test_wheel_that_a_dead_process_held_is_made_anew),
    CHECK_TEST(test_what_time_ends_waits_for_the_bucket_of_its_key),
    CHECK_TEST(test_time_of_the_wall_clock_comes_sooner_when_that_is_set),
    CHECK_TEST(test_word_that_is_not_the_token_ends_nothing),
    CHECK_TEST(test_put_and_ack_of_a_poisoned_queue_are_refused),
    CHECK_TEST(test_maps_of_other_sizes_are_refused),
    CHECK_TEST(test_hints_that_cannot_be_moved_are_given_back),
    CHECK_TEST(test_long_content_lies_in_blocks),
    CHECK_TEST(test_recovery_keeps_what_was_put),
    CHECK_TEST(test_the_check_catches_planted_faults),
};
CHECK_MAIN(tests)
