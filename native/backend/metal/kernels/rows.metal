// rows.metal — operations on rows of activations that are not products: embedding, RMS norm, rotation and cache write.

// h[t] = table[token t]: a thread decodes 16 columns. Grid (columns / 16, tokens).
kernel void embed(device const uchar* w [[buffer(0)]], device const uchar* s [[buffer(1)]], device const uchar* b [[buffer(2)]], device const cv_token* tokens [[buffer(3)]], device float* h [[buffer(4)]],
                  constant cv_matmul_params& p [[buffer(5)]], uint2 at [[thread_position_in_grid]]) {
  if (at.x >= p.a.cols / 16 || at.y >= p.n) return;
  const ulong row = tokens[at.y].id;
  float v[16];
  decode16(format_a(), w + row * p.a.row_bytes, s + row * p.a.scale_row_bytes, b + (p.a.has_global != 0 ? 0 : row * p.a.scale_row_bytes), at.x, v);
  const float global = global_scale(p.a, b, 0);
  for (uint i = 0; i < 16; i++) h[ulong(at.y) * p.a.cols + at.x * 16 + i] = v[i] * global;
}

// Sum over a threadgroup of up to 256 threads. `parts` has a float for each simdgroup.
METAL_FUNC float sum_of_threadgroup(float x, threadgroup float* parts, uint simdgroup, uint n_simdgroups, uint lane) {
  const float sum = simd_sum(x);
  if (lane == 0) parts[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = 0.0f;
  for (uint i = 0; i < n_simdgroups; i++) all += parts[i];
  return all;
}

// out[i] = h[row i] / rms * norm, as T. A threadgroup a row.
template <typename T>
kernel void rms_norm(device const float* h [[buffer(0)]], device const float* norm [[buffer(1)]], device T* out [[buffer(2)]], device const uint* row_index [[buffer(3)]], constant cv_norm_params& p [[buffer(4)]],
                     uint row [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint n_simdgroups [[simdgroups_per_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]], uint threads [[threads_per_threadgroup]]) {
  threadgroup float parts[32];
  device const float* x = h + ulong(p.has_rows != 0 ? row_index[row] : row) * p.hidden;
  float squares = 0.0f;
  for (uint i = thread_index; i < p.hidden; i += threads) squares = fma(x[i], x[i], squares);
  const float factor = rsqrt(sum_of_threadgroup(squares, parts, simdgroup, n_simdgroups, lane) / float(p.hidden) + p.eps);
  for (uint i = thread_index; i < p.hidden; i += threads) out[ulong(row) * p.hidden + i] = T(x[i] * factor * norm[i]);
}

// d elements as int8 in groups of 32, which a simdgroup has one each of, with their scales behind them: as the CPU's quantize() does.
METAL_FUNC void store_codes(threadgroup const float* x, uint d, uint lane, device uchar* to) {
  for (uint g = 0; g < d / 32; g++) {
    const float y = x[g * 32 + lane], largest = simd_max(fabs(y));
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    if (inverse > 3.0e38f) inverse = 0.0f; // as good as zero
    ((device char*)to)[g * 32 + lane] = char(rint(y * inverse));
    if (lane == 0) ((device float*)(to + d))[g] = largest / 127.0f;
  }
}

// One head of one token by a simdgroup: rotation (LAYER_ROPE), weightless norm (LAYER_QK_NORM), factor; q in place, k and v
// into the cache. Heads: queries, then keys, then values. Threadgroup (block of heads, token); CV_STORE_SIMDGROUPS share the block.
// Lane l has pairs l, l + 32: (2j, 2j+1) when interleaved, else (j, j + d/2); for values the same elements, untouched.
template <typename T>
kernel void rope_store(device T* q [[buffer(0)]], device const T* k [[buffer(1)]], device const T* v [[buffer(2)]], device uchar* cache_k [[buffer(3)]], device uchar* cache_v [[buffer(4)]], device const cv_token* tokens [[buffer(5)]],
                       device const uint* pages [[buffer(6)]], device const float* cosines [[buffer(7)]], device const float* sines [[buffer(8)]], constant cv_attention_params& p [[buffer(9)]],
                       uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float staged[CV_STORE_SIMDGROUPS * CV_MOST_HEAD_DIM];
  const uint head = group.x * CV_STORE_SIMDGROUPS + simdgroup, token = group.y, d = p.head_dim, half_d = d / 2;
  if (head >= p.n_heads + 2 * p.n_kv_heads) return;
  const bool is_query = head < p.n_heads, is_value = head >= p.n_heads + p.n_kv_heads;
  const uint kv_head = is_query ? 0 : (head - p.n_heads) % p.n_kv_heads;
  device const T* from = is_query ? q + (ulong(token) * p.n_heads + head) * d : is_value ? v + (ulong(token) * p.n_kv_heads + kv_head) * d : k + (ulong(token) * p.n_kv_heads + kv_head) * d;
  const uint last = tokens[token].keys[p.pool] - 1;
  const uint page = pages[tokens[token].first_page[p.pool] + last / p.page_tokens];
  device uchar* in_cache = (is_value ? cache_v : cache_k) + cache_bytes<T>(ulong(page) * p.page_stride + kv_head * p.head_stride + ulong(last % p.page_tokens) * cache_token(d));
  float a[4], b[4], squares = 0.0f;
  uint n = 0;
  for (uint j = lane; j < half_d; j += 32, n++) {
    const uint ia = p.interleaved != 0 ? 2 * j : j, ib = p.interleaved != 0 ? 2 * j + 1 : j + half_d;
    const float x = float(from[ia]), y = float(from[ib]);
    a[n] = x;
    b[n] = y;
    if (!is_value && (LAYER & LAYER_ROPE) != 0) {
      const float c = cosines[token * half_d + j], s = sines[token * half_d + j];
      a[n] = fma(x, c, -(y * s));
      b[n] = fma(y, c, x * s);
    }
    squares += a[n] * a[n] + b[n] * b[n];
  }
  float factor = 1.0f;
  if ((LAYER & LAYER_QK_NORM) != 0) {
    const float sum = simd_sum(squares);
    if (!is_value) factor = rsqrt(sum / float(d) + p.qk_norm_eps);
  }
  if (is_query && (LAYER & LAYER_TEMPERATURE) != 0) factor *= tokens[token].temperature;
  n = 0;
  if (cache8() && !is_query) {
    threadgroup float* x = staged + simdgroup * CV_MOST_HEAD_DIM;
    for (uint j = lane; j < half_d; j += 32, n++) {
      const uint ia = p.interleaved != 0 ? 2 * j : j, ib = p.interleaved != 0 ? 2 * j + 1 : j + half_d;
      x[ia] = a[n] * factor;
      x[ib] = b[n] * factor;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    store_codes(x, d, lane, in_cache);
    return;
  }
  device T* to = is_query ? q + (ulong(token) * p.n_heads + head) * d : (device T*)in_cache;
  for (uint j = lane; j < half_d; j += 32, n++) {
    const uint ia = p.interleaved != 0 ? 2 * j : j, ib = p.interleaved != 0 ? 2 * j + 1 : j + half_d;
    to[ia] = T(a[n] * factor);
    to[ib] = T(b[n] * factor);
  }
}

#define ROWS_TYPE(T, suffix)                                                                          \
  template [[host_name("rms_norm_" suffix)]] [[kernel]] decltype(rms_norm<T>) rms_norm<T>;            \
  template [[host_name("rope_store_" suffix)]] [[kernel]] decltype(rope_store<T>) rope_store<T>;
#if CV_HAS_F32
ROWS_TYPE(float, "f32")
#endif
#if CV_HAS_F16
ROWS_TYPE(half, "f16")
#endif
#if CV_HAS_BF16
ROWS_TYPE(bfloat, "bf16")
#endif
