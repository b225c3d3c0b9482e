/* vec16_avx512.h — sixteen float32 lanes as one zmm register: the vocabulary in which float_kernels.h and
 * attention_kernels.h are written. vec16_avx2.h says the same with two ymm registers. */
#ifndef CV_X86_VEC16_H
#define CV_X86_VEC16_H

#include <immintrin.h>

#include "../kernels.h"

#define CV_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,avx2")))
#define CV_INLINE static inline __attribute__((always_inline)) CV_TARGET

typedef __m512 v16;

/* How many accumulators fit the registers: fmatmul keeps 4 x V16_BLOCK of them, attn_scores 4 keys x V16_SCORES queries,
 * attn_values V16_VALUES queries x V16_WIDE vectors of a head. Llama 4 has five queries to a key. */
enum { V16_BLOCK = 4, V16_SCORES = 5, V16_VALUES = 5, V16_WIDE = 4 };

CV_INLINE __mmask16 v16_first(size_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

CV_INLINE v16 v16_zero(void) { return _mm512_setzero_ps(); }
CV_INLINE v16 v16_set(float x) { return _mm512_set1_ps(x); }
CV_INLINE v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
CV_INLINE v16 v16_load_part(const float *p, size_t n) { return _mm512_maskz_loadu_ps(v16_first(n), p); } /* lanes from n on: 0 */
CV_INLINE void v16_store(float *p, v16 x) { _mm512_storeu_ps(p, x); }
CV_INLINE void v16_store_part(float *p, v16 x, size_t n) { _mm512_mask_storeu_ps(p, v16_first(n), x); }
CV_INLINE v16 v16_keep(v16 x, size_t n) { return _mm512_maskz_mov_ps(v16_first(n), x); }

CV_INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
CV_INLINE v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
CV_INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
CV_INLINE v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
CV_INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }  /* a*b + c */
CV_INLINE v16 v16_fms(v16 a, v16 b, v16 c) { return _mm512_fmsub_ps(a, b, c); }  /* a*b - c */
CV_INLINE v16 v16_fmas(v16 a, v16 b, v16 c) { return _mm512_fmaddsub_ps(a, b, c); } /* even lanes a*b - c, odd a*b + c */
CV_INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }              /* b where either is NaN */
CV_INLINE v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
CV_INLINE v16 v16_negate(v16 a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
CV_INLINE v16 v16_abs(v16 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
CV_INLINE v16 v16_round(v16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^n for whole n in the range of normal numbers. */
CV_INLINE v16 v16_pow2(v16 n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)); }
CV_INLINE uint32_t v16_equal(v16 a, v16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); } /* a bit a lane */
CV_INLINE float v16_largest(v16 a) { return _mm512_reduce_max_ps(a); }

/* Lanes (p0 p0 p1 p1 … p7 p7), and every pair of lanes swapped. */
CV_INLINE v16 v16_load_twice(const float *p) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
CV_INLINE v16 v16_swap_pairs(v16 a) { return _mm512_permute_ps(a, 0xb1); }

/* Sixteen half or bfloat16 numbers, the first n of them, and back. */
CV_INLINE v16 v16_widen(__m256i h, uint32_t type) { return type == CV_F16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
CV_INLINE v16 v16_load16(const uint16_t *p, uint32_t type) { return v16_widen(_mm256_loadu_si256((const __m256i *)(const void *)p), type); }
CV_INLINE v16 v16_load16_part(const uint16_t *p, uint32_t type, size_t n) { return v16_widen(_mm256_maskz_loadu_epi16(v16_first(n), p), type); }
CV_INLINE void v16_store_f16(uint16_t *p, v16 x) { _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
CV_INLINE void v16_store_bf16(uint16_t *p, v16 x) {
    const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(64));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(r));
}

/* Sixteen unsigned bytes as floats; sixteen floats of at most 127 in size rounded to int8, their sum returned. */
CV_INLINE v16 v16_from_bytes(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)); }
/* x, negated where the top bit of a byte is set. */
CV_INLINE v16 v16_negate_where(v16 x, __m128i bytes) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_and_si512(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(INT32_MIN))));
}
/* E4M3's seven low bits as exponent and fraction of a float32 whose exponent is 120 too small. */
CV_INLINE v16 v16_from_e4m3(__m128i bytes) {
    const __m512i low = _mm512_cvtepu8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(0x7f)));
    return v16_negate_where(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(low, 20)), _mm512_set1_ps(0x1p120f)), bytes);
}
CV_INLINE int32_t v16_store_int8(int8_t *p, v16 x) {
    const __m512i v = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(v));
    return _mm512_reduce_add_epi32(v);
}

/* The contract's tree over sixteen lanes, of one vector or of four at once. */
CV_INLINE float v16_tree(v16 a) {
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
CV_INLINE __m128 v16_tree4(v16 a, v16 b, v16 c, v16 d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    const __m512 s4 = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd)); /* lanes a b c d */
    const __m512 s2 = _mm512_add_ps(s4, _mm512_permute_ps(s4, 0x4e));
    const __m512 s1 = _mm512_add_ps(s2, _mm512_permute_ps(s2, 0xb1));
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), s1));
}

#endif
