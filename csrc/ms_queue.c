/* The maps of a queue: how large each is, and where its parts begin.
 *
 * Numbers that come from a file are checked here, once: whoever uses the pointers after
 * ms_queue_attach() stays within the maps. Does no waiting, no file, no policy.
 */
#include "ms_queue.h"

static uint64_t up_to(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit * unit; }

uint64_t ms_slots_size(uint32_t slot_bytes, uint32_t slot_count) {
  uint64_t extents = up_to(slot_count, MS_QUEUE_EXTENT_SLOTS);
  return MS_QUEUE_EXTENTS_AT + extents * (8u + slot_bytes + 2u * sizeof(ms_failure));
}

uint64_t ms_blocks_size(uint32_t block_count) {
  uint64_t blocks = up_to(block_count, MS_QUEUE_EXTENT_BLOCKS);
  return MS_QUEUE_EXTENTS_AT + blocks * (8u + MS_QUEUE_BLOCK_BYTES);
}

static uint32_t cell_bits_for(uint32_t slot_max) {
  uint32_t bits = 6;
  while ((UINT64_C(1) << bits) < 2 * (uint64_t)slot_max) bits++;
  return bits;
}

/* Each region begins at a page. */
typedef struct hints_layout {
  uint64_t participants, owners, wheel, nodes, rings, links, buckets, size;
} hints_layout;

static hints_layout hints_layout_of(uint32_t slot_max, uint32_t lanes, bool ordered) {
  hints_layout at = {0};
  uint64_t cells = UINT64_C(8) << cell_bits_for(slot_max);
  at.participants = MS_PAGE_BYTES;
  at.owners = at.participants + 4u * MS_MEMBER_COUNT_MAX;
  at.wheel = at.owners + up_to(8u * (uint64_t)slot_max, MS_PAGE_BYTES);
  at.nodes = at.wheel + up_to(sizeof(ms_wheel_state), MS_PAGE_BYTES);
  at.rings = at.nodes + up_to(sizeof(ms_wheel_node) * (uint64_t)slot_max, MS_PAGE_BYTES);
  at.links = at.rings + lanes * up_to(cells, MS_PAGE_BYTES);
  at.buckets = at.links + (ordered ? up_to(4u * (uint64_t)slot_max, MS_PAGE_BYTES) : 0);
  at.size = at.buckets + (ordered ? sizeof(ms_bucket) * (uint64_t)MS_QUEUE_BUCKETS : 0);
  return at;
}

uint64_t ms_hints_size(uint32_t slot_max, uint32_t lanes, bool ordered) {
  return hints_layout_of(slot_max, lanes, ordered).size;
}

ms_status ms_queue_attach(ms_queue *queue, uint64_t slots_size, uint64_t blocks_size,
                          uint64_t hints_size, ms_error *err) {
  ms_hints_header *hints = queue->hints;
  bool ordered = hints && hints->ordered;
  if (queue->slot_bytes < 128 || queue->slot_bytes % 64 || queue->slot_max == 0 ||
      queue->slot_max >= 1u << 24 || queue->lanes == 0 || queue->lanes > MS_QUEUE_LANES_MAX)
    return ms_fail(err, MS_INVALID, 0, 0, queue->slot_max, "slots: impossible sizes");
  if (slots_size < ms_slots_size(queue->slot_bytes, queue->slot_max))
    return ms_fail(err, MS_CORRUPT, 0, ms_slots_size(queue->slot_bytes, queue->slot_max),
                   slots_size, "slots: shorter than it was made");
  if (queue->blocks && blocks_size < ms_blocks_size(queue->block_max))
    return ms_fail(err, MS_CORRUPT, 0, ms_blocks_size(queue->block_max), blocks_size,
                   "blocks: shorter than it was made");
  queue->cursor = queue->region = queue->region_taken = queue->block_cursor = 0;
  queue->offset_at = 0;
  if (!hints) return MS_OK;
  hints_layout at = hints_layout_of(queue->slot_max, queue->lanes, ordered);
  if (hints->slot_max != queue->slot_max || hints->lanes != queue->lanes || hints_size < at.size ||
      hints->cell_bits != cell_bits_for(queue->slot_max))
    return ms_fail(err, MS_CORRUPT, 0, at.size, hints_size, "hints: not those of these slots");
  uint8_t *base = (uint8_t *)hints;
  queue->participants = (_Atomic uint32_t *)(void *)(base + at.participants);
  queue->owners = (_Atomic uint64_t *)(void *)(base + at.owners);
  queue->wheel = (ms_wheel){(ms_wheel_state *)(void *)(base + at.wheel),
                            (ms_wheel_node *)(void *)(base + at.nodes), queue->slot_max};
  uint64_t cells = UINT64_C(8) << hints->cell_bits;
  for (uint32_t i = 0; i < queue->lanes; i++)
    queue->rings[i] =
        (ms_ring){&hints->lane[i],
                  (_Atomic uint64_t *)(void *)(base + at.rings + i * up_to(cells, MS_PAGE_BYTES)),
                  hints->cell_bits};
  queue->links = ordered ? (uint32_t *)(void *)(base + at.links) : NULL;
  queue->buckets = ordered ? (ms_bucket *)(void *)(base + at.buckets) : NULL;
  /* Processes begin at different extents, so that they do not meet in one cache line. */
  if (queue->self) queue->region = ms_owner_index(queue->self);
  return MS_OK;
}
