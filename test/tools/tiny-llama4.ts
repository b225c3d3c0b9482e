// A Llama 4 checkpoint small enough to make in a test: random float32 weights under the hub's names, chunked layers
// of 32 tokens with RoPE and QK norm, every fourth layer with full attention, four experts in every second layer.

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { layoutSafetensors, type TensorSpec } from "../../src/model/safetensors-writer.ts";
import { seededRandom } from "./seeded-random.ts";

export const TINY_VOCAB = 160;
const HIDDEN = 64;
const LAYERS = 4;
const HEADS = 4;
const KV_HEADS = 2;
const HEAD_DIM = 16;
const EXPERTS = 4;
const FF = 64;
const DENSE_FF = 96;

const CONFIG = {
  architectures: ["Llama4ForCausalLM"],
  model_type: "llama4_text",
  hidden_size: HIDDEN,
  intermediate_size: FF,
  intermediate_size_mlp: DENSE_FF,
  num_hidden_layers: LAYERS,
  num_attention_heads: HEADS,
  num_key_value_heads: KV_HEADS,
  head_dim: HEAD_DIM,
  vocab_size: TINY_VOCAB,
  num_local_experts: EXPERTS,
  num_experts_per_tok: 1,
  interleave_moe_layer_step: 2,
  attention_chunk_size: 32,
  floor_scale: 16,
  attn_scale: 0.1,
  use_qk_norm: true,
  attn_temperature_tuning: true,
  max_position_embeddings: 4096,
  rope_theta: 10000,
  rms_norm_eps: 1e-5,
  tie_word_embeddings: false,
  torch_dtype: "float32",
  eos_token_id: [2, 3],
};

export interface TinyLlama4Options {
  vocab?: number;
  contextTokens?: number;
  /** Tokens whose logit is always 0, so that greedy decoding never takes them. */
  never?: readonly number[];
}

/** Writes config.json and model.safetensors into `dir`, which exists. The same seed gives the same bytes. */
export function writeTinyLlama4(dir: string, seed = 7, options: TinyLlama4Options = {}): void {
  const { vocab = TINY_VOCAB, contextTokens = CONFIG.max_position_embeddings, never = [] } = options;
  const config = { ...CONFIG, vocab_size: vocab, max_position_embeddings: contextTokens };
  writeFileSync(join(dir, "config.json"), JSON.stringify(config));
  const specs = tensors(vocab);
  const { head, tensors: placed, sizeBytes } = layoutSafetensors(specs, { format: "pt" });
  const file = new Uint8Array(sizeBytes);
  file.set(head);
  const view = new DataView(file.buffer);
  const random = seededRandom(seed);
  for (const { name, shape } of specs) {
    const count = shape.reduce((product, size) => product * size, 1);
    const at = placed.get(name)?.offset ?? 0;
    // Norm weights around 1; matrices large enough that the next token depends on everything.
    const norm = name.endsWith("norm.weight");
    const scale = norm ? 0.1 : 2.5 / Math.sqrt(shape.at(-1) ?? 1);
    for (let i = 0; i < count; i++)
      view.setFloat32(at + i * 4, (norm ? 1 : 0) + (random() * 2 - 1) * scale, true);
  }
  const logits = placed.get("lm_head.weight")?.offset ?? 0;
  for (const token of never) file.fill(0, logits + token * HIDDEN * 4, logits + (token + 1) * HIDDEN * 4);
  writeFileSync(join(dir, "model.safetensors"), file);
}

function tensors(vocab: number): TensorSpec[] {
  const list: [string, number[]][] = [
    ["model.embed_tokens.weight", [vocab, HIDDEN]],
    ["model.norm.weight", [HIDDEN]],
    ["lm_head.weight", [vocab, HIDDEN]],
  ];
  for (let i = 0; i < LAYERS; i++) {
    const base = `model.layers.${i}.`;
    list.push(
      [`${base}input_layernorm.weight`, [HIDDEN]],
      [`${base}post_attention_layernorm.weight`, [HIDDEN]],
      [`${base}self_attn.q_proj.weight`, [HEADS * HEAD_DIM, HIDDEN]],
      [`${base}self_attn.k_proj.weight`, [KV_HEADS * HEAD_DIM, HIDDEN]],
      [`${base}self_attn.v_proj.weight`, [KV_HEADS * HEAD_DIM, HIDDEN]],
      [`${base}self_attn.o_proj.weight`, [HIDDEN, HEADS * HEAD_DIM]],
    );
    const mlp = (path: string, ff: number): void => {
      list.push([`${path}gate_proj.weight`, [ff, HIDDEN]], [`${path}up_proj.weight`, [ff, HIDDEN]]);
      list.push([`${path}down_proj.weight`, [HIDDEN, ff]]);
    };
    if ((i + 1) % 2 !== 0) {
      mlp(`${base}feed_forward.`, DENSE_FF);
      continue;
    }
    list.push([`${base}feed_forward.router.weight`, [EXPERTS, HIDDEN]]);
    list.push([`${base}feed_forward.experts.gate_up_proj`, [EXPERTS, HIDDEN, 2 * FF]]);
    list.push([`${base}feed_forward.experts.down_proj`, [EXPERTS, FF, HIDDEN]]);
    mlp(`${base}feed_forward.shared_expert.`, FF);
  }
  return list.map(([name, shape]) => ({ name, dtype: "F32", shape }));
}
