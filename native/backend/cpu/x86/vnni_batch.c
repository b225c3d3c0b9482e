/* vnni_batch.c — quantized product for several activation rows (decoding streams together), 4-bit codes, with AVX-512 VNNI.
 * Weights are streamed once, as in vnni_stream.c, but 16 rows at a time and transposed on the way: a zmm then holds eight
 * columns of 16 rows (low nibbles: the even ones), every vpdpbusd adds four columns of all 16 rows, and no sum across a
 * register is left to make.
 *
 * A line is 128 columns of the 16 rows: 64 bytes of each. While the dots of one line are computed, the next line is transposed
 * in eight pieces between them, because dots and shuffles use different ports of the processor and its window is too short to
 * find the next line's shuffles behind this line's dots. Both go through small buffers that stay in the first cache.
 *
 * Scratch, from its start:
 *   q      [lines, 16 dwords, 2 nibbles, activation rows, 4]   int8, columns past the end zero
 *   scale, bias  [8 groups, 16 rows]   float32, of the groups that come next
 *   chain  [4, activation rows, 16 rows]   float32, the contract's four chains of each result
 *   half   [16, 16]   dwords: a line of which four rows each are transposed
 *   line   [2, 16 dwords, 16 rows]   the line that is computed and the one that comes next */
#if defined(__x86_64__)
#include "vnni.h"

#include <string.h>

enum { ROWS = 16, TOKENS = CV_VNNI_BATCH_ROWS, LINE = 64, LINE_COLUMNS = 128, SCALES = 8, AHEAD_BYTES = 12 * 1024 };

typedef struct {
    int8_t *q;
    float *scale, *bias, *chain;
    __m512i *half, *line;
    size_t groups; /* of a weight row */
} batch_scratch;

static size_t lines_of(size_t cols) { return (cols + LINE_COLUMNS - 1) / LINE_COLUMNS; }

static batch_scratch scratch_at(void *scratch, size_t cols, size_t groups) {
    batch_scratch s = {.q = scratch, .groups = groups};
    s.scale = (float *)(void *)(s.q + lines_of(cols) * LINE_COLUMNS * TOKENS);
    s.bias = s.scale + SCALES * ROWS;
    s.chain = s.bias + SCALES * ROWS;
    s.half = (__m512i *)(void *)(s.chain + 4 * TOKENS * ROWS);
    s.line = s.half + ROWS;
    return s;
}

size_t cv_vnni_batch_scratch(size_t cols) {
    return lines_of(cols) * LINE_COLUMNS * TOKENS + ((size_t)2 * SCALES * ROWS + (size_t)4 * TOKENS * ROWS) * sizeof(float) + 3 * ROWS * sizeof(__m512i);
}

/* A line of 16 weight rows, some of which may be the last one again. */
typedef struct {
    const uint8_t *const *row;
    size_t at;            /* bytes into a row */
    const uint8_t *ahead; /* what is prefetched meanwhile: 1,024 bytes, in the order of memory, which the processor's own prefetching follows */
    __mmask16 columns; /* dwords that are there */
} line_rows;

/* Piece p of eight: 0-3 transpose four rows each inside the 128-bit lanes (to `half`), 4-7 gather lanes (to `line`). */
CV_INLINE_VNNI void transpose_piece(const line_rows *w, __m512i *half, __m512i *line, int p) {
    _mm_prefetch((const char *)w->ahead + 2 * p * LINE, _MM_HINT_T1);
    _mm_prefetch((const char *)w->ahead + (2 * p + 1) * LINE, _MM_HINT_T1);
    if (p < 4) {
        __m512i r[4], t[4];
        for (int i = 0; i < 4; i++) {
            r[i] = _mm512_maskz_loadu_epi32(w->columns, w->row[4 * p + i] + w->at);
        }
        t[0] = _mm512_unpacklo_epi32(r[0], r[1]);
        t[1] = _mm512_unpackhi_epi32(r[0], r[1]);
        t[2] = _mm512_unpacklo_epi32(r[2], r[3]);
        t[3] = _mm512_unpackhi_epi32(r[2], r[3]);
        _mm512_store_si512(half + 4 * p, _mm512_unpacklo_epi64(t[0], t[2]));
        _mm512_store_si512(half + 4 * p + 1, _mm512_unpackhi_epi64(t[0], t[2]));
        _mm512_store_si512(half + 4 * p + 2, _mm512_unpacklo_epi64(t[1], t[3]));
        _mm512_store_si512(half + 4 * p + 3, _mm512_unpackhi_epi64(t[1], t[3]));
        return;
    }
    const int c = p - 4; /* columns c, c+4, c+8, c+12 */
    const __m512i a = _mm512_load_si512(half + c), b = _mm512_load_si512(half + 4 + c), d = _mm512_load_si512(half + 8 + c), e = _mm512_load_si512(half + 12 + c);
    const __m512i even01 = _mm512_shuffle_i32x4(a, b, 0x88), odd01 = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(d, e, 0x88), odd23 = _mm512_shuffle_i32x4(d, e, 0xdd);
    _mm512_store_si512(line + c, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_store_si512(line + 4 + c, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_store_si512(line + 8 + c, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_store_si512(line + 12 + c, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
}

/* The dots of one line, group by group into the chains; between them the pieces of the next line (`next` may be this one again:
 * then they are for nothing). group and tokens are constants where this is inlined; scale and sum: the first activation row's,
 * g_stride floats from one to the next; g: the line's first group. */
CV_INLINE_VNNI void multiply_line(const batch_scratch *s, const __m512i *line, const int8_t *q, const line_rows *next, __m512i *next_line, const float *scale, const float *sum, size_t g_stride, size_t g, int group, int tokens) {
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    const int dwords = group / 8, parts = LINE_COLUMNS / group;
#pragma GCC unroll 4
    for (int part = 0; part < parts; part++, g++) {
        __m512i dot[TOKENS];
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++) dot[t] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int d = part * dwords; d < (part + 1) * dwords; d++) {
            const __m512i codes = _mm512_load_si512(line + d), low = _mm512_and_si512(codes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
#pragma GCC unroll 16
            for (int t = 0; t < tokens; t++) dot[t] = cv_vnni_dot_four(dot[t], low, q + (2 * d * tokens + t) * 4);
            if (d % 2 == 0) transpose_piece(next, s->half, next_line, d / 2);
#pragma GCC unroll 16
            for (int t = 0; t < tokens; t++) dot[t] = cv_vnni_dot_four(dot[t], high, q + ((2 * d + 1) * tokens + t) * 4);
        }
        if (g >= s->groups) continue; /* past the end of a last line: its codes are zeros, its scales are not there */
        const __m512 sw = _mm512_load_ps(s->scale + g % SCALES * ROWS), bw = _mm512_load_ps(s->bias + g % SCALES * ROWS);
        const __mmask16 begun = g < 4 ? 0 : 0xffff; /* the first group of a chain is added to zeros */
        float *chain = s->chain + (g & 3) * (size_t)tokens * ROWS;
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++) {
            const __m512 a = _mm512_mul_ps(sw, _mm512_set1_ps(scale[(size_t)t * g_stride + g])), b = _mm512_mul_ps(bw, _mm512_set1_ps(sum[(size_t)t * g_stride + g]));
            _mm512_store_ps(chain + t * ROWS, _mm512_add_ps(_mm512_maskz_load_ps(begun, chain + t * ROWS), _mm512_fmadd_ps(a, _mm512_cvtepi32_ps(dot[t]), b)));
        }
    }
}

typedef void (*line_kernel)(const batch_scratch *s, const __m512i *line, const int8_t *q, const line_rows *next, __m512i *next_line, const float *scale, const float *sum, size_t g_stride, size_t g);

#define BATCH(group, tokens) \
    CV_TARGET_VNNI static void line_##group##_##tokens(const batch_scratch *s, const __m512i *line, const int8_t *q, const line_rows *next, __m512i *next_line, const float *scale, const float *sum, size_t g_stride, size_t g) { \
        multiply_line(s, line, q, next, next_line, scale, sum, g_stride, g, group, tokens); \
    }
#define BATCH_TOKENS(group) \
    BATCH(group, 5) BATCH(group, 6) BATCH(group, 7) BATCH(group, 8) BATCH(group, 9) BATCH(group, 10) BATCH(group, 11) BATCH(group, 12) \
    BATCH(group, 13) BATCH(group, 14) BATCH(group, 15) BATCH(group, 16)
BATCH_TOKENS(32)
BATCH_TOKENS(64)
BATCH_TOKENS(128)

#define KERNELS(group) { \
    line_##group##_5, line_##group##_6, line_##group##_7, line_##group##_8, line_##group##_9, line_##group##_10, line_##group##_11, line_##group##_12, \
    line_##group##_13, line_##group##_14, line_##group##_15, line_##group##_16}
static const line_kernel kernels[3][TOKENS - CV_VNNI_BATCH_FROM + 1] = {KERNELS(32), KERNELS(64), KERNELS(128)};

/* 64 columns of activation rows, `from` the first one's: eight dwords of even and eight of odd columns, to [8, 2 nibbles, n rows, 4]. `columns`: those
 * that are there. Four rows at a time their dwords are transposed, because stores of single ones would take longer than anything else here. */
CV_INLINE_VNNI void pack_half(const int8_t *from, size_t stride, size_t n, __mmask64 columns, int8_t *to) {
    size_t t = 0;
    for (; t + 4 <= n; t += 4) {
        __m256i r[2][4];
        for (size_t i = 0; i < 4; i++) {
            const __m512i x = _mm512_maskz_loadu_epi8(columns, from + (t + i) * stride);
            r[0][i] = _mm512_cvtepi16_epi8(x);
            r[1][i] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 8));
        }
        for (size_t odd = 0; odd < 2; odd++) {
            const __m256i ab0 = _mm256_unpacklo_epi32(r[odd][0], r[odd][1]), ab1 = _mm256_unpackhi_epi32(r[odd][0], r[odd][1]);
            const __m256i cd0 = _mm256_unpacklo_epi32(r[odd][2], r[odd][3]), cd1 = _mm256_unpackhi_epi32(r[odd][2], r[odd][3]);
            const __m256i d[4] = {_mm256_unpacklo_epi64(ab0, cd0), _mm256_unpackhi_epi64(ab0, cd0), _mm256_unpacklo_epi64(ab1, cd1), _mm256_unpackhi_epi64(ab1, cd1)};
            for (size_t i = 0; i < 4; i++) { /* dwords i and 4 + i */
                _mm_storeu_si128((__m128i *)(void *)(to + ((2 * i + odd) * n + t) * 4), _mm256_castsi256_si128(d[i]));
                _mm_storeu_si128((__m128i *)(void *)(to + ((2 * (4 + i) + odd) * n + t) * 4), _mm256_extracti128_si256(d[i], 1));
            }
        }
    }
    for (; t < n; t++) {
        const __m512i x = _mm512_maskz_loadu_epi8(columns, from + t * stride);
        int32_t dwords[2][8];
        _mm256_storeu_si256((__m256i *)(void *)dwords[0], _mm512_cvtepi16_epi8(x));
        _mm256_storeu_si256((__m256i *)(void *)dwords[1], _mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 8)));
        for (size_t i = 0; i < 8; i++)
            for (size_t odd = 0; odd < 2; odd++) memcpy(to + ((2 * i + odd) * n + t) * 4, &dwords[odd][i], 4);
    }
}

/* All activation rows into the order of the steps. */
CV_TARGET_VNNI static void pack(const cv_qact *a, int8_t *q) {
    for (size_t c = 0; c < lines_of(a->cols) * LINE_COLUMNS; c += 64) {
        const size_t left = c < a->cols ? a->cols - c : 0;
        pack_half(a->q + (left ? c : 0), a->q_stride, a->n, left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1, q + c * a->n);
    }
}

/* Scales or biases of SCALES groups from g on, of 16 rows, as float32 [groups, 16 rows]; zeros past the last group. A few at a time, so
 * that the processor still has dots to compute meanwhile. 128 bits of four rows come into a register, then dwords are transposed. */
CV_INLINE_VNNI void load_scales(const uint8_t *const *row, uint32_t type, size_t groups, size_t g, float *to) {
    const size_t size = type == CV_F32 ? 4 : 2, in_one = 16 / size;
    for (size_t i = 0; i < SCALES; i += in_one) {
        const size_t left = groups > g + i ? groups - g - i : 0, at = left ? (g + i) * size : 0;
        const __mmask16 m = (__mmask16)((1u << (left < in_one ? left * size : 16)) - 1);
        __m512i r[4];
        for (int k = 0; k < 4; k++) {
            r[k] = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(m, row[k] + at));
            r[k] = _mm512_inserti32x4(r[k], _mm_maskz_loadu_epi8(m, row[4 + k] + at), 1);
            r[k] = _mm512_inserti32x4(r[k], _mm_maskz_loadu_epi8(m, row[8 + k] + at), 2);
            r[k] = _mm512_inserti32x4(r[k], _mm_maskz_loadu_epi8(m, row[12 + k] + at), 3);
        }
        const __m512i ab0 = _mm512_unpacklo_epi32(r[0], r[1]), ab1 = _mm512_unpackhi_epi32(r[0], r[1]), cd0 = _mm512_unpacklo_epi32(r[2], r[3]), cd1 = _mm512_unpackhi_epi32(r[2], r[3]);
        const __m512i v[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0), _mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1)};
        for (size_t k = 0; k < 4; k++) {
            if (type == CV_F32) {
                _mm512_store_si512(to + (i + k) * ROWS, v[k]);
            } else if (type == CV_F16) {
                _mm512_store_ps(to + 2 * k * ROWS, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v[k])));
                _mm512_store_ps(to + (2 * k + 1) * ROWS, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v[k], 16))));
            } else {
                _mm512_store_si512(to + 2 * k * ROWS, _mm512_slli_epi32(v[k], 16));
                _mm512_store_si512(to + (2 * k + 1) * ROWS, _mm512_andnot_si512(_mm512_set1_epi32(0xffff), v[k]));
            }
        }
    }
}

/* Where 16 rows from r on lie, with the last one again past row1. */
static void rows_at(const uint8_t *base, size_t row_bytes, size_t r, size_t row1, const uint8_t **row) {
    for (size_t i = 0; i < ROWS; i++) row[i] = base + (r + i < row1 ? r + i : row1 - 1) * row_bytes;
}

/* What to prefetch in place of row r: the row itself, or, past the last one, as many rows into what comes next. */
static cv_weight_rows rows_ahead(const cv_weight *w, size_t e, size_t row0, size_t row1, size_t r, const cv_weight_rows *next) {
    if (r < row1) return cv_weight_rows_at(w, e, r);
    const size_t beyond = r - row0 - (row1 - row0 + ROWS - 1) / ROWS * ROWS, scale = beyond * w->scale_row_bytes;
    return (cv_weight_rows){next->data ? next->data + beyond * w->row_bytes : NULL, next->scales ? next->scales + scale : NULL, next->biases ? next->biases + scale : NULL};
}

/* At most TOKENS activation rows. */
CV_TARGET_VNNI static void few(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const size_t groups = w->cols / w->group, n = a->n, lines = lines_of(w->cols), line_groups = LINE_COLUMNS / w->group;
    const batch_scratch s = scratch_at(scratch, w->cols, groups);
    const line_kernel kernel = kernels[w->group == 32 ? 0 : w->group == 64 ? 1 : 2][n - CV_VNNI_BATCH_FROM];
    const uint8_t *data = w->data + e * w->expert_bytes, *scales = w->scales + e * w->expert_scale_bytes, *biases = w->biases + e * w->expert_scale_bytes;
    const size_t last = w->cols - (lines - 1) * LINE_COLUMNS;
    const __mmask16 last_columns = last == LINE_COLUMNS ? 0xffff : (__mmask16)((1u << last / 8) - 1);
    const size_t block_bytes = ROWS * w->row_bytes, far = AHEAD_BYTES / block_bytes + 1, first = row1 - row0 < far * ROWS ? row1 - row0 : far * ROWS;
    cv_prefetch(scales + row0 * w->scale_row_bytes, first * w->scale_row_bytes);
    cv_prefetch(biases + row0 * w->scale_row_bytes, first * w->scale_row_bytes);
    cv_prefetch(data + row0 * w->row_bytes, first * w->row_bytes);
    pack(a, s.q);
    const uint8_t *row[2][ROWS], *scale_row[ROWS], *bias_row[ROWS];
    rows_at(data, w->row_bytes, row0, row1, row[0]);
    /* `next` is the line that comes after the one that is computed, in the next 16 rows after the last line */
    line_rows next = {row[0], 0, row[0][0], lines == 1 ? last_columns : 0xffff};
    for (int p = 0; p < 8; p++) transpose_piece(&next, s.half, s.line, p);
    size_t current = 0;
    for (size_t r = row0, block = 0; r < row1; r += ROWS, block ^= 1) {
        const bool more = r + ROWS < row1;
        const cv_weight_rows ahead = rows_ahead(w, e, row0, row1, r + far * ROWS, &a->next);
        if (more) rows_at(data, w->row_bytes, r + ROWS, row1, row[block ^ 1]);
        rows_at(scales, w->scale_row_bytes, r, row1, scale_row);
        rows_at(biases, w->scale_row_bytes, r, row1, bias_row);
        cv_prefetch(ahead.scales, ROWS * w->scale_row_bytes);
        cv_prefetch(ahead.biases, ROWS * w->scale_row_bytes);
        if (groups < 4) memset(s.chain, 0, n * 4 * ROWS * sizeof(float)); /* chains that no group begins */
        for (size_t line = 0; line < lines; line++) {
            if (line + 1 < lines) next = (line_rows){row[block], (line + 1) * LINE, row[block][0], line + 2 == lines ? last_columns : 0xffff};
            else if (more) next = (line_rows){row[block ^ 1], 0, row[block][0], lines == 1 ? last_columns : 0xffff};
            const size_t g = line * line_groups;
            if (g % SCALES == 0) {
                load_scales(scale_row, w->scale_type, groups, g, s.scale);
                load_scales(bias_row, w->scale_type, groups, g, s.bias);
            }
            if (ahead.data) next.ahead = ahead.data + line * LINE * ROWS;
            kernel(&s, s.line + current * ROWS, s.q + line * LINE_COLUMNS * n, &next, s.line + (current ^ 1) * ROWS, a->scale, a->sum, a->g_stride, g);
            current ^= 1;
        }
        const size_t left = row1 - r, chain = n * ROWS;
        for (size_t t = 0; t < n; t++) {
            const float *c = s.chain + t * ROWS;
            const __m512 sum = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(c), _mm512_load_ps(c + chain)), _mm512_add_ps(_mm512_load_ps(c + 2 * chain), _mm512_load_ps(c + 3 * chain)));
            _mm512_mask_storeu_ps(out + t * ldo + r, left >= ROWS ? 0xffff : (__mmask16)((1u << left) - 1), sum);
        }
    }
}

CV_TARGET_VNNI void cv_vnni_batch(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const size_t pieces = (a->n + TOKENS - 1) / TOKENS;
    const cv_weight_rows again = cv_weight_rows_at(w, e, row0);
    for (size_t i = 0; i < pieces; i++) {
        const size_t t = i * a->n / pieces;
        cv_qact piece = *a;
        piece.q += t * a->q_stride;
        piece.scale += t * a->g_stride;
        piece.sum += t * a->g_stride;
        piece.n = (i + 1) * a->n / pieces - t;
        if (i + 1 < pieces) piece.next = again;
        few(w, e, row0, row1, &piece, out + t * ldo, ldo, scratch);
    }
}

#endif
