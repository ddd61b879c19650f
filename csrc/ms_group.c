/* A consumer group. Its word guards all but the deadlines of members and the reading of positions.
 *
 * Invariants: (1) A holder (fence, taken, slot) changes by one store, so that the fence is never
 * that of another owner. The fence of a partition never falls; it begins anew above generation ≪
 * 24, so not even a power cut lets one come twice. (2) A commit checks the holder and writes under
 * one hold of the word. (3) A position is written to the older of two checksummed copies: a kill or
 * a torn page leaves the one before. (4) A partition that was taken up stays its holder's until
 * that releases it or is ended; one that was not moves at once. (5) Shares of the members differ by
 * at most one, counted by heirs, and `share_out` moves no more partitions than that needs.
 *
 * Crash: `process` of a member is stored last at a join, and cleared first at an end; the one that
 * takes over a dead owner's word shares out anew, which finishes whatever was begun. What a
 * transaction has pending stays, for the journal to decide.
 */
#include "ms_group.h"

#include <stdio.h>
#include <string.h>

#include "ms_xxh3.h"

enum { FENCE_BITS = 24, NOBODY = 0 };

#define TAKEN UINT64_C(0x8000)
#define SLOT_BITS UINT64_C(0x7fff)

static uint64_t load(const _Atomic uint64_t *at) {
  return atomic_load_explicit(at, memory_order_relaxed);
}

static void store(_Atomic uint64_t *at, uint64_t value) {
  MS_YIELD("group_store");
  atomic_store_explicit(at, value, memory_order_relaxed);
}

static uint32_t count_of(const ms_group *group) {
  uint32_t count = atomic_load_explicit(&group->header->partitions, memory_order_acquire);
  return count < group->room ? count : group->room;
}

static uint32_t holder_of(uint64_t holder) { return (uint32_t)(holder & SLOT_BITS); }
static uint64_t fence_of(uint64_t holder) { return holder >> 16; }

static bool is_member(const ms_group *group, uint32_t holder) {
  return holder != NOBODY && holder <= MS_GROUP_MEMBERS &&
         atomic_load_explicit(&group->members[holder - 1].process, memory_order_relaxed) != 0;
}

/* --- the file --- */

uint64_t ms_group_size(uint32_t partitions) {
  uint64_t size = MS_GROUP_PARTITIONS_AT + (uint64_t)partitions * sizeof(ms_group_partition);
  return (size + MS_PAGE_BYTES - 1) / MS_PAGE_BYTES * MS_PAGE_BYTES;
}

static uint64_t header_checksum(const ms_group_header *header) {
  return ms_xxh3_64(header, offsetof(ms_group_header, checksum), 0);
}

static void point(ms_group *group, void *bytes, uint64_t size) {
  uint64_t room = (size - MS_GROUP_PARTITIONS_AT) / sizeof(ms_group_partition);
  group->header = bytes;
  group->members = (ms_group_member *)((uint8_t *)bytes + MS_GROUP_MEMBERS_AT);
  group->partitions = (ms_group_partition *)((uint8_t *)bytes + MS_GROUP_PARTITIONS_AT);
  group->room = room < UINT32_MAX ? (uint32_t)room : UINT32_MAX;
}

void ms_group_init(void *bytes, const uint8_t store_id[16], uint64_t stream_id, uint64_t group_id,
                   uint64_t salt, uint64_t generation, uint32_t partitions) {
  ms_group_header *header = bytes;
  header->magic = MS_MAGIC_GROUP;
  header->version = MS_FORMAT_VERSION;
  header->members = MS_GROUP_MEMBERS;
  memcpy(header->store_id, store_id, 16);
  header->stream_id = stream_id;
  header->group_id = group_id;
  header->salt = salt;
  header->checksum = header_checksum(header);
  atomic_store_explicit(&header->state, MS_GROUP_LIVE, memory_order_relaxed);
  store(&header->generation, generation);
  atomic_store_explicit(&header->partitions, partitions, memory_order_relaxed);
}

ms_status ms_group_attach(ms_group *group, void *bytes, uint64_t size, const uint8_t store_id[16],
                          uint64_t stream_id, ms_error *err) {
  const ms_group_header *header = bytes;
  if (size < MS_GROUP_PARTITIONS_AT)
    return ms_fail(err, MS_CORRUPT, 0, MS_GROUP_PARTITIONS_AT, size, "too short for a group");
  if (header->magic != MS_MAGIC_GROUP)
    return ms_fail(err, MS_CORRUPT, 0, MS_MAGIC_GROUP, header->magic, "not a group file");
  if (header->checksum != header_checksum(header))
    return ms_fail(err, MS_CORRUPT, offsetof(ms_group_header, checksum), header_checksum(header),
                   header->checksum, "the header's checksum is wrong");
  if (header->version != MS_FORMAT_VERSION)
    return ms_fail(err, MS_VERSION, 8, MS_FORMAT_VERSION, header->version,
                   "format %u, this version reads %u", header->version, MS_FORMAT_VERSION);
  if (header->members != MS_GROUP_MEMBERS || header->stream_id != stream_id ||
      memcmp(header->store_id, store_id, 16) != 0)
    return ms_fail(err, MS_CORRUPT, 16, stream_id, header->stream_id,
                   "the group of another stream");
  point(group, bytes, size);
  return MS_OK;
}

/* --- shares --- */

static uint64_t next_fence(const ms_group *group, uint64_t holder) {
  uint64_t least = group->generation << FENCE_BITS, next = fence_of(holder) + 1;
  return next > least ? next : least;
}

static void give(ms_group *group, ms_group_partition *partition, uint32_t to) {
  uint64_t before = load(&partition->holder);
  if (holder_of(before) == to) return;
  store(&partition->holder, next_fence(group, before) << 16 | to);
}

/* How many partitions each member is to have. Those with the most keep one more than the others,
 * so that nothing moves only because of the remainder. */
static void set_quotas(const ms_group *group, const uint32_t *has, uint32_t members,
                       uint32_t *quotas) {
  uint32_t count = count_of(group), base = count / members, extra = count % members;
  for (int late = 0; late < 2; late++)
    for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++) {
      if (!is_member(group, slot + 1) || (has[slot] > base) == (late == 1)) continue;
      quotas[slot] = base + (extra > 0);
      if (extra > 0) extra--;
    }
}

/* Give each partition its heir, and to that at once what nobody has taken up. Holder of the word.
 * Does the same again where it was not finished. */
static void share_out(ms_group *group) {
  uint32_t has[MS_GROUP_MEMBERS] = {0}, quotas[MS_GROUP_MEMBERS] = {0}, members = 0;
  uint32_t count = count_of(group);
  for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++) members += is_member(group, slot + 1);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t holder = holder_of(load(&group->partitions[i].holder));
    if (is_member(group, holder)) has[holder - 1]++;
  }
  if (members > 0) set_quotas(group, has, members, quotas);
  /* Everyone keeps what fits its quota, first of all what it has taken up. */
  for (int taken = 1; taken >= 0; taken--)
    for (uint32_t i = 0; i < count; i++) {
      uint64_t word = load(&group->partitions[i].holder);
      uint32_t holder = holder_of(word);
      if (((word & TAKEN) != 0) != taken) continue;
      bool keeps = is_member(group, holder) && quotas[holder - 1] > 0;
      if (keeps) quotas[holder - 1]--;
      atomic_store_explicit(&group->partitions[i].heir, keeps ? holder : NOBODY,
                            memory_order_relaxed);
    }
  uint32_t next = 0;
  for (uint32_t i = 0; i < count; i++) {
    ms_group_partition *partition = &group->partitions[i];
    if (atomic_load_explicit(&partition->heir, memory_order_relaxed) != NOBODY) continue;
    while (next < MS_GROUP_MEMBERS && quotas[next] == 0) next++;
    uint32_t heir = next < MS_GROUP_MEMBERS ? next + 1 : NOBODY;
    if (heir != NOBODY) quotas[next]--;
    atomic_store_explicit(&partition->heir, heir, memory_order_relaxed);
    uint64_t word = load(&partition->holder);
    if ((word & TAKEN) == 0 || !is_member(group, holder_of(word))) give(group, partition, heir);
  }
  MS_YIELD("group_changes");
  /* Release: pairs with the acquire of a member that checks whether it must take up anew. */
  atomic_fetch_add_explicit(&group->header->changes, 1, memory_order_release);
}

/* --- the word --- */

static ms_status enter(ms_group *group, uint32_t *out_owner) {
  MS_TRY(ms_owner_try_take(&group->header->word, group->self, out_owner));
  ms_status status = MS_OK;
  if (atomic_load_explicit(&group->header->partitions, memory_order_relaxed) > group->room)
    status = MS_MOVED; /* shares are of all partitions */
  if (atomic_load_explicit(&group->header->state, memory_order_relaxed) != MS_GROUP_LIVE)
    status = MS_CLOSED;
  if (status != MS_OK) ms_owner_release(&group->header->word);
  return status;
}

static ms_status leave(ms_group *group, ms_status status) {
  ms_owner_release(&group->header->word);
  return status;
}

ms_status ms_group_take_over(ms_group *group, uint32_t dead, uint32_t *out_owner) {
  MS_TRY(ms_owner_take_over(&group->header->word, group->self, dead, out_owner));
  share_out(group);
  return leave(group, MS_OK);
}

void ms_group_void(ms_group *group) {
  for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++) {
    atomic_store_explicit(&group->members[slot].process, 0, memory_order_relaxed);
    store(&group->members[slot].session, 0);
    store(&group->members[slot].processing, 0);
  }
  for (uint32_t i = 0; i < count_of(group); i++) {
    give(group, &group->partitions[i], NOBODY);
    atomic_store_explicit(&group->partitions[i].heir, NOBODY, memory_order_relaxed);
  }
  atomic_store_explicit(&group->header->word, MS_OWNER_FREE, memory_order_relaxed);
  atomic_store_explicit(&group->header->sync, MS_OWNER_FREE, memory_order_relaxed);
  store(&group->header->watched, 0); /* a clock of another boot */
  /* Release: pairs with the acquire of whoever opens the group next. */
  atomic_store_explicit(&group->header->generation, group->generation, memory_order_release);
}

/* --- members --- */

static ms_group_member *member_of(const ms_group *group, uint32_t slot, uint32_t number) {
  ms_group_member *member = &group->members[slot];
  bool same = atomic_load_explicit(&member->process, memory_order_relaxed) == group->self &&
              atomic_load_explicit(&member->number, memory_order_relaxed) == number;
  return same ? member : NULL;
}

static void end_member(ms_group_member *member) {
  MS_YIELD("group_end");
  atomic_store_explicit(&member->process, 0, memory_order_relaxed);
  store(&member->session, 0); /* a renewal finds out */
  store(&member->processing, 0);
}

ms_status ms_group_try_join(ms_group *group, uint64_t session, uint64_t processing,
                            uint32_t *out_slot, uint32_t *out_number, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  uint32_t slot = 0;
  while (slot < MS_GROUP_MEMBERS && is_member(group, slot + 1)) slot++;
  if (slot == MS_GROUP_MEMBERS) return leave(group, MS_FULL);
  ms_group_member *member = &group->members[slot];
  uint32_t number = atomic_fetch_add_explicit(&member->number, 1, memory_order_relaxed) + 1;
  store(&member->session, session);
  store(&member->processing, processing);
  atomic_store_explicit(&member->joined, ms_clock_wall_us(), memory_order_relaxed);
  MS_YIELD("group_join");
  atomic_store_explicit(&member->process, group->self, memory_order_relaxed);
  share_out(group);
  *out_slot = slot;
  *out_number = number;
  return leave(group, MS_OK);
}

ms_status ms_group_try_leave(ms_group *group, uint32_t slot, uint32_t number, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  ms_group_member *member = member_of(group, slot, number);
  if (member == NULL) return leave(group, MS_LOST);
  end_member(member);
  share_out(group);
  return leave(group, MS_OK);
}

ms_status ms_group_try_take_up(ms_group *group, uint32_t slot, uint32_t number,
                               uint64_t *out_fences, uint8_t *out_flags, uint32_t count,
                               uint32_t *out_changes, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  if (member_of(group, slot, number) == NULL) return leave(group, MS_LOST);
  uint32_t known = count_of(group);
  for (uint32_t i = 0; i < count; i++) {
    out_fences[i] = 0;
    out_flags[i] = 0;
    if (i >= known) continue;
    ms_group_partition *partition = &group->partitions[i];
    uint64_t word = load(&partition->holder);
    if (holder_of(word) != slot + 1) continue;
    out_fences[i] = fence_of(word);
    uint32_t heir = atomic_load_explicit(&partition->heir, memory_order_relaxed);
    if (heir != slot + 1) out_flags[i] |= MS_GROUP_LEAVING;
    if ((word & TAKEN) == 0) store(&partition->holder, word | TAKEN);
  }
  *out_changes = atomic_load_explicit(&group->header->changes, memory_order_relaxed);
  return leave(group, MS_OK);
}

/* The partition of a claim that still stands, or NULL. Holder of the word. */
static ms_group_partition *claimed(const ms_group *group, const ms_group_claim *claim) {
  if (claim->partition >= count_of(group)) return NULL;
  ms_group_partition *partition = &group->partitions[claim->partition];
  uint64_t wanted = claim->fence << 16 | (claim->slot + 1);
  return (load(&partition->holder) & ~TAKEN) == wanted ? partition : NULL;
}

ms_status ms_group_try_release(ms_group *group, const ms_group_claim *claim, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  ms_group_partition *partition = claimed(group, claim);
  if (partition == NULL) return leave(group, MS_FENCED);
  uint32_t heir = atomic_load_explicit(&partition->heir, memory_order_relaxed);
  if (!is_member(group, heir)) heir = NOBODY;
  give(group, partition, heir);
  atomic_fetch_add_explicit(&group->header->changes, 1, memory_order_release);
  return leave(group, MS_OK);
}

static bool is_over(const ms_group_member *member, uint64_t now_ns) {
  return load(&member->session) < now_ns || load(&member->processing) < now_ns;
}

static bool is_among(uint32_t process, const uint32_t *dead, uint32_t dead_count) {
  for (uint32_t i = 0; i < dead_count; i++)
    if (dead[i] == process) return true;
  return false;
}

ms_status ms_group_try_end(ms_group *group, uint64_t now_ns, const uint32_t *dead,
                           uint32_t dead_count, uint32_t *out_ended, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  uint32_t ended = 0;
  for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++) {
    ms_group_member *member = &group->members[slot];
    uint32_t process = atomic_load_explicit(&member->process, memory_order_relaxed);
    if (process == 0) continue;
    if (!is_over(member, now_ns) && !is_among(process, dead, dead_count)) continue;
    end_member(member);
    ended++;
  }
  if (ended > 0) share_out(group);
  *out_ended = ended;
  return leave(group, MS_OK);
}

bool ms_group_claim_watch(ms_group *group, uint64_t now_ns, uint64_t interval_ns) {
  uint64_t seen = load(&group->header->watched);
  if (seen <= now_ns && now_ns - seen < interval_ns) return false;
  return atomic_compare_exchange_strong_explicit(&group->header->watched, &seen, now_ns,
                                                 memory_order_relaxed, memory_order_relaxed);
}

bool ms_group_overdue(const ms_group *group, uint64_t now_ns) {
  for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++)
    if (is_member(group, slot + 1) && is_over(&group->members[slot], now_ns)) return true;
  return false;
}

ms_status ms_group_renew(_Atomic uint64_t *deadline, uint64_t *io_token, uint64_t to) {
  uint64_t seen = *io_token;
  MS_YIELD("group_renew");
  if (!atomic_compare_exchange_strong_explicit(deadline, &seen, to, memory_order_relaxed,
                                               memory_order_relaxed))
    return MS_LOST;
  *io_token = to;
  return MS_OK;
}

ms_status ms_group_try_grow(ms_group *group, uint32_t partitions, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  if (partitions > group->room) return leave(group, MS_MOVED);
  if (partitions > atomic_load_explicit(&group->header->partitions, memory_order_relaxed)) {
    atomic_store_explicit(&group->header->partitions, partitions, memory_order_release);
    share_out(group);
  }
  return leave(group, MS_OK);
}

/* --- positions --- */

typedef struct copy_bytes {
  uint64_t sequence, epoch, offset, transaction;
} copy_bytes;

static uint64_t copy_checksum(const ms_group *group, uint32_t partition, const copy_bytes *bytes) {
  return ms_xxh3_64(bytes, sizeof(*bytes), group->header->salt + partition);
}

/* Acquire and release of all words of a copy: the checksum comes after what it is of; and whoever
 * sees anything of a new copy sees the other one as it was when this was begun. */
static uint64_t load_word(const _Atomic uint64_t *at) {
  return atomic_load_explicit(at, memory_order_acquire);
}

static void store_word(_Atomic uint64_t *at, uint64_t value) {
  MS_YIELD("group_store");
  atomic_store_explicit(at, value, memory_order_release);
}

/* Is the copy one that was written whole? Also for readers without the word. */
static bool read_copy(const ms_group *group, uint32_t partition, uint32_t which, copy_bytes *out) {
  const ms_group_copy *copy = &group->partitions[partition].copies[which];
  MS_YIELD("group_read");
  uint64_t checksum = load_word(&copy->checksum);
  *out = (copy_bytes){load_word(&copy->sequence), load_word(&copy->epoch), load_word(&copy->offset),
                      load_word(&copy->transaction)};
  return out->sequence != 0 && checksum == copy_checksum(group, partition, out);
}

static bool is_unwritten(const ms_group *group, uint32_t partition) {
  const ms_group_copy *copies = group->partitions[partition].copies;
  return load(&copies[0].checksum) == 0 && load(&copies[0].sequence) == 0 &&
         load(&copies[1].checksum) == 0 && load(&copies[1].sequence) == 0;
}

/* Which copy is the position; -1: none is valid, or, without the word, none held still. */
static int newest_copy(const ms_group *group, uint32_t partition, copy_bytes *out) {
  copy_bytes copies[2];
  bool valid[2];
  for (uint32_t i = 0; i < 2; i++) valid[i] = read_copy(group, partition, i, &copies[i]);
  /* The first may have been written since, and the second, newer than what we have, begun again. */
  if (valid[0] && !valid[1]) valid[0] = read_copy(group, partition, 0, &copies[0]);
  if (!valid[0] && !valid[1]) return -1;
  int which = valid[1] && (!valid[0] || copies[1].sequence > copies[0].sequence) ? 1 : 0;
  *out = copies[which];
  return which;
}

static void write_copy(ms_group *group, uint32_t partition, uint64_t epoch, uint64_t offset,
                       uint64_t transaction) {
  copy_bytes bytes = {0, 0, 0, 0};
  int newest = newest_copy(group, partition, &bytes);
  bytes.sequence++;
  bytes.epoch = epoch;
  bytes.offset = offset;
  if (transaction != 0) bytes.transaction = transaction;
  ms_group_copy *copy = &group->partitions[partition].copies[newest == 0 ? 1 : 0];
  store_word(&copy->sequence, bytes.sequence);
  store_word(&copy->epoch, bytes.epoch);
  store_word(&copy->offset, bytes.offset);
  store_word(&copy->transaction, bytes.transaction);
  MS_YIELD("group_copy");
  store_word(&copy->checksum, copy_checksum(group, partition, &bytes));
}

ms_status ms_group_position_of(const ms_group *group, uint32_t partition, ms_group_position *out) {
  copy_bytes bytes;
  if (partition >= count_of(group)) return MS_END;
  /* A writer overtakes one copy at a time: again, until one of the two held still. */
  for (int attempt = 0; attempt < 1000; attempt++) {
    if (newest_copy(group, partition, &bytes) >= 0) {
      *out = (ms_group_position){bytes.epoch, bytes.offset, bytes.transaction};
      return MS_OK;
    }
    if (is_unwritten(group, partition)) return MS_END;
    if (attempt > 100) ms_cpu_relax();
  }
  /* The first copy of all is being written, or its writer died there: nothing was committed. */
  const ms_group_copy *copies = group->partitions[partition].copies;
  bool first = load(&copies[0].checksum) == 0 && load(&copies[1].checksum) == 0;
  return first ? MS_END : MS_CORRUPT;
}

static bool is_backwards(const ms_group *group, uint32_t partition, uint64_t epoch,
                         uint64_t offset) {
  copy_bytes bytes;
  return newest_copy(group, partition, &bytes) >= 0 &&
         (offset < bytes.offset || epoch < bytes.epoch);
}

ms_status ms_group_try_commit(ms_group *group, const ms_group_claim *claim, uint64_t epoch,
                              uint64_t offset, bool backwards, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  ms_group_partition *partition = claimed(group, claim);
  if (partition == NULL) return leave(group, MS_FENCED);
  if (load(&partition->pending) != 0) return leave(group, MS_PENDING);
  if (!backwards && is_backwards(group, claim->partition, epoch, offset))
    return leave(group, MS_INVALID);
  write_copy(group, claim->partition, epoch, offset, 0);
  return leave(group, MS_OK);
}

ms_status ms_group_try_seek(ms_group *group, uint32_t partition, uint64_t epoch, uint64_t offset,
                            uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  if (partition >= count_of(group)) return leave(group, MS_INVALID);
  ms_group_partition *found = &group->partitions[partition];
  if (is_member(group, holder_of(load(&found->holder)))) return leave(group, MS_LOST);
  if (load(&found->pending) != 0) return leave(group, MS_PENDING);
  write_copy(group, partition, epoch, offset, 0);
  return leave(group, MS_OK);
}

/* --- positions of a transaction --- */

ms_status ms_group_try_prepare(ms_group *group, uint64_t transaction, const ms_group_claim *claims,
                               const ms_group_position *positions, uint32_t count,
                               uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  for (uint32_t i = 0; i < count; i++) {
    const ms_group_partition *partition = claimed(group, &claims[i]);
    if (partition == NULL) return leave(group, MS_FENCED);
    if (load(&partition->pending) != 0) return leave(group, MS_PENDING);
  }
  for (uint32_t i = 0; i < count; i++) {
    ms_group_partition *partition = &group->partitions[claims[i].partition];
    store(&partition->pending_epoch, positions[i].epoch);
    store(&partition->pending_offset, positions[i].offset);
    store(&partition->pending_fence, claims[i].fence);
    store(&partition->pending, transaction);
  }
  return leave(group, MS_OK);
}

ms_status ms_group_pending(const ms_group *group, uint32_t partition, uint64_t *out_transaction,
                           uint64_t *out_fence, ms_group_position *out) {
  if (partition >= count_of(group)) return MS_END;
  const ms_group_partition *found = &group->partitions[partition];
  uint64_t transaction = load(&found->pending);
  if (transaction == 0) return MS_END;
  *out_transaction = transaction;
  *out_fence = load(&found->pending_fence);
  *out = (ms_group_position){load(&found->pending_epoch), load(&found->pending_offset), 0};
  return MS_OK;
}

static void end_pending(ms_group *group, uint32_t partition, uint64_t transaction) {
  ms_group_partition *found = &group->partitions[partition];
  if (load(&found->pending) != transaction) return;
  store(&found->pending, 0);
  /* Release: as in share_out; the heir of the partition waits for this. */
  atomic_fetch_add_explicit(&group->header->changes, 1, memory_order_release);
}

ms_status ms_group_try_apply(ms_group *group, uint32_t partition, uint64_t transaction,
                             uint64_t epoch, uint64_t offset, uint32_t *out_owner) {
  copy_bytes bytes;
  MS_TRY(enter(group, out_owner));
  if (partition >= count_of(group)) return leave(group, MS_INVALID);
  if (newest_copy(group, partition, &bytes) < 0 || bytes.transaction < transaction)
    write_copy(group, partition, epoch, offset, transaction);
  end_pending(group, partition, transaction);
  return leave(group, MS_OK);
}

ms_status ms_group_try_revert(ms_group *group, uint32_t partition, uint64_t transaction,
                              uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  if (partition < count_of(group)) end_pending(group, partition, transaction);
  return leave(group, MS_OK);
}

/* --- reading, and the end --- */

ms_status ms_group_try_drop(ms_group *group, uint32_t *out_owner) {
  MS_TRY(enter(group, out_owner));
  for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++)
    if (is_member(group, slot + 1)) return leave(group, MS_LOST);
  atomic_store_explicit(&group->header->state, MS_GROUP_DROPPED, memory_order_release);
  return leave(group, MS_OK);
}

void ms_group_holder(const ms_group *group, uint32_t partition, uint32_t *out_slot,
                     uint64_t *out_fence, bool *out_taken) {
  uint64_t word = partition < count_of(group) ? load(&group->partitions[partition].holder) : 0;
  *out_slot = holder_of(word);
  *out_fence = fence_of(word);
  *out_taken = (word & TAKEN) != 0;
}

bool ms_group_check(const ms_group *group, char *text, size_t size) {
  uint32_t shares[MS_GROUP_MEMBERS] = {0}, members = 0, least = UINT32_MAX, most = 0;
  ms_group_position position;
  if (atomic_load_explicit(&group->header->word, memory_order_relaxed) != 0)
    return snprintf(text, size, "the word is held"), false;
  for (uint32_t i = 0; i < count_of(group); i++) {
    uint64_t word = load(&group->partitions[i].holder);
    uint32_t heir = atomic_load_explicit(&group->partitions[i].heir, memory_order_relaxed);
    if (holder_of(word) != NOBODY && !is_member(group, holder_of(word)))
      return snprintf(text, size, "partition %u: its holder is no member", i), false;
    if (heir != NOBODY && !is_member(group, heir))
      return snprintf(text, size, "partition %u: its heir is no member", i), false;
    if (heir != NOBODY) shares[heir - 1]++;
    if (!(word & TAKEN) && holder_of(word) != heir)
      return snprintf(text, size, "partition %u: nobody took it up, and it did not move", i), false;
    if (ms_group_position_of(group, i, &position) == MS_CORRUPT)
      return snprintf(text, size, "partition %u: no copy of the position is valid", i), false;
  }
  for (uint32_t slot = 0; slot < MS_GROUP_MEMBERS; slot++) {
    if (!is_member(group, slot + 1)) continue;
    members++;
    least = shares[slot] < least ? shares[slot] : least;
    most = shares[slot] > most ? shares[slot] : most;
  }
  if (members > 0 && most - least > 1)
    return snprintf(text, size, "shares from %u to %u", least, most), false;
  return true;
}
