/* Batches as Arrow: the C data interface and the C stream interface, out and in, no library needed.
 *
 * Export hands out the buffers of a view as they lie, import finds the bytes of foreign columns as
 * they lie: neither copies a key or a value. Functions are pure but for one process-wide list, the
 * pins that consumers have released. Knows no file, no segment and no Python; a pin is an opaque
 * pointer.
 */
#ifndef MS_ARROW_H
#define MS_ARROW_H

#include "ms_batch.h"
#include "ms_status.h"

/* The ABI of the Arrow C data interface, under the guard that every implementation uses. */
#ifndef ARROW_C_DATA_INTERFACE
#define ARROW_C_DATA_INTERFACE

#define ARROW_FLAG_DICTIONARY_ORDERED 1
#define ARROW_FLAG_NULLABLE 2
#define ARROW_FLAG_MAP_KEYS_SORTED 4

struct ArrowSchema {
  const char *format;
  const char *name;
  const char *metadata;
  int64_t flags;
  int64_t n_children;
  struct ArrowSchema **children;
  struct ArrowSchema *dictionary;
  void (*release)(struct ArrowSchema *); /* NULL: released, or moved elsewhere */
  void *private_data;
};

struct ArrowArray {
  int64_t length;
  int64_t null_count;
  int64_t offset;
  int64_t n_buffers;
  int64_t n_children;
  const void **buffers;
  struct ArrowArray **children;
  struct ArrowArray *dictionary;
  void (*release)(struct ArrowArray *);
  void *private_data;
};

#endif

/* The ABI of the Arrow C stream interface. Its functions return 0 or an errno. */
#ifndef ARROW_C_STREAM_INTERFACE
#define ARROW_C_STREAM_INTERFACE

struct ArrowArrayStream {
  int (*get_schema)(struct ArrowArrayStream *, struct ArrowSchema *out);
  int (*get_next)(struct ArrowArrayStream *, struct ArrowArray *out);
  const char *(*get_last_error)(struct ArrowArrayStream *);
  void (*release)(struct ArrowArrayStream *);
  void *private_data;
};

#endif

/* The columns of an export, always in this order, whatever the batch has:
 *   partition  int32
 *   offset     int64
 *   timestamp  timestamp[us, UTC]
 *   key        binary, nullable (a batch without keys: all null)
 *   value      binary, nullable
 *   headers    map<utf8, binary> (none: empty maps) */
enum {
  MS_ARROW_PARTITION = 1 << 0,
  MS_ARROW_OFFSET = 1 << 1,
  MS_ARROW_TIMESTAMP = 1 << 2,
  MS_ARROW_KEY = 1 << 3,
  MS_ARROW_VALUE = 1 << 4,
  MS_ARROW_HEADERS = 1 << 5,
  MS_ARROW_DEFAULT = (1 << 5) - 1,
  MS_ARROW_ALL = (1 << 6) - 1
};

/* --- export ----------------------------------------------------------------------------------- */

/* Records [first, first + count) of a checked view. `pin` is what keeps the view's bytes where they
 * are (NULL: nothing has to). An export that returns MS_OK owns the pin and gives it back through
 * ms_arrow_take_released(), once; one that fails leaves it with the caller. */
typedef struct ms_arrow_source {
  ms_view view;
  uint32_t first;
  uint32_t count;
  int32_t partition;
  uint32_t columns; /* bits of MS_ARROW_ALL, at least one */
  void *pin;
} ms_arrow_source;

/* A struct with the given columns as fields: one constant schema, known without a batch.
 * MS_INVALID: no column, or an unknown bit. MS_NOMEM. */
MS_MUST_USE ms_status ms_arrow_export_schema(struct ArrowSchema *out, uint32_t columns,
                                             ms_error *err);

/* The records as one struct array of that schema. Keys, values, headers, and timestamps and offsets
 * where the view has them, point into the view; keys and headers that it has not are zeros that all
 * exports share; the rest is filled, once, into memory of the export. Without filled columns the
 * work does not depend on count. The array and each of its children may be moved, and released by
 * any thread, in any order; no call of Python is made. MS_INVALID: columns as above, or records
 * that the view does not have. MS_NOMEM. */
MS_MUST_USE ms_status ms_arrow_export_array(const ms_arrow_source *source, struct ArrowArray *out,
                                            ms_error *err);

/* A stream of exactly that array, which is made when it is asked for. Fails like
 * ms_arrow_export_array. */
MS_MUST_USE ms_status ms_arrow_export_stream(const ms_arrow_source *source,
                                             struct ArrowArrayStream *out, ms_error *err);

/* A pin that a consumer has let go of. */
typedef struct ms_arrow_pin {
  struct ms_arrow_pin *next;
  void *pin;
} ms_arrow_pin;

/* Take the whole list of released pins; NULL: none. Lock-free, any thread; one load when there are
 * none. The caller owns what it took: for each, let go of `pin` and free the node with
 * ms_arrow_pin_free(). */
ms_arrow_pin *ms_arrow_take_released(void);
void ms_arrow_pin_free(ms_arrow_pin *released);

/* --- import ----------------------------------------------------------------------------------- */

/* What a schema or an array says is checked where that is cheap: counts, missing
 * buffers, falling offsets, views out of their buffer are MS_INVALID. How long a buffer is only its
 * producer knows. Elements are counted from the array's own `offset`; those of a struct's child
 * begin at the struct's `offset`. Messages name the column and the element. */

/* Can a column of this schema be imported as slices, as timestamps? MS_UNSUPPORTED: no, and why. */
MS_MUST_USE ms_status ms_arrow_check_slices(const struct ArrowSchema *schema, ms_error *err);
MS_MUST_USE ms_status ms_arrow_check_timestamps(const struct ArrowSchema *schema, ms_error *err);

/* Is this a struct array that fits its struct schema, without null structs? MS_INVALID or
 * MS_UNSUPPORTED otherwise. Children are there and long enough afterwards; they are not
 * read. */
MS_MUST_USE ms_status ms_arrow_check_struct(const struct ArrowSchema *schema,
                                            const struct ArrowArray *array, ms_error *err);

/* Fill out[0, count) with the bytes of elements [first, first + count); size -1 for null. They
 * point into the array, so it must stay. Binary and text in every layout, fixed-size binary, and
 * fixed-width values as their little-endian bytes; `out` is undefined after a failure. */
MS_MUST_USE ms_status ms_arrow_import_slices(const struct ArrowSchema *schema,
                                             const struct ArrowArray *array, uint64_t first,
                                             uint64_t count, ms_slice *out, ms_error *err);

/* Largest distance of a timestamp from 1970, in microseconds; about 146,000 years. */
#define MS_ARROW_TIMESTAMP_MAX (INT64_C(1) << 62)

/* Fill out[0, count) with elements [first, first + count) in microseconds since 1970: timestamps of
 * any unit and zone (nanoseconds are rounded down), or int64 that are microseconds already.
 * MS_INVALID: an element is null. MS_LIMIT: it is further from 1970 than MS_ARROW_TIMESTAMP_MAX.
 * `out` is undefined after a failure. */
MS_MUST_USE ms_status ms_arrow_import_timestamps(const struct ArrowSchema *schema,
                                                 const struct ArrowArray *array, uint64_t first,
                                                 uint64_t count, int64_t *out, ms_error *err);

/* Index of the child with this name. -1: there is none. -2: there are several. */
int64_t ms_arrow_find_child(const struct ArrowSchema *schema, const char *name);

#endif
