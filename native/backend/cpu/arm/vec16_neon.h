/* vec16_neon.h — the contract's sixteen float32 lanes as four NEON registers, lanes 4j … 4j+3 in q[j]. */
#ifndef CV_ARM_VEC16_NEON_H
#define CV_ARM_VEC16_NEON_H

#include <string.h>

#include "neon.h"

typedef struct { float32x4_t q[4]; } v16;

#define V16_EACH(call) ((v16){{call(0), call(1), call(2), call(3)}})

CV_INLINE v16 v16_set(float x) { const float32x4_t v = vdupq_n_f32(x); return (v16){{v, v, v, v}}; }
CV_INLINE v16 v16_load(const float *p) { return (v16){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
CV_INLINE void v16_store(float *p, v16 x) {
    vst1q_f32(p, x.q[0]);
    vst1q_f32(p + 4, x.q[1]);
    vst1q_f32(p + 8, x.q[2]);
    vst1q_f32(p + 12, x.q[3]);
}

/* The first n < 16 elements, then zeros. */
CV_INLINE v16 v16_load_part(const float *p, size_t n) {
    float part[16] = {0};
    memcpy(part, p, n * sizeof(float));
    return v16_load(part);
}
CV_INLINE void v16_store_part(float *p, v16 x, size_t n) {
    float part[16];
    v16_store(part, x);
    memcpy(p, part, n * sizeof(float));
}
CV_INLINE v16 v16_keep(v16 x, size_t n) {
    float part[16];
    v16_store(part, x);
    return v16_load_part(part, n);
}

CV_INLINE v16 v16_add(v16 x, v16 y) {
#define CALL(j) vaddq_f32(x.q[j], y.q[j])
    return V16_EACH(CALL);
#undef CALL
}
CV_INLINE v16 v16_sub(v16 x, v16 y) {
#define CALL(j) vsubq_f32(x.q[j], y.q[j])
    return V16_EACH(CALL);
#undef CALL
}
CV_INLINE v16 v16_mul(v16 x, v16 y) {
#define CALL(j) vmulq_f32(x.q[j], y.q[j])
    return V16_EACH(CALL);
#undef CALL
}
CV_INLINE v16 v16_div(v16 x, v16 y) {
#define CALL(j) vdivq_f32(x.q[j], y.q[j])
    return V16_EACH(CALL);
#undef CALL
}
/* x*y + z, rounded once */
CV_INLINE v16 v16_fma(v16 x, v16 y, v16 z) {
#define CALL(j) vfmaq_f32(z.q[j], x.q[j], y.q[j])
    return V16_EACH(CALL);
#undef CALL
}

/* Sixteen 16-bit floats as float32; type is a constant where this is inlined. */
CV_INLINE v16 v16_widen(uint16x8_t a, uint16x8_t b, uint32_t type) {
    if (type == CV_F16)
        return (v16){{vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(a))), vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(a))),
                      vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(b))), vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(b)))}};
    return (v16){{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(a), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(a, 16)),
                  vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(b), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(b, 16))}};
}

/* Elements i … i+15 of an array of float32, float16 or bfloat16 (CV_F32, CV_F16, CV_BF16). */
CV_INLINE v16 v16_load_as(const void *base, size_t i, uint32_t type) {
    if (type == CV_F32) return v16_load((const float *)base + i);
    const uint16_t *p = (const uint16_t *)base + i;
    return v16_widen(vld1q_u16(p), vld1q_u16(p + 8), type);
}
CV_INLINE v16 v16_load_part_as(const void *base, size_t i, uint32_t type, size_t n) {
    if (type == CV_F32) return v16_load_part((const float *)base + i, n);
    uint16_t part[16] = {0};
    memcpy(part, (const uint16_t *)base + i, n * sizeof(uint16_t));
    return v16_widen(vld1q_u16(part), vld1q_u16(part + 8), type);
}

/* Sixteen unsigned bytes as float32. */
CV_INLINE v16 v16_from_bytes(uint8x16_t b) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_high_u8(b);
    return (v16){{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)), vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}

/* The contract's tree. */
CV_INLINE float32x4_t v16_tree_to4(v16 x) { return vaddq_f32(vaddq_f32(x.q[0], x.q[2]), vaddq_f32(x.q[1], x.q[3])); }
CV_INLINE float v16_tree(v16 x) {
    const float32x4_t s4 = v16_tree_to4(x);
    const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
/* The trees of two, in lanes 0 and 1 of s2 pairs: [x0+x2, x1+x3, y0+y2, y1+y3] before the last addition. */
CV_INLINE float32x4_t v16_tree_pair(v16 x, v16 y) {
    const float64x2_t a = vreinterpretq_f64_f32(v16_tree_to4(x)), b = vreinterpretq_f64_f32(v16_tree_to4(y));
    return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b)));
}
CV_INLINE float32x2_t v16_tree2(v16 x, v16 y) { const float32x4_t s = v16_tree_pair(x, y); return vpadd_f32(vget_low_f32(s), vget_high_f32(s)); }
CV_INLINE float32x4_t v16_tree4(v16 x, v16 y, v16 z, v16 w) { return vpaddq_f32(v16_tree_pair(x, y), v16_tree_pair(z, w)); }

/* scalar.c's cv_exp_scalar. A NaN stays one. */
CV_INLINE float32x4_t v4_exp(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-87.0f));
    x = vminq_f32(x, vdupq_n_f32(88.0f));
    const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
    float32x4_t r = vfmaq_f32(x, n, vdupq_n_f32(-0.693145752f));
    r = vfmaq_f32(r, n, vdupq_n_f32(-1.42860677e-6f));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(1.38888889e-3f), vdupq_n_f32(1.98412698e-4f), r);
    p = vfmaq_f32(vdupq_n_f32(8.33333333e-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(4.16666667e-2f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.66666667e-1f), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}
CV_INLINE v16 v16_exp(v16 x) { return (v16){{v4_exp(x.q[0]), v4_exp(x.q[1]), v4_exp(x.q[2]), v4_exp(x.q[3])}}; }

#endif
