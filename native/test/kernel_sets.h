/* kernel_sets.h — the kernel sets that this build and this processor have beyond scalar, for test_kernels.c and bench_kernels.c. */
#ifndef CV_TEST_KERNEL_SETS_H
#define CV_TEST_KERNEL_SETS_H

#include "../backend/cpu/kernels.h"

enum { CV_TEST_MAX_SETS = 4 };

/* Fills sets with those that can run here, lowest first; returns how many. */
static inline size_t cv_test_sets(const cv_cpu_kernels *sets[CV_TEST_MAX_SETS]) {
    size_t n = 0;
#if defined(__x86_64__)
    const cv_cpu_kernels *all[] = {cv_kernels_avx2(), cv_kernels_avx512(), cv_kernels_avx512_vnni(), cv_kernels_amx()};
#elif defined(__aarch64__)
    const cv_cpu_kernels *all[] = {cv_kernels_neon(), cv_kernels_neon_dot(), cv_kernels_neon_i8mm()};
#else
    const cv_cpu_kernels *all[] = {NULL};
#endif
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i]) sets[n++] = all[i];
    return n;
}

#endif
