/* cpu_features.h — what this processor and its operating system can run, asked of cpuid and xgetbv directly so that no
 * compiler's run-time library is needed. */
#ifndef CV_X86_CPU_FEATURES_H
#define CV_X86_CPU_FEATURES_H

#include <cpuid.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    bool avx2;        /* AVX2, FMA, F16C; the system saves ymm registers */
    bool avx512;      /* AVX-512 F, BW, DQ, VL; the system saves zmm and mask registers */
    bool avx512_vnni; /* and VNNI and VBMI (Ice Lake, Zen 4 and later) */
    bool amx_int8;    /* and AMX's tiles of palette 1 and their int8 products; the system saves tiles (Sapphire Rapids and later). Linux wants to be
                         asked for permission besides (amx.c) */
} cv_x86_features;

/* Palette 1 as the kernel uses it: 8 tiles of 16 rows of 64 bytes, products of 16 x 64 by 64 x 16. */
static inline bool cv_x86_has_tiles(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return false;
    __get_cpuid_count(0x1d, 1, &a, &b, &c, &d);
    if ((a & 0xffff) < 8192 || a >> 16 != 1024 || (b & 0xffff) != 64 || b >> 16 < 8 || (c & 0xffff) != 16) return false;
    if (!__get_cpuid_count(0x1e, 0, &a, &b, &c, &d)) return false;
    return (b & 0xff) == 16 && (b >> 8 & 0xffff) == 64;
}

static inline cv_x86_features cv_x86_detect(void) {
    cv_x86_features f = {false, false, false, false};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const unsigned need = fma | osxsave | avx | f16c;
    if ((c & need) != need) return f;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x06) != 0x06) return f; /* xmm and ymm state */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
    f.avx2 = (b >> 5) & 1;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    f.avx512 = f.avx2 && (b & avx512) == avx512 && (low & 0xe0) == 0xe0;
    const unsigned vbmi = 1u << 1, vnni = 1u << 11;
    f.avx512_vnni = f.avx512 && (c & (vbmi | vnni)) == (vbmi | vnni);
    const unsigned tile = 1u << 24, int8 = 1u << 25, tile_state = 1u << 17 | 1u << 18;
    f.amx_int8 = f.avx512_vnni && (d & (tile | int8)) == (tile | int8) && (low & tile_state) == tile_state && cv_x86_has_tiles();
    return f;
}

#endif
