/* The thread that renews leases.
 *
 * Thread rule: all state, entries among it, is under `lock`. The thread has it while it renews, so
 * an entry that was removed is touched by nobody.
 *
 * Invariants: (1) the thread wakes at `wake_ns` or before, and `wake_ns` is not later than the
 * first renewal that is due: an entry that is due earlier signals. Removals do not signal; the
 * thread finds out when it wakes, so a worker of short jobs costs one wake-up a third of a lease,
 * not one a job. (2) An entry is listed unless it was removed, its lease was lost, or its time was
 * over. (3) `running` says that `thread` is to be joined by whoever clears it.
 *
 * Forks: the handlers hold `lock` over the fork, so that the child finds whole lists, empties them
 * and starts a thread of its own when it needs one.
 *
 * Crash rule: none; a lease that is not renewed ends.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "ms_heartbeat.h"
#include "ms_delivery.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed; /* of CLOCK_MONOTONIC */
static pthread_t thread;
static bool running;
static bool stopping;
static bool wanted; /* an entry came while the thread was being ended */
static uint32_t
    forks; /* of this process; ms_fork_count() rises only where descriptors are guarded */
static uint32_t count;
static ms_heartbeat_entry *first;
static int64_t wake_ns; /* monotonic; INT64_MAX: when signalled */

static void init_condition(void) {
  pthread_condattr_t attributes;
  pthread_condattr_init(&attributes);
  pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  pthread_cond_init(&changed, &attributes);
  pthread_condattr_destroy(&attributes);
}

static void before_fork(void) { pthread_mutex_lock(&lock); }

static void after_fork_parent(void) { pthread_mutex_unlock(&lock); }

static void after_fork_child(void) {
  first = NULL;
  count = 0;
  running = stopping = wanted = false;
  forks++;
  init_condition(); /* the parent's thread may have slept on it */
  pthread_mutex_unlock(&lock);
}

static void init_once(void) {
  init_condition();
  pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

static void unlist(ms_heartbeat_entry *entry) {
  if (!entry->listed) return;
  if (entry->previous != NULL) {
    entry->previous->next = entry->next;
  } else {
    first = entry->next;
  }
  if (entry->next != NULL) entry->next->previous = entry->previous;
  entry->previous = entry->next = NULL;
  entry->listed = false;
  count--;
}

static int64_t third_ns(int64_t lease_ms) {
  int64_t third = lease_ms * 1000000 / 3;
  return third > 0 ? third : 1;
}

static ms_status renew(ms_heartbeat_entry *entry, int64_t now_ns) {
  ms_status status = entry->renew(entry->word, &entry->token, entry->lease_ms, now_ns);
  if (status != MS_OK) {
    entry->lost = true;
    unlist(entry);
    return MS_LOST;
  }
  entry->renew_ns = now_ns + third_ns(entry->lease_ms);
  return MS_OK;
}

/* Renew what is due; returns when to do so again. */
static int64_t renew_due(int64_t now_ns) {
  int64_t next_ns = INT64_MAX;
  for (ms_heartbeat_entry *entry = first, *next; entry != NULL; entry = next) {
    next = entry->next;
    if (now_ns >= entry->end_ns) {
      entry->over = true;
      unlist(entry);
      continue;
    }
    if (now_ns >= entry->renew_ns && renew(entry, now_ns) != MS_OK) continue;
    if (entry->renew_ns < next_ns) next_ns = entry->renew_ns;
  }
  return next_ns;
}

static void sleep_until(int64_t at_ns) {
  wake_ns = at_ns;
  if (at_ns == INT64_MAX) {
    pthread_cond_wait(&changed, &lock);
    return;
  }
  int64_t left_ns = at_ns - ms_clock_monotonic_ns();
  if (left_ns <= 0) return;
  if (ms_clock_is_virtual() && left_ns > MS_CLOCK_VIRTUAL_SLEEP_NS) {
    left_ns = MS_CLOCK_VIRTUAL_SLEEP_NS;
  }
  struct timespec until; /* of the machine's clock, not of the virtual one */
  clock_gettime(CLOCK_MONOTONIC, &until);
  int64_t nanoseconds = until.tv_nsec + left_ns % 1000000000;
  until.tv_sec += left_ns / 1000000000 + nanoseconds / 1000000000;
  until.tv_nsec = nanoseconds % 1000000000;
  pthread_cond_timedwait(&changed, &lock, &until);
}

static void *run(void *unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  while (!stopping) sleep_until(renew_due(ms_clock_monotonic_ns()));
  pthread_mutex_unlock(&lock);
  return NULL;
}

/* Signals are for the threads of Python. */
static int start(void) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(&thread, NULL, run, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  running = error == 0;
  return error;
}

typedef ms_status (*renewal)(_Atomic uint64_t *, uint64_t *, int64_t, int64_t);

static int add(ms_heartbeat_entry *entry, renewal how, _Atomic uint64_t *word, uint64_t token,
               int64_t lease_ms, int64_t limit_ns) {
  pthread_once(&once, init_once);
  int64_t now_ns = ms_clock_monotonic_ns();
  pthread_mutex_lock(&lock);
  bool endless = limit_ns < 0 || limit_ns > INT64_MAX - now_ns;
  *entry = (ms_heartbeat_entry){.word = word,
                                .renew = how,
                                .token = token,
                                .lease_ms = lease_ms,
                                .renew_ns = now_ns + third_ns(lease_ms),
                                .end_ns = endless ? INT64_MAX : now_ns + limit_ns,
                                .forks = forks};
  int error = 0;
  if (!running && !stopping) {
    wake_ns = INT64_MIN; /* it renews before it sleeps */
    error = start();
  }
  if (error == 0) {
    entry->listed = true;
    entry->next = first;
    if (first != NULL) first->previous = entry;
    first = entry;
    count++;
    if (stopping) wanted = true;
    if (entry->renew_ns < wake_ns) pthread_cond_signal(&changed);
  }
  pthread_mutex_unlock(&lock);
  return error;
}

int ms_heartbeat_add(ms_heartbeat_entry *entry, _Atomic uint64_t *word, uint64_t token,
                     int64_t lease_ms, int64_t limit_ns) {
  return add(entry, ms_lease_renew, word, token, lease_ms, limit_ns);
}

static ms_status renew_session(_Atomic uint64_t *deadline, uint64_t *io_token, int64_t session_ms,
                               int64_t now_ns) {
  return ms_group_renew(deadline, io_token, (uint64_t)(now_ns + session_ms * 1000000));
}

int ms_heartbeat_add_session(ms_heartbeat_entry *entry, _Atomic uint64_t *deadline, uint64_t token,
                             int64_t session_ms) {
  return add(entry, renew_session, deadline, token, session_ms, -1);
}

static void tell(const ms_heartbeat_entry *entry, ms_heartbeat_state *out_state) {
  *out_state = (ms_heartbeat_state){entry->token, entry->lost, entry->over};
}

void ms_heartbeat_remove(ms_heartbeat_entry *entry, ms_heartbeat_state *out_state) {
  pthread_mutex_lock(&lock);
  if (entry->forks == forks) unlist(entry); /* in a child its neighbours are not in the list */
  entry->listed = false;
  entry->word = NULL;
  tell(entry, out_state);
  pthread_mutex_unlock(&lock);
}

void ms_heartbeat_check(const ms_heartbeat_entry *entry, ms_heartbeat_state *out_state) {
  pthread_mutex_lock(&lock);
  tell(entry, out_state);
  if (entry->word != NULL &&
      atomic_load_explicit(entry->word, memory_order_relaxed) != entry->token)
    out_state->lost = true;
  pthread_mutex_unlock(&lock);
}

ms_status ms_heartbeat_extend(ms_heartbeat_entry *entry, int64_t lease_ms) {
  ms_status status = MS_LOST;
  pthread_mutex_lock(&lock);
  if (entry->forks == forks && entry->word != NULL && !entry->lost) {
    entry->lease_ms = lease_ms;
    status = renew(entry, ms_clock_monotonic_ns());
    if (status == MS_OK && entry->renew_ns < wake_ns) pthread_cond_signal(&changed);
  }
  pthread_mutex_unlock(&lock);
  return status;
}

void ms_heartbeat_stop(void) {
  pthread_mutex_lock(&lock);
  bool join = running && !stopping;
  pthread_t joined = thread;
  if (join) {
    stopping = true;
    pthread_cond_signal(&changed);
  }
  pthread_mutex_unlock(&lock);
  if (!join) return;
  pthread_join(joined, NULL);
  pthread_mutex_lock(&lock);
  running = stopping = false;
  wake_ns = INT64_MIN;
  if (wanted) (void)start();
  wanted = false;
  pthread_mutex_unlock(&lock);
}

uint32_t ms_heartbeat_count(void) {
  pthread_mutex_lock(&lock);
  uint32_t result = count;
  pthread_mutex_unlock(&lock);
  return result;
}
