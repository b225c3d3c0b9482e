// Writes the config.json that an MLX checkpoint of this model has: LlamaForCausalLM, or Llama 4 with its keys under
// text_config (llama4.md 1.1 and 3.2).

import type { Hyperparameters } from "./hyperparameters.ts";
import type { Llama3RopeScaling } from "./rope-scaling.ts";
import type { TensorPlan } from "./tensor-plan.ts";

export interface TokenIds {
  bos: number | undefined;
  /** The first ends a turn; all of them end a generation. */
  eos: number[];
  pad: number | undefined;
}

/** Bits of each quantized module and `false` for matrices left in float; norms are not listed. */
export type ModuleBits = ReadonlyMap<string, number | false>;

export interface ConfigInput {
  hp: Hyperparameters;
  plan: TensorPlan;
  ropeScaling: Llama3RopeScaling | undefined;
  ids: TokenIds;
  bits: ModuleBits;
  torchDtype: "float16" | "bfloat16" | "float32";
}

export type Json = { [key: string]: unknown };

/** The whole config.json. Pure. */
export function makeConfig(input: ConfigInput): Json {
  return input.hp.architecture === "llama4" ? llama4Config(input) : llamaConfig(input);
}

function llamaConfig(input: ConfigInput): Json {
  return {
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    ...sharedKeys(input),
    intermediate_size: input.hp.feedForward,
    mlp_bias: input.plan.mlpBias,
    ...tokenKeys(input.ids),
    torch_dtype: input.torchDtype,
    ...quantizationKeys(input.bits),
  };
}

function llama4Config(input: ConfigInput): Json {
  const { hp, plan, ids } = input;
  const moe = hp.moe;
  if (moe === undefined) throw new TypeError("a llama4 config needs the MoE sizes");
  const everyStep = plan.moeLayers.every((i) => (i + 1) % moe.interleaveStep === 0);
  const regular = everyStep && plan.moeLayers.length === Math.floor(hp.layers / moe.interleaveStep);
  const text: Json = {
    model_type: "llama4_text",
    ...sharedKeys(input),
    intermediate_size: moe.expertFeedForward,
    intermediate_size_mlp: hp.feedForward,
    num_local_experts: moe.experts,
    num_experts_per_tok: moe.expertsUsed,
    interleave_moe_layer_step: moe.interleaveStep,
    ...(regular ? {} : { moe_layers: plan.moeLayers }),
    attention_chunk_size: moe.attentionChunk,
    no_rope_layers: Array.from({ length: hp.layers }, (_, i) => ropeFlag(i, moe.noRopeInterval)),
    // llama.cpp tells Maverick, which has no QK norm, by its 128 experts; GGUF has no key for it
    use_qk_norm: moe.experts !== 128,
    attn_temperature_tuning: moe.noRopeInterval > 0,
    floor_scale: 8192,
    attn_scale: 0.1,
    ...tokenKeys(ids),
  };
  return {
    architectures: ["Llama4ForConditionalGeneration"],
    model_type: "llama4",
    text_config: text,
    tie_word_embeddings: plan.tiedEmbeddings,
    ...tokenKeys(ids),
    torch_dtype: input.torchDtype,
    ...quantizationKeys(input.bits),
  };
}

/** 1 for a layer with RoPE, 0 for one without. */
function ropeFlag(layer: number, interval: number): 0 | 1 {
  return interval > 0 && (layer + 1) % interval === 0 ? 0 : 1;
}

function sharedKeys({ hp, plan, ropeScaling }: ConfigInput): Json {
  const linear =
    hp.linearRopeFactor === undefined ? null : { rope_type: "linear", factor: hp.linearRopeFactor };
  return {
    hidden_size: hp.hidden,
    num_hidden_layers: hp.layers,
    num_attention_heads: hp.heads,
    num_key_value_heads: hp.kvHeads,
    head_dim: hp.headDim,
    hidden_act: "silu",
    rms_norm_eps: hp.normEps,
    rope_theta: hp.ropeTheta,
    rope_scaling: ropeScaling ?? linear,
    max_position_embeddings: hp.contextLength,
    vocab_size: plan.vocabSize,
    tie_word_embeddings: plan.tiedEmbeddings,
    attention_bias: plan.attentionBias,
  };
}

function tokenKeys(ids: TokenIds): Json {
  return {
    ...(ids.bos === undefined ? {} : { bos_token_id: ids.bos }),
    ...(ids.eos.length === 0 ? {} : { eos_token_id: ids.eos.length === 1 ? ids.eos[0] : ids.eos }),
    ...(ids.pad === undefined ? {} : { pad_token_id: ids.pad }),
  };
}

/** generation_config.json: the ids that end a generation. */
export function makeGenerationConfig(ids: TokenIds): Json {
  return tokenKeys(ids);
}

/** The most frequent width is the default, every other module gets an entry of its own. */
export function quantizationKeys(bits: ModuleBits): Json {
  const votes = new Map<number, number>();
  for (const width of bits.values()) if (width !== false) votes.set(width, (votes.get(width) ?? 0) + 1);
  const usual = [...votes].sort((a, b) => b[1] - a[1])[0]?.[0];
  if (usual === undefined) return {};
  const quantization: Json = { group_size: 32, bits: usual, mode: "affine" };
  for (const [module, width] of bits) {
    if (width === false) quantization[module] = false;
    else if (width !== usual) quantization[module] = { group_size: 32, bits: width, mode: "affine" };
  }
  return { quantization, quantization_config: quantization };
}
