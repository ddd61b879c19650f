/* Open addressing with linear probing; a removal closes the gap that it leaves.
 *
 * Invariants: (1) no free entry lies between the place that a hash asks for and its entry. (2) At
 * most 3 of 4 entries are used, so that a search ends.
 */
#include "ms_latest.h"

#include <stdlib.h>
#include <string.h>

#include "ms_xxh3.h"

enum { CAPACITY_MIN = 64 };
enum { CHUNK_BYTES_MIN = 4096, CHUNK_BYTES = 2 << 20 };
enum { DEAD_BYTES_MIN = 1 << 20 }; /* fewer are not worth moving the others for */

struct ms_latest_chunk {
  ms_latest_chunk *before;
  uint64_t size, used; /* with this header */
};

static uint64_t bytes_of(uint32_t key_size, uint32_t value_size) {
  return (sizeof(ms_latest_record) + (uint64_t)key_size + value_size + 7) & ~(uint64_t)7;
}

/* Room for a record in the chunk, or in a new one. */
static ms_latest_record *take_room(ms_latest_chunk **chunk, uint64_t bytes) {
  ms_latest_chunk *to = *chunk;
  if (to == NULL || bytes > to->size - to->used) {
    uint64_t size = to == NULL ? CHUNK_BYTES_MIN : 2 * to->size;
    if (size > CHUNK_BYTES) size = CHUNK_BYTES;
    if (size < bytes + sizeof *to) size = bytes + sizeof *to;
    to = ms_memory_huge(size);
    if (to == NULL) return NULL;
    *to = (ms_latest_chunk){.before = *chunk, .size = size, .used = sizeof *to};
    *chunk = to;
  }
  void *room = (uint8_t *)to + to->used;
  to->used += bytes;
  return room;
}

static void free_chunks(ms_latest_chunk *chunk) {
  while (chunk != NULL) {
    ms_latest_chunk *before = chunk->before;
    free(chunk);
    chunk = before;
  }
}

/* Move the records that count together, and give the memory of the others back. Without memory for
 * that they stay where they are. */
static void move_together(ms_latest *table) {
  ms_latest_chunk *chunk = NULL;
  ms_latest_record **moved = malloc(table->capacity * sizeof(ms_latest_record *));
  if (moved == NULL) return;
  for (uint64_t i = 0; i < table->capacity; i++) {
    const ms_latest_record *record = table->entries[i].record;
    if (record == NULL) continue;
    uint64_t bytes = bytes_of(record->key_size, record->value_size);
    moved[i] = take_room(&chunk, bytes);
    if (moved[i] == NULL) {
      free_chunks(chunk);
      free(moved);
      return;
    }
    memcpy(moved[i], record, bytes);
  }
  for (uint64_t i = 0; i < table->capacity; i++)
    if (table->entries[i].record != NULL) table->entries[i].record = moved[i];
  free(moved);
  free_chunks(table->chunk);
  table->chunk = chunk;
  table->all_bytes = table->live_bytes;
}

static uint64_t hash_of(const ms_latest *table, const uint8_t *key, uint32_t key_size) {
  return ms_xxh3_64(key, key_size, table->seed);
}

/* The entry of the key, or the free one where it would be. */
static ms_latest_entry *entry_of(const ms_latest *table, uint64_t hash, const uint8_t *key,
                                 uint32_t key_size) {
  const uint64_t mask = table->capacity - 1;
  for (uint64_t at = hash & mask;; at = (at + 1) & mask) {
    ms_latest_entry *entry = &table->entries[at];
    if (entry->record == NULL) return entry;
    if (entry->hash == hash && entry->record->key_size == key_size &&
        memcmp(ms_latest_key(entry->record), key, key_size) == 0)
      return entry;
  }
}

const ms_latest_record *ms_latest_find(const ms_latest *table, const uint8_t *key,
                                       uint32_t key_size) {
  if (table->count == 0) return NULL;
  return entry_of(table, hash_of(table, key, key_size), key, key_size)->record;
}

static ms_status grow(ms_latest *table) {
  uint64_t capacity = table->capacity > 0 ? 2 * table->capacity : CAPACITY_MIN;
  ms_latest_entry *entries = ms_memory_huge(capacity * sizeof *entries);
  if (entries == NULL) return MS_NOMEM;
  memset(entries, 0, capacity * sizeof *entries);
  for (uint64_t i = 0; i < table->capacity; i++) {
    if (table->entries[i].record == NULL) continue;
    uint64_t at = table->entries[i].hash & (capacity - 1);
    while (entries[at].record != NULL) at = (at + 1) & (capacity - 1);
    entries[at] = table->entries[i];
  }
  free(table->entries);
  table->entries = entries;
  table->capacity = capacity;
  return MS_OK;
}

ms_status ms_latest_put(ms_latest *table, const uint8_t *key, uint32_t key_size,
                        const uint8_t *value, uint32_t value_size, ms_latest_origin origin) {
  if (table->count >= table->capacity / 4 * 3) MS_TRY(grow(table));
  uint64_t hash = hash_of(table, key, key_size);
  ms_latest_entry *entry = entry_of(table, hash, key, key_size);
  ms_latest_record *before = entry->record;
  if (before == NULL || before->value_size != value_size) {
    uint64_t bytes = bytes_of(key_size, value_size);
    ms_latest_record *record = take_room(&table->chunk, bytes);
    if (record == NULL) return MS_NOMEM;
    memset((uint8_t *)record + bytes - 8, 0, 8); /* what rounding leaves is copied, too */
    *record = (ms_latest_record){.key_size = key_size & 0xffffff, .value_size = value_size};
    if (key_size > 0) memcpy(record + 1, key, key_size);
    table->live_bytes += bytes;
    table->all_bytes += bytes;
    if (before != NULL) {
      table->value_bytes -= before->value_size;
      table->live_bytes -= bytes_of(key_size, before->value_size);
    } else {
      table->count++;
      table->key_bytes += key_size;
    }
    table->value_bytes += value_size;
    *entry = (ms_latest_entry){hash, record};
  }
  entry->record->origin = origin;
  if (value_size > 0) memcpy((uint8_t *)(entry->record + 1) + key_size, value, value_size);
  if (table->all_bytes > DEAD_BYTES_MIN && table->all_bytes / 2 > table->live_bytes)
    move_together(table);
  return MS_OK;
}

/* Take an entry out, and close up what lies behind it. */
static void take_out(ms_latest *table, ms_latest_entry *entry) {
  const ms_latest_record *record = entry->record;
  table->count--;
  table->key_bytes -= record->key_size;
  table->value_bytes -= record->value_size;
  table->live_bytes -= bytes_of(record->key_size, record->value_size);
  const uint64_t mask = table->capacity - 1;
  uint64_t hole = (uint64_t)(entry - table->entries);
  for (uint64_t at = (hole + 1) & mask; table->entries[at].record != NULL; at = (at + 1) & mask) {
    /* An entry whose place is behind the hole stays where it is. */
    uint64_t wanted = table->entries[at].hash & mask;
    if (((at - wanted) & mask) < ((at - hole) & mask)) continue;
    table->entries[hole] = table->entries[at];
    hole = at;
  }
  table->entries[hole] = (ms_latest_entry){0};
}

bool ms_latest_remove(ms_latest *table, const uint8_t *key, uint32_t key_size) {
  if (table->count == 0) return false;
  ms_latest_entry *entry = entry_of(table, hash_of(table, key, key_size), key, key_size);
  if (entry->record == NULL) return false;
  take_out(table, entry);
  return true;
}

void ms_latest_end_era(ms_latest *table, bool moved) {
  for (uint64_t i = 0; i < table->capacity; i++) {
    /* Another one may have moved up to its place. */
    while (table->entries[i].record != NULL && table->entries[i].record->origin == MS_LATEST_GONE)
      take_out(table, &table->entries[i]);
    if (moved && table->entries[i].record != NULL)
      table->entries[i].record->origin = MS_LATEST_STRAY;
  }
}

void ms_latest_clear(ms_latest *table) {
  free_chunks(table->chunk);
  free(table->entries);
  *table = (ms_latest){.seed = table->seed};
}
