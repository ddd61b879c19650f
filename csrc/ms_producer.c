/* Admit, walk.
 *
 * Invariants: (1) entries hold the maximum of the batch headers before `position`, so that reading
 * a batch twice changes nothing. (2) `position` moves behind a batch after its sequence is noted.
 * Crash: nothing to mend, the table dies with its process; the next process reads the log.
 */
#include "ms_producer.h"

#include <inttypes.h>
#include <string.h>

enum { CATCH_UP_BATCHES = 1024 }; /* under the append word: some 50 us, where others wrote them */
enum { AHEAD = 16 };              /* batches, of a walk over headers */

static bool counts(const ms_batch_header *header) {
  return header->producer != 0 && (header->flags & MS_BATCH_FILLER) == 0;
}

/* Batches of others since this process last read them. Their writers hashed them moments ago:
 * lengths are held to the limit, hashes are left to readers. */
static ms_status catch_up(ms_producers *table, const ms_segment *active, uint64_t tail) {
  if (active == NULL || !active->activated || table->position < active->base_position ||
      tail > ms_segment_capacity_end(active))
    return MS_BEHIND;
  for (int i = 0; i < CATCH_UP_BATCHES && table->position < tail; i++) {
    ms_batch_header header;
    if (tail - table->position < sizeof header) return MS_BEHIND;
    const uint8_t *at = active->bytes + ms_segment_file_position(active, table->position);
    memcpy(&header, at, sizeof header);
    /* Each step waits for the one before it, but batches of one log are much of a length. */
    __builtin_prefetch(at + AHEAD * (uint64_t)header.length);
    __builtin_prefetch(at + AHEAD * (uint64_t)header.length + sizeof header - 8);
    if (header.length < sizeof header || header.length % 8 != 0 ||
        header.length > tail - table->position)
      return MS_BEHIND; /* the walk says what is wrong */
    if (counts(&header)) {
      if (header.producer >= table->count) return MS_BEHIND;
      ms_producers_note(table, header.producer, header.sequence);
    }
    table->position += header.length;
  }
  return table->position == tail ? MS_OK : MS_BEHIND;
}

ms_status ms_producers_try_admit(ms_producers *table, const ms_segment *active, uint64_t tail,
                                 uint32_t producer, uint64_t first, uint64_t *out_last) {
  if (table == NULL || producer >= table->count) return MS_BEHIND;
  if (MS_UNLIKELY(table->position != tail)) MS_TRY(catch_up(table, active, tail));
  uint64_t last = table->entries[producer].last;
  if (last <= first) return MS_OK;
  *out_last = last - 1;
  return MS_RESENT;
}

ms_status ms_producers_walk(ms_producers *table, ms_segment *segment, uint64_t limit,
                            uint32_t *out_producer, ms_error *err) {
  while (table->position < limit) {
    ms_view view;
    ms_batch_header header;
    MS_TRY(ms_segment_view(segment, table->position, limit, &view, err));
    memcpy(&header, view.bytes, sizeof header);
    if (counts(&header)) {
      if (header.producer > MS_PRODUCER_MAX)
        return ms_fail(err, MS_CORRUPT, table->position, MS_PRODUCER_MAX, header.producer,
                       "the batch at position %" PRIu64 " is of producer %u, the limit is %u",
                       table->position, header.producer, MS_PRODUCER_MAX);
      if (header.producer >= table->count) {
        *out_producer = header.producer;
        return MS_BEHIND;
      }
      ms_producers_note(table, header.producer, header.sequence);
    }
    table->position += view.length;
  }
  return MS_OK;
}
