/* The CPU and the kernel: cache lines, clocks, futexes, pages, forks, yield points.
 *
 * Every function is thread-safe and keeps no state but the fork guard's, the virtual clock's and
 * the zeros. Knows no file and no Python. MS_YIELD(name) is a point at which the test scheduler may
 * run, stop or kill another virtual process; in builds without MS_SCHEDULER it is nothing.
 */
#ifndef MS_PLATFORM_H
#define MS_PLATFORM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MS_PAGE_BYTES 4096u
#define MS_MUST_USE __attribute__((warn_unused_result))
#define MS_INLINE __attribute__((always_inline))
#define MS_LIKELY(x) __builtin_expect(!!(x), 1)
#define MS_UNLIKELY(x) __builtin_expect(!!(x), 0)

#ifdef MS_SCHEDULER
void ms_scheduler_yield(const char *name);
#define MS_YIELD(name) ms_scheduler_yield(name)
#else
#define MS_YIELD(name) ((void)0)
#endif

/* Our own mistakes only, never bytes from a file; compiled into debug and fuzz builds. */
#ifdef MS_DEBUG
#include <assert.h>
#define MS_ASSERT(condition) assert(condition)
#else
#define MS_ASSERT(condition) ((void)0)
#endif

/* Microseconds since 1970 (CLOCK_REALTIME: may jump), nanoseconds of CLOCK_MONOTONIC (stands still
 * while the machine is suspended) and of CLOCK_BOOTTIME (does not). */
int64_t ms_clock_wall_us(void);
int64_t ms_clock_monotonic_ns(void);
int64_t ms_clock_boot_ns(void);
int64_t ms_clock_coarse_us(void); /* the wall clock of the last tick: some ms old, and cheap */

/* For tests of users: while virtual, the three clocks of this process run skew_ns ahead of the
 * machine's, that of the wall set_ns more, and no sleep below is longer than
 * MS_CLOCK_VIRTUAL_SLEEP_NS, so that sleepers see a jump soon. They go on at the usual pace: a wait
 * with a time-out ends, also if nobody advances. */
#define MS_CLOCK_VIRTUAL_SLEEP_NS INT64_C(2000000)
void ms_clock_set(bool is_virtual, int64_t skew_ns, int64_t set_ns);
bool ms_clock_is_virtual(void);

static inline void ms_cpu_relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

/* Sleep while *word == expected, at most timeout_ns (negative: for ever). Shared between
 * processes. Returns 0 when woken or when *word differed at once, else ETIMEDOUT or EINTR. May
 * wake for nothing or too early (virtual clock): callers check again. Blocks: call without the GIL.
 */
int ms_futex_wait(const _Atomic uint32_t *word, uint32_t expected, int64_t timeout_ns);

/* Sleep so long, or until a signal comes. Blocks: call without the GIL. */
void ms_rest(int64_t rest_ns);

/* The same for sleepers of several classes: a sleeper with a bit is woken by a wake with that
 * bit. */
int ms_futex_wait_class(const _Atomic uint32_t *word, uint32_t expected, uint32_t bits,
                        int64_t timeout_ns);
void ms_futex_wake_class(const _Atomic uint32_t *word, int32_t count, uint32_t bits);

/* Wake up to count sleepers (INT32_MAX: all); how many slept. */
int32_t ms_futex_wake(const _Atomic uint32_t *word, int32_t count);

/* What kind of file system an open file (O_PATH is enough) lies on: f_type of statfs(2), the same
 * wherever it is mounted. Returns 0 or an errno. */
int ms_file_system(int descriptor, uint32_t *magic);

/* Blocks of the file system behind an open file, as FIEMAP lists them. ms_has_blocks: is there
 * one behind each of the first `length` bytes? false as well where the file system does not tell.
 * ms_unshare: give the file blocks of its own where it shares some with a copy (a reflink), so that
 * a store into them needs none; a hole stays a hole. It does nothing where the file system cannot
 * share blocks or cannot unshare them. ms_can_share, ms_can_unshare: can the file system of an
 * open, allocated file do so? ms_can_share changes the file's second `block` bytes. Each returns
 * an errno or 0 unless a bool. */
bool ms_has_blocks(int descriptor, uint64_t length);
int ms_unshare(int descriptor);
bool ms_can_share(int descriptor, uint64_t block);
bool ms_can_unshare(int descriptor, uint64_t block);

/* Write zeros to an allocated part of a file, at most MS_FILL_BYTES in one call: where the file
 * system can, the page cache then has one folio for what one call wrote, or a few. Returns 0 or an
 * errno. Call without the GIL. */
#define MS_FILL_BYTES (512u << 10)
int ms_file_fill(int descriptor, uint64_t position, uint64_t size);

/* Advice about a page-aligned range of a mapping; each returns 0 or an errno. populate: fault the
 * pages in, writable or not, without touching their bytes; EFAULT where a store would raise
 * SIGBUS. remove: give the blocks back to the file system, the size stays. random: no read-ahead;
 * normal: as at first.
 */
int ms_pages_populate(void *start, size_t size, bool writable);
int ms_pages_remove(void *start, size_t size);
int ms_pages_random(void *start, size_t size);
int ms_pages_normal(void *start, size_t size);
int ms_pages_dontfork(void *start, size_t size);

/* Memory for much that is looked up at random, in pages of 2 MiB where the kernel has them: a walk
 * through the page tables costs more than the memory behind it. Given back by free(); NULL: none.
 */
void *ms_memory_huge(size_t size);

/* Make every page of [start, start + size) dirty again by an atomic store of one word onto itself.
 * The range must be mapped writable and have blocks behind it; its content does not change, also
 * not for a reader in the middle of it. */
void ms_pages_dirty(void *start, size_t size);

/* `size` bytes of zeros, page-aligned, read-only, everybody's, there until the process ends; NULL:
 * no address space for them (or 2^40 were asked for). The first call for a size maps them, which
 * takes no memory; then it is one load. */
const void *ms_zeros(uint64_t size);

/* The fork guard. A child inherits the open file descriptions that prove its parent alive; the
 * handler closes them there. ms_fork_count() differs between a process and its forked child: a
 * handle remembers the value it was made under and refuses use under another. Guarded descriptors:
 * at most 4,096. ms_fork_guard returns 0 or an errno (EMFILE). ms_fork_release forgets a
 * descriptor before it is closed. ms_fork_watch has forks counted from now on, also without one. */
void ms_fork_watch(void);
int ms_fork_guard(int descriptor);
void ms_fork_release(int descriptor);
extern uint32_t ms_fork_counter; /* read through ms_fork_count() */
static inline uint32_t ms_fork_count(void) { return ms_fork_counter; }

#endif
