/* The table of deduplication keys: who claimed a key, until when. It outlives power cuts.
 *
 * One mapped file: the header's page, an owner word a stripe, then the stripes of
 * MS_DEDUP_STRIPE_ENTRIES entries (docs/format.md). A key belongs to one stripe; its word is held
 * for the length of one call, and no other word is taken meanwhile. A claim is PENDING until its
 * message is written, then it is DONE. Times are microseconds of the store's clock; an entry has
 * expired when `expires` is at or before now. Thread-safe but for init, open and recover.
 * Allocates nothing.
 *
 * MS_BUSY, of every call: the stripe's word is held by *out_owner. Call again, or sleep in
 * ms_owner_wait(ms_dedup_word()) and release it, or, with proof that the owner is dead, call
 * ms_dedup_take_over. MS_MOVED: the table is being or was copied to a larger one: map that one, or
 * copy it where there is none.
 */
#ifndef MS_DEDUP_H
#define MS_DEDUP_H

#include "ms_format.h"
#include "ms_owner.h"

#define MS_MAGIC_DEDUP MS_MAGIC('M', 'S', 'Q', 'D', 'E', 'D', 'U', '1')
#define MS_DEDUP_STRIPES_MAX (1u << 20) /* a power of two, as every number of stripes */

enum { MS_DEDUP_EMPTY = 0, MS_DEDUP_PENDING = 1, MS_DEDUP_DONE = 2 };

typedef struct ms_dedup {
  ms_dedup_header *header;
  _Atomic uint32_t *words;
  ms_dedup_entry *entries;
  uint32_t stripes;
} ms_dedup;

typedef struct ms_dedup_claim {
  uint64_t id;
  int64_t expires;
  uint32_t slot;  /* below 2^24 */
  uint32_t state; /* MS_DEDUP_PENDING or MS_DEDUP_DONE */
} ms_dedup_claim;

/* The bytes of a table. 0: not a power of two up to MS_DEDUP_STRIPES_MAX. */
uint64_t ms_dedup_size(uint32_t stripes);

/* Write the header onto ms_dedup_size(stripes) zeros: an empty table. */
void ms_dedup_init(void *bytes, uint32_t stripes, const uint8_t store_id[16], uint64_t queue_id);

/* Check the header against what is expected and set the table's pointers. bytes: aligned to a page.
 * MS_CORRUPT, MS_VERSION. Entries are not read: a torn one counts as empty where it is met. */
MS_MUST_USE ms_status ms_dedup_open(ms_dedup *table, void *bytes, uint64_t size,
                                    const uint8_t store_id[16], uint64_t queue_id, ms_error *err);

/* Free the words, empty torn entries and end a copy that was not finished, when nobody else can
 * have the table open: as the store's first opener. */
void ms_dedup_recover(const ms_dedup *table);

/* Read the entry at index, of all; false: it counts for nothing. drop: empty it. Only when nobody
 * else has the table open. */
bool ms_dedup_entry_at(const ms_dedup *table, uint32_t index, uint64_t out_key[2],
                       ms_dedup_claim *out);
void ms_dedup_drop(const ms_dedup *table, uint32_t index);
/* Likewise: the entry at index expires then. */
void ms_dedup_end_at(const ms_dedup *table, uint32_t index, int64_t expires);

/* The word of a key's stripe. */
_Atomic uint32_t *ms_dedup_word(const ms_dedup *table, const uint64_t key[2]);

/* Claim a key, as PENDING. MS_OK: it is the caller's. MS_END: *out_existing has it, unexpired.
 * MS_ROLL: the stripe is full of unexpired entries: copy to a table of more stripes. MS_BUSY,
 * MS_MOVED. */
MS_MUST_USE ms_status ms_dedup_try_claim(const ms_dedup *table, uint32_t self,
                                         const uint64_t key[2], const ms_dedup_claim *claim,
                                         int64_t now_us, ms_dedup_claim *out_existing,
                                         uint32_t *out_owner);

/* Read only: MS_OK with *out_existing, MS_END: no unexpired claim. MS_BUSY, MS_MOVED. */
MS_MUST_USE ms_status ms_dedup_try_find(const ms_dedup *table, uint32_t self, const uint64_t key[2],
                                        int64_t now_us, ms_dedup_claim *out_existing,
                                        uint32_t *out_owner);

/* The claim of this id becomes DONE, or void, which empties it unless it is DONE. MS_END: the key
 * is not claimed by this id (any more). MS_BUSY, MS_MOVED. */
MS_MUST_USE ms_status ms_dedup_try_end(const ms_dedup *table, uint32_t self, const uint64_t key[2],
                                       uint64_t id, bool done, uint32_t *out_owner);

/* Free a stripe's word (of `table`) from an owner that is proved dead, and empty what it left torn.
 * MS_BUSY: the word has changed hands since. */
MS_MUST_USE ms_status ms_dedup_take_over(const ms_dedup *table, _Atomic uint32_t *word,
                                         uint32_t self, uint32_t dead, uint32_t *out_owner);

/* Copy the unexpired entries to an empty table of at least as many stripes that nobody else uses
 * yet. From here on every other call on `from` gives MS_MOVED. Begins at *in_out_stripe. MS_BUSY:
 * it stands at that stripe, whose word is from->words[*in_out_stripe]; call again. MS_INVALID: `to`
 * has fewer stripes; MS_ROLL: `to` was not empty. Doing it all again from stripe 0 is harmless.
 * The caller lets nobody else copy. */
MS_MUST_USE ms_status ms_dedup_copy(const ms_dedup *from, const ms_dedup *to, uint32_t self,
                                    int64_t now_us, uint32_t *in_out_stripe, uint32_t *out_owner);

/* The copy was given up: `from` is in use again. Not once somebody may have mapped the copy. */
void ms_dedup_thaw(const ms_dedup *from);

/* Do the invariants hold? For tests, at rest: words free, entries whole, in their stripe, once. */
bool ms_dedup_check(const ms_dedup *table);

#endif
