/* Columns of another library, by the Arrow C data interface: as slices, as timestamps, as a struct;
 * what is taken becomes a batch.
 *
 * An input says how arrays are made, byte by byte (`take`). How long a buffer is only its producer
 * knows, so each is as long as its format and the array's length ask for, and not a byte longer;
 * all else may be wrong: counts, lengths, offsets, what is null or missing, the content, the text
 * of the format. Of what begins behind a buffer's end nothing can be known: it is not followed.
 */
#include "fuzz.h"
#include "ms_arrow.h"
#include "ms_batch.h"

#include <stdio.h>

enum { COLUMNS = 3, ROOM_MAX = 40, BUFFERS_MAX = 8, WIDTH_MAX = 512 };

static const char *const formats[] = {
    "n",       "z",    "u",      "Z",         "U",           "vz",         "vu",   "c",    "C",
    "s",       "S",    "i",      "I",         "l",           "L",          "e",    "f",    "g",
    "tdD",     "tdm",  "tts",    "ttm",       "ttu",         "ttn",        "tss:", "tsm:", "tsu",
    "tsn:UTC", "tDs",  "tDm",    "tDu",       "tDn",         "tiM",        "tiD",  "tin",  "w:16",
    "w:0",     "w:-1", "d:38,9", "d:9,-2,32", "d:38,10,256", "d:1,1,2000", "tsu:", "b",    "+s",
    "+l",      "+r",   "w:7",    "",          NULL};
enum { FORMATS = sizeof formats / sizeof formats[0] };

static const int64_t hostile[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX - 1};

typedef struct input {
  const uint8_t *data;
  size_t size;
} input;

static uint8_t take(input *from) {
  if (from->size == 0) return 0;
  from->size--;
  return *from->data++;
}

/* A column, and what its memory really is. */
typedef struct column {
  struct ArrowSchema schema;
  struct ArrowArray array;
  char format[24];
  char name[4];
  const void *buffers[BUFFERS_MAX];
  uint8_t *memory[BUFFERS_MAX]; /* to be freed */
  uint64_t bytes[BUFFERS_MAX];  /* of each buffer */
  int64_t room;                 /* elements that there are */
  bool by_offsets;
} column;

static void no_release_schema(struct ArrowSchema *schema) { (void)schema; }
static void no_release_array(struct ArrowArray *array) { (void)array; }

/* Bytes of an element of buffer 1; 0: no format that is known here; -1: no buffers. */
static int64_t width_of(const char *format) {
  static const char *const widths[] = {"cC", "sSe", "iIf", "lLg"};
  int number = 0, length = 0;
  if (strcmp(format, "n") == 0) return -1;
  for (int i = 0; i < 4; i++)
    if (format[0] != '\0' && format[1] == '\0' && strchr(widths[i], format[0])) return 1 << i;
  if (strcmp(format, "z") == 0 || strcmp(format, "u") == 0) return 4;
  if (strcmp(format, "Z") == 0 || strcmp(format, "U") == 0) return 8;
  if (strcmp(format, "vz") == 0 || strcmp(format, "vu") == 0) return 16;
  if (strcmp(format, "tdD") == 0 || strcmp(format, "tts") == 0 || strcmp(format, "ttm") == 0 ||
      strcmp(format, "tiM") == 0)
    return 4;
  if (strcmp(format, "tin") == 0) return 16;
  if (strcmp(format, "tdm") == 0 || strcmp(format, "ttu") == 0 || strcmp(format, "ttn") == 0 ||
      strcmp(format, "tiD") == 0)
    return 8;
  if (format[0] == 't' && (format[1] == 's' || format[1] == 'D') && format[2] != '\0' &&
      strchr("smun", format[2]) && (format[1] == 's' ? format[3] == ':' : format[3] == '\0'))
    return 8;
  if (sscanf(format, "w:%9d%n", &number, &length) == 1 && number > 0 && format[length] == '\0')
    return number;
  if (strncmp(format, "d:", 2) == 0) {
    const char *last = strrchr(format, ',');
    if (last == NULL) return 0;
    if (strchr(format, ',') == last) return 16;
    return atoi(last + 1) / 8;
  }
  return 0;
}

/* Of the exact size, or at an odd address: foreign buffers need not be aligned. */
static uint8_t *add_buffer(column *to, int index, uint64_t bytes, input *from) {
  const uint64_t shift = take(from) % 4 == 0, given = bytes < from->size ? bytes : from->size;
  to->memory[index] = calloc(1, bytes + shift > 0 ? bytes + shift : 1);
  if (to->memory[index] == NULL) abort();
  uint8_t *at = to->memory[index] + shift;
  if (given > 0) memcpy(at, from->data, given);
  from->data += given;
  from->size -= given;
  to->buffers[index] = at;
  to->bytes[index] = bytes;
  return at;
}

static void make_column(column *out, input *from) {
  memset(out, 0, sizeof *out);
  const char *format = formats[take(from) % FORMATS];
  if (format != NULL) {
    snprintf(out->format, sizeof out->format, "%s", format);
  } else {
    for (int i = 0, size = take(from) % 23; i < size; i++) out->format[i] = (char)take(from);
  }
  out->name[0] = "vvvkt\0"[take(from) % 6];
  uint8_t odd = take(from);
  out->schema = (struct ArrowSchema){
      .format = out->format, .name = odd & 1 ? NULL : out->name, .release = no_release_schema};
  int64_t width = width_of(out->format);
  out->room = width > WIDTH_MAX ? 0 : take(from) % ROOM_MAX;
  int64_t offset = out->room > 0 ? take(from) % out->room : 0;
  out->array = (struct ArrowArray){.length = out->room - offset,
                                   .offset = offset,
                                   .null_count = (int64_t)(take(from) % 4) - 1,
                                   .release = no_release_array};
  const bool views = width == 16 && out->format[0] == 'v';
  out->by_offsets = strlen(out->format) == 1 && strchr("zuZU", out->format[0]) != NULL;
  uint8_t variadic = views ? take(from) % 4 : 0;
  uint8_t present = take(from);
  uint64_t size = width > 0 && width <= WIDTH_MAX
                      ? (uint64_t)width * (uint64_t)(out->room + (out->by_offsets ? 1 : 0))
                      : 0;
  if (present & 1) add_buffer(out, 0, ((uint64_t)out->room + 7) / 8, from);
  if (present & 2) add_buffer(out, 1, size, from);
  if (views) {
    int64_t sizes[4] = {0};
    for (int i = 0; i < variadic; i++) {
      sizes[i] = take(from);
      if (present & 4) add_buffer(out, 2 + i, (uint64_t)sizes[i], from);
      uint8_t told = take(from); /* less than there is */
      if (told >= 200) sizes[i] = told % 2 ? INT64_MIN : sizes[i] / 2;
    }
    if (present & 8) {
      uint8_t *at = add_buffer(out, 2 + variadic, 8u * variadic, from);
      memcpy(at, sizes, 8u * variadic);
    }
    out->array.n_buffers = 3 + variadic;
  } else if (out->by_offsets) {
    if (present & 4) add_buffer(out, 2, take(from), from);
    out->array.n_buffers = 3;
  } else {
    out->array.n_buffers = width == -1 ? present & 8 ? 1 : 0 : 2;
  }
  out->array.buffers = present & 64 ? out->buffers : NULL;
  if (odd & 2) out->array.release = NULL;
  if (odd & 4) out->schema.release = NULL;
  if (odd & 8) out->schema.dictionary = &out->schema;
  if (odd & 16) out->array.length = hostile[take(from) % 4];
  if (odd & 32) out->array.offset = hostile[take(from) % 4];
  /* All but the last would be read, had it been believed. */
  if (odd & 64) out->array.n_buffers = (int64_t[]){-1, INT64_MIN, INT64_MAX, 0}[take(from) % 4];
  if (odd & 128) out->schema.format = NULL;
}

static void free_column(column *of) {
  for (int i = 0; i < BUFFERS_MAX; i++) free(of->memory[i]);
}

static uint64_t sum; /* so that reads are not left out */

/* Would elements be believed that are not there? Only the producer knows the length of a buffer. */
static bool is_lie(const column *of, uint64_t first, uint64_t count) {
  const struct ArrowArray *array = &of->array;
  if (array->length < 0 || array->offset < 0 || first + count > (uint64_t)array->length)
    return false; /* refused */
  return array->offset > of->room || first + count > (uint64_t)(of->room - array->offset);
}

/* Take `count` elements from `first` on; what points behind a buffer of bytes becomes a null. */
static bool take_slices(const column *from, uint64_t first, uint64_t count, ms_slice *out) {
  ms_error err;
  if (is_lie(from, first, count)) return false;
  ms_status checked = ms_arrow_check_slices(&from->schema, &err);
  if (checked == MS_OK && width_of(from->format) == 0) abort(); /* not a format */
  if (ms_arrow_import_slices(&from->schema, &from->array, first, count, out, &err) != MS_OK)
    return false;
  if (checked != MS_OK) abort();
  for (uint64_t i = 0; i < count; i++) {
    if (out[i].size < -1) abort();
    if (out[i].size > 0 && from->by_offsets) {
      uint64_t at = (uint64_t)((uintptr_t)out[i].data - (uintptr_t)from->buffers[2]);
      uint64_t size = (uint64_t)out[i].size, there = from->bytes[2];
      if (at > there || size > there - at) out[i] = (ms_slice){NULL, -1};
    }
    for (int64_t byte = 0; byte < out[i].size; byte++) sum += out[i].data[byte];
  }
  return true;
}

static bool take_timestamps(const column *from, uint64_t first, uint64_t count, int64_t *out) {
  ms_error err;
  if (is_lie(from, first, count)) return false;
  if (ms_arrow_import_timestamps(&from->schema, &from->array, first, count, out, &err) != MS_OK)
    return false;
  if (ms_arrow_check_timestamps(&from->schema, &err) != MS_OK) abort();
  for (uint64_t i = 0; i < count; i++)
    if (out[i] > MS_ARROW_TIMESTAMP_MAX || out[i] < -MS_ARROW_TIMESTAMP_MAX) abort();
  return true;
}

/* A batch of what was taken: it is either refused or right. */
static void encode(const ms_records *records) {
  ms_error err;
  ms_shape shape;
  ms_view view;
  if (ms_batch_measure(records, &shape, &err) != MS_OK) return;
  uint64_t length = ms_batch_length(&shape, 4096);
  uint8_t *at = zeros(length);
  ms_place place = {.position = 8, .file_position = 4096, .seed = 9, .base_offset = 3};
  (void)ms_batch_encode(records, &shape, &place, at);
  if (ms_batch_view(at, length, 4096, &view, &err) != MS_OK ||
      ms_batch_check(&view, place.seed, &err) != MS_OK || view.count != records->count)
    abort();
  free(at);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  input from = {data, size};
  uint8_t flags = take(&from);
  uint64_t first = take(&from) % ROOM_MAX, count = 1 + take(&from) % ROOM_MAX;
  column columns[COLUMNS];
  for (int i = 0; i < COLUMNS; i++) make_column(&columns[i], &from);
  ms_slice slices[2][ROOM_MAX];
  int64_t timestamps[ROOM_MAX];
  ms_error err;
  if (flags & 1) { /* a table: a struct of the columns */
    struct ArrowSchema *fields[COLUMNS];
    struct ArrowArray *children[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) {
      fields[i] = flags >> i & 2 && from.size % 3 == 0 ? NULL : &columns[i].schema;
      children[i] = flags >> i & 16 && from.size % 3 == 1 ? NULL : &columns[i].array;
    }
    uint8_t odd = take(&from), nulls[ROOM_MAX / 4] = {take(&from), take(&from), take(&from)};
    const void *validity[1] = {(odd & 49) == 1 ? nulls : NULL}; /* no longer than it is said */
    struct ArrowSchema schema = {.format = odd & 2 ? "+m" : "+s",
                                 .name = "",
                                 .n_children = COLUMNS,
                                 .children = fields,
                                 .release = odd & 4 ? NULL : no_release_schema};
    struct ArrowArray array = {.length = (int64_t)count,
                               .offset = (int64_t)first,
                               .null_count = odd % 3 - 1,
                               .n_buffers = 1,
                               .n_children = COLUMNS,
                               .buffers = odd & 64 ? NULL : validity,
                               .children = children,
                               .release = odd & 128 ? NULL : no_release_array};
    if (odd & 8) array.n_children = (int64_t[]){-1, 0, COLUMNS + 1, INT64_MAX}[take(&from) % 4];
    if (odd & 16) array.length = hostile[take(&from) % 4];
    if (odd & 32) array.offset = hostile[take(&from) % 4];
    int64_t value = ms_arrow_find_child(&schema, "v"), key = ms_arrow_find_child(&schema, "k");
    int64_t timestamp = ms_arrow_find_child(&schema, "t");
    if (ms_arrow_check_struct(&schema, &array, &err) == MS_OK && array.n_children == COLUMNS &&
        value >= 0 && array.length == (int64_t)count && array.offset == (int64_t)first) {
      ms_records records = {.count = (uint32_t)count, .values = slices[0]};
      bool taken = take_slices(&columns[value], first, count, slices[0]);
      if (key >= 0 && take_slices(&columns[key], first, count, slices[1])) records.keys = slices[1];
      if (timestamp >= 0 && take_timestamps(&columns[timestamp], first, count, timestamps))
        records.timestamps = timestamps;
      if (taken) encode(&records);
    }
  } else {
    for (int i = 0; i < COLUMNS; i++) {
      ms_records records = {.count = (uint32_t)count, .values = slices[0]};
      if (take_timestamps(&columns[i], first, count, timestamps)) records.timestamps = timestamps;
      if (take_slices(&columns[i], first, count, slices[0])) encode(&records);
    }
  }
  for (int i = 0; i < COLUMNS; i++) free_column(&columns[i]);
  return 0;
}
