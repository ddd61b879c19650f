/* A hierarchical timing wheel of slot numbers: 6 levels of 64 buckets, 1 tick to 2^36 ticks.
 *
 * A node a slot, in one bucket or in none; buckets are doubly linked lists of nodes. Ticks are
 * milliseconds on a clock of the caller's, free-running 64 bits, never 0. A node comes out at the
 * first ms_wheel_pop whose `now` is at or past its due tick: never early. The caller holds the
 * owner word of the wheel. What a dead owner left is not trusted: ms_wheel_init, and add anew.
 * Indexes read from the memory are compared with node_count before use, loops are bounded by it:
 * damage gives wrong hints, never a crash or an endless loop.
 */
#ifndef MS_WHEEL_H
#define MS_WHEEL_H

#include "ms_format.h"

#define MS_WHEEL_NEVER UINT64_MAX

typedef struct ms_wheel {
  ms_wheel_state *state;
  ms_wheel_node *nodes;
  uint32_t node_count;
} ms_wheel;

/* Empty it, and all nodes. */
void ms_wheel_init(const ms_wheel *wheel, uint64_t now);

/* Put a node in (it is taken out first, where it is in). due beyond the range: the last bucket, and
 * read again there. */
void ms_wheel_add(const ms_wheel *wheel, uint32_t node, uint32_t reuse, uint64_t due);

/* Take a node out; nothing happens where it is not in. */
void ms_wheel_remove(const ms_wheel *wheel, uint32_t node);

/* Go on to `now` and take out up to count_max nodes that are due; how many. Call again while it
 * returns count_max. Time only goes on when all due nodes are out. */
uint32_t ms_wheel_pop(const ms_wheel *wheel, uint64_t now, uint32_t *out_nodes, uint32_t count_max);

/* A tick before which nothing is due: exact within 64 ticks, else no later than the first due.
 * MS_WHEEL_NEVER: empty. */
uint64_t ms_wheel_next(const ms_wheel *wheel);

/* Do the invariants hold? */
bool ms_wheel_check(const ms_wheel *wheel);

#endif
