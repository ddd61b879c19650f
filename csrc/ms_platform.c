/* Linux: the system calls behind ms_platform.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "ms_platform.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

/* The virtual clock. Skews are written before the flag: an acquire load of it sees them, too. */
static atomic_bool clock_virtual;
static _Atomic int64_t clock_skew_ns, clock_set_ns;

static int64_t skew_ns(void) {
  if (MS_LIKELY(!atomic_load_explicit(&clock_virtual, memory_order_acquire))) return 0;
  return atomic_load_explicit(&clock_skew_ns, memory_order_relaxed);
}

void ms_clock_set(bool is_virtual, int64_t skew, int64_t set) {
  atomic_store_explicit(&clock_skew_ns, skew, memory_order_relaxed);
  atomic_store_explicit(&clock_set_ns, is_virtual ? set : 0, memory_order_relaxed);
  /* Release: pairs with the acquire in skew_ns. */
  atomic_store_explicit(&clock_virtual, is_virtual, memory_order_release);
}

bool ms_clock_is_virtual(void) {
  return atomic_load_explicit(&clock_virtual, memory_order_acquire);
}

static int64_t read_ns(clockid_t which) {
  struct timespec now;
  clock_gettime(which, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t ms_clock_wall_us(void) {
  int64_t set = skew_ns() + atomic_load_explicit(&clock_set_ns, memory_order_relaxed);
  return (read_ns(CLOCK_REALTIME) + set) / 1000;
}

int64_t ms_clock_coarse_us(void) { return (read_ns(CLOCK_REALTIME_COARSE) + skew_ns()) / 1000; }

int64_t ms_clock_monotonic_ns(void) { return read_ns(CLOCK_MONOTONIC) + skew_ns(); }

int64_t ms_clock_boot_ns(void) { return read_ns(CLOCK_BOOTTIME) + skew_ns(); }

/* How long to sleep in real time: whoever advances the virtual clock wakes nobody. */
static int64_t real_sleep_ns(int64_t timeout_ns) {
  const int64_t most = MS_CLOCK_VIRTUAL_SLEEP_NS;
  if (MS_LIKELY(!ms_clock_is_virtual())) return timeout_ns;
  return timeout_ns < 0 || timeout_ns > most ? most : timeout_ns;
}

int ms_futex_wait(const _Atomic uint32_t *word, uint32_t expected, int64_t timeout_ns) {
  timeout_ns = real_sleep_ns(timeout_ns);
  struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
  /* Not a private futex: the word lies in a file that other processes map elsewhere. */
  long result =
      syscall(SYS_futex, word, FUTEX_WAIT, expected, timeout_ns < 0 ? NULL : &timeout, NULL, 0);
  if (result == 0 || errno == EAGAIN) return 0;
  return errno;
}

void ms_rest(int64_t rest_ns) {
  static _Atomic uint32_t never; /* changed by nobody */
  (void)ms_futex_wait(&never, 0, rest_ns);
}

int32_t ms_futex_wake(const _Atomic uint32_t *word, int32_t count) {
  long woken = syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
  return woken > 0 ? (int32_t)woken : 0;
}

int ms_futex_wait_class(const _Atomic uint32_t *word, uint32_t expected, uint32_t bits,
                        int64_t timeout_ns) {
  /* FUTEX_WAIT_BITSET takes a point in time. */
  int64_t end = read_ns(CLOCK_MONOTONIC) + real_sleep_ns(timeout_ns);
  struct timespec deadline = {end / 1000000000, end % 1000000000};
  long result = syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, &deadline, NULL, bits);
  if (result == 0 || errno == EAGAIN) return 0;
  return errno;
}

void ms_futex_wake_class(const _Atomic uint32_t *word, int32_t count, uint32_t bits) {
  (void)syscall(SYS_futex, word, FUTEX_WAKE_BITSET, count, NULL, NULL, bits);
}

int ms_file_system(int descriptor, uint32_t *magic) {
  struct statfs found;
  if (fstatfs(descriptor, &found) != 0) return errno;
  *magic = (uint32_t)found.f_type; /* a signed word on some machines; magics have 32 bits */
  return 0;
}

/* --- blocks behind a file --- */

/* linux/falloc.h of before 4.9 has no such flag. */
#ifndef FALLOC_FL_UNSHARE_RANGE
#define FALLOC_FL_UNSHARE_RANGE 0x40
#endif
#ifndef FICLONERANGE
struct file_clone_range {
  int64_t src_fd;
  uint64_t src_offset, src_length, dest_offset;
};
#define FICLONERANGE _IOW(0x94, 13, struct file_clone_range)
#endif
#define UNSHARE (FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_KEEP_SIZE)

enum { EXTENTS = 32 };

/* A header, and room for what the kernel puts behind it. */
union extents {
  struct fiemap head;
  unsigned char room[sizeof(struct fiemap) + EXTENTS * sizeof(struct fiemap_extent)];
};

/* The first extents that reach behind `at`. */
static int list_extents(int descriptor, uint64_t at, union extents *found) {
  memset(&found->head, 0, sizeof(found->head));
  found->head.fm_start = at;
  found->head.fm_length = FIEMAP_MAX_OFFSET - at;
  found->head.fm_extent_count = EXTENTS;
  return ioctl(descriptor, FS_IOC_FIEMAP, found) == 0 ? 0 : errno;
}

bool ms_has_blocks(int descriptor, uint64_t length) {
  union extents found;
  uint64_t at = 0;
  while (at < length) {
    uint64_t before = at;
    if (list_extents(descriptor, at, &found) != 0) return false;
    for (uint32_t i = 0; i < found.head.fm_mapped_extents; i++) {
      const struct fiemap_extent *extent = &found.head.fm_extents[i];
      if (extent->fe_logical > at) return false;
      at = extent->fe_logical + extent->fe_length;
      if (at >= length) return true;
    }
    if (at <= before) return false; /* none reach further */
  }
  return true;
}

int ms_unshare(int descriptor) {
  union extents found;
  uint64_t at = 0;
  for (;;) {
    uint64_t before = at;
    int error = list_extents(descriptor, at, &found);
    /* It does not tell: tmpfs, say, which cannot share either. */
    if (error == EOPNOTSUPP || error == ENOTTY || error == ENOSYS || error == EINVAL) return 0;
    if (error != 0) return error;
    for (uint32_t i = 0; i < found.head.fm_mapped_extents; i++) {
      const struct fiemap_extent *extent = &found.head.fm_extents[i];
      if (extent->fe_flags & FIEMAP_EXTENT_SHARED &&
          fallocate(descriptor, UNSHARE, (off_t)extent->fe_logical, (off_t)extent->fe_length) != 0)
        return errno == EOPNOTSUPP ? 0 : errno;
      if (extent->fe_flags & FIEMAP_EXTENT_LAST) return 0;
      at = extent->fe_logical + extent->fe_length;
    }
    if (at <= before) return 0;
  }
}

bool ms_can_share(int descriptor, uint64_t block) {
  struct file_clone_range range = {.src_fd = descriptor, .src_length = block, .dest_offset = block};
  return ioctl(descriptor, FICLONERANGE, &range) == 0;
}

bool ms_can_unshare(int descriptor, uint64_t block) {
  return fallocate(descriptor, UNSHARE, 0, (off_t)block) == 0;
}

/* --- zeros: [k] has 2^k bytes, made when first asked for and never given back --- */

enum { ZEROS_FIRST = 16, ZEROS_LAST = 40 };
static _Atomic(const void *) zeros[ZEROS_LAST + 1];

const void *ms_zeros(uint64_t size) {
  unsigned order = ZEROS_FIRST;
  while (order <= ZEROS_LAST && size > UINT64_C(1) << order) order++;
  if (order > ZEROS_LAST) return NULL;
  /* Relaxed: nothing was stored there, and the kernel's table of maps is everyone's. */
  const void *found = atomic_load_explicit(&zeros[order], memory_order_relaxed);
  if (MS_LIKELY(found != NULL)) return found;
  /* Not writable, so it counts against no limit of memory; its pages are the one zero page. */
  size_t bytes = (size_t)1 << order;
  void *made = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return NULL;
  if (atomic_compare_exchange_strong_explicit(&zeros[order], &found, made, memory_order_relaxed,
                                              memory_order_relaxed))
    return made;
  (void)munmap(made, bytes); /* another thread was faster */
  return found;
}

static int advise(void *start, size_t size, int advice) {
  return madvise(start, size, advice) == 0 ? 0 : errno;
}

int ms_file_fill(int descriptor, uint64_t position, uint64_t size) {
  /* Never stored to: all of it is the kernel's one page of zeros, which stays in the L1 cache. */
  static uint8_t nothing[MS_FILL_BYTES];
  while (size > 0) {
    size_t part = size < sizeof nothing ? (size_t)size : sizeof nothing;
    ssize_t written = pwrite(descriptor, nothing, part, (off_t)position);
    if (written < 0 && errno != EINTR) return errno;
    if (written > 0) {
      position += (uint64_t)written;
      size -= (uint64_t)written;
    }
  }
  return 0;
}

int ms_pages_populate(void *start, size_t size, bool writable) {
  return advise(start, size, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
}

int ms_pages_remove(void *start, size_t size) { return advise(start, size, MADV_REMOVE); }

int ms_pages_random(void *start, size_t size) { return advise(start, size, MADV_RANDOM); }

int ms_pages_normal(void *start, size_t size) { return advise(start, size, MADV_NORMAL); }

int ms_pages_dontfork(void *start, size_t size) { return advise(start, size, MADV_DONTFORK); }

enum { HUGE_BYTES = 2 << 20 };

void *ms_memory_huge(size_t size) {
  if (size < HUGE_BYTES) return malloc(size);
  void *memory = aligned_alloc(HUGE_BYTES, (size + HUGE_BYTES - 1) & ~(size_t)(HUGE_BYTES - 1));
  if (memory != NULL) (void)madvise(memory, size, MADV_HUGEPAGE); /* without it, it is slower */
  return memory;
}

void ms_pages_dirty(void *start, size_t size) {
  uint8_t *byte = start;
  for (size_t at = 0; at < size; at += MS_PAGE_BYTES) {
    _Atomic uint64_t *word = (_Atomic uint64_t *)(void *)(byte + at);
    uint64_t same = atomic_load_explicit(word, memory_order_relaxed);
    /* Fails only if another process changed the word, and then it is dirty as well. */
    atomic_compare_exchange_strong(word, &same, same);
  }
}

/* --- the fork guard: not behind a handle, since fork() has none --- */

#define GUARDED_MAX 4096
static int guarded[GUARDED_MAX];
static int guarded_count;
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t guard_once = PTHREAD_ONCE_INIT;
uint32_t ms_fork_counter;

/* Holding the lock over the fork gives the child a table that no thread was in the middle of
 * changing. */
static void before_fork(void) { pthread_mutex_lock(&guard_lock); }

static void after_fork_parent(void) { pthread_mutex_unlock(&guard_lock); }

static void after_fork_child(void) {
  for (int i = 0; i < guarded_count; i++) close(guarded[i]);
  guarded_count = 0;
  ms_fork_counter++;
  pthread_mutex_unlock(&guard_lock);
}

static void install_handlers(void) {
  pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void ms_fork_watch(void) { pthread_once(&guard_once, install_handlers); }

int ms_fork_guard(int descriptor) {
  int error = 0;
  ms_fork_watch();
  pthread_mutex_lock(&guard_lock);
  if (guarded_count == GUARDED_MAX) {
    error = EMFILE;
  } else {
    guarded[guarded_count++] = descriptor;
  }
  pthread_mutex_unlock(&guard_lock);
  return error;
}

void ms_fork_release(int descriptor) {
  pthread_mutex_lock(&guard_lock);
  for (int i = 0; i < guarded_count; i++) {
    if (guarded[i] == descriptor) {
      guarded[i] = guarded[--guarded_count];
      break;
    }
  }
  pthread_mutex_unlock(&guard_lock);
}
