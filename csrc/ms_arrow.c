/* Arrow C data interface, export and import.
 *
 * Threads: export and import are pure; release functions run in any thread, at the same time as
 * each other. Invariants: (1) an exported tree is one block of memory, counted by the arrays that
 * are not yet released; each of them is alone enough to keep the block and the pin. (2) The node
 * that carries a pin back is allocated before the export succeeds, so release cannot fail.
 * (3) Nothing but the list of released pins, and zeros, is shared between exports.
 * Not here: who owns a pin, when the list is drained, what a column is used for.
 */
#include "ms_arrow.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { COLUMN_COUNT = 6, NODE_COUNT = COLUMN_COUNT + 3, BUFFER_ALIGNMENT = 64 };

/* --- released pins ---------------------------------------------------------------------------- */

static _Atomic(ms_arrow_pin *) released_pins;

static void push_released(ms_arrow_pin *node) {
  if (node == NULL) return;
  ms_arrow_pin *head = atomic_load_explicit(&released_pins, memory_order_relaxed);
  /* Release pairs with the acquire of ms_arrow_take_released: whoever lets go of the pin does so
   * after all that its consumers did. Only whole lists are taken, so a head that returns is no
   * danger. */
  do {
    node->next = head;
  } while (!atomic_compare_exchange_weak_explicit(&released_pins, &head, node, memory_order_release,
                                                  memory_order_relaxed));
}

ms_arrow_pin *ms_arrow_take_released(void) {
  if (atomic_load_explicit(&released_pins, memory_order_relaxed) == NULL) return NULL;
  return atomic_exchange_explicit(&released_pins, NULL, memory_order_acquire);
}

void ms_arrow_pin_free(ms_arrow_pin *released) { free(released); }

static ms_status make_pin(void *pin, ms_arrow_pin **out_node, ms_error *err) {
  *out_node = NULL;
  if (pin == NULL) return MS_OK;
  ms_arrow_pin *node = malloc(sizeof *node);
  if (node == NULL) return ms_fail(err, MS_NOMEM, 0, 0, 0, "no memory for an Arrow export");
  *node = (ms_arrow_pin){NULL, pin};
  *out_node = node;
  return MS_OK;
}

/* --- schema out ------------------------------------------------------------------------------- */

typedef struct field {
  const char *format;
  const char *name;
  int64_t flags;
} field;

/* In the order of the bits of MS_ARROW_ALL; below `headers`, what a map consists of. */
static const field column_fields[COLUMN_COUNT] = {
    {"i", "partition", 0},
    {"l", "offset", 0},
    {"tsu:UTC", "timestamp", 0},
    {"z", "key", ARROW_FLAG_NULLABLE},
    {"z", "value", ARROW_FLAG_NULLABLE},
    {"+m", "headers", 0},
};
static const field entries_field = {"+s", "entries", 0};
static const field name_field = {"u", "key", 0};
static const field header_value_field = {"z", "value", ARROW_FLAG_NULLABLE};

typedef struct schema_block {
  _Atomic uint32_t references; /* schemas of the tree that are not released */
  uint32_t node_count;
  struct ArrowSchema nodes[NODE_COUNT]; /* all but the root, which is the consumer's */
  struct ArrowSchema *children[NODE_COUNT];
} schema_block;

static void release_schema(struct ArrowSchema *schema) {
  schema_block *block = schema->private_data;
  for (int64_t i = 0; i < schema->n_children; i++) {
    struct ArrowSchema *child = schema->children[i];
    if (child->release != NULL) child->release(child); /* NULL: the consumer has moved it */
  }
  schema->release = NULL;
  /* Acquire and release: the last one frees after all that the others did. */
  if (atomic_fetch_sub_explicit(&block->references, 1, memory_order_acq_rel) == 1) free(block);
}

static void set_schema(struct ArrowSchema *schema, schema_block *block, const field *like) {
  *schema = (struct ArrowSchema){.format = like->format,
                                 .name = like->name,
                                 .flags = like->flags,
                                 .release = release_schema,
                                 .private_data = block};
  atomic_fetch_add_explicit(&block->references, 1, memory_order_relaxed);
}

/* Add `count` fields below a schema of the block. Returns the first; the others follow it. */
static struct ArrowSchema *add_fields(struct ArrowSchema *parent, schema_block *block,
                                      const field *const *fields, uint32_t count) {
  struct ArrowSchema *first = &block->nodes[block->node_count];
  parent->children = &block->children[block->node_count];
  parent->n_children = count;
  for (uint32_t i = 0; i < count; i++) {
    set_schema(&first[i], block, fields[i]);
    parent->children[i] = &first[i];
  }
  block->node_count += count;
  return first;
}

static ms_status check_columns(uint32_t columns, ms_error *err) {
  if (columns != 0 && (columns & ~(uint32_t)MS_ARROW_ALL) == 0) return MS_OK;
  return ms_fail(err, MS_INVALID, 0, MS_ARROW_ALL, columns,
                 "columns 0x%" PRIx32 ": at least one bit, and only those of 0x%x", columns,
                 (unsigned)MS_ARROW_ALL);
}

ms_status ms_arrow_export_schema(struct ArrowSchema *out, uint32_t columns, ms_error *err) {
  MS_TRY(check_columns(columns, err));
  schema_block *block = calloc(1, sizeof *block);
  if (block == NULL) return ms_fail(err, MS_NOMEM, 0, 0, 0, "no memory for an Arrow schema");
  const field *fields[COLUMN_COUNT];
  uint32_t count = 0;
  for (uint32_t column = 0; column < COLUMN_COUNT; column++)
    if (columns >> column & 1) fields[count++] = &column_fields[column];
  const field root = {"+s", "", 0};
  set_schema(out, block, &root);
  struct ArrowSchema *first = add_fields(out, block, fields, count);
  if (columns & MS_ARROW_HEADERS) {
    const field *entries[] = {&entries_field}, *parts[] = {&name_field, &header_value_field};
    add_fields(add_fields(&first[count - 1], block, entries, 1), block, parts, 2);
  }
  return MS_OK;
}

/* --- array out -------------------------------------------------------------------------------- */

/* One export. The filled buffers lie behind it in the same allocation. */
typedef struct array_block {
  _Atomic uint32_t references; /* arrays of the tree that are not released */
  uint32_t node_count;
  ms_arrow_pin *pin;
  struct ArrowArray nodes[NODE_COUNT]; /* all but the root, which is the consumer's */
  struct ArrowArray *children[NODE_COUNT];
  const void *buffers[NODE_COUNT + 1][3]; /* the last is the root's */
} array_block;

static void release_array(struct ArrowArray *array) {
  array_block *block = array->private_data;
  for (int64_t i = 0; i < array->n_children; i++) {
    struct ArrowArray *child = array->children[i];
    if (child->release != NULL) child->release(child); /* NULL: the consumer has moved it */
  }
  array->release = NULL;
  /* Acquire and release: the last one gives the pin back and frees after all the others did. */
  if (atomic_fetch_sub_explicit(&block->references, 1, memory_order_acq_rel) != 1) return;
  push_released(block->pin);
  free(block);
}

/* Buffers, length and offset of one array; no child yet. A bitmap means that nobody counted its
 * nulls. */
typedef struct array_parts {
  int64_t length;
  int64_t offset;
  int64_t n_buffers;
  const void *buffers[3]; /* the first is the validity bitmap */
} array_parts;

static void set_array(struct ArrowArray *array, array_block *block, uint32_t slot,
                      const array_parts *parts) {
  memcpy(block->buffers[slot], parts->buffers, sizeof parts->buffers);
  *array = (struct ArrowArray){.length = parts->length,
                               .null_count = parts->buffers[0] != NULL ? -1 : 0,
                               .offset = parts->offset,
                               .n_buffers = parts->n_buffers,
                               .buffers = block->buffers[slot],
                               .release = release_array,
                               .private_data = block};
  block->references++; /* not shared yet */
}

/* Add the next array of the block as a child. Children of one parent are added in one run. */
static struct ArrowArray *add_array(struct ArrowArray *parent, array_block *block,
                                    const array_parts *parts) {
  uint32_t slot = block->node_count++;
  if (parent->n_children == 0) parent->children = &block->children[slot];
  block->children[slot] = &block->nodes[slot];
  parent->n_children++;
  set_array(&block->nodes[slot], block, slot, parts);
  return &block->nodes[slot];
}

static uint64_t align_buffer(uint64_t bytes) {
  return (bytes + BUFFER_ALIGNMENT - 1) & ~(uint64_t)(BUFFER_ALIGNMENT - 1);
}

/* Memory for the columns that the view has not: where each begins in the block. */
typedef struct fill_layout {
  uint64_t partitions, offsets, timestamps;
  uint64_t end;
} fill_layout;

static uint64_t place_fill(fill_layout *layout, bool wanted, uint64_t bytes) {
  uint64_t at = layout->end;
  if (wanted) layout->end += align_buffer(bytes);
  return at;
}

static fill_layout lay_out_fills(const ms_arrow_source *source) {
  const ms_view *view = &source->view;
  const uint32_t columns = source->columns;
  const uint64_t count = source->count;
  fill_layout layout = {.end = align_buffer(sizeof(array_block))};
  layout.partitions = place_fill(&layout, (columns & MS_ARROW_PARTITION) != 0, 4 * count);
  layout.offsets =
      place_fill(&layout, (columns & MS_ARROW_OFFSET) != 0 && view->offsets == NULL, 8 * count);
  layout.timestamps = place_fill(
      &layout, (columns & MS_ARROW_TIMESTAMP) != 0 && view->timestamps == NULL, 8 * count);
  return layout;
}

/* Offsets, bitmap and bytes of the keys or headers that the view has not: shared, so that a column
 * that is not there costs the same for any number of records. False: no memory. */
static bool find_zeros(const ms_arrow_source *source, const void **out_zeros) {
  const ms_view *view = &source->view;
  const uint32_t columns = source->columns;
  *out_zeros = NULL;
  if (((columns & MS_ARROW_KEY) == 0 || view->key_offsets != NULL) &&
      ((columns & MS_ARROW_HEADERS) == 0 || view->header_offsets != NULL))
    return true;
  *out_zeros = ms_zeros(4 * ((uint64_t)source->count + 1));
  return *out_zeros != NULL;
}

static const void *fill_partitions(void *at, uint64_t count, int32_t partition) {
  int32_t *out = at;
  for (uint64_t i = 0; i < count; i++) out[i] = partition;
  return at;
}

static const void *fill_timestamps(void *at, uint64_t count, int64_t timestamp) {
  int64_t *out = at;
  for (uint64_t i = 0; i < count; i++) out[i] = timestamp;
  return at;
}

static const void *fill_offsets(void *at, uint64_t count, uint64_t offset) {
  int64_t *out = at;
  for (uint64_t i = 0; i < count; i++) out[i] = (int64_t)(offset + i);
  return at;
}

static void add_headers(struct ArrowArray *root, array_block *block, const ms_arrow_source *source,
                        const void *zeros) {
  const ms_view *view = &source->view;
  const bool present = view->header_offsets != NULL;
  const int64_t headers = present ? (int64_t)view->header_count : 0;
  const array_parts map = {.length = source->count,
                           .offset = present ? (int64_t)source->first : 0,
                           .n_buffers = 2,
                           .buffers = {NULL, present ? view->header_offsets : zeros}};
  const array_parts entries = {.length = headers, .n_buffers = 1};
  const array_parts names = {
      .length = headers,
      .n_buffers = 3,
      .buffers = {NULL, present ? view->name_offsets : zeros, present ? view->names : zeros}};
  const array_parts values = {.length = headers,
                              .n_buffers = 3,
                              .buffers = {NULL, present ? view->header_value_offsets : zeros,
                                          present ? view->header_values : zeros}};
  struct ArrowArray *below = add_array(add_array(root, block, &map), block, &entries);
  add_array(below, block, &names);
  add_array(below, block, &values);
}

/* An export that owns `pin` (may be NULL) when it succeeds. */
static ms_status export_array(const ms_arrow_source *source, ms_arrow_pin *pin,
                              struct ArrowArray *out, ms_error *err) {
  const ms_view *view = &source->view;
  const uint32_t columns = source->columns;
  const int64_t first = source->first, count = source->count;
  const fill_layout layout = lay_out_fills(source);
  const void *zeros;
  uint8_t *memory = find_zeros(source, &zeros) ? aligned_alloc(BUFFER_ALIGNMENT, layout.end) : NULL;
  if (memory == NULL)
    return ms_fail(err, MS_NOMEM, 0, layout.end, 0,
                   "no memory for an Arrow export of %" PRIu64 " bytes", layout.end);
  array_block *block = (array_block *)(void *)memory;
  memset(block, 0, sizeof *block);
  block->pin = pin;

  const array_parts root = {.length = count, .n_buffers = 1};
  set_array(out, block, NODE_COUNT, &root);
  if (columns & MS_ARROW_PARTITION) {
    const void *filled =
        fill_partitions(memory + layout.partitions, source->count, source->partition);
    const array_parts parts = {.length = count, .n_buffers = 2, .buffers = {NULL, filled}};
    add_array(out, block, &parts);
  }
  if (columns & MS_ARROW_OFFSET) {
    array_parts parts = {count, first, 2, {NULL, view->offsets}};
    if (view->offsets == NULL) {
      parts.offset = 0;
      parts.buffers[1] =
          fill_offsets(memory + layout.offsets, source->count, view->base_offset + source->first);
    }
    add_array(out, block, &parts);
  }
  if (columns & MS_ARROW_TIMESTAMP) {
    array_parts parts = {count, first, 2, {NULL, view->timestamps}};
    if (view->timestamps == NULL) {
      parts.offset = 0;
      parts.buffers[1] =
          fill_timestamps(memory + layout.timestamps, source->count, view->timestamp_min);
    }
    add_array(out, block, &parts);
  }
  if (columns & MS_ARROW_KEY) {
    const bool present = view->key_offsets != NULL;
    const array_parts parts = {
        count, first, 3, {view->key_validity, view->key_offsets, view->keys}};
    const array_parts nulls = {count, 0, 3, {zeros, zeros, zeros}};
    struct ArrowArray *keys = add_array(out, block, present ? &parts : &nulls);
    if (!present) keys->null_count = count;
  }
  if (columns & MS_ARROW_VALUE) {
    const array_parts parts = {
        count, first, 3, {view->value_validity, view->value_offsets, view->values}};
    add_array(out, block, &parts);
  }
  if (columns & MS_ARROW_HEADERS) add_headers(out, block, source, zeros);
  return MS_OK;
}

static ms_status check_source(const ms_arrow_source *source, ms_error *err) {
  MS_TRY(check_columns(source->columns, err));
  const uint32_t available = source->view.count;
  if (source->first > available || source->count > available - source->first)
    return ms_fail(err, MS_INVALID, 0, available, (uint64_t)source->first + source->count,
                   "records %" PRIu32 " and %" PRIu32 " more of a batch of %" PRIu32, source->first,
                   source->count, available);
  return MS_OK;
}

ms_status ms_arrow_export_array(const ms_arrow_source *source, struct ArrowArray *out,
                                ms_error *err) {
  ms_arrow_pin *pin;
  MS_TRY(check_source(source, err));
  MS_TRY(make_pin(source->pin, &pin, err));
  ms_status status = export_array(source, pin, out, err);
  if (status != MS_OK) free(pin);
  return status;
}

/* --- stream out ------------------------------------------------------------------------------- */

typedef struct stream_block {
  ms_arrow_source source;
  ms_arrow_pin *pin; /* NULL when the array has taken it, or there is none */
  bool done;
  ms_error error; /* text "": the last call was no failure */
} stream_block;

static int stream_result(stream_block *block, ms_status status) {
  if (status == MS_OK) {
    block->error.text[0] = '\0';
    return 0;
  }
  return status == MS_NOMEM ? ENOMEM : EINVAL;
}

static int stream_schema(struct ArrowArrayStream *stream, struct ArrowSchema *out) {
  stream_block *block = stream->private_data;
  return stream_result(block, ms_arrow_export_schema(out, block->source.columns, &block->error));
}

static int stream_next(struct ArrowArrayStream *stream, struct ArrowArray *out) {
  stream_block *block = stream->private_data;
  ms_status status = MS_OK;
  if (block->done)
    memset(out, 0, sizeof *out); /* a released array is the end of a stream */
  else
    status = export_array(&block->source, block->pin, out, &block->error);
  if (status == MS_OK) {
    block->done = true;
    block->pin = NULL;
  }
  return stream_result(block, status);
}

static const char *stream_error(struct ArrowArrayStream *stream) {
  stream_block *block = stream->private_data;
  return block->error.text[0] != '\0' ? block->error.text : NULL;
}

static void release_stream(struct ArrowArrayStream *stream) {
  stream_block *block = stream->private_data;
  push_released(block->pin);
  free(block);
  stream->release = NULL;
}

ms_status ms_arrow_export_stream(const ms_arrow_source *source, struct ArrowArrayStream *out,
                                 ms_error *err) {
  MS_TRY(check_source(source, err));
  stream_block *block = calloc(1, sizeof *block);
  if (block == NULL) return ms_fail(err, MS_NOMEM, 0, 0, 0, "no memory for an Arrow stream");
  block->source = *source;
  ms_status status = make_pin(source->pin, &block->pin, err);
  if (status != MS_OK) {
    free(block);
    return status;
  }
  *out = (struct ArrowArrayStream){stream_schema, stream_next, stream_error, release_stream, block};
  return MS_OK;
}

/* --- formats in ------------------------------------------------------------------------------- */

typedef enum import_kind {
  IMPORT_NULLS,     /* no buffer at all */
  IMPORT_FIXED,     /* validity, values of `width` bytes */
  IMPORT_OFFSETS32, /* validity, int32 offsets, bytes */
  IMPORT_OFFSETS64, /* validity, int64 offsets, bytes */
  IMPORT_VIEWS      /* validity, views of 16 bytes, buffers of bytes, int64 sizes of these */
} import_kind;

typedef struct import_layout {
  import_kind kind;
  int64_t width; /* of an element of buffer 1 */
} import_layout;

/* Formats by name. One that ends in ':' stands for all that begin with it. */
static const struct {
  const char *format;
  import_layout layout;
} known_formats[] = {
    {"n", {IMPORT_NULLS, 0}},     {"z", {IMPORT_OFFSETS32, 4}}, {"u", {IMPORT_OFFSETS32, 4}},
    {"Z", {IMPORT_OFFSETS64, 8}}, {"U", {IMPORT_OFFSETS64, 8}}, {"vz", {IMPORT_VIEWS, 16}},
    {"vu", {IMPORT_VIEWS, 16}},   {"c", {IMPORT_FIXED, 1}},     {"C", {IMPORT_FIXED, 1}},
    {"s", {IMPORT_FIXED, 2}},     {"S", {IMPORT_FIXED, 2}},     {"i", {IMPORT_FIXED, 4}},
    {"I", {IMPORT_FIXED, 4}},     {"l", {IMPORT_FIXED, 8}},     {"L", {IMPORT_FIXED, 8}},
    {"e", {IMPORT_FIXED, 2}},     {"f", {IMPORT_FIXED, 4}},     {"g", {IMPORT_FIXED, 8}},
    {"tdD", {IMPORT_FIXED, 4}},   {"tdm", {IMPORT_FIXED, 8}},   {"tts", {IMPORT_FIXED, 4}},
    {"ttm", {IMPORT_FIXED, 4}},   {"ttu", {IMPORT_FIXED, 8}},   {"ttn", {IMPORT_FIXED, 8}},
    {"tss:", {IMPORT_FIXED, 8}},  {"tsm:", {IMPORT_FIXED, 8}},  {"tsu:", {IMPORT_FIXED, 8}},
    {"tsn:", {IMPORT_FIXED, 8}},  {"tDs", {IMPORT_FIXED, 8}},   {"tDm", {IMPORT_FIXED, 8}},
    {"tDu", {IMPORT_FIXED, 8}},   {"tDn", {IMPORT_FIXED, 8}},   {"tiM", {IMPORT_FIXED, 4}},
    {"tiD", {IMPORT_FIXED, 8}},   {"tin", {IMPORT_FIXED, 16}},
};

static bool format_is(const char *format, const char *known) {
  size_t size = strlen(known);
  return known[size - 1] == ':' ? strncmp(format, known, size) == 0 : strcmp(format, known) == 0;
}

/* Read a decimal number below 2^31 and step over it; -1: there is none. */
static int64_t parse_number(const char **text) {
  const char *at = *text;
  int64_t number = 0;
  for (; *at >= '0' && *at <= '9'; at++) {
    number = number * 10 + (*at - '0');
    if (number > INT32_MAX) return -1;
  }
  if (at == *text) return -1;
  *text = at;
  return number;
}

/* "w:16" is 16 bytes; "d:38,10" and "d:38,10,256" are decimals of 128 and 256 bits. 0: neither. */
static int64_t parse_width(const char *format) {
  const bool decimal = strncmp(format, "d:", 2) == 0;
  if (!decimal && strncmp(format, "w:", 2) != 0) return 0;
  const char *at = format + 2;
  int64_t number = parse_number(&at);
  if (!decimal) return number > 0 && *at == '\0' ? number : 0;
  if (number < 0 || *at++ != ',') return 0;
  if (*at == '-') at++; /* a negative scale */
  if (parse_number(&at) < 0) return 0;
  if (*at == '\0') return 16;
  if (*at++ != ',') return 0;
  number = parse_number(&at);
  bool known = number == 32 || number == 64 || number == 128 || number == 256;
  return known && *at == '\0' ? number / 8 : 0;
}

static const char *name_of(const struct ArrowSchema *schema) {
  return schema->name != NULL && schema->name[0] != '\0' ? schema->name : "(unnamed)";
}

/* `return FAIL_COLUMN(MS_INVALID, schema, "%d buffers", count)`; err is the caller's. The "" is for
 * texts without arguments, which a variadic macro of C11 cannot have. */
#define FAIL_COLUMN(status, schema, ...) FAIL_COLUMN_TEXT(status, schema, __VA_ARGS__, "")
#define FAIL_COLUMN_TEXT(status, schema, text, ...) \
  ms_fail(err, status, 0, 0, 0, "Arrow column '%.60s': " text "%s", name_of(schema), __VA_ARGS__)

static ms_status find_layout(const struct ArrowSchema *schema, import_layout *out, ms_error *err) {
  if (schema->release == NULL || schema->format == NULL)
    return FAIL_COLUMN(MS_INVALID, schema, "its schema was released");
  if (schema->dictionary != NULL)
    return FAIL_COLUMN(MS_UNSUPPORTED, schema,
                       "dictionary-encoded (indices '%.20s'); cast it to binary", schema->format);
  for (size_t i = 0; i < sizeof known_formats / sizeof known_formats[0]; i++) {
    if (!format_is(schema->format, known_formats[i].format)) continue;
    *out = known_formats[i].layout;
    return MS_OK;
  }
  int64_t width = parse_width(schema->format);
  if (width > 0) {
    *out = (import_layout){IMPORT_FIXED, width};
    return MS_OK;
  }
  const char *what = "not known";
  if (schema->format[0] == '+') what = schema->format[1] == 'r' ? "run-end-encoded" : "nested";
  if (strcmp(schema->format, "b") == 0) what = "boolean, a bit a value";
  return FAIL_COLUMN(MS_UNSUPPORTED, schema,
                     "format '%.20s' is %s; cast it to binary, text or a fixed-width type",
                     schema->format, what);
}

ms_status ms_arrow_check_slices(const struct ArrowSchema *schema, ms_error *err) {
  import_layout layout;
  return find_layout(schema, &layout, err);
}

/* --- arrays in -------------------------------------------------------------------------------- */

/* Elements [begin, begin + count) of an array whose counts were checked. */
typedef struct import_range {
  uint64_t begin;
  uint64_t count;
  const uint8_t *validity; /* NULL: none is null */
} import_range;

static ms_status check_range(const struct ArrowSchema *schema, const struct ArrowArray *array,
                             const import_layout *layout, uint64_t first, uint64_t count,
                             import_range *out, ms_error *err) {
  if (array->release == NULL) return FAIL_COLUMN(MS_INVALID, schema, "the array was released");
  if (array->length < 0 || array->offset < 0 || array->length > INT64_MAX - array->offset ||
      (layout->width > 1 && array->length + array->offset >= INT64_MAX / layout->width))
    return FAIL_COLUMN(MS_INVALID, schema, "length %" PRId64 " at offset %" PRId64, array->length,
                       array->offset);
  if (first > (uint64_t)array->length || count > (uint64_t)array->length - first)
    return FAIL_COLUMN(MS_INVALID, schema, "%" PRId64 " elements where %" PRIu64 " are expected",
                       array->length, first + count);
  *out = (import_range){(uint64_t)array->offset + first, count, NULL};
  if (layout->kind == IMPORT_NULLS) return MS_OK; /* no buffers; some producers send an empty one */
  const int64_t buffers = layout->kind == IMPORT_FIXED ? 2 : 3;
  bool right = layout->kind == IMPORT_VIEWS
                   ? array->n_buffers >= buffers && array->n_buffers < INT32_MAX
                   : array->n_buffers == buffers;
  if (!right || array->buffers == NULL || array->dictionary != NULL)
    return FAIL_COLUMN(MS_INVALID, schema, "%" PRId64 " buffers do not fit format '%.20s'",
                       array->n_buffers, schema->format);
  if (count == 0) return MS_OK;
  if (array->buffers[1] == NULL) return FAIL_COLUMN(MS_INVALID, schema, "buffer 1 is missing");
  if (array->null_count != 0) out->validity = array->buffers[0];
  if (array->null_count > 0 && out->validity == NULL)
    return FAIL_COLUMN(MS_INVALID, schema, "%" PRId64 " nulls and no bitmap", array->null_count);
  return MS_OK;
}

/* Foreign buffers need not be aligned. */
static inline int32_t load_i32(const uint8_t *at) {
  int32_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

static inline int64_t load_i64(const uint8_t *at) {
  int64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

/* Pointer (may be NULL) plus distance (may be hostile): not followed where the size is 0. */
static inline const uint8_t *at_distance(const uint8_t *base, int64_t distance) {
  return (const uint8_t *)((uintptr_t)base + (uint64_t)distance);
}

static void import_fixed(const uint8_t *values, int64_t width, const import_range *range,
                         ms_slice *out) {
  const uint8_t *at = values + range->begin * (uint64_t)width;
  for (uint64_t i = 0; i < range->count; i++) out[i] = (ms_slice){at + i * (uint64_t)width, width};
}

/* Both return whether the offsets begin at 0 or above and never fall. */
static bool import_offsets32(const uint8_t *offsets, const uint8_t *bytes,
                             const import_range *range, ms_slice *out) {
  const uint8_t *at = offsets + 4 * range->begin;
  int64_t begin = load_i32(at), falls = begin;
  for (uint64_t i = 0; i < range->count; i++) {
    int64_t end = load_i32(at + 4 * (i + 1)), size = end - begin;
    falls |= size;
    out[i] = (ms_slice){at_distance(bytes, begin), size};
    begin = end;
  }
  return falls >= 0;
}

static bool import_offsets64(const uint8_t *offsets, const uint8_t *bytes,
                             const import_range *range, ms_slice *out) {
  const uint8_t *at = offsets + 8 * range->begin;
  int64_t begin = load_i64(at), falls = begin;
  for (uint64_t i = 0; i < range->count; i++) {
    int64_t end = load_i64(at + 8 * (i + 1));
    falls |= end | (end < begin ? -1 : 0); /* a difference could overflow */
    out[i] = (ms_slice){at_distance(bytes, begin), (int64_t)((uint64_t)end - (uint64_t)begin)};
    begin = end;
  }
  return falls >= 0;
}

static ms_status import_offsets(const struct ArrowSchema *schema, const struct ArrowArray *array,
                                import_kind kind, const import_range *range, ms_slice *out,
                                ms_error *err) {
  const uint8_t *offsets = array->buffers[1], *bytes = array->buffers[2];
  bool rising = kind == IMPORT_OFFSETS32 ? import_offsets32(offsets, bytes, range, out)
                                         : import_offsets64(offsets, bytes, range, out);
  if (!rising) return FAIL_COLUMN(MS_INVALID, schema, "its offsets fall, or begin below 0");
  if (bytes != NULL || range->count == 0) return MS_OK;
  for (uint64_t i = 0; i < range->count; i++)
    if (out[i].size > 0) return FAIL_COLUMN(MS_INVALID, schema, "buffer 2 is missing");
  return MS_OK;
}

/* A view is its size, then up to 12 bytes, or 4 bytes of prefix, a buffer and where in it. */
static ms_status import_views(const struct ArrowSchema *schema, const struct ArrowArray *array,
                              const import_range *range, ms_slice *out, ms_error *err) {
  const uint8_t *views = (const uint8_t *)array->buffers[1] + 16 * range->begin;
  const int64_t buffer_count = array->n_buffers - 3;
  const uint8_t *sizes = array->buffers[array->n_buffers - 1];
  if (buffer_count > 0 && sizes == NULL)
    return FAIL_COLUMN(MS_INVALID, schema, "the sizes of its buffers are missing");
  for (uint64_t i = 0; i < range->count; i++) {
    const uint8_t *view = views + 16 * i;
    if (range->validity != NULL && !ms_bit(range->validity, range->begin + i)) {
      out[i] = (ms_slice){NULL, -1}; /* the view of a null may be anything */
      continue;
    }
    int64_t size = load_i32(view);
    out[i] = (ms_slice){view + 4, size};
    if (MS_LIKELY(size >= 0 && size <= 12)) continue;
    int64_t buffer = load_i32(view + 8), at = load_i32(view + 12);
    /* A sum of two that are below 2^31; a size that is subtracted from could be any number. */
    if (size < 0 || buffer < 0 || buffer >= buffer_count || at < 0 ||
        at + size > load_i64(sizes + 8 * buffer) || array->buffers[2 + buffer] == NULL)
      return FAIL_COLUMN(
          MS_INVALID, schema,
          "the view of element %" PRIu64 " (%" PRId64 " bytes) is outside of its buffer", i, size);
    out[i].data = (const uint8_t *)array->buffers[2 + buffer] + at;
  }
  return MS_OK;
}

ms_status ms_arrow_import_slices(const struct ArrowSchema *schema, const struct ArrowArray *array,
                                 uint64_t first, uint64_t count, ms_slice *out, ms_error *err) {
  import_layout layout;
  import_range range;
  MS_TRY(find_layout(schema, &layout, err));
  MS_TRY(check_range(schema, array, &layout, first, count, &range, err));
  if (count == 0) return MS_OK;
  switch (layout.kind) {
    case IMPORT_NULLS:
      for (uint64_t i = 0; i < count; i++) out[i] = (ms_slice){NULL, -1};
      return MS_OK;
    case IMPORT_VIEWS:
      return import_views(schema, array, &range, out, err);
    case IMPORT_FIXED:
      import_fixed(array->buffers[1], layout.width, &range, out);
      break;
    case IMPORT_OFFSETS32:
    case IMPORT_OFFSETS64:
      MS_TRY(import_offsets(schema, array, layout.kind, &range, out, err));
      break;
  }
  if (range.validity != NULL) /* all bits set is -1 */
    for (uint64_t i = 0; i < count; i++)
      out[i].size |= (int64_t)ms_bit(range.validity, range.begin + i) - 1;
  return MS_OK;
}

/* --- timestamps in ---------------------------------------------------------------------------- */

/* Microseconds in one unit of the column; -1000: a thousand units make one; 0: no timestamps. */
static int64_t timestamp_scale(const char *format) {
  if (format_is(format, "tss:")) return 1000000;
  if (format_is(format, "tsm:")) return 1000;
  if (format_is(format, "tsu:") || format_is(format, "l")) return 1;
  return format_is(format, "tsn:") ? -1000 : 0;
}

ms_status ms_arrow_check_timestamps(const struct ArrowSchema *schema, ms_error *err) {
  import_layout layout;
  MS_TRY(find_layout(schema, &layout, err));
  if (timestamp_scale(schema->format) != 0) return MS_OK;
  return FAIL_COLUMN(MS_UNSUPPORTED, schema,
                     "format '%.20s' is no timestamp; cast it to timestamp[us], or to int64 that "
                     "counts microseconds since 1970",
                     schema->format);
}

/* Multiply in place; the first element that is out of range, or count. */
static uint64_t scale_up(int64_t *out, uint64_t count, int64_t scale) {
  const int64_t largest = MS_ARROW_TIMESTAMP_MAX / scale;
  bool over = false;
  for (uint64_t i = 0; i < count; i++) over |= out[i] > largest || out[i] < -largest;
  if (over)
    for (uint64_t i = 0; i < count; i++)
      if (out[i] > largest || out[i] < -largest) return i;
  for (uint64_t i = 0; i < count; i++) out[i] *= scale;
  return count;
}

static void scale_down(int64_t *out, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) out[i] = out[i] / 1000 - (out[i] % 1000 < 0);
}

ms_status ms_arrow_import_timestamps(const struct ArrowSchema *schema,
                                     const struct ArrowArray *array, uint64_t first, uint64_t count,
                                     int64_t *out, ms_error *err) {
  const import_layout layout = {IMPORT_FIXED, 8};
  import_range range;
  MS_TRY(ms_arrow_check_timestamps(schema, err));
  MS_TRY(check_range(schema, array, &layout, first, count, &range, err));
  if (count == 0) return MS_OK;
  if (range.validity != NULL)
    for (uint64_t i = 0; i < count; i++)
      if (!ms_bit(range.validity, range.begin + i))
        return FAIL_COLUMN(MS_INVALID, schema, "the timestamp of element %" PRIu64 " is null", i);
  memcpy(out, (const uint8_t *)array->buffers[1] + 8 * range.begin, 8 * count);
  const int64_t scale = timestamp_scale(schema->format);
  if (scale < 0) {
    scale_down(out, count);
    return MS_OK;
  }
  uint64_t over = scale_up(out, count, scale);
  if (over == count) return MS_OK;
  return FAIL_COLUMN(MS_LIMIT, schema,
                     "the timestamp of element %" PRIu64 ", %" PRId64
                     ", is out of range (2^62 microseconds from 1970)",
                     over, out[over]);
}

/* --- structs in ------------------------------------------------------------------------------- */

int64_t ms_arrow_find_child(const struct ArrowSchema *schema, const char *name) {
  int64_t found = -1;
  if (schema->children == NULL) return -1;
  for (int64_t i = 0; i < schema->n_children; i++) {
    const struct ArrowSchema *child = schema->children[i];
    if (child == NULL || child->name == NULL || strcmp(child->name, name) != 0) continue;
    if (found >= 0) return -2;
    found = i;
  }
  return found;
}

ms_status ms_arrow_check_struct(const struct ArrowSchema *schema, const struct ArrowArray *array,
                                ms_error *err) {
  if (schema->release == NULL || schema->format == NULL || strcmp(schema->format, "+s") != 0)
    return FAIL_COLUMN(MS_INVALID, schema, "not a struct");
  if (array->release == NULL) return FAIL_COLUMN(MS_INVALID, schema, "the array was released");
  if (array->length < 0 || array->offset < 0 || array->length > INT64_MAX - array->offset)
    return FAIL_COLUMN(MS_INVALID, schema, "length %" PRId64 " at offset %" PRId64, array->length,
                       array->offset);
  if (array->n_children != schema->n_children || array->n_buffers != 1 || array->buffers == NULL ||
      (array->n_children > 0 && (array->children == NULL || schema->children == NULL)))
    return FAIL_COLUMN(MS_INVALID, schema, "%" PRId64 " children for %" PRId64 " fields",
                       array->n_children, schema->n_children);
  for (int64_t i = 0; i < array->n_children; i++)
    if (schema->children[i] == NULL || array->children[i] == NULL ||
        array->children[i]->length < array->length + array->offset)
      return FAIL_COLUMN(MS_INVALID, schema, "child %" PRId64 " is shorter than its struct", i);
  const uint8_t *validity = array->null_count != 0 ? array->buffers[0] : NULL;
  if (validity == NULL) return MS_OK;
  for (int64_t i = 0; i < array->length; i++)
    if (!ms_bit(validity, (uint64_t)(array->offset + i)))
      return FAIL_COLUMN(MS_UNSUPPORTED, schema,
                         "struct %" PRId64 " is null as a whole; make it a table without null rows",
                         i);
  return MS_OK;
}
