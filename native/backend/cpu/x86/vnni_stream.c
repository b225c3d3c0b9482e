/* vnni_stream.c — quantized product for few activation rows (decode), with AVX-512 VNNI. Memory bound: every weight byte is
 * read once, in the checkpoint's layout, four rows at a time, with the block of rows after them prefetched.
 *
 * Work advances by *quads*: four consecutive groups of four rows. Integer dots are reduced so that a zmm holds [group][row]:
 * its 128-bit lanes are the contract's four chains, its elements the four rows. One fma and one add then finish 16 groups.
 * Activations are copied once a call into the order in which codes unpack:
 *   4 bits: of each 128 columns the 64 even ones, then the 64 odd ones (low and high nibbles of 64 bytes);
 *   6 and 8 bits: columns in order.
 * Scales and sums are repeated four times, so that they lie as [group][row] too. Missing groups of the last quad have zero
 * codes, scales and sums: they add +0 to a chain, which changes no bit (a chain that started at +0 is never -0). */
#if defined(__x86_64__)
#include "vnni.h"

#include <string.h>

enum { ROWS = 4, BATCH = 8, N_SIZES = 6 };

/* Activations of one row in stream order. */
typedef struct {
    const int8_t *q;    /* [quads, 4*group] */
    const float *scale; /* [quads, 16] */
    const float *sum;   /* [quads, 16] */
} stream_act;

/* Weight rows: `blocks` times four of them, `stride` bytes apart (0: one row, four times). */
typedef struct {
    const uint8_t *code, *scale, *bias;
    size_t stride, scale_stride, blocks, groups;
    uint32_t scale_type;
    size_t ahead; /* blocks from the one that is computed to the one that is prefetched */
    cv_weight_rows next; /* what comes after the last block */
} stream_rows;

CV_INLINE_VNNI __mmask64 first_bytes(ptrdiff_t n) { return n <= 0 ? 0 : n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1; }

CV_INLINE_VNNI __mmask16 first_dwords(int bytes) { return bytes <= 0 ? 0 : (__mmask16)((1u << bytes / 4) - 1); }

/* What of a quad is there: dwords of each code vector's load, groups of the scales. All of it but in a row's last quad. */
typedef struct {
    __mmask16 codes[8];
    __mmask8 groups;
} quad_masks;

/* Scales (or biases) of four groups, four rows, as float32 [group][row]. */
CV_INLINE_VNNI __m512 load_scales(const uint8_t *row, size_t stride, uint32_t type, __mmask8 m) {
    if (type == CV_F32) {
        __m512 v = _mm512_castps128_ps512(_mm_maskz_loadu_ps(m, row));
        v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(m, row + stride), 1);
        v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(m, row + 2 * stride), 2);
        v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(m, row + 3 * stride), 3);
        return _mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), v);
    }
    __m128i h[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const uint8_t *p = row + (size_t)r * stride;
        h[r] = m == 0x0f ? _mm_loadl_epi64((const __m128i *)(const void *)p) : _mm_maskz_loadu_epi16(m, p);
    }
    __m128i ab = _mm_unpacklo_epi16(h[0], h[1]), cd = _mm_unpacklo_epi16(h[2], h[3]);
    __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi32(ab, cd)), _mm_unpackhi_epi32(ab, cd), 1);
    if (type == CV_F16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

/* Per 128-bit lane the sums of a, b, c and d. */
CV_INLINE_VNNI __m512i lane_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

/* Lanes 0+1 and 2+3 of a, then of b. */
CV_INLINE_VNNI __m512i fold_lanes(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* The code vectors of one partial sum of one row: 4 bits give two from 64 bytes, the others one or two of 64 codes. */
CV_INLINE_VNNI void load_codes(const uint8_t *p, const __mmask16 *m, int bits, int vectors, __m512i c[2]) {
    if (bits == 4) {
        const __m512i low = _mm512_set1_epi8(0x0f), v = _mm512_maskz_loadu_epi32(m[0], p);
        c[0] = _mm512_and_si512(v, low);
        c[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
        return;
    }
    for (int i = 0; i < vectors; i++) {
        const __m512i v = _mm512_maskz_loadu_epi32(m[i], p + i * 8 * bits);
        c[i] = bits == 8 ? v : cv_vnni_codes6(v);
    }
}

/* Partial sums a quad and row: each 128-bit lane of one lies inside one group. And code vectors a partial sum. */
CV_INLINE_VNNI int sums_of(int bits, int group) { return bits == 4 ? group / 32 : group == 32 ? 2 : 4; }
CV_INLINE_VNNI int vectors_of(int bits, int group) { return bits == 4 || group == 128 ? 2 : 1; }

/* The masks of a quad of which `groups` are there. */
CV_INLINE_VNNI quad_masks masks_of(unsigned groups, int bits, int group) {
    quad_masks m = {.groups = (__mmask8)((1u << groups) - 1)};
    const int loads = sums_of(bits, group) * (bits == 4 ? 1 : vectors_of(bits, group)), bytes = group * bits / 2 / loads;
    for (int i = 0; i < loads; i++) {
        const int left = (int)groups * group * bits / 8 - i * bytes;
        m.codes[i] = first_dwords(left < bytes ? left : bytes);
    }
    return m;
}

/* One quad of four rows for `tokens` activation rows. bits, group and tokens are constants where this is inlined. */
CV_INLINE_VNNI void quad(const stream_rows *w, const uint8_t *code, size_t scale_at, size_t i, const quad_masks *m, size_t ahead, int bits, int group, int tokens, const stream_act *a, __m512 *chain) {
    const int sums = sums_of(bits, group), vectors = vectors_of(bits, group), loads = bits == 4 ? 1 : vectors;
    const size_t quad_bytes = (size_t)group * (size_t)bits / 2, sum_bytes = quad_bytes / (size_t)sums;
    __m512i x[4][BATCH];
#pragma GCC unroll 4
    for (int p = 0; p < sums; p++) {
        __m512i c[ROWS][2];
        const uint8_t *at = code + i * quad_bytes + (size_t)p * sum_bytes;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *row = at + (size_t)r * w->stride;
            for (size_t line = 0; line < sum_bytes; line += 64) _mm_prefetch((const char *)row + ahead + line, _MM_HINT_T1);
            load_codes(row, m->codes + p * loads, bits, vectors, c[r]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            const int8_t *q = a[t].q + i * 4 * (size_t)group + (size_t)(p * vectors) * 64;
            __m512i s[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                s[r] = cv_vnni_dot(_mm512_setzero_si512(), c[r][0], _mm512_load_si512(q));
                if (vectors == 2) s[r] = cv_vnni_dot(s[r], c[r][1], _mm512_load_si512(q + 64));
            }
            x[p][t] = lane_sums(s[0], s[1], s[2], s[3]);
        }
    }
    scale_at += i * (w->scale_type == CV_F32 ? 16 : 8);
    const __m512 sw = load_scales(w->scale + scale_at, w->scale_stride, w->scale_type, m->groups), bw = load_scales(w->bias + scale_at, w->scale_stride, w->scale_type, m->groups);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
        __m512i dot = sums == 1 ? x[0][t] : sums == 2 ? fold_lanes(x[0][t], x[1][t]) : fold_lanes(fold_lanes(x[0][t], x[1][t]), fold_lanes(x[2][t], x[3][t]));
        __m512 s = _mm512_mul_ps(sw, _mm512_load_ps(a[t].scale + i * 16)), b = _mm512_mul_ps(bw, _mm512_load_ps(a[t].sum + i * 16));
        chain[t] = _mm512_add_ps(chain[t], _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(dot), b));
    }
}

CV_INLINE_VNNI void prefetch_scales(const uint8_t *scale, const uint8_t *bias, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)scale + i, _MM_HINT_T1);
        _mm_prefetch((const char *)bias + i, _MM_HINT_T1);
    }
}

/* What to prefetch in place of a block: the block itself, or, past the last one, as many blocks into what comes next. */
CV_INLINE_VNNI cv_weight_rows block_ahead(const stream_rows *w, size_t block) {
    const cv_weight_rows from = block < w->blocks ? (cv_weight_rows){w->code, w->scale, w->bias} : w->next;
    if (block >= w->blocks) block -= w->blocks;
    if (!from.data) return from;
    return (cv_weight_rows){from.data + block * ROWS * w->stride, from.scales + block * ROWS * w->scale_stride, from.biases + block * ROWS * w->scale_stride};
}

/* out[t][r] for all rows of w and `tokens` activation rows. */
CV_INLINE_VNNI void stream(const stream_rows *w, int bits, int group, int tokens, const stream_act *a, float *const *out) {
    const size_t full = w->groups / 4;
    const quad_masks all = masks_of(4, bits, group), rest = masks_of((unsigned)(w->groups % 4), bits, group);
    for (size_t block = 0; block < w->blocks; block++) {
        const uint8_t *code = w->code + block * ROWS * w->stride;
        const size_t scale_at = block * ROWS * w->scale_stride;
        const cv_weight_rows later = block_ahead(w, block + w->ahead);
        const size_t ahead = later.data ? (size_t)((uintptr_t)later.data - (uintptr_t)code) : 0; /* modulo 2^64 */
        if (later.data) prefetch_scales(later.scales, later.biases, ROWS * w->scale_stride);
        __m512 chain[BATCH];
        for (int t = 0; t < tokens; t++) chain[t] = _mm512_setzero_ps();
        quad_masks m = all;
        for (size_t i = 0; i < (w->groups + 3) / 4; i++) {
            if (i == full) m = rest;
            quad(w, code, scale_at, i, &m, ahead, bits, group, tokens, a, chain);
        }
        for (int t = 0; t < tokens; t++) {
            __m128 c01 = _mm_add_ps(_mm512_castps512_ps128(chain[t]), _mm512_extractf32x4_ps(chain[t], 1));
            __m128 c23 = _mm_add_ps(_mm512_extractf32x4_ps(chain[t], 2), _mm512_extractf32x4_ps(chain[t], 3));
            _mm_storeu_ps(out[t] + block * ROWS, _mm_add_ps(c01, c23));
        }
    }
}

#define STREAM(bits, group, tokens) \
    CV_TARGET_VNNI static void stream_##bits##_##group##_##tokens(const stream_rows *w, const stream_act *a, float *const *out) { stream(w, bits, group, tokens, a, out); }
#define STREAM_FEW(bits, group) STREAM(bits, group, 1) STREAM(bits, group, 2) STREAM(bits, group, 3) STREAM(bits, group, 4)
#define STREAM_TOKENS(bits, group) STREAM_FEW(bits, group) STREAM(bits, group, 6) STREAM(bits, group, 8)
#define STREAM_GROUPS(bits) STREAM_TOKENS(bits, 32) STREAM_TOKENS(bits, 64) STREAM_TOKENS(bits, 128)
STREAM_FEW(4, 32) STREAM_FEW(4, 64) STREAM_FEW(4, 128) /* more rows: vnni_batch.c */
STREAM_GROUPS(6)
STREAM_GROUPS(8)

typedef void (*stream_kernel)(const stream_rows *w, const stream_act *a, float *const *out);

#define KERNELS_FEW(bits, group) stream_##bits##_##group##_1, stream_##bits##_##group##_2, stream_##bits##_##group##_3, stream_##bits##_##group##_4
#define KERNELS_TOKENS(bits, group) { KERNELS_FEW(bits, group), stream_##bits##_##group##_6, stream_##bits##_##group##_8 }
#define KERNELS(bits) { KERNELS_TOKENS(bits, 32), KERNELS_TOKENS(bits, 64), KERNELS_TOKENS(bits, 128) }
static const size_t kernel_tokens[N_SIZES] = {1, 2, 3, 4, 6, 8}; /* 5 and 7 rows are computed as 6 and 8, the last one twice */
static const stream_kernel kernels[3][3][N_SIZES] = {{{KERNELS_FEW(4, 32)}, {KERNELS_FEW(4, 64)}, {KERNELS_FEW(4, 128)}}, KERNELS(6), KERNELS(8)};

static size_t quads_of(size_t groups) { return (groups + 3) / 4; }

/* Bytes of one activation row in stream order. */
static size_t act_bytes(size_t groups, size_t group) { return quads_of(groups) * (4 * group + 2 * 16 * sizeof(float)); }

/* Copies activation row t into stream order at `to`. */
CV_TARGET_VNNI static stream_act pack_row(const cv_qact *a, size_t t, unsigned bits, uint8_t *to) {
    const size_t groups = a->cols / a->group, quads = quads_of(groups), bytes = quads * 4 * a->group;
    const int8_t *from = a->q + t * a->q_stride;
    int8_t *q = (int8_t *)to;
    for (size_t k = 0; k < bytes; k += 128) {
        const ptrdiff_t left = (ptrdiff_t)a->cols - (ptrdiff_t)k;
        __m512i x = _mm512_maskz_loadu_epi8(first_bytes(left), from + (left > 0 ? k : 0)), y = _mm512_maskz_loadu_epi8(first_bytes(left - 64), from + (left > 64 ? k + 64 : 0));
        if (bits == 4) {
            __m512i even = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(x)), _mm512_cvtepi16_epi8(y), 1);
            __m512i odd = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 8))), _mm512_cvtepi16_epi8(_mm512_srli_epi16(y, 8)), 1);
            x = even;
            y = odd;
        }
        _mm512_store_si512(q + k, x);
        _mm512_store_si512(q + k + 64, y);
    }
    float *scale = (float *)(void *)(to + bytes), *sum = scale + quads * 16;
    const __m512i repeat = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    for (size_t i = 0; i < quads; i++) {
        const __mmask16 m = groups - i * 4 >= 4 ? 0x0f : (__mmask16)((1u << (groups - i * 4)) - 1);
        const size_t at = t * a->g_stride + i * 4;
        _mm512_store_ps(scale + i * 16, _mm512_permutexvar_ps(repeat, _mm512_maskz_loadu_ps(m, a->scale + at)));
        _mm512_store_ps(sum + i * 16, _mm512_permutexvar_ps(repeat, _mm512_maskz_loadu_ps(m, a->sum + at)));
    }
    return (stream_act){q, scale, sum};
}

enum { AHEAD_BYTES = 12 * 1024 };

CV_TARGET_VNNI void cv_vnni_stream(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const size_t groups = w->cols / w->group, stride = act_bytes(groups, w->group), n_rows = row1 - row0, block_bytes = ROWS * w->row_bytes;
    const stream_kernel *kernel = kernels[w->bits == 4 ? 0 : w->bits == 6 ? 1 : 2][w->group == 32 ? 0 : w->group == 64 ? 1 : 2];
    const stream_rows rows = {
        .code = w->data + e * w->expert_bytes + row0 * w->row_bytes,
        .scale = w->scales + e * w->expert_scale_bytes + row0 * w->scale_row_bytes,
        .bias = w->biases + e * w->expert_scale_bytes + row0 * w->scale_row_bytes,
        .stride = w->row_bytes, .scale_stride = w->scale_row_bytes, .blocks = n_rows / ROWS, .groups = groups, .scale_type = w->scale_type,
        .ahead = AHEAD_BYTES / block_bytes + 1,
        .next = a->next,
    };
    for (size_t t0 = 0; t0 < a->n; t0 += BATCH) {
        const size_t n = a->n - t0 < BATCH ? a->n - t0 : BATCH;
        size_t size = 0;
        while (kernel_tokens[size] < n) size++;
        /* the first blocks are asked for here; after them each block prefetches a later one */
        const size_t first = rows.ahead < rows.blocks ? rows.ahead : rows.blocks;
        prefetch_scales(rows.scale, rows.bias, first * ROWS * rows.scale_stride);
        for (size_t i = 0; i < first * block_bytes; i += 64) _mm_prefetch((const char *)rows.code + i, _MM_HINT_T1);
        stream_act act[BATCH];
        float *to[BATCH];
        for (size_t t = 0; t < kernel_tokens[size]; t++) {
            act[t] = t < n ? pack_row(a, t0 + t, w->bits, (uint8_t *)scratch + t * stride) : act[n - 1];
            to[t] = out + (t0 + (t < n ? t : n - 1)) * ldo + row0;
        }
        kernel[size](&rows, act, to);
        for (size_t r = n_rows / ROWS * ROWS; r < n_rows; r++) { /* the last one to three rows, each as four equal ones */
            const stream_rows row = {.code = rows.code + r * rows.stride, .scale = rows.scale + r * rows.scale_stride, .bias = rows.bias + r * rows.scale_stride,
                                     .blocks = 1, .groups = groups, .scale_type = w->scale_type};
            for (size_t t = 0; t < n; t++) {
                float four[ROWS], *const only[1] = {four};
                kernel[0](&row, act + t, only);
                to[t][r] = four[0];
            }
        }
    }
}

size_t cv_vnni_stream_scratch(size_t cols) {
    const size_t quads = cols / 128 + 4; /* of 32 columns a group, which need the most floats; larger groups round up further */
    return BATCH * (cols + 512 + quads * 2 * 16 * sizeof(float));
}

#endif
