/* neon_fmatmul.c — products with float32 activations. One or two activation rows read float weights where they lie, four
 * rows at a time; more of them, and the quantized formats, go over a tile of rows that is decoded to float32 first. */
#if defined(__aarch64__)
#include "neon_dots.h"

enum { TILE = 8, STREAM_ROWS = 2 };

/* Four weight rows (of which `rows` are there; the last is repeated) times one activation row. */
CV_INLINE void stream4(const uint8_t *row, size_t stride, size_t rows, uint32_t type, size_t cols, const float *x, float *out) {
    const uint8_t *p[4];
    v16 acc[4];
    for (size_t i = 0; i < 4; i++) {
        p[i] = row + (i < rows ? i : rows - 1) * stride;
        acc[i] = v16_set(0);
    }
    size_t k = 0;
    for (; k + 16 <= cols; k += 16) {
        const v16 v = v16_load(x + k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[i] = v16_fma(v16_load_as(p[i], k, type), v, acc[i]);
    }
    if (k < cols) {
        const v16 v = v16_load(x + k);
        for (int i = 0; i < 4; i++) acc[i] = v16_fma(v16_load_part_as(p[i], k, type, cols - k), v, acc[i]);
    }
    float four[4];
    vst1q_f32(four, v16_tree4(acc[0], acc[1], acc[2], acc[3]));
    memcpy(out, four, rows * sizeof(float));
}

CV_INLINE void stream(const cv_weight *w, size_t e, size_t row0, size_t row1, uint32_t type, const float *x, size_t n, size_t ldx, float *out, size_t ldo) {
    for (size_t r = row0; r < row1; r += 4)
        for (size_t t = 0; t < n; t++)
            stream4(w->data + e * w->expert_bytes + r * w->row_bytes, w->row_bytes, row1 - r < 4 ? row1 - r : 4, type, w->cols, x + t * ldx, out + t * ldo + r);
}

void cv_neon_fmatmul(const cv_weight *w, size_t e, size_t row0, size_t row1, const float *x, size_t n, size_t ldx, float *out, size_t ldo, void *scratch) {
    if (n <= STREAM_ROWS && w->format == CV_FORMAT_BF16) {
        stream(w, e, row0, row1, CV_BF16, x, n, ldx, out, ldo);
        return;
    }
    if (n <= STREAM_ROWS && w->format == CV_FORMAT_F16) {
        stream(w, e, row0, row1, CV_F16, x, n, ldx, out, ldo);
        return;
    }
    if (n <= STREAM_ROWS && w->format == CV_FORMAT_F32) {
        stream(w, e, row0, row1, CV_F32, x, n, ldx, out, ldo);
        return;
    }
    const size_t padded = cv_pad16(w->cols);
    float *tile = scratch;
    for (size_t r = row0; r < row1; r += TILE) {
        const size_t rows = row1 - r < TILE ? row1 - r : TILE;
        for (size_t i = 0; i < rows; i++) cv_neon_decode_row(w, e, r + i, tile + i * padded);
        for (size_t t = 0; t < n; t += DOTS_TOKENS) { /* a few activation rows stay in the nearest cache while the tile passes */
            const size_t tokens = n - t < DOTS_TOKENS ? n - t : DOTS_TOKENS;
            for (size_t i = 0; i < rows; i += DOTS_ROWS)
                dots(tile + i * padded, padded, rows - i < DOTS_ROWS ? rows - i : DOTS_ROWS, x + t * ldx, ldx, tokens, padded, 1.0f, out + t * ldo + r + i, ldo);
        }
    }
}

size_t cv_neon_fmatmul_scratch(size_t cols) { return TILE * cv_pad16(cols) * sizeof(float); }

#endif
