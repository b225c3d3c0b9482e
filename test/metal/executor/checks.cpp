// checks.cpp — memory checks of an instrumented kernel library. The compiler calls __tsan_* at each load and store and
// __ubsan_* at undefined arithmetic; these are ours. Reports carry "@pc 0x…", the address in the library, for addr2line.
//
//   bounds   an access must lie in a bound buffer, threadgroup memory, or the thread's own stack
//   races    two threads, one writing, with no barrier of the right scope and memory between them
//   uninit   threadgroup memory read before this threadgroup wrote it
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "state.h"

#define API extern "C" __attribute__((visibility("default")))

static running_dispatch& R = msl_running;

// Who touched a byte last, and after how many barriers. group 0: nobody.
struct access { uint32_t group; uint16_t thread; uint32_t threadgroup_epoch, simdgroup_epoch; };
struct shadow { access written, read, read_before; };
struct range { uintptr_t low, high; memory_kind kind; int index; bool written; shadow* cells; };

static range ranges[2 * MSL_BUFFERS + 4];
static int n_ranges, last_range;
static uintptr_t reported[64];
static int n_reported;

extern "C" { extern char __ehdr_start[] __attribute__((weak, visibility("hidden"))); }

void msl_checks_begin() { n_ranges = last_range = n_reported = 0; }

void msl_checks_add(const void* p, size_t n, memory_kind kind, int index, bool written) {
  range* r = &ranges[n_ranges++];
  *r = {(uintptr_t)p, (uintptr_t)p + n, kind, index, written, nullptr};
  if (n && (kind == DEVICE_MEMORY || kind == THREADGROUP_MEMORY))
    r->cells = (shadow*)mmap(nullptr, n * sizeof(shadow), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void msl_checks_end() {
  for (int i = 0; i < n_ranges; i++)
    if (ranges[i].cells) munmap(ranges[i].cells, (ranges[i].high - ranges[i].low) * sizeof(shadow));
}

// One report for each place in the code.
static bool first_at(uintptr_t pc) {
  for (int i = 0; i < n_reported; i++)
    if (reported[i] == pc) return false;
  if (n_reported == 64) return false;
  reported[n_reported++] = pc;
  return true;
}
static unsigned long place(uintptr_t pc) { return (unsigned long)(pc - (uintptr_t)__ehdr_start); }
static const char* name_of(const range* r) { return r->kind == THREADGROUP_MEMORY ? "threadgroup memory" : "buffer"; }

// Did access a happen before what thread `thread` does now?
static bool ordered(const access& a, int memory, unsigned thread) {
  if (a.group != R.group) return false;
  if (a.thread == thread || a.threadgroup_epoch < R.epochs.threadgroup[memory]) return true;
  unsigned simdgroup = a.thread / 32;
  return simdgroup == thread / 32 && a.simdgroup_epoch < R.epochs.simdgroup[memory][simdgroup];
}

static void report_race(const range* r, size_t offset, const char* now, const char* before, const access& a, unsigned thread, uintptr_t pc) {
  if (first_at(pc))
    msl_report("RACE: %s by thread %u of group %u against an earlier %s by thread %u of group %u at %s %d +%zu, no barrier between @pc 0x%lx", now, thread, R.group - 1, before, a.thread, a.group - 1, name_of(r), r->index,
               offset, place(pc));
}

// The range that has all n bytes; else the one that has the first. Buffers may overlap: several over the pages of one file.
static range* find(uintptr_t p, size_t n) {
  if (last_range < n_ranges && p >= ranges[last_range].low && p + n <= ranges[last_range].high) return &ranges[last_range];
  range* part = nullptr;
  for (int i = 0; i < n_ranges; i++) {
    if (p < ranges[i].low || p >= ranges[i].high) continue;
    if (p + n <= ranges[i].high) {
      last_range = i;
      return &ranges[i];
    }
    part = &ranges[i];
  }
  return part;
}

static void report_out_of_bounds(uintptr_t p, size_t n, bool write, uintptr_t pc) {
  const char* near = "far from any bound memory";
  int index = 0;
  for (int i = 0; i < n_ranges; i++)
    if (ranges[i].kind != IMAGE && p >= ranges[i].high && p < ranges[i].high + 4096) {
      near = ranges[i].kind == THREADGROUP_MEMORY ? "past the end of threadgroup memory" : "past the end of buffer";
      index = ranges[i].index;
    }
  if (first_at(pc)) msl_report("OUT OF BOUNDS: %s of %zu bytes %s %d, thread %u of group %u @pc 0x%lx", write ? "write" : "read", n, near, index, R.current->at.thread_index, R.group - 1, place(pc));
  R.fatal = true;
}

static __attribute__((noinline)) void check_access(uintptr_t p, size_t n, bool write, uintptr_t pc) {
  if (!R.current) return;
  uintptr_t stack = (uintptr_t)R.stacks + (size_t)(R.current - R.threads) * STACK_BYTES;
  if (p >= stack && p < stack + STACK_BYTES) return;
  range* r = find(p, n);
  unsigned thread = R.current->at.thread_index;
  if (!r) return report_out_of_bounds(p, n, write, pc);
  if (r->kind == IMAGE) return;
  if (p + n > r->high) {
    if (first_at(pc)) msl_report("OUT OF BOUNDS: %s of %zu bytes across the end of %s %d, thread %u @pc 0x%lx", write ? "write" : "read", n, name_of(r), r->index, thread, place(pc));
    R.fatal = true;
    return;
  }
  if (!write && r->index >= 0 && r->kind != THREADGROUP_MEMORY) {
    R.d->bytes_read[r->index] += n;
    if (R.d->flags & MSL_LINES) msl_lines_read(p, n, r->index, thread, pc);
  }
  if (r->kind == READ_ONLY_MEMORY) {
    if (write && first_at(pc)) msl_report("WRITE to buffer %d, which the kernel declares const, thread %u @pc 0x%lx", r->index, thread, place(pc));
    return;
  }
  int memory = r->kind == THREADGROUP_MEMORY;
  const access now = {R.group, (uint16_t)thread, R.epochs.threadgroup[memory], R.epochs.simdgroup[memory][thread / 32]};
  // Threadgroup memory of an earlier threadgroup is gone; device memory is not.
  auto conflicts = [&](const access& a) { return a.group && (memory == 0 || a.group == R.group) && !ordered(a, memory, thread); };
  for (size_t k = 0; k < n; k++) {
    size_t offset = p - r->low + k;
    shadow& c = r->cells[offset];
    if (conflicts(c.written)) report_race(r, offset, write ? "write" : "read", "write", c.written, thread, pc);
    if (write) {
      if (conflicts(c.read)) report_race(r, offset, "write", "read", c.read, thread, pc);
      else if (conflicts(c.read_before)) report_race(r, offset, "write", "read", c.read_before, thread, pc);
      c.written = now;
      continue;
    }
    if (memory == 1 && c.written.group != R.group && first_at(pc))
      msl_report("UNINITIALISED: read of threadgroup memory +%zu that nobody has written, thread %u of group %u @pc 0x%lx", offset, thread, R.group - 1, place(pc));
    if (c.read.group && c.read.thread != thread) c.read_before = c.read;
    c.read = now;
  }
}

// A kernel that waits for a word which only a later threadgroup would write never ends: give up after so many looks.
enum { MOST_LOOKS = 20 * 1000 * 1000 };
static const volatile void* watched;
static unsigned looks;

// Fences of a thread without another one's turn. A kernel may wait for its host for a while, so many more than looks are allowed.
enum { MOST_FENCES = 400 * 1000 * 1000 };
static unsigned fences;

API void msl_fence(msl_site site) {
  static const gpu_thread* thread;
  static unsigned group;
  fences = thread == R.current && group == R.group ? fences + 1 : 0;
  thread = R.current;
  group = R.group;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (fences <= MOST_FENCES) return;
  msl_report("%s:%u:%u: SPIN: thread %u of group %u has passed a fence %u times: does it wait for another threadgroup?", site.file, site.line, site.column, R.current->at.thread_index, R.group - 1, fences);
  fences = 0;
  R.fatal = true;
  msl_stop_if_fatal();
}

API void msl_atomic_access(const volatile void* p, unsigned n, msl_site site) {
  looks = p == watched ? looks + 1 : 0;
  watched = p;
  if (looks > MOST_LOOKS) {
    msl_report("%s:%u:%u: SPIN: thread %u of group %u has looked at a word %u times: does it wait for another threadgroup?", site.file, site.line, site.column, R.current->at.thread_index, R.group - 1, looks);
    looks = 0;
    R.fatal = true;
    msl_stop_if_fatal();
  }
  if (!R.checking || !R.current) return;
  const range* r = find((uintptr_t)p, n);
  if (r && (uintptr_t)p + n <= r->high && r->kind != READ_ONLY_MEMORY) return;
  msl_report("%s:%u:%u: OUT OF BOUNDS: atomic operation outside the bound buffers", site.file, site.line, site.column);
  R.fatal = true;
  msl_stop_if_fatal();
}

// ---- callbacks of -fsanitize=thread ----

#define CALLER ((uintptr_t)__builtin_return_address(0))
#define CHECK(p, n, write)                                              \
  do {                                                                  \
    if (R.checking) {                                                   \
      check_access((uintptr_t)(p), (size_t)(n), write, CALLER);         \
      msl_stop_if_fatal();                                              \
    }                                                                   \
  } while (0)

API void __tsan_init() {}
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}
#define TSAN_SIZE(n)                                                    \
  API void __tsan_read##n(void* p) { CHECK(p, n, false); }              \
  API void __tsan_write##n(void* p) { CHECK(p, n, true); }              \
  API void __tsan_unaligned_read##n(void* p) { CHECK(p, n, false); }    \
  API void __tsan_unaligned_write##n(void* p) { CHECK(p, n, true); }    \
  API void __tsan_read_write##n(void* p) { CHECK(p, n, true); }         \
  API void __tsan_unaligned_read_write##n(void* p) { CHECK(p, n, true); }
TSAN_SIZE(1) TSAN_SIZE(2) TSAN_SIZE(4) TSAN_SIZE(8) TSAN_SIZE(16)
API void __tsan_read_range(void* p, size_t n) { CHECK(p, n, false); }
API void __tsan_write_range(void* p, size_t n) { CHECK(p, n, true); }
API void* __tsan_memcpy(void* to, const void* from, size_t n) {
  CHECK(from, n, false);
  CHECK(to, n, true);
  return memcpy(to, from, n);
}
API void* __tsan_memmove(void* to, const void* from, size_t n) {
  CHECK(from, n, false);
  CHECK(to, n, true);
  return memmove(to, from, n);
}
API void* __tsan_memset(void* to, int v, size_t n) {
  CHECK(to, n, true);
  return memset(to, v, n);
}

// Atomic operations are instrumented everywhere; they stay atomic, since the host may share the word.
#define TSAN_ATOMIC(bits, T)                                                                                                       \
  API T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }                      \
  API void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }                      \
  API T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }            \
  API int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) { return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); } \
  API T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T expected, T v, int, int) {                                     \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                       \
    return expected;                                                                                                               \
  }
TSAN_ATOMIC(8, uint8_t) TSAN_ATOMIC(32, uint32_t)

// ---- callbacks of -fsanitize=… with the minimal run time ----

// The fatal ones would crash or read far away if the thread went on.
#define UBSAN(name, is_fatal)                                                                                                          \
  API void __ubsan_handle_##name##_minimal() {                                                                                         \
    if (first_at(CALLER)) msl_report("UNDEFINED: " #name ", thread %u of group %u @pc 0x%lx", R.current ? R.current->at.thread_index : 0, R.group - 1, place(CALLER)); \
    if (is_fatal) R.fatal = true;                                                                                                      \
    msl_stop_if_fatal();                                                                                                               \
  }
UBSAN(add_overflow, false) UBSAN(sub_overflow, false) UBSAN(mul_overflow, false) UBSAN(negate_overflow, false) UBSAN(shift_out_of_bounds, false)
UBSAN(float_cast_overflow, false) UBSAN(type_mismatch, false) UBSAN(alignment_assumption, false) UBSAN(divrem_overflow, true) UBSAN(out_of_bounds, true)
UBSAN(missing_return, true) UBSAN(builtin_unreachable, true)

// Round to nearest even; older support libraries have no such function.
extern "C" __attribute__((visibility("hidden"))) __bf16 __truncsfbf2(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint16_t h = (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
  __bf16 r;
  memcpy(&r, &h, 2);
  return r;
}
