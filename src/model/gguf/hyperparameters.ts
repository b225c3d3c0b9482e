// The sizes and constants of a Llama or Llama 4 model, read from GGUF metadata under its architecture's prefix.

import * as v from "valibot";
import { Count, type Metadata, Positive, Real, shortestDecimal, Text } from "./metadata.ts";

export interface Hyperparameters {
  architecture: "llama" | "llama4";
  layers: number;
  contextLength: number;
  hidden: number;
  /** Of a dense MLP. */
  feedForward: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  normEps: number;
  ropeTheta: number;
  /** Positions divided by this (rope.scaling.type linear), where it is not 1. */
  linearRopeFactor: number | undefined;
  originalContextLength: number | undefined;
  /** Llama 4 only. */
  moe: MoeHyperparameters | undefined;
}

export interface MoeHyperparameters {
  experts: number;
  expertsUsed: number;
  /** Of one expert and of the shared expert. */
  expertFeedForward: number;
  /** Layer i is a MoE layer where (i + 1) % step is 0. */
  interleaveStep: number;
  /** Null: all layers attend to everything. */
  attentionChunk: number | null;
  /** Every so many layers one without RoPE and with full attention; 0: none. */
  noRopeInterval: number;
}

/** @throws CaravanError bad_file for missing or senseless values, unsupported_model for what we cannot run */
export function readHyperparameters(meta: Metadata): Hyperparameters {
  const architecture = meta.required("general.architecture", Text);
  if (architecture !== "llama" && architecture !== "llama4") {
    throw meta.unsupported(`is a model of architecture ${JSON.stringify(architecture.slice(0, 80))}`);
  }
  const key = (name: string) => `${architecture}.${name}`;
  const count = (name: string) => meta.required(key(name), Positive);
  const hidden = count("embedding_length");
  const heads = requiredUniform(meta, key("attention.head_count"));
  const kvHeads = meta.uniform(key("attention.head_count_kv"), Positive) ?? heads;
  if (heads % kvHeads !== 0) throw meta.bad(`${heads} heads cannot share ${kvHeads} KV heads`);
  return {
    architecture,
    layers: count("block_count"),
    contextLength: count("context_length"),
    hidden,
    feedForward: requiredUniform(meta, key("feed_forward_length")),
    heads,
    kvHeads,
    headDim: readHeadDim(meta, key, hidden, heads),
    normEps: shortestDecimal(meta.required(key("attention.layer_norm_rms_epsilon"), Real)),
    ropeTheta: shortestDecimal(meta.optional(key("rope.freq_base"), Real) ?? 10000),
    linearRopeFactor: readLinearRope(meta, key),
    originalContextLength: meta.optional(key("rope.scaling.original_context_length"), Positive),
    moe: architecture === "llama4" ? readMoe(meta, key) : refuseLlamaMoe(meta, key),
  };
}

function requiredUniform(meta: Metadata, key: string): number {
  const value = meta.uniform(key, Positive);
  if (value === undefined) throw meta.bad(`metadata has no ${key}`);
  return value;
}

function readHeadDim(meta: Metadata, key: (name: string) => string, hidden: number, heads: number): number {
  const rotary = meta.optional(key("rope.dimension_count"), Positive);
  const headDim = meta.optional(key("attention.key_length"), Positive) ?? rotary ?? hidden / heads;
  const valueDim = meta.optional(key("attention.value_length"), Positive) ?? headDim;
  if (!Number.isInteger(headDim) || headDim % 2 !== 0)
    throw meta.bad(`head dimension ${headDim} is not an even number`);
  if (valueDim !== headDim)
    throw meta.unsupported(`keys have ${headDim} dimensions a head, values ${valueDim}`);
  if ((rotary ?? headDim) !== headDim) {
    throw meta.unsupported(
      `RoPE turns ${rotary} of ${headDim} dimensions a head; only all of them are supported`,
    );
  }
  return headDim;
}

function readLinearRope(meta: Metadata, key: (name: string) => string): number | undefined {
  const type = meta.optional(key("rope.scaling.type"), Text) ?? "none";
  const factor =
    meta.optional(key("rope.scaling.factor"), Real) ?? meta.optional(key("rope.scale_linear"), Real) ?? 1;
  if (type === "none") return meta.has(key("rope.scale_linear")) && factor !== 1 ? factor : undefined;
  if (type === "linear") return factor === 1 ? undefined : factor;
  throw meta.unsupported(`RoPE scaling of type ${JSON.stringify(type.slice(0, 80))} is not supported`);
}

function refuseLlamaMoe(meta: Metadata, key: (name: string) => string): undefined {
  const experts = meta.optional(key("expert_count"), Count) ?? 0;
  if (experts > 0) throw meta.unsupported(`is a Mixtral-style model with ${experts} experts`);
  return undefined;
}

/**
 * Chunk size and the place of the layers without RoPE are constants in llama.cpp (8192, every fourth); the keys are
 * honoured where a file has them. A sliding window of 0 means full attention and RoPE in every layer.
 */
function readMoe(meta: Metadata, key: (name: string) => string): MoeHyperparameters {
  const fullAttention = meta.optional(key("attention.sliding_window"), Count) === 0;
  const pattern = meta.optional(
    key("attention.sliding_window_pattern"),
    v.union([Positive, v.array(v.unknown())]),
  );
  if (Array.isArray(pattern)) throw meta.unsupported("attention.sliding_window_pattern is a list of layers");
  const chunk = meta.optional(key("attention.chunk_size"), Positive) ?? 8192;
  const step = meta.required(key("interleave_moe_layer_step"), Positive);
  const experts = meta.required(key("expert_count"), Positive);
  const expertsUsed = meta.required(key("expert_used_count"), Positive);
  if (expertsUsed > experts) throw meta.bad(`uses ${expertsUsed} of ${experts} experts`);
  return {
    experts,
    expertsUsed,
    expertFeedForward: requiredUniform(meta, key("expert_feed_forward_length")),
    interleaveStep: step,
    attentionChunk: fullAttention ? null : chunk,
    noRopeInterval: fullAttention ? 0 : (pattern ?? 4),
  };
}
