// shim_simdgroup.h — barriers, and operations among the 32 lanes of a simdgroup. A value read from a lane that does not take
// part is poison (all bits set, a NaN), as Metal leaves it undefined.

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_INLINE void threadgroup_barrier(mem_flags flags, MSL_SITE) { msl_threadgroup_barrier((uint)flags, site); }
MSL_INLINE void simdgroup_barrier(mem_flags flags, MSL_SITE) { msl_simdgroup_barrier((uint)flags, site); }

// Metal has no simdgroup functions of bfloat or of 64-bit types.
template <class T> constexpr bool msl_simd_type = msl_is_number<T> && sizeof(msl_element<T>) <= 4;
#define MSL_IF_SIMD(T) enable_if_t<msl_simd_type<T>, int> = 0
template <class T> MSL_INLINE T msl_poison() { T r; __builtin_memset(&r, 0xFF, sizeof(T)); return r; }

// A tree over lane distances 16, 8, 4, 2, 1. (The order of Apple's hardware is not documented.)
template <class T, class Join> struct msl_reduction {
  MSL_EXECUTOR_SIDE static void run(msl_lane_op* lanes, uint mask) {
    T v[32];
    bool on[32];
    Join join;
    for (int i = 0; i < 32; i++) {
      on[i] = mask >> i & 1;
      if (on[i]) v[i] = *(const T*)lanes[i].in;
    }
    for (int step = 16; step; step >>= 1)
      for (int i = 0; i < step; i++)
        if (on[i + step]) {
          v[i] = on[i] ? join(v[i], v[i + step]) : v[i + step];
          on[i] = true;
        }
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) *(T*)lanes[i].out = v[0];
  }
};
#define MSL_REDUCTION(name, expr, condition)                                                        \
  template <class T> struct msl_join_##name { MSL_EXECUTOR_SIDE T operator()(T a, T b) const { return expr; } }; \
  template <class T, enable_if_t<(condition), int> = 0> MSL_INLINE T name(T x, MSL_SITE) {          \
    T r;                                                                                            \
    msl_simd_op(#name, site, false, &x, &r, 0, msl_reduction<T, msl_join_##name<T>>::run);          \
    return r;                                                                                       \
  }
MSL_REDUCTION(simd_sum, T(a + b), msl_simd_type<T>)
MSL_REDUCTION(simd_max, metal::max(a, b), msl_simd_type<T>)
MSL_REDUCTION(simd_min, metal::min(a, b), msl_simd_type<T>)
MSL_REDUCTION(simd_and, T(a & b), msl_simd_type<T> && msl_is_int<msl_element<T>>)
MSL_REDUCTION(simd_or, T(a | b), msl_simd_type<T> && msl_is_int<msl_element<T>>)

// arg: the lane to read from; -1 and others outside 0..31 give poison.
template <class T> struct msl_shuffle {
  MSL_EXECUTOR_SIDE static void run(msl_lane_op* lanes, uint mask) {
    T v[32];
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) v[i] = *(const T*)lanes[i].in;
    for (int i = 0; i < 32; i++) {
      if (!(mask >> i & 1)) continue;
      int from = *(const int*)lanes[i].arg;
      *(T*)lanes[i].out = from >= 0 && from < 32 && (mask >> from & 1) ? v[from] : msl_poison<T>();
    }
  }
};
#define MSL_SHUFFLE(name, source)                                                  \
  template <class T, MSL_IF_SIMD(T)> MSL_INLINE T name(T x, ushort k, MSL_SITE) {  \
    int lane = (int)msl_lane(), from = (source);                                   \
    (void)lane;                                                                    \
    T r;                                                                           \
    msl_simd_op(#name, site, false, &x, &r, &from, msl_shuffle<T>::run);           \
    return r;                                                                      \
  }
MSL_SHUFFLE(simd_shuffle, (int)k)
MSL_SHUFFLE(simd_broadcast, (int)k)
MSL_SHUFFLE(simd_shuffle_xor, lane ^ (int)k)
MSL_SHUFFLE(simd_shuffle_down, lane + (int)k)
MSL_SHUFFLE(simd_shuffle_up, lane - (int)k)

template <class T> struct msl_exclusive_sum {
  MSL_EXECUTOR_SIDE static void run(msl_lane_op* lanes, uint mask) {
    T sum = T(0);
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) {
        T next = sum + *(const T*)lanes[i].in;
        *(T*)lanes[i].out = sum;
        sum = next;
      }
  }
};
template <class T, MSL_IF_SIMD(T)> MSL_INLINE T simd_prefix_exclusive_sum(T x, MSL_SITE) {
  T r;
  msl_simd_op("simd_prefix_exclusive_sum", site, false, &x, &r, 0, msl_exclusive_sum<T>::run);
  return r;
}

struct msl_ballot {
  MSL_EXECUTOR_SIDE static void run(msl_lane_op* lanes, uint mask) {
    uint set = 0;
    for (int i = 0; i < 32; i++)
      if ((mask >> i & 1) && *(const bool*)lanes[i].in) set |= 1u << i;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) *(uint*)lanes[i].out = set;
  }
};
MSL_INLINE bool simd_any(bool p, MSL_SITE) { uint r; msl_simd_op("simd_any", site, false, &p, &r, 0, msl_ballot::run); return r != 0; }
MSL_INLINE bool simd_all(bool p, MSL_SITE) { uint r; p = !p; msl_simd_op("simd_all", site, false, &p, &r, 0, msl_ballot::run); return r == 0; }
}  // namespace metal
