// Tensor names and shapes of Scout and Maverick as MLX stores them at 4 bits, from their configs alone.

import type { CheckpointLike, TensorLocation } from "../../src/model/load-plan.ts";
import {
  layoutSafetensors,
  type SafetensorsLayout,
  type TensorSpec,
} from "../../src/model/safetensors-writer.ts";

export type Llama4Name = "scout" | "maverick";

const BITS = 4;
const GROUP = 64;
/** mlx_lm starts a new file before one would grow beyond this. */
const SHARD_BYTES = 5 * 2 ** 30;
const PREFIX = "language_model.";

const TEXT = {
  model_type: "llama4_text",
  hidden_size: 5120,
  intermediate_size: 8192,
  intermediate_size_mlp: 16384,
  num_attention_heads: 40,
  num_key_value_heads: 8,
  head_dim: 128,
  num_experts_per_tok: 1,
  attention_chunk_size: 8192,
  attn_temperature_tuning: 4,
  floor_scale: 8192,
  attn_scale: 0.1,
  no_rope_layers: [],
  rms_norm_eps: 1e-5,
  rope_theta: 500000,
  vocab_size: 202048,
  tie_word_embeddings: false,
  attention_bias: false,
};

const OWN = {
  scout: {
    num_local_experts: 16,
    interleave_moe_layer_step: 1,
    use_qk_norm: true,
    max_position_embeddings: 10485760,
    rope_scaling: {
      rope_type: "llama3",
      factor: 16,
      low_freq_factor: 1,
      high_freq_factor: 1,
      original_max_position_embeddings: 8192,
    },
  },
  maverick: {
    num_local_experts: 128,
    interleave_moe_layer_step: 2,
    use_qk_norm: false,
    max_position_embeddings: 1048576,
    rope_scaling: null,
  },
};

/** Llama4VisionConfig of both models. patch: pixels of a patch, three colours; positions: patches of an image, and one. */
const VISION = { hidden: 1408, ff: 5632, layers: 34, out: 4096, patch: 3 * 14 * 14, positions: 24 * 24 + 1 };

/** config.json of the MLX 4-bit model with `layers` layers (the real ones have 48). text: keys of text_config that are to
 * be others. */
export function llama4Config(
  name: Llama4Name,
  layers = 48,
  text: Record<string, unknown> = {},
): Record<string, unknown> {
  const quantization = { group_size: GROUP, bits: BITS, mode: "affine" };
  return {
    architectures: ["Llama4ForConditionalGeneration"],
    model_type: "llama4",
    text_config: { ...TEXT, ...OWN[name], num_hidden_layers: layers, ...text },
    eos_token_id: [200001, 200007, 200008],
    torch_dtype: "bfloat16",
    quantization,
    quantization_config: quantization,
  };
}

/** Every tensor in the order of the model: all matrices at 4 bits, the router's too, and bf16 norms. */
export function llama4Tensors(name: Llama4Name, layers = 48): TensorSpec[] {
  const { hidden_size: hidden, head_dim, intermediate_size: ff, intermediate_size_mlp: dense } = TEXT;
  const { num_local_experts: experts, interleave_moe_layer_step: step } = OWN[name];
  const q = TEXT.num_attention_heads * head_dim;
  const kv = TEXT.num_key_value_heads * head_dim;
  const out: TensorSpec[] = [];
  const norm = (path: string) =>
    out.push({ name: `${PREFIX}${path}.weight`, dtype: "BF16", shape: [hidden] });
  const matrix = (path: string, ...shape: number[]) => out.push(...quantizedMatrix(PREFIX + path, shape));
  const mlp = (path: string, width: number, ...lead: number[]) => {
    matrix(`${path}gate_proj`, ...lead, width, hidden);
    matrix(`${path}up_proj`, ...lead, width, hidden);
    matrix(`${path}down_proj`, ...lead, hidden, width);
  };
  matrix("model.embed_tokens", TEXT.vocab_size, hidden);
  for (let i = 0; i < layers; i++) {
    const base = `model.layers.${i}.`;
    norm(`${base}input_layernorm`);
    matrix(`${base}self_attn.q_proj`, q, hidden);
    matrix(`${base}self_attn.k_proj`, kv, hidden);
    matrix(`${base}self_attn.v_proj`, kv, hidden);
    matrix(`${base}self_attn.o_proj`, hidden, q);
    norm(`${base}post_attention_layernorm`);
    if ((i + 1) % step !== 0) {
      mlp(`${base}feed_forward.`, dense);
      continue;
    }
    matrix(`${base}feed_forward.router`, experts, hidden);
    mlp(`${base}feed_forward.experts.`, ff, experts);
    mlp(`${base}feed_forward.shared_expert.`, ff);
  }
  norm("model.norm");
  matrix("lm_head", TEXT.vocab_size, hidden);
  return out;
}

/** What conversions of the whole model (mlx-vlm) hold beside the text: the image encoder, its adapter and projector. */
export function llama4VisionTensors(): TensorSpec[] {
  const { hidden, ff, layers, out: adapted, patch, positions } = VISION;
  const specs: TensorSpec[] = [];
  const float = (name: string, ...shape: number[]) => specs.push({ name, dtype: "BF16", shape });
  const matrix = (path: string, rows: number, cols: number, bias = true) => {
    specs.push(...quantizedMatrix(path, [rows, cols]));
    if (bias) float(`${path}.bias`, rows);
  };
  const norm = (path: string) => {
    for (const part of ["weight", "bias"]) float(`${path}.${part}`, hidden);
  };
  const base = "vision_model.";
  float(`${base}class_embedding`, hidden);
  // Its rows are no multiple of a group.
  float(`${base}patch_embedding.linear.weight`, hidden, patch);
  float(`${base}positional_embedding_vlm`, positions, hidden);
  for (const name of ["layernorm_pre", "layernorm_post"]) norm(base + name);
  for (let i = 0; i < layers; i++) {
    const layer = `${base}model.layers.${i}.`;
    for (const name of ["q_proj", "k_proj", "v_proj", "o_proj"])
      matrix(`${layer}self_attn.${name}`, hidden, hidden);
    matrix(`${layer}mlp.fc1`, ff, hidden);
    matrix(`${layer}mlp.fc2`, hidden, ff);
    for (const name of ["input_layernorm", "post_attention_layernorm"]) norm(layer + name);
  }
  matrix(`${base}vision_adapter.mlp.fc1`, adapted, ff, false);
  matrix(`${base}vision_adapter.mlp.fc2`, adapted, adapted, false);
  matrix("multi_modal_projector.linear_1", TEXT.hidden_size, adapted, false);
  return specs;
}

/** Codes, scales and biases of [.., rows, cols]. */
function quantizedMatrix(path: string, shape: number[]): TensorSpec[] {
  const lead = shape.slice(0, -1);
  const cols = shape.at(-1) ?? 0;
  return [
    { name: `${path}.weight`, dtype: "U32", shape: [...lead, (cols * BITS) / 32] },
    { name: `${path}.scales`, dtype: "BF16", shape: [...lead, cols / GROUP] },
    { name: `${path}.biases`, dtype: "BF16", shape: [...lead, cols / GROUP] },
  ];
}

export interface Shard {
  /** model-0000k-of-0000n.safetensors */
  name: string;
  layout: SafetensorsLayout;
}

/** Files of at most 5 GiB; a tensor is never split, so a larger one has a file of its own. */
export function llama4Shards(specs: readonly TensorSpec[]): Shard[] {
  const groups: TensorSpec[][] = [];
  let used = Number.POSITIVE_INFINITY;
  for (const spec of specs) {
    const bytes = (spec.dtype === "U32" ? 4 : 2) * spec.shape.reduce((product, size) => product * size, 1);
    if (used + bytes > SHARD_BYTES) {
      groups.push([]);
      used = 0;
    }
    groups.at(-1)?.push(spec);
    used += bytes;
  }
  const five = (n: number) => String(n).padStart(5, "0");
  return groups.map((group, k) => ({
    name: `model-${five(k + 1)}-of-${five(groups.length)}.safetensors`,
    layout: layoutSafetensors(group, { format: "mlx" }),
  }));
}

/** What openCheckpoint would say of these shards in `dir`, without files. */
export function llama4Checkpoint(shards: readonly Shard[], dir = ""): CheckpointLike {
  const tensors = new Map<string, TensorLocation>();
  for (const { name, layout } of shards)
    for (const [tensor, info] of layout.tensors) tensors.set(tensor, { ...info, file: `${dir}/${name}` });
  const files = shards.map(({ name, layout }) => ({ path: `${dir}/${name}`, sizeBytes: layout.sizeBytes }));
  return { files, tensors };
}

/** Bytes of all tensors, without headers. */
export function tensorBytes(shards: readonly Shard[]): number {
  let total = 0;
  for (const { layout } of shards) for (const { sizeBytes } of layout.tensors.values()) total += sizeBytes;
  return total;
}
