/* neon_rows.c — kernels on rows of activations: int8 quantization, norm, SwiGLU, addition, RoPE, conversion for the KV cache,
 * argmax. */
#if defined(__aarch64__)
#include <math.h>

#include "../number_formats.h"
#include "vec16_neon.h"

/* Sixteen products rounded to int8; returns the four lanes' sums. */
CV_INLINE int32x4_t store_int8(int8_t *q, v16 x) {
    const int32x4_t a = vcvtnq_s32_f32(x.q[0]), b = vcvtnq_s32_f32(x.q[1]), c = vcvtnq_s32_f32(x.q[2]), d = vcvtnq_s32_f32(x.q[3]);
    const int16x8_t low = vcombine_s16(vmovn_s32(a), vmovn_s32(b)), high = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
    vst1q_s8(q, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    return vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d));
}

void cv_neon_quantize(const float *x, size_t n, size_t group, int8_t *q, float *scale, float *sum) {
    for (size_t g = 0; g < n / group; g++) {
        const float *v = x + g * group;
        float32x4_t top[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
        for (size_t i = 0; i < group; i += 16)
            for (int j = 0; j < 4; j++) top[j] = vmaxnmq_f32(top[j], vabsq_f32(vld1q_f32(v + i + 4 * j)));
        const float amax = vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(top[0], top[1]), vmaxnmq_f32(top[2], top[3])));
        float inverse = amax > 0 ? 127.0f / amax : 0.0f;
        if (inverse > 3.0e38f) inverse = 0.0f; /* as scalar.c: the group is as good as zero */
        int32x4_t total = vdupq_n_s32(0);
        for (size_t i = 0; i < group; i += 16) total = vaddq_s32(total, store_int8(q + g * group + i, v16_mul(v16_load(v + i), v16_set(inverse))));
        const float s = amax / 127.0f;
        scale[g] = s;
        sum[g] = s * (float)vaddvq_s32(total);
    }
}

void cv_neon_rms_norm(const float *x, const float *w, size_t n, float eps, float *y) {
    v16 squares = v16_set(0);
    for (size_t i = 0; i < n; i += 16) squares = v16_fma(v16_load(x + i), v16_load(x + i), squares);
    const v16 r = v16_set(1.0f / sqrtf(v16_tree(squares) / (float)n + eps));
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16 v = v16_mul(v16_load(x + i), r);
        v16_store(y + i, w ? v16_mul(v, v16_load(w + i)) : v);
    }
    if (i < n) {
        const v16 v = v16_mul(v16_load(x + i), r);
        v16_store(y + i, v16_keep(w ? v16_mul(v, v16_load_part(w + i, n - i)) : v, n - i));
    }
}

CV_INLINE v16 gated(v16 gate, v16 up) {
    const v16 minus = {{vnegq_f32(gate.q[0]), vnegq_f32(gate.q[1]), vnegq_f32(gate.q[2]), vnegq_f32(gate.q[3])}};
    return v16_mul(v16_div(gate, v16_add(v16_set(1.0f), v16_exp(minus))), up);
}

void cv_neon_swiglu(const float *gate, const float *up, float *out, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(out + i, gated(v16_load(gate + i), v16_load(up + i)));
    if (i < n) v16_store_part(out + i, gated(v16_load_part(gate + i, n - i), v16_load_part(up + i, n - i)), n - i);
}

void cv_neon_add(float *x, const float *y, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) v16_store(x + i, v16_add(v16_load(x + i), v16_load(y + i)));
    for (; i < n; i++) x[i] = x[i] + y[i];
}

/* Pairs (a, b) become (a*c - b*s, b*c + a*s); the products with s are rounded, the others are inside the fma. */
CV_INLINE void rotate(float32x4_t *a, float32x4_t *b, float32x4_t c, float32x4_t s) {
    const float32x4_t bs = vmulq_f32(*b, s), as = vmulq_f32(*a, s);
    *a = vfmaq_f32(vnegq_f32(bs), *a, c);
    *b = vfmaq_f32(as, *b, c);
}

void cv_neon_rope(float *x, const float *cos, const float *sin, size_t d, int interleaved) {
    const size_t half = d / 2;
    size_t j = 0; /* the first pair that is left */
    for (; j + 4 <= half; j += 4) {
        const float32x4_t c = vld1q_f32(cos + j), s = vld1q_f32(sin + j);
        if (interleaved) {
            float32x4x2_t v = vld2q_f32(x + 2 * j);
            rotate(&v.val[0], &v.val[1], c, s);
            vst2q_f32(x + 2 * j, v);
        } else {
            float32x4_t a = vld1q_f32(x + j), b = vld1q_f32(x + half + j);
            rotate(&a, &b, c, s);
            vst1q_f32(x + j, a);
            vst1q_f32(x + half + j, b);
        }
    }
    for (; j < half; j++) {
        float *pa = x + (interleaved ? 2 * j : j), *pb = x + (interleaved ? 2 * j + 1 : j + half), a = *pa, b = *pb;
        *pa = fmaf(a, cos[j], -(b * sin[j]));
        *pb = fmaf(b, cos[j], a * sin[j]);
    }
}

CV_INLINE uint16x4_t to_bf16(float32x4_t x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t nan = vorrq_u32(u, vdupq_n_u32(0x400000)); /* keeps a NaN one */
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, nan), 16);
}

void cv_neon_store_kv(const float *x, void *out, uint32_t type, size_t n) {
    if (type == CV_F32) {
        memcpy(out, x, n * sizeof(float));
        return;
    }
    uint16_t *h = out;
    size_t i = 0;
    if (type == CV_F16)
        for (; i + 4 <= n; i += 4) vst1_u16(h + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    else
        for (; i + 4 <= n; i += 4) vst1_u16(h + i, to_bf16(vld1q_f32(x + i)));
    for (; i < n; i++) h[i] = type == CV_F16 ? cv_f32_to_f16(x[i]) : cv_f32_to_bf16(x[i]);
}

/* Two passes: the largest number, then its first place. NaN loses against anything, including -infinity. */
size_t cv_neon_argmax(const float *x, size_t n) {
    float32x4_t top4[4];
    for (int j = 0; j < 4; j++) top4[j] = vdupq_n_f32(-INFINITY);
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++) {
            const float32x4_t v = vld1q_f32(x + i + 4 * j);
            top4[j] = vbslq_f32(vcgtq_f32(v, top4[j]), v, top4[j]);
        }
    float top = vmaxvq_f32(vmaxq_f32(vmaxq_f32(top4[0], top4[1]), vmaxq_f32(top4[2], top4[3])));
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    const float32x4_t want = vdupq_n_f32(top);
    for (i = 0; i + 16 <= n; i += 16) {
        const uint32x4_t ab = vorrq_u32(vceqq_f32(vld1q_f32(x + i), want), vceqq_f32(vld1q_f32(x + i + 4), want));
        const uint32x4_t cd = vorrq_u32(vceqq_f32(vld1q_f32(x + i + 8), want), vceqq_f32(vld1q_f32(x + i + 12), want));
        if (vmaxvq_u32(vorrq_u32(ab, cd))) break;
    }
    for (; i < n; i++)
        if (x[i] == top) return i;
    return 0; /* nothing but NaN */
}

#endif
