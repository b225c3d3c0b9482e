/* avx2_qmatmul.c — quantized product with AVX2, for any number of activation rows; also what the AVX-512 set without VNNI
 * uses. Products are vpmaddubsw (pairs of byte products in 16 bits), which saturates: 4- and 6-bit codes are too small for
 * that (2 * 63 * 127 < 32768), 8-bit codes are split into nibbles and the high half is weighted by 16 in vpmaddwd.
 *
 * Four weight rows at a time; per group an xmm holds the four rows' integer dots, and four xmm are the contract's chains.
 * Activations are copied once a batch into the order in which codes unpack: 4 bits: of each 64 columns (32 where groups are
 * 32) the even ones, then the odd ones; 6 and 8 bits: columns in order. */
#if defined(__x86_64__)
#include "avx2_qmatmul.h"

#include <immintrin.h>
#include <string.h>

#include "../number_formats.h"

#define CV_TARGET __attribute__((target("avx2,fma,f16c")))
#define CV_INLINE static inline __attribute__((always_inline)) CV_TARGET

enum { ROWS = 4, TOKENS = 2, BATCH = 16, AHEAD_BYTES = 12 * 1024 };

typedef struct {
    const uint8_t *code[ROWS], *scale[ROWS], *bias[ROWS];
    uint32_t scale_type;
    size_t groups, ahead; /* ahead: bytes to the codes that are prefetched */
} four_rows;

typedef struct {
    const int8_t *q; /* [cols] in unpacked order */
    const float *scale, *sum;
} act_row;

/* 64 codes from p as two vectors (32 and nothing where the group is 32). */
CV_INLINE void load_codes(const uint8_t *p, int bits, int columns, __m256i c[2]) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    if (bits == 4 && columns == 32) {
        const __m128i v = _mm_loadu_si128((const __m128i *)(const void *)p);
        c[0] = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1), low);
    } else if (bits == 4) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)p);
        c[0] = _mm256_and_si256(v, low);
        c[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    } else if (bits == 8) {
        for (int i = 0; i < columns / 32; i++) c[i] = _mm256_loadu_si256((const __m256i *)(const void *)(p + 32 * i));
    } else {
        /* 12 bytes of 16 codes to each half: three bytes to a dword, whose fields 0, 6, 12, 18 go to its bytes */
        const __m256i spread = _mm256_set_epi8(-1, 15, 14, 13, -1, 12, 11, 10, -1, 9, 8, 7, -1, 6, 5, 4, -1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0);
        for (int i = 0; i < columns / 32; i++) {
            const uint8_t *at = p + 24 * i;
            const __m128i a = _mm_loadu_si128((const __m128i *)(const void *)at), b = _mm_loadu_si128((const __m128i *)(const void *)(at + 8));
            const __m256i d = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), spread);
            const __m256i c01 = _mm256_or_si256(_mm256_and_si256(d, _mm256_set1_epi32(0x3f)), _mm256_and_si256(_mm256_slli_epi32(d, 2), _mm256_set1_epi32(0x3f00)));
            const __m256i c23 = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi32(d, 4), _mm256_set1_epi32(0x3f0000)), _mm256_and_si256(_mm256_slli_epi32(d, 6), _mm256_set1_epi32(0x3f000000)));
            c[i] = _mm256_or_si256(c01, c23);
        }
    }
}

/* Eight partial sums of the products of 64 (or 32) codes and activations. */
CV_INLINE __m256i dot(const __m256i c[2], const int8_t *q, int bits, int columns) {
    const __m256i one = _mm256_set1_epi16(1), low = _mm256_set1_epi8(0x0f);
    const __m256i q0 = _mm256_loadu_si256((const __m256i *)(const void *)q), q1 = columns == 64 ? _mm256_loadu_si256((const __m256i *)(const void *)(q + 32)) : q0;
    if (bits == 8) {
        __m256i s = _mm256_maddubs_epi16(_mm256_and_si256(c[0], low), q0), t = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c[0], 4), low), q0);
        if (columns == 64) {
            s = _mm256_add_epi16(s, _mm256_maddubs_epi16(_mm256_and_si256(c[1], low), q1));
            t = _mm256_add_epi16(t, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c[1], 4), low), q1));
        }
        return _mm256_add_epi32(_mm256_madd_epi16(s, one), _mm256_madd_epi16(t, _mm256_set1_epi16(16)));
    }
    __m256i s = _mm256_maddubs_epi16(c[0], q0);
    if (columns == 64) s = _mm256_add_epi16(s, _mm256_maddubs_epi16(c[1], q1)); /* 4 * 63 * 127 < 32768 */
    return _mm256_madd_epi16(s, one);
}

/* The sums of a, b, c and d. */
CV_INLINE __m128i sums(const __m256i v[ROWS]) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    const __m256i abcd = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

/* Scales or biases of `n` <= 4 groups from g on: s[i] holds group g+i of the four rows. */
CV_INLINE void load_scales(const uint8_t *const row[ROWS], size_t g, uint32_t type, size_t n, __m128 s[4]) {
    if (n < 4) {
        for (size_t i = 0; i < n; i++)
            s[i] = _mm_set_ps(cv_scale_to_f32(row[3], g + i, type), cv_scale_to_f32(row[2], g + i, type), cv_scale_to_f32(row[1], g + i, type), cv_scale_to_f32(row[0], g + i, type));
        return;
    }
    if (type == CV_F32) {
        for (int r = 0; r < ROWS; r++) s[r] = _mm_loadu_ps((const float *)(const void *)(row[r] + 4 * g));
        _MM_TRANSPOSE4_PS(s[0], s[1], s[2], s[3]);
        return;
    }
    __m128i h[ROWS];
    for (int r = 0; r < ROWS; r++) h[r] = _mm_loadl_epi64((const __m128i *)(const void *)(row[r] + 2 * g));
    const __m128i ab = _mm_unpacklo_epi16(h[0], h[1]), cd = _mm_unpacklo_epi16(h[2], h[3]), g01 = _mm_unpacklo_epi32(ab, cd), g23 = _mm_unpackhi_epi32(ab, cd);
    __m256 s01, s23;
    if (type == CV_F16) {
        s01 = _mm256_cvtph_ps(g01);
        s23 = _mm256_cvtph_ps(g23);
    } else {
        s01 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(g01), 16));
        s23 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(g23), 16));
    }
    s[0] = _mm256_castps256_ps128(s01);
    s[1] = _mm256_extractf128_ps(s01, 1);
    s[2] = _mm256_castps256_ps128(s23);
    s[3] = _mm256_extractf128_ps(s23, 1);
}

/* Up to four groups from g on, for `tokens` activation rows. */
CV_INLINE void quad(const four_rows *w, size_t g, size_t n, int bits, int group, int tokens, const act_row *a, __m128 chain[TOKENS][4]) {
    const int columns = group == 32 ? 32 : 64, bytes = columns * bits / 8;
    __m128 sw[4], bw[4];
    load_scales(w->scale, g, w->scale_type, n, sw);
    load_scales(w->bias, g, w->scale_type, n, bw);
#pragma GCC unroll 4
    for (size_t i = 0; i < n; i++) {
        __m256i part[TOKENS][ROWS];
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < ROWS; r++) part[t][r] = _mm256_setzero_si256();
        for (int b = 0; b < group / columns; b++) {
            const size_t at = ((g + i) * (size_t)(group / columns) + (size_t)b) * (size_t)bytes;
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                __m256i c[2];
                load_codes(w->code[r] + at, bits, columns, c);
                _mm_prefetch((const char *)w->code[r] + at + w->ahead, _MM_HINT_T1);
#pragma GCC unroll 2
                for (int t = 0; t < tokens; t++) {
                    part[t][r] = _mm256_add_epi32(part[t][r], dot(c, a[t].q + (g + i) * (size_t)group + (size_t)(b * columns), bits, columns));
                }
            }
        }
        for (int t = 0; t < tokens; t++) {
            const __m128 s = _mm_mul_ps(sw[i], _mm_set1_ps(a[t].scale[g + i])), b = _mm_mul_ps(bw[i], _mm_set1_ps(a[t].sum[g + i]));
            chain[t][i] = _mm_add_ps(chain[t][i], _mm_fmadd_ps(s, _mm_cvtepi32_ps(sums(part[t])), b));
        }
    }
}

CV_INLINE void multiply(const four_rows *w, int bits, int group, int tokens, const act_row *a, __m128 *result) {
    __m128 chain[TOKENS][4];
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) chain[t][i] = _mm_setzero_ps();
    size_t g = 0;
    for (; g + 4 <= w->groups; g += 4) quad(w, g, 4, bits, group, tokens, a, chain);
    if (g < w->groups) quad(w, g, w->groups - g, bits, group, tokens, a, chain);
    for (int t = 0; t < tokens; t++) result[t] = _mm_add_ps(_mm_add_ps(chain[t][0], chain[t][1]), _mm_add_ps(chain[t][2], chain[t][3]));
}

typedef void (*multiply_kernel)(const four_rows *w, const act_row *a, __m128 *result);

#define MULTIPLY(bits, group, tokens) \
    CV_TARGET static void multiply_##bits##_##group##_##tokens(const four_rows *w, const act_row *a, __m128 *result) { multiply(w, bits, group, tokens, a, result); }
#define MULTIPLY_TOKENS(bits, group) MULTIPLY(bits, group, 1) MULTIPLY(bits, group, 2)
#define MULTIPLY_GROUPS(bits) MULTIPLY_TOKENS(bits, 32) MULTIPLY_TOKENS(bits, 64) MULTIPLY_TOKENS(bits, 128)
MULTIPLY_GROUPS(4)
MULTIPLY_GROUPS(6)
MULTIPLY_GROUPS(8)
#define KERNELS_TOKENS(bits, group) { multiply_##bits##_##group##_1, multiply_##bits##_##group##_2 }
#define KERNELS(bits) { KERNELS_TOKENS(bits, 32), KERNELS_TOKENS(bits, 64), KERNELS_TOKENS(bits, 128) }
static const multiply_kernel kernels[3][3][TOKENS] = {KERNELS(4), KERNELS(6), KERNELS(8)};

/* One activation row in unpacked order. */
CV_TARGET static void pack_row(const int8_t *from, size_t cols, size_t group, unsigned bits, int8_t *to) {
    if (bits != 4) {
        memcpy(to, from, cols);
        return;
    }
    const size_t columns = group == 32 ? 32 : 64;
    const __m128i halves = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0); /* even ones, odd ones */
    for (size_t k = 0; k < cols; k += columns)
        for (size_t i = 0; i < columns; i += 16) {
            const __m128i v = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(from + k + i)), halves);
            _mm_storel_epi64((__m128i *)(void *)(to + k + i / 2), v);
            _mm_storel_epi64((__m128i *)(void *)(to + k + columns / 2 + i / 2), _mm_unpackhi_epi64(v, v));
        }
}

CV_TARGET void cv_qmatmul_avx2(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const multiply_kernel *kernel = kernels[w->bits == 4 ? 0 : w->bits == 6 ? 1 : 2][w->group == 32 ? 0 : w->group == 64 ? 1 : 2];
    const uint8_t *codes = w->data + e * w->expert_bytes, *scales = w->scales + e * w->expert_scale_bytes, *biases = w->biases + e * w->expert_scale_bytes;
    const size_t stride = (w->cols + 63) & ~(size_t)63, blocks_ahead = AHEAD_BYTES / (ROWS * w->row_bytes) + 1;
    for (size_t t0 = 0; t0 < a->n; t0 += BATCH) {
        const size_t n = a->n - t0 < BATCH ? a->n - t0 : BATCH;
        act_row act[BATCH];
        for (size_t t = 0; t < n; t++) {
            int8_t *q = (int8_t *)scratch + t * stride;
            pack_row(a->q + (t0 + t) * a->q_stride, w->cols, w->group, w->bits, q);
            act[t] = (act_row){q, a->scale + (t0 + t) * a->g_stride, a->sum + (t0 + t) * a->g_stride};
        }
        for (size_t r = row0; r < row1; r += ROWS) {
            const size_t rows = row1 - r < ROWS ? row1 - r : ROWS;
            four_rows four = {.scale_type = w->scale_type, .groups = w->cols / w->group, .ahead = r + (blocks_ahead + 1) * ROWS <= row1 ? blocks_ahead * ROWS * w->row_bytes : 0};
            for (size_t i = 0; i < ROWS; i++) {
                const size_t row = r + (i < rows ? i : rows - 1);
                four.code[i] = codes + row * w->row_bytes;
                four.scale[i] = scales + row * w->scale_row_bytes;
                four.bias[i] = biases + row * w->scale_row_bytes;
            }
            for (size_t t = 0; t < n; t += TOKENS) {
                const size_t tokens = n - t < TOKENS ? n - t : TOKENS;
                __m128 result[TOKENS];
                kernel[tokens - 1](&four, act + t, result);
                for (size_t i = 0; i < tokens; i++) {
                    float values[ROWS];
                    _mm_storeu_ps(values, result[i]);
                    memcpy(out + (t0 + t + i) * ldo + r, values, rows * sizeof(float));
                }
                four.ahead = 0;
            }
        }
    }
}

size_t cv_qmatmul_avx2_scratch(size_t cols) { return BATCH * ((cols + 63) & ~(size_t)63); }

#endif
