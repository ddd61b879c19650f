/* The file of a consumer group: attached, its positions read, members of a former session voided,
 * then joined, committed, prepared, decided, grown, left.
 *
 * Flags: 1 mends the header's checksum, 2 those of positions.
 */
#include "fuzz.h"
#include "ms_group.h"

enum { ROOM = 16 };

static void mend(uint8_t *bytes, uint8_t flags) {
  ms_group_header *header = (ms_group_header *)(void *)bytes;
  if (flags & 1) {
    header->magic = MS_MAGIC_GROUP;
    header->version = MS_FORMAT_VERSION;
    header->members = MS_GROUP_MEMBERS;
    header->checksum = ms_xxh3_64(header, offsetof(ms_group_header, checksum), 0);
  }
  ms_group_partition *partitions = (ms_group_partition *)(void *)(bytes + MS_GROUP_PARTITIONS_AT);
  for (uint32_t i = 0; flags & 2 && i < ROOM; i++)
    for (int copy = 0; copy < 2; copy++) {
      ms_group_copy *at = &partitions[i].copies[copy];
      at->checksum = ms_xxh3_64((const uint8_t *)at + 8, 32, header->salt + i);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  uint8_t flags = *data++;
  size--;
  uint64_t file_size = ms_group_size(ROOM);
  uint8_t *bytes = zeros(file_size);
  while (piece(bytes, file_size, &data, &size)) {}
  mend(bytes, flags);
  ms_error err;
  ms_group group = {0};
  const ms_group_header *header = (const ms_group_header *)(void *)bytes;
  uint8_t store_id[16];
  memcpy(store_id, header->store_id, 16);
  if (ms_group_attach(&group, bytes, file_size, store_id, header->stream_id, &err) == MS_OK) {
    uint32_t owner = 0, slot, number, ended, changes;
    uint64_t transaction, fence, fences[ROOM];
    uint8_t told[ROOM];
    bool taken;
    ms_group_position position;
    group.generation = header->generation + 1; /* of the first opener */
    group.self = 1u | 7u << 15;
    ms_group_void(&group);
    uint32_t count = header->partitions;
    for (uint32_t i = 0; i < count && i < group.room; i++) {
      (void)!ms_group_position_of(&group, i, &position);
      (void)!ms_group_pending(&group, i, &transaction, &fence, &position);
      ms_group_holder(&group, i, &slot, &fence, &taken);
    }
    if (ms_group_try_join(&group, UINT64_MAX, UINT64_MAX, &slot, &number, &owner) == MS_OK) {
      ms_status status =
          ms_group_try_take_up(&group, slot, number, fences, told, ROOM, &changes, &owner);
      for (uint32_t i = 0; status == MS_OK && i < count && i < ROOM; i++) {
        ms_group_claim claim = {slot, i, fences[i]};
        (void)!ms_group_try_commit(&group, &claim, 3, 10, true, &owner);
        position = (ms_group_position){.epoch = 3, .offset = 20};
        (void)!ms_group_try_prepare(&group, 77, &claim, &position, 1, &owner);
        (void)!ms_group_try_apply(&group, i, 77, 3, 20, &owner);
        (void)!ms_group_try_revert(&group, i, 77, &owner);
        (void)!ms_group_try_release(&group, &claim, &owner);
        (void)!ms_group_try_seek(&group, i, 1, 1, &owner);
      }
      (void)!ms_group_try_grow(&group, ROOM, &owner);
      (void)!ms_group_try_end(&group, 1, NULL, 0, &ended, &owner);
      (void)!ms_group_try_leave(&group, slot, number, &owner);
    }
    char text[256];
    (void)!ms_group_check(&group, text, sizeof text);
    (void)!ms_group_try_drop(&group, &owner);
  }
  free(bytes);
  return 0;
}
