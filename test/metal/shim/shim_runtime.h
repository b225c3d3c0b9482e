// shim_runtime.h — what compiled kernels ask of the executor (executor.cpp defines these), and libm.

// Where an operation stands in the source: how divergence between threads is recognised and reported.
struct msl_site { const char* file; unsigned line, column; };
#define MSL_SITE msl_site site = {__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()}

// One lane's part of a simdgroup operation, and the operation: lanes[32], mask of the active ones.
struct msl_lane_op { const void* in; void* out; const void* arg; };
typedef void (*msl_simd_fn)(msl_lane_op* lanes, unsigned mask);

// A GPU thread's place in the grid.
struct msl_position {
  unsigned in_grid[3], in_threadgroup[3], threadgroup_in_grid[3], threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3], dispatch_threads_per_threadgroup[3];
  unsigned thread_index, lane, simdgroup, n_simdgroups;
};

extern "C" {
// needs_all: an operation that is undefined unless all 32 lanes take part.
void msl_simd_op(const char* what, msl_site site, bool needs_all, const void* in, void* out, const void* arg, msl_simd_fn fn);
void msl_threadgroup_barrier(unsigned flags, msl_site site);
void msl_simdgroup_barrier(unsigned flags, msl_site site);
unsigned msl_lane();
unsigned msl_active_mask();
// Checks that all lanes gave the same arguments.
void msl_same_in_all_lanes(const char* what, msl_site site, const void* p, size_t a, size_t b);
void msl_atomic_access(const volatile void* p, unsigned size, msl_site site);
void msl_fence(msl_site site);
void msl_register_constant(int index, const char* name, void* p, unsigned size);
bool msl_constant_defined(const void* p);
void msl_register_kernel(const char* name, const char* arguments, void (*fn)(const msl_position*), unsigned written_mask);
void* msl_buffer(int index);
void* msl_threadgroup_buffer(int index);
float expf(float); float exp2f(float); float logf(float); float log2f(float); float sinf(float); float cosf(float); float tanhf(float); float powf(float, float); float fmodf(float, float); float erff(float);
}
