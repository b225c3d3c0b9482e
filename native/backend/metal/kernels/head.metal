// head.metal — what a sampler wants of the logits, without moving them: the largest, the K largest, and log Σ exp.
// Threadgroup a row of logits, 256 threads. Ties go to the lower index.

// out[row]: index of the largest; lse[row]: log Σ exp(logit).
kernel void head_reduce(device const float* logits [[buffer(0)]], device uint* largest [[buffer(1)]], device float* lse [[buffer(2)]], constant cv_head_params& p [[buffer(3)]], uint row [[threadgroup_position_in_grid]],
                        uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint n_simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                        uint threads [[threads_per_threadgroup]]) {
  threadgroup float values[32], totals[32];
  threadgroup uint indices[32];
  device const float* x = logits + ulong(row) * p.n;
  float value = -FLT_MAX, total = 0.0f;
  uint index = p.n;
  for (uint i = thread_index; i < p.n; i += threads) {
    if (index == p.n || x[i] > value) {
      total *= exp(value - x[i]);
      value = x[i];
      index = i;
    }
    total += exp(x[i] - value);
  }
  const float top = simd_max(value);
  const uint first = simd_min(value == top ? index : p.n);
  const float sum = simd_sum(total * exp(value - top));
  if (lane == 0) {
    values[simdgroup] = top;
    indices[simdgroup] = first;
    totals[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index != 0) return;
  float all = 0.0f;
  for (uint i = 0; i < n_simdgroups; i++)
    if (i == 0 || values[i] > value || (values[i] == value && indices[i] < index)) {
      value = values[i];
      index = indices[i];
    }
  for (uint i = 0; i < n_simdgroups; i++) all += totals[i] * exp(values[i] - value);
  largest[row] = index;
  lse[row] = value + log(all);
}

// indices[row], values[row]: the p.top largest, largest first. p.top passes over the logits, each taking the largest that comes
// after the one before it in the order (value down, index up).
kernel void head_top(device const float* logits [[buffer(0)]], device uint* indices [[buffer(1)]], device float* values [[buffer(2)]], constant cv_head_params& p [[buffer(3)]], uint row [[threadgroup_position_in_grid]],
                     uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]], uint n_simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                     uint threads [[threads_per_threadgroup]]) {
  threadgroup float part_value[32];
  threadgroup uint part_index[32];
  device const float* x = logits + ulong(row) * p.n;
  float last_value = FLT_MAX;
  uint last_index = 0;
  for (uint k = 0; k < p.top; k++) {
    float value = -FLT_MAX;
    uint index = p.n;
    for (uint i = thread_index; i < p.n; i += threads) {
      const bool after = k == 0 || x[i] < last_value || (x[i] == last_value && i > last_index);
      if (after && (index == p.n || x[i] > value)) {
        value = x[i];
        index = i;
      }
    }
    const float top = simd_max(value);
    const uint first = simd_min(value == top ? index : p.n);
    if (lane == 0) {
      part_value[simdgroup] = top;
      part_index[simdgroup] = first;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    last_value = part_value[0];
    last_index = part_index[0];
    for (uint i = 1; i < n_simdgroups; i++)
      if (part_value[i] > last_value || (part_value[i] == last_value && part_index[i] < last_index)) {
        last_value = part_value[i];
        last_index = part_index[i];
      }
    if (thread_index == 0) {
      indices[ulong(row) * p.top + k] = last_index;
      values[ulong(row) * p.top + k] = last_value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
