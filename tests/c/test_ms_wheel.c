/* The wheel against a model that looks at every node: never early, none lost, none twice, in the
 * order of due ticks; and damage never ends in a crash or an endless loop. */
#include "check.h"
#include "ms_wheel.h"
#include "xorshift.h"

enum { NODES = 300, STEPS = 60000, SEEDS = 12, DAMAGES = 3000 };

/* Below 2^bits, small ones as likely as large ones. */
static uint64_t random_span(uint32_t bits) {
  uint64_t width = next_random() % bits;
  return next_random() >> (63 - width);
}

static ms_wheel_state state;
static ms_wheel_node nodes[NODES];
static const ms_wheel wheel = {&state, nodes, NODES};

/* --- the model -------------------------------------------------------------------------------- */

static uint64_t model_due[NODES];
static bool model_in[NODES];

static uint64_t model_first(void) {
  uint64_t first = MS_WHEEL_NEVER;
  for (uint32_t i = 0; i < NODES; i++)
    if (model_in[i] && model_due[i] < first) first = model_due[i];
  return first;
}

static void start(uint64_t now) {
  ms_wheel_init(&wheel, now);
  memset(model_in, 0, sizeof model_in);
}

static void add(uint32_t node, uint64_t due) {
  ms_wheel_add(&wheel, node, node + 7, due);
  model_in[node] = true;
  model_due[node] = due;
}

/* Pop all that is due in portions, and compare. */
static void pop(uint64_t now, uint32_t portion) {
  uint32_t out[NODES], count;
  uint64_t last = 0, began = state.now;
  do {
    count = ms_wheel_pop(&wheel, now, out, portion);
    CHECK(count <= portion);
    for (uint32_t i = 0; i < count; i++) {
      if (!CHECK(out[i] < NODES)) return;
      CHECK(model_in[out[i]]);
      CHECK(model_due[out[i]] <= now);
      CHECK_EQ_U64(nodes[out[i]].reuse, out[i] + 7);
      /* In order, but for those that were overdue when they came, and a jump over the range. */
      uint64_t due = model_due[out[i]] < began ? began : model_due[out[i]];
      CHECK(due >= last || now - began >= UINT64_C(1) << 36);
      last = due;
      model_in[out[i]] = false;
    }
  } while (count == portion);
  CHECK(model_first() > now);
  CHECK_EQ_U64(state.now, now);
}

static void compare_next(void) {
  uint64_t first = model_first(), next = ms_wheel_next(&wheel);
  if (first == MS_WHEEL_NEVER) {
    CHECK_EQ_U64(next, MS_WHEEL_NEVER);
    return;
  }
  if (first < state.now) first = state.now;
  CHECK(next <= first);
  CHECK(next >= state.now);
}

/* --- tests ------------------------------------------------------------------------------------ */

static void test_wheel_random_work_is_like_the_model(void) {
  for (uint64_t seed = 1; seed <= SEEDS; seed++) {
    random_state = seed * 0x9e3779b97f4a7c15u;
    uint64_t now = seed % 3 == 0 ? 1 : random_span(41);
    int failures = atomic_load(&check_failure_count);
    start(now);
    for (uint32_t step = 0; step < STEPS; step++) {
      uint32_t node = (uint32_t)(next_random() % NODES);
      switch (next_random() % 8) {
        case 0:
        case 1:
        case 2:
          add(node, now + random_span(seed % 2 == 0 ? 14 : 39));
          break;
        case 3:
          add(node, now - next_random() % (now < 1000 ? now : 1000));
          break;
        case 4:
          ms_wheel_remove(&wheel, node);
          model_in[node] = false;
          break;
        case 5:
          now += next_random() % 100;
          break;
        case 6:
          now += random_span(step % 50 == 0 ? 38 : seed % 2 == 0 ? 8 : 30);
          break;
        default:
          pop(now, 1 + (uint32_t)(next_random() % 40));
          break;
      }
      compare_next();
      if (step % 16 == 0) CHECK(ms_wheel_check(&wheel));
      if (atomic_load(&check_failure_count) != failures) {
        printf("  seed %" PRIu64 ", step %" PRIu32 "\n", seed, step);
        return;
      }
    }
    pop(now + (UINT64_C(1) << 50), NODES);
    CHECK_EQ_U64(model_first(), MS_WHEEL_NEVER);
    CHECK_EQ_U64(state.count, 0);
  }
}

static void test_wheel_node_comes_at_its_tick_not_before(void) {
  static const uint64_t spans[] = {0, 1, 63, 64, 65, 4095, 4096, 262143, 262144, 262145, 1u << 24};
  for (uint64_t begin = 1; begin < 4200; begin += 61)
    for (size_t i = 0; i < sizeof spans / sizeof *spans; i++) {
      uint32_t out[2];
      start(begin);
      ms_wheel_add(&wheel, 5, 1, begin + spans[i]);
      if (spans[i] > 0) CHECK_EQ_U64(ms_wheel_pop(&wheel, begin + spans[i] - 1, out, 2), 0);
      CHECK_EQ_U64(ms_wheel_next(&wheel), begin + spans[i]);
      CHECK_EQ_U64(ms_wheel_pop(&wheel, begin + spans[i], out, 2), 1);
      CHECK_EQ_U64(ms_wheel_pop(&wheel, begin + spans[i], out, 2), 0);
    }
}

static void test_wheel_next_within_64_ticks_is_exact(void) {
  random_state = 99;
  for (uint32_t round = 0; round < 20000; round++) {
    uint64_t now = 1 + random_span(38);
    start(now);
    /* Added from afar, so that it lies in a high level, then time comes near. */
    uint64_t due = now + 64 + random_span(34), near_by = due - next_random() % 64;
    add(3, due);
    add(4, due + random_span(20));
    pop(near_by, 4);
    if (near_by < due) CHECK_EQ_U64(ms_wheel_next(&wheel), due);
  }
}

static void test_wheel_nodes_of_one_tick_come_in_the_order_of_adding(void) {
  static const uint64_t spans[] = {3, 100, 5000, 300000, 20000000};
  for (size_t i = 0; i < sizeof spans / sizeof *spans; i++) {
    uint32_t out[NODES];
    start(12345);
    for (uint32_t node = 0; node < NODES; node++)
      ms_wheel_add(&wheel, node * 7 % NODES, 0, 12345 + spans[i]);
    CHECK_EQ_U64(ms_wheel_pop(&wheel, 12345 + spans[i], out, NODES), NODES);
    for (uint32_t node = 0; node < NODES; node++) CHECK_EQ_U64(out[node], node * 7 % NODES);
  }
}

static void test_wheel_jump_over_years_is_quick(void) {
  uint32_t out[4];
  start(1);
  ms_wheel_add(&wheel, 0, 0, 50);
  ms_wheel_add(&wheel, 1, 0, UINT64_C(1) << 35);
  ms_wheel_add(&wheel, 2, 0, UINT64_C(1) << 60);
  ms_wheel_add(&wheel, 3, 0, UINT64_MAX);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, UINT64_C(1) << 34, out, 4), 1);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, UINT64_C(1) << 59, out, 4), 1);
  CHECK_EQ_U64(out[0], 1);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, UINT64_C(1) << 60, out, 4), 1);
  CHECK_EQ_U64(out[0], 2);
  CHECK(ms_wheel_check(&wheel));
}

static void test_wheel_clock_a_little_behind_gives_nothing_far_behind_starts_anew(void) {
  uint32_t out[4];
  start(1000000);
  ms_wheel_add(&wheel, 0, 0, 900000);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, 999999, out, 4), 0);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, 1000000, out, 4), 1);
  ms_wheel_add(&wheel, 0, 0, 6000);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, 5999, out, 4), 0);
  CHECK_EQ_U64(ms_wheel_pop(&wheel, 6000, out, 4), 1);
}

static void test_wheel_damage_never_crashes_and_none_comes_early(void) {
  random_state = 4242;
  for (uint32_t round = 0; round < DAMAGES; round++) {
    uint32_t out[NODES];
    uint64_t now = 1 + random_span(38);
    start(now);
    for (uint32_t node = 0; node < NODES; node++)
      ms_wheel_add(&wheel, node, 0, now + random_span(20));
    for (uint32_t i = 0; i < 1 + round % 40; i++) {
      uint8_t *bytes = next_random() % 2 == 0 ? (uint8_t *)&state : (uint8_t *)nodes;
      size_t size = bytes == (uint8_t *)&state ? sizeof state : sizeof nodes;
      size_t at = next_random() % (size / 4) * 4;
      uint32_t word = (uint32_t)next_random();
      if (next_random() % 2 == 0) word %= NODES + 2; /* links that look sound */
      memcpy(bytes + at, &word, sizeof word);
    }
    for (uint32_t step = 0; step < 40; step++) {
      uint32_t node = (uint32_t)(next_random() % NODES);
      if (step % 3 == 0) ms_wheel_add(&wheel, node, 0, now + random_span(16));
      if (step % 3 == 1) ms_wheel_remove(&wheel, node);
      now += random_span(14);
      uint32_t count = ms_wheel_pop(&wheel, now, out, NODES);
      CHECK(count <= NODES);
      for (uint32_t i = 0; i < count; i++) {
        CHECK(out[i] < NODES);
        CHECK(nodes[out[i]].due <= now);
      }
      (void)ms_wheel_next(&wheel);
      (void)ms_wheel_check(&wheel);
    }
  }
}

static void test_wheel_with_a_damaged_head_or_link_is_made_anew_from_its_nodes(void) {
  static const uint64_t spans[] = {3, 1000, 100000};
  for (size_t i = 0; i < sizeof spans / sizeof *spans; i++)
    for (int link = 0; link < 2; link++) {
      start(5000);
      for (uint32_t node = 0; node < NODES; node++) add(node, 5000 + spans[i]);
      uint32_t bucket = nodes[0].bucket - 1;
      if (link == 0)
        state.heads[bucket] = NODES + 1;
      else
        nodes[7].next = 0xffffffff;
      pop(5000 + spans[i], NODES);
      CHECK_EQ_U64(model_first(), MS_WHEEL_NEVER);
      CHECK(ms_wheel_check(&wheel));
    }
}

static const check_test tests[] = {
    CHECK_TEST(test_wheel_random_work_is_like_the_model),
    CHECK_TEST(test_wheel_node_comes_at_its_tick_not_before),
    CHECK_TEST(test_wheel_next_within_64_ticks_is_exact),
    CHECK_TEST(test_wheel_nodes_of_one_tick_come_in_the_order_of_adding),
    CHECK_TEST(test_wheel_jump_over_years_is_quick),
    CHECK_TEST(test_wheel_clock_a_little_behind_gives_nothing_far_behind_starts_anew),
    CHECK_TEST(test_wheel_with_a_damaged_head_or_link_is_made_anew_from_its_nodes),
    CHECK_TEST(test_wheel_damage_never_crashes_and_none_comes_early),
};
CHECK_MAIN(tests)
