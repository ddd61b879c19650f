/* The last value of each key, in memory of this process: where a view looks keys up.
 *
 * Two places in memory are touched for a key: its entry, and its record with key and value in one
 * piece. Records lie in chunks, one behind the other; when most of them are superseded those that
 * are not move together. Allocates; knows no files. Any number of threads may find at once, while
 * nobody puts or removes.
 */
#ifndef MS_LATEST_H
#define MS_LATEST_H

#include "ms_format.h"
#include "ms_status.h"

/* Whose word the value of a key is. */
typedef enum ms_latest_origin {
  MS_LATEST_HOME = 0,  /* of the partition to which the key belongs now */
  MS_LATEST_STRAY = 1, /* of another one, or of what it belonged to before */
  MS_LATEST_GONE = 2   /* while all is loaded: its own partition says that it has none */
} ms_latest_origin;

/* Key and value lie behind it. */
typedef struct ms_latest_record {
  uint32_t key_size : 24;
  uint32_t origin : 8;
  uint32_t value_size;
} ms_latest_record;
_Static_assert(MS_KEY_BYTES_MAX < 1 << 24, "a key's size has 24 bits");

typedef struct ms_latest_entry {
  uint64_t hash;
  ms_latest_record *record; /* NULL: free */
} ms_latest_entry;

typedef struct ms_latest_chunk ms_latest_chunk;

/* All zero is an empty table. */
typedef struct ms_latest {
  ms_latest_entry *entries;
  uint64_t capacity; /* a power of two, or 0 */
  uint64_t count;
  uint64_t seed; /* random, so that nobody can choose keys that collide */
  uint64_t key_bytes, value_bytes;
  ms_latest_chunk *chunk;         /* that is filled now; it knows the one before it */
  uint64_t live_bytes, all_bytes; /* of records */
} ms_latest;

static inline const uint8_t *ms_latest_key(const ms_latest_record *record) {
  return (const uint8_t *)(record + 1);
}
static inline const uint8_t *ms_latest_value(const ms_latest_record *record) {
  return (const uint8_t *)(record + 1) + record->key_size;
}

/* The record of a key, until the next put or remove; NULL: there is none. */
const ms_latest_record *ms_latest_find(const ms_latest *table, const uint8_t *key,
                                       uint32_t key_size);

/* The key has this value now; both are copied. MS_NOMEM: nothing was changed. */
MS_MUST_USE ms_status ms_latest_put(ms_latest *table, const uint8_t *key, uint32_t key_size,
                                    const uint8_t *value, uint32_t value_size,
                                    ms_latest_origin origin);

/* The key has no value any more. False: it had none. */
bool ms_latest_remove(ms_latest *table, const uint8_t *key, uint32_t key_size);

/* Take out the keys that are gone. With `moved` keys belong elsewhere from now on: what is there is
 * of strays. */
void ms_latest_end_era(ms_latest *table, bool moved);

/* Give all memory back; the table is empty, its seed stays. */
void ms_latest_clear(ms_latest *table);

#endif
