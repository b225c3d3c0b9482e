// shim_math.h — math over float, half and their vectors; integer functions. Arguments of one call have one type: where Metal
// says "ambiguous", so does this. Results are correctly rounded or libm's, which Apple's fast math does not promise.

namespace metal {
#define MSL_IF_FLOAT(T) enable_if_t<msl_is_float<msl_element<T>>, int> = 0
#define MSL_MATH1(name, expr)                                             \
  template <class T, MSL_IF_FLOAT(T)> MSL_INLINE T name(T a) {            \
    T r;                                                                  \
    for (int i = 0; i < msl_shape<T>::n; i++) {                           \
      float x = (float)msl_get(a, i);                                     \
      msl_put(r, i, (msl_element<T>)(expr));                              \
    }                                                                     \
    return r;                                                             \
  }
#define MSL_MATH2(name, expr)                                             \
  template <class T, MSL_IF_FLOAT(T)> MSL_INLINE T name(T a, T b) {       \
    T r;                                                                  \
    for (int i = 0; i < msl_shape<T>::n; i++) {                           \
      float x = (float)msl_get(a, i), y = (float)msl_get(b, i);           \
      msl_put(r, i, (msl_element<T>)(expr));                              \
    }                                                                     \
    return r;                                                             \
  }
#define MSL_MATH1_ALL(X)                                                                                                  \
  X(exp, expf(x)) X(exp2, exp2f(x)) X(log, logf(x)) X(log2, log2f(x)) X(sin, sinf(x)) X(cos, cosf(x)) X(tanh, tanhf(x))  \
  X(sqrt, __builtin_sqrtf(x)) X(rsqrt, 1.f / __builtin_sqrtf(x)) X(fabs, __builtin_fabsf(x)) X(floor, __builtin_floorf(x)) \
  X(ceil, __builtin_ceilf(x)) X(trunc, __builtin_truncf(x)) X(rint, __builtin_rintf(x)) X(round, __builtin_roundf(x))    \
  X(sign, x > 0 ? 1.f : x < 0 ? -1.f : 0.f) X(saturate, x < 0 ? 0.f : x > 1 ? 1.f : x)
#define MSL_MATH2_ALL(X) X(pow, powf(x, y)) X(fmod, fmodf(x, y)) X(copysign, __builtin_copysignf(x, y)) X(fmin, __builtin_fminf(x, y)) X(fmax, __builtin_fmaxf(x, y))
MSL_MATH1_ALL(MSL_MATH1) MSL_MATH2_ALL(MSL_MATH2)

#define MSL_FLOAT_ONLY1(name, expr) template <class T> MSL_INLINE enable_if_t<is_same_v<msl_element<T>, float>, T> name(T a) { return metal::name(a); }
#define MSL_FLOAT_ONLY2(name, expr) template <class T> MSL_INLINE enable_if_t<is_same_v<msl_element<T>, float>, T> name(T a, T b) { return metal::name(a, b); }
namespace fast { MSL_MATH1_ALL(MSL_FLOAT_ONLY1) MSL_MATH2_ALL(MSL_FLOAT_ONLY2) }
namespace precise { MSL_MATH1_ALL(MSL_FLOAT_ONLY1) MSL_MATH2_ALL(MSL_FLOAT_ONLY2) }

template <class T, MSL_IF_FLOAT(T)> MSL_INLINE T fma(T a, T b, T c) {
  T r;
  for (int i = 0; i < msl_shape<T>::n; i++) msl_put(r, i, (msl_element<T>)__builtin_fmaf((float)msl_get(a, i), (float)msl_get(b, i), (float)msl_get(c, i)));
  return r;
}

template <class T> constexpr bool msl_is_number = msl_is_float<msl_element<T>> || msl_is_int<msl_element<T>>;
#define MSL_IF_NUMBER(T) enable_if_t<msl_is_number<T>, int> = 0
template <class T, MSL_IF_NUMBER(T)> MSL_INLINE T min(T a, T b) {
  T r;
  for (int i = 0; i < msl_shape<T>::n; i++) {
    auto x = msl_get(a, i), y = msl_get(b, i);
    msl_put(r, i, y < x ? y : x);
  }
  return r;
}
template <class T, MSL_IF_NUMBER(T)> MSL_INLINE T max(T a, T b) {
  T r;
  for (int i = 0; i < msl_shape<T>::n; i++) {
    auto x = msl_get(a, i), y = msl_get(b, i);
    msl_put(r, i, x < y ? y : x);
  }
  return r;
}
template <class T, MSL_IF_NUMBER(T)> MSL_INLINE T clamp(T x, T lo, T hi) { return metal::min(metal::max(x, lo), hi); }
template <class T, MSL_IF_NUMBER(T)> MSL_INLINE T abs(T a) {
  T r;
  for (int i = 0; i < msl_shape<T>::n; i++) {
    auto x = msl_get(a, i);
    msl_put(r, i, x < 0 ? (msl_element<T>)-x : x);
  }
  return r;
}
template <class T> MSL_INLINE enable_if_t<msl_is_float<T>, bool> isnan(T x) { return __builtin_isnan((float)x); }
template <class T> MSL_INLINE enable_if_t<msl_is_float<T>, bool> isinf(T x) { return __builtin_isinf((float)x); }
template <class T> MSL_INLINE enable_if_t<msl_is_float<T>, bool> isfinite(T x) { return __builtin_isfinite((float)x); }
template <class T, class B> MSL_INLINE T select(T a, T b, B c) {
  static_assert(msl_shape<T>::n == msl_shape<B>::n, "select: lengths differ");
  T r;
  for (int i = 0; i < msl_shape<T>::n; i++) msl_put(r, i, msl_get(c, i) ? msl_get(b, i) : msl_get(a, i));
  return r;
}
template <class T> MSL_INLINE enable_if_t<(msl_shape<T>::n > 1) && msl_is_float<msl_element<T>>, msl_element<T>> dot(T a, T b) {
  msl_element<T> s = 0;
  for (int i = 0; i < msl_shape<T>::n; i++) s += a[i] * b[i];
  return s;
}
MSL_INLINE uint popcount(uint x) { return (uint)__builtin_popcount(x); }
MSL_INLINE uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32u; }
MSL_INLINE uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32u; }
}  // namespace metal
