/* vnni.h — the two regimes of the VNNI quantized product and what they share. Both give the bits of scalar.c: integer dots
 * are exact in any order, and each group's float update is the contract's, four chains wide. */
#ifndef CV_X86_VNNI_H
#define CV_X86_VNNI_H

#include <immintrin.h>

#include "../kernels.h"

#define CV_TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,f16c,fma,avx2")))
#define CV_INLINE_VNNI static inline __attribute__((always_inline)) CV_TARGET_VNNI

/* Few activation rows: weights are streamed once in the checkpoint's layout. Any a->n; meant for up to CV_VNNI_STREAM_ROWS. */
void cv_vnni_stream(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_vnni_stream_scratch(size_t cols);

/* Many activation rows: a tile of weight rows is unpacked to the cache once and used for all of them. */
void cv_vnni_tile(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_vnni_tile_scratch(size_t cols);

/* Measured crossover of the two on Zen 4: up to this many activation rows streaming is faster. */
enum { CV_VNNI_STREAM_ROWS = 8 };

/* acc + the dots of four unsigned codes and four activations a lane. Assembly because GCC 12 copies (and spills) the
 * accumulators of its intrinsic around loops; "+v" ties them to their registers. */
CV_INLINE_VNNI __m512i cv_vnni_dot(__m512i acc, __m512i codes, __m512i activations) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(activations));
    return acc;
}

/* 64 six-bit codes from 48 bytes (in the low bytes of `packed`): six bytes to each quadword, then eight fields of it. */
CV_INLINE_VNNI __m512i cv_vnni_codes6(__m512i packed) {
    const __m512i spread = _mm512_set_epi8(
        0, 0, 47, 46, 45, 44, 43, 42, 0, 0, 41, 40, 39, 38, 37, 36, 0, 0, 35, 34, 33, 32, 31, 30, 0, 0, 29, 28, 27, 26, 25, 24,
        0, 0, 23, 22, 21, 20, 19, 18, 0, 0, 17, 16, 15, 14, 13, 12, 0, 0, 11, 10, 9, 8, 7, 6, 0, 0, 5, 4, 3, 2, 1, 0);
    const __m512i fields = _mm512_set1_epi64(0x2a241e18120c0600ll);
    __m512i v = _mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(spread, packed));
    return _mm512_and_si512(v, _mm512_set1_epi8(0x3f));
}

#endif
