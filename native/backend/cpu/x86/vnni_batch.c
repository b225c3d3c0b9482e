/* vnni_batch.c — quantized product for several activation rows (decoding streams together), 4-bit codes, with AVX-512 VNNI.
 * Weights are streamed once, as in vnni_stream.c, but 16 rows at a time and transposed on the way: a zmm then holds eight
 * columns of 16 rows (low nibbles: the even ones), every vpdpbusd adds four columns of all 16 rows, and no sum across a
 * register is left to make. The transposition is shared by all activation rows; vnni_tile.c, for many more of them, keeps it
 * in memory instead.
 *
 * Scratch, from its start:
 *   q      [columns/128, 16 dwords, 2 nibbles, activation rows, 4]   int8, columns past the end zero
 *   scale, bias  [groups padded to 16, 16 rows]   float32
 *   chain  [4, activation rows, 16 rows]   float32, the contract's four chains of each result */
#if defined(__x86_64__)
#include "vnni.h"

#include <string.h>

enum { ROWS = 16, TOKENS = CV_VNNI_STREAM_ROWS, LINE = 64, LINE_COLUMNS = 128 };

typedef struct {
    int8_t *q;
    float *scale, *bias, *chain;
} batch_scratch;

static size_t lines_of(size_t cols) { return (cols + LINE_COLUMNS - 1) / LINE_COLUMNS; }

static batch_scratch scratch_at(void *scratch, size_t cols, size_t groups) {
    batch_scratch s = {.q = scratch};
    s.scale = (float *)(void *)(s.q + lines_of(cols) * LINE_COLUMNS * TOKENS);
    s.bias = s.scale + cv_pad16(groups) * ROWS;
    s.chain = s.bias + cv_pad16(groups) * ROWS;
    return s;
}

size_t cv_vnni_batch_scratch(size_t cols) {
    return lines_of(cols) * LINE_COLUMNS * TOKENS + (2 * cv_pad16(cols / 32 + 1) * ROWS + (size_t)4 * TOKENS * ROWS) * sizeof(float);
}

/* 16 weight rows, some of which may be the last one again. */
typedef struct {
    const uint8_t *row[ROWS];
    size_t ahead; /* bytes from a row to the one that takes its place in the next 16; 0 = there is none */
} batch_rows;

/* Products of 16 weight rows and `tokens` activation rows, left in the four chains. group and tokens are constants where this is
 * inlined; a and sum: the first activation row's, g_stride floats from one to the next. */
CV_INLINE_VNNI void multiply(const batch_rows *w, const batch_scratch *s, const float *scale, const float *sum, size_t g_stride, size_t cols, int group, int tokens) {
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    const int dwords = group / 8, line_groups = LINE_COLUMNS / group;
    const size_t groups = cols / (size_t)group;
    memset(s->chain, 0, (size_t)tokens * 4 * ROWS * sizeof(float));
    const int8_t *q = s->q;
    for (size_t line = 0, g = 0; line * LINE_COLUMNS < cols; line++) {
        const size_t left = cols - line * LINE_COLUMNS;
        const __mmask16 m = left >= LINE_COLUMNS ? 0xffff : (__mmask16)((1u << left / 8) - 1);
        __m512i v[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *p = w->row[r] + line * LINE;
            _mm_prefetch((const char *)p + w->ahead, _MM_HINT_T1);
            v[r] = _mm512_maskz_loadu_epi32(m, p);
        }
        cv_vnni_transpose(v);
#pragma GCC unroll 4
        for (int part = 0; part < line_groups; part++, g++) {
            if (g == groups) break;
            __m512i dot[TOKENS];
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 16
            for (int d = 0; d < dwords; d++) {
                const __m512i codes = v[part * dwords + d], low = _mm512_and_si512(codes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) dot[t] = cv_vnni_dot_four(dot[t], low, q + 4 * t);
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) dot[t] = cv_vnni_dot_four(dot[t], high, q + 4 * (tokens + t));
                q += 8 * tokens;
            }
            const __m512 sw = _mm512_load_ps(s->scale + g * ROWS), bw = _mm512_load_ps(s->bias + g * ROWS);
            float *chain = s->chain + (g & 3) * (size_t)tokens * ROWS;
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                const __m512 a = _mm512_mul_ps(sw, _mm512_set1_ps(scale[(size_t)t * g_stride + g])), b = _mm512_mul_ps(bw, _mm512_set1_ps(sum[(size_t)t * g_stride + g]));
                _mm512_store_ps(chain + t * ROWS, _mm512_add_ps(_mm512_load_ps(chain + t * ROWS), _mm512_fmadd_ps(a, _mm512_cvtepi32_ps(dot[t]), b)));
            }
        }
    }
}

typedef void (*batch_kernel)(const batch_rows *w, const batch_scratch *s, const float *scale, const float *sum, size_t g_stride, size_t cols);

#define BATCH(group, tokens) \
    CV_TARGET_VNNI static void batch_##group##_##tokens(const batch_rows *w, const batch_scratch *s, const float *scale, const float *sum, size_t g_stride, size_t cols) { \
        multiply(w, s, scale, sum, g_stride, cols, group, tokens); \
    }
#define BATCH_TOKENS(group) BATCH(group, 5) BATCH(group, 6) BATCH(group, 7) BATCH(group, 8)
BATCH_TOKENS(32)
BATCH_TOKENS(64)
BATCH_TOKENS(128)

#define KERNELS(group) {batch_##group##_5, batch_##group##_6, batch_##group##_7, batch_##group##_8}
static const batch_kernel kernels[3][TOKENS - CV_VNNI_BATCH_FROM + 1] = {KERNELS(32), KERNELS(64), KERNELS(128)};

/* All activation rows into the order of the steps. */
CV_TARGET_VNNI static void pack(const cv_qact *a, int8_t *q) {
    const size_t n = a->n;
    for (size_t t = 0; t < n; t++) {
        const int8_t *from = a->q + t * a->q_stride;
        for (size_t line = 0; line * LINE_COLUMNS < a->cols; line++)
            for (size_t half = 0; half < 2; half++) { /* 64 columns: eight dwords of even ones and eight of odd ones */
                const size_t first = line * LINE_COLUMNS + half * 64, left = first < a->cols ? a->cols - first : 0;
                const __m512i x = _mm512_maskz_loadu_epi8(left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1, from + (left ? first : 0));
                int32_t even[8], odd[8];
                _mm256_storeu_si256((__m256i *)(void *)even, _mm512_cvtepi16_epi8(x));
                _mm256_storeu_si256((__m256i *)(void *)odd, _mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 8)));
                int8_t *to = q + (line * 16 + half * 8) * 8 * n + 4 * t;
                for (size_t d = 0; d < 8; d++) {
                    memcpy(to + d * 8 * n, &even[d], 4);
                    memcpy(to + d * 8 * n + 4 * n, &odd[d], 4);
                }
            }
    }
}

CV_TARGET_VNNI void cv_vnni_batch(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const size_t groups = w->cols / w->group, n = a->n, next = n * ROWS;
    const batch_scratch s = scratch_at(scratch, w->cols, groups);
    const batch_kernel kernel = kernels[w->group == 32 ? 0 : w->group == 64 ? 1 : 2][n - CV_VNNI_BATCH_FROM];
    const uint8_t *data = w->data + e * w->expert_bytes, *scales = w->scales + e * w->expert_scale_bytes, *biases = w->biases + e * w->expert_scale_bytes;
    pack(a, s.q);
    for (size_t r = row0; r < row1; r += ROWS) {
        batch_rows rows = {.ahead = r + 2 * ROWS <= row1 ? ROWS * w->row_bytes : 0};
        for (size_t i = 0; i < ROWS; i++) rows.row[i] = data + (r + i < row1 ? r + i : row1 - 1) * w->row_bytes;
        cv_vnni_scales(scales, w->scale_row_bytes, r, row1 - 1, w->scale_type, groups, s.scale, ROWS);
        cv_vnni_scales(biases, w->scale_row_bytes, r, row1 - 1, w->scale_type, groups, s.bias, ROWS);
        kernel(&rows, &s, a->scale, a->sum, a->g_stride, w->cols);
        const size_t left = row1 - r;
        for (size_t t = 0; t < n; t++) {
            const float *c = s.chain + t * ROWS;
            const __m512 sum = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(c), _mm512_load_ps(c + next)), _mm512_add_ps(_mm512_load_ps(c + 2 * next), _mm512_load_ps(c + 3 * next)));
            _mm512_mask_storeu_ps(out + t * ldo + r, left >= ROWS ? 0xffff : (__mmask16)((1u << left) - 1), sum);
        }
    }
}

#endif
