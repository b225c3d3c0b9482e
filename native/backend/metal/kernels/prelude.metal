// prelude.metal — read before every kernel file: number formats, the dot product of weight rows, reductions.
//
// Arithmetic is in float. A row's result depends on its own input and weights only, not on how many rows are computed with it.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
#include "params.h"
using namespace metal;

// A start compiles the kernels of one type of activations (1 f32, 2 f16, 3 bf16) and of one size of heads; 0: all, for checks.
#ifndef CV_ONLY_TYPE
#define CV_ONLY_TYPE 0
#endif
#ifndef CV_ONLY_DIM
#define CV_ONLY_DIM 0
#endif
#define CV_HAS_F32 (CV_ONLY_TYPE == 0 || CV_ONLY_TYPE == 1)
#define CV_HAS_F16 (CV_ONLY_TYPE == 0 || CV_ONLY_TYPE == 2)
#ifdef __HAVE_BFLOAT__ // macOS 14
#define CV_HAS_BF16 (CV_ONLY_TYPE == 0 || CV_ONLY_TYPE == 3)
#else
#define CV_HAS_BF16 0
#endif

constant uint A_FORMAT [[function_constant(0)]];
constant uint A_BITS [[function_constant(1)]];
constant uint A_GROUP [[function_constant(2)]];
constant uint A_SCALE [[function_constant(3)]];
constant uint B_FORMAT [[function_constant(4)]];
constant uint B_BITS [[function_constant(5)]];
constant uint B_GROUP [[function_constant(6)]];
constant uint B_SCALE [[function_constant(7)]];
constant uint C_FORMAT [[function_constant(8)]];
constant uint C_BITS [[function_constant(9)]];
constant uint C_GROUP [[function_constant(10)]];
constant uint C_SCALE [[function_constant(11)]];
constant uint D_FORMAT [[function_constant(12)]];
constant uint D_BITS [[function_constant(13)]];
constant uint D_GROUP [[function_constant(14)]];
constant uint D_SCALE [[function_constant(15)]];
constant bool SAME_FORMATS [[function_constant(16)]];
constant bool NORM [[function_constant(17)]];
constant bool INPUT_FLOAT [[function_constant(18)]];
constant uint OUTPUT [[function_constant(19)]];
constant bool BIAS [[function_constant(20)]];
constant bool ROWS [[function_constant(21)]];
constant bool SWIGLU [[function_constant(22)]];
constant uint EXPERTS [[function_constant(23)]];
constant uint LAYER [[function_constant(24)]];

// Weight formats and scale types, by caravan.h's numbers.
enum { FORMAT_F32 = 1, FORMAT_F16 = 2, FORMAT_BF16 = 3, FORMAT_AFFINE = 4, FORMAT_MXFP4 = 5, FORMAT_MXFP8 = 6, FORMAT_NVFP4 = 7 };
enum { SCALE_F32 = 1, SCALE_F16 = 2, SCALE_BF16 = 3, SCALE_E8M0 = 4, SCALE_E4M3 = 5 };
enum { LAYER_CHUNKED = 1, LAYER_ROPE = 2, LAYER_QK_NORM = 4, LAYER_TEMPERATURE = 8 };

// What decoding depends on, known when the pipeline is made: branches on it fold away.
struct Format {
  uint format, bits, group, scale;
};
METAL_FUNC Format format_a() { return Format{A_FORMAT, A_BITS, A_GROUP, A_SCALE}; }
METAL_FUNC Format format_b() { return Format{B_FORMAT, B_BITS, B_GROUP, B_SCALE}; }
METAL_FUNC Format format_c() { return Format{C_FORMAT, C_BITS, C_GROUP, C_SCALE}; }
METAL_FUNC Format format_d() { return Format{D_FORMAT, D_BITS, D_GROUP, D_SCALE}; }

METAL_FUNC float from_bf16(ushort bits) { return as_type<float>(uint(bits) << 16); }

// OCP E4M3: bias 7, subnormals m/8 * 2^-6. The two NaN codes do not occur in weights.
METAL_FUNC float from_e4m3(uint code) {
  const uint exponent = (code >> 3) & 15u, mantissa = code & 7u;
  const float magnitude = exponent == 0u ? float(mantissa) * 0.001953125f : as_type<float>(((exponent + 120u) << 23) | (mantissa << 20));
  return (code & 128u) != 0u ? -magnitude : magnitude;
}

// OCP E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
METAL_FUNC float from_e2m1(uint code) {
  const uint exponent = (code >> 1) & 3u, mantissa = code & 1u;
  const float magnitude = exponent == 0u ? 0.5f * float(mantissa) : as_type<float>(((exponent + 126u) << 23) | (mantissa << 22));
  return (code & 8u) != 0u ? -magnitude : magnitude;
}

METAL_FUNC float stored_float(uint type, device const uchar* p, uint i) {
  switch (type) {
    case SCALE_F32: return ((device const float*)p)[i];
    case SCALE_F16: return float(((device const half*)p)[i]);
    case SCALE_BF16: return from_bf16(((device const ushort*)p)[i]);
    case SCALE_E8M0: return p[i] == 0 ? 5.877471754e-39f : as_type<float>(uint(p[i]) << 23);
    default: return from_e4m3(p[i]);
  }
}

// 16 codes of BITS bits: BITS consecutive 16-bit words of the row. Loads are 32 bits where the width allows.
template <uint BITS>
METAL_FUNC void unpack16(device const uchar* row, uint chunk, thread float* v) {
  uint w[5] = {0, 0, 0, 0, 0};
  if (BITS % 2 == 0) {
    device const uint* p = (device const uint*)row + chunk * (BITS / 2);
    for (uint i = 0; i < BITS / 2; i++) w[i] = p[i];
  } else {
    device const ushort* p = (device const ushort*)row + chunk * BITS;
    for (uint i = 0; i < BITS; i++) w[i / 2] |= uint(p[i]) << (16 * (i % 2));
  }
  for (uint i = 0; i < 16; i++) {
    const uint at = i * BITS / 32, shift = i * BITS % 32;
    uint code = w[at] >> shift;
    if (shift + BITS > 32) code |= w[at + 1] << (32 - shift);
    v[i] = float(code & ((1u << BITS) - 1u));
  }
}

// 16 values of a row before scale and bias.
METAL_FUNC void load16(Format f, device const uchar* row, uint chunk, thread float* v) {
  switch (f.format) {
    case FORMAT_F32:
      for (uint i = 0; i < 16; i++) v[i] = ((device const float*)row)[chunk * 16 + i];
      break;
    case FORMAT_F16:
      for (uint i = 0; i < 16; i++) v[i] = float(((device const half*)row)[chunk * 16 + i]);
      break;
    case FORMAT_BF16:
      for (uint i = 0; i < 16; i++) v[i] = from_bf16(((device const ushort*)row)[chunk * 16 + i]);
      break;
    case FORMAT_AFFINE:
      switch (f.bits) {
        case 2: unpack16<2>(row, chunk, v); break;
        case 3: unpack16<3>(row, chunk, v); break;
        case 4: unpack16<4>(row, chunk, v); break;
        case 5: unpack16<5>(row, chunk, v); break;
        case 6: unpack16<6>(row, chunk, v); break;
        default: unpack16<8>(row, chunk, v);
      }
      break;
    case FORMAT_MXFP8: {
      device const uint* p = (device const uint*)row + chunk * 4;
      for (uint i = 0; i < 4; i++) {
        const uint w = p[i];
        for (uint j = 0; j < 4; j++) v[4 * i + j] = from_e4m3((w >> (8 * j)) & 255u);
      }
      break;
    }
    default: {
      device const uint* p = (device const uint*)row + chunk * 2;
      const uint w[2] = {p[0], p[1]};
      for (uint i = 0; i < 16; i++) v[i] = from_e2m1((w[i / 8] >> (4 * (i % 8))) & 15u);
    }
  }
}

METAL_FUNC bool is_quantized(Format f) { return f.format >= FORMAT_AFFINE; }
METAL_FUNC bool has_bias(Format f) { return f.format == FORMAT_AFFINE; }

// 16 values of a row, scaled.
METAL_FUNC void decode16(Format f, device const uchar* row, device const uchar* scales, device const uchar* biases, uint chunk, thread float* v) {
  load16(f, row, chunk, v);
  if (!is_quantized(f)) return;
  const uint g = chunk * 16 / f.group;
  const float s = stored_float(f.scale, scales, g);
  const float b = has_bias(f) ? stored_float(f.scale, biases, g) : 0.0f;
  for (uint i = 0; i < 16; i++) v[i] = fma(v[i], s, b);
}

// NVFP4's second scale, of a whole expert.
METAL_FUNC float global_scale(constant cv_matrix& m, device const uchar* biases, uint expert) {
  return m.has_global != 0 ? ((device const float*)biases)[expert] / 2688.0f : 1.0f;
}

// An expert's first row.
METAL_FUNC device const uchar* expert_data(constant cv_matrix& m, device const uchar* data, uint expert) { return data + ulong(expert) * m.expert_bytes; }
METAL_FUNC device const uchar* expert_scales(constant cv_matrix& m, device const uchar* scales, uint expert) { return scales + ulong(expert) * m.expert_scale_bytes; }
METAL_FUNC device const uchar* expert_biases(constant cv_matrix& m, device const uchar* biases, uint expert) { return m.has_global != 0 ? biases : biases + ulong(expert) * m.expert_scale_bytes; }

// A row of a matrix. Rows past the last repeat it: their sums are not stored.
struct Line {
  Format f;
  device const uchar* data;
  device const uchar* scales;
  device const uchar* biases;
};
METAL_FUNC Line line_of(Format f, constant cv_matrix& m, device const uchar* data, device const uchar* scales, device const uchar* biases, uint row) {
  const ulong i = min(row, m.rows - 1);
  return Line{f, data + i * m.row_bytes, scales + i * m.scale_row_bytes, biases + i * m.scale_row_bytes};
}

// sums[r][b] = Σ_c line[r][c] * x[at[b] + c], of one simdgroup: a lane takes every 32nd run of 16 columns, so that a simdgroup
// reads a row's bytes in order and once, whatever the number B of inputs. With NORM, x is multiplied by `norm` on the way in and
// squares[b] = Σ x²: the caller multiplies by 1/rms, which commutes with the dot product. All lanes get the sums.
// Of each lane's values R * (16 + B) + 32 + B live at once: the largest, 2 x 16, leaves room in Apple's 128 registers.
template <typename T, uint R, uint B, bool USE_NORM>
METAL_FUNC void dot_lines(thread Line (&line)[R], uint cols, device const T* x, thread uint (&at)[B], device const float* norm, uint lane, thread float (&sums)[R][B], thread float (&squares)[B]) {
  for (uint b = 0; b < B; b++) {
    for (uint r = 0; r < R; r++) sums[r][b] = 0.0f;
    squares[b] = 0.0f;
  }
  for (uint chunk = lane; chunk < cols / 16; chunk += 32) {
    float v[R][16];
    float s[R], bias[R];
    for (uint r = 0; r < R; r++) {
      const Format f = line[r].f;
      const uint g = is_quantized(f) ? chunk * 16 / f.group : 0;
      load16(f, line[r].data, chunk, v[r]);
      s[r] = is_quantized(f) ? stored_float(f.scale, line[r].scales, g) : 1.0f;
      bias[r] = has_bias(f) ? stored_float(f.scale, line[r].biases, g) : 0.0f;
    }
    float nv[16];
    for (uint i = 0; i < 4 && USE_NORM; i++) {
      const float4 four = ((device const float4*)norm)[chunk * 4 + i];
      for (uint j = 0; j < 4; j++) nv[4 * i + j] = four[j];
    }
    for (uint b = 0; b < B; b++) {
      float xv[16];
      float total = 0.0f;
      for (uint i = 0; i < 16; i++) xv[i] = float(x[at[b] + chunk * 16 + i]);
      for (uint i = 0; i < 16; i++) {
        if (USE_NORM) {
          squares[b] = fma(xv[i], xv[i], squares[b]);
          xv[i] *= nv[i];
        }
        total += xv[i];
      }
      for (uint r = 0; r < R; r++) {
        float d = 0.0f;
        for (uint i = 0; i < 16; i++) d = fma(v[r][i], xv[i], d);
        sums[r][b] = fma(s[r], d, sums[r][b]);
        if (has_bias(line[r].f)) sums[r][b] = fma(bias[r], total, sums[r][b]);
      }
    }
  }
  for (uint b = 0; b < B; b++) {
    for (uint r = 0; r < R; r++) sums[r][b] = simd_sum(sums[r][b]);
    if (USE_NORM) squares[b] = simd_sum(squares[b]);
  }
}

// The same of rows row0 … row0+R-1 of one matrix.
template <typename T, uint R, uint B, bool USE_NORM>
METAL_FUNC void dot_rows(Format f, constant cv_matrix& m, device const uchar* data, device const uchar* scales, device const uchar* biases, uint row0, device const T* x, thread uint (&at)[B],
                         device const float* norm, uint lane, thread float (&sums)[R][B], thread float (&squares)[B]) {
  Line line[R];
  for (uint r = 0; r < R; r++) line[r] = line_of(f, m, data, scales, biases, row0 + r);
  dot_lines<T, R, B, USE_NORM>(line, m.cols, x, at, norm, lane, sums, squares);
}

// Rows of gate (sums 0 … R-1) and of up (sums R … 2R-1) over normalised inputs, which are read once for both.
constant constexpr uint PAIRED_INPUTS = 2; // most inputs for which two rows of each are taken at once; more: one
template <uint R, uint B>
METAL_FUNC void gate_and_up(Format gate_format, Format up_format, constant cv_matrix& gate, constant cv_matrix& up, device const uchar* wg, device const uchar* sg, device const uchar* bg, device const uchar* wu,
                            device const uchar* su, device const uchar* bu, uint row0, device const float* x, thread uint (&at)[B], device const float* norm, uint lane, thread float (&sums)[2 * R][B],
                            thread float (&squares)[B]) {
  constexpr uint BOTH = 2 * R;
  Line line[BOTH];
  for (uint r = 0; r < R; r++) {
    line[r] = line_of(gate_format, gate, wg, sg, bg, row0 + r);
    line[R + r] = line_of(up_format, up, wu, su, bu, row0 + r);
  }
  dot_lines<float, BOTH, B, true>(line, gate.cols, x, at, norm, lane, sums, squares);
}

// A head of a token in the cache: D elements of the kernel's type T, or (CV_LAYER_CACHE8) D int8 codes and then a float32 scale for
// each 32 of them. Strides of pages and heads count elements, which are bytes there.
METAL_FUNC bool cache8() { return (LAYER & CV_LAYER_CACHE8) != 0; }
METAL_FUNC uint cache_token(uint d) { return cache8() ? d + d / 8 : d; }
template <typename T>
METAL_FUNC ulong cache_bytes(ulong elements) { return cache8() ? elements : elements * sizeof(T); }
template <typename T>
METAL_FUNC float cache_value(device const uchar* token, uint d, uint i) {
  return cache8() ? float(((device const char*)token)[i]) * ((device const float*)(token + d))[i / 32] : float(((device const T*)token)[i]);
}

METAL_FUNC float silu(float x) { return x / (1.0f + exp(-x)); }

// The expert of rank `rank` among the largest router logits (the lower number wins a tie), the same in all lanes of a simdgroup.
METAL_FUNC uint chosen_expert(device const float* logits, uint n_experts, uint rank, uint lane) {
  uint taken[CV_MOST_CHOSEN];
  uint best = 0;
  for (uint k = 0; k <= rank; k++) {
    float value = -FLT_MAX;
    uint mine = n_experts;
    for (uint e = lane; e < n_experts; e += 32) {
      bool free = true;
      for (uint j = 0; j < k; j++) free = free && taken[j] != e;
      if (free && (mine == n_experts || logits[e] > value)) {
        value = logits[e];
        mine = e;
      }
    }
    const float top = simd_max(value);
    best = min(simd_min(mine < n_experts && value == top ? mine : n_experts), n_experts - 1);
    taken[k] = best;
  }
  return best;
}
METAL_FUNC float expert_score(float logit) { return 1.0f / (1.0f + exp(-logit)); }
