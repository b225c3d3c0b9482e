/* pick.c — which kernel set this processor runs. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#if defined(__x86_64__)
#include "x86/amx.h"
#endif

/* The set that CARAVAN_CPU names: no set above it is used, nor tried. 0: no limit. An unknown name is none; binding.ts refuses it. */
static uint32_t limit(void) {
    const char *name = getenv("CARAVAN_CPU");
    if (!name || !*name) return 0;
    for (uint32_t level = CV_CPU_SCALAR; level <= CV_CPU_NEON_I8MM; level++)
        if (!strcmp(cv_cpu_name(level), name)) return level;
    return 0;
}

const cv_cpu_kernels *cv_kernels_pick(uint32_t level) {
    static const struct {
        uint32_t level;
        const cv_cpu_kernels *(*get)(void);
    } sets[] = {
#if defined(__x86_64__)
        {CV_CPU_AMX, cv_kernels_amx}, {CV_CPU_AVX512_VNNI, cv_kernels_avx512_vnni}, {CV_CPU_AVX512, cv_kernels_avx512}, {CV_CPU_AVX2, cv_kernels_avx2},
#elif defined(__aarch64__)
        {CV_CPU_NEON_I8MM, cv_kernels_neon_i8mm}, {CV_CPU_NEON_DOT, cv_kernels_neon_dot}, {CV_CPU_NEON, cv_kernels_neon},
#endif
        {CV_CPU_SCALAR, cv_kernels_scalar},
    };
    const uint32_t most = limit();
    if (most != 0 && (level == 0 || level > most)) level = most;
    for (size_t i = 0; i < sizeof sets / sizeof sets[0]; i++) {
        if (level != 0 && sets[i].level > level) continue; /* nor asked: AMX's asks for the system's permission */
        const cv_cpu_kernels *set = sets[i].get();
        if (set) return set;
    }
    return cv_kernels_scalar();
}

uint32_t cv_cpu_best(void) { return cv_kernels_pick(0)->level; }

const char *cv_cpu_note(void) {
    if (limit()) return "CARAVAN_CPU allows no faster set";
#if defined(__x86_64__)
    switch (cv_amx_find()) {
    case CV_AMX_REFUSED: return "AMX is not used: the system gives no permission for it";
    case CV_AMX_WRONG: return "AMX is not used: its products are not those of AVX-512";
    case CV_AMX_ABSENT:
    case CV_AMX_READY: break;
    }
#endif
    return "";
}

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
