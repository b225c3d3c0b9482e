// state.h — what the scheduler (executor.cpp) and the memory checks (checks.cpp) share about the dispatch that is running.
#pragma once
#include "executor.h"

struct msl_site { const char* file; unsigned line, column; };
struct msl_lane_op { const void* in; void* out; const void* arg; };
typedef void (*msl_simd_fn)(msl_lane_op*, unsigned);
// As in shim/shim_runtime.h.
struct msl_position {
  unsigned in_grid[3], in_threadgroup[3], threadgroup_in_grid[3], threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3], dispatch_threads_per_threadgroup[3];
  unsigned thread_index, lane, simdgroup, n_simdgroups;
};

enum { STACK_BYTES = 64 << 10, MAX_THREADS = 1024, MAX_SIMDGROUPS = 32 };
enum thread_state { RUNNING, IN_SIMD_OP, AT_THREADGROUP_BARRIER, AT_SIMDGROUP_BARRIER, RETURNED };

struct gpu_thread {
  void* stack_pointer;
  thread_state state;
  unsigned sequence;   // operations so far
  const char* what;    // the operation that it waits in
  msl_site site;
  msl_lane_op op;
  msl_simd_fn fn;
  bool needs_all;
  unsigned flags;      // of a barrier
  msl_position at;
};

// Barriers that have been passed: memory accesses are ordered by comparing these. [0] device memory, [1] threadgroup memory.
struct barrier_epochs {
  unsigned threadgroup[2];
  unsigned simdgroup[2][MAX_SIMDGROUPS];
};

struct running_dispatch {
  msl_dispatch* d;
  gpu_thread* current; // nullptr while the executor itself runs
  char* stacks;
  gpu_thread* threads;
  uint32_t group;      // number of the running threadgroup, from 1
  barrier_epochs epochs;
  bool checking;
  bool fatal;          // nothing more can be computed
  unsigned written_mask;
};
extern running_dispatch msl_running __attribute__((visibility("hidden")));

// Adds a line to the report.
void msl_report(const char* format, ...) __attribute__((format(printf, 1, 2), visibility("hidden")));
// Leaves the running GPU thread for ever if the dispatch has failed.
void msl_stop_if_fatal() __attribute__((visibility("hidden")));

enum memory_kind { DEVICE_MEMORY, THREADGROUP_MEMORY, IMAGE, READ_ONLY_MEMORY };
// Memory that kernels of the next dispatch may touch. index: of the buffer (reports).
void msl_checks_begin() __attribute__((visibility("hidden")));
void msl_checks_add(const void* p, size_t n, memory_kind kind, int index, bool written) __attribute__((visibility("hidden")));
void msl_checks_end() __attribute__((visibility("hidden")));

// With MSL_LINES: around a dispatch, and at each read of a bound buffer.
void msl_lines_begin() __attribute__((visibility("hidden")));
void msl_lines_end() __attribute__((visibility("hidden")));
void msl_lines_read(uintptr_t p, size_t n, int buffer, unsigned thread, uintptr_t pc) __attribute__((visibility("hidden")));
