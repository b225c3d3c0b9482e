// executor.cpp — runs compiled kernels. Each GPU thread is a fiber; simdgroup operations and barriers are real rendezvous, so
// a thread that takes another way is seen. Threadgroups run one after another, on one CPU thread, also from the last to the first: a
// kernel that waits for another threadgroup of its dispatch would hang, and is stopped and reported.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fiber.h"
#include "state.h"

#define API extern "C" __attribute__((visibility("default")))

running_dispatch msl_running;
static running_dispatch& R = msl_running;

static gpu_thread threads[MAX_THREADS];
static int n_threads, n_simdgroups;
static void* scheduler_stack;
static void (*kernel_fn)(const msl_position*);
static char* threadgroup_buffers[MSL_BUFFERS];
static uint32_t random_state;
static struct { char* text; size_t size, used; unsigned lines; } report;

// Static threadgroup variables of all kernels: the rewriter puts them into this section.
extern "C" {
extern char __start_msl_tg[] __attribute__((weak, visibility("hidden")));
extern char __stop_msl_tg[] __attribute__((weak, visibility("hidden")));
extern char __ehdr_start[] __attribute__((weak, visibility("hidden")));
extern char _end[] __attribute__((weak, visibility("hidden")));
}

void msl_report(const char* format, ...) {
  report.lines++;
  if (!report.text || report.used + 400 > report.size) return;
  va_list args;
  va_start(args, format);
  int n = vsnprintf(report.text + report.used, 398, format, args);
  va_end(args);
  report.used += n < 398 ? n : 397;
  report.text[report.used++] = '\n';
  report.text[report.used] = 0;
}

static unsigned random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

// ---- registry: filled by constructors of the compiled file ----

static struct { const char *name, *arguments; void (*fn)(const msl_position*); unsigned written; } kernels[1024];
static int n_kernels;
static struct { int index; const char* name; void* p; unsigned size; bool set; } constants[128];
static int n_constants;

API void msl_register_kernel(const char* name, const char* arguments, void (*fn)(const msl_position*), unsigned written) {
  if (n_kernels < 1024) kernels[n_kernels++] = {name, arguments, fn, written};
}
API const char* msl_kernel_name(int i, const char** arguments) {
  if (i < 0 || i >= n_kernels) return nullptr;
  if (arguments) *arguments = kernels[i].arguments;
  return kernels[i].name;
}
API void msl_register_constant(int index, const char* name, void* p, unsigned size) {
  if (n_constants < 128) constants[n_constants++] = {index, name, p, size, false};
}
API bool msl_constant_defined(const void* p) {
  for (int i = 0; i < n_constants; i++)
    if (constants[i].p == p) return constants[i].set;
  return false;
}
API int msl_set_constant(int index, const void* value, size_t size) {
  int found = 0;
  for (int i = 0; i < n_constants; i++) {
    if (constants[i].index != index) continue;
    if (constants[i].size != size) return -1;
    memcpy(constants[i].p, value, size);
    constants[i].set = true;
    found++;
  }
  return found;
}
API void msl_clear_constants() {
  for (int i = 0; i < n_constants; i++) {
    constants[i].set = false;
    memset(constants[i].p, 0, constants[i].size);
  }
}

// ---- called by kernels ----

static void leave() { msl_switch_stack(&R.current->stack_pointer, scheduler_stack); }

void msl_stop_if_fatal() {
  if (!R.fatal || !R.current) return;
  R.current->state = RETURNED;
  leave();
}

static void wait_in(thread_state state, const char* what, msl_site site) {
  gpu_thread* t = R.current;
  t->state = state;
  t->what = what;
  t->site = site;
  t->sequence++;
  leave();
}
API void msl_simd_op(const char* what, msl_site site, bool needs_all, const void* in, void* out, const void* arg, msl_simd_fn fn) {
  R.current->op = {in, out, arg};
  R.current->fn = fn;
  R.current->needs_all = needs_all;
  wait_in(IN_SIMD_OP, what, site);
}
API void msl_threadgroup_barrier(unsigned flags, msl_site site) {
  R.current->flags = flags;
  wait_in(AT_THREADGROUP_BARRIER, "threadgroup_barrier", site);
}
API void msl_simdgroup_barrier(unsigned flags, msl_site site) {
  R.current->flags = flags;
  wait_in(AT_SIMDGROUP_BARRIER, "simdgroup_barrier", site);
}
API unsigned msl_lane() { return R.current->at.lane; }
API unsigned msl_active_mask() {
  unsigned mask = 0;
  int first = (int)R.current->at.simdgroup * 32;
  for (int i = 0; i < 32 && first + i < n_threads; i++)
    if (threads[first + i].state != RETURNED) mask |= 1u << i;
  return mask;
}

static void compare_arguments(msl_lane_op* lanes, unsigned) {
  const size_t* first = (const size_t*)lanes[0].in;
  for (int i = 1; i < 32; i++)
    if (memcmp(first, lanes[i].in, 3 * sizeof(size_t))) {
      msl_report("arguments of a simdgroup matrix load or store differ between lanes 0 and %d", i);
      R.fatal = true;
      return;
    }
}
API void msl_same_in_all_lanes(const char* what, msl_site site, const void* p, size_t a, size_t b) {
  if (!R.checking) return;
  size_t arguments[3] = {(size_t)p, a, b};
  msl_simd_op(what, site, true, arguments, nullptr, nullptr, compare_arguments);
}

static char unbound[4096]; // arguments of a kernel that it does not use may be unbound; the compiler may still form references
API void* msl_buffer(int index) { return R.d->buffers[index].p ? R.d->buffers[index].p : unbound; }
API void* msl_threadgroup_buffer(int index) { return threadgroup_buffers[index]; }

static void thread_main() {
  kernel_fn(&R.current->at);
  R.current->state = RETURNED;
  leave();
  __builtin_trap();
}

// ---- scheduler ----

static bool same_place(const gpu_thread* a, const gpu_thread* b) {
  return a->state == b->state && a->site.line == b->site.line && a->site.column == b->site.column && a->sequence == b->sequence && (a->state != IN_SIMD_OP || a->fn == b->fn);
}

static void report_divergence(const gpu_thread* a, const gpu_thread* b) {
  msl_report("DIVERGENCE: thread %u waits in %s (%s:%u:%u, operation %u), thread %u in %s (%s:%u:%u, operation %u)", a->at.thread_index, a->what, a->site.file, a->site.line, a->site.column, a->sequence,
             b->at.thread_index, b->what, b->site.file, b->site.line, b->site.column, b->sequence);
  R.fatal = true;
}

static void run_threads(int first, int n) {
  bool shuffle = R.d->flags & MSL_SHUFFLE;
  int start = shuffle ? (int)(random_number() % (unsigned)n) : 0;
  bool backwards = shuffle && (random_number() & 1);
  for (int k = 0; k < n && !R.fatal; k++) {
    gpu_thread* t = &threads[first + (start + (backwards ? n - k : k)) % n];
    if (t->state != RUNNING) continue;
    R.current = t;
    msl_switch_stack(&scheduler_stack, t->stack_pointer);
    R.current = nullptr;
  }
}

// Does what all live lanes of a simdgroup wait for. False when they wait for different things.
static bool finish_operation(int simdgroup, int first, int n) {
  const gpu_thread* leader = nullptr;
  unsigned mask = 0;
  msl_lane_op lanes[32] = {};
  for (int i = 0; i < n; i++) {
    const gpu_thread* t = &threads[first + i];
    if (t->state == RETURNED) continue;
    if (!leader) leader = t;
    if (!same_place(leader, t)) {
      report_divergence(leader, t);
      return false;
    }
    mask |= 1u << i;
    lanes[i] = t->op;
  }
  if (leader->state == IN_SIMD_OP) {
    if (leader->needs_all && mask != 0xffffffffu) {
      msl_report("%s:%u:%u: %s with inactive lanes (mask 0x%x)", leader->site.file, leader->site.line, leader->site.column, leader->what, mask);
      R.fatal = true;
      return false;
    }
    leader->fn(lanes, mask);
    if (R.fatal) return false;
  } else {
    for (int memory = 0; memory < 2; memory++)
      if (leader->flags >> memory & 1) R.epochs.simdgroup[memory][simdgroup]++;
  }
  for (int i = 0; i < n; i++)
    if (threads[first + i].state != RETURNED) threads[first + i].state = RUNNING;
  return true;
}

// Runs a simdgroup until all its lanes wait at a threadgroup barrier or have returned.
static void run_simdgroup(int simdgroup) {
  int first = simdgroup * 32, n = n_threads - first < 32 ? n_threads - first : 32;
  for (;;) {
    run_threads(first, n);
    if (R.fatal) return;
    int live = 0, at_barrier = 0;
    for (int i = first; i < first + n; i++) {
      live += threads[i].state != RETURNED;
      at_barrier += threads[i].state == AT_THREADGROUP_BARRIER;
    }
    if (at_barrier == live) return;
    if (!finish_operation(simdgroup, first, n)) return;
  }
}

// All simdgroups have stopped: either all threads have returned, or all wait at the same barrier.
static bool pass_barrier() {
  const gpu_thread *waiting = nullptr, *returned = nullptr;
  for (int i = 0; i < n_threads; i++) {
    const gpu_thread* t = &threads[i];
    if (t->state == RETURNED) returned = t;
    else if (!waiting) waiting = t;
    else if (waiting->site.line != t->site.line || waiting->site.column != t->site.column) { // how often each simdgroup did what before is its own affair
      report_divergence(waiting, t);
      return false;
    }
  }
  if (!waiting) return false;
  if (returned) {
    msl_report("DIVERGENCE: thread %u returned while thread %u waits at threadgroup_barrier (%s:%u:%u)", returned->at.thread_index, waiting->at.thread_index, waiting->site.file, waiting->site.line, waiting->site.column);
    R.fatal = true;
    return false;
  }
  for (int memory = 0; memory < 2; memory++)
    if (waiting->flags >> memory & 1) R.epochs.threadgroup[memory]++;
  for (int i = 0; i < n_threads; i++) threads[i].state = RUNNING;
  return true;
}

static void run_threadgroup() {
  do {
    int order[MAX_SIMDGROUPS];
    for (int i = 0; i < n_simdgroups; i++) order[i] = i;
    for (int i = n_simdgroups - 1; (R.d->flags & MSL_SHUFFLE) && i > 0; i--) {
      int j = (int)(random_number() % (unsigned)(i + 1)), t = order[i];
      order[i] = order[j];
      order[j] = t;
    }
    for (int i = 0; i < n_simdgroups && !R.fatal; i++) run_simdgroup(order[i]);
  } while (!R.fatal && pass_barrier());
}

static void place_threads(const uint32_t group[3], const uint32_t groups[3], bool exact) {
  const msl_dispatch* d = R.d;
  uint32_t size[3];
  for (int k = 0; k < 3; k++) {
    uint32_t left = exact ? d->grid[k] - group[k] * d->threads[k] : d->threads[k];
    size[k] = left < d->threads[k] ? left : d->threads[k];
  }
  n_threads = (int)(size[0] * size[1] * size[2]);
  n_simdgroups = (n_threads + 31) / 32;
  for (int i = 0; i < n_threads; i++) {
    gpu_thread* t = &threads[i];
    t->state = RUNNING;
    t->sequence = 0;
    t->stack_pointer = new_stack(R.stacks + (size_t)(i + 1) * STACK_BYTES, thread_main);
    unsigned at[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    msl_position* p = &t->at;
    for (int k = 0; k < 3; k++) {
      p->in_threadgroup[k] = at[k];
      p->threadgroup_in_grid[k] = group[k];
      p->in_grid[k] = group[k] * d->threads[k] + at[k];
      p->threads_per_threadgroup[k] = size[k];
      p->dispatch_threads_per_threadgroup[k] = d->threads[k];
      p->threadgroups_per_grid[k] = groups[k];
      p->threads_per_grid[k] = exact ? d->grid[k] : groups[k] * d->threads[k];
    }
    p->thread_index = (unsigned)i;
    p->lane = i & 31;
    p->simdgroup = i >> 5;
    p->n_simdgroups = (unsigned)n_simdgroups;
  }
}

static const char* find_kernel(const char* name) {
  for (int i = 0; i < n_kernels; i++)
    if (!strcmp(kernels[i].name, name)) {
      kernel_fn = kernels[i].fn;
      R.written_mask = kernels[i].written;
      return kernels[i].arguments;
    }
  return nullptr;
}

static bool arguments_are_bound(const char* kernel, const char* arguments) {
  for (const char* a = arguments; *a;) {
    int index = atoi(a + 1);
    if ((*a == 'b' || *a == 'w') && !R.d->buffers[index].p) {
      msl_report("buffer %d of %s is not set", index, kernel);
      return false;
    }
    if (*a == 't' && !R.d->threadgroup_lengths[index]) {
      msl_report("threadgroup memory %d of %s is not set", index, kernel);
      return false;
    }
    a = strchr(a, ' ');
    if (!a) break;
    a++;
  }
  return true;
}

static bool begin(const char* kernel) {
  const msl_dispatch* d = R.d;
  const char* arguments = find_kernel(kernel);
  if (!arguments) {
    msl_report("no kernel named %s", kernel);
    return false;
  }
  uint32_t per_group = d->threads[0] * d->threads[1] * d->threads[2];
  if (!per_group || per_group > MAX_THREADS) {
    msl_report("%s: %u threads a threadgroup, at most %d", kernel, per_group, MAX_THREADS);
    return false;
  }
  for (int i = 0; i < MSL_BUFFERS; i++)
    if (d->threadgroup_lengths[i] % 16) {
      msl_report("%s: threadgroup memory length %zu at %d is not a multiple of 16", kernel, d->threadgroup_lengths[i], i);
      return false;
    }
  return arguments_are_bound(kernel, arguments);
}

static size_t static_threadgroup_bytes() { return __start_msl_tg ? (size_t)(__stop_msl_tg - __start_msl_tg) : 0; }

static void add_memory_to_checks() {
  const msl_dispatch* d = R.d;
  size_t fixed = static_threadgroup_bytes();
  msl_checks_begin();
  if (fixed) msl_checks_add(__start_msl_tg, fixed, THREADGROUP_MEMORY, -1, true);
  for (int i = 0; i < MSL_BUFFERS; i++) {
    bool written = R.written_mask >> i & 1;
    if (d->buffers[i].p) msl_checks_add(d->buffers[i].p, d->buffers[i].length, written ? DEVICE_MEMORY : READ_ONLY_MEMORY, i, written);
    if (d->threadgroup_lengths[i]) msl_checks_add(threadgroup_buffers[i], d->threadgroup_lengths[i], THREADGROUP_MEMORY, i, true);
  }
  msl_checks_add(__ehdr_start, (size_t)(_end - __ehdr_start), IMAGE, 0, false);
}

API int msl_run(const char* kernel, msl_dispatch* d, char* text, size_t text_size) {
  report = {text, text_size, 0, 0};
  if (text && text_size) *text = 0;
  R.d = d;
  R.current = nullptr;
  R.threads = threads;
  R.fatal = false;
  R.checking = d->flags & MSL_CHECK;
  random_state = d->seed ? d->seed : 2463534242u;
  memset(d->bytes_read, 0, sizeof d->bytes_read);
  if (!begin(kernel)) return -1;
  if (!R.stacks) R.stacks = (char*)mmap(nullptr, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  size_t dynamic = 0, at = 0, fixed = static_threadgroup_bytes();
  for (int i = 0; i < MSL_BUFFERS; i++) dynamic += d->threadgroup_lengths[i];
  char* memory = (char*)calloc(1, dynamic + 16);
  for (int i = 0; i < MSL_BUFFERS; i++) {
    threadgroup_buffers[i] = memory + at;
    at += d->threadgroup_lengths[i];
  }
  if (R.checking) add_memory_to_checks();
  if (R.checking) msl_lines_begin();
  bool exact = d->grid[0] != 0;
  uint32_t groups[3];
  for (int k = 0; k < 3; k++) groups[k] = exact ? (d->grid[k] + d->threads[k] - 1) / d->threads[k] : d->groups[k];
  memset(&R.epochs, 0, sizeof R.epochs);
  R.group = 0;
  const uint64_t n_groups = (uint64_t)groups[0] * groups[1] * groups[2];
  // Any order is allowed: one that waits for a threadgroup before it is seen when the last one runs first.
  const bool backwards = d->flags & MSL_SHUFFLE && d->seed & 1;
  for (uint64_t i = 0; i < n_groups && !R.fatal; i++) {
    const uint64_t at = backwards ? n_groups - 1 - i : i;
    const uint32_t group[3] = {(uint32_t)(at % groups[0]), (uint32_t)(at / groups[0] % groups[1]), (uint32_t)(at / groups[0] / groups[1])};
    R.group = (uint32_t)at + 1;
    // Threadgroup memory is undefined at the start: all bits set is a NaN or a huge index.
    if (fixed) memset(__start_msl_tg, 0xFF, fixed);
    memset(memory, 0xFF, dynamic);
    place_threads(group, groups, exact);
    run_threadgroup();
  }
  if (R.checking) msl_lines_end();
  if (R.checking) msl_checks_end();
  free(memory);
  return report.lines ? 1 : 0;
}
