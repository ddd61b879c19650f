/* A deterministic scheduler of virtual processes, for lock-free code with MS_YIELD points.
 *
 * The program and the core are built with -DMS_SCHEDULER. Two to four coroutines share plain
 * memory, as processes share a mapping; at every yield point the seed decides who goes on, and
 * whether the one that stands there is killed or paused. One seed is one schedule, always the same:
 *
 *   scheduler_options options = {.seed = seed, .process_count = 3, .run = one_process};
 *   scheduler_result result = scheduler_run(&options);
 *
 * Who is killed keeps nothing but what it wrote to memory; who is paused goes on when all others
 * have ended and at_rest has run, or never where there is no at_rest. A schedule that does not end
 * within steps_max steps is hung: a failed check. Yield points outside of scheduler_run, and in
 * other threads, do nothing. Interleaves at yield points only, and every store is seen at once:
 * memory orders are the business of TSan and of thought.
 */
#ifndef SCHEDULER_H
#define SCHEDULER_H

#include <ucontext.h>

#include "check.h"

#ifndef MS_SCHEDULER
#error "build with -DMS_SCHEDULER"
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum {
  SCHEDULER_PROCESSES_MAX = 4,
  SCHEDULER_STACK_BYTES = 1 << 16,
  SCHEDULER_TRACE = 40,
  SCHEDULER_NOBODY = -1
};

typedef enum scheduler_state {
  SCHEDULER_RUNS,
  SCHEDULER_ENDED,
  SCHEDULER_PAUSED,
  SCHEDULER_KILLED
} scheduler_state;

typedef struct scheduler_options {
  uint64_t seed;
  uint32_t process_count;
  uint32_t kill_one_in;  /* at a yield point; 0: never */
  uint32_t pause_one_in; /* the same */
  uint32_t spared;       /* bit i: process i is neither killed nor paused */
  uint32_t steps_max;    /* 0: 100,000 */
  void (*run)(uint32_t process);
  void (*at_rest)(void); /* NULL: the paused never go on */
} scheduler_options;

typedef struct scheduler_result {
  scheduler_state states[SCHEDULER_PROCESSES_MAX];
  uint32_t steps, kills, pauses;
  bool hung;
} scheduler_result;

typedef struct scheduler {
  const scheduler_options *options;
  scheduler_result result;
  uint64_t random;
  uint32_t stay_of_8; /* of 8 yields so many go on at once: a trait of the seed */
  uint32_t steps_max;
  int32_t current;
  bool resumed; /* nobody is paused or killed any more */
  ucontext_t caller;
  ucontext_t contexts[SCHEDULER_PROCESSES_MAX];
  struct {
    int32_t process;
    const char *name;
  } trace[SCHEDULER_TRACE];
} scheduler;

static _Thread_local scheduler *scheduler_now;
static uint8_t scheduler_stacks[SCHEDULER_PROCESSES_MAX][SCHEDULER_STACK_BYTES]
    __attribute__((aligned(64)));

/* For the virtual processes as well: what they do belongs to the schedule. */
static inline uint64_t scheduler_random(void) {
  uint64_t *word = &scheduler_now->random;
  *word ^= *word << 13;
  *word ^= *word >> 7;
  *word ^= *word << 17;
  return *word * 0x2545f4914f6cdd1du >> 16;
}

static inline bool scheduler_hits(uint32_t one_in) {
  return one_in != 0 && scheduler_random() % one_in == 0;
}

/* Let somebody who can go on go on; the caller's context is kept. */
static inline void scheduler_switch(void) {
  scheduler *self = scheduler_now;
  int32_t from = self->current, able[SCHEDULER_PROCESSES_MAX];
  uint32_t able_count = 0;
  for (uint32_t i = 0; i < self->options->process_count; i++)
    if (self->result.states[i] == SCHEDULER_RUNS) able[able_count++] = (int32_t)i;
  int32_t to = able_count == 0 || self->result.hung ? SCHEDULER_NOBODY
                                                    : able[scheduler_random() % able_count];
  if (to == from) return;
  self->current = to;
  swapcontext(from == SCHEDULER_NOBODY ? &self->caller : &self->contexts[from],
              to == SCHEDULER_NOBODY ? &self->caller : &self->contexts[to]);
}

void ms_scheduler_yield(const char *name);
void ms_scheduler_yield(const char *name) {
  scheduler *self = scheduler_now;
  if (self == NULL || self->current == SCHEDULER_NOBODY) return;
  const scheduler_options *options = self->options;
  uint32_t process = (uint32_t)self->current, step = self->result.steps++;
  self->trace[step % SCHEDULER_TRACE].process = self->current;
  self->trace[step % SCHEDULER_TRACE].name = name;
  if (step >= self->steps_max) {
    self->result.hung = true;
  } else if (!self->resumed && (options->spared >> process & 1) == 0) {
    if (scheduler_hits(options->kill_one_in)) {
      self->result.states[process] = SCHEDULER_KILLED;
      self->result.kills++;
    } else if (scheduler_hits(options->pause_one_in)) {
      self->result.states[process] = SCHEDULER_PAUSED;
      self->result.pauses++;
    }
  }
  if (self->result.states[process] == SCHEDULER_RUNS && !self->result.hung &&
      scheduler_random() % 8 < self->stay_of_8)
    return;
  scheduler_switch();
}

static inline void scheduler_main(void) {
  scheduler *self = scheduler_now;
  uint32_t process = (uint32_t)self->current;
  self->options->run(process);
  self->result.states[process] = SCHEDULER_ENDED;
  scheduler_switch(); /* does not come back */
}

static inline void scheduler_prepare(ucontext_t *context, uint8_t *stack) {
#ifdef __SANITIZE_ADDRESS__
  /* Who was killed there left the red zones of its frames behind. */
  __asan_unpoison_memory_region(stack, SCHEDULER_STACK_BYTES);
#endif
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = SCHEDULER_STACK_BYTES;
  context->uc_link = NULL;
  makecontext(context, scheduler_main, 0);
}

static inline scheduler_result scheduler_run(const scheduler_options *options) {
  static const uint32_t stays[4] = {0, 4, 6, 7};
  static scheduler self;
  memset(&self, 0, sizeof self);
  self.options = options;
  self.random = (options->seed + 1) * 0x9e3779b97f4a7c15u | 1;
  self.steps_max = options->steps_max != 0 ? options->steps_max : 100000;
  self.current = SCHEDULER_NOBODY;
  scheduler_now = &self;
  for (uint32_t i = 0; i < 8; i++) (void)scheduler_random();
  self.stay_of_8 = stays[scheduler_random() % 4];
  for (uint32_t i = 0; i < options->process_count; i++)
    scheduler_prepare(&self.contexts[i], scheduler_stacks[i]);
  scheduler_switch();
  if (options->at_rest != NULL && !self.result.hung) {
    options->at_rest();
    self.resumed = true;
    for (uint32_t i = 0; i < options->process_count; i++)
      if (self.result.states[i] == SCHEDULER_PAUSED) self.result.states[i] = SCHEDULER_RUNS;
    scheduler_switch();
  }
  CHECK(!self.result.hung);
  return self.result;
}

/* The last steps of the last schedule, for a failed one. */
static inline void scheduler_print_trace(void) {
  const scheduler *self = scheduler_now;
  if (self == NULL) return;
  uint32_t steps = self->result.steps;
  for (uint32_t i = steps > SCHEDULER_TRACE ? steps - SCHEDULER_TRACE : 0; i < steps; i++)
    printf("    step %" PRIu32 ": process %" PRId32 " at %s\n", i,
           self->trace[i % SCHEDULER_TRACE].process, self->trace[i % SCHEDULER_TRACE].name);
  fflush(stdout);
}

#endif
