/* stream.h — quantized product that reads weights in the checkpoint's layout: once for up to four activation rows, four weight
 * rows at a time, for decode. A set includes this after defining
 *
 *   CV_STREAM         the function to define (as cv_cpu_kernels.qmatmul)
 *   CV_STREAM_TARGET  its target attribute, or nothing
 *   stream_dot(acc, codes, q)   lane l of acc plus the products of the bytes 4l … 4l+3 of two int8 vectors
 *
 * Work advances by *steps* of code bytes that unpack to whole vectors: 32 columns (4 and 8 bits) or 64 (6 bits). Activations
 * are copied once a call into the order in which codes unpack:
 *   4 bits: of each 32 columns the even ones, then the odd ones (low and high nibbles of 16 bytes);
 *   6 bits: of each 64 columns those of 0, 1, 2, 3 modulo 4 (fields of 16 times three bytes);
 *   8 bits: as they are. Codes become signed by subtracting 128, and 128*Σq is added to the integer dot.
 * Four integer dots, one of each weight row, are one vector; four such vectors of float32 are the contract's chains. */

#include <string.h>

#include "../number_formats.h"

enum { STREAM_ROWS = 4, STREAM_TOKENS = 4, STREAM_BATCH = 8, STREAM_AHEAD_BYTES = 12 * 1024 };

#define STREAM_INLINE static inline __attribute__((always_inline)) CV_STREAM_TARGET

typedef struct {
    const uint8_t *code[STREAM_ROWS], *scale[STREAM_ROWS], *bias[STREAM_ROWS];
    uint32_t scale_type;
    size_t groups, ahead; /* ahead: bytes to the codes that are prefetched */
} stream_rows;

typedef struct {
    const int8_t *q;      /* [cols] in unpacked order, zeros up to a multiple of 64 */
    const int32_t *start; /* [groups] 128*Σq, 8 bits only */
    const float *scale, *sum;
} stream_act;

/* The codes of one step. */
STREAM_INLINE void stream_codes(const uint8_t *p, int bits, int8x16_t c[4]) {
    if (bits == 4) {
        const uint8x16_t v = vld1q_u8(p);
        c[0] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(0x0f)));
        c[1] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
    } else if (bits == 8) {
        c[0] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
        c[1] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16), vdupq_n_u8(0x80)));
    } else {
        const uint8x16x3_t v = vld3q_u8(p);
        const uint8x16_t low = vdupq_n_u8(0x3f);
        c[0] = vreinterpretq_s8_u8(vandq_u8(v.val[0], low));
        c[1] = vreinterpretq_s8_u8(vandq_u8(vsliq_n_u8(vshrq_n_u8(v.val[0], 6), v.val[1], 2), low));
        c[2] = vreinterpretq_s8_u8(vandq_u8(vsliq_n_u8(vshrq_n_u8(v.val[1], 4), v.val[2], 4), low));
        c[3] = vreinterpretq_s8_u8(vshrq_n_u8(v.val[2], 2));
    }
}

/* Scales or biases of `n` <= 4 groups from g on: s[i] holds group g+i of the four rows. */
STREAM_INLINE void stream_scales(const uint8_t *const row[STREAM_ROWS], size_t g, uint32_t type, size_t n, float32x4_t s[4]) {
    if (n < 4) {
        for (size_t i = 0; i < 4; i++) {
            float four[STREAM_ROWS] = {0};
            if (i < n)
                for (int r = 0; r < STREAM_ROWS; r++) four[r] = cv_scale_to_f32(row[r], g + i, type);
            s[i] = vld1q_f32(four);
        }
        return;
    }
    uint32x4_t x[STREAM_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < STREAM_ROWS; r++) {
        if (type == CV_F32) {
            x[r] = vreinterpretq_u32_f32(vld1q_f32((const float *)(const void *)row[r] + g));
        } else {
            const uint16x4_t h = vld1_u16((const uint16_t *)(const void *)row[r] + g);
            x[r] = type == CV_F16 ? vreinterpretq_u32_f32(vcvt_f32_f16(vreinterpret_f16_u16(h))) : vshll_n_u16(h, 16);
        }
    }
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(x[0], x[1])), b = vreinterpretq_u64_u32(vtrn2q_u32(x[0], x[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(x[2], x[3])), d = vreinterpretq_u64_u32(vtrn2q_u32(x[2], x[3]));
    s[0] = vreinterpretq_f32_u64(vtrn1q_u64(a, c));
    s[1] = vreinterpretq_f32_u64(vtrn1q_u64(b, d));
    s[2] = vreinterpretq_f32_u64(vtrn2q_u64(a, c));
    s[3] = vreinterpretq_f32_u64(vtrn2q_u64(b, d));
}

/* A group, or the two groups of 32 that a step of 6 bits has: dot[t][i] holds group i's integer dots with the four rows. `half`:
 * the second group is not there (and its bytes are not read). */
STREAM_INLINE void stream_dots(const stream_rows *w, size_t index, bool half, int bits, int group, int tokens, const stream_act *a, int32x4_t dot[STREAM_TOKENS][2]) {
    const int columns = bits == 6 ? 64 : 32, bytes = columns * bits / 8, steps = group <= columns ? 1 : group / columns, pair = steps == 1 ? 1 : 2;
    int32x4_t acc[STREAM_TOKENS][STREAM_ROWS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < STREAM_ROWS; r++) acc[t][r] = vdupq_n_s32(0);
#pragma GCC unroll 1 /* two steps are enough to hide the loop; more overflow the registers */
    for (int from = 0; from < steps; from += 2) {
#pragma GCC unroll 2
        for (int j = 0; j < pair; j++) {
            const size_t at = index * (size_t)steps + (size_t)(from + j);
#pragma GCC unroll 4
            for (int r = 0; r < STREAM_ROWS; r++) {
                const uint8_t *p = w->code[r] + at * (size_t)bytes;
                int8x16_t c[4];
                if (half) {
                    uint8_t first[48] = {0};
                    memcpy(first, p, 24);
                    stream_codes(first, bits, c);
                } else {
                    if (j == 0 || bytes == 48) __builtin_prefetch(p + w->ahead, 0, 2);
                    stream_codes(p, bits, c);
                }
#pragma GCC unroll 4
                for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
                    for (int i = 0; i < columns / 16; i++) acc[t][r] = stream_dot(acc[t][r], c[i], vld1q_s8(a[t].q + at * (size_t)columns + 16 * i));
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        const int32x4_t x = vpaddq_s32(acc[t][0], acc[t][1]), y = vpaddq_s32(acc[t][2], acc[t][3]);
        if (bits == 6 && group == 32) {
            dot[t][0] = vuzp1q_s32(x, y);
            dot[t][1] = vuzp2q_s32(x, y);
        } else {
            dot[t][0] = vpaddq_s32(x, y);
            if (bits == 8) dot[t][0] = vaddq_s32(dot[t][0], vdupq_n_s32(a[t].start[index]));
        }
    }
}

/* Groups g+i, and g+i+1 where two come together (of `n` from g on), to their chains. */
STREAM_INLINE void stream_group(const stream_rows *w, size_t g, int i, size_t n, int together, int bits, int group, int tokens, const stream_act *a, const float32x4_t *sw, const float32x4_t *bw, float32x4_t chain[4][STREAM_TOKENS]) {
    int32x4_t dot[STREAM_TOKENS][2];
    stream_dots(w, (g + (size_t)i) / (size_t)together, together == 2 && (size_t)i + 1 == n, bits, group, tokens, a, dot);
#pragma GCC unroll 2
    for (int j = 0; j < together; j++) {
        if ((size_t)(i + j) >= n) break;
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const float32x4_t s = vmulq_n_f32(sw[i + j], a[t].scale[g + (size_t)(i + j)]), b = vmulq_n_f32(bw[i + j], a[t].sum[g + (size_t)(i + j)]);
            chain[i + j][t] = vaddq_f32(chain[i + j][t], vfmaq_f32(b, s, vcvtq_f32_s32(dot[t][j])));
        }
    }
}

/* `n` <= 4 groups from g on, which is a multiple of 4, for `tokens` activation rows. Chains of one or two are registers. */
STREAM_INLINE void stream_quad(const stream_rows *w, size_t g, size_t n, int bits, int group, int tokens, const stream_act *a, float32x4_t chain[4][STREAM_TOKENS]) {
    const int together = bits == 6 && group == 32 ? 2 : 1;
    float32x4_t sw[4], bw[4];
    stream_scales(w->scale, g, w->scale_type, n, sw);
    stream_scales(w->bias, g, w->scale_type, n, bw);
    if (tokens <= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i += together)
            if ((size_t)i < n) stream_group(w, g, i, n, together, bits, group, tokens, a, sw, bw, chain);
    } else {
#pragma GCC unroll 1
        for (int i = 0; (size_t)i < n; i += together) stream_group(w, g, i, n, together, bits, group, tokens, a, sw, bw, chain);
    }
}

STREAM_INLINE void stream_multiply(const stream_rows *w, int bits, int group, int tokens, const stream_act *a, float32x4_t *result) {
    float32x4_t chain[4][STREAM_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++) chain[i][t] = vdupq_n_f32(0);
    size_t g = 0;
    for (; g + 4 <= w->groups; g += 4) stream_quad(w, g, 4, bits, group, tokens, a, chain);
    if (g < w->groups) stream_quad(w, g, w->groups - g, bits, group, tokens, a, chain);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) result[t] = vaddq_f32(vaddq_f32(chain[0][t], chain[1][t]), vaddq_f32(chain[2][t], chain[3][t]));
}

typedef void (*stream_kernel)(const stream_rows *w, const stream_act *a, float32x4_t *result);

#define STREAM_KERNEL(bits, group, tokens) \
    CV_STREAM_TARGET static void stream_##bits##_##group##_##tokens(const stream_rows *w, const stream_act *a, float32x4_t *result) { stream_multiply(w, bits, group, tokens, a, result); }
#define STREAM_COUNTS(bits, group) STREAM_KERNEL(bits, group, 1) STREAM_KERNEL(bits, group, 2) STREAM_KERNEL(bits, group, 4)
#define STREAM_GROUPS(bits) STREAM_COUNTS(bits, 32) STREAM_COUNTS(bits, 64) STREAM_COUNTS(bits, 128)
STREAM_GROUPS(4)
STREAM_GROUPS(6)
STREAM_GROUPS(8)
/* Three activation rows are computed as four, the last one twice. */
#define STREAM_OF_GROUP(bits, group) { stream_##bits##_##group##_1, stream_##bits##_##group##_2, stream_##bits##_##group##_4, stream_##bits##_##group##_4 }
#define STREAM_OF_BITS(bits) { STREAM_OF_GROUP(bits, 32), STREAM_OF_GROUP(bits, 64), STREAM_OF_GROUP(bits, 128) }
static const stream_kernel stream_kernels[3][3][STREAM_TOKENS] = {STREAM_OF_BITS(4), STREAM_OF_BITS(6), STREAM_OF_BITS(8)};

/* Activation row t in unpacked order: codes at q, sums at start. */
static stream_act stream_pack(const cv_qact *a, size_t t, unsigned bits, int8_t *q, int32_t *start) {
    const int8_t *from = a->q + t * a->q_stride;
    stream_act act = {.q = bits == 8 ? from : q, .start = start, .scale = a->scale + t * a->g_stride, .sum = a->sum + t * a->g_stride};
    if (bits == 4)
        for (size_t k = 0; k < a->cols; k += 32) {
            const int8x16x2_t v = vld2q_s8(from + k);
            vst1q_s8(q + k, v.val[0]);
            vst1q_s8(q + k + 16, v.val[1]);
        }
    if (bits == 6) /* past the last column come the zeros of the row's padding */
        for (size_t k = 0; k < a->cols; k += 64) {
            const int8x16x4_t v = vld4q_s8(from + k);
            for (int i = 0; i < 4; i++) vst1q_s8(q + k + 16 * i, v.val[i]);
        }
    if (bits == 8)
        for (size_t g = 0; g < a->cols / a->group; g++) {
            int32x4_t total = vdupq_n_s32(0);
            for (size_t k = 0; k < a->group; k += 16) total = vpadalq_s16(total, vpaddlq_s8(vld1q_s8(from + g * a->group + k)));
            start[g] = 128 * vaddvq_s32(total);
        }
    return act;
}

void CV_STREAM(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const stream_kernel *kernel = stream_kernels[w->bits == 4 ? 0 : w->bits == 6 ? 1 : 2][w->group == 32 ? 0 : w->group == 64 ? 1 : 2];
    const uint8_t *codes = w->data + e * w->expert_bytes, *scales = w->scales + e * w->expert_scale_bytes, *biases = w->biases + e * w->expert_scale_bytes;
    const size_t stride = (w->cols + 63) & ~(size_t)63, blocks_ahead = STREAM_AHEAD_BYTES / (STREAM_ROWS * w->row_bytes) + 1;
    int32_t *starts = (int32_t *)(void *)((int8_t *)scratch + STREAM_BATCH * stride);
    for (size_t t0 = 0; t0 < a->n; t0 += STREAM_BATCH) {
        const size_t n = a->n - t0 < STREAM_BATCH ? a->n - t0 : STREAM_BATCH;
        stream_act act[STREAM_BATCH];
        for (size_t t = 0; t < STREAM_BATCH; t++)
            act[t] = t < n ? stream_pack(a, t0 + t, w->bits, (int8_t *)scratch + t * stride, starts + t * (stride / 32)) : act[n - 1];
        for (size_t r = row0; r < row1; r += STREAM_ROWS) {
            const size_t rows = row1 - r < STREAM_ROWS ? row1 - r : STREAM_ROWS;
            stream_rows four = {.scale_type = w->scale_type, .groups = w->cols / w->group, .ahead = r + (blocks_ahead + 1) * STREAM_ROWS <= row1 ? blocks_ahead * STREAM_ROWS * w->row_bytes : 0};
            for (size_t i = 0; i < STREAM_ROWS; i++) {
                const size_t row = r + (i < rows ? i : rows - 1);
                four.code[i] = codes + row * w->row_bytes;
                four.scale[i] = scales + row * w->scale_row_bytes;
                four.bias[i] = biases + row * w->scale_row_bytes;
            }
            for (size_t t = 0; t < n; t += STREAM_TOKENS) {
                const size_t tokens = n - t < STREAM_TOKENS ? n - t : STREAM_TOKENS;
                float32x4_t result[STREAM_TOKENS];
                kernel[tokens - 1](&four, act + t, result);
                for (size_t i = 0; i < tokens; i++) {
                    float values[STREAM_ROWS];
                    vst1q_f32(values, result[i]);
                    memcpy(out + (t0 + t + i) * ldo + r, values, rows * sizeof(float));
                }
                four.ahead = 0; /* the second pass finds them in the cache */
            }
        }
    }
}
