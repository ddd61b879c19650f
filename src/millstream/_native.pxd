# What the binding sees of the C core. The contracts are in the headers.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t

cdef extern from "<stdbool.h>" nogil:
    ctypedef bint cbool "bool"

cdef extern from "ms_platform.h" nogil:
    int64_t ms_clock_wall_us()
    int64_t ms_clock_coarse_us()
    int64_t ms_clock_monotonic_ns()
    int64_t ms_clock_boot_ns()
    int ms_futex_wait(const void *word, uint32_t expected, int64_t timeout_ns)
    void ms_rest(int64_t rest_ns)
    int32_t ms_futex_wake(const void *word, int32_t count)
    int ms_futex_wait_class(const void *word, uint32_t expected, uint32_t bits, int64_t timeout_ns)
    int ms_pages_populate(void *start, size_t size, bint writable)
    enum:
        MS_FILL_BYTES
    int ms_file_fill(int descriptor, uint64_t position, uint64_t size)
    int ms_pages_remove(void *start, size_t size)
    int ms_pages_random(void *start, size_t size)
    int ms_pages_normal(void *start, size_t size)
    void ms_pages_dirty(void *start, size_t size)
    int ms_fork_guard(int descriptor)
    void ms_fork_release(int descriptor)
    void ms_fork_watch()
    uint32_t ms_fork_count()

cdef extern from "ms_status.h" nogil:
    ctypedef enum ms_status:
        MS_OK
        MS_END
        MS_BUSY
        MS_TIMEOUT
        MS_ROLL
        MS_MOVED
        MS_BEHIND
        MS_RESENT
        MS_WALK
        MS_INTERRUPTED
        MS_FULL
        MS_EMPTY
        MS_FENCED
        MS_PENDING
        MS_CLOSED
        MS_LOST
        MS_GROW_SLOTS
        MS_GROW_BLOCKS
        MS_CORRUPT
        MS_INVALID
        MS_NOMEM
    ctypedef struct ms_error:
        uint64_t position
        uint64_t expected
        uint64_t found
        char *text
    ctypedef struct ms_status_row:
        int value
        const char *name
        const char *class_name
        const char *text
    const ms_status_row *ms_status_rows()

cdef extern from "ms_xxh3.h" nogil:
    uint64_t ms_xxh3_64(const void *data, size_t size, uint64_t seed)

cdef extern from "ms_owner.h" nogil:
    uint32_t ms_owner_word(uint32_t index, uint32_t incarnation)
    uint32_t ms_owner_index(uint32_t word)
    uint32_t ms_owner_incarnation(uint32_t word)
    ms_status ms_owner_try_take(void *word, uint32_t self, uint32_t *out_owner)
    void ms_owner_release(void *word)
    ms_status ms_owner_wait(void *word, uint32_t self, int64_t timeout_ns, uint32_t *out_owner)
    ms_status ms_owner_take_over(void *word, uint32_t self, uint32_t dead, uint32_t *out_owner)

cdef extern from "ms_format.h" nogil:
    enum:
        MS_BATCH_FIXED
        MS_SEGMENT_COMPACTION_AT
        MS_INDEX_BLOCK_BYTES
        MS_SEGMENT_INDEX_AT
        MS_CONTROL_BLOCKS_AT
        MS_KEY_BYTES_MAX
        MS_VALUE_BYTES_MAX
    ctypedef struct ms_control_header:
        uint64_t magic
        uint32_t version
        uint32_t partitions
        uint64_t stream_id
        uint64_t generation
        uint32_t state
        uint32_t config
        uint32_t wake
        uint32_t waiters
    ctypedef struct ms_control_block:
        uint32_t append
        uint32_t poison
        uint64_t tail
        uint64_t active
        uint32_t sync
        uint32_t durable_hash
        uint64_t durable
        uint64_t durable_offset
        uint32_t durable_wake
        uint32_t durable_waiters
        uint64_t sync_target
        int64_t unsynced_at
        uint32_t maintenance
        uint32_t walk
        uint64_t walked
        uint64_t first_segment
        uint64_t first_offset
        uint32_t structure
        uint32_t compact
        uint32_t compacted
        uint64_t synced_to
        uint64_t synced_offset
    ctypedef struct ms_compaction:
        int64_t first
        int64_t last
        uint64_t kept_bytes
        uint64_t records
        uint64_t tombstones
        uint64_t tombstones_end
    ctypedef struct ms_slots_header:
        uint64_t queue_id
        uint64_t salt
        uint32_t slot_count
        uint32_t paused
        uint32_t poison
        uint32_t config
        uint64_t next_id
        uint64_t expired
        uint64_t evicted
        uint64_t cancelled
        uint64_t failed
        uint64_t redelivered
        uint64_t corrupt
        uint64_t refused
    ctypedef struct ms_slot:
        uint64_t id
        int64_t put_at
        int64_t due
        int64_t expires
        uint64_t key_hash
        uint32_t payload_length
        uint32_t key_length
        uint32_t headers_length
        uint32_t first_block
        uint16_t lane
    cdef enum:
        MS_SLOT_ABSOLUTE
    ctypedef struct ms_failure:
        uint64_t id
        int64_t first_at
        int64_t last_at
        uint16_t attempts
        uint8_t kind
        uint8_t first_length
        uint8_t last_length
        uint8_t *first
        uint8_t *last
    ctypedef struct ms_blocks_header:
        uint32_t block_count
    ctypedef struct ms_hints_header:
        uint32_t state
        uint64_t lease_due
        uint64_t expiry_due
        uint32_t undecided
        uint32_t sync
        uint64_t sync_begun
        uint64_t sync_ended
        int64_t unsynced_at
        uint32_t maintenance
        uint64_t gets
    ctypedef struct ms_format_field:
        const char *type
        const char *field
        uint32_t offset
        uint32_t size
    const ms_format_field *ms_format_fields()

cdef extern from "ms_batch.h" nogil:
    ctypedef struct ms_slice:
        const uint8_t *data
        int64_t size
    ctypedef struct ms_records:
        uint32_t count
        const uint32_t *rows
        const ms_slice *values
        const ms_slice *keys
        const int64_t *timestamps
        int64_t timestamp
        const uint32_t *header_starts
        const ms_slice *header_names
        const ms_slice *header_values
        uint64_t first_sequence
        int64_t called_us
    ctypedef struct ms_shape:
        uint64_t value_bytes
        uint32_t count
    ctypedef struct ms_place:
        uint64_t base_offset
    ctypedef struct ms_view:
        const uint8_t *bytes
        uint32_t length
        uint32_t count
        uint32_t flags
        uint32_t header_count
        uint64_t base_offset
        int64_t timestamp_min
        int64_t timestamp_max
        const int64_t *timestamps
        const int64_t *offsets
        const uint8_t *key_validity
        const int32_t *key_offsets
        const uint8_t *keys
        const uint8_t *value_validity
        const int32_t *value_offsets
        const uint8_t *values
        const int32_t *header_offsets
        const int32_t *name_offsets
        const uint8_t *names
        const int32_t *header_value_offsets
        const uint8_t *header_values
    ctypedef struct ms_gather:
        uint32_t count
    bint ms_gather_measure(ms_gather *gather, const ms_view *view, uint32_t first, uint32_t count)
    void ms_gather_add(ms_view *gathered, const ms_gather *gather, const ms_view *view,
                       uint32_t first, uint32_t count)
    ms_status ms_batch_measure(const ms_records *records, ms_shape *out_shape, ms_error *err)
    uint64_t ms_batch_length(const ms_shape *shape, uint64_t file_position)
    uint64_t ms_batch_encode(const ms_records *records, const ms_shape *shape,
                             const ms_place *place, uint8_t *at)
    ms_status ms_batch_view(const uint8_t *bytes, uint64_t available, uint64_t file_position,
                            ms_view *out_view, ms_error *err)
    uint64_t ms_gather_bytes(const ms_gather *gather)
    void ms_gather_begin(const ms_gather *gather, uint8_t *buffer, ms_view *out_view)
    bint ms_bit(const uint8_t *bitmap, uint64_t i)

cdef extern from "ms_segment.h" nogil:
    ctypedef struct ms_mark:
        uint64_t position
        uint64_t offset
        uint64_t hash
        int64_t timestamp_max
    ctypedef struct ms_identity:
        uint8_t store_id[16]
        uint64_t stream_id
        uint32_t partition
        uint64_t number
    ctypedef struct ms_segment:
        uint8_t *bytes
        uint64_t size
        uint64_t number
        uint64_t salt
        uint32_t data_position
        uint32_t index_count
        bint writable
        bint activated
        uint64_t base_offset
        uint64_t base_position
        uint64_t epoch
        uint64_t predecessor
        uint64_t predecessor_hash
        int64_t activated_at
        int64_t timestamp_max
        void *checked
    void ms_segment_geometry(uint64_t size, uint32_t *out_index_count, uint32_t *out_data_position)
    ms_status ms_segment_open(ms_segment *segment, void *bytes, uint64_t size, bint writable,
                              const ms_identity *identity, void *checked, ms_error *err)
    ms_status ms_segment_load_activation(ms_segment *segment)
    uint64_t ms_segment_capacity_end(const ms_segment *segment)
    uint64_t ms_segment_file_position(const ms_segment *segment, uint64_t position)
    ms_status ms_segment_view(ms_segment *segment, uint64_t position, uint64_t limit,
                              ms_view *out_view, ms_error *err)
    ms_status ms_segment_seek(ms_segment *segment, uint64_t offset, uint64_t limit,
                              uint64_t *out_position, ms_view *out_view, ms_error *err)
    ms_status ms_segment_find_offset(ms_segment *segment, uint64_t offset, uint64_t limit,
                                     uint64_t *out_position, ms_error *err)
    ms_status ms_segment_find_timestamp(ms_segment *segment, int64_t timestamp, uint64_t limit,
                                        uint64_t *out_position, ms_error *err)
    ms_status ms_segment_mark_at(ms_segment *segment, uint64_t position, ms_mark *out_mark,
                                 ms_error *err)
    ms_status ms_segment_walk(ms_segment *segment, ms_mark *mark, uint64_t limit, bint mend,
                              ms_error *err)
    ms_status ms_segment_search(ms_segment *segment, uint64_t begin, uint64_t limit,
        uint64_t *out_position,
                                uint64_t *out_synced)
    uint32_t ms_view_find_offset(const ms_view *view, uint64_t offset)
    uint32_t ms_view_find_timestamp(const ms_view *view, int64_t timestamp)
    ms_status ms_segment_measure_run(ms_segment *segment, uint64_t *position, uint32_t *skip,
                                     uint64_t limit, uint64_t records, uint32_t large,
                                     ms_gather *out_gather, ms_error *err)
    void ms_segment_gather_run(ms_segment *segment, uint64_t position, uint32_t skip,
                               const ms_gather *gather, ms_view *gathered)

cdef extern from "ms_compact.h" nogil:
    enum:
        MS_COMPACT_FILLER_BYTES
    ctypedef struct ms_key_entry:
        uint64_t last
    ctypedef struct ms_key_table:
        ms_key_entry *entries
        uint64_t capacity
        uint64_t count
        uint64_t seed[2]
    ctypedef struct ms_survivors:
        uint64_t *bits
        uint64_t room
        uint64_t end
        uint64_t records
        uint64_t dead
        uint64_t tombstones
        uint64_t tombstones_end
        uint64_t tombstones_removed
        uint32_t damaged
    ms_status ms_compact_scan(ms_key_table *table, ms_segment *segment, uint64_t *position,
                              uint64_t limit, uint64_t begin, uint64_t bytes, uint64_t *out_full,
                              ms_error *err)
    ms_status ms_compact_hold(ms_key_table *table, ms_segment *segment, uint64_t *position,
                              uint64_t limit, uint64_t bytes, ms_error *err)
    ms_status ms_compact_count(ms_segment *segment, uint64_t end, uint64_t *out_records,
                               ms_error *err)
    ms_status ms_compact_select(const ms_key_table *table, ms_segment *segment, bint drop,
                              ms_survivors *survivors, ms_error *err)
    ms_status ms_compact_leave(ms_key_table *table, ms_segment *segment,
                               const ms_survivors *survivors, ms_error *err)
    ms_status ms_compact_measure(ms_segment *segment, const ms_survivors *survivors,
                                 uint64_t *out_bytes, ms_error *err)
    ms_status ms_compact_copy(ms_segment *segment, const ms_survivors *survivors,
                              ms_segment *target, ms_error *err)
    bint ms_compaction_load(const ms_segment *segment, ms_compaction *out)
    void ms_compaction_store(ms_segment *segment, const ms_compaction *record)

cdef extern from "ms_latest.h" nogil:
    ctypedef struct ms_latest_record:
        uint32_t key_size
        uint32_t origin
        uint32_t value_size
    ctypedef enum ms_latest_origin:
        MS_LATEST_HOME
        MS_LATEST_STRAY
        MS_LATEST_GONE
    ctypedef struct ms_latest_entry:
        ms_latest_record *record
    ctypedef struct ms_latest:
        ms_latest_entry *entries
        uint64_t capacity
        uint64_t count
        uint64_t seed
        uint64_t key_bytes
        uint64_t value_bytes
    const uint8_t *ms_latest_key(const ms_latest_record *record)
    const uint8_t *ms_latest_value(const ms_latest_record *record)
    const ms_latest_record *ms_latest_find(const ms_latest *table, const uint8_t *key,
                                           uint32_t key_size)
    ms_status ms_latest_put(ms_latest *table, const uint8_t *key, uint32_t key_size,
                            const uint8_t *value, uint32_t value_size,
                            ms_latest_origin origin)
    bint ms_latest_remove(ms_latest *table, const uint8_t *key, uint32_t key_size)
    void ms_latest_end_era(ms_latest *table, bint moved)
    void ms_latest_clear(ms_latest *table)

cdef extern from "ms_producer.h" nogil:
    const uint32_t MS_PRODUCER_MAX
    const uint64_t MS_SEQUENCE_MAX
    const uint64_t MS_SEQUENCE_MORE
    ctypedef struct ms_producer_entry:
        uint64_t last
        uint64_t whole
    ctypedef struct ms_producers:
        ms_producer_entry *entries
        uint32_t count
        uint64_t position
    ms_status ms_producers_walk(ms_producers *table, ms_segment *segment, uint64_t limit,
                                uint32_t *out_producer, ms_error *err)

cdef extern from "ms_partition.h" nogil:
    enum:
        MS_EVENT_WRITTEN
        MS_EVENT_ROLLED
        MS_EVENT_SPARE
        MS_EVENT_PREPARE
        MS_EVENT_UNSYNCED
        MS_EVENT_LATE
    ctypedef struct ms_partition:
        ms_control_header *header
        ms_control_block *block
        uint64_t generation
        uint32_t self
        bint written
        uint64_t late_us
        bint spare_wanted
        ms_segment *active
        ms_segment *next
        bint end_valid
        uint64_t ready
        uint64_t ready_low
        uint64_t unsynced_max
        int64_t clock_offset_us
        ms_producers *producers
    ctypedef struct ms_appended:
        uint64_t first_offset
        uint64_t epoch
        uint64_t end
        uint32_t events
        uint32_t owner
        uint64_t need_bytes
        uint64_t last_sequence
    ms_status ms_partition_try_append(ms_partition *partition, const ms_records *records,
                                      const ms_shape *shape, uint32_t producer, uint64_t sequence,
                                      ms_appended *out, ms_error *err)
    enum:
        MS_CLEAR_LEAST
    ms_status ms_partition_begin_clear(ms_partition *partition, const ms_shape *shape,
                                       uint64_t *out_begin, uint64_t *out_end)
    ms_status ms_partition_begin_fill(ms_partition *partition, const ms_segment *segment,
                                      uint64_t begin)
    ms_status ms_partition_take_over(ms_partition *partition, uint32_t dead, uint32_t *out_owner)
    ms_status ms_partition_try_end(const ms_control_block *block, ms_mark *out_end)
    void ms_partition_begin_sync(ms_control_block *block, uint64_t target)
    void ms_partition_set_durable(ms_control_block *block, const ms_mark *mark)
    void ms_partition_end_sync(ms_control_block *block)
    ms_status ms_partition_lead_or_wait(ms_control_block *block, uint32_t self, uint64_t position,
                                        int64_t timeout_ns, cbool *out_lead)
    void ms_partition_follow(ms_control_block *block, uint32_t round, int64_t timeout_ns)
    void ms_partition_recovered(ms_control_block *block, uint64_t generation, const ms_mark *end,
                                uint64_t active, uint64_t first_segment, uint64_t first_offset,
                                uint32_t poison)
    void ms_stream_wake(ms_control_header *header)

cdef extern from "ms_dedup.h" nogil:
    ctypedef struct ms_dedup_header:
        uint32_t state
    ctypedef struct ms_dedup:
        ms_dedup_header *header
        uint32_t stripes
    enum:
        MS_DEDUP_STRIPES_MAX
    uint64_t ms_dedup_size(uint32_t stripes)
    void ms_dedup_init(void *bytes, uint32_t stripes, const uint8_t *store_id, uint64_t queue_id)
    ms_status ms_dedup_open(ms_dedup *table, void *bytes, uint64_t size, const uint8_t *store_id,
                            uint64_t queue_id, ms_error *err)
    ms_status ms_dedup_copy(const ms_dedup *source, const ms_dedup *to, uint32_t self,
                            int64_t now_us, uint32_t *in_out_stripe, uint32_t *out_owner)
    void ms_dedup_thaw(const ms_dedup *table)

cdef extern from "ms_word.h" nogil:
    enum:
        MS_MESSAGE_FREE
        MS_MESSAGE_WRITING
        MS_MESSAGE_READY
        MS_MESSAGE_DELAYED
        MS_MESSAGE_LEASED
        MS_MESSAGE_DEAD
        MS_MESSAGE_SPARE
        MS_MESSAGE_HELD
        MS_MESSAGE_PREPARED
        MS_MESSAGE_ACKING
    uint32_t ms_word_state(uint64_t word)
    uint32_t ms_word_lane(uint64_t word)
    uint32_t ms_word_attempts(uint64_t word)
    uint32_t ms_word_reuse(uint64_t word)
    uint64_t ms_word_transaction(uint64_t word)

cdef extern from "ms_queue.h" nogil:
    ctypedef struct ms_instant:
        int64_t mono_ns
        int64_t boot_ns
        int64_t time_us
    ctypedef struct ms_queue:
        ms_slots_header *slots
        ms_blocks_header *blocks
        ms_hints_header *hints
        uint32_t *participants
        uint64_t *owners
        void *buckets
        uint64_t salt
        uint32_t slot_bytes
        uint32_t slot_max
        uint32_t capacity
        uint32_t dead_limit
        uint32_t block_max
        uint32_t lanes
        uint32_t self
        uint32_t max_attempts
        uint64_t generation
        int64_t dedup_window_us
        int64_t clock_offset_us
        int64_t clock_since_us
        cbool ageing
        cbool block_key
    ctypedef struct ms_lease:
        uint64_t word
        uint64_t id
        uint32_t slot
    uint64_t ms_slots_size(uint32_t slot_bytes, uint32_t slot_count)
    uint64_t ms_blocks_size(uint32_t block_count)
    uint64_t ms_hints_size(uint32_t slot_max, uint32_t lanes, bint ordered)
    ms_status ms_queue_attach(ms_queue *queue, uint64_t slots_size, uint64_t blocks_size,
                              uint64_t hints_size, ms_error *err)

cdef extern from "ms_slots.h" nogil:
    ctypedef struct ms_message:
        const uint8_t *key
        const uint8_t *headers
        const uint8_t *payload
        uint32_t key_length
        uint32_t headers_length
        uint32_t payload_length
        uint32_t lane
        int64_t delay_ns
        int64_t due_us
        cbool absolute
        int64_t expires_us
        uint64_t key_hash
        uint64_t *dedup
        uint64_t id
        uint32_t slot
        uint64_t transaction
    const ms_slot *ms_queue_slot(const ms_queue *queue, uint32_t slot)
    const uint8_t *ms_queue_inline(const ms_queue *queue, const ms_slot *slot)
    ms_status ms_queue_copy_content(const ms_queue *queue, uint32_t slot, void *out, size_t size,
                                    ms_error *err)
    bint ms_queue_slot_valid(const ms_queue *queue, uint32_t slot, uint32_t reuse)
    bint ms_queue_holds(const ms_queue *queue, const ms_lease *lease)
    void *ms_queue_word(const ms_queue *queue, uint32_t slot)
    bint ms_queue_had(const ms_queue *queue, uint32_t slot, uint64_t id)

cdef extern from "ms_due.h" nogil:
    void ms_now(const ms_queue *queue, ms_instant *out_now)
    void ms_now_near(ms_queue *queue, ms_instant *out_now)

cdef extern from "ms_wait.h" nogil:
    enum:
        MS_WAIT_MESSAGE
        MS_WAIT_ROOM
        MS_WAIT_FINISHED
    uint32_t ms_queue_announce(ms_queue *queue, int place)
    int ms_queue_sleep(ms_queue *queue, int place, uint32_t ticket, int64_t timeout_ns)
    void ms_queue_wake(ms_queue *queue, int place, int32_t count)

cdef extern from "ms_hint.h" nogil:
    uint32_t ms_queue_try_advance(ms_queue *queue, const ms_instant *now, int64_t *out_next_ns)

cdef extern from "ms_claim.h" nogil:
    void ms_queue_use_dedup(ms_queue *queue, ms_dedup *table)
    ms_status ms_queue_recover_claims(ms_queue *queue, const ms_instant *now)

cdef extern from "ms_ending.h" nogil:
    enum:
        MS_FAILED
        MS_FAILED_REJECTED
        MS_FAILED_DECODE
        MS_FAILED_CORRUPT
    ms_status ms_queue_try_ack(ms_queue *queue, const ms_lease *lease, const ms_instant *now,
                               uint32_t *out_owner)
    ms_status ms_queue_try_nack(ms_queue *queue, const ms_lease *lease, int64_t delay_ns,
                                uint32_t kind, const void *text, size_t length,
                                const ms_instant *now, cbool *out_dead, uint32_t *out_owner)
    ms_status ms_queue_try_reject(ms_queue *queue, const ms_lease *lease, uint32_t kind,
                                  const void *text, size_t length, const ms_instant *now,
                                  uint32_t *out_owner)
    ms_status ms_queue_try_release(ms_queue *queue, const ms_lease *lease, int64_t delay_ns,
                                   const ms_instant *now)
    ms_status ms_queue_try_cancel(ms_queue *queue, uint32_t slot, uint64_t word,
                                  const ms_instant *now, uint32_t *out_owner)
    bint ms_queue_failure(const ms_queue *queue, uint32_t slot, uint64_t id, ms_failure *out)

cdef extern from "ms_room.h" nogil:
    void ms_queue_publish_slots(ms_queue *queue, uint32_t slot_count)
    void ms_queue_publish_blocks(ms_queue *queue, uint32_t block_count)

cdef extern from "ms_sweep.h" nogil:
    uint32_t ms_queue_sweep(ms_queue *queue, const ms_instant *now, const uint32_t *dead,
                            uint32_t dead_count)
    bint ms_queue_sweep_due(const ms_queue *queue, const ms_instant *now)
    bint ms_queue_claim_watch(ms_queue *queue, const ms_instant *now, int64_t interval_ns)

cdef extern from "ms_delivery.h" nogil:
    ms_status ms_queue_try_put(ms_queue *queue, const ms_message *message, const ms_instant *now,
                               ms_lease *out, uint32_t *out_owner, ms_error *err)
    ms_status ms_queue_try_get(ms_queue *queue, int64_t lease_ms, const ms_instant *now,
                               cbool *io_alone, ms_lease *out)
    ms_status ms_queue_try_extend(ms_queue *queue, ms_lease *io_lease, int64_t lease_ms,
                                  const ms_instant *now)
    ms_status ms_queue_try_redrive(ms_queue *queue, uint32_t slot, uint64_t word,
                                   const ms_instant *now, uint32_t *out_owner)
    void ms_queue_refuse(ms_queue *queue)

cdef extern from "ms_decide.h" nogil:
    ms_status ms_queue_try_prepare_ack(ms_queue *queue, const ms_lease *lease, uint64_t transaction,
                                       const ms_instant *now, uint64_t *out_word)
    ms_status ms_queue_try_undo_ack(ms_queue *queue, const ms_lease *lease, uint64_t word)
    void ms_queue_wipe(ms_queue *queue, uint32_t slot)
    void ms_queue_forget(ms_queue *queue, uint32_t slot, const ms_instant *now)
    ms_status ms_queue_try_decide(ms_queue *queue, uint32_t slot, uint64_t word, bint committed,
                                  const ms_instant *now, uint32_t *out_owner)

cdef extern from "ms_recover.h" nogil:
    size_t ms_queue_scratch_size(const ms_queue *queue)
    void ms_queue_begin_ids(ms_queue *queue, uint64_t least)
    void ms_queue_begin_totals(ms_queue *queue)
    void ms_queue_recover(ms_queue *queue, bint verify, const ms_instant *now, void *scratch)
    ms_status ms_queue_move_hints(ms_queue *source, ms_queue *to, const ms_instant *now,
                                  uint32_t *io_taken, void *scratch, uint32_t *out_owner)
    void ms_queue_give_back_hints(ms_queue *source, uint32_t taken)

cdef extern from "ms_count.h" nogil:
    ctypedef struct ms_queue_counts:
        uint32_t ready, delayed, held, leased, writing, dead, spare, free, prepared, acking, invalid
        uint32_t *by_lane
        uint64_t put
        uint64_t done
        int64_t oldest_us
    uint32_t ms_queue_find(const ms_queue *queue, uint64_t id, uint64_t *out_word)
    void ms_queue_count(const ms_queue *queue, ms_queue_counts *out)
    uint32_t ms_queue_state_swept(const ms_queue *queue, uint32_t slot, uint64_t word,
                                  const ms_instant *now, const uint32_t *living)
    void ms_queue_count_swept(const ms_queue *queue, const ms_instant *now, const uint32_t *living,
                              ms_queue_counts *out)
    uint32_t ms_queue_never_leased(const ms_queue *queue, uint32_t *out_slot, uint64_t *out_word)
    bint ms_queue_check(const ms_queue *queue, char *text, size_t size)

# Relaxed and acquire loads, and stores, of words in mapped files.
cdef extern from *:
    """
    #include <stdatomic.h>
    static inline uint64_t ms_load64(const void *p) {
        return atomic_load_explicit((const _Atomic uint64_t *)p, memory_order_acquire);
    }
    static inline uint32_t ms_load32(const void *p) {
        return atomic_load_explicit((const _Atomic uint32_t *)p, memory_order_acquire);
    }
    static inline void ms_store64(void *p, uint64_t v) {
        atomic_store_explicit((_Atomic uint64_t *)p, v, memory_order_release);
    }
    static inline void ms_store32(void *p, uint32_t v) {
        atomic_store_explicit((_Atomic uint32_t *)p, v, memory_order_release);
    }
    static inline void ms_add32(void *p, uint32_t v) {
        atomic_fetch_add((_Atomic uint32_t *)p, v);
    }
    static inline void ms_fence(void) { atomic_thread_fence(memory_order_seq_cst); }
    """
    uint64_t ms_load64(const void *p) nogil
    uint32_t ms_load32(const void *p) nogil
    void ms_store64(void *p, uint64_t v) nogil
    void ms_store32(void *p, uint32_t v) nogil
    void ms_add32(void *p, uint32_t v) nogil
    void ms_fence() nogil
