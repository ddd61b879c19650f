/* flags: -DMS_SCHEDULER
 *
 * Death at every step of append, roll, take-over, the durable mark and the end of recovery.
 *
 * The "files" are one shared mapping: a control page, a block and five segment slots. A writer
 * dies (1) at every instruction that changed a byte of it: a child is single-stepped with ptrace,
 * and every distinct image is judged; (2) at every yield point, by longjmp; (3) twice: who takes
 * over dies as well. The judge is another member on a copy of the image: it takes over and finds
 * the old log or the new one, dense, with the chain right and nothing to walk into behind the tail;
 * what is in it is a re-send, though the judge knows the producers from the log alone; then it
 * appends and rolls and looks again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "ms_partition.h"
#include "ms_xxh3.h"

enum {
  SLOTS = 6,
  SLOT_BYTES = 1 << 16,
  SEGMENT_BYTES = SLOT_BYTES,
  SMALL_BYTES = 12288 + 4096, /* a spare that is too small for a large batch */
  CONTROL_BYTES = MS_CONTROL_BLOCKS_AT + 4096,
  IMAGE_BYTES = CONTROL_BYTES + SLOTS * SLOT_BYTES,
  IMAGES_MAX = 4000,
  /* images of the first death from which a second one is tried, spread evenly */
  TAKERS_MAX = 2,
  TAKERS_MAX_FULL = 6
};

static const ms_identity identity_of_all = {
    .store_id = "0123456789abcde", .stream_id = 77, .partition = 3};
static uint64_t ops, faults;
static bool competed, competing; /* a rival has run, is running */

/* --- one virtual process ---------------------------------------------------------------------- */

typedef struct member {
  uint8_t *image;
  ms_partition partition;
  ms_producers producers;
  ms_producer_entry entries[3];
  ms_segment segments[SLOTS];
  _Atomic uint32_t checked[SLOTS][64];
} member;

static ms_control_header *header_of(uint8_t *image) { return (ms_control_header *)(void *)image; }
static ms_control_block *block_of(uint8_t *image) {
  return (ms_control_block *)(void *)(image + MS_CONTROL_BLOCKS_AT);
}
static uint8_t *slot(uint8_t *image, uint64_t number) {
  return image + CONTROL_BYTES + (number - 1) * SLOT_BYTES;
}
static bool exists(uint8_t *image, uint64_t number) {
  return number >= 1 && number <= SLOTS && slot(image, number)[0] != 0;
}

static void make_segment(uint8_t *image, uint64_t number, uint64_t size) {
  ms_segment_header header = {
      .magic = MS_MAGIC_SEGMENT,
      .version = MS_FORMAT_VERSION,
      .partition = identity_of_all.partition,
      .stream_id = identity_of_all.stream_id,
      .number = number,
      .salt = 0x9e3779b97f4a7c15u * number,
      .size = size,
  };
  memcpy(header.store_id, identity_of_all.store_id, sizeof header.store_id);
  ms_segment_geometry(size, &header.index_count, &header.data_position);
  header.checksum = ms_xxh3_64(&header, offsetof(ms_segment_header, checksum), 0);
  memcpy(slot(image, number), &header, sizeof header);
}

static bool map_segment(member *self, uint64_t number, ms_segment *segment) {
  ms_identity identity = identity_of_all;
  identity.number = number;
  memset(self->checked[number - 1], 0, sizeof self->checked[0]);
  uint64_t size;
  memcpy(&size, slot(self->image, number) + offsetof(ms_segment_header, size), sizeof size);
  return CHECK(ms_segment_open(segment, slot(self->image, number), size, true, &identity,
                               self->checked[number - 1], NULL) == MS_OK);
}

static void member_init(member *self, uint8_t *image, uint32_t index, uint64_t generation) {
  memset(self, 0, sizeof *self);
  self->image = image;
  self->partition = (ms_partition){.header = header_of(image),
                                   .block = block_of(image),
                                   .generation = generation,
                                   .self = ms_owner_word(index, 7 + index)};
}

/* What Python does on MS_MOVED, and before a take-over. */
static void follow(member *self) {
  ms_partition *partition = &self->partition;
  uint64_t active = atomic_load(&partition->block->active), number = active + 1;
  partition->active = NULL;
  partition->end_valid = false;
  if (active != 0 && map_segment(self, active, &self->segments[active - 1]))
    partition->active = &self->segments[active - 1];
  if (partition->next != NULL && partition->next->number <= active) partition->next = NULL;
  while (number <= SLOTS && !exists(self->image, number)) number++;
  if (number <= SLOTS && partition->next == NULL &&
      map_segment(self, number, &self->segments[number - 1]))
    partition->next = &self->segments[number - 1];
}

/* What Python does on MS_BEHIND: read every header below the tail. */
static bool read_headers(member *self) {
  ms_partition *partition = &self->partition;
  ms_producers *table = &self->producers;
  uint64_t tail = atomic_load(&partition->block->tail);
  ms_segment *before = NULL;
  uint32_t unknown = 0;
  partition->producers = NULL;
  memset(self->entries, 0, sizeof self->entries);
  *table = (ms_producers){.entries = self->entries, .count = 3};
  for (uint64_t number = 1; number <= SLOTS && table->position < tail; number++) {
    ms_segment *segment = &self->segments[number - 1];
    if (!exists(self->image, number)) continue;
    if (partition->active != segment && partition->next != segment &&
        !map_segment(self, number, segment))
      return false;
    if (ms_segment_load_activation(segment) != MS_OK || segment->base_position > tail) continue;
    if (before != NULL &&
        !CHECK(ms_producers_walk(table, before, segment->base_position, &unknown, NULL) == MS_OK))
      return false;
    before = segment;
  }
  if (before != NULL && table->position < tail &&
      !CHECK(ms_producers_walk(table, before, tail, &unknown, NULL) == MS_OK))
    return false;
  partition->producers = table;
  return CHECK_EQ_U64(table->position, tail);
}

static uint8_t pattern(uint64_t offset, uint64_t i) { return (uint8_t)(offset * 131 + i * 7 + 1); }

/* Append `count` records of `size` bytes that say which offsets they must get. */
static ms_status append(member *self, uint32_t count, int64_t size, uint32_t *dead) {
  static struct {
    uint8_t bytes[1 << 17];
    ms_slice values[16];
    uint64_t offset, count;
    int64_t size;
  } made[2]; /* a rival's are others than those of whom it interrupts */
  uint8_t *bytes = made[competing].bytes;
  ms_slice *values = made[competing].values;
  for (int round = 0; round < 20; round++) {
    ms_appended out;
    ms_error err;
    ms_shape shape;
    ms_mark end;
    uint64_t offset = 0;
    if (ms_partition_try_end(self->partition.block, &end) == MS_OK) {
      offset = end.offset;
    } else if (self->partition.active != NULL &&
               ms_segment_mark_at(self->partition.active, atomic_load(&self->partition.block->tail),
                                  &end, NULL) == MS_OK) {
      offset = end.offset;
    }
    if (offset != made[competing].offset || count != made[competing].count ||
        size != made[competing].size) {
      /* Not made again by a child that is stepped through. */
      made[competing].offset = offset, made[competing].count = count, made[competing].size = size;
      for (uint32_t i = 0; i < count; i++) {
        values[i] = (ms_slice){bytes + i * size, size};
        for (int64_t j = 0; j < size; j++) bytes[i * size + j] = pattern(offset + i, (uint64_t)j);
      }
    }
    ms_records records = {
        .count = count, .values = values, .timestamp = (int64_t)offset, .first_sequence = offset};
    if (!CHECK(ms_batch_measure(&records, &shape, NULL) == MS_OK)) return MS_INVALID;
    ms_status status = ms_partition_try_append(&self->partition, &records, &shape, 1 + competing,
                                               offset + count - 1, &out, &err);
    if (status == MS_OK) {
      CHECK(out.first_offset == offset || competed);
      return MS_OK;
    }
    if (status == MS_BUSY) {
      *dead = out.owner;
      return status;
    }
    if (status == MS_ROLL) {
      uint64_t number = atomic_load(&self->partition.block->active) + 1;
      self->partition.next = NULL;
      if (!CHECK(number <= SLOTS)) return MS_INVALID;
      if (!exists(self->image, number)) make_segment(self->image, number, SEGMENT_BYTES);
      follow(self);
    } else if (status == MS_MOVED) {
      follow(self);
    } else if (status == MS_BEHIND) {
      if (!read_headers(self)) return MS_INVALID;
    } else {
      printf("  append: status %d: %s\n", status, err.text);
      return status;
    }
  }
  CHECK(!"an append that never ends");
  return MS_BUSY;
}

static bool take_over(member *self) {
  uint32_t owner = 0, dead;
  for (int round = 0; round < 4; round++) {
    dead = atomic_load(&self->partition.block->append);
    if ((dead & ~MS_OWNER_WAITERS) == 0) return true;
    follow(self);
    if (ms_partition_take_over(&self->partition, dead, &owner) == MS_OK) return true;
  }
  return CHECK(!"a word that cannot be taken over");
}

/* --- the judge -------------------------------------------------------------------------------- */

/* Walk as recovery does, from the first segment along the activation records. */
static bool walk(member *self, ms_mark *out_end, uint64_t *out_last) {
  ms_mark mark = {.timestamp_max = INT64_MIN};
  uint64_t last = 0;
  for (uint64_t number = 1; number <= SLOTS; number++) {
    if (!exists(self->image, number)) continue;
    ms_segment *segment = &self->segments[number - 1];
    if (!map_segment(self, number, segment)) return false;
    if (!segment->activated) continue;
    if (!CHECK_EQ_U64(segment->predecessor, last)) return false;
    if (last != 0) {
      ms_status status =
          ms_segment_walk(&self->segments[last - 1], &mark, segment->base_position, false, NULL);
      if (!CHECK(status >= 0) || !CHECK_EQ_U64(mark.position, segment->base_position)) return false;
    }
    if (!CHECK_EQ_U64(segment->predecessor_hash, mark.hash) ||
        !CHECK_EQ_U64(segment->base_offset, mark.offset))
      return false;
    last = number;
  }
  if (last != 0) {
    ms_error err;
    ms_status status = ms_segment_walk(&self->segments[last - 1], &mark, UINT64_MAX, false, &err);
    (void)status; /* a half written batch may lie at the end before it is mended */
  }
  *out_end = mark;
  *out_last = last;
  return true;
}

/* Every record below the tail says the offset that it has. */
static bool read_all(member *self, uint64_t tail, uint64_t *out_records) {
  uint64_t position = 0, offset = 0;
  for (uint64_t number = 1; number <= SLOTS && position < tail; number++) {
    if (!exists(self->image, number)) continue;
    ms_segment *segment = &self->segments[number - 1];
    if (!map_segment(self, number, segment) || !segment->activated) continue;
    uint64_t limit = tail;
    for (uint64_t later = number + 1; later <= SLOTS; later++) {
      ms_segment following;
      if (!exists(self->image, later) || !map_segment(self, later, &following) ||
          !following.activated)
        continue;
      if (following.base_position < limit) limit = following.base_position;
      break;
    }
    if (!map_segment(self, number, segment)) return false;
    while (position < limit) {
      ms_view view;
      ms_error err;
      ms_status status = ms_segment_view(segment, position, limit, &view, &err);
      if (status == MS_END) break;
      if (!CHECK(status == MS_OK) || !CHECK_EQ_U64(view.base_offset, offset)) return false;
      for (uint32_t i = 0; i < view.count; i++, offset++) {
        const uint8_t *value = view.values + view.value_offsets[i];
        uint64_t size = (uint64_t)(view.value_offsets[i + 1] - view.value_offsets[i]);
        for (uint64_t j = 0; j < size; j++)
          if (value[j] != pattern(offset, j)) return CHECK(!"a record with another's bytes");
      }
      position += view.length;
    }
  }
  *out_records = offset;
  return CHECK_EQ_U64(position, tail);
}

/* The last record, sent again, is there already; sequences are offsets here. */
static bool is_resent(member *self, uint64_t sequence) {
  const ms_slice value = {(const uint8_t *)"again", 5};
  const ms_records records = {.count = 1, .values = &value, .first_sequence = sequence};
  ms_shape shape;
  ms_appended out;
  ms_error err;
  uint64_t tail = atomic_load(&self->partition.block->tail);
  if (!CHECK(ms_batch_measure(&records, &shape, NULL) == MS_OK) || !read_headers(self))
    return false;
  return CHECK(ms_partition_try_append(&self->partition, &records, &shape, 1, sequence, &out,
                                       &err) == MS_RESENT) &&
         CHECK_EQ_U64(out.last_sequence, sequence) &&
         CHECK_EQ_U64(atomic_load(&self->partition.block->tail), tail);
}

typedef struct log_end {
  uint64_t tail, records;
} log_end;

static log_end end_of(uint8_t *image) {
  static member reader;
  log_end end = {.tail = atomic_load(&block_of(image)->tail)};
  member_init(&reader, image, 5, 1);
  read_all(&reader, end.tail, &end.records);
  return end;
}

/* Judge an image that a dead writer left; it is changed. */
static bool judge(uint8_t *image, const log_end *before, const log_end *after,
                  uint64_t generation) {
  static member judge_member;
  member *self = &judge_member;
  ms_mark end, mark;
  uint64_t last, records, word;
  uint32_t dead = 0;
  faults++;
  member_init(self, image, 2, generation);
  uint64_t tail = atomic_load(&block_of(image)->tail);
  if (!CHECK(tail == before->tail || tail == after->tail)) return false;
  if (!read_all(self, tail, &records)) return false;
  if (!CHECK_EQ_U64(records, tail == before->tail ? before->records : after->records)) return false;
  /* If everybody died here, recovery walks: the old log, or the new one that nobody was told of. */
  if (!walk(self, &end, &last)) return false;
  if (!CHECK(end.position == before->tail || end.position == after->tail) ||
      !CHECK(end.position >= tail))
    return false;

  member_init(self, image, 2, generation);
  if (!take_over(self)) return false;
  word = atomic_load(&block_of(image)->append);
  if (!CHECK_EQ_U64(word & ~MS_OWNER_WAITERS, 0) ||
      !CHECK_EQ_U64(atomic_load(&block_of(image)->tail), tail))
    return false;
  if (!walk(self, &end, &last) || !CHECK_EQ_U64(end.position, tail))
    return false; /* no ghost behind the tail */
  if (!CHECK_EQ_U64(last, atomic_load(&block_of(image)->active))) return false;
  if (ms_partition_try_end(block_of(image), &mark) == MS_OK) {
    if (!CHECK_EQ_U64(mark.position, end.position) || !CHECK_EQ_U64(mark.offset, end.offset) ||
        !CHECK_EQ_U64(mark.hash, end.hash) || !CHECK(mark.timestamp_max == end.timestamp_max))
      return false;
  }
  /* Life goes on: in the same segment, and over a roll. */
  member_init(self, image, 2, generation);
  follow(self);
  if (records > 0 && !competed && !is_resent(self, records - 1)) return false;
  static const struct {
    uint32_t count;
    int64_t size;
  } more[] = {{1, 3}, {3, 700}, {2, 20000}, {1, 30000}};
  for (size_t i = 0; i < sizeof more / sizeof more[0]; i++, ops++) {
    if (!CHECK(append(self, more[i].count, more[i].size, &dead) == MS_OK)) return false;
    records += more[i].count;
  }
  tail = atomic_load(&block_of(image)->tail);
  uint64_t found = 0;
  if (!read_all(self, tail, &found) || !CHECK_EQ_U64(found, records)) return false;
  return walk(self, &end, &last) && CHECK_EQ_U64(end.position, tail) &&
         CHECK_EQ_U64(end.offset, records);
}

/* --- situations ------------------------------------------------------------------------------- */

typedef struct operation {
  const char *name;
  void (*prepare)(uint8_t *image);
  void (*run)(member *self);
  uint64_t generation;
} operation;

static void begin_log(uint8_t *image, uint64_t generation) {
  ms_mark nothing = {.timestamp_max = INT64_MIN};
  memset(image, 0, IMAGE_BYTES);
  atomic_store(&header_of(image)->state, MS_CONTROL_LIVE);
  ms_partition_recovered(block_of(image), generation, &nothing, 0, 0, 0, 0);
}

static void fill(uint8_t *image, int batches, int64_t size) {
  static member writer;
  uint32_t dead;
  member_init(&writer, image, 0, 1);
  follow(&writer);
  for (int i = 0; i < batches; i++) CHECK(append(&writer, 2, size, &dead) == MS_OK);
}

static void prepare_empty(uint8_t *image) {
  begin_log(image, 1);
  make_segment(image, 1, SEGMENT_BYTES);
}
static void prepare_some(uint8_t *image) {
  prepare_empty(image);
  fill(image, 3, 100);
}
static void prepare_before_index(uint8_t *image) {
  prepare_empty(image);
  fill(image, 3, 5000);
  fill(image, 1, 1000); /* the next one passes byte 32,768 */
}
static void prepare_full(uint8_t *image) {
  prepare_empty(image);
  fill(image, 5, 5000);
  fill(image, 1, 1500); /* about 100 bytes are left */
  make_segment(image, 2, SEGMENT_BYTES);
}
static void prepare_small_spare(uint8_t *image) {
  prepare_empty(image);
  fill(image, 5, 5000);
  make_segment(image, 2, SMALL_BYTES);
  make_segment(image, 3, SEGMENT_BYTES);
}
static void prepare_next_generation(uint8_t *image) {
  static member walker;
  ms_mark end;
  uint64_t last;
  prepare_some(image);
  member_init(&walker, image, 0, 1);
  if (!walk(&walker, &end, &last)) return;
  ms_partition_recovered(block_of(image), 2, &end, last, 1, 0, 0);
  make_segment(image, 2, SEGMENT_BYTES);
}

static void run_small(member *self) {
  uint32_t dead;
  (void)append(self, 1, 10, &dead);
}
static void run_pages(member *self) {
  uint32_t dead;
  (void)append(self, 3, 1500, &dead);
}
static void run_large(member *self) {
  uint32_t dead;
  (void)append(self, 3, 1600, &dead);
}

static const operation operations[] = {
    {"first append", prepare_empty, run_small, 1},
    {"small append", prepare_some, run_small, 1},
    {"append over pages", prepare_some, run_pages, 1},
    {"append that is indexed", prepare_before_index, run_pages, 1},
    {"append that rolls", prepare_full, run_large, 1},
    {"append over a spare that is too small", prepare_small_spare, run_large, 1},
    {"append in a new epoch", prepare_next_generation, run_small, 2},
};
enum { OPERATIONS = sizeof operations / sizeof operations[0] };

/* --- death at a yield point ------------------------------------------------------------------- */

static jmp_buf death;
static int64_t steps_to_live = -1; /* negative: for ever */
static void (*at_yield)(void);

void ms_scheduler_yield(const char *name) {
  (void)name;
  if (at_yield != NULL) at_yield();
  if (steps_to_live >= 0 && steps_to_live-- == 0) longjmp(death, 1);
}

/* True if it died before the end. */
static bool run_until(int64_t steps, void (*run)(member *), member *self) {
  bool died = true;
  steps_to_live = steps;
  if (setjmp(death) == 0) {
    run(self);
    died = false;
  }
  steps_to_live = -1;
  return died;
}

static void run_take_over(member *self) { take_over(self); }

static uint8_t *new_image(void) {
  void *image = mmap(NULL, IMAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (image == MAP_FAILED) exit(1);
  return image;
}

static uint8_t *image, *copy, *second, *previous;
static size_t watched[SLOTS]; /* byte of the slot from which the operation may write a batch */
static member victim, taker;

static void ends(const operation *op, log_end *out_before, log_end *out_after) {
  if (image == NULL)
    image = new_image(), copy = new_image(), second = new_image(), previous = new_image();
  op->prepare(image);
  *out_before = end_of(image);
  memcpy(copy, image, IMAGE_BYTES);
  member_init(&victim, copy, 1, op->generation);
  follow(&victim);
  op->run(&victim);
  *out_after = end_of(copy);
  CHECK(out_after->tail > out_before->tail);
}

static void test_death_at_each_yield_point(void) {
  for (size_t i = 0; i < OPERATIONS; i++) {
    const operation *op = &operations[i];
    log_end before, after;
    ends(op, &before, &after);
    bool died = true;
    for (int64_t k = 0; died; k++) {
      memcpy(copy, image, IMAGE_BYTES);
      member_init(&victim, copy, 1, op->generation);
      follow(&victim);
      died = run_until(k, op->run, &victim);
      memcpy(second, copy, IMAGE_BYTES);
      if (!judge(copy, &before, &after, op->generation)) {
        printf("  %s, dead at yield point %" PRId64 "\n", op->name, k);
        return;
      }
      bool again = true; /* who takes over dies as well */
      for (int64_t j = 0; again; j++) {
        memcpy(copy, second, IMAGE_BYTES);
        member_init(&taker, copy, 3, op->generation);
        again = run_until(j, run_take_over, &taker);
        if (!judge(copy, &before, &after, op->generation)) {
          printf("  %s, dead at yield point %" PRId64 ", its successor at %" PRId64 "\n", op->name,
                 k, j);
          return;
        }
      }
    }
    CHECK(faults > 0);
  }
}

/* --- others run while a writer is between two steps ------------------------------------------- */

static log_end seen_before, seen_after;
static uint32_t busy_count, rival_count;

static void look(void) {
  static member reader;
  ms_mark mark;
  uint64_t records;
  uint64_t tail = atomic_load(&block_of(copy)->tail);
  member_init(&reader, copy, 4, 1);
  if (!read_all(&reader, tail, &records)) return;
  if (ms_partition_try_end(block_of(copy), &mark) == MS_OK) {
    CHECK_EQ_U64(mark.position, tail);
    CHECK_EQ_U64(mark.offset, records);
  }
  ops++;
}

static void test_reader_between_any_two_steps_sees_whole_batches(void) {
  for (size_t i = 0; i < OPERATIONS; i++) {
    ends(&operations[i], &seen_before, &seen_after);
    memcpy(copy, image, IMAGE_BYTES);
    member_init(&victim, copy, 1, operations[i].generation);
    follow(&victim);
    at_yield = look;
    operations[i].run(&victim);
    at_yield = NULL;
  }
}

/* A rival appends at one yield point; it is refused where the word is held. */
static int64_t rival_at;
static void compete(void) {
  if (competing || rival_at-- != 0) return;
  static member rival;
  uint32_t dead = 0;
  int64_t steps = steps_to_live;
  steps_to_live = -1;
  competing = true;
  member_init(&rival, copy, 3, victim.partition.generation);
  follow(&rival);
  ms_status status = append(&rival, 1, 10, &dead);
  competing = false;
  competed = true;
  steps_to_live = steps;
  CHECK(status == MS_OK || status == MS_BUSY);
  if (status == MS_BUSY) {
    CHECK_EQ_U64(dead & ~MS_OWNER_WAITERS, victim.partition.self);
    busy_count++;
  } else {
    rival_count++;
  }
}

static void test_rival_between_any_two_steps_is_refused_or_in_order(void) {
  for (size_t i = 0; i < OPERATIONS; i++) {
    ends(&operations[i], &seen_before, &seen_after);
    competed = true;
    for (int64_t k = 0; competed; k++) {
      memcpy(copy, image, IMAGE_BYTES);
      member_init(&victim, copy, 1, operations[i].generation);
      follow(&victim);
      uint32_t rivals = rival_count, dead = 0;
      competed = false;
      rival_at = k;
      at_yield = compete;
      /* The victim's records name their offsets; a rival that came first makes them wrong, so it
       * looks again. */
      steps_to_live = -1;
      ms_status status = MS_OK;
      if (k > 0) {
        operations[i].run(&victim);
      } else { /* before the word is taken anything may happen: only the log must be sound */
        (void)run_until(0, operations[i].run, &victim);
        status = append(&victim, 1, 10, &dead);
      }
      at_yield = NULL;
      CHECK(status == MS_OK);
      ms_mark end;
      uint64_t last;
      member_init(&taker, copy, 2, operations[i].generation);
      if (!walk(&taker, &end, &last)) return;
      CHECK_EQ_U64(end.position, atomic_load(&block_of(copy)->tail));
      CHECK(end.offset >= seen_before.records + (rival_count - rivals));
      ops++;
    }
  }
  competed = false;
  CHECK(busy_count > 0);
  CHECK(rival_count > 0);
}

/* --- the durable mark and the end of recovery ------------------------------------------------- */

static const ms_mark new_mark = {
    .position = 4096, .offset = 9, .hash = 0x1122334455667788u, .timestamp_max = 5};

static void run_set_durable(member *self) {
  ms_partition_set_durable(self->partition.block, &new_mark);
}
static void run_recovered(member *self) {
  ms_partition_recovered(self->partition.block, 2, &new_mark, 3, 1, 0, 0);
}

static void judge_mark(uint8_t *bytes) {
  const ms_control_block *block = block_of(bytes);
  uint64_t durable = atomic_load(&block->durable);
  faults++;
  CHECK(durable == 0 || durable == new_mark.position);
  if (durable == 0) return;
  CHECK_EQ_U64(atomic_load(&block->durable_offset), new_mark.offset);
  CHECK_EQ_U64(atomic_load(&block->durable_hash), (uint32_t)new_mark.hash);
}

static void judge_recovered(uint8_t *bytes) {
  const ms_control_block *block = block_of(bytes);
  ms_mark mark = {0};
  faults++;
  if (atomic_load(&block->walked) != 2) return; /* the next one walks again */
  CHECK(ms_partition_try_end(block, &mark) == MS_OK);
  CHECK_EQ_U64(mark.position, new_mark.position);
  CHECK_EQ_U64(mark.offset, new_mark.offset);
  CHECK_EQ_U64(mark.hash, new_mark.hash);
  CHECK_EQ_U64(atomic_load(&block->active), 3);
  CHECK_EQ_U64(atomic_load(&block->first_segment), 1);
  judge_mark(bytes);
}

/* --- death at every instruction --------------------------------------------------------------- */

/* What an operation may change, without the bytes far from the tail: comparing all of it takes most
 * of the time. */
static bool changed(const uint8_t *was, uint8_t *is) {
  if (memcmp(was, is, MS_CONTROL_BLOCKS_AT + 256) != 0) return true;
  for (uint64_t number = 1; number <= SLOTS; number++) {
    size_t at = (size_t)(slot(is, number) - is);
    if (memcmp(was + at, is + at, 4096 + 128) != 0 ||
        memcmp(was + at + 8192, is + at + 8192, 64) != 0)
      return true;
    if (watched[number - 1] != 0 &&
        memcmp(was + at + watched[number - 1], is + at + watched[number - 1], 6000) != 0)
      return true;
  }
  return false;
}

static void watch(uint8_t *bytes) {
  static member reader;
  uint64_t active = atomic_load(&block_of(bytes)->active),
           tail = atomic_load(&block_of(bytes)->tail);
  member_init(&reader, bytes, 5, 1);
  for (uint64_t number = 1; number <= SLOTS; number++) {
    watched[number - 1] = number > active ? 12288 : 0;
    if (number != active || !map_segment(&reader, number, &reader.segments[number - 1])) continue;
    uint64_t at = ms_segment_file_position(&reader.segments[number - 1], tail);
    watched[number - 1] = at < SLOT_BYTES - 6000 ? (size_t)at : SLOT_BYTES - 6000;
  }
}

/* Run in a child, one instruction after another; call `on_image` with each distinct image. Returns
 * the number of instructions, or 0 where this machine does not let us. */
static uint64_t single_step(uint8_t *shared, void (*run)(member *), member *self,
                            void (*on_image)(uint8_t *)) {
  fflush(stdout);
  watch(shared);
  pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0) _exit(2);
    raise(SIGSTOP);
    run(self);
    _exit(0);
  }
  int status;
  uint64_t steps = 0;
  waitpid(child, &status, 0);
  if (!WIFSTOPPED(status)) return 0;
  memcpy(previous, shared, IMAGE_BYTES);
  for (;;) {
    if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0) break;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) break;
    steps++;
    if (!changed(previous, shared)) continue;
    memcpy(previous, shared, IMAGE_BYTES);
    on_image(previous);
  }
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  return steps;
}

static uint8_t *kept[IMAGES_MAX];
static size_t kept_count;
static const operation *stepped;
static log_end stepped_before, stepped_after;
static bool keeping;

static void judge_image(uint8_t *bytes) {
  if (keeping && kept_count < IMAGES_MAX) {
    if ((kept[kept_count] = malloc(IMAGE_BYTES)) == NULL) exit(1);
    memcpy(kept[kept_count++], bytes, IMAGE_BYTES);
  }
  memcpy(second, bytes, IMAGE_BYTES);
  if (!judge(second, &stepped_before, &stepped_after, stepped->generation))
    printf("  %s\n", stepped->name);
}

static void test_death_at_each_instruction(void) {
  for (size_t i = 0; i < OPERATIONS; i++) {
    stepped = &operations[i];
    ends(stepped, &stepped_before, &stepped_after);
    memcpy(copy, image, IMAGE_BYTES);
    member_init(&victim, copy, 1, stepped->generation);
    follow(&victim);
    keeping = true;
    uint64_t steps = single_step(copy, stepped->run, &victim, judge_image);
    keeping = false;
    if (steps == 0) CHECK_SKIP("no ptrace here");
    uint64_t images = kept_count, again = 0;
    size_t stride = kept_count / check_count(TAKERS_MAX, TAKERS_MAX_FULL) + 1;
    for (size_t k = 0; k < kept_count; k++) {
      if (k % stride == 0) {
        memcpy(copy, kept[k], IMAGE_BYTES);
        member_init(&taker, copy, 3, stepped->generation);
        again += single_step(copy, run_take_over, &taker, judge_image);
      }
      free(kept[k]);
    }
    kept_count = 0;
    CHECK(images > 10);
    printf("  %s: %" PRIu64 " instructions, %" PRIu64 " images; taken over: %" PRIu64
           " instructions\n",
           stepped->name, steps, images, again);
  }
}

static void test_death_at_each_instruction_of_the_marks(void) {
  if (image == NULL)
    image = new_image(), copy = new_image(), second = new_image(), previous = new_image();
  begin_log(copy, 1);
  member_init(&victim, copy, 1, 1);
  if (single_step(copy, run_set_durable, &victim, judge_mark) == 0) CHECK_SKIP("no ptrace here");
  begin_log(copy, 1);
  member_init(&victim, copy, 1, 2);
  CHECK(single_step(copy, run_recovered, &victim, judge_recovered) > 10);
}

static void test_totals(void) {
  CHECK(faults >= 500);
  printf("  ops=%" PRIu64 " faults=%" PRIu64 " lost=0 dup=0 seed=0\n", ops, faults);
}

static const check_test tests[] = {
    CHECK_TEST(test_death_at_each_yield_point),
    CHECK_TEST(test_reader_between_any_two_steps_sees_whole_batches),
    CHECK_TEST(test_rival_between_any_two_steps_is_refused_or_in_order),
    CHECK_TEST(test_death_at_each_instruction),
    CHECK_TEST(test_death_at_each_instruction_of_the_marks),
    CHECK_TEST(test_totals),
};
CHECK_MAIN(tests)
