/* A consumer group: which member reads which partition of a stream, and its position there.
 *
 * One mapped file (docs/format.md) under one short owner word. Every function named try_ takes the
 * word for its own length; MS_BUSY: *out_owner has it: sleep in ms_owner_wait() and give it back,
 * or, with proof that the owner is dead, call ms_group_take_over(). MS_CLOSED: the group was
 * removed. MS_MOVED: the file has more partitions than are mapped: map it anew. A member is a slot
 * of the table and the number that the slot had when it was claimed. Thread-safe as the owner word
 * is. Allocates nothing, knows no file, no record, no Python.
 */
#ifndef MS_GROUP_H
#define MS_GROUP_H

#include "ms_format.h"
#include "ms_owner.h"

enum { MS_GROUP_LIVE = 1, MS_GROUP_DROPPED = 2 };

typedef struct ms_group {
  ms_group_header *header;
  ms_group_member *members;
  ms_group_partition *partitions;
  uint32_t room;       /* partitions that are mapped */
  uint32_t self;       /* owner word of this process; 0: only reads */
  uint64_t generation; /* of the store */
} ms_group;

/* Where a group goes on in a partition: everything before `offset` is done, as epoch had it. */
typedef struct ms_group_position {
  uint64_t epoch;
  uint64_t offset;
  uint64_t transaction; /* the last one that set it; 0: none did */
} ms_group_position;

/* The right to set the position of a partition, until it has another owner. */
typedef struct ms_group_claim {
  uint32_t slot;
  uint32_t partition;
  uint64_t fence; /* rises with each owner, for as long as the group lives */
} ms_group_claim;

/* What a member finds out about a partition. */
enum {
  MS_GROUP_LEAVING = 1 /* another is waiting for it: release it */
};

/* Bytes of a file for so many partitions. */
uint64_t ms_group_size(uint32_t partitions);

/* Write the header onto ms_group_size(partitions) zeros. */
void ms_group_init(void *bytes, const uint8_t store_id[16], uint64_t stream_id, uint64_t group_id,
                   uint64_t salt, uint64_t generation, uint32_t partitions);

/* Check the header and set the pointers; room is what size has. MS_CORRUPT, MS_VERSION. */
MS_MUST_USE ms_status ms_group_attach(ms_group *group, void *bytes, uint64_t size,
                                      const uint8_t store_id[16], uint64_t stream_id,
                                      ms_error *err);

/* No member of an earlier generation lives: void memberships and the word, keep positions and
 * fences. The caller lets nobody else have the group meanwhile. */
void ms_group_void(ms_group *group);

/* Take the word from a dead owner, finish what it may have begun, and give it back. */
MS_MUST_USE ms_status ms_group_take_over(ms_group *group, uint32_t dead, uint32_t *out_owner);

/* --- members --- */

/* Claim a slot and share the partitions out anew. Both deadlines are monotonic ns. MS_FULL. */
MS_MUST_USE ms_status ms_group_try_join(ms_group *group, uint64_t session, uint64_t processing,
                                        uint32_t *out_slot, uint32_t *out_number,
                                        uint32_t *out_owner);

/* MS_LOST: it was ended before. */
MS_MUST_USE ms_status ms_group_try_leave(ms_group *group, uint32_t slot, uint32_t number,
                                         uint32_t *out_owner);

/* Take up what was assigned: out_fences[i] is the fence of partition i, 0: another's; out_flags[i]
 * MS_GROUP_LEAVING and so on. `count` entries of each. MS_LOST: the member was ended. */
MS_MUST_USE ms_status ms_group_try_take_up(ms_group *group, uint32_t slot, uint32_t number,
                                           uint64_t *out_fences, uint8_t *out_flags, uint32_t count,
                                           uint32_t *out_changes, uint32_t *out_owner);

/* Hand a partition to its heir. MS_FENCED: it went already. */
MS_MUST_USE ms_status ms_group_try_release(ms_group *group, const ms_group_claim *claim,
                                           uint32_t *out_owner);

/* End the members whose deadlines have passed or whose process is one of `dead`. */
MS_MUST_USE ms_status ms_group_try_end(ms_group *group, uint64_t now_ns, const uint32_t *dead,
                                       uint32_t dead_count, uint32_t *out_ended,
                                       uint32_t *out_owner);

/* Is this the one caller of an interval that watches for the dead? Takes no word. */
bool ms_group_claim_watch(ms_group *group, uint64_t now_ns, uint64_t interval_ns);

/* Has any member passed a deadline? Takes no word. */
bool ms_group_overdue(const ms_group *group, uint64_t now_ns);

/* Push a deadline that is at `*io_token` to `to`: a session (any thread, no GIL), or processing.
 * MS_LOST: the member was ended. Takes no word. */
MS_MUST_USE ms_status ms_group_renew(_Atomic uint64_t *deadline, uint64_t *io_token, uint64_t to);

/* The stream has more partitions, for which there is room. */
MS_MUST_USE ms_status ms_group_try_grow(ms_group *group, uint32_t partitions, uint32_t *out_owner);

/* --- positions --- */

/* The newest valid copy. MS_END: there was never one, so the group begins at offset 0.
 * MS_CORRUPT: both copies are torn. Takes no word. */
MS_MUST_USE ms_status ms_group_position_of(const ms_group *group, uint32_t partition,
                                           ms_group_position *out);

/* MS_FENCED, MS_PENDING. MS_INVALID: it would go backwards, and `backwards` is not set. */
MS_MUST_USE ms_status ms_group_try_commit(ms_group *group, const ms_group_claim *claim,
                                          uint64_t epoch, uint64_t offset, bool backwards,
                                          uint32_t *out_owner);

/* Set the position of a partition that nobody has. MS_LOST: somebody has it. MS_PENDING. */
MS_MUST_USE ms_status ms_group_try_seek(ms_group *group, uint32_t partition, uint64_t epoch,
                                        uint64_t offset, uint32_t *out_owner);

/* --- positions of a transaction (docs/design.md) --- */

/* Make positions pending, all or none: each claim is held, and no other transaction has one of them
 * pending. MS_FENCED, MS_PENDING. */
MS_MUST_USE ms_status ms_group_try_prepare(ms_group *group, uint64_t transaction,
                                           const ms_group_claim *claims,
                                           const ms_group_position *positions, uint32_t count,
                                           uint32_t *out_owner);

/* The pending position of a partition: MS_END where there is none. Takes no word. */
MS_MUST_USE ms_status ms_group_pending(const ms_group *group, uint32_t partition,
                                       uint64_t *out_transaction, uint64_t *out_fence,
                                       ms_group_position *out);

/* The transaction is committed: set the position, unless it or a later one did so already;
 * it is not pending any more. Needs no claim: a dead transaction's journal does it as well. */
MS_MUST_USE ms_status ms_group_try_apply(ms_group *group, uint32_t partition, uint64_t transaction,
                                         uint64_t epoch, uint64_t offset, uint32_t *out_owner);

/* The transaction is not committed: its position is not pending any more. */
MS_MUST_USE ms_status ms_group_try_revert(ms_group *group, uint32_t partition, uint64_t transaction,
                                          uint32_t *out_owner);

/* --- reading, and the end --- */

/* The group is no more, for anyone who has it open. MS_LOST: it has members. */
MS_MUST_USE ms_status ms_group_try_drop(ms_group *group, uint32_t *out_owner);

/* The holder of a partition: slot + 1 (0: nobody), its fence, and whether it has taken it up. */
void ms_group_holder(const ms_group *group, uint32_t partition, uint32_t *out_slot,
                     uint64_t *out_fence, bool *out_taken);

/* Do the invariants hold? For tests, at rest. */
bool ms_group_check(const ms_group *group, char *text, size_t size);

#endif
