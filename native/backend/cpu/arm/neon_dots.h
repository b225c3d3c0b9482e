/* neon_dots.h — dots of a few rows with a few rows, sixteen lanes each (dot16 of kernels.h), for products with float weights
 * and for attention scores. */
#ifndef CV_ARM_NEON_DOTS_H
#define CV_ARM_NEON_DOTS_H

#include "vec16_neon.h"

enum { DOTS_ROWS = 2, DOTS_TOKENS = 3 }; /* the largest float32 block: 24 registers of sums, 5 of operands */

/* out[t*ldo + r] = scale * dot16(row r, x row t) for `rows` <= DOTS_ROWS and `tokens` <= DOTS_TOKENS, which are constants where
 * this is inlined; k in multiples of 16. A quarter of the sixteen lanes at a time, so that operands take few registers. */
CV_INLINE void dots_block(const float *row, size_t stride, int rows, const float *x, size_t ldx, int tokens, size_t n, float scale, float *out, size_t ldo) {
    v16 acc[DOTS_TOKENS][DOTS_ROWS];
#pragma GCC unroll 3
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) acc[t][r] = v16_set(0);
    for (size_t k = 0; k < n; k += 16) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float32x4_t w[DOTS_ROWS];
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) w[r] = vld1q_f32(row + (size_t)r * stride + k + 4 * (size_t)j);
#pragma GCC unroll 3
            for (int t = 0; t < tokens; t++) {
                const float32x4_t v = vld1q_f32(x + (size_t)t * ldx + k + 4 * (size_t)j);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) acc[t][r].q[j] = vfmaq_f32(acc[t][r].q[j], w[r], v);
            }
        }
    }
#pragma GCC unroll 3
    for (int t = 0; t < tokens; t++) {
        if (rows == 2) vst1_f32(out + (size_t)t * ldo, vmul_n_f32(v16_tree2(acc[t][0], acc[t][1]), scale));
        else out[(size_t)t * ldo] = v16_tree(acc[t][0]) * scale;
    }
}

/* The same for `rows` <= DOTS_ROWS and any number of tokens, three at a time (four as two and two). */
CV_INLINE void dots(const float *row, size_t stride, size_t rows, const float *x, size_t ldx, size_t tokens, size_t n, float scale, float *out, size_t ldo) {
    for (size_t t = 0; t < tokens;) {
        const size_t left = tokens - t, step = left == 4 ? 2 : left < 3 ? left : 3;
        const float *at = x + t * ldx;
        float *to = out + t * ldo;
        if (rows == 2 && step == 3) dots_block(row, stride, 2, at, ldx, 3, n, scale, to, ldo);
        else if (rows == 2 && step == 2) dots_block(row, stride, 2, at, ldx, 2, n, scale, to, ldo);
        else if (rows == 2) dots_block(row, stride, 2, at, ldx, 1, n, scale, to, ldo);
        else if (step == 3) dots_block(row, stride, 1, at, ldx, 3, n, scale, to, ldo);
        else if (step == 2) dots_block(row, stride, 1, at, ldx, 2, n, scale, to, ldo);
        else dots_block(row, stride, 1, at, ldx, 1, n, scale, to, ldo);
        t += step;
    }
}

#endif
