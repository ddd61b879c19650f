/* The control page of a stream: a partition over one of its blocks and two segments is read up to
 * what the block says, appended to, rolled, taken over from its owner, synced, recovered.
 *
 * Flags: 1 mends the headers of the segments, 2 their activation records, 4 what refuses an append
 * (state, poison, generation), 8 frees the words. Whatever the block says, an append changes
 * nothing of a segment that lies before the tail, and can be read afterwards.
 */
#include "fuzz.h"
#include "ms_partition.h"

enum { CONTROL_BYTES = 8192, FILE_BYTES = 1 << 16, PRODUCERS = 16, ROUNDS = 16 };
enum { VALUE_BYTES = 1 << 16 };

static uint8_t value[VALUE_BYTES];
static uint64_t sum; /* so that reads are not left out */

/* A segment file, as it was before a call. */
typedef struct segment_file {
  uint8_t *bytes;
  uint8_t *before;
  ms_segment segment;
  bool valid;
  _Atomic uint32_t checked[8];
} segment_file;

static void mend(uint8_t *bytes, uint8_t flags) {
  ms_segment_header *header = (ms_segment_header *)(void *)bytes;
  ms_activation *record = (ms_activation *)(void *)(bytes + MS_SEGMENT_ACTIVATION_AT);
  if (flags & 1) {
    header->magic = MS_MAGIC_SEGMENT;
    header->version = MS_FORMAT_VERSION;
    header->size = FILE_BYTES;
    ms_segment_geometry(FILE_BYTES, &header->index_count, &header->data_position);
    header->checksum = ms_xxh3_64(header, offsetof(ms_segment_header, checksum), 0);
  }
  if (flags & 2 && record->number != 0)
    record->checksum =
        ms_xxh3_64((const uint8_t *)record + 8, sizeof(ms_activation) - 8, header->salt);
}

static void open_file(segment_file *file) {
  const ms_segment_header *header = (const ms_segment_header *)(void *)file->bytes;
  ms_identity same = {
      .stream_id = header->stream_id, .partition = header->partition, .number = header->number};
  memcpy(same.store_id, header->store_id, 16);
  file->valid = ms_segment_open(&file->segment, file->bytes, FILE_BYTES, true, &same, file->checked,
                                NULL) == MS_OK;
}

/* What a reader does with the marks of the block. */
static void read_to(ms_segment *segment, const ms_control_block *block, uint64_t limit) {
  ms_error err;
  ms_view view;
  ms_mark mark;
  ms_gather measured;
  uint64_t found, position = segment->base_position, skip_at = position;
  uint32_t skip = 0;
  for (int i = 0; i < 64; i++) {
    if (ms_segment_view(segment, position, limit, &view, &err) != MS_OK) break;
    sum += view.bytes[view.length - 1];
    position += view.length;
  }
  if (ms_segment_find_offset(segment, block->first_offset, limit, &found, &err) == MS_OK)
    sum += found;
  if (ms_segment_find_timestamp(segment, block->hint_timestamp, limit, &found, &err) == MS_OK)
    sum += found;
  if (ms_segment_measure_run(segment, &skip_at, &skip, limit, 100, 4096, &measured, &err) ==
          MS_OK &&
      measured.count > 0) {
    ms_view gathered;
    uint8_t *room = zeros(ms_gather_bytes(&measured));
    ms_gather_begin(&measured, room, &gathered);
    ms_segment_gather_run(segment, segment->base_position, 0, &measured, &gathered);
    free(room);
  }
  if (ms_segment_mark_at(segment, limit, &mark, &err) == MS_OK && mark.position != limit) abort();
}

/* Nothing before the tail was changed; `tail` as it was before the call. */
static void check_kept(const segment_file *file, const ms_segment *active, uint64_t tail) {
  const uint64_t data = file->segment.data_position;
  const uint64_t from = MS_SEGMENT_ACTIVATION_AT, to = MS_SEGMENT_COMPACTION_AT;
  if (memcmp(file->bytes, file->before, from) != 0) abort();
  if (memcmp(file->bytes + to, file->before + to, MS_SEGMENT_INDEX_AT - to) != 0) abort();
  if (active != &file->segment) return;
  const uint64_t base = active->base_position;
  const bool within = tail >= base && tail - base <= FILE_BYTES - data;
  const uint64_t end = within ? data + tail - base : FILE_BYTES;
  if (memcmp(file->bytes + data, file->before + data, end - data) != 0) abort();
}

static segment_file *named(segment_file files[2], uint64_t number) {
  for (int i = 0; i < 2; i++)
    if (files[i].valid && files[i].segment.number == number) return &files[i];
  return NULL;
}

static void recover(ms_partition *partition, segment_file files[2]) {
  segment_file *last = files[1].valid && files[1].segment.activated ? &files[1] : &files[0];
  ms_mark end = {0, 0, 0, INT64_MIN};
  uint32_t poison = MS_POISON_NONE;
  if (last->valid && last->segment.activated) {
    const ms_segment *found = &last->segment;
    end = (ms_mark){found->base_position, found->base_offset, found->predecessor_hash,
                    found->timestamp_max};
    if (ms_segment_walk(&last->segment, &end, UINT64_MAX, true, NULL) == MS_CORRUPT)
      poison = end.offset % 2 ? MS_POISON_CORRUPT : MS_POISON_NONE;
  }
  bool none = !last->valid || !last->segment.activated;
  ms_partition_recovered(partition->block, partition->generation, &end,
                         none ? 0 : last->segment.number, 1, 0, poison);
  partition->active = none ? NULL : &last->segment;
  partition->end_valid = false;
}

static void append(ms_partition *partition, segment_file files[2]) {
  static const int64_t sizes[] = {10, 3000, 0, 20000, 40000, VALUE_BYTES};
  ms_error err;
  for (int i = 0; i < ROUNDS; i++) {
    ms_slice values[] = {{value, sizes[i % 6]}, {value, 8}};
    ms_records records = {.count = 1 + (uint32_t)i % 2, .values = values, .called_us = i};
    ms_shape shape;
    ms_appended out = {0};
    uint32_t owner = 0;
    if (ms_batch_measure(&records, &shape, &err) != MS_OK) abort();
    for (int file = 0; file < 2; file++) memcpy(files[file].before, files[file].bytes, FILE_BYTES);
    const ms_segment *active = partition->active;
    uint64_t tail = partition->block->tail, offset = partition->end.offset;
    records.first_sequence = offset;
    ms_status status =
        ms_partition_try_append(partition, &records, &shape, i % 3 == 2, offset, &out, &err);
    if (status == MS_BUSY) status = ms_partition_take_over(partition, out.owner, &owner);
    for (int file = 0; file < 2; file++)
      if (files[file].valid) check_kept(&files[file], active, tail);
    if (status == MS_MOVED) {
      segment_file *found = named(files, partition->block->active);
      partition->active = found != NULL ? &found->segment : NULL;
      partition->end_valid = false;
      if (found == NULL && partition->block->active != 0) return;
    } else if (status == MS_WALK) {
      recover(partition, files);
    } else if (status == MS_ROLL) {
      if (!files[1].valid || active == &files[1].segment) return;
      partition->next = &files[1].segment;
    } else if (status == MS_BEHIND) {
      partition->producers = NULL;
      return;
    } else if (status == MS_OK && out.end != 0) {
      ms_view view;
      if (ms_segment_view(partition->active, tail, out.end, &view, &err) != MS_OK ||
          view.count != records.count || view.base_offset != out.first_offset)
        abort();
    } else if (status < MS_OK) {
      return;
    }
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  uint8_t flags = *data++;
  size--;
  uint8_t *bytes = zeros(CONTROL_BYTES + 2 * FILE_BYTES);
  while (piece(bytes, CONTROL_BYTES + 2 * FILE_BYTES, &data, &size)) {}
  ms_control_header *header = (ms_control_header *)(void *)bytes;
  ms_control_block *block = (ms_control_block *)(void *)(bytes + MS_CONTROL_BLOCKS_AT);
  if (header->generation == 0) header->generation = 1; /* it is the store's */
  if (flags & 4) {
    header->state = MS_CONTROL_LIVE;
    block->poison = MS_POISON_NONE;
    block->walked = header->generation;
  }
  if (flags & 8) block->append = block->sync = MS_OWNER_FREE;
  segment_file files[2] = {{0}};
  for (int i = 0; i < 2; i++) {
    files[i].bytes = bytes + CONTROL_BYTES + i * FILE_BYTES;
    files[i].before = zeros(FILE_BYTES);
    mend(files[i].bytes, flags);
    open_file(&files[i]);
  }
  ms_producer_entry known[PRODUCERS] = {{0, 0}};
  ms_producers producers = {known, PRODUCERS, block->durable};
  segment_file *active = named(files, block->active);
  ms_partition partition = {.header = header,
                            .block = block,
                            .generation = header->generation,
                            .self = 1u | 7u << 15,
                            .late_us = 1,
                            .active = active != NULL ? &active->segment : NULL,
                            .ready_low = 4096,
                            .unsynced_max = 4096,
                            .producers = &producers};
  if (files[1].valid && active != &files[1]) partition.next = &files[1].segment;
  for (int i = 0; i < 2; i++) {
    if (!files[i].valid || !files[i].segment.activated) continue;
    read_to(&files[i].segment, block, block->tail);
    read_to(&files[i].segment, block, block->durable);
  }
  append(&partition, files);
  ms_mark end;
  bool lead = false;
  if (ms_partition_try_end(block, &end) == MS_OK) {
    ms_partition_begin_sync(block, end.position);
    ms_partition_set_durable(block, &end);
    ms_partition_end_sync(block);
    if (ms_partition_lead_or_wait(block, partition.self, end.position, 0, &lead) == MS_OK) sum++;
    if (lead) ms_owner_release(&block->sync);
  }
  recover(&partition, files);
  append(&partition, files);
  for (int i = 0; i < 2; i++) free(files[i].before);
  free(bytes);
  return 0;
}
