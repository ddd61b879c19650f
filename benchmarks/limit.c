/* The limits that benchmarks/ holds millstream to: programs that do the same stores, loads and
 * system calls, and nothing else.
 *
 * `limit KIND ARGUMENTS` measures once and prints seconds (`futex`: two numbers, p50 and p99), each
 * on a line of its own. Every file that it makes is unlinked at once, so that nothing of it is
 * written to the disk later, in another row's time. Knows the layout of a batch (docs/format.md),
 * but shares no code with the core except its XXH3.
 *
 *   append DIR BYTES COUNT pointers|column fresh|populated   a record, in batches of COUNT
 *   sync DIR BYTES CALLS                                     a pwrite of BYTES and fdatasync
 *   futex CALLS INTERVAL_US                                  from a stamp to the other process
 *   hash PIECE TOTAL FILE...                                 a byte of the first TOTAL, mapped
 *   random TOTAL READS FILE...                               a value copied from anywhere, mapped
 *   copy FILE...                                             a record of batches of one, copied out
 *   lookup KEYS LOOKUPS                                      a value of a hash table, copied
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ms_xxh3.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { VALUE_BYTES = 100, HEADER_BYTES = 64, OBJECT_BYTES = 144, OBJECT_HEADER = 32 };
enum { INTERVAL_WARM = 50, FILES_MAX = 4096, SINK_BYTES = 8 << 20 };

static _Noreturn void die(const char *what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static uint64_t align_up(uint64_t position, uint64_t alignment) {
  return (position + alignment - 1) & ~(alignment - 1);
}

/* An allocated file that has no name any more. */
static int make_file(const char *directory, uint64_t size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/limit-XXXXXX", directory);
  int descriptor = mkstemp(path);
  if (descriptor < 0) die(path);
  unlink(path);
  int error = posix_fallocate(descriptor, 0, (off_t)size);
  if (error != 0) {
    errno = error;
    die("fallocate");
  }
  return descriptor;
}

/* --- append ------------------------------------------------------------------------------- */

typedef struct slice {
  const uint8_t *data;
  uint64_t size; /* read from memory, as ours: the compiler must not know that it is 100 */
} slice;

typedef struct header {
  uint64_t hash;
  uint32_t length;
  uint16_t format, flags;
  uint64_t base_offset;
  uint32_t count, chain;
  int64_t timestamp_min, timestamp_max;
  uint32_t producer, synced_distance;
  uint64_t sequence;
} header;

_Static_assert(sizeof(header) == HEADER_BYTES, "as in docs/format.md");

static uint64_t batch_bytes(uint32_t count, uint64_t position, uint64_t *out_offsets,
                            uint64_t *out_values) {
  uint64_t offset_bytes = 4 * ((uint64_t)count + 1);
  uint64_t body = align_up(offset_bytes, 8) + (uint64_t)count * VALUE_BYTES;
  uint64_t alignment = body >= 4096 ? 64 : 8;
  *out_offsets = align_up(position + HEADER_BYTES, alignment) - position;
  *out_values = align_up(position + *out_offsets + offset_bytes, alignment) - position;
  return align_up(position + *out_values + (uint64_t)count * VALUE_BYTES, 8) - position;
}

/* Store one batch; its length. `column`: the values lie one behind the other, and are copied so. */
static uint64_t store_batch(uint8_t *file, uint64_t position, const slice *values, uint32_t count,
                            bool column, uint64_t base_offset, uint64_t *chain) {
  uint64_t offsets_at, values_at;
  uint64_t length = batch_bytes(count, position, &offsets_at, &values_at);
  uint8_t *at = file + position;
  header head = {.length = (uint32_t)length, .format = 1, .flags = 1 << 6, .count = count};
  head.base_offset = base_offset;
  head.chain = (uint32_t)*chain;
  head.timestamp_min = head.timestamp_max = (int64_t)base_offset;
  memcpy(at, &head, sizeof head);
  memset(at + HEADER_BYTES, 0, offsets_at - HEADER_BYTES);
  int32_t *offsets = (int32_t *)(void *)(at + offsets_at);
  uint64_t used = 0;
  if (column) {
    for (uint32_t i = 0; i < count; i++) {
      offsets[i] = (int32_t)used;
      used += values[i].size;
    }
    memset(at + offsets_at + 4 * ((uint64_t)count + 1), 0,
           values_at - offsets_at - 4 * ((uint64_t)count + 1));
    memcpy(at + values_at, values[0].data, used);
  } else {
    memset(at + offsets_at + 4 * ((uint64_t)count + 1), 0,
           values_at - offsets_at - 4 * ((uint64_t)count + 1));
    for (uint32_t i = 0; i < count; i++) {
      offsets[i] = (int32_t)used;
      memcpy(at + values_at + used, values[i].data, values[i].size);
      used += values[i].size;
    }
  }
  offsets[count] = (int32_t)used;
  memset(at + values_at + used, 0, length - values_at - used);
  *chain = ms_xxh3_64(at + 8, length - 8, position);
  memcpy(at, chain, sizeof *chain);
  return length;
}

static void append(const char *directory, uint64_t size, uint32_t count, bool column,
                   bool populated) {
  uint32_t many = count < 1000 ? 1000 : count; /* as many different values in turn as ours */
  slice *values = malloc(many * sizeof *values);
  uint8_t *bytes = malloc((size_t)many * OBJECT_BYTES);
  if (values == NULL || bytes == NULL) die("malloc");
  for (size_t i = 0; i < (size_t)many * OBJECT_BYTES; i++) bytes[i] = (uint8_t)(i * 7919 >> 3);
  for (uint32_t i = 0; i < many; i++) {
    size_t place = column ? (size_t)i * VALUE_BYTES : (size_t)i * OBJECT_BYTES + OBJECT_HEADER;
    values[i] = (slice){bytes + place, VALUE_BYTES};
  }
  int descriptor = make_file(directory, size);
  uint8_t *file = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (file == MAP_FAILED) die("mmap");
  if (populated && madvise(file, size, MADV_POPULATE_WRITE) != 0) die("populate");
  uint64_t position = 0, records = 0, chain = 0, unused;
  double began = now();
  while (position + batch_bytes(count, position, &unused, &unused) <= size) {
    const slice *from = values + (many > count ? records % many : 0);
    position += store_batch(file, position, from, count, column, records, &chain);
    records += count;
  }
  printf("%.12f\n", (now() - began) / (double)records);
}

/* --- sync --------------------------------------------------------------------------------- */

static void sync_loop(const char *directory, uint64_t size, uint64_t calls) {
  int descriptor = make_file(directory, size * (calls + 1));
  uint8_t *bytes = malloc(size);
  if (bytes == NULL) die("malloc");
  memset(bytes, 7, size);
  double began = 0;
  for (uint64_t i = 0; i <= calls; i++) {
    if (i == 1) began = now(); /* the first also makes the new file's inode durable */
    if (pwrite(descriptor, bytes, size, (off_t)(i * size)) != (ssize_t)size) die("pwrite");
    if (fdatasync(descriptor) != 0) die("fdatasync");
  }
  printf("%.12f\n", (now() - began) / (double)calls);
}

/* --- futex -------------------------------------------------------------------------------- */

typedef struct exchange {
  _Atomic uint32_t word;
  _Atomic double stamp;
} exchange;

static int ascending(const void *a, const void *b) {
  double left = *(const double *)a, right = *(const double *)b;
  return (left > right) - (left < right);
}

static void wait_for_stamps(exchange *shared, uint64_t calls) {
  double *taken = malloc(calls * sizeof *taken);
  if (taken == NULL) die("malloc");
  uint32_t seen = 0;
  for (uint64_t i = 0; i < calls; i++) {
    uint32_t word;
    while ((word = atomic_load_explicit(&shared->word, memory_order_acquire)) == seen)
      (void)syscall(SYS_futex, &shared->word, FUTEX_WAIT, seen, NULL, NULL, 0);
    taken[i] = now() - atomic_load_explicit(&shared->stamp, memory_order_relaxed);
    seen = word;
  }
  calls -= INTERVAL_WARM;
  qsort(taken + INTERVAL_WARM, calls, sizeof *taken, ascending);
  printf("%.12f\n%.12f\n", taken[INTERVAL_WARM + calls / 2],
         taken[INTERVAL_WARM + calls * 99 / 100]);
  fflush(stdout);
}

static void futex_exchange(uint64_t calls, long interval_us) {
  exchange *shared =
      mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) die("mmap");
  calls += INTERVAL_WARM;
  pid_t child = fork();
  if (child < 0) die("fork");
  if (child == 0) {
    wait_for_stamps(shared, calls);
    _exit(0);
  }
  const struct timespec interval = {interval_us / 1000000, interval_us % 1000000 * 1000};
  for (uint64_t i = 0; i < calls; i++) {
    nanosleep(&interval, NULL);
    atomic_store_explicit(&shared->stamp, now(), memory_order_relaxed);
    atomic_fetch_add_explicit(&shared->word, 1, memory_order_release);
    (void)syscall(SYS_futex, &shared->word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    if (i + 1 == calls) break;
  }
  int status;
  /* Two stamps may have met one sleeper; then it waits for more. Send until it has gone. */
  while (waitpid(child, &status, WNOHANG) == 0) {
    nanosleep(&interval, NULL);
    atomic_store_explicit(&shared->stamp, now(), memory_order_relaxed);
    atomic_fetch_add_explicit(&shared->word, 1, memory_order_release);
    (void)syscall(SYS_futex, &shared->word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
  }
}

/* --- reading files of a store ------------------------------------------------------------- */

typedef struct mapped {
  const uint8_t *bytes;
  uint64_t size;
} mapped;

static mapped map_file(const char *path) {
  struct stat found;
  int descriptor = open(path, O_RDONLY | O_CLOEXEC);
  if (descriptor < 0 || fstat(descriptor, &found) != 0) die(path);
  uint64_t size = (uint64_t)found.st_size;
  const uint8_t *bytes = mmap(NULL, size, PROT_READ, MAP_SHARED, descriptor, 0);
  if (bytes == MAP_FAILED) die(path);
  close(descriptor);
  return (mapped){bytes, size};
}

static void hash_files(uint64_t piece, uint64_t total, char **paths, int count) {
  uint64_t done = 0, mixed = 0;
  double began = now();
  for (int i = 0; i < count && done < total; i++) {
    mapped file = map_file(paths[i]);
    for (uint64_t at = 0; at < file.size && done < total; at += piece) {
      uint64_t left = file.size - at < total - done ? file.size - at : total - done;
      uint64_t size = left < piece ? left : piece;
      mixed ^= ms_xxh3_64(file.bytes + at, size, at);
      done += size;
    }
  }
  double taken = now() - began;
  fprintf(stderr, "%016llx\n", (unsigned long long)mixed);
  printf("%.15f\n", taken / (double)done);
}

static uint64_t next_random(uint64_t *state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}

static void read_randomly(uint64_t total, uint64_t reads, char **paths, int count) {
  static mapped files[FILES_MAX];
  uint64_t mixed = 0, largest = 0, left = total;
  int used = 0;
  for (; used < count && used < FILES_MAX && left > 0; used++) {
    mapped file = map_file(paths[used]);
    if (file.size > left) file.size = left;
    left -= file.size;
    for (uint64_t at = 0; at < file.size; at += 4096) mixed += file.bytes[at];
    if (file.size > largest) largest = file.size;
    files[used] = file;
  }
  uint8_t value[VALUE_BYTES];
  uint64_t state = 88172645463325252u;
  double began = now();
  for (uint64_t i = 0; i < reads; i++) {
    const mapped *file = &files[next_random(&state) % (uint64_t)used];
    uint64_t room = file->size > VALUE_BYTES ? file->size - VALUE_BYTES : 1;
    memcpy(value, file->bytes + (next_random(&state) ^ mixed << 63) % room, VALUE_BYTES);
    mixed += value[0]; /* the next read waits for this one */
  }
  double taken = now() - began;
  fprintf(stderr, "%016llx\n", (unsigned long long)mixed);
  printf("%.12f\n", taken / (double)reads);
}

static void copy_records(char **paths, int count) {
  uint8_t *sink = malloc(SINK_BYTES);
  if (sink == NULL) die("malloc");
  memset(sink, 1, SINK_BYTES);
  uint64_t records = 0, used = 0;
  double began = now();
  for (int i = 0; i < count; i++) {
    mapped file = map_file(paths[i]);
    uint32_t position, length, size;
    memcpy(&position, file.bytes + 68, 4); /* data_position */
    for (uint64_t at = position; at + HEADER_BYTES + 8 <= file.size; at += length) {
      memcpy(&length, file.bytes + at + 8, 4);
      if (length == 0 || length > file.size - at) break;
      memcpy(&size, file.bytes + at + HEADER_BYTES + 4, 4); /* offsets are 0 and the size */
      if (used + size > SINK_BYTES) used = 0;
      memcpy(sink + used, file.bytes + at + HEADER_BYTES + 8, size);
      used += size;
      records++;
    }
  }
  double taken = now() - began;
  fprintf(stderr, "%02x\n", sink[records % SINK_BYTES]);
  printf("%.12f\n", taken / (double)(records > 0 ? records : 1));
}

/* An entry a key, and key and value together elsewhere: two places in memory, of which the second
 * is known when the first has come. */
static void look_up(uint64_t keys, uint64_t lookups) {
  typedef struct record {
    uint64_t key;
    uint8_t value[VALUE_BYTES];
  } record;
  typedef struct entry {
    uint64_t hash;
    const record *record;
  } entry;
  uint64_t capacity = 64, mixed = 0, state = 88172645463325252u;
  while (capacity / 4 * 3 < keys) capacity *= 2;
  entry *entries = aligned_alloc(2 << 20, align_up(capacity * sizeof *entries, 2 << 20));
  record *records = aligned_alloc(2 << 20, align_up(keys * sizeof *records, 2 << 20));
  uint64_t *names = malloc(lookups * sizeof *names);
  if (entries == NULL || records == NULL || names == NULL) die("malloc");
  madvise(entries, capacity * sizeof *entries, MADV_HUGEPAGE);
  madvise(records, keys * sizeof *records, MADV_HUGEPAGE);
  memset(entries, 0, capacity * sizeof *entries);
  for (uint64_t i = 0; i < keys; i++) {
    records[i].key = i;
    memset(records[i].value, (int)i, VALUE_BYTES);
    uint64_t hash = ms_xxh3_64(&i, sizeof i, 1), at = hash % capacity;
    while (entries[at].record != NULL) at = (at + 1) % capacity;
    entries[at] = (entry){hash, &records[i]};
  }
  for (uint64_t i = 0; i < lookups; i++) names[i] = next_random(&state) % keys;
  uint8_t value[VALUE_BYTES];
  double began = now();
  for (uint64_t i = 0; i < lookups; i++) {
    uint64_t name = names[i] ^ (mixed & 1u << 31); /* waits for the value before */
    uint64_t hash = ms_xxh3_64(&name, sizeof name, 1), at = hash & (capacity - 1);
    while (entries[at].hash != hash || entries[at].record->key != name)
      at = (at + 1) & (capacity - 1);
    memcpy(value, entries[at].record->value, VALUE_BYTES);
    mixed += value[0];
  }
  double taken = now() - began;
  fprintf(stderr, "%016llx\n", (unsigned long long)mixed);
  printf("%.12f\n", taken / (double)lookups);
}

int main(int argc, char **argv) {
  const char *kind = argc > 1 ? argv[1] : "";
  uint64_t number[8] = {0};
  for (int i = 2; i < argc && i < 8; i++) number[i] = strtoull(argv[i], NULL, 10);
  if (strcmp(kind, "append") == 0 && argc == 7) {
    bool column = strcmp(argv[5], "column") == 0, populated = strcmp(argv[6], "populated") == 0;
    append(argv[2], number[3], (uint32_t)number[4], column, populated);
  } else if (strcmp(kind, "sync") == 0 && argc == 5) {
    sync_loop(argv[2], number[3], number[4]);
  } else if (strcmp(kind, "futex") == 0 && argc == 4) {
    futex_exchange(number[2], (long)number[3]);
  } else if (strcmp(kind, "hash") == 0 && argc > 4) {
    hash_files(number[2], number[3], argv + 4, argc - 4);
  } else if (strcmp(kind, "random") == 0 && argc > 4) {
    read_randomly(number[2], number[3], argv + 4, argc - 4);
  } else if (strcmp(kind, "copy") == 0 && argc > 2) {
    copy_records(argv + 2, argc - 2);
  } else if (strcmp(kind, "lookup") == 0 && argc == 4) {
    look_up(number[2], number[3]);
  } else {
    fprintf(stderr, "limit: see the comment at the top of limit.c\n");
    return 2;
  }
  return 0;
}
