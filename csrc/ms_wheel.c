/* The timing wheel. One thread at a time: the caller holds the owner word.
 *
 * A tick or a stretch of 64^level ticks is a bucket; a node lies in the lowest level where its
 * bucket is less than 64 buckets away from that of `now`. When time reaches the first tick of a
 * bucket above level 0, its nodes go down: none below a level that they fit in, so that each moves
 * at most once a level. Buckets that are empty cost nothing: the next one of a level is found by
 * its bitmap.
 *
 * Invariants: (1) Level 0: a node of bucket b is due at the only tick of now..now+63 that is b
 * modulo 64, or is overdue and lies in the bucket of `now`. (2) Level 1 and above: the bucket
 * begins behind `now` and not behind the node's due tick. (3) A bit of `occupied` is set exactly
 * where the bucket has a head. (4) A bucket is a list in the order of adding: `previous` of the
 * first is the last, `next` of the last is 0. (5) `due` and `bucket` of a node say all: links and
 * bitmaps can be made anew from them.
 * Crash, damage: where an index or a count of steps is out of range, links and bitmaps are made
 * anew; a node may be lost or come late, none comes early by its `due`. Knows no clock.
 */
#include "ms_wheel.h"

#define LEVEL_BITS 6u
#define BUCKET_MASK ((uint64_t)MS_WHEEL_BUCKETS - 1)
#define RANGE_TICKS (UINT64_C(1) << (LEVEL_BITS * MS_WHEEL_LEVELS))
#define CLOCK_SKEW_TICKS (UINT64_C(1) << 16) /* so far a `now` may lie behind that of another */
#define NEXT_READS 64u

enum { BUCKET_COUNT = MS_WHEEL_LEVELS * MS_WHEEL_BUCKETS };

/* --- lists ------------------------------------------------------------------------------------ */

static bool is_link(const ms_wheel *wheel, uint32_t link) {
  return link - 1 < wheel->node_count; /* 0 wraps and is none */
}

static void set_occupied(const ms_wheel *wheel, uint32_t bucket, bool occupied) {
  uint64_t *bits = &wheel->state->occupied[bucket / MS_WHEEL_BUCKETS];
  uint64_t bit = UINT64_C(1) << bucket % MS_WHEEL_BUCKETS;
  *bits = occupied ? *bits | bit : *bits & ~bit;
}

static void append(const ms_wheel *wheel, uint32_t node, uint32_t bucket) {
  ms_wheel_node *at = &wheel->nodes[node];
  uint32_t first = wheel->state->heads[bucket];
  at->next = 0;
  at->bucket = bucket + 1;
  if (is_link(wheel, first)) {
    uint32_t last = wheel->nodes[first - 1].previous;
    if (!is_link(wheel, last)) last = first;
    at->previous = last;
    wheel->nodes[last - 1].next = node + 1;
    wheel->nodes[first - 1].previous = node + 1;
  } else {
    at->previous = node + 1;
    wheel->state->heads[bucket] = node + 1;
  }
  set_occupied(wheel, bucket, true);
  wheel->state->count++;
}

/* The node says that it is in the bucket. False: it is out, but its links were damaged. */
static bool take_out(const ms_wheel *wheel, uint32_t node, uint32_t bucket) {
  ms_wheel_node *at = &wheel->nodes[node];
  uint32_t *first = &wheel->state->heads[bucket];
  uint32_t next = at->next, previous = at->previous;
  at->bucket = 0;
  if (!is_link(wheel, *first) || !is_link(wheel, previous)) return false;
  if (next != 0 && !is_link(wheel, next)) return false;
  if (*first == node + 1)
    *first = next;
  else
    wheel->nodes[previous - 1].next = next;
  if (next != 0)
    wheel->nodes[next - 1].previous = previous;
  else if (*first != 0)
    wheel->nodes[*first - 1].previous = previous;
  else
    set_occupied(wheel, bucket, false);
  if (wheel->state->count > 0) wheel->state->count--;
  return true;
}

/* --- places ----------------------------------------------------------------------------------- */

/* The bucket of a due tick, as seen from `now`. */
static uint32_t bucket_of(const ms_wheel *wheel, uint64_t due) {
  uint64_t now = wheel->state->now;
  if (due < now) due = now;
  for (uint32_t level = 0; level < MS_WHEEL_LEVELS; level++) {
    uint32_t shift = level * LEVEL_BITS;
    if ((due >> shift) - (now >> shift) < MS_WHEEL_BUCKETS)
      return level * MS_WHEEL_BUCKETS + (uint32_t)(due >> shift & BUCKET_MASK);
  }
  /* Out of range: the last bucket of all. */
  uint32_t last = (uint32_t)(((now >> (MS_WHEEL_LEVELS - 1) * LEVEL_BITS) - 1) & BUCKET_MASK);
  return (MS_WHEEL_LEVELS - 1) * MS_WHEEL_BUCKETS + last;
}

/* The first tick of an occupied bucket of a level, and the bucket. False: there is none. */
static bool find_first(const ms_wheel *wheel, uint32_t level, uint64_t *out_tick,
                       uint32_t *out_bucket) {
  uint64_t bits = wheel->state->occupied[level];
  uint32_t shift = level * LEVEL_BITS;
  uint64_t at = wheel->state->now >> shift, first = at & BUCKET_MASK;
  if (bits == 0) return false;
  if (first != 0) bits = bits >> first | bits << (MS_WHEEL_BUCKETS - first);
  at += (uint64_t)__builtin_ctzll(bits);
  *out_tick = at << shift;
  *out_bucket = level * MS_WHEEL_BUCKETS + (uint32_t)(at & BUCKET_MASK);
  return true;
}

/* The first bucket of all; of several that begin at one tick the highest, whose nodes may go into
 * the lower ones. False: the wheel is empty. */
static bool find_next(const ms_wheel *wheel, uint64_t *out_tick, uint32_t *out_bucket) {
  bool any = false;
  for (uint32_t level = MS_WHEEL_LEVELS; level-- > 0;) {
    uint64_t tick = 0;
    uint32_t bucket = 0;
    if (!find_first(wheel, level, &tick, &bucket) || (any && tick >= *out_tick)) continue;
    *out_tick = tick;
    *out_bucket = bucket;
    any = true;
  }
  return any;
}

/* Make links and bitmaps anew from what the nodes say, as seen from another `now`. */
static void rebuild(const ms_wheel *wheel, uint64_t now) {
  *wheel->state = (ms_wheel_state){.now = now};
  for (uint32_t node = 0; node < wheel->node_count; node++)
    if (wheel->nodes[node].bucket != 0)
      append(wheel, node, bucket_of(wheel, wheel->nodes[node].due));
}

/* Move the nodes of a bucket to where they belong now. False: damage. */
static bool cascade(const ms_wheel *wheel, uint32_t bucket, uint64_t *steps) {
  uint32_t link = wheel->state->heads[bucket];
  wheel->state->heads[bucket] = 0;
  set_occupied(wheel, bucket, false);
  while (link != 0) {
    if (*steps == 0 || !is_link(wheel, link)) return false;
    ms_wheel_node *at = &wheel->nodes[link - 1];
    uint32_t next = at->next;
    if (at->bucket != bucket + 1) return false;
    if (wheel->state->count > 0) wheel->state->count--;
    append(wheel, link - 1, bucket_of(wheel, at->due));
    link = next;
    --*steps;
  }
  return true;
}

/* --- the interface ---------------------------------------------------------------------------- */

void ms_wheel_init(const ms_wheel *wheel, uint64_t now) {
  *wheel->state = (ms_wheel_state){.now = now};
  for (uint32_t node = 0; node < wheel->node_count; node++) wheel->nodes[node] = (ms_wheel_node){0};
}

void ms_wheel_remove(const ms_wheel *wheel, uint32_t node) {
  if (node >= wheel->node_count) return;
  uint32_t bucket = wheel->nodes[node].bucket;
  wheel->nodes[node].bucket = 0;
  if (bucket - 1 < BUCKET_COUNT && !take_out(wheel, node, bucket - 1))
    rebuild(wheel, wheel->state->now);
}

void ms_wheel_add(const ms_wheel *wheel, uint32_t node, uint32_t reuse, uint64_t due) {
  if (node >= wheel->node_count) return;
  ms_wheel_remove(wheel, node);
  wheel->nodes[node].reuse = reuse;
  wheel->nodes[node].due = due;
  append(wheel, node, bucket_of(wheel, due));
}

uint32_t ms_wheel_pop(const ms_wheel *wheel, uint64_t now, uint32_t *out_nodes,
                      uint32_t count_max) {
  ms_wheel_state *state = wheel->state;
  uint32_t count = 0, bucket = 0;
  uint64_t tick = 0;
  /* A little behind another's `now`: that one saw to it. Far off: not a clock, or years ahead. */
  if (now < state->now && state->now - now < CLOCK_SKEW_TICKS) return 0;
  if (now < state->now || now - state->now >= RANGE_TICKS) rebuild(wheel, now);
  /* More steps than sound nodes need, each once a level, twice in the last, and out. */
  uint64_t steps = 16 * (uint64_t)wheel->node_count + 1024;
  bool sound = true, rebuilt = false;
  while (count < count_max) {
    if (!sound || steps-- == 0) {
      if (rebuilt) return count;
      rebuild(wheel, state->now);
      rebuilt = sound = true;
      steps = 16 * (uint64_t)wheel->node_count + 1024;
    }
    if (!find_next(wheel, &tick, &bucket) || tick > now) {
      state->now = now;
      break;
    }
    if (tick > state->now) state->now = tick;
    uint32_t link = state->heads[bucket];
    if (bucket >= MS_WHEEL_BUCKETS) {
      sound = cascade(wheel, bucket, &steps);
    } else if (!is_link(wheel, link) || wheel->nodes[link - 1].bucket != bucket + 1) {
      sound = false;
    } else {
      sound = take_out(wheel, link - 1, bucket);
      if (wheel->nodes[link - 1].due <= now)
        out_nodes[count++] = link - 1;
      else /* by damage in a bucket too early */
        append(wheel, link - 1, bucket_of(wheel, wheel->nodes[link - 1].due));
    }
  }
  return count;
}

uint64_t ms_wheel_next(const ms_wheel *wheel) {
  uint64_t next = MS_WHEEL_NEVER;
  for (uint32_t level = 0; level < MS_WHEEL_LEVELS; level++) {
    uint64_t tick = 0;
    uint32_t bucket = 0;
    if (!find_first(wheel, level, &tick, &bucket)) continue;
    /* Soon: read the nodes themselves, if they are few. */
    if (level > 0 && tick - wheel->state->now < MS_WHEEL_BUCKETS) {
      uint64_t due = MS_WHEEL_NEVER;
      uint32_t link = wheel->state->heads[bucket], reads = 0;
      for (; reads < NEXT_READS && is_link(wheel, link); reads++) {
        if (wheel->nodes[link - 1].due < due) due = wheel->nodes[link - 1].due;
        link = wheel->nodes[link - 1].next;
      }
      if (link == 0 && due > tick) tick = due;
    }
    if (tick < next) next = tick;
  }
  return next;
}

static bool bucket_is_sound(const ms_wheel *wheel, uint32_t bucket, uint64_t *count) {
  const ms_wheel_state *state = wheel->state;
  uint32_t level = bucket / MS_WHEEL_BUCKETS, shift = level * LEVEL_BITS;
  uint64_t at = state->now >> shift;
  uint64_t distance = (bucket - at) & BUCKET_MASK, tick = (at + distance) << shift;
  uint32_t first = state->heads[bucket], last = 0;
  bool bit = (state->occupied[level] >> bucket % MS_WHEEL_BUCKETS & 1) != 0;
  if (bit != (first != 0)) return false;
  for (uint32_t link = first; link != 0; link = wheel->nodes[link - 1].next) {
    if (!is_link(wheel, link) || ++*count > wheel->node_count) return false;
    const ms_wheel_node *node = &wheel->nodes[link - 1];
    if (node->bucket != bucket + 1 || (last != 0 && node->previous != last)) return false;
    if (level == 0 ? (node->due != tick && !(distance == 0 && node->due < tick))
                   : (distance == 0 || tick > node->due))
      return false;
    last = link;
  }
  return first == 0 || wheel->nodes[first - 1].previous == last;
}

bool ms_wheel_check(const ms_wheel *wheel) {
  uint64_t linked = 0, said = 0;
  for (uint32_t bucket = 0; bucket < BUCKET_COUNT; bucket++)
    if (!bucket_is_sound(wheel, bucket, &linked)) return false;
  for (uint32_t node = 0; node < wheel->node_count; node++) said += wheel->nodes[node].bucket != 0;
  return linked == said && linked == wheel->state->count;
}
