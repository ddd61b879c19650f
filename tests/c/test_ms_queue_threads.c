/* Threads, each with an ms_queue of its own over one mapping, as processes would: every message is
 * acknowledged once, none is lost. Under TSan by `check.py tsan`.
 */
#include "check.h"
#include "ms_count.h"
#include "ms_delivery.h"
#include "ms_due.h"
#include "ms_ending.h"
#include "ms_hint.h"
#include "ms_recover.h"
#include "ms_room.h"
#include "ms_sweep.h"
#include "ms_wait.h"

#include <pthread.h>

enum {
  CAPACITY = 2000,
  DEAD_LIMIT = 48,
  SLOTS = 2048,
  SLOT_BYTES = 256,
  THREADS = 4,
  EACH = 20000
};

static ms_queue base;
static _Atomic uint32_t acked[THREADS * EACH];
static _Atomic uint32_t left = THREADS * EACH;

static void put_one(ms_queue *queue, uint32_t number) {
  for (;;) {
    ms_message message = {.payload = (uint8_t *)&number,
                          .payload_length = sizeof(number),
                          .lane = number % 3,
                          .delay_ns = number % 16 == 0 ? 1000000 : 0};
    ms_lease out;
    uint32_t owner;
    ms_instant now;
    ms_now_near(queue, &now);
    ms_status status = ms_queue_try_put(queue, &message, &now, &out, &owner, NULL);
    if (status == MS_OK) break;
    CHECK(status == MS_FULL);
    ms_cpu_relax();
  }
  ms_queue_wake(queue, MS_WAIT_MESSAGE, 1);
}

static void *produce(void *argument) {
  ms_queue queue = base;
  uint32_t index = (uint32_t)(uintptr_t)argument;
  queue.self = (index + 1) | 1u << 15;
  for (uint32_t i = 0; i < EACH; i++) put_one(&queue, index * EACH + i);
  return NULL;
}

static void take_one(ms_queue *queue, const ms_lease *lease, const ms_instant *now) {
  uint32_t number, owner;
  bool dead;
  memcpy(&number, ms_queue_inline(queue, ms_queue_slot(queue, lease->slot)), sizeof(number));
  if (number % 8 == 3 && ms_word_attempts(lease->word) < 3) {
    CHECK(ms_queue_try_nack(queue, lease, number % 2 ? 0 : 1000000, MS_FAILED, "again", 5, now,
                            &dead, &owner) == MS_OK);
    return;
  }
  CHECK(atomic_fetch_add(&acked[number], 1) == 0);
  CHECK(ms_queue_try_ack(queue, lease, now, &owner) == MS_OK);
  atomic_fetch_sub(&left, 1);
}

static void *consume(void *argument) {
  ms_queue queue = base;
  queue.self = ((uint32_t)(uintptr_t)argument + 101) | 1u << 15;
  while (atomic_load(&left)) {
    ms_instant now;
    ms_lease lease;
    int64_t next;
    ms_now(&queue, &now);
    ms_queue_try_advance(&queue, &now, &next);
    if (ms_queue_sweep_due(&queue, &now)) ms_queue_sweep(&queue, &now, NULL, 0);
    if (ms_queue_try_get(&queue, 60000, &now, NULL, &lease) == MS_OK) {
      take_one(&queue, &lease, &now);
      continue;
    }
    uint32_t ticket = ms_queue_announce(&queue, MS_WAIT_MESSAGE);
    if (ms_queue_try_get(&queue, 60000, &now, NULL, &lease) == MS_OK)
      take_one(&queue, &lease, &now);
    else
      (void)ms_queue_sleep(&queue, MS_WAIT_MESSAGE, ticket, 2000000);
  }
  return NULL;
}

static void test_queue_threads_acknowledge_each_message_once(void) {
  pthread_t threads[2 * THREADS];
  uint64_t slots_size = ms_slots_size(SLOT_BYTES, SLOTS);
  uint64_t hints_size = ms_hints_size(SLOTS, 3, false);
  base = (ms_queue){.slots = aligned_alloc(MS_PAGE_BYTES, slots_size),
                    .hints = aligned_alloc(MS_PAGE_BYTES, hints_size),
                    .slot_bytes = SLOT_BYTES,
                    .slot_max = SLOTS,
                    .capacity = CAPACITY,
                    .dead_limit = DEAD_LIMIT,
                    .lanes = 3,
                    .self = 1 | 1u << 15,
                    .max_attempts = 12};
  memset(base.slots, 0, slots_size);
  memset(base.hints, 0, hints_size);
  base.hints->slot_max = SLOTS;
  base.hints->lanes = 3;
  base.hints->cell_bits = 12;
  CHECK(ms_queue_attach(&base, slots_size, 0, hints_size, NULL) == MS_OK);
  ms_instant now;
  ms_now(&base, &now);
  void *scratch = malloc(ms_queue_scratch_size(&base));
  ms_queue_recover(&base, true, &now, scratch);
  ms_queue_publish_slots(&base, SLOTS);
  for (uintptr_t i = 0; i < THREADS; i++) {
    CHECK(pthread_create(&threads[2 * i], NULL, produce, (void *)i) == 0);
    CHECK(pthread_create(&threads[2 * i + 1], NULL, consume, (void *)i) == 0);
  }
  for (int i = 0; i < 2 * THREADS; i++) pthread_join(threads[i], NULL);
  for (uint32_t i = 0; i < THREADS * EACH; i++) CHECK(acked[i] == 1);
  char text[200] = "";
  ms_queue_counts counts;
  CHECK(ms_queue_check(&base, text, sizeof(text)));
  ms_queue_count(&base, &counts);
  CHECK(counts.free == CAPACITY && counts.spare == DEAD_LIMIT);
  printf("  ops=%d lost=0 dup=0 %s\n", THREADS * EACH, text);
  free(base.slots);
  free(base.hints);
  free(scratch);
}

static const check_test tests[] = {
    CHECK_TEST(test_queue_threads_acknowledge_each_message_once),
};
CHECK_MAIN(tests)
