/* The table of deduplication keys. An entry is read and written under its stripe's word.
 *
 * Invariants: (1) An entry counts if and only if its state is PENDING or DONE and its check is that
 * of key, id, expires and slot. (2) A key has at most one entry that counts, in the stripe that its
 * low bits name: a claim takes the place of the key's expired one first. (3) A table that has been
 * REPLACED is not changed: the one who copies sets that before it takes the first word, and
 * everybody else reads it under a word.
 * Crash: an entry is written state 0, fields, check, state, so a dead owner leaves it empty or
 * whole, except for the word. A power cut keeps any mixture of old and new bytes: the check finds
 * it, or one of the two states is there; the finder of a claim asks the slot.
 * Stripes are a power of two, so a larger table spreads one old stripe over several of its own, and
 * a copy always fits. Knows no messages and no members.
 */
#include "ms_dedup.h"

#include <string.h>

#include "ms_xxh3.h"

enum { CHECKED_BYTES = offsetof(ms_dedup_entry, check) };

static uint64_t entries_position(uint32_t stripes) {
  uint64_t end = MS_PAGE_BYTES + (uint64_t)stripes * sizeof(uint32_t);
  return (end + MS_PAGE_BYTES - 1) / MS_PAGE_BYTES * MS_PAGE_BYTES;
}

static uint64_t checksum_of(const ms_dedup_header *header) {
  return ms_xxh3_64(header, offsetof(ms_dedup_header, checksum), 0);
}

static uint32_t stripe_of(const ms_dedup *table, const uint64_t key[2]) {
  return (uint32_t)(key[0] & (table->stripes - 1));
}

static ms_dedup_entry *entries_of(const ms_dedup *table, uint32_t stripe) {
  return table->entries + (size_t)stripe * MS_DEDUP_STRIPE_ENTRIES;
}

/* --- entries, under the word ------------------------------------------------------------------ */

static uint32_t state_of(const ms_dedup_entry *entry) { return entry->place & 3; }

static bool is_used(const ms_dedup_entry *entry) {
  return state_of(entry) == MS_DEDUP_PENDING || state_of(entry) == MS_DEDUP_DONE;
}

static uint32_t check_of(const ms_dedup_entry *entry, uint32_t slot) {
  return (uint32_t)ms_xxh3_64(entry, CHECKED_BYTES, slot);
}

static bool is_whole(const ms_dedup_entry *entry) {
  return is_used(entry) && entry->check == check_of(entry, entry->place >> 2);
}

static bool has_key(const ms_dedup_entry *entry, const uint64_t key[2]) {
  return entry->key[0] == key[0] && entry->key[1] == key[1];
}

/* The whole entry of a key, expired or not, or NULL. */
static ms_dedup_entry *find(ms_dedup_entry *entries, const uint64_t key[2]) {
  for (uint32_t i = 0; i < MS_DEDUP_STRIPE_ENTRIES; i++)
    if (MS_UNLIKELY(has_key(&entries[i], key)) && is_whole(&entries[i])) return &entries[i];
  return NULL;
}

/* An entry that may be written over, or NULL. Torn ones are searched for last: that is dear. */
static ms_dedup_entry *find_room(ms_dedup_entry *entries, int64_t now_us) {
  for (uint32_t i = 0; i < MS_DEDUP_STRIPE_ENTRIES; i++)
    if (!is_used(&entries[i]) || entries[i].expires <= now_us) return &entries[i];
  for (uint32_t i = 0; i < MS_DEDUP_STRIPE_ENTRIES; i++)
    if (!is_whole(&entries[i])) return &entries[i];
  return NULL;
}

static void set_place(ms_dedup_entry *entry, uint32_t slot, uint32_t state) {
  /* Fences for the compiler: a death falls between two instructions, and whoever takes over the
   * word sees all before it and none behind it. The living see it by the word. */
  atomic_signal_fence(memory_order_seq_cst);
  entry->place = slot << 2 | state;
  atomic_signal_fence(memory_order_seq_cst);
}

static void write_entry(ms_dedup_entry *entry, const uint64_t key[2], const ms_dedup_claim *claim) {
  set_place(entry, 0, MS_DEDUP_EMPTY);
  MS_YIELD("dedup_emptied");
  memcpy(entry->key, key, sizeof entry->key);
  entry->id = claim->id;
  MS_YIELD("dedup_half");
  entry->expires = claim->expires;
  entry->check = check_of(entry, claim->slot);
  MS_YIELD("dedup_written");
  set_place(entry, claim->slot, claim->state);
}

static void read_entry(const ms_dedup_entry *entry, ms_dedup_claim *out) {
  *out = (ms_dedup_claim){entry->id, entry->expires, entry->place >> 2, state_of(entry)};
}

static void empty_torn(ms_dedup_entry *entries) {
  for (uint32_t i = 0; i < MS_DEDUP_STRIPE_ENTRIES; i++)
    if (state_of(&entries[i]) != MS_DEDUP_EMPTY && !is_whole(&entries[i]))
      set_place(&entries[i], 0, MS_DEDUP_EMPTY);
}

/* Take a stripe's word of a table that is in use. */
static ms_status take(const ms_dedup *table, uint32_t stripe, uint32_t self, uint32_t *out_owner) {
  MS_TRY(ms_owner_try_take(&table->words[stripe], self, out_owner));
  /* Relaxed: the word orders it, see (3). */
  if (MS_LIKELY(atomic_load_explicit(&table->header->state, memory_order_relaxed) !=
                MS_CONTROL_REPLACED))
    return MS_OK;
  ms_owner_release(&table->words[stripe]);
  return MS_MOVED;
}

/* --- the file --------------------------------------------------------------------------------- */

uint64_t ms_dedup_size(uint32_t stripes) {
  if (stripes == 0 || stripes > MS_DEDUP_STRIPES_MAX || (stripes & (stripes - 1)) != 0) return 0;
  uint64_t entry_bytes = MS_DEDUP_STRIPE_ENTRIES * sizeof(ms_dedup_entry);
  return entries_position(stripes) + stripes * entry_bytes;
}

void ms_dedup_init(void *bytes, uint32_t stripes, const uint8_t store_id[16], uint64_t queue_id) {
  ms_dedup_header *header = bytes;
  header->magic = MS_MAGIC_DEDUP;
  header->version = MS_FORMAT_VERSION;
  header->stripes = stripes;
  memcpy(header->store_id, store_id, sizeof header->store_id);
  header->queue_id = queue_id;
  header->checksum = checksum_of(header);
  atomic_store_explicit(&header->state, MS_CONTROL_LIVE, memory_order_relaxed); /* not shared yet */
}

ms_status ms_dedup_open(ms_dedup *table, void *bytes, uint64_t size, const uint8_t store_id[16],
                        uint64_t queue_id, ms_error *err) {
  ms_dedup_header *header = bytes;
  if (size < MS_PAGE_BYTES)
    return ms_fail(err, MS_CORRUPT, 0, MS_PAGE_BYTES, size, "dedup: shorter than a header");
  if (header->magic != MS_MAGIC_DEDUP)
    return ms_fail(err, MS_CORRUPT, 0, MS_MAGIC_DEDUP, header->magic, "dedup: magic");
  if (header->version > MS_FORMAT_VERSION)
    return ms_fail(err, MS_VERSION, 8, MS_FORMAT_VERSION, header->version, "dedup: version");
  uint64_t checksum = checksum_of(header);
  if (header->checksum != checksum)
    return ms_fail(err, MS_CORRUPT, 40, checksum, header->checksum, "dedup: header checksum");
  if (memcmp(header->store_id, store_id, sizeof header->store_id) != 0 ||
      header->queue_id != queue_id)
    return ms_fail(err, MS_CORRUPT, 32, queue_id, header->queue_id, "dedup: of another queue");
  uint32_t stripes = header->stripes;
  uint64_t wanted = ms_dedup_size(stripes);
  if (wanted == 0 || size < wanted)
    return ms_fail(err, MS_CORRUPT, 12, wanted, size, "dedup: size of %u stripes", stripes);
  uint8_t *start = bytes;
  table->header = header;
  table->words = (_Atomic uint32_t *)(void *)(start + MS_PAGE_BYTES);
  table->entries = (ms_dedup_entry *)(void *)(start + entries_position(stripes));
  table->stripes = stripes;
  return MS_OK;
}

void ms_dedup_recover(const ms_dedup *table) {
  for (uint32_t stripe = 0; stripe < table->stripes; stripe++) {
    /* Relaxed: nobody else is there. */
    atomic_store_explicit(&table->words[stripe], MS_OWNER_FREE, memory_order_relaxed);
    empty_torn(entries_of(table, stripe));
  }
  ms_dedup_thaw(table);
}

bool ms_dedup_entry_at(const ms_dedup *table, uint32_t index, uint64_t out_key[2],
                       ms_dedup_claim *out) {
  const ms_dedup_entry *entry = &table->entries[index];
  if (!is_whole(entry)) return false;
  memcpy(out_key, entry->key, sizeof entry->key);
  read_entry(entry, out);
  return true;
}

void ms_dedup_drop(const ms_dedup *table, uint32_t index) {
  set_place(&table->entries[index], 0, MS_DEDUP_EMPTY);
}

void ms_dedup_end_at(const ms_dedup *table, uint32_t index, int64_t expires) {
  uint64_t key[2];
  ms_dedup_claim claim;
  if (!ms_dedup_entry_at(table, index, key, &claim)) return;
  claim.expires = expires;
  write_entry(&table->entries[index], key, &claim);
}

_Atomic uint32_t *ms_dedup_word(const ms_dedup *table, const uint64_t key[2]) {
  return &table->words[stripe_of(table, key)];
}

/* --- claims ----------------------------------------------------------------------------------- */

ms_status ms_dedup_try_claim(const ms_dedup *table, uint32_t self, const uint64_t key[2],
                             const ms_dedup_claim *claim, int64_t now_us,
                             ms_dedup_claim *out_existing, uint32_t *out_owner) {
  uint32_t stripe = stripe_of(table, key);
  MS_TRY(take(table, stripe, self, out_owner));
  ms_dedup_entry *entry = find(entries_of(table, stripe), key);
  ms_status status = MS_OK;
  if (entry != NULL && entry->expires > now_us) {
    read_entry(entry, out_existing);
    status = MS_END;
  } else {
    if (entry == NULL) entry = find_room(entries_of(table, stripe), now_us);
    ms_dedup_claim pending = *claim;
    pending.state = MS_DEDUP_PENDING;
    if (entry != NULL)
      write_entry(entry, key, &pending);
    else
      status = MS_ROLL;
  }
  ms_owner_release(&table->words[stripe]);
  return status;
}

ms_status ms_dedup_try_find(const ms_dedup *table, uint32_t self, const uint64_t key[2],
                            int64_t now_us, ms_dedup_claim *out_existing, uint32_t *out_owner) {
  uint32_t stripe = stripe_of(table, key);
  MS_TRY(take(table, stripe, self, out_owner));
  const ms_dedup_entry *entry = find(entries_of(table, stripe), key);
  bool found = entry != NULL && entry->expires > now_us;
  if (found) read_entry(entry, out_existing);
  ms_owner_release(&table->words[stripe]);
  return found ? MS_OK : MS_END;
}

ms_status ms_dedup_try_end(const ms_dedup *table, uint32_t self, const uint64_t key[2], uint64_t id,
                           bool done, uint32_t *out_owner) {
  uint32_t stripe = stripe_of(table, key);
  MS_TRY(take(table, stripe, self, out_owner));
  ms_dedup_entry *entry = find(entries_of(table, stripe), key);
  bool found = entry != NULL && entry->id == id;
  if (found && done) set_place(entry, entry->place >> 2, MS_DEDUP_DONE);
  if (found && !done && state_of(entry) == MS_DEDUP_PENDING) set_place(entry, 0, MS_DEDUP_EMPTY);
  ms_owner_release(&table->words[stripe]);
  return found ? MS_OK : MS_END;
}

ms_status ms_dedup_take_over(const ms_dedup *table, _Atomic uint32_t *word, uint32_t self,
                             uint32_t dead, uint32_t *out_owner) {
  MS_TRY(ms_owner_take_over(word, self, dead, out_owner));
  empty_torn(entries_of(table, (uint32_t)(word - table->words)));
  ms_owner_release(word);
  return MS_OK;
}

/* --- copies ----------------------------------------------------------------------------------- */

static ms_status copy_stripe(ms_dedup_entry *entries, const ms_dedup *to, int64_t now_us) {
  for (uint32_t i = 0; i < MS_DEDUP_STRIPE_ENTRIES; i++) {
    if (!is_whole(&entries[i]) || entries[i].expires <= now_us) continue;
    ms_dedup_entry *there = entries_of(to, stripe_of(to, entries[i].key));
    ms_dedup_entry *entry = find(there, entries[i].key);
    if (entry == NULL) entry = find_room(there, now_us);
    if (entry == NULL) return MS_ROLL;
    ms_dedup_claim claim;
    read_entry(&entries[i], &claim);
    write_entry(entry, entries[i].key, &claim);
  }
  return MS_OK;
}

ms_status ms_dedup_copy(const ms_dedup *from, const ms_dedup *to, uint32_t self, int64_t now_us,
                        uint32_t *in_out_stripe, uint32_t *out_owner) {
  if (to->stripes < from->stripes) return MS_INVALID;
  /* Relaxed: each word that is released below carries it, see (3). */
  atomic_store_explicit(&from->header->state, MS_CONTROL_REPLACED, memory_order_relaxed);
  for (; *in_out_stripe < from->stripes; ++*in_out_stripe) {
    _Atomic uint32_t *word = &from->words[*in_out_stripe];
    MS_TRY(ms_owner_try_take(word, self, out_owner));
    MS_YIELD("dedup_copy");
    ms_status status = copy_stripe(entries_of(from, *in_out_stripe), to, now_us);
    ms_owner_release(word);
    MS_TRY(status);
  }
  return MS_OK;
}

void ms_dedup_thaw(const ms_dedup *from) {
  /* Relaxed: entries did not change meanwhile. */
  atomic_store_explicit(&from->header->state, MS_CONTROL_LIVE, memory_order_relaxed);
}

bool ms_dedup_check(const ms_dedup *table) {
  for (uint32_t stripe = 0; stripe < table->stripes; stripe++) {
    ms_dedup_entry *entries = entries_of(table, stripe);
    if (atomic_load_explicit(&table->words[stripe], memory_order_acquire) != MS_OWNER_FREE)
      return false; /* acquire: pairs with ms_owner_release */
    for (uint32_t i = 0; i < MS_DEDUP_STRIPE_ENTRIES; i++) {
      if (state_of(&entries[i]) == MS_DEDUP_EMPTY) continue;
      if (!is_whole(&entries[i]) || stripe_of(table, entries[i].key) != stripe) return false;
      if (find(entries, entries[i].key) != &entries[i]) return false;
    }
  }
  return true;
}
