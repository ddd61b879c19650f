/* XXH3-64 against values of the xxhash package (0.8 of the C library), and its variants against
 * each other. The source is included, under another public name, to reach the variants that this
 * CPU would not choose; the table is checked against the one that the library links. */
#define ms_xxh3_64 included_xxh3_64
#include "ms_xxh3.c"
#undef ms_xxh3_64

#include "check.h"

uint64_t ms_xxh3_64(const void *data, size_t size, uint64_t seed);

#define INPUT_BYTES 100001u
static uint8_t input[INPUT_BYTES + 64];

/* Bytes that Python makes as easily: the top bytes of a linear congruential generator. */
static void fill_input(uint8_t *at) {
  uint64_t word = 0;
  for (size_t i = 0; i < INPUT_BYTES; i++) {
    word = word * 6364136223846793005u + 1442695040888963407u;
    at[i] = (uint8_t)(word >> 56);
  }
}

static const uint64_t seeds[4] = {0, 1, 0x0123456789ABCDEF, UINT64_MAX};

/* Sizes on both sides of each branch, chunk, stripe and block, one hash a seed. */
static const struct {
  size_t size;
  uint64_t hash[4];
} vectors[] = {
    {0, {0x2d06800538d394c2, 0x4dc5b0cc826f6703, 0xcc1ca35a1b089c5c, 0x4c093276ae47a555}},
    {1, {0x324714f62fca15ce, 0x663890f1cbbdcb71, 0x64f8177fb63b600a, 0x15ce4727824efe35}},
    {2, {0x2b1e99b7c1a1b664, 0x51e00df0461c0b18, 0xbc8ec9995dc472a3, 0x871e2c3ce54f269f}},
    {3, {0xba1f63906a243fe3, 0x689cc865481c5ced, 0xb9f0ec40c06afce8, 0xd1f63aecc46eb026}},
    {4, {0x485dc06788e22938, 0xcf9154853a4603f6, 0x13861d9be791db48, 0xeab5fc5462ac4bad}},
    {5, {0x5c865cdedf6edb23, 0xd11219f44f0973eb, 0x8ae329a47f340489, 0x50d8820ccd45d011}},
    {7, {0x11d667dbe2eb155d, 0x6f299b7df85656fe, 0xff83256e40138aa3, 0xdfd6e66fb754468a}},
    {8, {0xfc9c51157f9dc270, 0x3dfe8aefb6b10483, 0xf66b3d3c06877de7, 0x0d5fddaca44d9af3}},
    {9, {0x488cc492d0c67cae, 0x1dbf706ade06c727, 0x9185b9419d07e0a7, 0x037d556c454accb1}},
    {12, {0x4447d5b1ad8f4621, 0xfdeb72b2fd18bc90, 0x847d9fe6777f61e4, 0x50eb9b85858d65d6}},
    {15, {0xce781e57682a9bcf, 0x75c8e035fc812386, 0x3bccf1b7e1340295, 0xb4e892fd0f7da6cd}},
    {16, {0xf36a7b9e4142befb, 0xd1eb3e0782be2dc4, 0xddb099e4e8ef8ffc, 0x59e555f50d9ad7bb}},
    {17, {0x09556bc305612284, 0x26e62926c7f35098, 0x8930b4633942f961, 0xb0b4f9c39413924b}},
    {31, {0x4bd89091419c7e2c, 0x49dfebcb50a3d6d7, 0xda89170d135c4d07, 0x5f394fbf1bea0361}},
    {32, {0xdf2d3080ae7c008d, 0x3edc0fe72150da21, 0x62686a79603b8a59, 0x9da63f6b21fc7700}},
    {33, {0x7d1f6ab7c13e19d6, 0x9cd5dde3d1abab2f, 0x64bc69aa7503c90b, 0xbb6d84ec3d46573d}},
    {63, {0x1eaded54483b90f3, 0x2f6d19ca998a569b, 0xc6704ff95a09aa8b, 0xeea268540f028ab5}},
    {64, {0x717fff113fa57492, 0x4d0b857c464f5c6e, 0x8894a04a6f38d494, 0xcde44c91a71dde7a}},
    {65, {0xeb59e3a9035c8675, 0x96639280c76a5d4e, 0x8ecb28caeb717236, 0x7890798139519d6f}},
    {95, {0x2f1a8051d3802476, 0xfa0f3c9385278f4b, 0x57ee7e0aa08a021c, 0x7e2f32863ff6c2f9}},
    {96, {0xb56eaecf94c04aa5, 0x92512ca590f1e37d, 0x518d5205c2236041, 0xdef92c30d552536f}},
    {97, {0xc341d957155f0af8, 0x09cb0bada23561c8, 0x324e19e20e860a63, 0xcd6e7700c52387be}},
    {127, {0xdbb25dabea5276a1, 0x20c096cf7d603812, 0x76ffea8395c2e4cd, 0x4651820ac7f8109f}},
    {128, {0xfbde93d30edba066, 0xee30d824601e01ef, 0xb3d9cdb1a6c208e6, 0x40dcf77757737778}},
    {129, {0x7abff83234eec985, 0xf2e87e06f86b311b, 0x681396babd3ffd7f, 0x92a839768fcad0f1}},
    {143, {0x9ec86db50ac563a0, 0x85186322693d502f, 0xfc30e61e548e8e45, 0xd315c83726fb4ca1}},
    {144, {0xb0ee99cabb42b64d, 0xd1342544467893cb, 0xae7c8159997f6389, 0x39ade787c359c353}},
    {145, {0xf95d0bc1f8d70070, 0x1d14222ffef35aa7, 0xdc66b9b99417789f, 0xefe0094b4c52b710}},
    {159, {0xd2e8df13c785c9da, 0x3818836bd43bf392, 0x78d429eeb407788f, 0x5a81293c5294b502}},
    {160, {0xae6bcfaa5a92899d, 0xcea97b796173c990, 0x392ad2808168aea0, 0x5356d7cd69dec290}},
    {170, {0x7c6a0ede7bee039b, 0x196e020890a08bec, 0x94dc9f0e7c74803c, 0x2de50792322b389e}},
    {175, {0xa12625ae3db1c68b, 0xcdb800cf47ec9391, 0xc9f87c401906bfa0, 0x2a7bfbc05471b1fb}},
    {176, {0x0de11eb23ad847af, 0x984c8b907af508dc, 0x5c060d40ad0ac34c, 0x8b31383c8c7c9422}},
    {239, {0xdfdbba56b5fb22eb, 0x267ff9fb2ab38b06, 0xbb5dc6e6d5854eff, 0xc5dd4f32ce3c980c}},
    {240, {0x5c2ea2814dfd07d9, 0x539e626902315bb4, 0x0ea41941198c9fc2, 0x9bd7ddc30893464e}},
    {241, {0x713a7042ea992fcc, 0x7f062d5b9287393a, 0x806a8b1fd7297fa7, 0x4aa7ec2bab8e09f6}},
    {255, {0x3dda83cddc7917b0, 0x462d1dbc1721b7d1, 0xc681fc0e1d751ecf, 0x0ff94778afa692a9}},
    {256, {0x007014df40d86602, 0x1d139a1be463b2fb, 0x93847755d25150d8, 0x2d098e9d303aa2bf}},
    {257, {0x859ba2bf28987ba3, 0xba437c463cc5206a, 0xd0989b5aa302c1cf, 0x4b53bdd97469fe7e}},
    {319, {0xe1d42cf2dbfc3878, 0xfe64607db16959a2, 0xb6ccb1ad27b5c374, 0xe383455c8f8857b5}},
    {320, {0x300d78ae1ce4b9dd, 0xdb2fab3ea4ee9e76, 0xb454435b97a6ad26, 0xd6556139f6c975fd}},
    {321, {0xee7f30d8abca7a9a, 0x0284448da6810d6b, 0xf3251f036adc1341, 0x57bce5f8369df44f}},
    {511, {0x5cd53162b2e1ac40, 0xafbe9f0447de952e, 0x7141b16951b34109, 0x302a64c5d3d16faf}},
    {512, {0x5915acca45400b99, 0x76ea5ec10acfd44c, 0xb41f33d4dbdcb508, 0x015837a8e00fd883}},
    {513, {0x16af055488175534, 0xa65fb239f8d19700, 0xce26072403e895b5, 0xaa2c0d9d2343f303}},
    {1023, {0x203d99ba268fa37f, 0x7b7fafb4a27f0f76, 0xda1018c206a3c61a, 0x27c6fbfecb0f897c}},
    {1024, {0x2b86d47a4334dae8, 0x3b72d0a674f8c77e, 0x2d187c8baa0f6a0f, 0xe05e88a8e1c03593}},
    {1025, {0x29b36d87f48efaa2, 0x08f83e97a0cd429c, 0x1ca4bde58ae42676, 0xec0e0db10b3c0c7f}},
    {1087, {0xecdd893214720b3d, 0x104b6af06a95f91b, 0xa6972e1172f53664, 0x572e2195b62f95ce}},
    {1088, {0x2750b672f1a484e6, 0x1317371c7042f722, 0xa657fddce915b538, 0x036e38fe9662160c}},
    {1089, {0xc4f8a6d2736429ba, 0xeb34c7fbe62582a2, 0x1bb7ad2cf0375c7a, 0x1eb72e0b790ebbfa}},
    {2047, {0x7495c6e9a236d9d3, 0xdc67bf502302863b, 0x2fb92721d728f5ff, 0x20c160289d6c56d4}},
    {2048, {0x1b1149cd032593dc, 0xa59da8cbfd2e3900, 0xc03ea84c20a118a3, 0x1ed02e21b4f41458}},
    {2049, {0xb1058d133d731cac, 0xb529b375136a81a3, 0xcfef78f7219d44c8, 0xd6d60777e6f32fa7}},
    {3072, {0x7b5541587eb22e6f, 0x1641d401057a755d, 0xd959f50e35110d3f, 0x522b14ac0c27476e}},
    {4096, {0xd18bbd493556b42c, 0xca1cff93d65edd66, 0xbd726ab5cc77e9c2, 0x5464389d26f33301}},
    {65537, {0xdde22f8841835a3e, 0xbd5d43ed8c3fe8ed, 0xa3217a82a50e8ca3, 0xa6e52c13b7a553c4}},
    {100000, {0x295f7a524d12f953, 0x5e5f1c597349b73a, 0xdeded013a74bbd57, 0x3d72896640abd86e}},
};

static void test_xxh3_known_inputs_give_published_values(void) {
  fill_input(input);
  for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
    for (size_t s = 0; s < 4; s++) {
      if (!CHECK_EQ_U64(ms_xxh3_64(input, vectors[i].size, seeds[s]), vectors[i].hash[s]))
        printf("  size %zu, seed %zu\n", vectors[i].size, s);
    }
  }
}

/* One number for 4,097 hashes: each is the seed of the next, so one wrong bit changes the end. */
static void test_xxh3_every_size_to_4096_gives_published_fold(void) {
  uint64_t fold = 0;
  fill_input(input);
  for (size_t size = 0; size <= 4096; size++)
    fold = fold * 0x9E3779B97F4A7C15 + ms_xxh3_64(input, size, fold);
  CHECK_EQ_U64(fold, 0x06f1e1aa3191d5e2);
}

static void test_xxh3_no_bytes_may_be_null(void) {
  for (size_t s = 0; s < 4; s++) CHECK_EQ_U64(ms_xxh3_64(NULL, 0, seeds[s]), vectors[0].hash[s]);
}

static void test_xxh3_unaligned_start_gives_same_value(void) {
  for (size_t shift = 0; shift < 64; shift++) {
    fill_input(input + shift);
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++)
      CHECK_EQ_U64(ms_xxh3_64(input + shift, vectors[i].size, seeds[2]), vectors[i].hash[2]);
  }
}

/* The input starts and ends where its allocation does, for the address sanitizer. */
static void test_xxh3_reads_no_byte_outside(void) {
  fill_input(input);
  for (size_t size = 1; size <= 1200; size++) {
    uint8_t *exact = malloc(size);
    if (!CHECK(exact != NULL)) return;
    memcpy(exact, input, size);
    CHECK_EQ_U64(ms_xxh3_64(exact, size, size), ms_xxh3_64(input, size, size));
    free(exact);
  }
}

/* Any variant may follow any other between two calls, so lanes are compared, not only hashes. */
static void check_variant(consume_stripes *variant) {
  uint8_t secret[SECRET_BYTES];
  derive_secret(secret, seeds[2]);
  fill_input(input);
  for (size_t count = 0; count <= 100; count++) {
    uint64_t expected[LANES], found[LANES];
    for (size_t i = 0; i < LANES; i++) expected[i] = found[i] = PRIME64_1 * (i + count);
    consume_plain(expected, input + count, count, secret);
    variant(found, input + count, count, secret);
    for (size_t i = 0; i < LANES; i++) CHECK_EQ_U64(found[i], expected[i]);
  }
}

static void test_xxh3_chosen_variant_equals_plain_c(void) { check_variant(choose_consume()); }

static void test_xxh3_sse2_equals_plain_c(void) {
#if defined(__x86_64__)
  check_variant(consume_sse2);
#else
  CHECK_SKIP("not an x86-64 CPU");
#endif
}

static void test_xxh3_avx2_equals_plain_c(void) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2")) CHECK_SKIP("this CPU has no AVX2");
  check_variant(consume_avx2);
#else
  CHECK_SKIP("not an x86-64 CPU");
#endif
}

static const check_test tests[] = {
    CHECK_TEST(test_xxh3_known_inputs_give_published_values),
    CHECK_TEST(test_xxh3_every_size_to_4096_gives_published_fold),
    CHECK_TEST(test_xxh3_no_bytes_may_be_null),
    CHECK_TEST(test_xxh3_unaligned_start_gives_same_value),
    CHECK_TEST(test_xxh3_reads_no_byte_outside),
    CHECK_TEST(test_xxh3_chosen_variant_equals_plain_c),
    CHECK_TEST(test_xxh3_sse2_equals_plain_c),
    CHECK_TEST(test_xxh3_avx2_equals_plain_c),
};
CHECK_MAIN(tests)
