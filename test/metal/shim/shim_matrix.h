// shim_matrix.h — simdgroup_matrix 8x8. Lane l holds row r(l), columns c(l) and c(l)+1: the layout that Apple's GPUs have and
// does not document; kernels must not depend on it, and ours do not.

namespace metal {
template <class T, int Columns = 8, int Rows = 8> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "only 8x8");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>, "element type");
  vec<T, 2> pair;
  simdgroup_matrix() { __builtin_memset(&pair, 0xFF, sizeof pair); }
  explicit simdgroup_matrix(T diagonal) { for (int j = 0; j < 2; j++) pair[j] = row((int)msl_lane()) == column((int)msl_lane()) + j ? diagonal : T(0); }
  static int row(int lane) { return ((lane >> 4) << 2) + ((lane >> 1) & 3); }
  static int column(int lane) { return (((lane >> 3) & 1) << 2) + ((lane & 1) << 1); }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R> MSL_INLINE simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.pair = vec<T, 2>(v);
  return m;
}

#define MSL_MATRIX_LOAD(SPACE)                                                                                                              \
  template <class T> MSL_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const SPACE T* p, ulong stride = 8, ulong2 origin = 0, bool transpose = false, MSL_SITE) { \
    msl_same_in_all_lanes("simdgroup_load", site, (const void*)p, stride, origin.x * 65536 + origin.y * 2 + transpose);                     \
    int r = d.row((int)msl_lane()), c = d.column((int)msl_lane());                                                                          \
    p += origin.y * stride + origin.x;                                                                                                      \
    for (int j = 0; j < 2; j++) d.pair[j] = transpose ? p[(c + j) * stride + r] : p[r * stride + c + j];                                    \
  }
#define MSL_MATRIX_STORE(SPACE)                                                                                                             \
  template <class T> MSL_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> d, SPACE T* p, ulong stride = 8, ulong2 origin = 0, bool transpose = false, MSL_SITE) { \
    msl_same_in_all_lanes("simdgroup_store", site, (const void*)p, stride, origin.x * 65536 + origin.y * 2 + transpose);                    \
    int r = d.row((int)msl_lane()), c = d.column((int)msl_lane());                                                                          \
    p += origin.y * stride + origin.x;                                                                                                      \
    for (int j = 0; j < 2; j++) {                                                                                                           \
      if (transpose) p[(c + j) * stride + r] = d.pair[j];                                                                                   \
      else p[r * stride + c + j] = d.pair[j];                                                                                               \
    }                                                                                                                                       \
  }
MSL_MATRIX_LOAD(device) MSL_MATRIX_LOAD(threadgroup) MSL_MATRIX_STORE(device) MSL_MATRIX_STORE(threadgroup)

template <class D, class A, class B, class C> struct msl_matrix_product {
  struct operands { vec<A, 2> a; vec<B, 2> b; vec<C, 2> c; };
  MSL_EXECUTOR_SIDE static void run(msl_lane_op* lanes, uint) {
    float a[8][8], b[8][8], c[8][8];
    for (int l = 0; l < 32; l++) {
      int r = simdgroup_matrix<D>::row(l), k = simdgroup_matrix<D>::column(l);
      const operands* o = (const operands*)lanes[l].in;
      for (int j = 0; j < 2; j++) {
        a[r][k + j] = (float)o->a[j];
        b[r][k + j] = (float)o->b[j];
        c[r][k + j] = (float)o->c[j];
      }
    }
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < 32; l++) {
      int r = simdgroup_matrix<D>::row(l), k = simdgroup_matrix<D>::column(l);
      for (int j = 0; j < 2; j++) (*(vec<D, 2>*)lanes[l].out)[j] = (D)c[r][k + j];
    }
  }
};
template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, MSL_SITE) {
  static_assert(is_same_v<A, B> && is_same_v<D, C> && (is_same_v<D, A> || is_same_v<D, float>), "operand types");
  typename msl_matrix_product<D, A, B, C>::operands o{a.pair, b.pair, c.pair};
  vec<D, 2> r;
  msl_simd_op("simdgroup_multiply_accumulate", site, true, &o, &r, 0, msl_matrix_product<D, A, B, C>::run);
  d.pair = r;
}
template <class D, class A, class B> MSL_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
  simdgroup_matrix<D, 8, 8> zero;
  zero.pair = vec<D, 2>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, site);
}
}  // namespace metal
