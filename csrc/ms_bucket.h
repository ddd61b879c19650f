/* The messages of a key in their order: a list of slots a bucket, under a short word.
 *
 * The holder of a bucket's word alone changes its list. Where the queue has no buckets, or the
 * message no key, every function says that the message stands first.
 */
#ifndef MS_BUCKET_H
#define MS_BUCKET_H

#include "ms_queue.h"

/* Take the bucket of a key, spinning shortly. MS_OK also where the queue has no buckets. */
MS_MUST_USE ms_status ms_bucket_try_take(ms_queue *queue, uint64_t key_hash, uint32_t *out_owner);
void ms_bucket_release(ms_queue *queue, uint64_t key_hash);
/* Put the slot last; true: it is the only one. Holder of the bucket, and of the slot: nobody else
 * may free it meanwhile. */
bool ms_bucket_append(ms_queue *queue, uint64_t key_hash, uint32_t slot);
/* Move the word of a slot that stands in no list then, take it out, and ready the next one if it
 * was the first. False: the word was another, and nothing was changed. Holder of the bucket. */
bool ms_bucket_leave(ms_queue *queue, uint64_t key_hash, uint32_t slot, uint64_t word, uint64_t to,
                     const ms_instant *now);
/* Is it the first of its key? Also where there are no buckets. Holder. */
bool ms_bucket_is_first(const ms_queue *queue, uint64_t key_hash, uint32_t slot);
/* Does a message with this word belong into a list? */
bool ms_bucket_has(const ms_queue *queue, uint64_t word);
/* Make the list anew from the words; what a dead owner left is not trusted. Holder. */
void ms_bucket_rebuild(ms_queue *queue, uint32_t bucket, const ms_instant *now);

#endif
