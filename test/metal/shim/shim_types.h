// shim_types.h — scalar and vector types, type traits, construction of vectors, numeric limits.

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
constexpr half operator""h(long double x) { return (half)x; }

#define MSL_VECTORS(T)                                       \
  typedef T T##2 __attribute__((ext_vector_type(2)));        \
  typedef T T##3 __attribute__((ext_vector_type(3)));        \
  typedef T T##4 __attribute__((ext_vector_type(4)));
#define MSL_VECTOR_ELEMENTS(X) X(bool) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(float) X(bfloat)
MSL_VECTOR_ELEMENTS(MSL_VECTORS)
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));

namespace metal {
using ::vec;
#define MSL_USING(T) using ::T##2; using ::T##3; using ::T##4;
MSL_VECTOR_ELEMENTS(MSL_USING)
using ::bfloat; using ::half; using ::size_t; using ::uchar; using ::uint; using ::ulong; using ::ushort;

template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class X, class Y> struct conditional { using type = X; };
template <class X, class Y> struct conditional<false, X, Y> { using type = Y; };
template <bool B, class X, class Y> using conditional_t = typename conditional<B, X, Y>::type;
template <class T> struct remove_cv { using type = T; };
template <class T> struct remove_cv<const T> { using type = T; };
template <class T> struct remove_cv<volatile T> { using type = T; };
template <class T> struct remove_cv<const volatile T> { using type = T; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;

// Types that have math functions: bfloat has none.
template <class T> constexpr bool msl_is_float = is_same_v<T, float> || is_same_v<T, half>;
template <class T> constexpr bool msl_is_int = is_same_v<T, char> || is_same_v<T, signed char> || is_same_v<T, uchar> || is_same_v<T, short> || is_same_v<T, ushort> ||
                                               is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, long> || is_same_v<T, ulong>;

// Element type and length of scalars and vectors; `like<U>`: the same length of another type.
template <class T> struct msl_shape { using element = T; static constexpr int n = 1; template <class U> using like = U; };
#define MSL_SHAPE(N) template <class T> struct msl_shape<T __attribute__((ext_vector_type(N)))> { using element = T; static constexpr int n = N; template <class U> using like = vec<U, N>; };
MSL_SHAPE(2) MSL_SHAPE(3) MSL_SHAPE(4)
template <class T> using msl_element = typename msl_shape<T>::element;
template <class T> MSL_INLINE msl_element<T> msl_get(const T& v, int i) { if constexpr (msl_shape<T>::n == 1) return v; else return v[i]; }
template <class T> MSL_INLINE void msl_put(T& v, int i, msl_element<T> x) { if constexpr (msl_shape<T>::n == 1) v = x; else v[i] = x; }

// float4(a, b.xy, c), int2(float2), float4(x): shim_constructors.h maps the names to this.
template <class V, class... A> MSL_INLINE constexpr V msl_construct(A... a) {
  using E = msl_element<V>;
  constexpr int N = msl_shape<V>::n;
  if constexpr (sizeof...(A) == 0) {
    return V(E(0));
  } else if constexpr (sizeof...(A) == 1) {
    constexpr int length = (msl_shape<A>::n + ...);
    if constexpr (length == 1) return V((E(a), ...));
    else {
      static_assert(length == N, "vector construction from a vector of another length");
      return __builtin_convertvector((a, ...), V);
    }
  } else {
    static_assert((msl_shape<A>::n + ...) == N, "wrong number of components in vector constructor");
    V r = V(E(0));
    int k = 0;
    auto append = [&](auto x) {
      if constexpr (msl_shape<decltype(x)>::n == 1) r[k++] = E(x);
      else for (int i = 0; i < msl_shape<decltype(x)>::n; i++) r[k++] = E(x[i]);
    };
    (append(a), ...);
    return r;
  }
}
template <class To, class From> MSL_INLINE To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: size mismatch");
  return __builtin_bit_cast(To, f);
}

template <class T> struct numeric_limits;
#define MSL_LIMITS_INT(T, lo, hi) template <> struct numeric_limits<T> { static constexpr T min() { return lo; } static constexpr T max() { return hi; } static constexpr T lowest() { return lo; } };
MSL_LIMITS_INT(char, -128, 127) MSL_LIMITS_INT(uchar, 0, 255) MSL_LIMITS_INT(short, -32768, 32767) MSL_LIMITS_INT(ushort, 0, 65535)
MSL_LIMITS_INT(int, (-2147483647 - 1), 2147483647) MSL_LIMITS_INT(uint, 0, 4294967295u)
#define MSL_LIMITS_FLOAT(T, mn, mx, ep) template <> struct numeric_limits<T> { static constexpr T min() { return (T)mn; } static constexpr T max() { return (T)mx; } static constexpr T lowest() { return (T)-mx; } static constexpr T epsilon() { return (T)ep; } static constexpr T infinity() { return (T)__builtin_inff(); } };
MSL_LIMITS_FLOAT(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f) MSL_LIMITS_FLOAT(half, 0x1p-14f, 65504.f, 0x1p-10f) MSL_LIMITS_FLOAT(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f)
}  // namespace metal

#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define HALF_MAX 65504.0h
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
