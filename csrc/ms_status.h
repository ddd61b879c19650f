/* The status of every fallible function, and the text that goes with a failure.
 *
 * 0 is success. Above 0: an expected outcome that the caller acts on. Below 0: a failure. Out-
 * parameters are written only on MS_OK. A row: name, value, the class of errors.py that the
 * binding raises ("" when the binding never raises it), text. This list is the only place where a
 * status exists.
 */
#ifndef MS_STATUS_H
#define MS_STATUS_H

#include "ms_platform.h"

#define MS_STATUS_MAP(XX)                                                                 \
  XX(OK, 0, "", "success")                                                                \
  XX(END, 1, "", "nothing more here")                                                     \
  XX(BUSY, 2, "", "another process owns the word")                                        \
  XX(TIMEOUT, 3, "LockTimeout", "the time-out passed")                                    \
  XX(ROLL, 4, "", "the active segment has no room: map its successor and try again")      \
  XX(MOVED, 5, "", "another process changed the active segment: map it and try again")    \
  XX(WALK, 6, "", "the partition was not recovered in this generation: walk it first")    \
  XX(INTERRUPTED, 7, "", "a signal arrived: handle it and try again")                     \
  XX(FULL, 8, "QueueFull", "as many messages as the queue holds are not finished")        \
  XX(EMPTY, 9, "Empty", "no message is ready")                                            \
  XX(LOST, 10, "LeaseLost", "the lease ended, or the message was given to another")       \
  XX(GROW_SLOTS, 11, "", "allocate and publish more slots, then try again")               \
  XX(GROW_BLOCKS, 12, "", "allocate and publish more blocks, then try again")             \
  XX(BEHIND, 13, "", "the table of producers has not read all of the log: walk it first") \
  XX(RESENT, 14, "", "a record of this producer with this sequence is there already")     \
  XX(FENCED, 15, "Fenced", "the partition has another owner now")                         \
  XX(PENDING, 16, "", "a position is pending: its transaction is not decided yet")        \
  XX(CORRUPT, -1, "CorruptBatch", "bytes in a file are not valid")                        \
  XX(VERSION, -2, "VersionMismatch", "a newer format")                                    \
  XX(LIMIT, -3, "LimitExceeded", "larger than the format allows")                         \
  XX(INVALID, -4, "InvalidArgument", "an argument that makes no sense")                   \
  XX(POISONED, -5, "Poisoned", "an earlier sync failed")                                  \
  XX(CLOSED, -6, "Closed", "the handle is closed")                                        \
  XX(NOMEM, -7, "", "no memory")                                                          \
  XX(UNSUPPORTED, -8, "Unsupported", "not supported here")

typedef enum ms_status {
#define MS_STATUS_ENUM(name, value, class_name, text) MS_##name = (value),
  MS_STATUS_MAP(MS_STATUS_ENUM)
#undef MS_STATUS_ENUM
} ms_status;

/* Filled only when a status below 0 is returned; lives on the caller's stack; may be NULL.
 * `position` is a byte of the partition's log, `expected` and `found` are what was compared, where
 * that applies. */
typedef struct ms_error {
  uint64_t position;
  uint64_t expected;
  uint64_t found;
  char text[232];
} ms_error;

typedef struct ms_status_row {
  int value;
  const char *name;
  const char *class_name;
  const char *text;
} ms_status_row;

/* The list above as data, ended by a row whose name is NULL. */
const ms_status_row *ms_status_rows(void);

/* Fill err (unless NULL) and return status: `return ms_fail(err, MS_CORRUPT, at, expected, found,
 * "...", ...)`. */
MS_MUST_USE ms_status ms_fail(ms_error *err, ms_status status, uint64_t position, uint64_t expected,
                              uint64_t found, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

#define MS_TRY(expression)                                         \
  do {                                                             \
    ms_status ms_try_status = (expression);                        \
    if (MS_UNLIKELY(ms_try_status != MS_OK)) return ms_try_status; \
  } while (0)

#endif
