/* dot_tile.c — the tiled quantized product with sdot by element: four columns of four weight rows are a vector, four columns of
 * an activation row one of its elements, so that a sum's lanes are weight rows and need no reduction. */
#if defined(__aarch64__)
#include "neon.h"

/* [4 quads of columns, 8 rows, 4 columns] */
CV_INLINE void tile_weights(const uint8x16_t row[8], uint8_t *to) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const uint32x4_t x0 = vreinterpretq_u32_u8(row[4 * h]), x1 = vreinterpretq_u32_u8(row[4 * h + 1]), x2 = vreinterpretq_u32_u8(row[4 * h + 2]), x3 = vreinterpretq_u32_u8(row[4 * h + 3]);
        const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(x0, x1)), b = vreinterpretq_u64_u32(vtrn2q_u32(x0, x1));
        const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(x2, x3)), d = vreinterpretq_u64_u32(vtrn2q_u32(x2, x3));
        vst1q_u8(to + 16 * h, vreinterpretq_u8_u64(vtrn1q_u64(a, c)));
        vst1q_u8(to + 32 + 16 * h, vreinterpretq_u8_u64(vtrn1q_u64(b, d)));
        vst1q_u8(to + 64 + 16 * h, vreinterpretq_u8_u64(vtrn2q_u64(a, c)));
        vst1q_u8(to + 96 + 16 * h, vreinterpretq_u8_u64(vtrn2q_u64(b, d)));
    }
}

/* [tokens, 16 columns] */
CV_INLINE void tile_activations(const int8x16_t *row, int tokens, int8_t *to) {
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) vst1q_s8(to + 16 * t, row[t]);
}

CV_INLINE CV_TARGET_DOT void tile_dots(const uint8_t *codes, const int8_t *q, size_t columns, int tokens, int32x4_t dot[8][2]) {
    for (size_t k = 0; k < columns; k += 16, codes += 128, q += 16 * tokens) {
        int8x16_t x[8], w0, w1;
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) x[t] = vld1q_s8(q + 16 * t);
#define QUAD(c) \
    w0 = vreinterpretq_s8_u8(vld1q_u8(codes + 32 * c)); \
    w1 = vreinterpretq_s8_u8(vld1q_u8(codes + 32 * c + 16)); \
    _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) { \
        dot[t][0] = vdotq_laneq_s32(dot[t][0], w0, x[t], c); \
        dot[t][1] = vdotq_laneq_s32(dot[t][1], w1, x[t], c); \
    }
        QUAD(0)
        QUAD(1)
        QUAD(2)
        QUAD(3)
#undef QUAD
    }
}

#define CV_TILE cv_dot_tile
#define CV_TILE_TARGET CV_TARGET_DOT
#define CV_TILE_SIGNED 1
#include "tile.h"

size_t cv_neon_tile_scratch(size_t cols) {
    const size_t padded = (cols + 63) & ~(size_t)63, groups = padded / 32;
    return (TILE_CHUNK + TILE_TOKENS) * padded + groups * (TILE_TOKENS * sizeof(int32_t) + 2 * TILE_CHUNK * sizeof(float));
}

#endif
