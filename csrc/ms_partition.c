/* Append, publish, roll and take over.
 *
 * Invariants: (1) tail <= bytes written <= bytes allocated and mapped. (2) Bytes below the tail
 * never change. (3) Only the owner of the append word stores into segments, tail, hints and
 * active. (4) A successor's activation record is valid before `active` names it, and `active`
 * names it before the tail moves into it. (5) The hints belong to hint_tail; where that is not the
 * tail they mean nothing. Crash: the old tail or the new one, at every instruction; bytes behind
 * it mean nothing.
 */
#include "ms_partition.h"

#include <inttypes.h>
#include <string.h>

static uint64_t load64(const _Atomic uint64_t *word) {
  return atomic_load_explicit(word, memory_order_relaxed);
}

ms_status ms_partition_try_end(const ms_control_block *block, ms_mark *out_end) {
  for (int i = 0; i < 100; i++) {
    /* Acquire, each pairing with a release store in publish(): a hint that was read new forces the
     * reads after it to see hint_tail new, and then the stamps differ. */
    uint64_t tail = atomic_load_explicit(&block->tail, memory_order_acquire);
    uint64_t offset = atomic_load_explicit(&block->hint_offset, memory_order_acquire);
    int64_t timestamp = atomic_load_explicit(&block->hint_timestamp, memory_order_acquire);
    uint64_t hash = atomic_load_explicit(&block->hint_hash, memory_order_acquire);
    if (atomic_load_explicit(&block->hint_tail, memory_order_acquire) == tail &&
        atomic_load_explicit(&block->tail, memory_order_relaxed) == tail) {
      *out_end = (ms_mark){tail, offset, hash, timestamp};
      return MS_OK;
    }
    ms_cpu_relax();
  }
  return MS_BUSY;
}

static void publish(ms_control_block *block, const ms_mark *end) {
  atomic_store_explicit(&block->hint_tail, end->position, memory_order_relaxed);
  MS_YIELD("publish_hints");
  /* Release: pairs with the acquire loads in ms_partition_try_end. */
  atomic_store_explicit(&block->hint_offset, end->offset, memory_order_release);
  atomic_store_explicit(&block->hint_timestamp, end->timestamp_max, memory_order_release);
  atomic_store_explicit(&block->hint_hash, end->hash, memory_order_release);
  MS_YIELD("publish_tail");
  /* Release: pairs with the acquire load of every reader; publishing the tail is what lets it read
   * the batch. */
  atomic_store_explicit(&block->tail, end->position, memory_order_release);
}

void ms_stream_wake(ms_control_header *header) {
  /* Full fence between our store of the tail and the load of waiters; a reader stores waiters,
   * fences, then loads the tail: one of the two sees the other. */
  atomic_thread_fence(memory_order_seq_cst);
  if (MS_LIKELY(atomic_load_explicit(&header->waiters, memory_order_relaxed) == 0)) return;
  MS_YIELD("stream_wake");
  atomic_store_explicit(&header->waiters, 0, memory_order_relaxed);
  atomic_fetch_add_explicit(&header->wake, 1, memory_order_release);
  ms_futex_wake(&header->wake, INT32_MAX);
}

static ms_status refuse(const ms_partition *partition, ms_error *err) {
  const ms_control_block *block = partition->block;
  if (MS_UNLIKELY(atomic_load_explicit(&partition->header->state, memory_order_relaxed) !=
                  MS_CONTROL_LIVE))
    return ms_fail(err, MS_CLOSED, 0, MS_CONTROL_LIVE, 0,
                   "the stream was dropped, or opened anew by others");
  uint32_t poison = atomic_load_explicit(&block->poison, memory_order_relaxed);
  if (MS_UNLIKELY(poison == MS_POISON_SYNC))
    return ms_fail(err, MS_POISONED, load64(&block->durable), 0, poison,
                   "an earlier sync of the partition failed; close the store in every process and "
                   "open it again");
  if (MS_UNLIKELY(poison == MS_POISON_CORRUPT)) {
    uint64_t tail = load64(&block->tail), synced = load64(&block->synced_to);
    if (synced <= tail)
      return ms_fail(err, MS_CORRUPT, tail, 0, poison,
                     "the log is corrupt behind position %" PRIu64
                     "; nothing is appended until it is repaired",
                     tail);
    return ms_fail(err, MS_CORRUPT, tail, synced, tail,
                   "what follows segment number %" PRIu64
                   " is missing or damaged: expected a log up to position %" PRIu64
                   ", offset %" PRIu64 ", which were synced, found its end at position %" PRIu64
                   ". Restore the files, or let `millstream repair` give up what was in them",
                   load64(&block->active), synced, load64(&block->synced_offset), tail);
  }
  /* Acquire: pairs with the release in ms_partition_recovered. */
  if (MS_UNLIKELY(atomic_load_explicit(&block->walked, memory_order_acquire) !=
                  partition->generation))
    return MS_WALK;
  return MS_OK;
}

/* Is this a position of the segment, or the one behind its last? */
static bool is_within(const ms_segment *segment, uint64_t position) {
  return position >= segment->base_position && position <= ms_segment_capacity_end(segment);
}

/* Could the log end there? A control page that was damaged must not have what is stored
 * overwritten. */
static ms_status check_end(const ms_partition *partition, const ms_mark *end, ms_error *err) {
  const ms_segment *active = partition->active;
  bool written_to = active != NULL && active->activated && active->epoch == partition->generation;
  if (end->position % 8 == 0 && end->position <= MS_POSITION_MAX && end->offset < MS_OFFSET_MAX &&
      (!written_to || is_within(active, end->position)))
    return MS_OK;
  return ms_fail(err, MS_CORRUPT, end->position, written_to ? active->base_position : 0,
                 end->position,
                 "the control file is damaged: it says that the log ends at position %" PRIu64
                 ", offset %" PRIu64 "; close the store in all processes and open it again",
                 end->position, end->offset);
}

/* The end of the log, for its writer. */
static ms_status find_end(ms_partition *partition, ms_error *err) {
  uint64_t tail = load64(&partition->block->tail);
  if (MS_LIKELY(partition->end_valid && partition->end.position == tail)) return MS_OK;
  ms_status status = ms_partition_try_end(partition->block, &partition->end);
  if (status != MS_OK) {
    if (partition->active == NULL || !partition->active->activated) return MS_MOVED;
    status = ms_segment_mark_at(partition->active, tail, &partition->end, err);
  }
  if (status == MS_OK) status = check_end(partition, &partition->end, err);
  partition->end_valid = status == MS_OK;
  return status;
}

static bool fits(const ms_segment *segment, uint64_t file_position, uint64_t length) {
  return file_position <= segment->size && length <= segment->size - file_position;
}

/* Make `next` the active segment. MS_ROLL: it cannot be, the caller must map another. */
static ms_status roll(ms_partition *partition, ms_error *err) {
  ms_segment *next = partition->next;
  uint64_t predecessor = load64(&partition->block->active);
  if (next == NULL) return MS_ROLL;
  partition->next = NULL;
  partition->spare_wanted = false;
  if (next->number <= predecessor) return MS_ROLL; /* others have rolled past it meanwhile */
  if (ms_segment_load_activation(next) == MS_OK) {
    /* An owner died between the record and `active`: the roll is the log's. */
    if (next->predecessor != predecessor || next->base_position != partition->end.position)
      return ms_fail(err, MS_CORRUPT, partition->end.position, partition->end.position,
                     next->base_position, "segment %" PRIu64 " was activated elsewhere in the log",
                     next->number);
  } else {
    ms_segment_activate(next, &partition->end, predecessor, partition->generation,
                        ms_clock_boot_ns() / 1000 + partition->clock_offset_us);
  }
  MS_YIELD("roll_active");
  /* Release: the loader of this number finds the record valid (ms_segment_load_activation). */
  atomic_store_explicit(&partition->block->active, next->number, memory_order_release);
  if (predecessor == 0) /* the oldest one: without its file the log is not whole */
    atomic_store_explicit(&partition->block->first_segment, next->number, memory_order_relaxed);
  partition->active = next;
  partition->ready = 0;
  return MS_OK;
}

static ms_status append_owned(ms_partition *partition, const ms_records *records,
                              const ms_shape *shape, uint32_t producer, uint64_t sequence,
                              ms_appended *out, ms_error *err) {
  ms_control_block *block = partition->block;
  MS_TRY(refuse(partition, err));
  uint64_t active_number = load64(&block->active);
  if (active_number != (partition->active != NULL ? partition->active->number : 0)) return MS_MOVED;
  MS_TRY(find_end(partition, err));
  ms_mark *end = &partition->end;
  ms_segment *segment = partition->active;
  if (producer != 0)
    MS_TRY(ms_producers_try_admit(partition->producers, segment, end->position, producer,
                                  records->first_sequence, &out->last_sequence));
  uint64_t file_position = 0, length = 0;
  bool room = false;
  if (segment != NULL && segment->epoch == partition->generation) {
    file_position = ms_segment_file_position(segment, end->position);
    length = ms_batch_length(shape, file_position);
    room = fits(segment, file_position, length);
  }
  if (MS_UNLIKELY(!room)) {
    out->need_bytes = ms_batch_length_max(shape);
    MS_TRY(roll(partition, err));
    segment = partition->active;
    out->events |= MS_EVENT_ROLLED;
    file_position = segment->data_position;
    length = ms_batch_length(shape, file_position);
    if (!fits(segment, file_position, length)) return MS_ROLL; /* too small a spare stays empty */
  }
  uint64_t position = end->position;
  ms_place place = {
      .position = position,
      .file_position = file_position,
      .seed = segment->salt + position,
      .base_offset = end->offset,
      .durable = load64(&block->durable),
      .chain = (uint32_t)end->hash,
      .producer = producer,
      .sequence = sequence,
  };
  MS_YIELD("append_encode");
  end->hash = ms_batch_encode(records, shape, &place, segment->bytes + file_position);
  end->position = position + length;
  end->offset += shape->count;
  if (shape->timestamp_max > end->timestamp_max) end->timestamp_max = shape->timestamp_max;
  if (ms_segment_index_due(segment, position, end->position))
    ms_segment_index_put(segment, position, end);
  publish(block, end);
  if (MS_UNLIKELY(partition->producers != NULL))
    ms_producers_passed(partition->producers, position, end->position, producer, sequence);
  out->first_offset = place.base_offset;
  out->epoch = segment->epoch;
  out->end = end->position;
  if (!partition->written) {
    partition->written = true;
    partition->written_us = records->called_us;
    out->events |= MS_EVENT_WRITTEN;
    /* All before it is durable, so that this is the oldest that is not. */
    if (place.durable == position)
      atomic_store_explicit(&block->unsynced_at, ms_clock_monotonic_ns(), memory_order_relaxed);
  } else if (MS_UNLIKELY((uint64_t)(records->called_us - partition->written_us) >
                         partition->late_us)) {
    /* Also where the wall clock was set, either way: the caller reads another clock. */
    partition->written_us = records->called_us;
    out->events |= MS_EVENT_LATE;
  }
  if (!partition->spare_wanted && partition->next == NULL &&
      file_position + length > segment->size / 2) {
    partition->spare_wanted = true;
    out->events |= MS_EVENT_SPARE;
  }
  /* The next batch may be as long as this one. */
  if (partition->ready_low != 0 &&
      end->position + length + partition->ready_low > partition->ready &&
      partition->ready < ms_segment_capacity_end(segment)) {
    out->events |= MS_EVENT_PREPARE;
    partition->ready =
        end->position + length + 2 * partition->ready_low; /* asked: not again at once */
  }
  if (partition->unsynced_max != 0 && end->position - place.durable > partition->unsynced_max)
    out->events |= MS_EVENT_UNSYNCED;
  return MS_OK;
}

ms_status ms_partition_try_append(ms_partition *partition, const ms_records *records,
                                  const ms_shape *shape, uint32_t producer, uint64_t sequence,
                                  ms_appended *out, ms_error *err) {
  out->events = 0;
  MS_TRY(ms_owner_try_take(&partition->block->append, partition->self, &out->owner));
  ms_status status = append_owned(partition, records, shape, producer, sequence, out, err);
  ms_owner_release(&partition->block->append);
  if (status == MS_OK) ms_stream_wake(partition->header);
  return status;
}

ms_status ms_partition_begin_fill(ms_partition *partition, const ms_segment *segment,
                                  uint64_t begin) {
  ms_control_block *block = partition->block;
  uint32_t owner;
  ms_error ignored; /* whoever appends is told */
  MS_TRY(ms_owner_try_take(&block->append, partition->self, &owner));
  if (refuse(partition, &ignored) == MS_OK && load64(&block->active) == segment->number &&
      segment->epoch == partition->generation && load64(&block->tail) <= begin)
    return MS_OK;
  ms_owner_release(&block->append);
  return MS_END;
}

/* Which bytes of the active segment's file a batch would be alone on; for the word's owner. */
static ms_status find_pages(ms_partition *partition, const ms_shape *shape, uint64_t *out_begin,
                            uint64_t *out_end) {
  ms_error ignored;
  const ms_segment *segment = partition->active;
  MS_TRY(refuse(partition, &ignored));
  if (segment == NULL || load64(&partition->block->active) != segment->number ||
      segment->epoch != partition->generation)
    return MS_MOVED;
  MS_TRY(find_end(partition, &ignored));
  uint64_t at = ms_segment_file_position(segment, partition->end.position);
  uint64_t length = ms_batch_length(shape, at);
  if (!fits(segment, at, length)) return MS_ROLL;
  const uint64_t page = MS_PAGE_BYTES;
  *out_begin = (at + page - 1) / page * page;
  *out_end = (at + length + page - 1) / page * page;
  if (*out_end > segment->size) *out_end = segment->size;
  return *out_end >= *out_begin + MS_CLEAR_LEAST ? MS_OK : MS_END;
}

ms_status ms_partition_begin_clear(ms_partition *partition, const ms_shape *shape,
                                   uint64_t *out_begin, uint64_t *out_end) {
  uint32_t owner;
  MS_TRY(ms_owner_try_take(&partition->block->append, partition->self, &owner));
  ms_status status = find_pages(partition, shape, out_begin, out_end);
  if (status != MS_OK) ms_owner_release(&partition->block->append);
  return status;
}

ms_status ms_partition_take_over(ms_partition *partition, uint32_t dead, uint32_t *out_owner) {
  ms_control_block *block = partition->block;
  MS_TRY(ms_owner_take_over(&block->append, partition->self, dead, out_owner));
  ms_status status = MS_MOVED;
  ms_segment *segment = partition->active, *next = partition->next;
  uint64_t tail = load64(&block->tail), number = load64(&block->active);
  if (number == (segment != NULL ? segment->number : 0)) {
    status = MS_OK;
    if (next != NULL && ms_segment_load_activation(next) == MS_OK && next->predecessor == number &&
        next->base_position == tail && next->epoch == partition->generation) {
      /* The dead owner had finished the record: its roll is the log's. */
      atomic_store_explicit(&block->active, next->number, memory_order_release);
      partition->active = segment = next;
      partition->next = NULL;
    }
    if (segment != NULL && segment->activated && segment->epoch == partition->generation &&
        is_within(segment, tail)) {
      uint64_t at = ms_segment_file_position(segment, tail);
      if (fits(segment, at, sizeof(ms_batch_header)))
        memset(segment->bytes + at, 0, sizeof(ms_batch_header));
    }
    partition->end_valid = false;
  }
  if (status == MS_OK) {
    ms_owner_release(&block->append);
  } else {
    /* Not mended: give the word back to the dead owner, so that whoever comes next mends. */
    ms_owner_give_back(&block->append, dead);
  }
  return status;
}

void ms_partition_set_durable(ms_control_block *block, const ms_mark *mark) {
  if (mark->position < load64(&block->durable)) return;
  atomic_store_explicit(&block->durable_hash, (uint32_t)mark->hash, memory_order_relaxed);
  atomic_store_explicit(&block->durable_offset, mark->offset, memory_order_release);
  /* Release: pairs with the acquire loads of those that wait for it or read up to it. */
  atomic_store_explicit(&block->durable, mark->position, memory_order_release);
}

void ms_partition_begin_sync(ms_control_block *block, uint64_t target) {
  atomic_store_explicit(&block->sync_target, target, memory_order_release);
}

/* durable_wake counts ended syncs. Those that the sync under way covers sleep for the next value,
 * the others for the one after: each is woken once, and by one who was woken before. Woken at once
 * they would all ask for the GIL, and most be put to sleep again. A chain that a kill breaks ends
 * with the sleepers' time-out. Followers, who pass nothing on, have a class of their own. */
enum { CLASSES = 31 };
static uint32_t class_of(uint32_t round) { return UINT32_C(1) << round % CLASSES; }
#define FOLLOWERS (UINT32_C(1) << CLASSES)

void ms_partition_end_sync(ms_control_block *block) {
  atomic_thread_fence(memory_order_seq_cst); /* as in ms_stream_wake */
  uint32_t round = atomic_fetch_add_explicit(&block->durable_wake, 1, memory_order_acq_rel) + 1;
  if (atomic_load_explicit(&block->durable_waiters, memory_order_relaxed) == 0) return;
  bool reached = load64(&block->durable) >= load64(&block->sync_target);
  ms_futex_wake_class(&block->durable_wake, 1, class_of(round + 1));
  /* A sleeper that finds its record not durable wakes nobody: where the sync failed, all are woken
   * here. */
  ms_futex_wake_class(&block->durable_wake, reached ? 1 : INT32_MAX, class_of(round));
  ms_futex_wake_class(&block->durable_wake, INT32_MAX, FOLLOWERS);
}

ms_status ms_partition_lead_or_wait(ms_control_block *block, uint32_t self, uint64_t position,
                                    int64_t timeout_ns, bool *out_lead) {
  const int64_t deadline = ms_clock_monotonic_ns() + timeout_ns;
  uint32_t slept = 0; /* the class it last slept in */
  *out_lead = false;
  for (;;) {
    uint32_t round = atomic_load_explicit(&block->durable_wake, memory_order_acquire), owner;
    /* Acquire: pairs with the release in ms_partition_set_durable. */
    if (atomic_load_explicit(&block->durable, memory_order_acquire) >= position) break;
    if (atomic_load_explicit(&block->poison, memory_order_relaxed) != MS_POISON_NONE)
      return MS_BUSY;
    if (ms_owner_try_take(&block->sync, self, &owner) == MS_OK) {
      *out_lead = true;
      return MS_BUSY;
    }
    atomic_store_explicit(&block->durable_waiters, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst); /* pairs with the one in ms_partition_end_sync */
    int64_t left = deadline - ms_clock_monotonic_ns();
    if (left <= 0) return MS_BUSY;
    /* The target may be the last sync's, when who holds the word has not said its own yet: then
     * this sleeps a round too long, until the one who is woken for it passes the wake on. */
    bool next = position > atomic_load_explicit(&block->sync_target, memory_order_acquire);
    slept = class_of(round + (next ? 2 : 1));
    int error = ms_futex_wait_class(&block->durable_wake, round, slept, left);
    if (error != 0) return MS_BUSY;
  }
  if (slept != 0) ms_futex_wake_class(&block->durable_wake, 1, slept);
  return MS_OK;
}

void ms_partition_follow(ms_control_block *block, uint32_t round, int64_t timeout_ns) {
  (void)ms_futex_wait_class(&block->durable_wake, round, FOLLOWERS, timeout_ns);
}

void ms_partition_recovered(ms_control_block *block, uint64_t generation, const ms_mark *end,
                            uint64_t active, uint64_t first_segment, uint64_t first_offset,
                            uint32_t poison) {
  atomic_store_explicit(&block->active, active, memory_order_relaxed);
  atomic_store_explicit(&block->first_segment, first_segment, memory_order_relaxed);
  atomic_store_explicit(&block->first_offset, first_offset, memory_order_relaxed);
  atomic_store_explicit(&block->durable, end->position, memory_order_relaxed);
  atomic_store_explicit(&block->durable_offset, end->offset, memory_order_relaxed);
  atomic_store_explicit(&block->durable_hash, (uint32_t)end->hash, memory_order_relaxed);
  if (poison == MS_POISON_NONE) { /* else the next recovery must know it, too */
    atomic_store_explicit(&block->synced_to, 0, memory_order_relaxed);
    atomic_store_explicit(&block->synced_offset, 0, memory_order_relaxed);
  }
  atomic_store_explicit(&block->poison, poison, memory_order_relaxed);
  publish(block, end);
  MS_YIELD("recovered");
  /* Release: pairs with the acquire load in refuse() and in readers; all above is there when it is
   * seen. */
  atomic_store_explicit(&block->walked, generation, memory_order_release);
}
