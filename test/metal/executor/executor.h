// executor.h — C interface of a compiled kernel library (.so): its kernels, its function constants, and dispatches.
// One dispatch at a time per library: the caller locks.
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum { MSL_BUFFERS = 31 };
typedef struct { void* p; size_t length; } msl_bound_buffer;

// Flags: report races, bounds and the like (the library must be built with checks); run threads in a random order, and with an
// odd seed threadgroups from the last to the first; with MSL_CHECK,
// count lines of memory (slow).
enum { MSL_CHECK = 1, MSL_SHUFFLE = 2, MSL_LINES = 4 };

typedef struct {
  uint32_t groups[3], threads[3];
  uint32_t grid[3]; // exact number of threads (dispatchThreads); 0: groups * threads
  msl_bound_buffer buffers[MSL_BUFFERS];
  size_t threadgroup_lengths[MSL_BUFFERS];
  uint32_t flags, seed;
  uint64_t bytes_read[MSL_BUFFERS]; // out, checked libraries only: by all threads together, repeats counted
  uint64_t lines_touched[MSL_BUFFERS], lines_least[MSL_BUFFERS], distinct[MSL_BUFFERS]; // out, with MSL_LINES: see lines.cpp
} msl_dispatch;

// 0, else what went wrong is in `report`, a line each.
int msl_run(const char* kernel, msl_dispatch* d, char* report, size_t report_size);
// Name of kernel i (NULL past the end); arguments: "b0 w1 t0": buffers read, buffers written, threadgroup lengths.
const char* msl_kernel_name(int i, const char** arguments);
// Number of constants set: 0 = no such constant; -1 = wrong size.
int msl_set_constant(int index, const void* value, size_t size);
void msl_clear_constants(void);

#ifdef __cplusplus
}
#endif
