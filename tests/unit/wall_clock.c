/* For LD_PRELOAD: the clocks are ahead of the machine's by what the file named in WALL_CLOCK says
 * at this moment, two int64 of nanoseconds: CLOCK_REALTIME by both, CLOCK_BOOTTIME and
 * CLOCK_MONOTONIC by the second. A wait until an instant, which a caller has from these clocks,
 * ends when those of the machine come to as much before it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *ahead;

__attribute__((constructor)) static void begin(void) {
  int descriptor = open(getenv("WALL_CLOCK"), O_RDONLY | O_CLOEXEC);
  void *map = mmap(NULL, 16, PROT_READ, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (map == MAP_FAILED) abort();
  ahead = map;
}

static int64_t ahead_of(clockid_t which) {
  if (!ahead) return 0;
  if (which == CLOCK_REALTIME) return ahead[0] + ahead[1];
  return which == CLOCK_BOOTTIME || which == CLOCK_MONOTONIC ? ahead[1] : 0;
}

static struct timespec later(const struct timespec *at, int64_t by) {
  int64_t ns = (int64_t)at->tv_sec * 1000000000 + at->tv_nsec + by;
  return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

int clock_gettime(clockid_t which, struct timespec *out) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(which, out);
  if (result == 0) *out = later(out, ahead_of(which));
  return result;
}

int clock_nanosleep(clockid_t which, int flags, const struct timespec *until,
                    struct timespec *left) {
  static int (*real)(clockid_t, int, const struct timespec *, struct timespec *);
  if (!real)
    real = (int (*)(clockid_t, int, const struct timespec *, struct timespec *))dlsym(
        RTLD_NEXT, "clock_nanosleep");
  if (!(flags & TIMER_ABSTIME)) return real(which, flags, until, left);
  struct timespec at = later(until, -ahead_of(which));
  return real(which, flags, &at, left);
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t which,
                  const struct timespec *restrict until) {
  static int (*real)(sem_t *, clockid_t, const struct timespec *);
  if (!real)
    real = (int (*)(sem_t *, clockid_t, const struct timespec *))dlsym(RTLD_NEXT, "sem_clockwait");
  struct timespec at = later(until, -ahead_of(which));
  return real(semaphore, which, &at);
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec;
  out->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
