/* i8mm_tile.c — the tiled quantized product with usmmla: a vector is eight columns of two weight rows, another eight columns of
 * two activation rows, and the sums are their 2 x 2 dots. Codes stay unsigned. */
#if defined(__aarch64__)
#include "neon.h"

/* [2 eights of columns, 4 pairs of rows, 2 rows, 8 columns] */
CV_INLINE void tile_weights(const uint8x16_t row[8], uint8_t *to) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint64x2_t a = vreinterpretq_u64_u8(row[2 * i]), b = vreinterpretq_u64_u8(row[2 * i + 1]);
        vst1q_u8(to + 16 * i, vreinterpretq_u8_u64(vzip1q_u64(a, b)));
        vst1q_u8(to + 64 + 16 * i, vreinterpretq_u8_u64(vzip2q_u64(a, b)));
    }
}

/* [2 eights of columns, pairs of tokens, 2 tokens, 8 columns] */
CV_INLINE void tile_activations(const int8x16_t *row, int tokens, int8_t *to) {
#pragma GCC unroll 4
    for (int p = 0; p < tokens / 2; p++) {
        const int64x2_t a = vreinterpretq_s64_s8(row[2 * p]), b = vreinterpretq_s64_s8(row[2 * p + 1]);
        vst1q_s8(to + 16 * p, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
        vst1q_s8(to + 8 * tokens + 16 * p, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
    }
}

CV_INLINE CV_TARGET_I8MM void tile_dots(const uint8_t *codes, const int8_t *q, size_t columns, int tokens, int32x4_t dot[8][2]) {
    int32x4_t acc[4][4]; /* [pair of tokens][pair of rows] = row 0 with tokens 0, 1, row 1 with tokens 0, 1 */
#pragma GCC unroll 4
    for (int p = 0; p < tokens / 2; p++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[p][i] = vdupq_n_s32(0);
    for (size_t k = 0; k < columns; k += 8, codes += 64, q += 8 * tokens) {
        uint8x16_t w[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) w[i] = vld1q_u8(codes + 16 * i);
#pragma GCC unroll 4
        for (int p = 0; p < tokens / 2; p++) {
            const int8x16_t x = vld1q_s8(q + 16 * p);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[p][i] = vusmmlaq_s32(acc[p][i], w[i], x);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < tokens / 2; p++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            dot[2 * p][h] = vaddq_s32(dot[2 * p][h], vuzp1q_s32(acc[p][2 * h], acc[p][2 * h + 1]));
            dot[2 * p + 1][h] = vaddq_s32(dot[2 * p + 1][h], vuzp2q_s32(acc[p][2 * h], acc[p][2 * h + 1]));
        }
}

#define CV_TILE cv_i8mm_tile
#define CV_TILE_TARGET CV_TARGET_I8MM
#define CV_TILE_SIGNED 0
#include "tile.h"

#endif
