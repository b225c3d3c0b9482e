// matmul.metal — weight matrices times many rows: prompts. Tiles of 32 rows of x by 64 of the matrix, weights decoded into
// threadgroup memory and multiplied with simdgroup matrices, sums in float. Four simdgroups have 16 x 32 of the tile each.
// Decoded weights are rounded to the kernel's type T, which the matrix-vector kernels do not do.

constant constexpr uint TOKENS = CV_MATMUL_TOKENS, TILE_ROWS = CV_MATMUL_ROWS, TILE_COLS = CV_MATMUL_COLS;
constant constexpr uint STRIDE = TILE_COLS + 8; // of a tile in threadgroup memory: rows start in different banks
constant constexpr uint THREADS = 128;

// y[t][r] = Σ_c W[r][c] * x[t][c]. Threadgroup (row block, row tile of x).
//   SWIGLU   out = silu(a·x) * (b·x): 32 rows of gate and of up a tile
//   EXPERTS  row tiles are tiles[]: rows sorted by expert; 1: x is gathered by row_token and scaled by row_score; 2: x is sorted
template <typename T>
kernel void matmul(device const uchar* wa [[buffer(0)]], device const uchar* sa [[buffer(1)]], device const uchar* ba [[buffer(2)]], device const uchar* wb [[buffer(3)]], device const uchar* sb [[buffer(4)]],
                   device const uchar* bb [[buffer(5)]], device const T* x [[buffer(6)]], device uchar* out [[buffer(7)]], device const float* bias_a [[buffer(8)]], device const float* bias_b [[buffer(9)]],
                   device const cv_expert_tile* tiles [[buffer(10)]], device const uint* n_tiles [[buffer(11)]], device const uint* row_token [[buffer(12)]], device const float* row_score [[buffer(13)]],
                   constant cv_matmul_params& p [[buffer(14)]], uint2 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup T xs[TOKENS * STRIDE];
  threadgroup T ws[TILE_ROWS * STRIDE];
  threadgroup float sums[TOKENS * TILE_ROWS];
  uint expert = 0, first = group.y * TOKENS, n = min(p.n - min(first, p.n), TOKENS);
  if (EXPERTS != 0) {
    if (group.y >= n_tiles[0]) return;
    expert = tiles[group.y].expert;
    first = tiles[group.y].first;
    n = tiles[group.y].n;
  }
  const uint rows_a_tile = SWIGLU ? TILE_ROWS / 2 : TILE_ROWS, row0 = group.x * rows_a_tile, cols = p.a.cols;
  const uint token0 = (simdgroup / 2) * 16, column0 = (simdgroup % 2) * 32;
  simdgroup_matrix<float, 8, 8> c[2][4];
  for (uint i = 0; i < 2; i++)
    for (uint j = 0; j < 4; j++) c[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  // Each thread decodes 16 columns of one row of the weight tile, and copies 8 of x.
  const uint w_row = thread_index / 2, w_half = thread_index % 2;
  const bool second = SWIGLU && w_row >= TILE_ROWS / 2;
  const uint matrix_row = row0 + (second ? w_row - TILE_ROWS / 2 : w_row);
  const uint x_row = thread_index / 4, x_col = (thread_index % 4) * 8;
  const uint row = first + min(x_row, max(n, 1u) - 1);
  device const T* x_from = x + ulong(EXPERTS == 1 ? row_token[row] : row) * cols;
  const float score = EXPERTS == 1 ? row_score[row] : 1.0f;
  for (uint k = 0; k < cols; k += TILE_COLS) {
    for (uint i = 0; i < 8; i++) {
      const uint col = k + x_col + i;
      const bool there = x_row < n && col < cols;
      xs[x_row * STRIDE + x_col + i] = there ? (EXPERTS == 1 ? T(float(x_from[col]) * score) : x_from[col]) : T(0.0f);
    }
    float v[16];
    for (uint i = 0; i < 16; i++) v[i] = 0.0f;
    const uint chunk = k / 16 + w_half;
    if (chunk < cols / 16) {
      if (!second && matrix_row < p.a.rows) {
        const ulong r = matrix_row;
        decode16(format_a(), expert_data(p.a, wa, expert) + r * p.a.row_bytes, expert_scales(p.a, sa, expert) + r * p.a.scale_row_bytes, expert_biases(p.a, ba, expert) + r * p.a.scale_row_bytes, chunk, v);
      } else if (second && matrix_row < p.b.rows) {
        const ulong r = matrix_row;
        decode16(SAME_FORMATS ? format_a() : format_b(), expert_data(p.b, wb, expert) + r * p.b.row_bytes, expert_scales(p.b, sb, expert) + r * p.b.scale_row_bytes, expert_biases(p.b, bb, expert) + r * p.b.scale_row_bytes, chunk, v);
      }
    }
    for (uint i = 0; i < 16; i++) ws[w_row * STRIDE + w_half * 16 + i] = T(v[i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint kk = 0; kk < TILE_COLS; kk += 8) {
      simdgroup_matrix<T, 8, 8> a[2], b[4];
      for (uint i = 0; i < 2; i++) simdgroup_load(a[i], xs + (token0 + 8 * i) * STRIDE + kk, STRIDE);
      for (uint j = 0; j < 4; j++) simdgroup_load(b[j], ws + (column0 + 8 * j) * STRIDE + kk, STRIDE, ulong2(0, 0), true);
      for (uint i = 0; i < 2; i++)
        for (uint j = 0; j < 4; j++) simdgroup_multiply_accumulate(c[i][j], a[i], b[j], c[i][j]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (uint i = 0; i < 2; i++)
    for (uint j = 0; j < 4; j++) simdgroup_store(c[i][j], sums + (token0 + 8 * i) * TILE_ROWS + column0 + 8 * j, TILE_ROWS);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float global_a = global_scale(p.a, ba, expert), global_b = SWIGLU ? global_scale(p.b, bb, expert) : 1.0f;
  for (uint i = thread_index; i < n * rows_a_tile; i += THREADS) {
    const uint t = i / rows_a_tile, r = i % rows_a_tile;
    if (row0 + r >= p.a.rows) continue;
    float y = sums[t * TILE_ROWS + r] * global_a;
    if (BIAS) y += bias_a[row0 + r];
    if (SWIGLU) {
      float u = sums[t * TILE_ROWS + TILE_ROWS / 2 + r] * global_b;
      if (BIAS) u += bias_b[row0 + r];
      y = silu(y) * u;
    }
    const ulong at = ulong(first + t) * p.a.rows + row0 + r;
    if (OUTPUT == CV_OUT_ADD) ((device float*)out)[at] += y;
    else if (OUTPUT == CV_OUT_FLOAT) ((device float*)out)[at] = y;
    else ((device T*)out)[at] = T(y);
  }
}
#if CV_HAS_F32
template [[host_name("matmul_f32")]] [[kernel]] decltype(matmul<float>) matmul<float>;
#endif
#if CV_HAS_F16
template [[host_name("matmul_f16")]] [[kernel]] decltype(matmul<half>) matmul<half>;
#endif
#if CV_HAS_BF16
template [[host_name("matmul_bf16")]] [[kernel]] decltype(matmul<bfloat>) matmul<bfloat>;
#endif
