/* vec16_avx2.h — sixteen float32 lanes as two ymm registers, lanes 0–7 and 8–15. The names are those of vec16_avx512.h. */
#ifndef CV_X86_VEC16_H
#define CV_X86_VEC16_H

#include <immintrin.h>
#include <string.h>

#include "../kernels.h"

#define CV_TARGET __attribute__((target("avx2,fma,f16c")))
#define CV_INLINE static inline __attribute__((always_inline)) CV_TARGET

typedef struct { __m256 a, b; } v16;

enum { V16_BLOCK = 1, V16_SCORES = 1, V16_VALUES = 2, V16_WIDE = 2 };

#define V16_EACH(f, x, y) ((v16){f((x).a, (y).a), f((x).b, (y).b)})

CV_INLINE __m256i v16_first8(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : (int)n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

CV_INLINE v16 v16_set(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
CV_INLINE v16 v16_zero(void) { return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
CV_INLINE v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
CV_INLINE v16 v16_load_part(const float *p, size_t n) {
    return (v16){_mm256_maskload_ps(p, v16_first8(n)), n > 8 ? _mm256_maskload_ps(p + 8, v16_first8(n - 8)) : _mm256_setzero_ps()};
}
CV_INLINE void v16_store(float *p, v16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
CV_INLINE void v16_store_part(float *p, v16 x, size_t n) {
    _mm256_maskstore_ps(p, v16_first8(n), x.a);
    if (n > 8) _mm256_maskstore_ps(p + 8, v16_first8(n - 8), x.b);
}
CV_INLINE v16 v16_keep(v16 x, size_t n) {
    return (v16){_mm256_and_ps(x.a, _mm256_castsi256_ps(v16_first8(n))), _mm256_and_ps(x.b, _mm256_castsi256_ps(v16_first8(n > 8 ? n - 8 : 0)))};
}

CV_INLINE v16 v16_add(v16 x, v16 y) { return V16_EACH(_mm256_add_ps, x, y); }
CV_INLINE v16 v16_sub(v16 x, v16 y) { return V16_EACH(_mm256_sub_ps, x, y); }
CV_INLINE v16 v16_mul(v16 x, v16 y) { return V16_EACH(_mm256_mul_ps, x, y); }
CV_INLINE v16 v16_div(v16 x, v16 y) { return V16_EACH(_mm256_div_ps, x, y); }
CV_INLINE v16 v16_max(v16 x, v16 y) { return V16_EACH(_mm256_max_ps, x, y); }
CV_INLINE v16 v16_min(v16 x, v16 y) { return V16_EACH(_mm256_min_ps, x, y); }
CV_INLINE v16 v16_fma(v16 x, v16 y, v16 z) { return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
CV_INLINE v16 v16_fms(v16 x, v16 y, v16 z) { return (v16){_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)}; }
CV_INLINE v16 v16_fmas(v16 x, v16 y, v16 z) { return (v16){_mm256_fmaddsub_ps(x.a, y.a, z.a), _mm256_fmaddsub_ps(x.b, y.b, z.b)}; }
CV_INLINE v16 v16_negate(v16 x) { return V16_EACH(_mm256_xor_ps, x, v16_set(-0.0f)); }
CV_INLINE v16 v16_abs(v16 x) { return V16_EACH(_mm256_andnot_ps, v16_set(-0.0f), x); }
CV_INLINE __m256 v8_round(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
CV_INLINE v16 v16_round(v16 x) { return (v16){v8_round(x.a), v8_round(x.b)}; }
CV_INLINE __m256 v8_pow2(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
CV_INLINE v16 v16_pow2(v16 n) { return (v16){v8_pow2(n.a), v8_pow2(n.b)}; }
CV_INLINE uint32_t v16_equal(v16 x, v16 y) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ)) | (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)) << 8;
}
CV_INLINE float v16_largest(v16 x) {
    const __m256 m8 = _mm256_max_ps(x.a, x.b);
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

CV_INLINE __m256 v8_load_twice(const float *p) {
    const __m128 v = _mm_loadu_ps(p);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_unpacklo_ps(v, v)), _mm_unpackhi_ps(v, v), 1);
}
CV_INLINE v16 v16_load_twice(const float *p) { return (v16){v8_load_twice(p), v8_load_twice(p + 4)}; }
CV_INLINE v16 v16_swap_pairs(v16 x) { return (v16){_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }

CV_INLINE __m256 v8_load16(const uint16_t *p, uint32_t type) {
    const __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return type == CV_F16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
CV_INLINE v16 v16_load16(const uint16_t *p, uint32_t type) { return (v16){v8_load16(p, type), v8_load16(p + 8, type)}; }
CV_INLINE v16 v16_load16_part(const uint16_t *p, uint32_t type, size_t n) {
    uint16_t whole[16] = {0};
    memcpy(whole, p, n * sizeof *p);
    return v16_load16(whole, type);
}
CV_INLINE void v16_store_f16(uint16_t *p, v16 x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(void *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CV_INLINE __m256i v8_bf16(__m256 x) {
    const __m256i u = _mm256_castps_si256(x), top = _mm256_srli_epi32(u, 16);
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), _mm256_and_si256(top, _mm256_set1_epi32(1))), 16);
    return _mm256_blendv_epi8(r, _mm256_or_si256(top, _mm256_set1_epi32(64)), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
CV_INLINE void v16_store_bf16(uint16_t *p, v16 x) {
    const __m256i mixed = _mm256_packus_epi32(v8_bf16(x.a), v8_bf16(x.b)); /* quarters a0 b0 a1 b1 */
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}

CV_INLINE v16 v16_from_bytes(__m128i x) {
    return (v16){_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
CV_INLINE __m256 v8_negate_where(__m256 x, __m128i bytes) {
    return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_set1_ps(-0.0f)));
}
CV_INLINE v16 v16_negate_where(v16 x, __m128i bytes) { return (v16){v8_negate_where(x.a, bytes), v8_negate_where(x.b, _mm_srli_si128(bytes, 8))}; }
CV_INLINE v16 v16_from_e4m3(__m128i bytes) {
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(0x7f));
    const v16 x = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(low), 20)), _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)), 20))};
    return v16_negate_where(v16_mul(x, v16_set(0x1p120f)), bytes);
}
CV_INLINE int32_t v16_store_int8(int8_t *p, v16 x) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b), words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm_storeu_si128((__m128i *)(void *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    const __m256i ab = _mm256_add_epi32(a, b);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(ab), _mm256_extracti128_si256(ab, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

CV_INLINE float v16_tree(v16 x) {
    const __m256 s8 = _mm256_add_ps(x.a, x.b);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
CV_INLINE __m128 v16_tree4(v16 x, v16 y, v16 z, v16 w) {
    const __m256 x8 = _mm256_add_ps(x.a, x.b), y8 = _mm256_add_ps(y.a, y.b), z8 = _mm256_add_ps(z.a, z.b), w8 = _mm256_add_ps(w.a, w.b);
    const __m256 xz = _mm256_add_ps(_mm256_permute2f128_ps(x8, z8, 0x20), _mm256_permute2f128_ps(x8, z8, 0x31)); /* lanes x z */
    const __m256 yw = _mm256_add_ps(_mm256_permute2f128_ps(y8, w8, 0x20), _mm256_permute2f128_ps(y8, w8, 0x31)); /* lanes y w */
    const __m256 s2 = _mm256_add_ps(_mm256_shuffle_ps(xz, yw, 0x44), _mm256_shuffle_ps(xz, yw, 0xee));           /* x x y y, z z w w */
    const __m256 s1 = _mm256_add_ps(_mm256_shuffle_ps(s2, s2, 0x88), _mm256_shuffle_ps(s2, s2, 0xdd));           /* x y x y, z w z w */
    return _mm_movelh_ps(_mm256_castps256_ps128(s1), _mm256_extractf128_ps(s1, 1));
}

#endif
