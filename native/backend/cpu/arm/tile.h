/* tile.h — quantized product for many activation rows (prefill): weight rows are unpacked to bytes once and used for all
 * activation rows. Shared by the dot-product and the int8-matrix set, whose byte layouts differ; a set includes this after
 * defining
 *
 *   CV_TILE           the function to define (as cv_cpu_kernels.qmatmul)
 *   CV_TILE_TARGET    its target attribute
 *   CV_TILE_SIGNED    1: 8-bit codes are stored minus 128 and the integer dots start at 128*Σq; 0: as they are, from 0
 *   tile_weights(rows, to)               columns k … k+15 of eight weight rows to 128 bytes
 *   tile_activations(rows, tokens, to)   columns k … k+15 of `tokens` activation rows to 16*tokens bytes
 *   tile_dots(codes, q, columns, tokens, dot)   dot[t][h]: plus the integer dots of activation row t with weight rows 4h … 4h+3
 *
 * CHUNK rows are unpacked at a time (for the second-level cache); then TOKENS activation rows are laid out (for the first) and
 * meet them eight rows at a time. Scratch, from its start:
 *   codes        [CHUNK/8, columns/16, 128] bytes
 *   q            [columns/16, TOKENS, 16] bytes
 *   start        [groups, TOKENS] int32
 *   scale, bias  [CHUNK/8, groups, 8] float32
 */

#include <string.h>

enum { TILE_CHUNK = 32, TILE_ROWS = 8, TILE_TOKENS = 8 };

#define TILE_INLINE static inline __attribute__((always_inline)) CV_TILE_TARGET

typedef struct {
    uint8_t *codes;
    int8_t *q;
    int32_t *start;
    float *scale, *bias;
    size_t cols, groups, group;
} tile;

static tile tile_at(void *scratch, const cv_weight *w) {
    tile t = {.codes = scratch, .cols = w->cols, .groups = w->cols / w->group, .group = w->group};
    t.q = (int8_t *)(t.codes + TILE_CHUNK * t.cols);
    t.start = (int32_t *)(void *)(t.q + TILE_TOKENS * t.cols);
    t.scale = (float *)(void *)(t.start + TILE_TOKENS * t.groups);
    t.bias = t.scale + TILE_CHUNK * t.groups;
    return t;
}

/* 32 codes in the order of their columns; reads 4*bits bytes. */
TILE_INLINE void tile_codes(const uint8_t *p, unsigned bits, uint8x16_t c[2]) {
    if (bits == 4) {
        const uint8x16_t v = vld1q_u8(p), low = vandq_u8(v, vdupq_n_u8(0x0f)), high = vshrq_n_u8(v, 4);
        c[0] = vzip1q_u8(low, high);
        c[1] = vzip2q_u8(low, high);
    } else if (bits == 6) {
        const uint8x8x3_t v = vld3_u8(p);
        const uint8x8_t low = vdup_n_u8(0x3f), c0 = vand_u8(v.val[0], low), c3 = vshr_n_u8(v.val[2], 2);
        const uint8x8_t c1 = vand_u8(vsli_n_u8(vshr_n_u8(v.val[0], 6), v.val[1], 2), low), c2 = vand_u8(vsli_n_u8(vshr_n_u8(v.val[1], 4), v.val[2], 4), low);
        const uint16x8_t c01 = vreinterpretq_u16_u8(vcombine_u8(vzip1_u8(c0, c1), vzip2_u8(c0, c1))), c23 = vreinterpretq_u16_u8(vcombine_u8(vzip1_u8(c2, c3), vzip2_u8(c2, c3)));
        c[0] = vreinterpretq_u8_u16(vzip1q_u16(c01, c23));
        c[1] = vreinterpretq_u8_u16(vzip2q_u16(c01, c23));
    } else {
        const uint8x16_t flip = vdupq_n_u8(CV_TILE_SIGNED ? 0x80 : 0);
        c[0] = veorq_u8(vld1q_u8(p), flip);
        c[1] = veorq_u8(vld1q_u8(p + 16), flip);
    }
}

/* Eight weight rows from `first` on (none past `last`, which is repeated) to their place in the tile. */
TILE_INLINE void tile_unpack(const tile *tl, const uint8_t *data, size_t row_bytes, size_t first, size_t last, unsigned bits, uint8_t *to) {
    const uint8_t *p[TILE_ROWS];
    for (size_t i = 0; i < TILE_ROWS; i++) p[i] = data + (first + i < last ? first + i : last) * row_bytes;
    for (size_t k = 0; k < tl->cols; k += 32, to += 256) {
        uint8x16_t a[TILE_ROWS], b[TILE_ROWS], c[2];
#pragma GCC unroll 8
        for (size_t i = 0; i < TILE_ROWS; i++) {
            tile_codes(p[i] + k * bits / 8, bits, c);
            a[i] = c[0];
            b[i] = c[1];
        }
        tile_weights(a, to);
        tile_weights(b, to + 128);
    }
}

/* Scales or biases of the same eight rows as [groups, 8] float32. */
static void tile_scales(const uint8_t *base, size_t row_bytes, size_t first, size_t last, uint32_t type, size_t groups, float *to) {
    for (size_t i = 0; i < TILE_ROWS; i++) {
        const uint8_t *row = base + (first + i < last ? first + i : last) * row_bytes;
        for (size_t g = 0; g < groups; g++) {
            float f;
            if (type == CV_F32) {
                memcpy(&f, row + 4 * g, 4);
            } else {
                uint16_t h;
                memcpy(&h, row + 2 * g, 2);
                if (type == CV_F16) {
                    f = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
                } else {
                    const uint32_t u = (uint32_t)h << 16;
                    memcpy(&f, &u, 4);
                }
            }
            to[g * TILE_ROWS + i] = f;
        }
    }
}

/* Activation rows t … t+n-1 to the tile, as `tokens` of them: the last one is repeated. */
TILE_INLINE void tile_pack(const tile *tl, const cv_qact *a, size_t t, size_t n, int tokens, unsigned bits) {
    const int8_t *p[TILE_TOKENS];
#pragma GCC unroll 8
    for (int i = 0; i < tokens; i++) p[i] = a->q + (t + ((size_t)i < n ? (size_t)i : n - 1)) * a->q_stride;
    for (size_t k = 0; k < tl->cols; k += 16) {
        int8x16_t v[TILE_TOKENS];
#pragma GCC unroll 8
        for (int i = 0; i < tokens; i++) v[i] = vld1q_s8(p[i] + k);
        tile_activations(v, tokens, tl->q + k * (size_t)tokens);
    }
    if (!CV_TILE_SIGNED) return;
    for (size_t g = 0; g < tl->groups; g++)
        for (int i = 0; i < tokens; i++) {
            int32x4_t total = vdupq_n_s32(0);
            if (bits == 8)
                for (size_t k = 0; k < tl->group; k += 16) total = vpadalq_s16(total, vpaddlq_s8(vld1q_s8(p[i] + g * tl->group + k)));
            tl->start[g * (size_t)tokens + (size_t)i] = 128 * vaddvq_s32(total);
        }
}

/* The packed activation rows times eight weight rows: result[t][row]. scale and sum belong to the first of n activation rows. */
TILE_INLINE void tile_multiply(const tile *tl, size_t eight, const float *scale, const float *sum, size_t g_stride, size_t n, int tokens, float result[TILE_TOKENS][TILE_ROWS]) {
    float chain[4][TILE_TOKENS][TILE_ROWS];
    memset(chain, 0, sizeof chain);
    const uint8_t *codes = tl->codes + eight * TILE_ROWS * tl->cols;
    const int8_t *q = tl->q;
    const float *sw = tl->scale + eight * TILE_ROWS * tl->groups, *bw = tl->bias + eight * TILE_ROWS * tl->groups;
    for (size_t g = 0; g < tl->groups; g++) {
        int32x4_t dot[TILE_TOKENS][2];
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = vdupq_n_s32(CV_TILE_SIGNED ? tl->start[g * (size_t)tokens + (size_t)t] : 0);
        tile_dots(codes, q, tl->group, tokens, dot);
        codes += tl->group * TILE_ROWS;
        q += tl->group * (size_t)tokens;
        const float32x4_t s0 = vld1q_f32(sw + g * TILE_ROWS), s1 = vld1q_f32(sw + g * TILE_ROWS + 4), b0 = vld1q_f32(bw + g * TILE_ROWS), b1 = vld1q_f32(bw + g * TILE_ROWS + 4);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            const size_t at = ((size_t)t < n ? (size_t)t : n - 1) * g_stride + g;
            float *c = chain[g & 3][t];
            vst1q_f32(c, vaddq_f32(vld1q_f32(c), vfmaq_f32(vmulq_n_f32(b0, sum[at]), vmulq_n_f32(s0, scale[at]), vcvtq_f32_s32(dot[t][0]))));
            vst1q_f32(c + 4, vaddq_f32(vld1q_f32(c + 4), vfmaq_f32(vmulq_n_f32(b1, sum[at]), vmulq_n_f32(s1, scale[at]), vcvtq_f32_s32(dot[t][1]))));
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < TILE_ROWS; i++) result[t][i] = (chain[0][t][i] + chain[1][t][i]) + (chain[2][t][i] + chain[3][t][i]);
}

/* Activation rows t … t+n-1 (computed as `tokens`) times the chunk of weight rows first … first+rows-1. */
TILE_INLINE void tile_piece(const tile *tl, const cv_qact *a, size_t t, size_t n, int tokens, unsigned bits, size_t first, size_t rows, float *out, size_t ldo) {
    tile_pack(tl, a, t, n, tokens, bits);
    for (size_t r = 0; r < rows; r += TILE_ROWS) {
        float result[TILE_TOKENS][TILE_ROWS];
        tile_multiply(tl, r / TILE_ROWS, a->scale + t * a->g_stride, a->sum + t * a->g_stride, a->g_stride, n, tokens, result);
        for (size_t i = 0; i < n; i++) memcpy(out + (t + i) * ldo + first + r, result[i], (rows - r < TILE_ROWS ? rows - r : TILE_ROWS) * sizeof(float));
    }
}

typedef void (*tile_kernel)(const tile *tl, const cv_qact *a, size_t t, size_t n, unsigned bits, size_t first, size_t rows, float *out, size_t ldo);
#define TILE_KERNEL(tokens) \
    CV_TILE_TARGET static void tile_piece_##tokens(const tile *tl, const cv_qact *a, size_t t, size_t n, unsigned bits, size_t first, size_t rows, float *out, size_t ldo) { \
        tile_piece(tl, a, t, n, tokens, bits, first, rows, out, ldo); \
    }
TILE_KERNEL(2)
TILE_KERNEL(4)
TILE_KERNEL(6)
TILE_KERNEL(8)
static const tile_kernel tile_kernels[TILE_TOKENS / 2] = {tile_piece_2, tile_piece_4, tile_piece_6, tile_piece_8};

CV_TILE_TARGET void CV_TILE(const cv_weight *w, size_t e, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch) {
    const tile tl = tile_at(scratch, w);
    const uint8_t *data = w->data + e * w->expert_bytes, *scales = w->scales + e * w->expert_scale_bytes, *biases = w->biases + e * w->expert_scale_bytes;
    const size_t pieces = (a->n + TILE_TOKENS - 1) / TILE_TOKENS;
    for (size_t r = row0; r < row1; r += TILE_CHUNK) {
        const size_t rows = row1 - r < TILE_CHUNK ? row1 - r : TILE_CHUNK, last = row1 - 1;
        for (size_t i = 0; i < rows; i += TILE_ROWS) {
            uint8_t *to = tl.codes + i * tl.cols;
            if (w->bits == 4) tile_unpack(&tl, data, w->row_bytes, r + i, last, 4, to);
            else if (w->bits == 6) tile_unpack(&tl, data, w->row_bytes, r + i, last, 6, to);
            else tile_unpack(&tl, data, w->row_bytes, r + i, last, 8, to);
            tile_scales(scales, w->scale_row_bytes, r + i, last, w->scale_type, tl.groups, tl.scale + i * tl.groups);
            tile_scales(biases, w->scale_row_bytes, r + i, last, w->scale_type, tl.groups, tl.bias + i * tl.groups);
        }
        for (size_t piece = 0, t = 0; piece < pieces; piece++) { /* pieces as even as can be: 9 rows are 5 and 4 */
            const size_t end = (piece + 1) * a->n / pieces, n = end - t;
            tile_kernels[(n - 1) / 2](&tl, a, t, n, w->bits, r, rows, out, ldo);
            t = end;
        }
    }
}
