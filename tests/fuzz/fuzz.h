/* What the harnesses share: memory of files, and checksums that are right again.
 *
 * An input is a byte of flags, then pieces of a file, each a header: its place in units of 64 bytes
 * (16 bits) and its length (16 bits), little-endian. Small inputs so reach all of a large file.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "ms_xxh3.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static inline void *zeros(uint64_t size) {
  void *memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  if (memory == NULL) abort();
  memset(memory, 0, (size + 4095) / 4096 * 4096);
  return memory;
}

/* The same memory for each input, zero again: new pages would cost more than all else. */
static inline void *zeros_again(void **kept, uint64_t size) {
  if (*kept == NULL) return *kept = zeros(size);
  return memset(*kept, 0, size);
}

/* The next piece, into the file; false at the end. */
static inline int piece(uint8_t *file, uint64_t file_size, const uint8_t **data, size_t *size) {
  if (*size < 4) return 0;
  uint64_t at = ((uint64_t)(*data)[0] | (uint64_t)(*data)[1] << 8) * 64;
  size_t length = (size_t)(*data)[2] | (size_t)(*data)[3] << 8;
  *data += 4;
  *size -= 4;
  if (length > *size) length = *size;
  if (at < file_size) memcpy(file + at, *data, length < file_size - at ? length : file_size - at);
  *data += length;
  *size -= length;
  return 1;
}

#endif
