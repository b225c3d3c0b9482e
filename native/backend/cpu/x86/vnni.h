/* vnni.h — the two regimes of the VNNI quantized product and what they share. Both give the bits of scalar.c: integer dots
 * are exact in any order, and each group's float update is the contract's, four chains wide. */
#ifndef CV_X86_VNNI_H
#define CV_X86_VNNI_H

#include <immintrin.h>

#include "../kernels.h"

#define CV_TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,f16c,fma,avx2")))
#define CV_INLINE_VNNI static inline __attribute__((always_inline)) CV_TARGET_VNNI

/* Measured crossovers on Zen 4. Up to CV_VNNI_STREAM_ROWS activation rows streaming is faster than unpacking a tile. Of 4-bit codes,
 * from CV_VNNI_BATCH_FROM on it pays to transpose them on the way, for up to CV_VNNI_BATCH_ROWS rows at a time, which the registers
 * hold, and to do so several times up to CV_VNNI_BATCH_TO. */
enum { CV_VNNI_STREAM_ROWS = 8, CV_VNNI_BATCH_FROM = 5, CV_VNNI_BATCH_ROWS = 16, CV_VNNI_BATCH_TO = 32 };

/* Few activation rows: weights are streamed once in the checkpoint's layout. Up to CV_VNNI_STREAM_ROWS of them, of 4-bit codes fewer
 * than CV_VNNI_BATCH_FROM. */
void cv_vnni_stream(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_vnni_stream_scratch(size_t cols);

/* CV_VNNI_BATCH_FROM to CV_VNNI_BATCH_TO activation rows, 4-bit codes: streamed too, and transposed on the way. */
void cv_vnni_batch(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_vnni_batch_scratch(size_t cols);

/* Many activation rows: a tile of weight rows is unpacked to the cache once and used for all of them. */
void cv_vnni_tile(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_vnni_tile_scratch(size_t cols);

/* Codes of rows first … first+15 of an expert (clamped to `last`) as bytes, into half h of codes [columns padded to 128 / 4, 2, 16 rows, 4]: what
 * the tile kernels multiply. */
void cv_vnni_unpack(const cv_weight *w, size_t expert, size_t first, size_t last, size_t h, uint8_t *codes);

/* acc + the dots of four unsigned codes and four activations a lane. Assembly because GCC 12 copies (and spills) the
 * accumulators of its intrinsic around loops; "+v" ties them to their registers. */
CV_INLINE_VNNI __m512i cv_vnni_dot(__m512i acc, __m512i codes, __m512i activations) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(activations));
    return acc;
}

/* The same with the same four activations for all lanes, from memory. */
CV_INLINE_VNNI __m512i cv_vnni_dot_four(__m512i acc, __m512i codes, const int8_t *activations) {
    typedef int8_t four[4];
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*(const four *)(const void *)activations));
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

/* 16 x 16 dwords: r[i] element j becomes r[j] element i. */
CV_INLINE_VNNI void cv_vnni_transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* r[i + c], lane l: column 4l + c of rows i … i+3 */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* Scales or biases of rows first … first+15 (clamped to `last`) as float32, group g's at to + g*ld; groups are padded with zeros to
 * a multiple of 16. */
CV_INLINE_VNNI void cv_vnni_scales(const uint8_t *base, size_t row_bytes, size_t first, size_t last, uint32_t type, size_t groups, float *to, size_t ld) {
    for (size_t g = 0; g < groups; g += 16) {
        const __mmask16 m = groups - g >= 16 ? 0xffff : (__mmask16)((1u << (groups - g)) - 1);
        __m512i v[16];
        for (size_t i = 0; i < 16; i++) {
            const uint8_t *p = base + (first + i < last ? first + i : last) * row_bytes;
            if (type == CV_F32) {
                v[i] = _mm512_maskz_loadu_epi32(m, p + 4 * g);
            } else {
                __m256i x = _mm256_maskz_loadu_epi16(m, p + 2 * g);
                v[i] = type == CV_F16 ? _mm512_castps_si512(_mm512_cvtph_ps(x)) : _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
            }
        }
        cv_vnni_transpose(v);
        for (size_t i = 0; i < 16; i++) _mm512_store_si512(to + (g + i) * ld, v[i]);
    }
}

#endif
