/* XXH3-64: the hash under keys and checksums.
 *
 * Written from the algorithm description of the xxHash project (its specification, section "XXH3"),
 * with its default secret. The value is part of the stored format and of partition_for():
 * it is that of xxhash.xxh3_64_intdigest(data, seed=seed), for ever and on every CPU.
 */
#ifndef MS_XXH3_H
#define MS_XXH3_H

#include <stddef.h>
#include <stdint.h>

/* Hash `size` bytes; `data` may be unaligned, and NULL when size is 0. Every 64-bit seed is valid
 * and gives an unrelated hash; 0 is the unseeded hash.
 * Thread: any; a pure function of its arguments. Never allocates, fails or blocks; reads exactly
 * [data, data + size), which must not change meanwhile for the value to mean anything. Takes at
 * most 1 KiB of stack. Not for adversaries: whoever knows the seed can make collisions. */
uint64_t ms_xxh3_64(const void *data, size_t size, uint64_t seed);

#endif
