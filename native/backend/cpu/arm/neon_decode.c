/* neon_decode.c — one weight row of any format as float32. */
#if defined(__aarch64__)
#include "../number_formats.h"
#include "../scalar.h"
#include "vec16_neon.h"

/* Sixteen codes of 2 to 8 bits as bytes; reads 2*bits bytes. bits is a constant where this is inlined. */
CV_INLINE uint8x16_t codes16(const uint8_t *p, unsigned bits) {
    if (bits == 8) return vld1q_u8(p);
    if (bits == 4) {
        const uint8x8_t v = vld1_u8(p), low = vand_u8(v, vdup_n_u8(0x0f)), high = vshr_n_u8(v, 4);
        return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
    }
    /* The two bytes in which a code lies go to its word, a shift moves the code to the word's low bits. */
    uint8_t packed[16] = {0}, from[2][16];
    int16_t down[8];
    memcpy(packed, p, 2 * bits);
    for (unsigned k = 0; k < 16; k++) {
        from[k / 8][k % 8 * 2] = (uint8_t)(k * bits / 8);
        from[k / 8][k % 8 * 2 + 1] = (uint8_t)(k * bits / 8 + 1);
        down[k % 8] = (int16_t) - (int)(k * bits & 7); /* eight codes are whole bytes: both halves shift alike */
    }
    const uint8x16_t v = vld1q_u8(packed);
    const int16x8_t shift = vld1q_s16(down);
    const uint16x8_t a = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(v, vld1q_u8(from[0]))), shift), b = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(v, vld1q_u8(from[1]))), shift);
    return vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b)), vdupq_n_u8((uint8_t)((1u << bits) - 1)));
}

CV_INLINE void decode_affine(const cv_weight *w, const uint8_t *row, const uint8_t *scales, const uint8_t *biases, unsigned bits, float *out) {
    for (size_t g = 0; g < w->cols / w->group; g++) {
        const v16 s = v16_set(cv_scale_to_f32(scales, g, w->scale_type)), b = v16_set(cv_scale_to_f32(biases, g, w->scale_type));
        for (size_t k = g * w->group; k < (g + 1) * w->group; k += 16) v16_store(out + k, v16_fma(v16_from_bytes(codes16(row + k * bits / 8, bits)), s, b));
    }
}

/* E2M1 values are bfloat16 with few bits: tables give the two bytes. */
CV_INLINE v16 from_e2m1(uint8x16_t codes) {
    static const uint8_t low[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
    static const uint8_t high[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
    const uint8x16_t l = vqtbl1q_u8(vld1q_u8(low), codes), h = vqtbl1q_u8(vld1q_u8(high), codes);
    return v16_widen(vreinterpretq_u16_u8(vzip1q_u8(l, h)), vreinterpretq_u16_u8(vzip2q_u8(l, h)), CV_BF16);
}

/* E4M3 but NaN: as float16 the bits mean 2^-8 of the value, subnormals too. */
CV_INLINE uint16x8_t e4m3_as_f16(uint8x8_t b) {
    const int16x8_t top = vreinterpretq_s16_u16(vshll_n_u8(b, 8));
    return vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(top, 1)), vdupq_n_u16(0xbfff));
}
CV_INLINE v16 from_e4m3(uint8x16_t b) {
    return v16_mul(v16_widen(e4m3_as_f16(vget_low_u8(b)), e4m3_as_f16(vget_high_u8(b)), CV_F16), v16_set(256.0f));
}

CV_INLINE void decode_small_float(const cv_weight *w, const uint8_t *row, const uint8_t *scales, const float *global, unsigned bits, float *out) {
    for (size_t g = 0; g < w->cols / w->group; g++) {
        const v16 s = v16_set(cv_scale_to_f32(scales, g, w->scale_type));
        for (size_t k = g * w->group; k < (g + 1) * w->group; k += 16) {
            const uint8x16_t codes = codes16(row + k * bits / 8, bits);
            v16 v = v16_mul(bits == 4 ? from_e2m1(codes) : from_e4m3(codes), s);
            if (global) v = v16_mul(v, v16_set(*global));
            v16_store(out + k, v);
        }
    }
}

/* Whether a row of E4M3 codes (a multiple of 16) has a NaN, which the fast path does not know. */
static bool has_nan_e4m3(const uint8_t *row, size_t cols) {
    uint8x16_t found = vdupq_n_u8(0);
    for (size_t k = 0; k < cols; k += 16) found = vorrq_u8(found, vceqq_u8(vandq_u8(vld1q_u8(row + k), vdupq_n_u8(0x7f)), vdupq_n_u8(0x7f)));
    return vmaxvq_u8(found) != 0;
}

CV_INLINE void widen_row(const uint8_t *row, uint32_t type, size_t cols, float *out) {
    size_t k = 0;
    for (; k + 16 <= cols; k += 16) v16_store(out + k, v16_load_as(row, k, type));
    if (k < cols) v16_store(out + k, v16_load_part_as(row, k, type, cols - k));
}

/* Affine and small float formats whose groups are whole vectors; false for others. */
static bool decode_groups(const cv_weight *w, size_t e, size_t r, const uint8_t *row, float *out) {
    if (w->group == 0 || w->group % 16 || w->cols % w->group) return false;
    const size_t at = e * w->expert_scale_bytes + r * w->scale_row_bytes;
    const uint8_t *scales = w->scales + at;
    if (w->format == CV_FORMAT_AFFINE) {
        const uint8_t *biases = w->biases + at;
        switch (w->bits) {
        case 2: decode_affine(w, row, scales, biases, 2, out); return true;
        case 3: decode_affine(w, row, scales, biases, 3, out); return true;
        case 4: decode_affine(w, row, scales, biases, 4, out); return true;
        case 5: decode_affine(w, row, scales, biases, 5, out); return true;
        case 6: decode_affine(w, row, scales, biases, 6, out); return true;
        case 8: decode_affine(w, row, scales, biases, 8, out); return true;
        default: return false;
        }
    }
    if (w->format == CV_FORMAT_MXFP8) {
        if (has_nan_e4m3(row, w->cols)) return false;
        decode_small_float(w, row, scales, NULL, 8, out);
    } else {
        const float global = w->global_scale ? w->global_scale[e] / (448.0f * 6.0f) : 1.0f;
        decode_small_float(w, row, scales, w->global_scale ? &global : NULL, 4, out);
    }
    return true;
}

void cv_neon_decode_row(const cv_weight *w, size_t e, size_t r, float *out) {
    const uint8_t *row = w->data + e * w->expert_bytes + r * w->row_bytes;
    if (w->format == CV_FORMAT_F32) widen_row(row, CV_F32, w->cols, out);
    else if (w->format == CV_FORMAT_F16) widen_row(row, CV_F16, w->cols, out);
    else if (w->format == CV_FORMAT_BF16) widen_row(row, CV_BF16, w->cols, out);
    else if (!decode_groups(w, e, r, row, out)) cv_decode_row_scalar(w, e, r, out);
}

#endif
