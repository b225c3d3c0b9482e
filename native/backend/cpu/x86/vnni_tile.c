/* vnni_tile.c — quantized product for many activation rows (prefill), with AVX-512 VNNI. Compute bound: 32 weight rows at a
 * time are unpacked to the cache as bytes, four columns of 16 rows to a zmm, and used for every activation row, eight at a
 * time: each step of four columns is two loads of weights, eight broadcasts and sixteen vpdpbusd.
 *
 * Scratch, from its start:
 *   codes  [columns/4, 2, 16 rows, 4]   uint8
 *   scale, bias  [groups padded to 16, 2, 16 rows]   float32
 *   chain  [TOKENS, 4, 2, 16 rows]   float32, the contract's four chains of each result
 */
#if defined(__x86_64__)
#include "vnni.h"

#include <string.h>

enum { ROWS = 32, TOKENS = 8, AHEAD_BYTES = 256 };

typedef struct {
    uint8_t *codes;
    float *scale, *bias, *chain;
    const uint8_t *next; /* packed codes of the next tile, `next_step` bytes of them prefetched each group */
    size_t next_step;
} tile;

static size_t pad(size_t n, size_t to) { return (n + to - 1) / to * to; }

static tile tile_at(void *scratch, size_t cols, size_t groups) {
    tile t = {0};
    t.codes = scratch;
    t.scale = (float *)(void *)(t.codes + pad(cols, 128) * ROWS);
    t.bias = t.scale + pad(groups, 16) * ROWS;
    t.chain = t.bias + pad(groups, 16) * ROWS;
    return t;
}

size_t cv_vnni_tile_scratch(size_t cols) {
    return pad(cols, 128) * ROWS + (2 * pad(cols / 32 + 1, 16) * ROWS + (size_t)TOKENS * 4 * ROWS) * sizeof(float);
}

/* 64 codes of 6 or 8 bits as bytes, or 32 and zeros when `half`. */
CV_INLINE_VNNI __m512i load_codes(const uint8_t *p, unsigned bits, bool half) {
    if (bits == 6) return cv_vnni_codes6(_mm512_maskz_loadu_epi8(half ? 0xffffffull : 0xffffffffffffull, p));
    return half ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)p)) : _mm512_loadu_si512(p);
}

/* Codes of rows first … first+15 (clamped to `last`) into half h of the tile: 6 and 8 bits. */
CV_TARGET_VNNI static void unpack_bytes(const uint8_t *data, size_t row_bytes, size_t first, size_t last, unsigned bits, size_t cols, size_t h, uint8_t *codes) {
    for (size_t k = 0; k < cols; k += 64) {
        const bool half = cols - k < 64;
        __m512i v[16];
        for (size_t i = 0; i < 16; i++) {
            const uint8_t *p = data + (first + i < last ? first + i : last) * row_bytes + k * bits / 8;
            _mm_prefetch((const char *)p + AHEAD_BYTES, _MM_HINT_T0);
            v[i] = load_codes(p, bits, half);
        }
        cv_vnni_transpose(v);
        for (size_t i = 0; i < 16; i++) _mm512_store_si512(codes + ((k / 4 + i) * 2 + h) * 64, v[i]);
    }
}

/* The same for 4 bits: 128 columns (one cache line) of each row are transposed as they are; then every dword of eight codes
 * becomes two of four: byte b of the low (high) half goes to a word, which w | w << 4 spreads over its two bytes. */
CV_TARGET_VNNI static void unpack_nibbles(const uint8_t *data, size_t row_bytes, size_t first, size_t last, size_t cols, size_t h, uint8_t *codes) {
    const __m512i low_bytes = _mm512_broadcast_i32x4(_mm_set_epi8(-1, 13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0));
    const __m512i high_bytes = _mm512_broadcast_i32x4(_mm_set_epi8(-1, 15, -1, 14, -1, 11, -1, 10, -1, 7, -1, 6, -1, 3, -1, 2));
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    for (size_t k = 0; k < cols; k += 128) {
        const __mmask16 m = cols - k >= 128 ? 0xffff : (__mmask16)((1u << ((cols - k) / 8)) - 1);
        __m512i v[16];
        for (size_t i = 0; i < 16; i++) {
            const uint8_t *p = data + (first + i < last ? first + i : last) * row_bytes + k / 2;
            _mm_prefetch((const char *)p + AHEAD_BYTES, _MM_HINT_T0);
            v[i] = _mm512_maskz_loadu_epi32(m, p);
        }
        cv_vnni_transpose(v);
        uint8_t *to = codes + (k / 4 * 2 + h) * 64;
        for (size_t i = 0; i < 16; i++) {
            const __m512i a = _mm512_shuffle_epi8(v[i], low_bytes), b = _mm512_shuffle_epi8(v[i], high_bytes);
            _mm512_store_si512(to + i * 256, _mm512_ternarylogic_epi32(a, _mm512_slli_epi16(a, 4), nibble, 0xa8)); /* (x | y) & z */
            _mm512_store_si512(to + i * 256 + 128, _mm512_ternarylogic_epi32(b, _mm512_slli_epi16(b, 4), nibble, 0xa8));
        }
    }
}

CV_TARGET_VNNI void cv_vnni_unpack(const cv_weight *w, size_t e, size_t first, size_t last, size_t h, uint8_t *codes) {
    const uint8_t *data = w->data + e * w->expert_bytes;
    if (w->bits == 4) unpack_nibbles(data, w->row_bytes, first, last, w->cols, h, codes);
    else unpack_bytes(data, w->row_bytes, first, last, w->bits, w->cols, h, codes);
}

/* `tokens` activation rows times the tile; halves 1 or 2. Both are constants where this is inlined. q, scale and sum point at
 * the first of the rows. Leaves the four chains of every result in tile.chain. */
CV_INLINE_VNNI void multiply(const tile *w, const int8_t *q, size_t q_stride, const float *scale, const float *sum, size_t g_stride, size_t groups, size_t group, int tokens, int halves) {
    memset(w->chain, 0, (size_t)tokens * 4 * ROWS * sizeof(float));
    const uint8_t *codes = w->codes;
    for (size_t g = 0; g < groups; g++) {
        __m512i dot[TOKENS][2];
        for (size_t i = 0; i < w->next_step; i += 64) _mm_prefetch((const char *)w->next + g * w->next_step + i, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = _mm512_setzero_si512();
        for (size_t k = 0; k < group; k += 4, codes += 128) {
            const __m512i c0 = _mm512_load_si512(codes);
            const __m512i c1 = halves == 2 ? _mm512_load_si512(codes + 64) : c0;
            const int8_t *x = q + g * group + k;
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                int32_t four;
                memcpy(&four, x + (size_t)t * q_stride, 4);
                const __m512i b = _mm512_set1_epi32(four);
                dot[t][0] = cv_vnni_dot(dot[t][0], c0, b);
                if (halves == 2) dot[t][1] = cv_vnni_dot(dot[t][1], c1, b);
            }
        }
        float *chain = w->chain + (g & 3) * ROWS;
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            const __m512 sw = _mm512_load_ps(w->scale + g * ROWS + h * 16), bw = _mm512_load_ps(w->bias + g * ROWS + h * 16);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                const __m512 s = _mm512_mul_ps(sw, _mm512_set1_ps(scale[(size_t)t * g_stride + g])), b = _mm512_mul_ps(bw, _mm512_set1_ps(sum[(size_t)t * g_stride + g]));
                float *c = chain + t * 4 * ROWS + h * 16;
                _mm512_store_ps(c, _mm512_add_ps(_mm512_load_ps(c), _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(dot[t][h]), b)));
            }
        }
    }
}

typedef void (*multiply_kernel)(const tile *w, const int8_t *q, size_t q_stride, const float *scale, const float *sum, size_t g_stride, size_t groups, size_t group);

#define MULTIPLY(tokens, halves) \
    CV_TARGET_VNNI static void multiply_##tokens##_##halves(const tile *w, const int8_t *q, size_t q_stride, const float *scale, const float *sum, size_t g_stride, size_t groups, size_t group) { \
        multiply(w, q, q_stride, scale, sum, g_stride, groups, group, tokens, halves); \
    }
#define MULTIPLY_BOTH(tokens) MULTIPLY(tokens, 1) MULTIPLY(tokens, 2)
MULTIPLY_BOTH(1)
MULTIPLY_BOTH(2)
MULTIPLY_BOTH(3)
MULTIPLY_BOTH(4)
MULTIPLY_BOTH(5)
MULTIPLY_BOTH(6)
MULTIPLY_BOTH(7)
MULTIPLY_BOTH(8)

static const multiply_kernel kernels[TOKENS][2] = {
    {multiply_1_1, multiply_1_2}, {multiply_2_1, multiply_2_2}, {multiply_3_1, multiply_3_2}, {multiply_4_1, multiply_4_2},
    {multiply_5_1, multiply_5_2}, {multiply_6_1, multiply_6_2}, {multiply_7_1, multiply_7_2}, {multiply_8_1, multiply_8_2},
};

CV_TARGET_VNNI void cv_vnni_tile(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const size_t groups = w->cols / w->group;
    tile tl = tile_at(scratch, w->cols, groups);
    const uint8_t *data = w->data + e * w->expert_bytes, *scales = w->scales + e * w->expert_scale_bytes, *biases = w->biases + e * w->expert_scale_bytes;
    const size_t pieces = (a->n + TOKENS - 1) / TOKENS;
    for (size_t r = row0; r < row1; r += ROWS) {
        const size_t halves = row1 - r > 16 ? 2 : 1, last = row1 - 1;
        for (size_t h = 0; h < halves; h++) {
            cv_vnni_unpack(w, e, r + h * 16, last, h, tl.codes);
            cv_vnni_scales(scales, w->scale_row_bytes, r + h * 16, last, w->scale_type, groups, tl.scale + h * 16, ROWS);
            cv_vnni_scales(biases, w->scale_row_bytes, r + h * 16, last, w->scale_type, groups, tl.bias + h * 16, ROWS);
        }
        const size_t next_rows = r + ROWS >= row1 ? 0 : row1 - r - ROWS < ROWS ? row1 - r - ROWS : ROWS;
        tl.next_step = next_rows ? pad(next_rows * w->row_bytes / (pieces * groups) + 1, 64) : 0;
        for (size_t piece = 0, t = 0; piece < pieces; piece++) { /* pieces as even as can be: 9 rows are 5 and 4 */
            const size_t end = (piece + 1) * a->n / pieces, tokens = end - t;
            tl.next = data + (r + ROWS) * w->row_bytes + piece * groups * tl.next_step;
            kernels[tokens - 1][halves - 1](&tl, a->q + t * a->q_stride, a->q_stride, a->scale + t * a->g_stride, a->sum + t * a->g_stride, a->g_stride, groups, w->group);
            for (size_t i = 0; i < tokens; i++)
                for (size_t h = 0; h < halves; h++) {
                    const float *c = tl.chain + i * 4 * ROWS + h * 16;
                    const __m512 sum = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(c), _mm512_load_ps(c + ROWS)), _mm512_add_ps(_mm512_load_ps(c + 2 * ROWS), _mm512_load_ps(c + 3 * ROWS)));
                    const size_t left = row1 - r - h * 16;
                    _mm512_mask_storeu_ps(out + (t + i) * ldo + r + h * 16, left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1), sum);
                }
            t = end;
        }
    }
}

#endif
