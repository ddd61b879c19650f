/* XXH3-64, from the xxHash algorithm description; step names are those of that document.
 *
 * Thread rule: pure functions, no state. Invariants: (1) the value depends on bytes, size and seed
 * alone, never on alignment or CPU; (2) no byte outside [data, data + size) is read; (3) the
 * variants of consume_stripes() are interchangeable at every call. Four inputs, four ways:
 *
 *   0 to 16 bytes      one or two overlapping words, one multiplication or two
 *   17 to 128          16-byte chunks, paired from both ends
 *   129 to 240         16-byte chunks from the start, and the last 16 bytes
 *   241 and more       8 accumulators of 64 bits over 64-byte stripes: the only part with SIMD
 *
 * Does not stream: every caller has its bytes in one piece.
 */
#include "ms_xxh3.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "XXH3 reads little-endian words and the core does not swap"
#endif

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
#define PRIME_MX1 0x165667919E3779F9u
#define PRIME_MX2 0x9FB21C651E98DF25u

#define SECRET_BYTES 192u
#define STRIPE_BYTES 64u
#define LANES 8u
/* Each stripe of a block uses the secret 8 bytes further on, as long as 64 bytes are left. */
#define SECRET_STEP 8u
#define BLOCK_STRIPES ((SECRET_BYTES - STRIPE_BYTES) / SECRET_STEP)

/* The default secret. Aligned, since long unseeded input reads it as vectors. */
static const _Alignas(64) uint8_t default_secret[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* --- words --- */

/* ISO C has no 128-bit integer; gcc and clang do on every 64-bit CPU. */
__extension__ typedef unsigned __int128 uint128;

static inline uint32_t read32(const uint8_t *at) {
  uint32_t word;
  memcpy(&word, at, sizeof word);
  return word;
}

static inline uint64_t read64(const uint8_t *at) {
  uint64_t word;
  memcpy(&word, at, sizeof word);
  return word;
}

static inline uint64_t rotate_left(uint64_t word, unsigned bits) {
  return word << bits | word >> (64 - bits);
}

/* The full product of two words, its halves joined by xor, so that no input bit is shifted out. */
static inline uint64_t multiply_fold(uint64_t a, uint64_t b) {
  uint128 product = (uint128)a * b;
  return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* avalanche(): every input bit reaches every output bit. */
static inline uint64_t avalanche(uint64_t hash) {
  hash ^= hash >> 37;
  hash *= PRIME_MX1;
  return hash ^ hash >> 32;
}

/* That of XXH64 is the stronger one, for inputs that no multiplication has mixed yet. */
static inline uint64_t avalanche_xxh64(uint64_t hash) {
  hash ^= hash >> 33;
  hash *= PRIME64_2;
  hash ^= hash >> 29;
  hash *= PRIME64_3;
  return hash ^ hash >> 32;
}

/* --- small inputs, 0 to 16 bytes --- */

static inline uint64_t hash_0(uint64_t seed) {
  return avalanche_xxh64(seed ^ read64(default_secret + 56) ^ read64(default_secret + 64));
}

/* First, middle and last byte (maybe the same one) and the size tell all these inputs apart. */
static inline uint64_t hash_1to3(const uint8_t *input, size_t size, uint64_t seed) {
  uint32_t combined = (uint32_t)input[size - 1] | (uint32_t)size << 8 | (uint32_t)input[0] << 16 |
                      (uint32_t)input[size >> 1] << 24;
  uint64_t key = (uint64_t)(read32(default_secret) ^ read32(default_secret + 4)) + seed;
  return avalanche_xxh64(key ^ combined);
}

static inline uint64_t hash_4to8(const uint8_t *input, size_t size, uint64_t seed) {
  uint64_t modified_seed = seed ^ (uint64_t)__builtin_bswap32((uint32_t)seed) << 32;
  uint64_t key = (read64(default_secret + 8) ^ read64(default_secret + 16)) - modified_seed;
  uint64_t combined = read32(input + size - 4) | (uint64_t)read32(input) << 32;
  uint64_t hash = key ^ combined;
  hash ^= rotate_left(hash, 49) ^ rotate_left(hash, 24);
  hash *= PRIME_MX2;
  hash ^= (hash >> 35) + size;
  hash *= PRIME_MX2;
  return hash ^ hash >> 28;
}

static inline uint64_t hash_9to16(const uint8_t *input, size_t size, uint64_t seed) {
  uint64_t low_key = (read64(default_secret + 24) ^ read64(default_secret + 32)) + seed;
  uint64_t high_key = (read64(default_secret + 40) ^ read64(default_secret + 48)) - seed;
  uint64_t low = low_key ^ read64(input);
  uint64_t high = high_key ^ read64(input + size - 8);
  return avalanche(size + __builtin_bswap64(low) + high + multiply_fold(low, high));
}

/* --- medium inputs, 17 to 240 bytes --- */

/* A step of mixing: 16 bytes of input, 16 of secret and the seed, into one word. */
static inline uint64_t mix(const uint8_t *chunk, const uint8_t *secret, uint64_t seed) {
  return multiply_fold(read64(chunk) ^ (read64(secret) + seed),
                       read64(chunk + 8) ^ (read64(secret + 8) - seed));
}

/* Chunks paired from both ends; they overlap in the middle. The sum has no order, so the rounds
 * are nested tests instead of a loop that counts down. */
static inline uint64_t hash_17to128(const uint8_t *input, size_t size, uint64_t seed) {
  const uint8_t *end = input + size, *secret = default_secret;
  uint64_t sum = size * PRIME64_1;
  if (size > 32) {
    if (size > 64) {
      if (size > 96) sum += mix(input + 48, secret + 96, seed) + mix(end - 64, secret + 112, seed);
      sum += mix(input + 32, secret + 64, seed) + mix(end - 48, secret + 80, seed);
    }
    sum += mix(input + 16, secret + 32, seed) + mix(end - 32, secret + 48, seed);
  }
  sum += mix(input, secret, seed) + mix(end - 16, secret + 16, seed);
  return avalanche(sum);
}

/* Eight chunks, an avalanche between, the other full chunks with the secret from byte 3 on (so that
 * no two chunks meet the same secret words), and the last 16 bytes, maybe seen before. */
static uint64_t hash_129to240(const uint8_t *input, size_t size, uint64_t seed) {
  const uint8_t *secret = default_secret;
  uint64_t sum = size * PRIME64_1;
  for (size_t i = 0; i < 8; i++) sum += mix(input + 16 * i, secret + 16 * i, seed);
  sum = avalanche(sum);
  for (size_t i = 8; i < size / 16; i++)
    sum += mix(input + 16 * i, secret + 16 * (i - 8) + 3, seed);
  return avalanche(sum + mix(input + size - 16, secret + 119, seed));
}

/* --- large inputs, from 241 bytes: the accumulators --- */

/* One variant a CPU, all with this contract: accumulate `count` stripes into the 8 lanes, starting
 * at the beginning of a block, and scramble at the end of each full block. Per lane i of a stripe:
 *
 *   value = stripe[i] ^ secret[i]
 *   lane[i ^ 1] += stripe[i]         to the neighbour: a factor of zero must not lose the word
 *   lane[i] += low32(value) * high32(value)
 *
 * and to scramble: lane[i] = (lane[i] ^ lane[i] >> 47 ^ last_secret[i]) * PRIME32_1. */
typedef void consume_stripes(uint64_t lanes[LANES], const uint8_t *stripe, size_t count,
                             const uint8_t *secret);

/* Plain C. Compiled on every CPU, so that the tests can hold the others to it. */
__attribute__((unused)) static void consume_plain(uint64_t lanes[LANES], const uint8_t *stripe,
                                                  size_t count, const uint8_t *secret) {
  for (size_t n = 0; n < count; n++, stripe += STRIPE_BYTES) {
    const uint8_t *key = secret + n % BLOCK_STRIPES * SECRET_STEP;
    for (size_t i = 0; i < LANES; i++) {
      uint64_t word = read64(stripe + 8 * i), value = word ^ read64(key + 8 * i);
      lanes[i ^ 1] += word;
      lanes[i] += (value & 0xFFFFFFFFu) * (value >> 32);
    }
    if (n % BLOCK_STRIPES != BLOCK_STRIPES - 1) continue;
    const uint8_t *last_secret = secret + SECRET_BYTES - STRIPE_BYTES;
    for (size_t i = 0; i < LANES; i++)
      lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ read64(last_secret + 8 * i)) * PRIME32_1;
  }
}

/* Bytes ahead of the stripe that are asked into the cache. Past the end of the input it asks for
 * bytes that are not ours, which a prefetch may: it never faults. As an integer, since such a
 * pointer may not be formed. */
#define PREFETCH_BYTES 512u

#if defined(__x86_64__)

static void consume_sse2(uint64_t lanes[LANES], const uint8_t *stripe, size_t count,
                         const uint8_t *secret) {
  const __m128i prime = _mm_set1_epi32((int)PRIME32_1);
  __m128i sum[4]; /* two lanes each, in registers throughout */
  for (size_t v = 0; v < 4; v++) sum[v] = _mm_loadu_si128((const __m128i *)(const void *)lanes + v);
  while (count > 0) {
    size_t step_count = count < BLOCK_STRIPES ? count : BLOCK_STRIPES;
    for (size_t n = 0; n < step_count; n++, stripe += STRIPE_BYTES) {
      const __m128i *key = (const __m128i *)(const void *)(secret + n * SECRET_STEP);
      _mm_prefetch((const char *)((uintptr_t)stripe + PREFETCH_BYTES), _MM_HINT_T0);
      for (size_t v = 0; v < 4; v++) {
        __m128i words = _mm_loadu_si128((const __m128i *)(const void *)stripe + v);
        __m128i value = _mm_xor_si128(words, _mm_loadu_si128(key + v));
        __m128i product = _mm_mul_epu32(value, _mm_srli_epi64(value, 32));
        __m128i swapped = _mm_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2));
        sum[v] = _mm_add_epi64(sum[v], _mm_add_epi64(product, swapped));
      }
    }
    count -= step_count;
    if (step_count < BLOCK_STRIPES) break;
    const __m128i *key = (const __m128i *)(const void *)(secret + SECRET_BYTES - STRIPE_BYTES);
    for (size_t v = 0; v < 4; v++) {
      __m128i word = _mm_xor_si128(sum[v], _mm_srli_epi64(sum[v], 47));
      word = _mm_xor_si128(word, _mm_loadu_si128(key + v));
      /* 64 x 32 bits by two products of 32 x 32; the high half's own high half falls off. */
      __m128i high = _mm_mul_epu32(_mm_srli_epi64(word, 32), prime);
      sum[v] = _mm_add_epi64(_mm_mul_epu32(word, prime), _mm_slli_epi64(high, 32));
    }
  }
  for (size_t v = 0; v < 4; v++) _mm_storeu_si128((__m128i *)(void *)lanes + v, sum[v]);
}

/* The same with four lanes a vector. */
__attribute__((target("avx2"))) static void
consume_avx2(uint64_t lanes[LANES], const uint8_t *stripe, size_t count, const uint8_t *secret) {
  const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
  __m256i sum[2];
  for (size_t v = 0; v < 2; v++)
    sum[v] = _mm256_loadu_si256((const __m256i *)(const void *)lanes + v);
  while (count > 0) {
    size_t step_count = count < BLOCK_STRIPES ? count : BLOCK_STRIPES;
    for (size_t n = 0; n < step_count; n++, stripe += STRIPE_BYTES) {
      const __m256i *key = (const __m256i *)(const void *)(secret + n * SECRET_STEP);
      _mm_prefetch((const char *)((uintptr_t)stripe + PREFETCH_BYTES), _MM_HINT_T0);
      for (size_t v = 0; v < 2; v++) {
        __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)stripe + v);
        __m256i value = _mm256_xor_si256(words, _mm256_loadu_si256(key + v));
        __m256i product = _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32));
        __m256i swapped = _mm256_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2));
        sum[v] = _mm256_add_epi64(sum[v], _mm256_add_epi64(product, swapped));
      }
    }
    count -= step_count;
    if (step_count < BLOCK_STRIPES) break;
    const __m256i *key = (const __m256i *)(const void *)(secret + SECRET_BYTES - STRIPE_BYTES);
    for (size_t v = 0; v < 2; v++) {
      __m256i word = _mm256_xor_si256(sum[v], _mm256_srli_epi64(sum[v], 47));
      word = _mm256_xor_si256(word, _mm256_loadu_si256(key + v));
      __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(word, 32), prime);
      sum[v] = _mm256_add_epi64(_mm256_mul_epu32(word, prime), _mm256_slli_epi64(high, 32));
    }
  }
  for (size_t v = 0; v < 2; v++) _mm256_storeu_si256((__m256i *)(void *)lanes + v, sum[v]);
}

/* The compiler's run-time asks the CPU once, before main() or in dlopen(), so this is a load and a
 * test of a word that never changes again: no state of ours and no race. */
static inline consume_stripes *choose_consume(void) {
  return __builtin_cpu_supports("avx2") ? consume_avx2 : consume_sse2;
}

#elif defined(__aarch64__)

static void consume_neon(uint64_t lanes[LANES], const uint8_t *stripe, size_t count,
                         const uint8_t *secret) {
  const uint32x2_t prime = vdup_n_u32(PRIME32_1);
  uint64x2_t sum[4];
  for (size_t v = 0; v < 4; v++) sum[v] = vld1q_u64(lanes + 2 * v);
  while (count > 0) {
    size_t step_count = count < BLOCK_STRIPES ? count : BLOCK_STRIPES;
    for (size_t n = 0; n < step_count; n++, stripe += STRIPE_BYTES) {
      const uint8_t *key = secret + n * SECRET_STEP;
      __builtin_prefetch((const void *)((uintptr_t)stripe + PREFETCH_BYTES));
      for (size_t v = 0; v < 4; v++) {
        uint64x2_t words = vreinterpretq_u64_u8(vld1q_u8(stripe + 16 * v));
        uint64x2_t value = veorq_u64(words, vreinterpretq_u64_u8(vld1q_u8(key + 16 * v)));
        sum[v] = vaddq_u64(sum[v], vextq_u64(words, words, 1)); /* the words, swapped */
        sum[v] = vmlal_u32(sum[v], vmovn_u64(value), vshrn_n_u64(value, 32));
      }
    }
    count -= step_count;
    if (step_count < BLOCK_STRIPES) break;
    const uint8_t *key = secret + SECRET_BYTES - STRIPE_BYTES;
    for (size_t v = 0; v < 4; v++) {
      uint64x2_t word = veorq_u64(sum[v], vshrq_n_u64(sum[v], 47));
      word = veorq_u64(word, vreinterpretq_u64_u8(vld1q_u8(key + 16 * v)));
      uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(word, 32), prime), 32);
      sum[v] = vmlal_u32(high, vmovn_u64(word), prime);
    }
  }
  for (size_t v = 0; v < 4; v++) vst1q_u64(lanes + 2 * v, sum[v]);
}

static inline consume_stripes *choose_consume(void) { return consume_neon; }

#else

static inline consume_stripes *choose_consume(void) { return consume_plain; }

#endif

/* Words of the default secret plus and minus the seed, in turn. */
static inline void derive_secret(uint8_t secret[SECRET_BYTES], uint64_t seed) {
  for (size_t i = 0; i < SECRET_BYTES; i += 16) {
    uint64_t pair[2] = {read64(default_secret + i) + seed, read64(default_secret + i + 8) - seed};
    memcpy(secret + i, pair, sizeof pair);
  }
}

/* The final merge: the lanes in pairs, each multiplied and folded, summed. */
static inline uint64_t merge(const uint64_t lanes[LANES], const uint8_t *secret, uint64_t hash) {
  for (size_t i = 0; i < LANES; i += 2)
    hash +=
        multiply_fold(lanes[i] ^ read64(secret + 8 * i), lanes[i + 1] ^ read64(secret + 8 * i + 8));
  return avalanche(hash);
}

/* Not inlined: the short inputs must not pay for this stack frame. */
__attribute__((noinline)) static uint64_t hash_long(const uint8_t *input, size_t size,
                                                    uint64_t seed) {
  uint64_t lanes[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                           PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
  uint8_t derived[SECRET_BYTES];
  const uint8_t *secret = default_secret;
  if (seed != 0) { /* seed 0 derives the default secret */
    derive_secret(derived, seed);
    secret = derived;
  }
  consume_stripes *consume = choose_consume();
  /* All stripes but the last, full or not; so a last block is never scrambled, even when full. */
  consume(lanes, input, (size - 1) / STRIPE_BYTES, secret);
  /* The last 64 bytes as a stripe of their own, with secret from where no other stripe has it. */
  consume(lanes, input + size - STRIPE_BYTES, 1, secret + SECRET_BYTES - STRIPE_BYTES - 7);
  return merge(lanes, secret + 11, size * PRIME64_1);
}

uint64_t ms_xxh3_64(const void *data, size_t size, uint64_t seed) {
  const uint8_t *input = data;
  if (size > 240) return hash_long(input, size, seed);
  if (size > 128) return hash_129to240(input, size, seed);
  if (size > 16) return hash_17to128(input, size, seed);
  if (size > 8) return hash_9to16(input, size, seed);
  if (size >= 4) return hash_4to8(input, size, seed);
  if (size > 0) return hash_1to3(input, size, seed);
  return hash_0(seed);
}
