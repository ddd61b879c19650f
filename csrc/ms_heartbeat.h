/* One thread of this process that renews leases while Python code works on their messages, and the
 * sessions of consumers.
 *
 * It needs no GIL and no Python thread. It starts with the first entry, sleeps without end while
 * there is none, and is ended by ms_heartbeat_stop(); with the next entry it starts again. In a
 * forked child there is neither thread nor entry: the leases are the parent's.
 *
 * Thread-safe. Each function waits for the renewals that are under way (compare-and-swaps) and for
 * nothing else, except ms_heartbeat_stop(), which joins the thread.
 */
#ifndef MS_HEARTBEAT_H
#define MS_HEARTBEAT_H

#include "ms_group.h"

/* The caller has the memory of entry and word, and keeps both until ms_heartbeat_remove() returned.
 * It writes none of the fields. */
typedef struct ms_heartbeat_entry {
  _Atomic uint64_t *word; /* NULL: removed */
  ms_status (*renew)(_Atomic uint64_t *word, uint64_t *io_token, int64_t lease_ms, int64_t now_ns);
  uint64_t token; /* of the last renewal */
  int64_t lease_ms;
  int64_t renew_ns; /* monotonic: the next renewal */
  int64_t end_ns;   /* monotonic: no renewal after it; INT64_MAX: never */
  uint32_t forks;   /* ms_fork_count() of the process that added it */
  bool lost;        /* the lease ended, or was given to another */
  bool over;        /* the time limit has passed */
  bool listed;
  struct ms_heartbeat_entry *previous, *next;
} ms_heartbeat_entry;

/* What is known of a lease that is being renewed. */
typedef struct ms_heartbeat_state {
  uint64_t token;
  bool lost;
  bool over;
} ms_heartbeat_state;

/* Renew the lease every third of lease_ms from now on, for limit_ns at most (negative: as long as
 * the entry is there). The token must be the lease's now. 0, or the errno of the thread that could
 * not be started: then the entry is not there. */
MS_MUST_USE int ms_heartbeat_add(ms_heartbeat_entry *entry, _Atomic uint64_t *word, uint64_t token,
                                 int64_t lease_ms, int64_t limit_ns);

/* The same for the session of a consumer: `deadline` is pushed to session_ms from then, again and
 * again, as long as it is at the token. */
MS_MUST_USE int ms_heartbeat_add_session(ms_heartbeat_entry *entry, _Atomic uint64_t *deadline,
                                         uint64_t token, int64_t session_ms);

/* Renew no more; out_state has the token to present from now on. When it returned, nobody touches
 * entry or word. Again, or in a forked child: what was known. */
void ms_heartbeat_remove(ms_heartbeat_entry *entry, ms_heartbeat_state *out_state);

/* The same, and go on; also says whether the word still is the token. */
void ms_heartbeat_check(const ms_heartbeat_entry *entry, ms_heartbeat_state *out_state);

/* Renew now, with a lease of another length, and go on with that: MS_OK or MS_LOST. */
MS_MUST_USE ms_status ms_heartbeat_extend(ms_heartbeat_entry *entry, int64_t lease_ms);

/* End the thread and wait for its end. Entries stay; the next ms_heartbeat_add() starts it anew. */
void ms_heartbeat_stop(void);

/* Leases that are being renewed. */
uint32_t ms_heartbeat_count(void);

#endif
