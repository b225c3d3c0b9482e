/* float_kernels.h — row kernels on sixteen float lanes: products with float weights, norms, activations, conversions. A set
 * includes its vec16 header and decode_kernels.h first, and gets static functions to put into its table. */
#ifndef CV_X86_FLOAT_KERNELS_H
#define CV_X86_FLOAT_KERNELS_H

#include <math.h>
#include <string.h>

#include "../number_formats.h"

/* scalar.c's cv_exp_scalar on sixteen lanes. */
CV_INLINE v16 v16_exp(v16 x) {
    x = v16_max(v16_set(-87.0f), x);
    x = v16_min(v16_set(88.0f), x);
    const v16 n = v16_round(v16_mul(x, v16_set(1.44269504f)));
    v16 r = v16_fma(n, v16_set(-0.693145752f), x);
    r = v16_fma(n, v16_set(-1.42860677e-6f), r);
    v16 p = v16_fma(v16_set(1.98412698e-4f), r, v16_set(1.38888889e-3f));
    p = v16_fma(p, r, v16_set(8.33333333e-3f));
    p = v16_fma(p, r, v16_set(4.16666667e-2f));
    p = v16_fma(p, r, v16_set(1.66666667e-1f));
    p = v16_fma(p, r, v16_set(0.5f));
    p = v16_fma(p, r, v16_set(1.0f));
    p = v16_fma(p, r, v16_set(1.0f));
    return v16_mul(p, v16_pow2(n));
}

CV_TARGET static void quantize(const float *x, size_t n, size_t group, int8_t *q, float *scale, float *sum) {
    for (size_t g = 0; g < n / group; g++) {
        const float *v = x + g * group;
        v16 top = v16_zero();
        for (size_t i = 0; i < group; i += 16) top = v16_max(v16_abs(v16_load(v + i)), top);
        const float amax = v16_largest(top), s = amax / 127.0f;
        float inverse = amax > 0 ? 127.0f / amax : 0.0f;
        if (inverse > 3.0e38f) inverse = 0.0f; /* as scalar.c: the group is as good as zero */
        int32_t total = 0;
        for (size_t i = 0; i < group; i += 16) total += v16_store_int8(q + g * group + i, v16_mul(v16_load(v + i), v16_set(inverse)));
        scale[g] = s;
        sum[g] = s * (float)total;
    }
}

/* ---- products with float weights ---- */

/* Weight rows of a float format in memory: a tile of them at a time, four rows x V16_BLOCK activation rows in registers.
 * A tile of FLOAT_TILE rows stays in the second-level cache while all activation rows pass. Rows of other formats are
 * decoded to a tile in scratch first. */
enum { FLOAT_TILE = 16, FLOAT_AHEAD = 12 * 1024 };

/* `rows` <= 4 weight rows from `row` on (the last is repeated), `tokens` <= V16_BLOCK activation rows. `ahead`: bytes to the
 * weights that are prefetched, 0 = none. */
CV_INLINE void dots4(const uint8_t *row, size_t stride, size_t rows, uint32_t format, size_t cols, size_t ahead, const float *x, size_t ldx, int tokens, float *out, size_t ldo) {
    const uint8_t *p[4];
    for (size_t i = 0; i < 4; i++) p[i] = row + (i < rows ? i : rows - 1) * stride;
    v16 acc[4][V16_BLOCK];
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < tokens; t++) acc[i][t] = v16_zero();
    size_t k = 0;
    for (; k + 16 <= cols; k += 16) {
        v16 w[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            w[i] = load_weight(p[i], k, format);
            if (ahead && (format == CV_FORMAT_F32 || k % 32 == 0)) _mm_prefetch((const char *)p[i] + k * (format == CV_FORMAT_F32 ? 4 : 2) + ahead, _MM_HINT_T1);
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const v16 v = v16_load(x + (size_t)t * ldx + k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[i][t] = v16_fma(w[i], v, acc[i][t]);
        }
    }
    if (k < cols)
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < 4; i++) acc[i][t] = v16_fma(load_weight_part(p[i], k, format, cols - k), v16_load(x + (size_t)t * ldx + k), acc[i][t]);
    for (int t = 0; t < tokens; t++) {
        const __m128 sums = v16_tree4(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
        if (rows == 4) {
            _mm_storeu_ps(out + (size_t)t * ldo, sums);
        } else {
            float four[4];
            _mm_storeu_ps(four, sums);
            memcpy(out + (size_t)t * ldo, four, rows * sizeof(float));
        }
    }
}

/* `rows` <= FLOAT_TILE rows times n activation rows. Weights before `end` are prefetched `ahead` bytes early. */
CV_INLINE void tile_product(const uint8_t *row, size_t stride, size_t rows, uint32_t format, size_t cols, const uint8_t *end, size_t ahead, const float *x, size_t n, size_t ldx, float *out, size_t ldo) {
    for (size_t t = 0; t < n;) {
        const size_t tokens = n - t >= V16_BLOCK ? V16_BLOCK : 1;
        for (size_t r = 0; r < rows; r += 4) {
            const uint8_t *four = row + r * stride;
            const size_t there = rows - r < 4 ? rows - r : 4, early = t == 0 && (size_t)(end - four) >= ahead + 4 * stride ? ahead : 0;
            if (tokens == V16_BLOCK) dots4(four, stride, there, format, cols, early, x + t * ldx, ldx, V16_BLOCK, out + t * ldo + r, ldo);
            else dots4(four, stride, there, format, cols, early, x + t * ldx, ldx, 1, out + t * ldo + r, ldo);
        }
        t += tokens;
    }
}

CV_TARGET static void fmatmul(const cv_weight *w, size_t e, size_t row0, size_t row1, const float *x, size_t n, size_t ldx, float *out, size_t ldo, void *scratch) {
    const size_t padded = cv_pad16(w->cols), block_bytes = 4 * w->row_bytes, ahead = (FLOAT_AHEAD / (block_bytes + 1) + 1) * block_bytes;
    const uint8_t *base = w->data + e * w->expert_bytes, *end = base + row1 * w->row_bytes;
    for (size_t r = row0; r < row1; r += FLOAT_TILE) {
        const size_t rows = row1 - r < FLOAT_TILE ? row1 - r : FLOAT_TILE;
        const uint8_t *row = base + r * w->row_bytes;
        if (w->format == CV_FORMAT_BF16) {
            tile_product(row, w->row_bytes, rows, CV_FORMAT_BF16, w->cols, end, ahead, x, n, ldx, out + r, ldo);
        } else if (w->format == CV_FORMAT_F16) {
            tile_product(row, w->row_bytes, rows, CV_FORMAT_F16, w->cols, end, ahead, x, n, ldx, out + r, ldo);
        } else if (w->format == CV_FORMAT_F32) {
            tile_product(row, w->row_bytes, rows, CV_FORMAT_F32, w->cols, end, ahead, x, n, ldx, out + r, ldo);
        } else {
            const size_t stride = padded * sizeof(float);
            for (size_t i = 0; i < rows; i++) decode_row(w, e, r + i, (float *)scratch + i * padded);
            tile_product(scratch, stride, rows, CV_FORMAT_F32, w->cols, (uint8_t *)scratch + rows * stride, rows * stride, x, n, ldx, out + r, ldo);
        }
    }
}

static size_t fmatmul_scratch(size_t cols) { return FLOAT_TILE * cv_pad16(cols) * sizeof(float); }

/* ---- rows of activations ---- */

CV_TARGET static void rms_norm(const float *x, const float *w, size_t n, float eps, float *y) {
    v16 squares = v16_zero();
    for (size_t i = 0; i < n; i += 16) squares = v16_fma(v16_load(x + i), v16_load(x + i), squares);
    const v16 r = v16_set(1.0f / sqrtf(v16_tree(squares) / (float)n + eps));
    for (size_t i = 0; i < n; i += 16) {
        v16 v = v16_mul(v16_load(x + i), r);
        if (w) v = v16_mul(v, n - i >= 16 ? v16_load(w + i) : v16_load_part(w + i, n - i));
        v16_store(y + i, n - i >= 16 ? v : v16_keep(v, n - i));
    }
}

CV_INLINE v16 gated(v16 gate, v16 up) { return v16_mul(v16_div(gate, v16_add(v16_set(1.0f), v16_exp(v16_negate(gate)))), up); }

CV_TARGET static void swiglu(const float *gate, const float *up, float *out, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(out + i, gated(v16_load(gate + i), v16_load(up + i)));
    if (i < n) v16_store_part(out + i, gated(v16_load_part(gate + i, n - i), v16_load_part(up + i, n - i)), n - i);
}

CV_TARGET static void add(float *x, const float *y, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(x + i, v16_add(v16_load(x + i), v16_load(y + i)));
    for (; i < n; i++) x[i] = x[i] + y[i];
}

CV_TARGET static void rope(float *x, const float *cos, const float *sin, size_t d, int interleaved) {
    const size_t half = d / 2;
    size_t j = 0; /* the first pair that is left */
    if (interleaved) {
        for (; j + 8 <= half; j += 8) {
            const v16 v = v16_load(x + 2 * j), s = v16_mul(v16_swap_pairs(v), v16_load_twice(sin + j));
            v16_store(x + 2 * j, v16_fmas(v, v16_load_twice(cos + j), s));
        }
    } else {
        for (; j + 16 <= half; j += 16) {
            const v16 a = v16_load(x + j), b = v16_load(x + half + j), c = v16_load(cos + j), s = v16_load(sin + j);
            v16_store(x + j, v16_fms(a, c, v16_mul(b, s)));
            v16_store(x + half + j, v16_fma(b, c, v16_mul(a, s)));
        }
    }
    for (; j < half; j++) {
        float *pa = x + (interleaved ? 2 * j : j), *pb = x + (interleaved ? 2 * j + 1 : j + half), a = *pa, b = *pb;
        *pa = fmaf(a, cos[j], -(b * sin[j]));
        *pb = fmaf(b, cos[j], a * sin[j]);
    }
}

CV_TARGET static void store_kv(const float *x, void *out, uint32_t type, size_t n) {
    if (type == CV_F32) {
        memcpy(out, x, n * sizeof(float));
        return;
    }
    uint16_t *h = out;
    size_t i = 0;
    if (type == CV_F16)
        for (; i + 16 <= n; i += 16) v16_store_f16(h + i, v16_load(x + i));
    else
        for (; i + 16 <= n; i += 16) v16_store_bf16(h + i, v16_load(x + i));
    for (; i < n; i++) h[i] = type == CV_F16 ? cv_f32_to_f16(x[i]) : cv_f32_to_bf16(x[i]);
}

/* Two passes: the largest number, then its first place. NaN loses against anything, including -infinity. */
CV_TARGET static size_t argmax(const float *x, size_t n) {
    v16 top16 = v16_set(-INFINITY);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) top16 = v16_max(v16_load(x + i), top16);
    float top = v16_largest(top16);
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    for (i = 0; i + 16 <= n; i += 16) {
        const uint32_t hit = v16_equal(v16_load(x + i), v16_set(top));
        if (hit) return i + (size_t)__builtin_ctz(hit);
    }
    for (; i < n; i++)
        if (x[i] == top) return i;
    return 0; /* nothing but NaN */
}

#endif
