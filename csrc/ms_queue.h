/* One queue: state words and slots (the truth), hints (rings, wheel, owners), as mapped here.
 *
 * A message is a slot; its state word says all about who may do what (ms_word.h). Functions named
 * try_ touch memory only and never block; their caller keeps the GIL, which keeps the threads of
 * one process apart in ms_queue's own fields. Knows no file names and no Python. docs/format.md has
 * the bytes, docs/design.md the state machine. What is done with a queue, from the ground up:
 *
 *   ms_slots     where all lies; claiming, writing and reading a slot
 *   ms_due       clocks: when a message is due, when a lease is over
 *   ms_wait      sleeping until there is a message, or room; waking
 *   ms_hint      rings and wheel: what can be taken, now or later
 *   ms_claim     deduplication
 *   ms_bucket    the order of a key
 *   ms_ending    ack, nack, reject, dead letters
 *   ms_room      more slots and blocks
 *   ms_sweep     the pass that mends what time and deaths bring
 *   ms_delivery  put and get
 *   ms_decide    transactions
 *   ms_recover   all hints anew
 *   ms_count     counting, finding, the invariants
 */
#ifndef MS_QUEUE_H
#define MS_QUEUE_H

#include "ms_dedup.h"
#include "ms_owner.h"
#include "ms_ring.h"
#include "ms_wheel.h"
#include "ms_word.h"

/* The clocks, read together by ms_now(). Leases end on mono, delays on boot. time_us is the store's
 * clock (docs/design.md, Time), boot and a constant: what is stored is of it. The wall clock, which
 * can be set, is only asked about messages that are due at a time of it (MS_SLOT_ABSOLUTE). */
typedef struct ms_instant {
  int64_t mono_ns;
  int64_t boot_ns;
  int64_t time_us;
} ms_instant;

typedef struct ms_lease {
  uint64_t word; /* the whole state word: the fencing token */
  uint64_t id;
  uint32_t slot;
} ms_lease;

typedef struct ms_queue {
  ms_slots_header *slots;
  ms_blocks_header *blocks; /* NULL: only what fits a slot */
  ms_hints_header *hints;
  _Atomic uint32_t
      *participants;        /* by member index: owner words of those that took or put lately */
  _Atomic uint64_t *owners; /* by slot: owner word << 16 | reuse << 6 | grant */
  uint32_t *links;          /* by slot: the next of its key + 1 */
  ms_bucket *buckets;       /* NULL: not ordered by key */
  ms_ring rings[MS_QUEUE_LANES_MAX];
  ms_wheel wheel;
  ms_dedup *_Atomic dedup; /* NULL: no deduplication; replaced by a larger one while in use */
  int64_t dedup_window_us;
  uint64_t salt;
  uint32_t slot_bytes;
  uint32_t slot_max; /* capacity + dead_limit */
  uint32_t capacity;
  uint32_t dead_limit;
  uint32_t block_max;
  uint32_t lanes;
  uint32_t self; /* owner word of this process; 0: only reads */
  uint32_t max_attempts;
  uint64_t generation;
  bool ageing;
  bool block_key;  /* on_dead "stop": a dead message holds up its key */
  uint32_t cursor; /* where this process searches for a free slot */
  uint32_t region; /* the extent that it searches */
  uint32_t region_taken;
  uint32_t block_cursor;
  int64_t offset_at; /* mono_ns when boot_offset was taken */
  int64_t boot_offset;
  int64_t clock_offset_us; /* of the store's clock to boot, while the machine is up */
  int64_t clock_since_us;  /* what stamps count as that it cannot have given: see ms_stamp() */
} ms_queue;

/* How large the files are, and where slots begin to be published. */
uint64_t ms_slots_size(uint32_t slot_bytes, uint32_t slot_count); /* rounded up to extents */
uint64_t ms_blocks_size(uint32_t block_count);                    /* likewise */
uint64_t ms_hints_size(uint32_t slot_max, uint32_t lanes, bool ordered);

/* Fill in the pointers after `slots`, `blocks`, `hints` and the plain numbers were set. Checks the
 * hints header (slot_max, lanes, ordered) and that sizes hold all that is published. */
MS_MUST_USE ms_status ms_queue_attach(ms_queue *queue, uint64_t slots_size, uint64_t blocks_size,
                                      uint64_t hints_size, ms_error *err);

#endif
