/* A consumer group on plain memory: shares, fences, positions, pending positions, bad bytes. */
#include "ms_group.h"

#include "check.h"
#include "ms_xxh3.h"

enum { PARTITIONS = 8, ROOM = 16 };
#define NEVER UINT64_MAX

static const uint8_t store_id[16] = "store identity 1";
static uint64_t memory[32 * 4096 / 8] __attribute__((aligned(4096)));
static uint32_t owner;

static ms_group open_as(uint32_t process, uint64_t generation) {
  ms_group group = {0};
  uint64_t size = ms_group_size(ROOM);
  CHECK(size <= sizeof memory);
  CHECK(ms_group_attach(&group, memory, size, store_id, 7, NULL) == MS_OK);
  group.self = ms_owner_word(process, 1);
  group.generation = generation;
  return group;
}

static ms_group made(uint32_t partitions) {
  memset(memory, 0, sizeof memory);
  ms_group_init(memory, store_id, 7, 99, 12345, 1, partitions);
  return open_as(0, 1);
}

typedef struct member {
  uint32_t slot, number, changes;
  uint64_t fences[ROOM];
  uint8_t flags[ROOM];
} member;

static member joined(ms_group *group) {
  member self = {0};
  CHECK(ms_group_try_join(group, NEVER, NEVER, &self.slot, &self.number, &owner) == MS_OK);
  return self;
}

static ms_status look(ms_group *group, member *self) {
  return ms_group_try_take_up(group, self->slot, self->number, self->fences, self->flags, ROOM,
                              &self->changes, &owner);
}

static uint32_t share_of(const ms_group *group, const member *self) {
  uint32_t count = 0, slot;
  uint64_t fence;
  bool taken;
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    ms_group_holder(group, i, &slot, &fence, &taken);
    count += slot == self->slot + 1;
  }
  return count;
}

static ms_group_claim claim_of(const member *self, uint32_t partition) {
  return (ms_group_claim){self->slot, partition, self->fences[partition]};
}

static void check_whole(const ms_group *group) {
  char text[200] = "";
  if (!CHECK(ms_group_check(group, text, sizeof text))) printf("  %s\n", text);
}

static void test_group_of_nobody_has_no_holders(void) {
  ms_group group = made(PARTITIONS);
  uint32_t slot;
  uint64_t fence;
  bool taken;
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    ms_group_holder(&group, i, &slot, &fence, &taken);
    CHECK(slot == 0 && fence == 0 && !taken);
  }
  check_whole(&group);
}

static void test_group_first_bytes_are_as_documented(void) {
  ms_group group = made(PARTITIONS);
  CHECK(memcmp(memory, "MSGROUP1", 8) == 0);
  CHECK_EQ_U64((uint8_t *)group.members - (uint8_t *)memory, 4096);
  CHECK_EQ_U64((uint8_t *)group.partitions - (uint8_t *)memory, 20480);
  CHECK_EQ_U64(ms_group_size(1), 24576);
}

static void test_group_shares_of_those_who_took_nothing_up_move_at_once(void) {
  ms_group group = made(PARTITIONS);
  member a = joined(&group);
  CHECK_EQ_U64(share_of(&group, &a), 8);
  member b = joined(&group);
  CHECK_EQ_U64(share_of(&group, &a), 4);
  CHECK_EQ_U64(share_of(&group, &b), 4);
  check_whole(&group);
}

static void test_group_who_has_the_most_keeps_one_more(void) {
  ms_group group = made(5);
  member a = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  member b = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  uint32_t leaving = 0;
  for (uint32_t i = 0; i < 5; i++) leaving += a.flags[i] & MS_GROUP_LEAVING;
  CHECK_EQ_U64(leaving, 2);
  CHECK(ms_group_try_leave(&group, b.slot, b.number, &owner) == MS_OK);
  CHECK(look(&group, &a) == MS_OK);
  for (uint32_t i = 0; i < 5; i++) CHECK(a.flags[i] == 0);
}

static void test_group_what_was_taken_up_moves_when_it_is_released(void) {
  ms_group group = made(PARTITIONS);
  member a = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  member b = joined(&group);
  CHECK_EQ_U64(share_of(&group, &b), 0);
  CHECK(look(&group, &a) == MS_OK);
  uint32_t leaving = 0;
  for (uint32_t i = 0; i < PARTITIONS; i++) {
    if (!(a.flags[i] & MS_GROUP_LEAVING)) continue;
    ms_group_claim claim = claim_of(&a, i);
    CHECK(ms_group_try_release(&group, &claim, &owner) == MS_OK);
    CHECK(ms_group_try_release(&group, &claim, &owner) == MS_FENCED);
    CHECK(ms_group_try_commit(&group, &claim, 1, 1, false, &owner) == MS_FENCED);
    leaving++;
  }
  CHECK_EQ_U64(leaving, 4);
  CHECK_EQ_U64(share_of(&group, &b), 4);
  check_whole(&group);
}

static void test_group_fence_rises_with_each_owner_and_generation(void) {
  ms_group group = made(PARTITIONS);
  uint64_t last = 0;
  for (int i = 0; i < 5; i++) {
    member a = joined(&group);
    CHECK(look(&group, &a) == MS_OK);
    CHECK(a.fences[3] > last);
    last = a.fences[3];
    CHECK(ms_group_try_leave(&group, a.slot, a.number, &owner) == MS_OK);
    CHECK(ms_group_try_leave(&group, a.slot, a.number, &owner) == MS_LOST);
  }
  ms_group later = open_as(0, 9);
  ms_group_void(&later);
  member a = joined(&later);
  CHECK(look(&later, &a) == MS_OK);
  CHECK(a.fences[3] >= UINT64_C(9) << 24);
}

static void test_group_commit_of_an_ended_member_is_fenced(void) {
  ms_group group = made(PARTITIONS), other = open_as(1, 1);
  member a = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  ms_group_claim claim = claim_of(&a, 0);
  CHECK(ms_group_try_commit(&group, &claim, 1, 5, false, &owner) == MS_OK);
  uint32_t ended = 0, dead = group.self;
  member b = joined(&other);
  CHECK(ms_group_try_end(&other, 0, &dead, 1, &ended, &owner) == MS_OK);
  CHECK_EQ_U64(ended, 1);
  CHECK_EQ_U64(share_of(&other, &b), 8);
  CHECK(ms_group_try_commit(&group, &claim, 1, 6, false, &owner) == MS_FENCED);
  CHECK(look(&group, &a) == MS_LOST);
  ms_group_position position;
  CHECK(ms_group_position_of(&other, 0, &position) == MS_OK);
  CHECK_EQ_U64(position.offset, 5);
  check_whole(&other);
}

static void test_group_member_past_a_deadline_is_ended_and_its_renewal_lost(void) {
  ms_group group = made(PARTITIONS);
  uint32_t slot, number, ended;
  CHECK(ms_group_try_join(&group, 100, 300, &slot, &number, &owner) == MS_OK);
  uint64_t session = 100;
  CHECK(!ms_group_overdue(&group, 100));
  CHECK(ms_group_renew(&group.members[slot].session, &session, 200) == MS_OK);
  CHECK(ms_group_try_end(&group, 150, NULL, 0, &ended, &owner) == MS_OK);
  CHECK_EQ_U64(ended, 0);
  CHECK(ms_group_overdue(&group, 201));
  CHECK(ms_group_try_end(&group, 201, NULL, 0, &ended, &owner) == MS_OK);
  CHECK_EQ_U64(ended, 1);
  CHECK(ms_group_renew(&group.members[slot].session, &session, 300) == MS_LOST);
  check_whole(&group);
}

static void test_group_is_full_at_256_members(void) {
  ms_group group = made(PARTITIONS);
  member one;
  for (uint32_t i = 0; i < MS_GROUP_MEMBERS; i++) one = joined(&group);
  CHECK(ms_group_try_join(&group, NEVER, NEVER, &one.slot, &one.number, &owner) == MS_FULL);
  check_whole(&group);
}

static void test_group_position_goes_back_only_when_asked(void) {
  ms_group group = made(PARTITIONS);
  ms_group_position position;
  CHECK(ms_group_position_of(&group, 2, &position) == MS_END);
  member a = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  ms_group_claim claim = claim_of(&a, 2);
  CHECK(ms_group_try_commit(&group, &claim, 3, 10, false, &owner) == MS_OK);
  CHECK(ms_group_try_commit(&group, &claim, 3, 10, false, &owner) == MS_OK);
  CHECK(ms_group_try_commit(&group, &claim, 3, 9, false, &owner) == MS_INVALID);
  CHECK(ms_group_try_commit(&group, &claim, 2, 11, false, &owner) == MS_INVALID);
  CHECK(ms_group_try_commit(&group, &claim, 3, 9, true, &owner) == MS_OK);
  CHECK(ms_group_position_of(&group, 2, &position) == MS_OK);
  CHECK(position.epoch == 3 && position.offset == 9);
  CHECK(ms_group_try_seek(&group, 2, 3, 1, &owner) == MS_LOST);
  CHECK(ms_group_try_leave(&group, a.slot, a.number, &owner) == MS_OK);
  CHECK(ms_group_try_seek(&group, 2, 3, 1, &owner) == MS_OK);
  CHECK(ms_group_position_of(&group, 2, &position) == MS_OK && position.offset == 1);
}

/* Every byte of the newest copy, wrong: the position is the one before. Both: damaged, not lost. */
static void test_group_torn_copy_leaves_the_one_before(void) {
  ms_group group = made(PARTITIONS);
  for (uint64_t offset = 1; offset <= 2; offset++)
    CHECK(ms_group_try_seek(&group, 1, 1, offset, &owner) == MS_OK);
  uint8_t *newest = (uint8_t *)&group.partitions[1].copies[1];
  ms_group_position position;
  for (uint32_t at = 0; at < 40; at++) {
    newest[at] ^= 0x40;
    CHECK(ms_group_position_of(&group, 1, &position) == MS_OK);
    CHECK_EQ_U64(position.offset, 1);
    newest[at] ^= 0x40;
  }
  CHECK(ms_group_position_of(&group, 1, &position) == MS_OK && position.offset == 2);
  newest[3] ^= 1;
  ((uint8_t *)&group.partitions[1].copies[0])[30] ^= 1;
  CHECK(ms_group_position_of(&group, 1, &position) == MS_CORRUPT);
  CHECK(ms_group_try_seek(&group, 1, 1, 7, &owner) == MS_OK);
  CHECK(ms_group_position_of(&group, 1, &position) == MS_OK && position.offset == 7);
}

static void test_group_added_partitions_are_shared_out(void) {
  ms_group group = made(PARTITIONS);
  member a = joined(&group), b = joined(&group);
  CHECK(ms_group_try_grow(&group, 11, &owner) == MS_OK);
  CHECK(look(&group, &a) == MS_OK && look(&group, &b) == MS_OK);
  for (uint32_t i = 0; i < ROOM; i++) CHECK((a.fences[i] != 0) + (b.fences[i] != 0) == (i < 11));
  CHECK(ms_group_try_grow(&group, ROOM + 1000, &owner) == MS_MOVED);
  group.room = 9; /* a map of before */
  CHECK(look(&group, &a) == MS_MOVED);
  check_whole(&(ms_group){group.header, group.members, group.partitions, ROOM, 1, 1});
}

static void test_group_mark_of_a_transaction_is_applied_once_or_reverted(void) {
  ms_group group = made(PARTITIONS);
  ms_group_position position, pending[2] = {{1, 10, 0}, {1, 20, 0}};
  uint64_t transaction, fence;
  member a = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  ms_group_claim claims[2] = {claim_of(&a, 4), claim_of(&a, 5)};
  CHECK(ms_group_try_prepare(&group, 100, claims, pending, 2, &owner) == MS_OK);
  CHECK(ms_group_try_prepare(&group, 101, claims, pending, 1, &owner) == MS_PENDING);
  CHECK(ms_group_try_commit(&group, &claims[0], 1, 10, false, &owner) == MS_PENDING);
  CHECK(ms_group_pending(&group, 5, &transaction, &fence, &position) == MS_OK);
  CHECK(transaction == 100 && fence == claims[1].fence && position.offset == 20);
  CHECK(ms_group_try_revert(&group, 5, 99, &owner) == MS_OK); /* another's */
  CHECK(ms_group_pending(&group, 5, &transaction, &fence, &position) == MS_OK);
  CHECK(ms_group_try_revert(&group, 5, 100, &owner) == MS_OK);
  CHECK(ms_group_position_of(&group, 5, &position) == MS_END);
  CHECK(ms_group_try_apply(&group, 4, 100, 1, 10, &owner) == MS_OK);
  CHECK(ms_group_pending(&group, 4, &transaction, &fence, &position) == MS_END);
  CHECK(ms_group_try_commit(&group, &claims[0], 1, 3, true, &owner) == MS_OK);
  CHECK(ms_group_try_apply(&group, 4, 100, 1, 10, &owner) == MS_OK); /* replayed */
  CHECK(ms_group_position_of(&group, 4, &position) == MS_OK);
  CHECK(position.offset == 3 && position.transaction == 100);
  CHECK(ms_group_try_apply(&group, 4, 101, 1, 11, &owner) == MS_OK); /* with no mark */
  CHECK(ms_group_position_of(&group, 4, &position) == MS_OK && position.offset == 11);
}

static void test_group_prepare_with_one_stale_claim_marks_nothing(void) {
  ms_group group = made(PARTITIONS);
  ms_group_position position, pending[2] = {{1, 10, 0}, {1, 20, 0}};
  uint64_t transaction, fence;
  member a = joined(&group);
  CHECK(look(&group, &a) == MS_OK);
  ms_group_claim claims[2] = {claim_of(&a, 4), {a.slot, 5, a.fences[5] - 1}};
  CHECK(ms_group_try_prepare(&group, 100, claims, pending, 2, &owner) == MS_FENCED);
  CHECK(ms_group_pending(&group, 4, &transaction, &fence, &position) == MS_END);
}

static void test_group_that_was_removed_is_closed(void) {
  ms_group group = made(PARTITIONS);
  member a = joined(&group);
  CHECK(ms_group_try_drop(&group, &owner) == MS_LOST);
  CHECK(ms_group_try_leave(&group, a.slot, a.number, &owner) == MS_OK);
  CHECK(ms_group_try_drop(&group, &owner) == MS_OK);
  CHECK(ms_group_try_join(&group, 1, 1, &a.slot, &a.number, &owner) == MS_CLOSED);
}

static void test_group_bad_header_is_refused(void) {
  ms_group group = made(PARTITIONS);
  ms_error err;
  for (uint32_t at = 0; at < 64; at++) {
    ((uint8_t *)memory)[at] ^= 1;
    CHECK(ms_group_attach(&group, memory, ms_group_size(ROOM), store_id, 7, &err) < 0);
    ((uint8_t *)memory)[at] ^= 1;
  }
  CHECK(ms_group_attach(&group, memory, 4096, store_id, 7, &err) == MS_CORRUPT);
  CHECK(ms_group_attach(&group, memory, ms_group_size(ROOM), store_id, 8, &err) == MS_CORRUPT);
  group.header->version++; /* whole, and of a later format */
  group.header->checksum = ms_xxh3_64(group.header, offsetof(ms_group_header, checksum), 0);
  CHECK(ms_group_attach(&group, memory, ms_group_size(ROOM), store_id, 7, &err) == MS_VERSION);
}

static void test_group_has_no_position_behind_its_partitions(void) {
  ms_group group = made(PARTITIONS);
  ms_group_position position;
  CHECK(ms_group_try_seek(&group, PARTITIONS, 1, 1, &owner) == MS_INVALID);
  CHECK(ms_group_try_apply(&group, PARTITIONS, 100, 1, 1, &owner) == MS_INVALID);
  CHECK(ms_group_try_grow(&group, PARTITIONS + 1, &owner) == MS_OK);
  CHECK(ms_group_position_of(&group, PARTITIONS, &position) == MS_END);
}

/* Holders and heirs are read from the file: none of their values leads out of the tables. */
static void test_group_with_any_bytes_behind_the_header_stays_within_its_memory(void) {
  ms_group group = made(PARTITIONS);
  uint64_t random = 88172645463325252u;
  for (int round = 0; round < 2000; round++) {
    for (int i = 0; i < 50; i++) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      uint64_t at = 512 + random % ((ms_group_size(PARTITIONS) - 4096) / 8);
      memory[at] = random;
    }
    member a;
    char text[200];
    ms_group_position position;
    atomic_store(&group.header->word, 0);
    if (ms_group_try_join(&group, NEVER, NEVER, &a.slot, &a.number, &owner) == MS_OK) {
      CHECK(look(&group, &a) == MS_OK);
      ms_group_claim claim = claim_of(&a, 1);
      CHECK(ms_group_try_commit(&group, &claim, 1, 1, true, &owner) >= 0);
      CHECK(ms_group_try_release(&group, &claim, &owner) >= 0);
      CHECK(ms_group_try_leave(&group, a.slot, a.number, &owner) == MS_OK);
    }
    for (uint32_t i = 0; i < PARTITIONS; i++)
      CHECK(ms_group_position_of(&group, i, &position) <= MS_END);
    (void)ms_group_check(&group, text, sizeof text);
  }
}

static const check_test tests[] = {
    CHECK_TEST(test_group_of_nobody_has_no_holders),
    CHECK_TEST(test_group_first_bytes_are_as_documented),
    CHECK_TEST(test_group_shares_of_those_who_took_nothing_up_move_at_once),
    CHECK_TEST(test_group_who_has_the_most_keeps_one_more),
    CHECK_TEST(test_group_what_was_taken_up_moves_when_it_is_released),
    CHECK_TEST(test_group_fence_rises_with_each_owner_and_generation),
    CHECK_TEST(test_group_commit_of_an_ended_member_is_fenced),
    CHECK_TEST(test_group_member_past_a_deadline_is_ended_and_its_renewal_lost),
    CHECK_TEST(test_group_is_full_at_256_members),
    CHECK_TEST(test_group_position_goes_back_only_when_asked),
    CHECK_TEST(test_group_torn_copy_leaves_the_one_before),
    CHECK_TEST(test_group_added_partitions_are_shared_out),
    CHECK_TEST(test_group_mark_of_a_transaction_is_applied_once_or_reverted),
    CHECK_TEST(test_group_prepare_with_one_stale_claim_marks_nothing),
    CHECK_TEST(test_group_that_was_removed_is_closed),
    CHECK_TEST(test_group_bad_header_is_refused),
    CHECK_TEST(test_group_has_no_position_behind_its_partitions),
    CHECK_TEST(test_group_with_any_bytes_behind_the_header_stays_within_its_memory),
};
CHECK_MAIN(tests)
