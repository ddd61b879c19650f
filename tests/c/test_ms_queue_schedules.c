/* flags: -DMS_SCHEDULER
 *
 * Two to four virtual processes put, take, finish and sweep one queue; any of them may be killed or
 * paused at any yield point. Whatever happens: no message that was put is lost, none that was
 * acknowledged is delivered again, no two live processes hold one lease, no slot leaks, and of the
 * messages with one deduplication id only one is ever seen. Hints are dropped and doubled on
 * purpose.
 */
#include "ms_bucket.h"
#include "ms_claim.h"
#include "ms_count.h"
#include "ms_delivery.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_recover.h"
#include "ms_room.h"
#include "ms_sweep.h"
#include "ms_wait.h"
#include "scheduler.h"

enum {
  CAPACITY = 6,
  DEAD_LIMIT = 2,
  SLOTS = CAPACITY + DEAD_LIMIT,
  SLOT_BYTES = 128,
  MESSAGES = 64,
  PROCESSES = 4,
  FAMILIES = 4, /* deduplication ids */
  NOBODY = -1
};

static ms_queue queues[PROCESSES + 1]; /* the last one belongs to the checker */
static ms_instant now;
static bool ordered, doubled;
static bool long_lived; /* nobody is killed, and all do more: what a death would mend shows */
static ms_dedup table;
static _Alignas(4096) uint8_t table_bytes[3 * MS_PAGE_BYTES];
static const uint8_t store_id[16];

/* What the outside world knows. */
static bool was_put[MESSAGES], was_acked[MESSAGES], maybe_acked[MESSAGES];
static int holder[MESSAGES];
static uint32_t key_of[MESSAGES];
static uint32_t next_message, deliveries;
static uint64_t first_id[FAMILIES]; /* of the one message with this deduplication id */
static bool family_was_put[FAMILIES];
static uint32_t family_of[MESSAGES];
static uint64_t kills, pauses, doubles, delivered_count;

static uint32_t self_of(uint32_t process) { return (process + 1) | (process + 1) << 15; }

static bool is_alive(int process) {
  return process != NOBODY && scheduler_now->result.states[process] != SCHEDULER_KILLED;
}

static uint32_t the_dead(uint32_t *dead) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < scheduler_now->options->process_count; i++)
    if (scheduler_now->result.states[i] == SCHEDULER_KILLED) dead[count++] = self_of(i);
  return count;
}

static void sweep(ms_queue *queue) {
  uint32_t dead[PROCESSES], count = the_dead(dead);
  int64_t next;
  ms_queue_sweep(queue, &now, dead, count);
  ms_queue_try_advance(queue, &now, &next);
}

static void put(ms_queue *queue) {
  uint32_t number = next_message, owner;
  if (number == MESSAGES) return;
  next_message++;
  key_of[number] = (uint32_t)(scheduler_random() % 2);
  ms_message message = {.payload = (uint8_t *)&number,
                        .payload_length = sizeof(number),
                        .key_hash = key_of[number] + 1,
                        .delay_ns = scheduler_random() % 4 == 0 ? 1000000 : 0};
  ms_lease out;
  family_of[number] = (uint32_t)(scheduler_random() % FAMILIES);
  if (doubled) message.dedup[0] = message.dedup[1] = family_of[number] + 1;
  ms_status status = ms_queue_try_put(queue, &message, &now, &out, &owner, NULL);
  if (status == MS_END) {
    doubles++;
    CHECK(doubled && out.id != 0);
    CHECK(first_id[family_of[number]] == 0 || first_id[family_of[number]] == out.id);
  }
  if (status == MS_OK || status == MS_END) family_was_put[family_of[number]] = true;
  if (status != MS_OK) return;
  was_put[number] = true;
  ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
}

static uint32_t message_of(const ms_queue *queue, const ms_lease *lease) {
  uint32_t number;
  memcpy(&number, ms_queue_inline(queue, ms_queue_slot(queue, lease->slot)), sizeof(number));
  return number;
}

/* Only one message of a deduplication id is ever there to be seen. */
static void note_family(const ms_lease *lease, uint32_t number) {
  uint64_t *first = &first_id[family_of[number]];
  if (doubled) CHECK(*first == 0 || *first == lease->id);
  *first = lease->id;
}

static void end_lease(ms_queue *queue, const ms_lease *lease, uint32_t number) {
  uint32_t owner, how = (uint32_t)(scheduler_random() % 8);
  bool dead;
  ms_status status;
  if (how < 5) {
    maybe_acked[number] = true;
    status = ms_queue_try_ack(queue, lease, &now, &owner);
    if (status == MS_OK) was_acked[number] = true;
    if (status != MS_OK && holder[number] == NOBODY) return;
  } else if (how == 5) {
    status = ms_queue_try_nack(queue, lease, 0, MS_FAILED, "no", 2, &now, &dead, &owner);
  } else if (how == 6 && ordered && scheduler_random() % 2) {
    maybe_acked[number] = true; /* the oldest dead letter gives way to others */
    status = ms_queue_try_reject(queue, lease, MS_FAILED_REJECTED, "no", 2, &now, &owner);
  } else if (how == 6) {
    status = ms_queue_try_nack(queue, lease, 2000000, MS_FAILED, "no", 2, &now, &dead, &owner);
  } else {
    status = ms_queue_try_release(queue, lease, 0, &now);
  }
  (void)status;
}

static void take(ms_queue *queue, int process) {
  ms_lease lease;
  int64_t next;
  ms_queue_try_advance(queue, &now, &next);
  if (ms_queue_try_get(queue, 1000, &now, NULL, &lease) != MS_OK) return;
  uint32_t number = message_of(queue, &lease);
  /* The one who looks holds it, unless it has lost it meanwhile. */
  if (!ms_queue_holds(queue, &lease)) return;
  /* It was paused between reading the clock and leasing: the lease is over as it begins. */
  if (ms_ticks_until(ms_tick_floor(now.mono_ns), ms_word_tick(lease.word)) <= 0) return;
  deliveries++;
  CHECK(number < MESSAGES);
  note_family(&lease, number);
  CHECK(!was_acked[number]);
  if (!CHECK(holder[number] == NOBODY || !is_alive(holder[number]))) {
    printf("message %u is leased by %d as well as %d\n", number, holder[number], process);
    scheduler_print_trace();
  }
  for (uint32_t other = 0; ordered && other < next_message; other++)
    if (other != number && key_of[other] == key_of[number] && holder[other] != NOBODY)
      CHECK(!is_alive(holder[other]));
  holder[number] = process;
  MS_YIELD("work");
  if (!ms_queue_holds(queue, &lease)) { /* it was paused for longer than its lease */
    uint32_t owner;
    CHECK(ms_queue_try_ack(queue, &lease, &now, &owner) == MS_LOST);
    return;
  }
  holder[number] = NOBODY; /* from here on it may go to the next one */
  end_lease(queue, &lease, number);
}

static void misplace_hints(ms_queue *queue) {
  uint64_t hint, head = ms_ring_head(&queue->rings[0]);
  if (!ms_ring_at(&queue->rings[0], head, &hint)) return;
  if (scheduler_random() % 2) {
    (void)ms_ring_try_put(&queue->rings[0], hint);
  } else {
    ms_ring_advance(&queue->rings[0], head, head + 1);
  }
}

/* Somebody else brings a dead letter back, or cancels what nobody has leased. */
static void meddle(ms_queue *queue) {
  uint32_t owner, slot = (uint32_t)(scheduler_random() % SLOTS), number;
  uint64_t word = atomic_load(ms_word_at(queue, slot));
  ms_status status = MS_OK;
  memcpy(&number, ms_queue_inline(queue, ms_queue_slot(queue, slot)), sizeof(number));
  if (ms_word_state(word) == MS_MESSAGE_DEAD && scheduler_random() % 4) {
    status = ms_queue_try_redrive(queue, slot, word, &now, &owner);
  } else if (!doubled && (ms_bucket_has(queue, word) || ms_word_state(word) == MS_MESSAGE_DEAD)) {
    maybe_acked[number] = true;
    status = ms_queue_try_cancel(queue, slot, word, &now, &owner);
  }
  (void)status; /* somebody else may have come first */
}

static void run(uint32_t process) {
  ms_queue *queue = &queues[process];
  for (uint32_t step = 0; step < (long_lived ? 16 : 6); step++) {
    uint32_t what = (uint32_t)(scheduler_random() % 16);
    if (what < 6) {
      put(queue);
    } else if (what < 13) {
      take(queue, (int)process);
    } else if (what < 15) {
      sweep(queue);
    } else if (ordered && scheduler_random() % 2) {
      meddle(queue);
    } else {
      misplace_hints(queue);
    }
  }
}

/* Time passes, all leases end, what was lost is found. */
static void settle(void) {
  ms_queue *queue = &queues[PROCESSES];
  for (int i = 0; i < 4; i++) {
    now.mono_ns += INT64_C(3000000000);
    now.boot_ns += INT64_C(3000000000);
    now.time_us += 3000000;
    for (uint32_t j = 0; j < MESSAGES; j++) holder[j] = NOBODY;
    sweep(queue);
  }
}

static void at_rest(void) { settle(); }

static void drain(void) {
  ms_queue *queue = &queues[PROCESSES];
  ms_lease lease;
  for (uint32_t slot = 0; slot < SLOTS; slot++) {
    uint32_t owner;
    uint64_t word = atomic_load(ms_word_at(queue, slot));
    if (ms_word_state(word) != MS_MESSAGE_DEAD) continue;
    ms_status status = ms_queue_try_redrive(queue, slot, word, &now, &owner);
    CHECK(status == MS_OK || status == MS_FULL); /* then the next drain finds room */
  }
  for (int i = 0; i < 400; i++) {
    uint32_t owner;
    int64_t next;
    ms_queue_try_advance(queue, &now, &next);
    if (ms_queue_try_get(queue, 1000, &now, NULL, &lease) != MS_OK) break;
    uint32_t number = message_of(queue, &lease);
    CHECK(!was_acked[number]);
    note_family(&lease, number);
    was_acked[number] = true;
    CHECK(ms_queue_try_ack(queue, &lease, &now, &owner) == MS_OK);
  }
}

static void *pages(uint64_t size) {
  size = (size + MS_PAGE_BYTES - 1) / MS_PAGE_BYTES * MS_PAGE_BYTES;
  void *memory = aligned_alloc(MS_PAGE_BYTES, size);
  memset(memory, 0, size);
  return memory;
}

static void reset(ms_slots_header *slots, ms_hints_header *hints) {
  uint64_t size = ms_hints_size(SLOTS, 1, ordered);
  memset(slots, 0, sizeof(*slots));
  memset(hints, 0, size);
  hints->slot_max = SLOTS;
  hints->lanes = 1;
  hints->cell_bits = 6;
  hints->ordered = ordered;
  slots->next_id = 1;
  now = (ms_instant){INT64_C(5000000000), INT64_C(9000000000), INT64_C(1700000000000000)};
  for (uint32_t i = 0; i <= PROCESSES; i++) {
    queues[i] = (ms_queue){.slots = slots,
                           .hints = hints,
                           .slot_bytes = SLOT_BYTES,
                           .slot_max = SLOTS,
                           .capacity = CAPACITY,
                           .dead_limit = DEAD_LIMIT,
                           .lanes = 1,
                           .self = self_of(i),
                           .max_attempts = 63};
    CHECK(ms_queue_attach(&queues[i], ms_slots_size(SLOT_BYTES, SLOTS), 0, size, NULL) == MS_OK);
  }
  memset(table_bytes, 0, sizeof(table_bytes));
  ms_dedup_init(table_bytes, 1, store_id, 1);
  CHECK(ms_dedup_open(&table, table_bytes, sizeof(table_bytes), store_id, 1, NULL) == MS_OK);
  for (uint32_t i = 0; doubled && i <= PROCESSES; i++) {
    queues[i].dedup_window_us = INT64_C(3600000000);
    ms_queue_use_dedup(&queues[i], &table);
  }
  for (uint32_t i = 0; i < SLOTS; i++) {
    memset((void *)ms_word_at(&queues[0], i), 0, 8);
    memset(ms_slot_at(&queues[0], i), 0, SLOT_BYTES);
    memset(ms_failures_at(&queues[0], i), 0, 2 * sizeof(ms_failure));
  }
  void *scratch = malloc(ms_queue_scratch_size(&queues[0]));
  ms_queue_recover(&queues[0], true, &now, scratch);
  free(scratch);
  ms_queue_publish_slots(&queues[0], SLOTS);
  for (uint32_t i = 0; i < MESSAGES; i++) {
    was_put[i] = was_acked[i] = maybe_acked[i] = false;
    holder[i] = NOBODY;
  }
  for (uint32_t i = 0; i < FAMILIES; i++) {
    first_id[i] = 0;
    family_was_put[i] = false;
  }
  next_message = deliveries = 0;
}

static void check_the_end(uint64_t seed) {
  ms_queue *queue = &queues[PROCESSES];
  int before = atomic_load(&check_failure_count);
  char text[200] = "";
  settle();
  for (int i = 0; i < 4; i++) {
    drain();
    settle();
  }
  CHECK(ms_queue_check(queue, text, sizeof(text)));
  CHECK(ms_dedup_check(&table));
  for (uint32_t i = 0; doubled && i < FAMILIES; i++) CHECK(!family_was_put[i] || first_id[i] != 0);
  for (uint32_t i = 0; i < next_message; i++) CHECK(!was_put[i] || was_acked[i] || maybe_acked[i]);
  ms_queue_counts counts;
  ms_queue_count(queue, &counts);
  CHECK(counts.free == CAPACITY && counts.spare == DEAD_LIMIT);
  if (atomic_load(&check_failure_count) == before) return;
  printf("  seed %" PRIu64 ": %s; free %u spare %u ready %u leased %u writing %u\n", seed, text,
         counts.free, counts.spare, counts.ready, counts.leased, counts.writing);
  scheduler_print_trace();
}

static void schedules(uint64_t first, uint64_t count) {
  ms_slots_header *slots = pages(ms_slots_size(SLOT_BYTES, SLOTS));
  ms_hints_header *hints = pages(ms_hints_size(SLOTS, 1, true));
  kills = pauses = doubles = delivered_count = 0;
  for (uint64_t seed = first; seed < first + count; seed++) {
    reset(slots, hints);
    scheduler_options options = {.seed = seed,
                                 .process_count = 2 + (uint32_t)(seed % 3),
                                 .kill_one_in = long_lived ? 0
                                                : seed % 2 ? 20
                                                           : 60,
                                 .pause_one_in = seed % 5 == 0 ? 30 : 0,
                                 .run = run,
                                 .at_rest = at_rest};
    scheduler_result result = scheduler_run(&options);
    kills += result.kills;
    pauses += result.pauses;
    delivered_count += deliveries;
    check_the_end(seed);
  }
  printf("  schedules=%" PRIu64 " kills=%" PRIu64 " pauses=%" PRIu64 " deliveries=%" PRIu64
         " doubles=%" PRIu64 " seed=%" PRIu64 "\n",
         count, kills, pauses, delivered_count, doubles, first);
  free(slots);
  free(hints);
}

static void test_queue_any_schedule_with_kills_loses_nothing(void) {
  ordered = false;
  schedules(1, check_count(20000, 100000));
}

static void test_queue_ordered_by_key_any_schedule_keeps_one_in_flight(void) {
  ordered = true;
  schedules(1, 3000);
}

static void test_queue_ordered_by_key_any_schedule_of_the_living_leaves_no_message_behind(void) {
  ordered = long_lived = true;
  schedules(1, check_count(10000, 60000));
  long_lived = false;
}

static void test_queue_any_schedule_shows_one_message_of_a_deduplication_id(void) {
  ordered = false;
  doubled = true;
  schedules(1, check_count(8000, 30000));
  ordered = true;
  schedules(30001, 1000);
  ordered = doubled = false;
}

static const check_test tests[] = {
    CHECK_TEST(test_queue_any_schedule_with_kills_loses_nothing),
    CHECK_TEST(test_queue_ordered_by_key_any_schedule_keeps_one_in_flight),
    CHECK_TEST(test_queue_ordered_by_key_any_schedule_of_the_living_leaves_no_message_behind),
    CHECK_TEST(test_queue_any_schedule_shows_one_message_of_a_deduplication_id),
};
CHECK_MAIN(tests)
