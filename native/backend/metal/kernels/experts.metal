// experts.metal — mixture of experts. Decoding: the chosen experts are found from the router's logits by every simdgroup that
// needs them, so that a layer's experts take two dispatches. Prompts: tokens are sorted by expert for matmul.metal.
// Llama 4 scales an expert's input by the sigmoid of its logit; both products are linear in it, so it is applied behind them.

// ---- the choice of a step of few tokens: pair t * chosen + k is token t's k-th expert; lane l has pairs l, l + 32, … ----

constant constexpr uint PAIR_WORDS = CV_FEW * CV_MOST_CHOSEN / 32;

METAL_FUNC void choose_pairs(device const float* logits, uint n, uint n_experts, uint chosen, uint lane, thread uint (&expert)[PAIR_WORDS]) {
  for (uint j = 0; j < PAIR_WORDS; j++) expert[j] = n_experts;
  for (uint pair = 0; pair < n * chosen; pair++) {
    const uint e = chosen_expert(logits + ulong(pair / chosen) * n_experts, n_experts, pair % chosen, lane);
    for (uint j = 0; j < PAIR_WORDS; j++)
      if (pair == lane + 32 * j) expert[j] = e;
  }
}

METAL_FUNC uint expert_of_pair(thread uint (&expert)[PAIR_WORDS], uint pair) {
  uint e = 0;
  for (uint j = 0; j < PAIR_WORDS; j++) {
    const uint other = simd_shuffle(expert[j], ushort(pair % 32));
    if (pair / 32 == j) e = other;
  }
  return e;
}

// Whether no pair before this one has its expert.
METAL_FUNC bool is_first(thread uint (&expert)[PAIR_WORDS], uint pair, uint e, uint lane) {
  bool before = false;
  for (uint j = 0; j < PAIR_WORDS; j++) before = before || (lane + 32 * j < pair && expert[j] == e);
  return !simd_any(before);
}

// Up to B of the pairs from `from` on that have expert e, in order; `from` becomes the place to go on. Returns how many.
template <uint B>
METAL_FUNC uint pairs_of(thread uint (&expert)[PAIR_WORDS], uint e, uint n_pairs, thread uint& from, thread uint (&list)[B]) {
  uint n = 0;
  for (; from < n_pairs && n < B; from++)
    if (expert_of_pair(expert, from) == e) list[n++] = from;
  for (uint b = n; b < B; b++) list[b] = n > 0 ? list[n - 1] : 0;
  return n;
}

// ---- hidden activations: act[t][chosen * expert rows + shared rows], experts in the order of choice, shared last ----

// R rows from first_row on of pairs list[0 … n-1], all of expert e; B at least n, L the room of the list.
template <typename T, uint R, uint B, uint L>
METAL_FUNC void expert_up(device const uchar* wg, device const uchar* sg, device const uchar* bg, device const uchar* wu, device const uchar* su, device const uchar* bu, device const float* h, device const float* norm,
                          device const float* logits, device T* act, constant cv_up_params& p, uint e, thread uint (&list)[L], uint n, uint first_row, uint lane) {
  constexpr uint PAIR = B <= PAIRED_INPUTS ? R : 1, BOTH = 2 * PAIR;
  const ulong width = ulong(p.chosen) * p.gate.rows + p.shared_gate.rows;
  uint at[B];
  for (uint b = 0; b < B; b++) at[b] = list[min(b, L - 1)] / p.chosen * p.gate.cols;
  for (uint row0 = first_row; row0 < min(first_row + R, p.gate.rows); row0 += PAIR) {
    float sums[BOTH][B], squares[B];
    gate_and_up<PAIR, B>(format_a(), SAME_FORMATS ? format_a() : format_b(), p.gate, p.up, expert_data(p.gate, wg, e), expert_scales(p.gate, sg, e), expert_biases(p.gate, bg, e), expert_data(p.up, wu, e),
                         expert_scales(p.up, su, e), expert_biases(p.up, bu, e), row0, h, at, norm, lane, sums, squares);
    if (lane != 0) continue;
    const float gate_global = global_scale(p.gate, bg, e), up_global = global_scale(p.up, bu, e);
    for (uint b = 0; b < B && b < n; b++) {
      const uint t = list[min(b, L - 1)] / p.chosen, slot = list[min(b, L - 1)] % p.chosen;
      const float factor = rsqrt(squares[b] / float(p.gate.cols) + p.eps) * expert_score(logits[ulong(t) * p.n_experts + e]);
      for (uint r = 0; r < PAIR && row0 + r < p.gate.rows; r++)
        act[t * width + ulong(slot) * p.gate.rows + row0 + r] = T(silu(sums[r][b] * factor * gate_global) * (sums[PAIR + r][b] * factor * up_global));
    }
  }
}

// Tokens first … first+B-1 of the shared expert.
template <typename T, uint R, uint B>
METAL_FUNC void shared_up(device const uchar* wg, device const uchar* sg, device const uchar* bg, device const uchar* wu, device const uchar* su, device const uchar* bu, device const float* h, device const float* norm,
                          device T* act, constant cv_up_params& p, uint first, uint first_row, uint lane) {
  constexpr uint PAIR = B <= PAIRED_INPUTS ? R : 1, BOTH = 2 * PAIR;
  const ulong width = ulong(p.chosen) * p.gate.rows + p.shared_gate.rows;
  uint at[B];
  for (uint b = 0; b < B; b++) at[b] = min(first + b, p.n - 1) * p.gate.cols;
  for (uint row0 = first_row; row0 < min(first_row + R, p.shared_gate.rows); row0 += PAIR) {
    float sums[BOTH][B], squares[B];
    gate_and_up<PAIR, B>(SAME_FORMATS ? format_a() : format_c(), SAME_FORMATS ? format_a() : format_d(), p.shared_gate, p.shared_up, wg, sg, bg, wu, su, bu, row0, h, at, norm, lane, sums, squares);
    if (lane != 0) continue;
    const float gate_global = global_scale(p.shared_gate, bg, 0), up_global = global_scale(p.shared_up, bu, 0);
    for (uint b = 0; b < B && first + b < p.n; b++) {
      const float factor = rsqrt(squares[b] / float(p.gate.cols) + p.eps);
      for (uint r = 0; r < PAIR && row0 + r < p.shared_gate.rows; r++)
        act[(first + b) * width + ulong(p.chosen) * p.gate.rows + row0 + r] = T(silu(sums[r][b] * factor * gate_global) * (sums[PAIR + r][b] * factor * up_global));
    }
  }
}

// Threadgroup (row block, 1, z): z counts the experts that the step's tokens have chosen, each once, then the shared expert's blocks of
// B tokens. So an expert's weights are read once for all of its tokens: B = 1, 8 or 16 is at least the number of tokens.
template <typename T, uint R, uint B>
kernel void experts_up(device const uchar* wg [[buffer(0)]], device const uchar* sg [[buffer(1)]], device const uchar* bg [[buffer(2)]], device const uchar* wu [[buffer(3)]], device const uchar* su [[buffer(4)]],
                       device const uchar* bu [[buffer(5)]], device const uchar* shared_wg [[buffer(6)]], device const uchar* shared_sg [[buffer(7)]], device const uchar* shared_bg [[buffer(8)]],
                       device const uchar* shared_wu [[buffer(9)]], device const uchar* shared_su [[buffer(10)]], device const uchar* shared_bu [[buffer(11)]], device const float* h [[buffer(12)]],
                       device const float* norm [[buffer(13)]], device const float* logits [[buffer(14)]], device T* act [[buffer(15)]], constant cv_up_params& p [[buffer(16)]],
                       uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint row0 = (group.x * CV_MATVEC_SIMDGROUPS + simdgroup) * R, n_pairs = p.n * p.chosen, n_slots = min(n_pairs, p.n_experts);
  if (group.z >= n_slots) {
    if (row0 < p.shared_gate.rows) shared_up<T, R, B>(shared_wg, shared_sg, shared_bg, shared_wu, shared_su, shared_bu, h, norm, act, p, (group.z - n_slots) * B, row0, lane);
    return;
  }
  if (row0 >= p.gate.rows) return;
  uint list[B];
  if (B == 1) { // one token: its experts are all different
    const uint e = chosen_expert(logits, p.n_experts, group.z, lane);
    list[0] = group.z;
    expert_up<T, R, 1>(wg, sg, bg, wu, su, bu, h, norm, logits, act, p, e, list, 1, row0, lane);
    return;
  }
  uint expert[PAIR_WORDS];
  choose_pairs(logits, p.n, p.n_experts, p.chosen, lane, expert);
  uint from = 0, e = 0, left = group.z + 1;
  for (; from < n_pairs; from++) {
    e = expert_of_pair(expert, from);
    if (is_first(expert, from, e, lane) && --left == 0) break;
  }
  while (from < n_pairs) {
    const uint n = pairs_of<B>(expert, e, n_pairs, from, list);
    if (n == 1) expert_up<T, R, 1>(wg, sg, bg, wu, su, bu, h, norm, logits, act, p, e, list, n, row0, lane);
    else if (n == 2) expert_up<T, R, 2>(wg, sg, bg, wu, su, bu, h, norm, logits, act, p, e, list, n, row0, lane);
    else if (n > 8 && B > 8) expert_up<T, R, B>(wg, sg, bg, wu, su, bu, h, norm, logits, act, p, e, list, n, row0, lane);
    else if (n > 2) expert_up<T, R, 8>(wg, sg, bg, wu, su, bu, h, norm, logits, act, p, e, list, n, row0, lane);
  }
}

// ---- their product with the other matrix ----

// pair_sums[r * stride + pair] = down_e · act of pairs list[0 … n-1], all of expert e; B at least n, L the room of the list.
template <typename T, uint R, uint B, uint L>
METAL_FUNC void expert_down(device const uchar* w, device const uchar* s, device const uchar* b, device const T* act, device const float* unused, constant cv_down_params& p, uint e, thread uint (&list)[L], uint n,
                            uint row0, uint lane, threadgroup float* pair_sums, uint stride) {
  const uint width = p.chosen * p.down.cols + p.shared_down.cols;
  uint at[B];
  for (uint i = 0; i < B; i++) at[i] = list[min(i, L - 1)] / p.chosen * width + list[min(i, L - 1)] % p.chosen * p.down.cols;
  float sums[R][B], squares[B];
  dot_rows<T, R, B, false>(format_a(), p.down, expert_data(p.down, w, e), expert_scales(p.down, s, e), expert_biases(p.down, b, e), row0, act, at, unused, lane, sums, squares);
  if (lane != 0) return;
  const float global = global_scale(p.down, b, e);
  for (uint i = 0; i < B && i < n; i++)
    for (uint r = 0; r < R; r++) pair_sums[r * stride + list[min(i, L - 1)]] = sums[r][i] * global;
}

// h[t] (+)= Σ down_e · act_e + shared_down · act_shared, experts in the order of choice. Threadgroup (row block); a simdgroup has R rows
// for all tokens, and reads each expert that they chose once.
template <typename T, uint R, uint B>
kernel void experts_down(device const uchar* w [[buffer(0)]], device const uchar* s [[buffer(1)]], device const uchar* b [[buffer(2)]], device const uchar* shared_w [[buffer(3)]], device const uchar* shared_s [[buffer(4)]],
                         device const uchar* shared_b [[buffer(5)]], device const T* act [[buffer(6)]], device const float* logits [[buffer(7)]], device float* h [[buffer(8)]], constant cv_down_params& p [[buffer(9)]],
                         uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint PAIRS = (B == 1 ? 1 : CV_FEW) * CV_MOST_CHOSEN;
  threadgroup float sums_of_pairs[CV_MATVEC_SIMDGROUPS * R * PAIRS];
  const uint row0 = (group * CV_MATVEC_SIMDGROUPS + simdgroup) * R, n_pairs = p.n * p.chosen;
  if (row0 >= p.down.rows) return;
  threadgroup float* pair_sums = sums_of_pairs + simdgroup * R * PAIRS;
  const uint width = p.chosen * p.down.cols + p.shared_down.cols;
  uint list[B];
  if (B == 1) {
    for (uint slot = 0; slot < p.chosen; slot++) {
      list[0] = slot;
      expert_down<T, R, 1>(w, s, b, act, h, p, chosen_expert(logits, p.n_experts, slot, lane), list, 1, row0, lane, pair_sums, PAIRS);
    }
  } else {
    uint expert[PAIR_WORDS];
    choose_pairs(logits, p.n, p.n_experts, p.chosen, lane, expert);
    for (uint pair = 0; pair < n_pairs; pair++) {
      const uint e = expert_of_pair(expert, pair);
      if (!is_first(expert, pair, e, lane)) continue;
      uint from = pair;
      while (from < n_pairs) {
        const uint n = pairs_of<B>(expert, e, n_pairs, from, list);
        if (n == 1) expert_down<T, R, 1>(w, s, b, act, h, p, e, list, n, row0, lane, pair_sums, PAIRS);
        else if (n == 2) expert_down<T, R, 2>(w, s, b, act, h, p, e, list, n, row0, lane, pair_sums, PAIRS);
        else if (n > 8 && B > 8) expert_down<T, R, B>(w, s, b, act, h, p, e, list, n, row0, lane, pair_sums, PAIRS);
        else if (n > 2) expert_down<T, R, 8>(w, s, b, act, h, p, e, list, n, row0, lane, pair_sums, PAIRS);
      }
    }
  }
  for (uint first = 0; first < p.n; first += B) {
    uint at[B];
    for (uint t = 0; t < B; t++) at[t] = min(first + t, p.n - 1) * width + p.chosen * p.down.cols;
    float sums[R][B], squares[B];
    dot_rows<T, R, B, false>(SAME_FORMATS ? format_a() : format_b(), p.shared_down, shared_w, shared_s, shared_b, row0, act, at, h, lane, sums, squares);
    if (lane != 0) continue; // lane 0 wrote the pairs' sums itself
    const float global = global_scale(p.shared_down, shared_b, 0);
    for (uint t = 0; t < B && first + t < p.n; t++)
      for (uint r = 0; r < R && row0 + r < p.down.rows; r++) {
        float total = 0.0f;
        for (uint slot = 0; slot < p.chosen; slot++) total += pair_sums[r * PAIRS + (first + t) * p.chosen + slot];
        device float* out = h + ulong(first + t) * p.down.rows + row0 + r;
        const float y = total + sums[r][t] * global;
        *out = p.add != 0 ? *out + y : y;
      }
  }
}

// Sorts the chosen (token, rank) pairs by expert: row r of the sorted rows is token row_token[r] with row_score[r]; pair
// (t, k) is row place[t * chosen + k]. Cuts each expert's rows into tiles for matmul.metal and counts them. One threadgroup.
kernel void experts_sort(device const float* logits [[buffer(0)]], device uint* row_token [[buffer(1)]], device float* row_score [[buffer(2)]], device uint* place [[buffer(3)]], device cv_expert_tile* tiles [[buffer(4)]],
                         device uint* n_tiles [[buffer(5)]], constant cv_moe_params& p [[buffer(6)]], uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup uint count_words[CV_MOST_EXPERTS]; // rows of each expert; then its next free row
  threadgroup atomic_uint* counts = (threadgroup atomic_uint*)count_words;
  for (uint e = thread_index; e < p.n_experts; e += CV_SORT_THREADS) atomic_store_explicit(&counts[e], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint t = thread_index; t < p.n; t += CV_SORT_THREADS) {
    device const float* token_logits = logits + ulong(t) * p.n_experts;
    uint taken[CV_MOST_CHOSEN];
    for (uint k = 0; k < p.chosen; k++) {
      uint best = p.n_experts;
      for (uint e = 0; e < p.n_experts; e++) {
        bool free = true;
        for (uint j = 0; j < k; j++) free = free && taken[j] != e;
        if (free && (best == p.n_experts || token_logits[e] > token_logits[best])) best = e;
      }
      taken[k] = best;
      place[t * p.chosen + k] = best; // its row is known when all have been counted
      atomic_fetch_add_explicit(&counts[best], 1u, memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    uint row = 0, n = 0;
    for (uint e = 0; e < p.n_experts; e++) {
      const uint count = atomic_load_explicit(&counts[e], memory_order_relaxed);
      for (uint i = 0; i < count; i += CV_MATMUL_TOKENS) {
        tiles[n].expert = e;
        tiles[n].first = row + i;
        tiles[n].n = min(count - i, uint(CV_MATMUL_TOKENS));
        n++;
      }
      atomic_store_explicit(&counts[e], row, memory_order_relaxed);
      row += count;
    }
    n_tiles[0] = n;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint t = thread_index; t < p.n; t += CV_SORT_THREADS)
    for (uint k = 0; k < p.chosen; k++) {
      const uint e = place[t * p.chosen + k];
      const uint row = atomic_fetch_add_explicit(&counts[e], 1u, memory_order_relaxed);
      row_token[row] = t;
      row_score[row] = expert_score(logits[ulong(t) * p.n_experts + e]);
      place[t * p.chosen + k] = row;
    }
}

// h[t] (+)= Σ_k expert_out[place of (t, k)] + shared_out[t].
template <bool ADD>
kernel void experts_sum(device const float* expert_out [[buffer(0)]], device const float* shared_out [[buffer(1)]], device const uint* place [[buffer(2)]], device float* h [[buffer(3)]], constant cv_moe_params& p [[buffer(4)]],
                        uint2 at [[thread_position_in_grid]]) {
  if (at.x >= p.hidden || at.y >= p.n) return;
  float y = 0.0f;
  for (uint k = 0; k < p.chosen; k++) y += expert_out[ulong(place[at.y * p.chosen + k]) * p.hidden + at.x];
  const ulong i = ulong(at.y) * p.hidden + at.x;
  if (p.shared != 0) y += shared_out[i];
  h[i] = ADD ? h[i] + y : y;
}
template [[host_name("experts_sum")]] [[kernel]] decltype(experts_sum<false>) experts_sum<false>;
template [[host_name("experts_sum_add")]] [[kernel]] decltype(experts_sum<true>) experts_sum<true>;

#define EXPERTS_TYPE(T, suffix)                                                                                         \
  template [[host_name("experts_up_" suffix "_1")]] [[kernel]] decltype(experts_up<T, 2, 1>) experts_up<T, 2, 1>;       \
  template [[host_name("experts_up_" suffix "_8")]] [[kernel]] decltype(experts_up<T, 2, 8>) experts_up<T, 2, 8>;       \
  template [[host_name("experts_up_" suffix "_16")]] [[kernel]] decltype(experts_up<T, 2, 16>) experts_up<T, 2, 16>;    \
  template [[host_name("experts_down_" suffix "_1")]] [[kernel]] decltype(experts_down<T, 4, 1>) experts_down<T, 4, 1>; \
  template [[host_name("experts_down_" suffix "_8")]] [[kernel]] decltype(experts_down<T, 2, 8>) experts_down<T, 2, 8>; \
  template [[host_name("experts_down_" suffix "_16")]] [[kernel]] decltype(experts_down<T, 2, 16>) experts_down<T, 2, 16>;
#if CV_HAS_F32
EXPERTS_TYPE(float, "f32")
#endif
#if CV_HAS_F16
EXPERTS_TYPE(half, "f16")
#endif
#if CV_HAS_BF16
EXPERTS_TYPE(bfloat, "bf16")
#endif
