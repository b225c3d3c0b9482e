// attention.metal — attention over paged keys and values. A query sees `keys` keys of its sequence from the first page of its
// list on: the host starts the list at the chunk's first page in chunked layers.

// E values of a token's key or value from element `first` on.
template <typename T, uint D, uint E>
METAL_FUNC void load_cached(device const uchar* token, uint first, thread float (&v)[E]) {
  if (!cache8()) {
    for (uint i = 0; i < E; i++) v[i] = float(((device const T*)token)[first + i]);
    return;
  }
  const float scale = ((device const float*)(token + D))[first / 32];
  device const char* codes = (device const char*)token + first;
  if (E == 4) {
    const char4 c = *(device const char4*)codes;
    for (uint i = 0; i < E; i++) v[i] = float(c[i]) * scale;
  } else {
    for (uint i = 0; i < E; i++) v[i] = float(codes[i]) * scale;
  }
}

// ---- decoding: one query a token, keys split over threadgroups and simdgroups ----

// Keys of one part: a multiple of CV_ATTN_SPLIT_KEYS that depends on the query's own number of keys, not on the batch.
METAL_FUNC uint keys_of_part(uint keys) {
  const uint blocks = (keys + CV_ATTN_SPLIT_KEYS - 1) / CV_ATTN_SPLIT_KEYS;
  return CV_ATTN_SPLIT_KEYS * ((blocks + CV_ATTN_SPLITS - 1) / CV_ATTN_SPLITS);
}

// Threadgroup (kv head * blocks of query heads, token, part). Each simdgroup takes every fourth key; a lane holds D/32 elements
// of every query head of the group, so a key and a value are read once for all of them. With one part the result goes to
// `out`, else its sum, maximum and weight go to `parts` for attention_join.
template <typename T, uint D>
kernel void attention_decode(device const T* q [[buffer(0)]], device const uchar* cache_k [[buffer(1)]], device const uchar* cache_v [[buffer(2)]], device T* out [[buffer(3)]], device float* parts [[buffer(4)]],
                             device const cv_token* tokens [[buffer(5)]], device const uint* pages [[buffer(6)]], constant cv_attention_params& p [[buffer(7)]], uint3 group [[threadgroup_position_in_grid]],
                             uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint E = (D + 31) / 32, G = CV_ATTN_GROUP, S = CV_ATTN_SIMDGROUPS;
  threadgroup float sums[S * G * D];
  threadgroup float tops[S * G], weights[S * G];
  const uint blocks = (p.group + G - 1) / G, kv_head = group.x / blocks, first_head = (group.x % blocks) * G, token = group.y, part = group.z;
  const uint heads = min(G, p.group - first_head), keys = tokens[token].keys[p.pool], size = keys_of_part(keys), from = part * size;
  if (from >= keys) return;
  const uint to = min(from + size, keys);
  device const uint* list = pages + tokens[token].first_page[p.pool];
  device const T* queries = q + (ulong(token) * p.n_heads + kv_head * p.group + first_head) * D;
  const bool on = lane * E < D;
  float qv[G][E], o[G][E], top[G], weight[G];
  for (uint g = 0; g < G; g++) {
    top[g] = -FLT_MAX;
    weight[g] = 0.0f;
    for (uint i = 0; i < E; i++) {
      qv[g][i] = g < heads && on ? float(queries[g * D + lane * E + i]) * p.scale : 0.0f;
      o[g][i] = 0.0f;
    }
  }
  for (uint t = from + simdgroup; t < to; t += S) {
    const ulong at = cache_bytes<T>(ulong(list[t / p.page_tokens]) * p.page_stride + kv_head * p.head_stride + ulong(t % p.page_tokens) * cache_token(D));
    float kv[E], vv[E];
    for (uint i = 0; i < E; i++) kv[i] = vv[i] = 0.0f;
    if (on) {
      load_cached<T, D, E>(cache_k + at, lane * E, kv);
      load_cached<T, D, E>(cache_v + at, lane * E, vv);
    }
    for (uint g = 0; g < G; g++) {
      if (g >= heads) break;
      float s = 0.0f;
      for (uint i = 0; i < E; i++) s = fma(qv[g][i], kv[i], s);
      s = simd_sum(s);
      const float m = max(top[g], s), old = fast::exp(top[g] - m), w = fast::exp(s - m);
      weight[g] = weight[g] * old + w;
      for (uint i = 0; i < E; i++) o[g][i] = fma(o[g][i], old, w * vv[i]);
      top[g] = m;
    }
  }
  for (uint g = 0; g < heads; g++) {
    if (lane == 0) {
      tops[simdgroup * G + g] = top[g];
      weights[simdgroup * G + g] = weight[g];
    }
    for (uint i = 0; i < E; i++)
      if (on) sums[(simdgroup * G + g) * D + lane * E + i] = o[g][i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < heads * D; i += S * 32) {
    const uint g = i / D, e = i % D;
    float m = tops[g], sum = 0.0f, w = 0.0f;
    for (uint s = 1; s < S; s++) m = max(m, tops[s * G + g]);
    for (uint s = 0; s < S; s++) {
      const float f = fast::exp(tops[s * G + g] - m);
      sum = fma(f, sums[(s * G + g) * D + e], sum);
      w = fma(f, weights[s * G + g], w);
    }
    const uint head = kv_head * p.group + first_head + g;
    if (p.n_splits == 1) {
      out[(ulong(token) * p.n_heads + head) * D + e] = T(sum / w);
    } else {
      device float* to_part = parts + ((ulong(token) * p.n_heads + head) * p.n_splits + part) * (D + 2);
      to_part[e] = sum;
      if (e == 0) {
        to_part[D] = m;
        to_part[D + 1] = w;
      }
    }
  }
}

// Joins the parts of one head of one token. Threadgroup (head, token) of one simdgroup.
template <typename T, uint D>
kernel void attention_join(device const float* parts [[buffer(0)]], device T* out [[buffer(1)]], device const cv_token* tokens [[buffer(2)]], constant cv_attention_params& p [[buffer(3)]],
                           uint2 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const uint head = group.x, token = group.y, keys = tokens[token].keys[p.pool], size = keys_of_part(keys), n = (keys + size - 1) / size;
  device const float* from = parts + (ulong(token) * p.n_heads + head) * p.n_splits * (D + 2);
  float m = -FLT_MAX;
  for (uint i = 0; i < n; i++) m = max(m, from[i * (D + 2) + D]);
  for (uint e = lane; e < D; e += 32) {
    float sum = 0.0f, w = 0.0f;
    for (uint i = 0; i < n; i++) {
      const float f = fast::exp(from[i * (D + 2) + D] - m);
      sum = fma(f, from[i * (D + 2) + e], sum);
      w = fma(f, from[i * (D + 2) + D + 1], w);
    }
    out[(ulong(token) * p.n_heads + head) * D + e] = T(sum / w);
  }
}

// ---- prompts: tiles of 32 queries whose keys begin at the same place, four simdgroups of 8 queries ----

// Threadgroup (tile, query head). Keys and values come in blocks of 16 (a page has at least 16 tokens), none after the tile's
// last key; the diagonal is masked. Scores and weights pass through threadgroup memory, and sums are rescaled by a product with
// a diagonal matrix, so nothing depends on which lane holds which element of a simdgroup matrix.
template <typename T, uint D>
kernel void attention_prefill(device const T* q [[buffer(0)]], device const uchar* cache_k [[buffer(1)]], device const uchar* cache_v [[buffer(2)]], device T* out [[buffer(3)]], device const cv_tile* tiles [[buffer(4)]],
                              device const cv_token* tokens [[buffer(5)]], device const uint* pages [[buffer(6)]], constant cv_attention_params& p [[buffer(7)]], uint2 group [[threadgroup_position_in_grid]],
                              uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint KEYS = 16, S = 4, STRIDE = D + 8, ROW = KEYS + 4;
  threadgroup float kv[KEYS * STRIDE]; // keys as T, then values as float: the weights' type
  threadgroup T* ks = (threadgroup T*)kv;
  threadgroup T qs[S * 8 * STRIDE];
  threadgroup float scores[S * 8 * ROW];
  threadgroup float diagonal[S * 64];
  const uint first = tiles[group.x].first, n = tiles[group.x].n, head = group.y, kv_head = head / p.group, my_first = simdgroup * 8;
  const uint keys_before = tokens[first].keys[p.pool] - 1; // of the tile's first query; query i sees i + 1 more
  const uint all_keys = keys_before + n;
  device const uint* list = pages + tokens[first].first_page[p.pool];
  for (uint i = thread_index; i < S * 8 * D; i += S * 32) {
    const uint row = i / D, e = i % D;
    qs[row * STRIDE + e] = row < n ? q[(ulong(first + row) * p.n_heads + head) * D + e] : T(0.0f);
  }
  for (uint i = lane; i < 64; i += 32) diagonal[simdgroup * 64 + i] = 0.0f;
  threadgroup float* my_scores = scores + my_first * ROW;
  threadgroup float* my_diagonal = diagonal + simdgroup * 64;
  simdgroup_matrix<float, 8, 8> o[D / 8];
  for (uint e = 0; e < D / 8; e++) o[e] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  // Four lanes have a query: 4 keys of each block each.
  const uint row = lane / 4, column = (lane % 4) * 4;
  const uint visible = my_first + row < n ? keys_before + my_first + row + 1 : 0;
  float top = -FLT_MAX, weight = 0.0f;
  for (uint key = 0; key < all_keys; key += KEYS) {
    const ulong at = cache_bytes<T>(ulong(list[key / p.page_tokens]) * p.page_stride + kv_head * p.head_stride + ulong(key % p.page_tokens) * cache_token(D));
    const ulong token_bytes = cache_bytes<T>(cache_token(D));
    const uint last = all_keys - 1 - key; // past it the last key stands again, with weight 0
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < KEYS * D; i += S * 32) ks[i / D * STRIDE + i % D] = T(cache_value<T>(cache_k + at + min(i / D, last) * token_bytes, D, i % D));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<float, 8, 8> s[2];
    for (uint j = 0; j < 2; j++) s[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint e = 0; e < D; e += 8) {
      simdgroup_matrix<T, 8, 8> a, b;
      simdgroup_load(a, qs + my_first * STRIDE + e, STRIDE);
      for (uint j = 0; j < 2; j++) {
        simdgroup_load(b, ks + 8 * j * STRIDE + e, STRIDE, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(s[j], a, b, s[j]);
      }
    }
    for (uint j = 0; j < 2; j++) simdgroup_store(s[j], my_scores + 8 * j, ROW);
    threadgroup_barrier(mem_flags::mem_threadgroup); // keys are read, scores are there
    for (uint i = thread_index; i < KEYS * D; i += S * 32) kv[i / D * STRIDE + i % D] = cache_value<T>(cache_v + at + min(i / D, last) * token_bytes, D, i % D);
    float v[4], m = top;
    for (uint i = 0; i < 4; i++) {
      v[i] = my_scores[row * ROW + column + i] * p.scale;
      if (key + column + i < visible) m = max(m, v[i]);
    }
    m = max(m, simd_shuffle_xor(m, 1));
    m = max(m, simd_shuffle_xor(m, 2));
    const float old = fast::exp(top - m);
    float sum = 0.0f;
    for (uint i = 0; i < 4; i++) {
      v[i] = key + column + i < visible ? fast::exp(v[i] - m) : 0.0f;
      sum += v[i];
      my_scores[row * ROW + column + i] = v[i];
    }
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 2);
    weight = weight * old + sum;
    top = m;
    const bool rescale = simd_any(old != 1.0f);
    if (lane % 4 == 0) my_diagonal[row * 9] = old;
    threadgroup_barrier(mem_flags::mem_threadgroup); // values, weights and factors are there
    if (rescale) {
      simdgroup_matrix<float, 8, 8> factor;
      simdgroup_load(factor, my_diagonal, 8);
      for (uint e = 0; e < D / 8; e++) simdgroup_multiply(o[e], factor, o[e]);
    }
    for (uint j = 0; j < 2; j++) {
      simdgroup_matrix<float, 8, 8> a;
      simdgroup_load(a, my_scores + 8 * j, ROW);
      for (uint e = 0; e < D / 8; e++) {
        simdgroup_matrix<float, 8, 8> b;
        simdgroup_load(b, kv + 8 * j * STRIDE + 8 * e, STRIDE);
        simdgroup_multiply_accumulate(o[e], a, b, o[e]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane % 4 == 0) my_diagonal[row * 9] = weight > 0.0f ? 1.0f / weight : 0.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<float, 8, 8> factor;
  simdgroup_load(factor, my_diagonal, 8);
  for (uint e = 0; e < D / 8; e++) {
    simdgroup_multiply(o[e], factor, o[e]);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(o[e], my_scores, ROW);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < 64; i += 32)
      if (my_first + i / 8 < n) out[(ulong(first + my_first + i / 8) * p.n_heads + head) * D + 8 * e + i % 8] = T(my_scores[i / 8 * ROW + i % 8]);
  }
}

#define ATTENTION(T, suffix, D)                                                                                                     \
  template [[host_name("attention_decode_" suffix "_" #D)]] [[kernel]] decltype(attention_decode<T, D>) attention_decode<T, D>;     \
  template [[host_name("attention_join_" suffix "_" #D)]] [[kernel]] decltype(attention_join<T, D>) attention_join<T, D>;           \
  template [[host_name("attention_prefill_" suffix "_" #D)]] [[kernel]] decltype(attention_prefill<T, D>) attention_prefill<T, D>;
#if CV_ONLY_DIM == 0
#define ATTENTION_TYPE(T, suffix) ATTENTION(T, suffix, 16) ATTENTION(T, suffix, 32) ATTENTION(T, suffix, 64) ATTENTION(T, suffix, 128)
#else
#define ATTENTION_OF(T, suffix, D) ATTENTION(T, suffix, D) // the number instead of its name
#define ATTENTION_TYPE(T, suffix) ATTENTION_OF(T, suffix, CV_ONLY_DIM)
#endif
#if CV_HAS_F32
ATTENTION_TYPE(float, "f32")
#endif
#if CV_HAS_F16
ATTENTION_TYPE(half, "f16")
#endif
#if CV_HAS_BF16
ATTENTION_TYPE(bfloat, "bf16")
#endif
