// Configs and tensor shapes of small models whose every matrix has a format of its own, for tests of plans and shards.

import fc from "fast-check";
import { parseModelConfig } from "../../src/model/config.ts";
import {
  type CheckpointLike,
  type LoadPlan,
  makeLoadPlan,
  type TensorLocation,
} from "../../src/model/load-plan.ts";

export interface MatrixFormat {
  mode: "float" | "affine" | "mxfp4" | "mxfp8" | "nvfp4";
  bits: number;
  group: number;
  scales: string;
}

const affine = [2, 3, 4, 5, 6, 8].flatMap((bits) =>
  [32, 64, 128].flatMap((group) =>
    ["BF16", "F16", "F32"].map((scales): MatrixFormat => ({ mode: "affine", bits, group, scales })),
  ),
);

/** Every format of weights that the loader knows. */
export const FORMATS: readonly MatrixFormat[] = [
  ...["BF16", "F16", "F32"].map((scales): MatrixFormat => ({ mode: "float", bits: 0, group: 1, scales })),
  ...affine,
  { mode: "mxfp4", bits: 4, group: 32, scales: "U8" },
  { mode: "mxfp8", bits: 8, group: 32, scales: "U8" },
  { mode: "nvfp4", bits: 4, group: 16, scales: "U8" },
];

export interface MixedModel {
  architecture: "llama" | "llama4";
  layers: number;
  kvHeads: number;
  queriesPerKey: number;
  headDim: number;
  hidden: number;
  /** Of dense layers and of experts, multiples of 128. */
  dense: number;
  expert: number;
  experts: number;
  vocab: number;
  tied: boolean;
  biases: boolean;
  /** Experts as Hugging Face stores them: transposed floats, gate and up in one. */
  fusedExperts: boolean;
  /** Taken in turn by the matrices; one that a matrix's width does not allow becomes bf16. */
  formats: readonly MatrixFormat[];
}

const pick = <T>(...values: T[]) => fc.constantFrom(...values);

export const mixedModels: fc.Arbitrary<MixedModel> = fc.record({
  architecture: pick("llama" as const, "llama4" as const),
  layers: fc.integer({ min: 1, max: 5 }),
  kvHeads: fc.integer({ min: 1, max: 5 }),
  queriesPerKey: fc.integer({ min: 1, max: 3 }),
  headDim: pick(16, 32, 64),
  hidden: pick(64, 128),
  dense: pick(128, 384, 640),
  expert: pick(128, 256),
  experts: pick(1, 3, 4),
  vocab: fc.integer({ min: 20, max: 300 }),
  tied: fc.boolean(),
  biases: fc.boolean(),
  fusedExperts: fc.boolean(),
  formats: fc.array(fc.constantFrom(...FORMATS), { minLength: 1, maxLength: 12 }),
});

/** The whole model's plan. Tensors follow each other in one file, as a safetensors file without gaps has them. */
export function mixedPlan(model: MixedModel): LoadPlan {
  return makeLoadPlan(parseModelConfig(configOf(model), "/m/config.json"), checkpointOf(model));
}

function configOf(m: MixedModel): object {
  const heads = m.kvHeads * m.queriesPerKey;
  const common = {
    hidden_size: m.hidden,
    num_hidden_layers: m.layers,
    num_attention_heads: heads,
    num_key_value_heads: m.kvHeads,
    head_dim: m.headDim,
    vocab_size: m.vocab,
    tie_word_embeddings: m.tied,
    attention_bias: m.biases,
  };
  if (m.architecture === "llama")
    return { ...common, architectures: ["LlamaForCausalLM"], intermediate_size: m.dense, mlp_bias: m.biases };
  return {
    ...common,
    architectures: ["Llama4ForCausalLM"],
    intermediate_size: m.expert,
    intermediate_size_mlp: m.dense,
    num_local_experts: m.experts,
    num_experts_per_tok: 1,
    interleave_moe_layer_step: 2,
    attention_chunk_size: 32,
  };
}

class Shapes {
  readonly tensors = new Map<string, TensorLocation>();
  #at = 808;
  #next = 0;

  constructor(readonly model: MixedModel) {}

  get size(): number {
    return this.#at;
  }

  add(name: string, dtype: string, ...shape: number[]): void {
    const width = dtype === "U8" ? 1 : dtype === "BF16" || dtype === "F16" ? 2 : 4;
    this.tensors.set(name, { file: "/m/model.safetensors", dtype, shape, offset: this.#at });
    this.#at += shape.reduce((product, size) => product * size, width);
  }

  matrix(path: string, ...shape: number[]): void {
    const { formats } = this.model;
    const format = formats[this.#next++ % formats.length];
    const lead = shape.slice(0, -1);
    const cols = shape.at(-1) ?? 0;
    if (format === undefined || format.mode === "float" || cols % format.group !== 0) {
      this.add(`${path}.weight`, format?.mode === "float" ? format.scales : "BF16", ...shape);
      return;
    }
    this.add(`${path}.weight`, "U32", ...lead, (cols * format.bits) / 32);
    this.add(`${path}.scales`, format.scales, ...lead, cols / format.group);
    if (format.mode === "affine") this.add(`${path}.biases`, format.scales, ...lead, cols / format.group);
    if (format.mode === "nvfp4")
      this.add(`${path}.global_scale`, "F32", shape.length === 3 ? (shape[0] ?? 1) : 1);
  }

  mlp(base: string, hidden: number, width: number, ...lead: number[]): void {
    this.matrix(`${base}gate_proj`, ...lead, width, hidden);
    this.matrix(`${base}up_proj`, ...lead, width, hidden);
    this.matrix(`${base}down_proj`, ...lead, hidden, width);
  }
}

function checkpointOf(m: MixedModel): CheckpointLike {
  const s = new Shapes(m);
  const q = m.kvHeads * m.queriesPerKey * m.headDim;
  const kv = m.kvHeads * m.headDim;
  s.matrix("model.embed_tokens", m.vocab, m.hidden);
  for (let i = 0; i < m.layers; i++) {
    const base = `model.layers.${i}.`;
    s.add(`${base}input_layernorm.weight`, "BF16", m.hidden);
    s.add(`${base}post_attention_layernorm.weight`, "BF16", m.hidden);
    for (const [name, rows, cols] of [
      ["q", q, m.hidden],
      ["k", kv, m.hidden],
      ["v", kv, m.hidden],
      ["o", m.hidden, q],
    ] as const) {
      s.matrix(`${base}self_attn.${name}_proj`, rows, cols);
      if (m.biases) s.add(`${base}self_attn.${name}_proj.bias`, "F16", rows);
    }
    if (m.architecture === "llama4" && i % 2 === 1) experts(s, `${base}feed_forward.`);
    else if (m.architecture === "llama4") s.mlp(`${base}feed_forward.`, m.hidden, m.dense);
    else {
      s.mlp(`${base}mlp.`, m.hidden, m.dense);
      if (!m.biases) continue;
      for (const [name, rows] of [
        ["gate", m.dense],
        ["up", m.dense],
        ["down", m.hidden],
      ] as const)
        s.add(`${base}mlp.${name}_proj.bias`, "F32", rows);
    }
  }
  s.add("model.norm.weight", "BF16", m.hidden);
  if (!m.tied) s.matrix("lm_head", m.vocab, m.hidden);
  return { files: [{ path: "/m/model.safetensors", sizeBytes: s.size }], tensors: s.tensors };
}

function experts(s: Shapes, base: string): void {
  const { experts: n, hidden, expert } = s.model;
  s.matrix(`${base}router`, n, hidden);
  if (s.model.fusedExperts) {
    s.add(`${base}experts.gate_up_proj`, "BF16", n, hidden, 2 * expert);
    s.add(`${base}experts.down_proj`, "BF16", n, expert, hidden);
  } else s.mlp(`${base}experts.`, hidden, expert, n);
  s.mlp(`${base}shared_expert.`, hidden, expert);
}
