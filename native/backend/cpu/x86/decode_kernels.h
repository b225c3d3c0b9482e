/* decode_kernels.h — weights of every format as float32, sixteen columns at a time. Included after a vec16 header. */
#ifndef CV_X86_DECODE_KERNELS_H
#define CV_X86_DECODE_KERNELS_H

#include <string.h>

#include "../number_formats.h"
#include "../scalar.h"

/* Sixteen codes of 2 to 8 bits as bytes; reads 2*bits bytes. bits is a constant where this is inlined. */
CV_INLINE __m128i codes16(const uint8_t *p, unsigned bits) {
    if (bits == 8) return _mm_loadu_si128((const __m128i *)(const void *)p);
    uint64_t first = 0, rest = 0;
    memcpy(&first, p, bits < 4 ? 2 * bits : 8);
    if (bits == 4) {
        const __m128i v = _mm_cvtsi64_si128((int64_t)first);
        return _mm_and_si128(_mm_unpacklo_epi8(v, _mm_srli_epi16(v, 4)), _mm_set1_epi8(0x0f));
    }
    memcpy(&rest, p + 8, bits > 4 ? 2 * bits - 8 : 0);
    /* The two bytes in which a code lies go to its word; a multiplication moves the code to the word's upper byte. */
    const __m128i v = _mm_set_epi64x((int64_t)rest, (int64_t)first);
    uint8_t from[2][16];
    uint16_t up[8];
    for (unsigned k = 0; k < 16; k++) {
        from[k / 8][k % 8 * 2] = (uint8_t)(k * bits / 8);
        from[k / 8][k % 8 * 2 + 1] = (uint8_t)(k * bits / 8 + 1);
        up[k % 8] = (uint16_t)(256u >> (k * bits & 7)); /* eight codes are whole bytes: both halves shift alike */
    }
    __m128i index[2], shift, word[2];
    memcpy(index, from, sizeof index);
    memcpy(&shift, up, sizeof shift);
    for (int i = 0; i < 2; i++)
        word[i] = _mm_and_si128(_mm_srli_epi16(_mm_mullo_epi16(_mm_shuffle_epi8(v, index[i]), shift), 8), _mm_set1_epi16((short)((1u << bits) - 1)));
    return _mm_packus_epi16(word[0], word[1]);
}

CV_INLINE void decode_affine(const cv_weight *w, const uint8_t *row, const uint8_t *scales, const uint8_t *biases, unsigned bits, float *out) {
    for (size_t g = 0; g < w->cols / w->group; g++) {
        const v16 s = v16_set(cv_scale_to_f32(scales, g, w->scale_type)), b = v16_set(cv_scale_to_f32(biases, g, w->scale_type));
        for (size_t k = g * w->group; k < (g + 1) * w->group; k += 16) v16_store(out + k, v16_fma(v16_from_bytes(codes16(row + k * bits / 8, bits)), s, b));
    }
}

/* E2M1: twice the size from a table, the sign from the code's top bit. */
CV_INLINE v16 from_e2m1(__m128i codes) {
    const __m128i twice = _mm_set_epi8(12, 8, 6, 4, 3, 2, 1, 0, 12, 8, 6, 4, 3, 2, 1, 0);
    return v16_negate_where(v16_mul(v16_from_bytes(_mm_shuffle_epi8(twice, codes)), v16_set(0.5f)), _mm_slli_epi16(codes, 4));
}

CV_INLINE void decode_small_float(const cv_weight *w, const uint8_t *row, const uint8_t *scales, const float *global, unsigned bits, float *out) {
    for (size_t g = 0; g < w->cols / w->group; g++) {
        const v16 s = v16_set(cv_scale_to_f32(scales, g, w->scale_type));
        for (size_t k = g * w->group; k < (g + 1) * w->group; k += 16) {
            const __m128i codes = codes16(row + k * bits / 8, bits);
            v16 v = v16_mul(bits == 4 ? from_e2m1(codes) : v16_from_e4m3(codes), s);
            if (global) v = v16_mul(v, v16_set(*global));
            v16_store(out + k, v);
        }
    }
}

/* Whether a row of E4M3 codes has a NaN, which the fast path does not know. */
CV_INLINE bool has_nan_e4m3(const uint8_t *row, size_t cols) {
    __m128i found = _mm_setzero_si128();
    const __m128i nan = _mm_set1_epi8(0x7f);
    for (size_t k = 0; k < cols; k += 16) found = _mm_or_si128(found, _mm_cmpeq_epi8(_mm_and_si128(_mm_loadu_si128((const __m128i *)(const void *)(row + k)), nan), nan));
    return _mm_movemask_epi8(found) != 0;
}

CV_INLINE v16 load_weight(const uint8_t *row, size_t k, uint32_t format) {
    if (format == CV_FORMAT_F32) return v16_load((const float *)(const void *)(row + 4 * k));
    return v16_load16((const uint16_t *)(const void *)(row + 2 * k), format == CV_FORMAT_F16 ? CV_F16 : CV_BF16);
}

CV_INLINE v16 load_weight_part(const uint8_t *row, size_t k, uint32_t format, size_t n) {
    if (format == CV_FORMAT_F32) return v16_load_part((const float *)(const void *)(row + 4 * k), n);
    return v16_load16_part((const uint16_t *)(const void *)(row + 2 * k), format == CV_FORMAT_F16 ? CV_F16 : CV_BF16, n);
}

CV_INLINE void widen_row(const uint8_t *row, uint32_t format, size_t cols, float *out) {
    size_t k = 0;
    for (; k + 16 <= cols; k += 16) v16_store(out + k, load_weight(row, k, format));
    if (k < cols) v16_store(out + k, load_weight_part(row, k, format, cols - k));
}

/* Affine and small float formats whose groups are whole vectors; false for others. */
CV_INLINE bool decode_groups(const cv_weight *w, size_t e, size_t r, const uint8_t *row, float *out) {
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

CV_TARGET static void decode_row(const cv_weight *w, size_t e, size_t r, float *out) {
    const uint8_t *row = w->data + e * w->expert_bytes + r * w->row_bytes;
    if (w->format == CV_FORMAT_F32) widen_row(row, CV_FORMAT_F32, w->cols, out);
    else if (w->format == CV_FORMAT_F16) widen_row(row, CV_FORMAT_F16, w->cols, out);
    else if (w->format == CV_FORMAT_BF16) widen_row(row, CV_FORMAT_BF16, w->cols, out);
    else if (!decode_groups(w, e, r, row, out)) cv_decode_row_scalar(w, e, r, out);
}

#endif
