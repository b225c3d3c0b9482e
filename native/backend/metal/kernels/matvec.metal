// matvec.metal — weight matrices times one to sixteen rows of activations: decoding. One simdgroup computes R rows of the matrix
// for B inputs and reads each weight once.

// What a kernel of this file is given for one matrix.
template <typename T, uint R, uint B>
METAL_FUNC void store_rows(constant cv_matrix& m, uint row0, uint first, uint n, uint lane, float global, device uchar* out, device const float* bias, thread float (&sums)[R][B], thread float (&factor)[B]) {
  if (lane != 0) return;
  for (uint b = 0; b < B && first + b < n; b++)
    for (uint r = 0; r < R && row0 + r < m.rows; r++) {
      const ulong at = ulong(first + b) * m.rows + row0 + r;
      float y = sums[r][b] * factor[b] * global;
      if (BIAS) y += bias[row0 + r];
      if (OUTPUT == CV_OUT_ADD) ((device float*)out)[at] += y;
      else if (OUTPUT == CV_OUT_FLOAT) ((device float*)out)[at] = y;
      else ((device T*)out)[at] = T(y);
    }
}

template <typename T, typename X, uint R, uint B, bool USE_NORM>
METAL_FUNC void matvec_part(Format f, constant cv_matrix& m, device const uchar* w, device const uchar* s, device const uchar* b, uint row0, device const X* x, thread uint (&at)[B], device const float* norm, uint first,
                            uint n, float eps, uint lane, device uchar* out, device const float* bias) {
  float sums[R][B], factor[B];
  dot_rows<X, R, B, USE_NORM>(f, m, w, s, b, row0, x, at, norm, lane, sums, factor);
  for (uint i = 0; i < B; i++) factor[i] = USE_NORM ? rsqrt(factor[i] / float(m.cols) + eps) : 1.0f;
  store_rows<T, R, B>(m, row0, first, n, lane, global_scale(m, b, 0), out, bias, sums, factor);
}

template <typename T, typename X, uint R, uint B, bool USE_NORM>
METAL_FUNC void matvec_any(device const uchar* wa, device const uchar* sa, device const uchar* ba, device const uchar* wb, device const uchar* sb, device const uchar* bb, device const uchar* wc, device const uchar* sc,
                           device const uchar* bc, device const X* input, device const float* norm, device uchar* out_a, device uchar* out_b, device uchar* out_c, device const float* bias_a, device const float* bias_b,
                           device const float* bias_c, device const uint* row_index, constant cv_matvec_params& p, uint2 group, uint simdgroup, uint lane) {
  const uint first = group.y * B;
  const uint cols = p.m[0].cols;
  uint at[B];
  for (uint b = 0; b < B; b++) {
    const uint i = min(first + b, p.n - 1);
    at[b] = (ROWS ? row_index[i] : i) * cols;
  }
  const uint block = group.x;
  if (block < p.first_block[1]) {
    const uint row0 = (block * CV_MATVEC_SIMDGROUPS + simdgroup) * R;
    if (row0 < p.m[0].rows) matvec_part<T, X, R, B, USE_NORM>(format_a(), p.m[0], wa, sa, ba, row0, input, at, norm, first, p.n, p.eps, lane, out_a, bias_a);
  } else if (block < p.first_block[2]) {
    const uint row0 = ((block - p.first_block[1]) * CV_MATVEC_SIMDGROUPS + simdgroup) * R;
    const Format f = SAME_FORMATS ? format_a() : format_b();
    if (row0 < p.m[1].rows) matvec_part<T, X, R, B, USE_NORM>(f, p.m[1], wb, sb, bb, row0, input, at, norm, first, p.n, p.eps, lane, out_b, bias_b);
  } else {
    const uint row0 = ((block - p.first_block[2]) * CV_MATVEC_SIMDGROUPS + simdgroup) * R;
    const Format f = SAME_FORMATS ? format_a() : format_c();
    if (row0 < p.m[2].rows) matvec_part<T, X, R, B, USE_NORM>(f, p.m[2], wc, sc, bc, row0, input, at, norm, first, p.n, p.eps, lane, out_c, bias_c);
  }
}

// out_i = W_i · x for up to three matrices; threadgroup (row block, input block).
template <typename T, uint R, uint B>
kernel void matvec(device const uchar* wa [[buffer(0)]], device const uchar* sa [[buffer(1)]], device const uchar* ba [[buffer(2)]], device const uchar* wb [[buffer(3)]], device const uchar* sb [[buffer(4)]],
                   device const uchar* bb [[buffer(5)]], device const uchar* wc [[buffer(6)]], device const uchar* sc [[buffer(7)]], device const uchar* bc [[buffer(8)]], device const uchar* input [[buffer(9)]],
                   device const float* norm [[buffer(10)]], device uchar* out_a [[buffer(11)]], device uchar* out_b [[buffer(12)]], device uchar* out_c [[buffer(13)]], device const float* bias_a [[buffer(14)]],
                   device const float* bias_b [[buffer(15)]], device const float* bias_c [[buffer(16)]], device const uint* row_index [[buffer(17)]], constant cv_matvec_params& p [[buffer(18)]],
                   uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  if (NORM)
    matvec_any<T, float, R, B, true>(wa, sa, ba, wb, sb, bb, wc, sc, bc, (device const float*)input, norm, out_a, out_b, out_c, bias_a, bias_b, bias_c, row_index, p, group, simdgroup, lane);
  else if (INPUT_FLOAT)
    matvec_any<T, float, R, B, false>(wa, sa, ba, wb, sb, bb, wc, sc, bc, (device const float*)input, norm, out_a, out_b, out_c, bias_a, bias_b, bias_c, row_index, p, group, simdgroup, lane);
  else
    matvec_any<T, T, R, B, false>(wa, sa, ba, wb, sb, bb, wc, sc, bc, (device const T*)input, norm, out_a, out_b, out_c, bias_a, bias_b, bias_c, row_index, p, group, simdgroup, lane);
}

// act = silu(gate·m) * (up·m) with m = RMSNorm(h); biases where there are any.
template <typename T, uint R, uint B>
kernel void matvec_up(device const uchar* wa [[buffer(0)]], device const uchar* sa [[buffer(1)]], device const uchar* ba [[buffer(2)]], device const uchar* wb [[buffer(3)]], device const uchar* sb [[buffer(4)]],
                      device const uchar* bb [[buffer(5)]], device const float* h [[buffer(6)]], device const float* norm [[buffer(7)]], device T* act [[buffer(8)]], device const float* gate_bias [[buffer(9)]],
                      device const float* up_bias [[buffer(10)]], constant cv_up_params& p [[buffer(11)]], uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint PAIR = B <= PAIRED_INPUTS ? R : 1, BOTH = 2 * PAIR;
  const uint first_row = (group.x * CV_MATVEC_SIMDGROUPS + simdgroup) * R, first = group.y * B;
  uint at[B];
  for (uint b = 0; b < B; b++) at[b] = min(first + b, p.n - 1) * p.gate.cols;
  for (uint row0 = first_row; row0 < min(first_row + R, p.gate.rows); row0 += PAIR) {
    float sums[BOTH][B], squares[B];
    gate_and_up<PAIR, B>(format_a(), SAME_FORMATS ? format_a() : format_b(), p.gate, p.up, wa, sa, ba, wb, sb, bb, row0, h, at, norm, lane, sums, squares);
    if (lane != 0) continue;
    const float gate_global = global_scale(p.gate, ba, 0), up_global = global_scale(p.up, bb, 0);
    for (uint b = 0; b < B && first + b < p.n; b++) {
      const float factor = rsqrt(squares[b] / float(p.gate.cols) + p.eps);
      for (uint r = 0; r < PAIR && row0 + r < p.gate.rows; r++) {
        float g = sums[r][b] * factor * gate_global, u = sums[PAIR + r][b] * factor * up_global;
        if (BIAS) {
          g += gate_bias[row0 + r];
          u += up_bias[row0 + r];
        }
        act[ulong(first + b) * p.gate.rows + row0 + r] = T(silu(g) * u);
      }
    }
  }
}

#define MATVEC(name, T, suffix, R, B) template [[host_name(#name "_" suffix "_" #B)]] [[kernel]] decltype(name<T, R, B>) name<T, R, B>;
#define MATVEC_TYPE(T, suffix)                                                                                                        \
  MATVEC(matvec, T, suffix, 4, 1) MATVEC(matvec, T, suffix, 4, 2) MATVEC(matvec, T, suffix, 2, 4) MATVEC(matvec, T, suffix, 2, 8)     \
  MATVEC(matvec, T, suffix, 2, 16) MATVEC(matvec_up, T, suffix, 2, 1) MATVEC(matvec_up, T, suffix, 2, 2) MATVEC(matvec_up, T, suffix, 2, 4) \
  MATVEC(matvec_up, T, suffix, 2, 8) MATVEC(matvec_up, T, suffix, 2, 16)
#if CV_HAS_F32
MATVEC_TYPE(float, "f32")
#endif
#if CV_HAS_F16
MATVEC_TYPE(half, "f16")
#endif
#if CV_HAS_BF16
MATVEC_TYPE(bfloat, "bf16")
#endif
