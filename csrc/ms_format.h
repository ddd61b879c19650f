/* Every struct that lies in a file. The meaning of each byte is in docs/format.md, and only there;
 * a test compares its tables with ms_format_fields(). Fields that several processes change are
 * atomic here: the mapped file is the shared memory.
 */
#ifndef MS_FORMAT_H
#define MS_FORMAT_H

#include "ms_platform.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the formats are little-endian and the core does not swap"
#endif

#define MS_FORMAT_VERSION 1u

/* Eight ASCII characters as they lie in the file. */
#define MS_MAGIC(a, b, c, d, e, f, g, h)                                            \
  ((uint64_t)(a) | (uint64_t)(b) << 8 | (uint64_t)(c) << 16 | (uint64_t)(d) << 24 | \
   (uint64_t)(e) << 32 | (uint64_t)(f) << 40 | (uint64_t)(g) << 48 | (uint64_t)(h) << 56)
#define MS_MAGIC_SEGMENT MS_MAGIC('M', 'S', 'S', 'E', 'G', 'M', 'T', '1')
#define MS_MAGIC_GROUP MS_MAGIC('M', 'S', 'G', 'R', 'O', 'U', 'P', '1')

#define MS_MEMBER_COUNT_MAX 1024u

#define MS_SEGMENT_ACTIVATION_AT 4096u
#define MS_SEGMENT_COMPACTION_AT 4224u
#define MS_SEGMENT_INDEX_AT 8192u
#define MS_INDEX_BLOCK_BYTES 32768u

#define MS_CONTROL_BLOCKS_AT 4096u

#define MS_VALUE_BYTES_MAX (256u << 20)
#define MS_KEY_BYTES_MAX (64u << 10)
#define MS_HEADER_COUNT_MAX 1024u
#define MS_HEADER_NAME_BYTES_MAX 255u
#define MS_HEADER_VALUE_BYTES_MAX (1u << 20)
#define MS_BATCH_BYTES_MAX (1u << 30)
/* No log comes that far: a field that says so is damaged, and sums of lesser ones cannot wrap. */
#define MS_POSITION_MAX (UINT64_MAX / 4)
#define MS_OFFSET_MAX ((uint64_t)INT64_MAX / 2)

enum {
  MS_BATCH_TIMESTAMPS = 1 << 0,
  MS_BATCH_OFFSETS = 1 << 1,
  MS_BATCH_KEYS = 1 << 2,
  MS_BATCH_KEY_NULLS = 1 << 3,
  MS_BATCH_VALUE_NULLS = 1 << 4,
  MS_BATCH_HEADERS = 1 << 5,
  MS_BATCH_FIXED = 1 << 6,
  MS_BATCH_ALIGN64 = 1 << 7,
  MS_BATCH_FILLER = 1 << 8,
  MS_BATCH_FLAGS_KNOWN = (1 << 9) - 1
};

enum {
  MS_CONTROL_LIVE = 1,
  MS_CONTROL_DROPPED = 2,
  MS_CONTROL_REPLACED = 3,
  MS_CONTROL_OUTGROWN = 4 /* of hints: larger ones come in their place, while in use */
};
enum { MS_POISON_NONE = 0, MS_POISON_SYNC = 1, MS_POISON_CORRUPT = 2 };

typedef struct ms_members_header {
  uint64_t magic;
  uint32_t version;
  uint32_t count;
  uint8_t store_id[16];
  int64_t time;
  int64_t wall;
  uint64_t check;
  uint64_t reserved;
} ms_members_header;

typedef struct ms_member {
  _Atomic uint32_t incarnation;
  uint32_t pid;
  int64_t claimed;
  uint64_t pid_namespace;
  uint8_t reserved[40];
} ms_member;

typedef struct ms_control_header {
  uint64_t magic;
  uint32_t version;
  _Atomic uint32_t partitions;
  uint8_t store_id[16];
  uint64_t stream_id;
  uint64_t generation;
  _Atomic uint32_t state;
  _Atomic uint32_t config;
  uint64_t checksum;
  _Atomic uint32_t wake;
  _Atomic uint32_t waiters;
} ms_control_header;

typedef struct ms_control_block {
  _Atomic uint32_t append;
  _Atomic uint32_t poison;
  _Atomic uint64_t tail;
  _Atomic uint64_t hint_tail;
  _Atomic uint64_t hint_offset;
  _Atomic int64_t hint_timestamp;
  _Atomic uint64_t hint_hash;
  _Atomic uint64_t active;
  uint64_t reserved0;

  _Atomic uint32_t sync;
  _Atomic uint32_t durable_hash;
  _Atomic uint64_t durable;
  _Atomic uint64_t durable_offset;
  _Atomic uint32_t durable_wake;
  _Atomic uint32_t durable_waiters;
  _Atomic uint64_t sync_target;
  _Atomic int64_t unsynced_at;
  uint64_t reserved1[2];

  _Atomic uint32_t maintenance;
  _Atomic uint32_t walk;
  _Atomic uint64_t walked;
  _Atomic uint64_t first_segment;
  _Atomic uint64_t first_offset;
  _Atomic uint32_t structure;
  _Atomic uint32_t compact;
  _Atomic uint32_t compacted;
  uint32_t reserved2;
  _Atomic uint64_t synced_to;
  _Atomic uint64_t synced_offset;
  uint64_t reserved3[8];
} ms_control_block;

typedef struct ms_segment_header {
  uint64_t magic;
  uint32_t version;
  uint32_t partition;
  uint8_t store_id[16];
  uint64_t stream_id;
  uint64_t number;
  uint64_t salt;
  uint64_t size;
  uint32_t index_count;
  uint32_t data_position;
  int64_t created;
  uint64_t checksum;
} ms_segment_header;

typedef struct ms_activation {
  _Atomic uint64_t checksum;
  uint64_t number;
  uint64_t base_offset;
  uint64_t base_position;
  uint64_t epoch;
  uint64_t predecessor;
  uint64_t predecessor_hash;
  int64_t activated;
  int64_t timestamp_max;
} ms_activation;

typedef struct ms_compaction {
  _Atomic uint64_t checksum;
  int64_t first;
  int64_t last;
  uint64_t kept_bytes;
  uint64_t records;
  uint64_t tombstones;
  uint64_t tombstones_end;
  uint64_t reserved;
} ms_compaction;

typedef struct ms_index_entry {
  uint32_t offset;
  uint32_t position;
  int64_t timestamp_max;
} ms_index_entry;

typedef struct ms_batch_header {
  uint64_t hash;
  uint32_t length;
  uint16_t format;
  uint16_t flags;
  uint64_t base_offset;
  uint32_t count;
  uint32_t chain;
  int64_t timestamp_min;
  int64_t timestamp_max;
  uint32_t producer;
  uint32_t synced_distance;
  uint64_t sequence;
} ms_batch_header;

/* --- queues --- */

enum { MS_QUEUE_EXTENT_SLOTS = 1024, MS_QUEUE_EXTENT_BLOCKS = 512 };
#define MS_QUEUE_EXTENTS_AT 4096u
#define MS_QUEUE_BLOCK_BYTES 4096u
#define MS_QUEUE_LANES_MAX 8u
#define MS_QUEUE_FAILURE_TEXT 108u
#define MS_QUEUE_BUCKETS 65536u
#define MS_DEDUP_STRIPE_ENTRIES 64u

typedef struct ms_slots_header {
  uint64_t magic;
  uint32_t version;
  uint32_t slot_bytes;
  uint8_t store_id[16];
  uint64_t queue_id;
  uint64_t salt;
  uint64_t checksum;
  uint64_t reserved0[9];
  _Atomic uint32_t slot_count;
  _Atomic uint32_t paused;
  _Atomic uint32_t poison;
  _Atomic uint32_t config;
  _Atomic int64_t time_of_boot;
  uint64_t reserved3[5];
  _Atomic uint64_t next_id;
  uint64_t reserved2[7];
  /* Totals since the queue was made. A line of their own: put, get and ack do not touch it. */
  _Atomic uint64_t counted_from;
  _Atomic uint64_t withdrawn;
  _Atomic uint64_t expired;
  _Atomic uint64_t evicted;
  _Atomic uint64_t cancelled;
  _Atomic uint64_t failed;
  _Atomic uint64_t redelivered;
  _Atomic uint64_t corrupt;
  _Atomic uint64_t refused;
  uint64_t reserved4[7];
} ms_slots_header;

#define MS_SLOT_ABSOLUTE 0x8000u /* of lane: `due` is a time of the wall clock */

typedef struct ms_slot {
  uint64_t hash;
  _Atomic uint64_t id; /* also read without a lease */
  _Atomic int64_t put_at;
  _Atomic int64_t due;
  _Atomic int64_t expires;
  _Atomic uint64_t key_hash;
  _Atomic uint64_t dedup[2];
  uint32_t payload_length;
  uint32_t key_length;
  uint32_t headers_length;
  uint32_t first_block;
  uint64_t content_hash;
  uint32_t slot;
  uint16_t reuse;
  _Atomic uint16_t lane;
} ms_slot;

typedef struct ms_failure {
  uint64_t hash;
  uint64_t id;
  int64_t first_at;
  int64_t last_at;
  uint16_t attempts;
  uint8_t kind;
  uint8_t first_length;
  uint8_t last_length;
  uint8_t reserved[3];
  uint8_t first[MS_QUEUE_FAILURE_TEXT];
  uint8_t last[MS_QUEUE_FAILURE_TEXT];
} ms_failure;

typedef struct ms_blocks_header {
  uint64_t magic;
  uint32_t version;
  uint32_t block_max;
  uint8_t store_id[16];
  uint64_t queue_id;
  uint64_t checksum;
  uint64_t reserved0[10];
  _Atomic uint32_t block_count;
  uint32_t reserved1[15];
} ms_blocks_header;

typedef struct ms_lane_hints {
  _Atomic uint64_t head;
  uint64_t reserved0[7];
  _Atomic uint64_t tail;
  uint64_t reserved1[7];
} ms_lane_hints;

typedef struct ms_hints_header {
  uint64_t magic;
  uint32_t version;
  uint32_t slot_max;
  uint8_t store_id[16];
  uint64_t queue_id;
  uint32_t lanes;
  uint32_t cell_bits;
  uint32_t ordered;
  _Atomic uint32_t state;
  uint8_t reserved0[8];

  _Atomic uint32_t wake;
  _Atomic uint32_t waiters;
  uint64_t reserved1[7];
  _Atomic uint32_t room;
  _Atomic uint32_t room_waiters;
  uint64_t reserved2[7];
  _Atomic uint32_t finished;
  _Atomic uint32_t finished_waiters;
  uint64_t reserved3[7];
  _Atomic uint64_t watched;
  _Atomic uint64_t lease_due;
  _Atomic uint64_t noted;
  _Atomic uint32_t suspect;
  _Atomic uint32_t missed;
  _Atomic uint64_t swept;
  _Atomic uint64_t expiry_due;
  _Atomic uint32_t undecided;
  _Atomic uint32_t absolute;
  _Atomic int64_t wall_offset;
  _Atomic uint32_t sync;
  _Atomic uint32_t sync_wake;
  _Atomic uint64_t sync_begun;
  _Atomic uint64_t sync_ended;
  _Atomic uint64_t written;
  _Atomic int64_t unsynced_at;
  uint64_t reserved5[3];
  _Atomic uint32_t wheel;
  _Atomic uint32_t maintenance;
  _Atomic uint64_t wheel_due;
  uint64_t reserved6[6];
  _Atomic uint64_t gets;
  uint64_t reserved7[15];
  _Atomic uint64_t noted_tail[MS_QUEUE_LANES_MAX];
  ms_lane_hints lane[MS_QUEUE_LANES_MAX];
} ms_hints_header;

typedef struct ms_wheel_node {
  uint32_t next;
  uint32_t previous;
  uint32_t bucket;
  uint32_t reuse;
  uint64_t due;
} ms_wheel_node;

enum { MS_WHEEL_LEVELS = 6, MS_WHEEL_BUCKETS = 64 };
typedef struct ms_wheel_state {
  uint64_t now;
  uint64_t count;
  uint64_t occupied[MS_WHEEL_LEVELS];
  uint32_t heads[MS_WHEEL_LEVELS * MS_WHEEL_BUCKETS];
} ms_wheel_state;

typedef struct ms_bucket {
  _Atomic uint32_t word;
  uint32_t head;
  uint32_t tail;
  uint32_t length;
} ms_bucket;

typedef struct ms_dedup_header {
  uint64_t magic;
  uint32_t version;
  uint32_t stripes;
  uint8_t store_id[16];
  uint64_t queue_id;
  uint64_t checksum;
  _Atomic uint32_t state;
  uint32_t reserved[3];
} ms_dedup_header;

typedef struct ms_dedup_entry {
  uint64_t key[2];
  uint64_t id;
  int64_t expires;
  uint32_t check;
  uint32_t place; /* slot << 2 | state */
} ms_dedup_entry;

#define MS_GROUP_MEMBERS 256u
#define MS_GROUP_MEMBERS_AT 4096u
#define MS_GROUP_PARTITIONS_AT (MS_GROUP_MEMBERS_AT + 64u * MS_GROUP_MEMBERS)

typedef struct ms_group_header {
  uint64_t magic;
  uint32_t version;
  uint32_t members;
  uint8_t store_id[16];
  uint64_t stream_id;
  uint64_t group_id;
  uint64_t salt;
  uint64_t checksum;
  _Atomic uint32_t state;
  _Atomic uint32_t poison;
  _Atomic uint64_t generation;
  _Atomic uint32_t partitions;
  _Atomic uint32_t changes;
  _Atomic uint64_t watched;
  uint64_t reserved0[4];

  _Atomic uint32_t word;
  uint32_t reserved1[15];

  _Atomic uint32_t sync;
  uint32_t reserved2;
  _Atomic uint64_t sync_begun;
  _Atomic uint64_t sync_ended;
} ms_group_header;

typedef struct ms_group_member {
  _Atomic uint32_t process;
  _Atomic uint32_t number;
  _Atomic uint64_t session;
  _Atomic uint64_t processing;
  _Atomic int64_t joined;
  uint64_t reserved[4];
} ms_group_member;

typedef struct ms_group_copy {
  _Atomic uint64_t checksum;
  _Atomic uint64_t sequence;
  _Atomic uint64_t epoch;
  _Atomic uint64_t offset;
  _Atomic uint64_t transaction;
  uint64_t reserved[3];
} ms_group_copy;

typedef struct ms_group_partition {
  _Atomic uint64_t holder;
  _Atomic uint32_t heir;
  uint32_t reserved0;
  _Atomic uint64_t pending;
  _Atomic uint64_t pending_epoch;
  _Atomic uint64_t pending_offset;
  _Atomic uint64_t pending_fence;
  uint64_t reserved1[2];
  ms_group_copy copies[2];
} ms_group_partition;

#define MS_FORMAT_GROUP_FIELDS(XX)           \
  XX(ms_group_header, magic, 0)              \
  XX(ms_group_header, version, 8)            \
  XX(ms_group_header, members, 12)           \
  XX(ms_group_header, store_id, 16)          \
  XX(ms_group_header, stream_id, 32)         \
  XX(ms_group_header, group_id, 40)          \
  XX(ms_group_header, salt, 48)              \
  XX(ms_group_header, checksum, 56)          \
  XX(ms_group_header, state, 64)             \
  XX(ms_group_header, poison, 68)            \
  XX(ms_group_header, generation, 72)        \
  XX(ms_group_header, partitions, 80)        \
  XX(ms_group_header, changes, 84)           \
  XX(ms_group_header, watched, 88)           \
  XX(ms_group_header, word, 128)             \
  XX(ms_group_header, sync, 192)             \
  XX(ms_group_header, sync_begun, 200)       \
  XX(ms_group_header, sync_ended, 208)       \
  XX(ms_group_member, process, 0)            \
  XX(ms_group_member, number, 4)             \
  XX(ms_group_member, session, 8)            \
  XX(ms_group_member, processing, 16)        \
  XX(ms_group_member, joined, 24)            \
  XX(ms_group_partition, holder, 0)          \
  XX(ms_group_partition, heir, 8)            \
  XX(ms_group_partition, pending, 16)        \
  XX(ms_group_partition, pending_epoch, 24)  \
  XX(ms_group_partition, pending_offset, 32) \
  XX(ms_group_partition, pending_fence, 40)  \
  XX(ms_group_partition, copies, 64)         \
  XX(ms_group_copy, checksum, 0)             \
  XX(ms_group_copy, sequence, 8)             \
  XX(ms_group_copy, epoch, 16)               \
  XX(ms_group_copy, offset, 24)              \
  XX(ms_group_copy, transaction, 32)

/* One row a field: struct, field, offset. The asserts below and the test of docs/format.md read
 * it. */
#define MS_FORMAT_FIELDS(XX)                 \
  XX(ms_members_header, magic, 0)            \
  XX(ms_members_header, version, 8)          \
  XX(ms_members_header, count, 12)           \
  XX(ms_members_header, store_id, 16)        \
  XX(ms_members_header, time, 32)            \
  XX(ms_members_header, wall, 40)            \
  XX(ms_members_header, check, 48)           \
  XX(ms_member, incarnation, 0)              \
  XX(ms_member, pid, 4)                      \
  XX(ms_member, claimed, 8)                  \
  XX(ms_member, pid_namespace, 16)           \
  XX(ms_control_header, magic, 0)            \
  XX(ms_control_header, version, 8)          \
  XX(ms_control_header, partitions, 12)      \
  XX(ms_control_header, store_id, 16)        \
  XX(ms_control_header, stream_id, 32)       \
  XX(ms_control_header, generation, 40)      \
  XX(ms_control_header, state, 48)           \
  XX(ms_control_header, config, 52)          \
  XX(ms_control_header, checksum, 56)        \
  XX(ms_control_header, wake, 64)            \
  XX(ms_control_header, waiters, 68)         \
  XX(ms_control_block, append, 0)            \
  XX(ms_control_block, poison, 4)            \
  XX(ms_control_block, tail, 8)              \
  XX(ms_control_block, hint_tail, 16)        \
  XX(ms_control_block, hint_offset, 24)      \
  XX(ms_control_block, hint_timestamp, 32)   \
  XX(ms_control_block, hint_hash, 40)        \
  XX(ms_control_block, active, 48)           \
  XX(ms_control_block, sync, 64)             \
  XX(ms_control_block, durable_hash, 68)     \
  XX(ms_control_block, durable, 72)          \
  XX(ms_control_block, durable_offset, 80)   \
  XX(ms_control_block, durable_wake, 88)     \
  XX(ms_control_block, durable_waiters, 92)  \
  XX(ms_control_block, sync_target, 96)      \
  XX(ms_control_block, unsynced_at, 104)     \
  XX(ms_control_block, maintenance, 128)     \
  XX(ms_control_block, walk, 132)            \
  XX(ms_control_block, walked, 136)          \
  XX(ms_control_block, first_segment, 144)   \
  XX(ms_control_block, first_offset, 152)    \
  XX(ms_control_block, structure, 160)       \
  XX(ms_control_block, compact, 164)         \
  XX(ms_control_block, compacted, 168)       \
  XX(ms_control_block, synced_to, 176)       \
  XX(ms_control_block, synced_offset, 184)   \
  XX(ms_segment_header, magic, 0)            \
  XX(ms_segment_header, version, 8)          \
  XX(ms_segment_header, partition, 12)       \
  XX(ms_segment_header, store_id, 16)        \
  XX(ms_segment_header, stream_id, 32)       \
  XX(ms_segment_header, number, 40)          \
  XX(ms_segment_header, salt, 48)            \
  XX(ms_segment_header, size, 56)            \
  XX(ms_segment_header, index_count, 64)     \
  XX(ms_segment_header, data_position, 68)   \
  XX(ms_segment_header, created, 72)         \
  XX(ms_segment_header, checksum, 80)        \
  XX(ms_activation, checksum, 0)             \
  XX(ms_activation, number, 8)               \
  XX(ms_activation, base_offset, 16)         \
  XX(ms_activation, base_position, 24)       \
  XX(ms_activation, epoch, 32)               \
  XX(ms_activation, predecessor, 40)         \
  XX(ms_activation, predecessor_hash, 48)    \
  XX(ms_activation, activated, 56)           \
  XX(ms_activation, timestamp_max, 64)       \
  XX(ms_compaction, checksum, 0)             \
  XX(ms_compaction, first, 8)                \
  XX(ms_compaction, last, 16)                \
  XX(ms_compaction, kept_bytes, 24)          \
  XX(ms_compaction, records, 32)             \
  XX(ms_compaction, tombstones, 40)          \
  XX(ms_compaction, tombstones_end, 48)      \
  XX(ms_index_entry, offset, 0)              \
  XX(ms_index_entry, position, 4)            \
  XX(ms_index_entry, timestamp_max, 8)       \
  XX(ms_batch_header, hash, 0)               \
  XX(ms_batch_header, length, 8)             \
  XX(ms_batch_header, format, 12)            \
  XX(ms_batch_header, flags, 14)             \
  XX(ms_batch_header, base_offset, 16)       \
  XX(ms_batch_header, count, 24)             \
  XX(ms_batch_header, chain, 28)             \
  XX(ms_batch_header, timestamp_min, 32)     \
  XX(ms_batch_header, timestamp_max, 40)     \
  XX(ms_batch_header, producer, 48)          \
  XX(ms_batch_header, synced_distance, 52)   \
  XX(ms_batch_header, sequence, 56)          \
  XX(ms_slots_header, magic, 0)              \
  XX(ms_slots_header, version, 8)            \
  XX(ms_slots_header, slot_bytes, 12)        \
  XX(ms_slots_header, store_id, 16)          \
  XX(ms_slots_header, queue_id, 32)          \
  XX(ms_slots_header, salt, 40)              \
  XX(ms_slots_header, checksum, 48)          \
  XX(ms_slots_header, slot_count, 128)       \
  XX(ms_slots_header, paused, 132)           \
  XX(ms_slots_header, poison, 136)           \
  XX(ms_slots_header, config, 140)           \
  XX(ms_slots_header, time_of_boot, 144)     \
  XX(ms_slots_header, next_id, 192)          \
  XX(ms_slots_header, counted_from, 256)     \
  XX(ms_slots_header, withdrawn, 264)        \
  XX(ms_slots_header, expired, 272)          \
  XX(ms_slots_header, evicted, 280)          \
  XX(ms_slots_header, cancelled, 288)        \
  XX(ms_slots_header, failed, 296)           \
  XX(ms_slots_header, redelivered, 304)      \
  XX(ms_slots_header, corrupt, 312)          \
  XX(ms_slots_header, refused, 320)          \
  XX(ms_slot, hash, 0)                       \
  XX(ms_slot, id, 8)                         \
  XX(ms_slot, put_at, 16)                    \
  XX(ms_slot, due, 24)                       \
  XX(ms_slot, expires, 32)                   \
  XX(ms_slot, key_hash, 40)                  \
  XX(ms_slot, dedup, 48)                     \
  XX(ms_slot, payload_length, 64)            \
  XX(ms_slot, key_length, 68)                \
  XX(ms_slot, headers_length, 72)            \
  XX(ms_slot, first_block, 76)               \
  XX(ms_slot, content_hash, 80)              \
  XX(ms_slot, slot, 88)                      \
  XX(ms_slot, reuse, 92)                     \
  XX(ms_slot, lane, 94)                      \
  XX(ms_failure, hash, 0)                    \
  XX(ms_failure, id, 8)                      \
  XX(ms_failure, first_at, 16)               \
  XX(ms_failure, last_at, 24)                \
  XX(ms_failure, attempts, 32)               \
  XX(ms_failure, kind, 34)                   \
  XX(ms_failure, first_length, 35)           \
  XX(ms_failure, last_length, 36)            \
  XX(ms_failure, first, 40)                  \
  XX(ms_failure, last, 148)                  \
  XX(ms_blocks_header, magic, 0)             \
  XX(ms_blocks_header, version, 8)           \
  XX(ms_blocks_header, block_max, 12)        \
  XX(ms_blocks_header, store_id, 16)         \
  XX(ms_blocks_header, queue_id, 32)         \
  XX(ms_blocks_header, checksum, 40)         \
  XX(ms_blocks_header, block_count, 128)     \
  XX(ms_hints_header, magic, 0)              \
  XX(ms_hints_header, version, 8)            \
  XX(ms_hints_header, slot_max, 12)          \
  XX(ms_hints_header, store_id, 16)          \
  XX(ms_hints_header, queue_id, 32)          \
  XX(ms_hints_header, lanes, 40)             \
  XX(ms_hints_header, cell_bits, 44)         \
  XX(ms_hints_header, ordered, 48)           \
  XX(ms_hints_header, state, 52)             \
  XX(ms_hints_header, wake, 64)              \
  XX(ms_hints_header, waiters, 68)           \
  XX(ms_hints_header, room, 128)             \
  XX(ms_hints_header, room_waiters, 132)     \
  XX(ms_hints_header, finished, 192)         \
  XX(ms_hints_header, finished_waiters, 196) \
  XX(ms_hints_header, watched, 256)          \
  XX(ms_hints_header, lease_due, 264)        \
  XX(ms_hints_header, noted, 272)            \
  XX(ms_hints_header, suspect, 280)          \
  XX(ms_hints_header, missed, 284)           \
  XX(ms_hints_header, swept, 288)            \
  XX(ms_hints_header, expiry_due, 296)       \
  XX(ms_hints_header, undecided, 304)        \
  XX(ms_hints_header, absolute, 308)         \
  XX(ms_hints_header, wall_offset, 312)      \
  XX(ms_hints_header, sync, 320)             \
  XX(ms_hints_header, sync_wake, 324)        \
  XX(ms_hints_header, sync_begun, 328)       \
  XX(ms_hints_header, sync_ended, 336)       \
  XX(ms_hints_header, written, 344)          \
  XX(ms_hints_header, unsynced_at, 352)      \
  XX(ms_hints_header, wheel, 384)            \
  XX(ms_hints_header, maintenance, 388)      \
  XX(ms_hints_header, wheel_due, 392)        \
  XX(ms_hints_header, gets, 448)             \
  XX(ms_hints_header, noted_tail, 576)       \
  XX(ms_hints_header, lane, 640)             \
  MS_FORMAT_GROUP_FIELDS(XX)

#define MS_ASSERT_OFFSET(type, field, at) \
  _Static_assert(offsetof(type, field) == (at), #type "." #field);
MS_FORMAT_FIELDS(MS_ASSERT_OFFSET)
#undef MS_ASSERT_OFFSET

_Static_assert(sizeof(ms_members_header) == 64, "members header");
_Static_assert(sizeof(ms_member) == 64, "member");
_Static_assert(sizeof(ms_control_header) == 72, "control header");
_Static_assert(sizeof(ms_control_block) == 256, "control block: cache lines apart");
_Static_assert(sizeof(ms_segment_header) == 88, "segment header");
_Static_assert(sizeof(ms_activation) == 72, "activation record");
_Static_assert(sizeof(ms_compaction) == 64, "compaction record");
_Static_assert(sizeof(ms_index_entry) == 16, "index entry");
_Static_assert(sizeof(ms_batch_header) == 64, "batch header");
_Static_assert(sizeof(ms_slots_header) == 384, "slots header: within its page");
_Static_assert(sizeof(ms_slot) == 96, "slot header");
_Static_assert(sizeof(ms_failure) == 256, "failure record");
_Static_assert(sizeof(ms_blocks_header) == 192, "blocks header");
_Static_assert(sizeof(ms_hints_header) == 1664, "hints header: within its page");
_Static_assert(sizeof(ms_lane_hints) == 128, "head and tail: cache lines apart");
_Static_assert(sizeof(ms_wheel_node) == 24, "wheel node");
_Static_assert(sizeof(ms_dedup_header) == 64, "dedup header");
_Static_assert(sizeof(ms_dedup_entry) == 40, "dedup entry");
_Static_assert(sizeof(ms_group_header) == 216, "group header: within its page");
_Static_assert(sizeof(ms_group_member) == 64, "group member");
_Static_assert(sizeof(ms_group_copy) == 64, "copy of a position: within a sector");
_Static_assert(sizeof(ms_group_partition) == 192, "partition of a group");

typedef struct ms_format_field {
  const char *type;
  const char *field;
  uint32_t offset;
  uint32_t size;
} ms_format_field;

/* The compiled fields, ended by a row whose type is NULL. Static memory, any thread. */
const ms_format_field *ms_format_fields(void);

#endif
