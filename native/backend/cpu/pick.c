/* pick.c — which kernel set this processor runs. */
#include "kernels.h"

const cv_cpu_kernels *cv_kernels_pick(uint32_t level) {
    const cv_cpu_kernels *sets[] = {
#if defined(__x86_64__)
        cv_kernels_avx512_vnni(), cv_kernels_avx512(), cv_kernels_avx2(),
#elif defined(__aarch64__)
        cv_kernels_neon_i8mm(), cv_kernels_neon_dot(), cv_kernels_neon(),
#endif
        cv_kernels_scalar(),
    };
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++)
        if (sets[i] && (level == 0 || sets[i]->level <= level)) return sets[i];
    return cv_kernels_scalar();
}

uint32_t cv_cpu_best(void) { return cv_kernels_pick(0)->level; }

const char *cv_cpu_name(uint32_t level) {
    switch (level) {
    case CV_CPU_SCALAR: return "scalar";
    case CV_CPU_AVX2: return "avx2";
    case CV_CPU_AVX512: return "avx512";
    case CV_CPU_AVX512_VNNI: return "avx512-vnni";
    case CV_CPU_AMX: return "amx-int8";
    case CV_CPU_NEON: return "neon";
    case CV_CPU_NEON_DOT: return "neon-dotprod";
    case CV_CPU_NEON_I8MM: return "neon-i8mm";
    default: return "unknown";
    }
}
