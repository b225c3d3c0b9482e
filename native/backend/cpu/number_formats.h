/* number_formats.h — scalar conversions between float32 and the small formats that checkpoints use. Exact where the
 * target holds the value; rounding to nearest, ties to even, where it does not. */
#ifndef CV_NUMBER_FORMATS_H
#define CV_NUMBER_FORMATS_H

#include <stdint.h>
#include <string.h>

static inline float cv_bits_to_f32(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t cv_f32_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float cv_bf16_to_f32(uint16_t h) { return cv_bits_to_f32((uint32_t)h << 16); }

static inline uint16_t cv_f32_to_bf16(float f) {
    uint32_t u = cv_f32_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 64); /* keep NaN a NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float cv_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
    if (e == 31) return cv_bits_to_f32(sign | 0x7f800000u | (m << 13));
    if (e == 0) { /* zero and subnormals: m * 2^-24 is exact in float32 */
        float v = (float)m * 0x1p-24f;
        return cv_bits_to_f32(sign | cv_f32_to_bits(v));
    }
    return cv_bits_to_f32(sign | ((e + 112) << 23) | (m << 13));
}

static inline uint16_t cv_f32_to_f16(float f) {
    uint32_t u = cv_f32_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((a >> 13) & 0x3ff));
    if (a >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* 65536 and up, infinity */
    if (a < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
        float v = cv_bits_to_f32(a) + 0.5f;
        return (uint16_t)(sign | (cv_f32_to_bits(v) - 0x3f000000u));
    }
    a += 0xfffu + ((a >> 13) & 1);
    return (uint16_t)(sign | ((a - 0x38000000u) >> 13)); /* may round up to infinity, as IEEE does */
}

/* OCP E8M0: 2^(byte-127). */
static inline float cv_e8m0_to_f32(uint8_t b) { return b == 0 ? 0x1p-127f : b == 255 ? cv_bits_to_f32(0x7fc00000u) : cv_bits_to_f32((uint32_t)b << 23); }

/* OCP E4M3 (fn): bias 7, no infinities, 0x7f and 0xff NaN, subnormals m/8 * 2^-6. */
static inline float cv_e4m3_to_f32(uint8_t b) {
    uint32_t e = (b >> 3) & 15, m = b & 7, sign = (uint32_t)(b & 0x80) << 24;
    if (e == 15 && m == 7) return cv_bits_to_f32(0x7fc00000u);
    if (e == 0) return cv_bits_to_f32(sign | cv_f32_to_bits((float)m * 0x1p-9f));
    return cv_bits_to_f32(sign | ((e + 120) << 23) | (m << 20));
}

/* OCP E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives. */
static inline float cv_e2m1_to_f32(unsigned code) {
    static const float magnitude[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    float v = magnitude[code & 7];
    return (code & 8) ? -v : v;
}

/* One stored scale or bias. */
static inline float cv_scale_to_f32(const uint8_t *base, size_t i, uint32_t type) {
    uint16_t h;
    switch (type) {
    case 1: { float f; memcpy(&f, base + 4 * i, 4); return f; }
    case 2: memcpy(&h, base + 2 * i, 2); return cv_f16_to_f32(h);
    case 3: memcpy(&h, base + 2 * i, 2); return cv_bf16_to_f32(h);
    case 4: return cv_e8m0_to_f32(base[i]);
    default: return cv_e4m3_to_f32(base[i]);
    }
}

#endif
