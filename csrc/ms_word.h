/* The state word of a message: who may do what with it.
 *
 * 64 bits in a mapped file (docs/format.md). Every arrow from one state to another is one
 * compare-and-swap of the whole word, ms_move(); docs/design.md has the state machine. A tick is a
 * millisecond modulo 2^34: of two ticks the nearest is meant. Knows one word, and no queue.
 */
#ifndef MS_WORD_H
#define MS_WORD_H

#include "ms_platform.h"

/* Parity coded: a flipped bit is no state, never another one. */
enum {
  MS_MESSAGE_FREE = 0,
  MS_MESSAGE_WRITING = 3,
  MS_MESSAGE_READY = 5,
  MS_MESSAGE_DELAYED = 6,
  MS_MESSAGE_LEASED = 9,
  MS_MESSAGE_DEAD = 10,
  MS_MESSAGE_SPARE = 12,
  MS_MESSAGE_HELD = 15, /* ready or delayed, but behind another message of its key */
  MS_MESSAGE_PREPARED = 17,
  MS_MESSAGE_ACKING = 18
};

#define MS_TICK_BITS 34
#define MS_TICK_MASK ((UINT64_C(1) << MS_TICK_BITS) - 1)

/* state 5 | lane 3 | attempts 6 | reuse 10 | grant 6 | tick 34; WRITING: the owner word takes the
 * low 40 bits. */
static inline uint32_t ms_word_state(uint64_t word) { return (uint32_t)(word >> 59); }
static inline uint32_t ms_word_lane(uint64_t word) { return (uint32_t)(word >> 56 & 7); }
static inline uint32_t ms_word_attempts(uint64_t word) { return (uint32_t)(word >> 50 & 63); }
static inline uint32_t ms_word_reuse(uint64_t word) { return (uint32_t)(word >> 40 & 1023); }
static inline uint32_t ms_word_grant(uint64_t word) { return (uint32_t)(word >> 34 & 63); }
static inline uint64_t ms_word_tick(uint64_t word) { return word & MS_TICK_MASK; }

/* The low bits that a word PREPARED or ACKING ends in. */
static inline uint64_t ms_word_transaction(uint64_t word) {
  return word & ((UINT64_C(1) << 40) - 1);
}

#define MS_NS_PER_TICK 1000000
#define MS_TICK_REACH (INT64_C(30) * 86400 * 1000) /* a longer delay is parked and re-armed */

static inline uint64_t ms_make_word(uint32_t state, uint32_t lane, uint32_t attempts,
                                    uint32_t reuse, uint32_t grant, uint64_t tick) {
  return (uint64_t)state << 59 | (uint64_t)lane << 56 | (uint64_t)attempts << 50 |
         (uint64_t)reuse << 40 | (uint64_t)grant << 34 | (tick & MS_TICK_MASK);
}

/* The same word in another state and at another tick. */
static inline uint64_t ms_word_as(uint64_t word, uint32_t state, uint64_t tick) {
  return (word & ~(UINT64_C(31) << 59) & ~MS_TICK_MASK) | (uint64_t)state << 59 |
         (tick & MS_TICK_MASK);
}

static inline uint64_t ms_free_word(uint64_t word, uint32_t state) {
  return ms_make_word(state, 0, 0, ms_word_reuse(word), 0, 0);
}

static inline uint64_t ms_tick_floor(int64_t ns) { return (uint64_t)(ns / MS_NS_PER_TICK); }

static inline uint64_t ms_tick_ceil(int64_t ns) {
  return (uint64_t)((ns + MS_NS_PER_TICK - 1) / MS_NS_PER_TICK);
}

/* Ticks from `now` to a tick of a word, negative when it has passed. */
static inline int64_t ms_ticks_until(uint64_t now, uint64_t tick) {
  return (int64_t)((tick - now) << (64 - MS_TICK_BITS)) >> (64 - MS_TICK_BITS);
}

/* Was it never leased? Then `due` of its slot is what it waits for, and not a delay since. */
static inline bool ms_word_is_untaken(uint64_t word) {
  return ms_word_attempts(word) == 0 && ms_word_grant(word) == 0;
}

static inline bool ms_move(_Atomic uint64_t *word, uint64_t from, uint64_t to) {
  MS_YIELD("queue_word");
  /* Release: what was written into slot and records before is seen by those that acquire the word.
   * Acquire: pairs with the release of whoever made `from`. Sequentially consistent, for the load
   * of the count of waiters that follows. */
  bool moved = atomic_compare_exchange_strong_explicit(word, &from, to, memory_order_seq_cst,
                                                       memory_order_relaxed);
  MS_YIELD("queue_moved"); /* what is done behind a move, others may come before */
  return moved;
}

#endif
