// Offsets and sizes of the records in native/include/caravan.h, written by hand; layout.test.ts compares every one with
// what the library says. All little-endian.

export const PLAN_MAGIC = 0x4e4c5043;
export const STEP_MAGIC = 0x50545343;
export const ABI_VERSION = 3;
export const NO_FILE = 0xffffffff;

export const SOURCE = { size: 32, file: 0, offset: 8, outer_stride: 16, row_stride: 24 } as const;

export const TENSOR = {
  size: 184,
  slot: 0,
  layer: 4,
  format: 8,
  bits: 12,
  group: 16,
  scale_type: 20,
  flags: 24,
  experts: 32,
  rows: 40,
  cols: 48,
  weight: 56,
  scales: 88,
  biases: 120,
  global_scale: 152,
} as const;

export const LAYER = { size: 16, index: 0, flags: 4, n_heads: 8, n_kv_heads: 12 } as const;

export const FILE = { size: 16, path_offset: 0, file_size: 8 } as const;

export const PLAN = {
  size: 176,
  magic: 0,
  version: 4,
  total_size: 8,
  n_files: 16,
  n_layers: 20,
  n_tensors: 24,
  flags: 28,
  files_offset: 32,
  layers_offset: 40,
  tensors_offset: 48,
  inv_freq_offset: 56,
  hidden: 64,
  head_dim: 68,
  vocab: 72,
  n_experts: 76,
  experts_per_token: 80,
  chunk: 84,
  page_tokens: 88,
  n_full_pages: 92,
  n_chunk_pages: 96,
  kv_type: 100,
  device: 104,
  compute: 108,
  n_threads: 112,
  max_rows: 116,
  max_tokens: 120,
  max_logits: 124,
  n_slots: 128,
  norm_eps: 132,
  qk_norm_eps: 136,
  attn_scale: 140,
  floor_scale: 144,
  cpu_level: 148,
  tensor_rank: 152,
  tensor_size: 156,
  stage: 160,
  n_stages: 164,
  vocab_first: 168,
  vocab_rows: 172,
} as const;

export const STEP = {
  size: 48,
  magic: 0,
  version: 4,
  total_size: 8,
  n_rows: 16,
  n_copies: 20,
  rows_offset: 24,
  copies_offset: 32,
  timeout_ms: 40,
} as const;

export const STEP_ROW = {
  size: 160,
  first_position: 0,
  n_tokens: 8,
  slot: 12,
  tokens_offset: 16,
  full_pages_offset: 24,
  chunk_pages_offset: 32,
  chunk_base: 40,
  n_full_pages: 48,
  n_chunk_pages: 52,
  logits: 56,
  flags: 60,
  seed: 64,
  temperature: 72,
  top_p: 76,
  min_p: 80,
  xtc_probability: 84,
  xtc_threshold: 88,
  repetition_penalty: 92,
  presence_penalty: 96,
  frequency_penalty: 100,
  top_k: 104,
  n_top_logprobs: 108,
  bias_offset: 112,
  history_offset: 120,
  mask_offset: 128,
  n_bias: 136,
  n_history: 140,
  xtc_keep_offset: 144,
  n_xtc_keep: 152,
} as const;

export const STEP_BIAS = { size: 8, token: 0, bias: 4 } as const;
export const STEP_HISTORY = { size: 12, token: 0, in_output: 4, in_context: 8 } as const;
export const STEP_COPY = { size: 16, pool: 0, from: 4, to: 8 } as const;

export const RESULT = {
  size: 64,
  ticket: 0,
  total_size: 8,
  n_rows: 16,
  rows_offset: 24,
  compute_ns: 32,
  queued_ns: 40,
  exchange_ns: 48,
  mask_ns: 56,
} as const;

export const RESULT_ROW = {
  size: 40,
  token: 0,
  logprob: 4,
  n_top: 8,
  n_logits: 12,
  top_offset: 16,
  logits_offset: 24,
  status: 32,
} as const;

export const RESULT_TOP = { size: 8, token: 0, logprob: 4 } as const;

export const GROUP_OPTIONS = {
  size: 1072,
  version: 0,
  rank: 4,
  ranks: 8,
  transport: 12,
  epoch: 16,
  key: 24,
  instance: 56,
  host: 72,
  rdma_device: 328,
  no_rdma: 840,
  silence_ms: 1040,
  max_message: 1044,
  rdma_flags: 1048,
} as const;

export const GROUP_STATS = {
  size: 64,
  transport: 0,
  failed: 4,
  reduces: 8,
  reduce_ns: 16,
  reduce_bytes: 24,
  messages: 32,
  message_bytes: 40,
  mac_ns: 48,
  round_trip_us: 56,
  strangers: 60,
} as const;

/** C record name, TypeScript constant, and TypeScript's name for a field where it differs. */
export const RECORDS: Record<string, Record<string, number>> = {
  cv_plan_source: SOURCE,
  cv_plan_tensor: TENSOR,
  cv_plan_layer: LAYER,
  cv_plan_file: FILE,
  cv_plan: PLAN,
  cv_step: STEP,
  cv_step_row: STEP_ROW,
  cv_step_bias: STEP_BIAS,
  cv_step_history: STEP_HISTORY,
  cv_step_copy: STEP_COPY,
  cv_result: RESULT,
  cv_result_row: RESULT_ROW,
  cv_result_top: RESULT_TOP,
  cv_group_options: GROUP_OPTIONS,
  cv_group_stats_record: GROUP_STATS,
};
