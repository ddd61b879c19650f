/* Open addressing with linear probing; what is removed is closed up, so that there are no graves.
 *
 * Invariants: (1) no free entry lies between the place that a hash asks for and its entry. (2) At
 * most 3 of 4 entries are used, so that a search ends.
 */
#include "ms_latest.h"

#include <stdlib.h>
#include <string.h>

#include "ms_xxh3.h"

enum { CAPACITY_MIN = 64 };

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
  ms_latest_entry *entries = calloc(capacity, sizeof *entries);
  if (entries == NULL) return MS_NOMEM;
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
                        const uint8_t *value, uint32_t value_size) {
  if (table->count >= table->capacity / 4 * 3) MS_TRY(grow(table));
  uint64_t hash = hash_of(table, key, key_size);
  ms_latest_entry *entry = entry_of(table, hash, key, key_size);
  ms_latest_record *before = entry->record;
  if (before == NULL || before->value_size != value_size) {
    ms_latest_record *record = malloc(sizeof *record + (size_t)key_size + value_size);
    if (record == NULL) return MS_NOMEM;
    *record = (ms_latest_record){key_size, value_size};
    if (key_size > 0) memcpy(record + 1, key, key_size);
    if (before != NULL) {
      table->value_bytes -= before->value_size;
      free(before);
    } else {
      table->count++;
      table->key_bytes += key_size;
    }
    table->value_bytes += value_size;
    *entry = (ms_latest_entry){hash, record};
  }
  if (value_size > 0) memcpy((uint8_t *)(entry->record + 1) + key_size, value, value_size);
  return MS_OK;
}

bool ms_latest_remove(ms_latest *table, const uint8_t *key, uint32_t key_size) {
  if (table->count == 0) return false;
  ms_latest_entry *entry = entry_of(table, hash_of(table, key, key_size), key, key_size);
  if (entry->record == NULL) return false;
  table->count--;
  table->key_bytes -= key_size;
  table->value_bytes -= entry->record->value_size;
  free(entry->record);
  const uint64_t mask = table->capacity - 1;
  uint64_t hole = (uint64_t)(entry - table->entries);
  for (uint64_t at = (hole + 1) & mask; table->entries[at].record != NULL; at = (at + 1) & mask) {
    /* Who asks for a place behind the hole stays where it is. */
    uint64_t wanted = table->entries[at].hash & mask;
    if (((at - wanted) & mask) < ((at - hole) & mask)) continue;
    table->entries[hole] = table->entries[at];
    hole = at;
  }
  table->entries[hole] = (ms_latest_entry){0};
  return true;
}

void ms_latest_clear(ms_latest *table) {
  for (uint64_t i = 0; i < table->capacity; i++) free(table->entries[i].record);
  free(table->entries);
  *table = (ms_latest){.seed = table->seed};
}
