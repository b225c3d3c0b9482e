// A model's config.json as plain data with every default filled in: which layers are chunked, rotate, normalise or have
// experts, and the rotation frequencies. Where mlx-lm and Hugging Face differ, Hugging Face is followed; a key that is
// absent has the default of Hugging Face's class, since files saved by transformers leave those out of text_config.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { RopeScaling, ropeFrequencies } from "./rope-frequencies.ts";

/** What a decoder layer does; one entry a layer, in global order. */
export interface LayerConfig {
  /** Attention stays inside chunks of `chunk` tokens. */
  chunked: boolean;
  rope: boolean;
  /** Weightless RMS norm of q and k, per head, after RoPE. */
  qkNorm: boolean;
  /** q is scaled by the position (attn_temperature_tuning). */
  temperature: boolean;
  moe: boolean;
}

export interface ModelConfig {
  /** Where it was read, for messages. */
  where: string;
  architecture: "llama" | "llama4";
  hiddenSize: number;
  /** Of dense layers. */
  intermediateSize: number;
  /** Of each expert and of the shared expert. */
  expertSize: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  vocabSize: number;
  /** 0 without experts. */
  experts: number;
  expertsPerToken: number;
  normEps: number;
  /** Attention chunk in tokens; 0 = no chunked layers. */
  chunk: number;
  attnScale: number;
  floorScale: number;
  /** Pairs (2j, 2j+1) rotate; otherwise (j, j + headDim/2). */
  ropeInterleaved: boolean;
  /** float32 [headDim/2], scaling applied. */
  invFreq: Float32Array;
  contextLength: number;
  tieWordEmbeddings: boolean;
  /** q, k, v and o add a bias; gate, up and down do. */
  attentionBias: boolean;
  mlpBias: boolean;
  layers: LayerConfig[];
  /** Tokens that end an answer, from generation_config.json, else config.json. */
  eosTokens: number[];
  /** MLX's `quantization` object, unread (quantization.ts). */
  quantization: Record<string, unknown> | undefined;
  /** Data type of the model's activations as its makers ran it. */
  dtype: "bfloat16" | "float16" | "float32";
}

// Maps: a file may name `constructor`, which every object has.
const ARCHITECTURES: ReadonlyMap<string, "llama" | "llama4"> = new Map([
  ["LlamaForCausalLM", "llama"],
  ["Llama4ForCausalLM", "llama4"],
  ["Llama4ForConditionalGeneration", "llama4"],
]);
const MODEL_TYPES: ReadonlyMap<string, "llama" | "llama4"> = new Map([
  ["llama", "llama"],
  ["llama4", "llama4"],
  ["llama4_text", "llama4"],
]);

const count = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(most));
const positive = v.pipe(v.number(), v.finite(), v.gtValue(0));
/** true, false, or a number that stands for one (early hub files say 4). */
const truthy = v.union([v.boolean(), v.number()]);
const token = v.pipe(v.number(), v.integer(), v.minValue(0));
const tokens = v.union([token, v.array(token)]);
const count0 = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(most));

/** Parsed over DEFAULTS: an absent key has its default, null has a meaning of its own (no chunk, say). */
const TextConfig = v.looseObject({
  hidden_size: count(1 << 20),
  intermediate_size: count(1 << 24),
  intermediate_size_mlp: v.nullish(count(1 << 24)),
  num_hidden_layers: count(4096),
  num_attention_heads: count(4096),
  num_key_value_heads: v.nullish(count(4096)),
  head_dim: v.nullish(count(256)),
  vocab_size: count(1 << 26),
  rms_norm_eps: positive,
  rope_theta: v.nullish(positive),
  rope_scaling: v.nullish(RopeScaling),
  rope_parameters: v.nullish(RopeScaling),
  rope_traditional: v.nullish(v.boolean()),
  max_position_embeddings: count(2 ** 40),
  tie_word_embeddings: v.nullish(v.boolean()),
  attention_bias: v.nullish(v.boolean()),
  mlp_bias: v.nullish(v.boolean()),
  hidden_act: v.nullish(v.string()),
  layer_types: v.nullish(v.array(v.string())),
  num_local_experts: v.nullish(count0(65536)),
  num_experts_per_tok: v.nullish(count0(64)),
  interleave_moe_layer_step: v.nullish(count0(4096)),
  moe_layers: v.nullish(v.array(count0(4095))),
  no_rope_layers: v.nullish(v.array(v.number())),
  no_rope_layer_interval: v.nullish(count(4096)),
  attention_chunk_size: v.nullish(count(2 ** 31)),
  use_qk_norm: v.nullish(v.boolean()),
  attn_temperature_tuning: v.nullish(truthy),
  floor_scale: v.nullish(positive),
  attn_scale: v.nullish(v.pipe(v.number(), v.finite())),
  eos_token_id: v.nullish(tokens),
});
type TextConfig = v.InferOutput<typeof TextConfig>;

/** What an absent key means (Llama4TextConfig, LlamaConfig); Llama files always have the sizes. */
const DEFAULTS: Record<"llama" | "llama4", Record<string, unknown>> = {
  llama: { rms_norm_eps: 1e-6, max_position_embeddings: 2048 },
  llama4: {
    vocab_size: 202048,
    hidden_size: 5120,
    intermediate_size: 8192,
    intermediate_size_mlp: 16384,
    num_hidden_layers: 48,
    num_attention_heads: 40,
    num_key_value_heads: 8,
    head_dim: 128,
    max_position_embeddings: 131072,
    rms_norm_eps: 1e-5,
    num_local_experts: 16,
    attention_chunk_size: 8192,
  },
};
const DEFAULT_THETA = { llama: 10000, llama4: 500000 };

const Config = v.looseObject({
  architectures: v.nullish(v.array(v.string())),
  model_type: v.nullish(v.string()),
  text_config: v.nullish(v.record(v.string(), v.unknown())),
  tie_word_embeddings: v.nullish(v.boolean()),
  quantization: v.nullish(v.record(v.string(), v.unknown())),
  quantization_config: v.nullish(v.record(v.string(), v.unknown())),
  torch_dtype: v.nullish(v.string()),
  dtype: v.nullish(v.string()),
  eos_token_id: v.nullish(tokens),
});

/** Reads `<dir>/config.json` (and generation_config.json). Throws bad_file or unsupported_model naming file and key. */
export function readModelConfig(dir: string): ModelConfig {
  const where = join(dir, "config.json");
  const generation = join(dir, "generation_config.json");
  return parseModelConfig(readJson(where), where, existsSync(generation) ? readJson(generation) : undefined);
}

function readJson(path: string): unknown {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch (thrown) {
    const message = thrown instanceof Error ? thrown.message : String(thrown);
    throw new CaravanError("bad_file", `cannot be read as JSON: ${message}`, { where: path, cause: thrown });
  }
}

/**
 * @param where the file, for messages
 * @param generation generation_config.json, where there is one
 * @throws CaravanError bad_file or unsupported_model naming the key
 */
export function parseModelConfig(json: unknown, where: string, generation?: unknown): ModelConfig {
  if (typeof json !== "object" || json === null || Array.isArray(json)) {
    throw new CaravanError("bad_file", "is not a JSON object", { where });
  }
  const outer = check(Config, json, where);
  const architecture = architectureOf(outer, where);
  const inner = outer.text_config ?? (json as Record<string, unknown>);
  const prefix = outer.text_config ? "text_config." : "";
  const text = check(TextConfig, { ...DEFAULTS[architecture], ...inner }, where, prefix);
  const llama4 = architecture === "llama4";
  const heads = headsOf(text, where);
  const chunk = llama4 ? (text.attention_chunk_size ?? 0) : 0;
  const layers = layersOf(text, llama4, chunk, where);
  const chunked = layers.some((layer) => layer.chunked);
  if (chunked && chunk % 16 !== 0) {
    throw unsupported(where, "attention_chunk_size", chunk, "multiples of 16");
  }
  const ropeKey = text.rope_parameters ? "rope_parameters" : "rope_scaling";
  const rope: RopeScaling = { ...text.rope_scaling, ...text.rope_parameters };
  const theta = text.rope_parameters?.rope_theta ?? text.rope_theta ?? rope.rope_theta;
  return {
    where,
    architecture,
    hiddenSize: text.hidden_size,
    intermediateSize: llama4
      ? (text.intermediate_size_mlp ?? text.intermediate_size)
      : text.intermediate_size,
    expertSize: text.intermediate_size,
    ...heads,
    vocabSize: text.vocab_size,
    ...expertsOf(text, layers, where),
    normEps: text.rms_norm_eps,
    chunk: chunked ? chunk : 0,
    attnScale: text.attn_scale ?? 0.1,
    floorScale: text.floor_scale ?? 8192,
    ropeInterleaved: llama4 || text.rope_traditional === true,
    invFreq: ropeFrequencies(
      theta ?? DEFAULT_THETA[architecture],
      heads.headDim,
      rope,
      where,
      prefix + ropeKey,
    ),
    contextLength: text.max_position_embeddings,
    tieWordEmbeddings: text.tie_word_embeddings ?? outer.tie_word_embeddings ?? false,
    attentionBias: text.attention_bias ?? false,
    mlpBias: !llama4 && (text.mlp_bias ?? false),
    layers,
    eosTokens: eosOf(generation) ?? eosOf(outer) ?? eosOf(text) ?? [],
    quantization: quantizationKey(outer, where),
    dtype: dtypeOf(
      outer.torch_dtype ?? outer.dtype ?? stringOf(inner, "torch_dtype") ?? stringOf(inner, "dtype"),
    ),
  };
}

function headsOf(text: TextConfig, where: string): Pick<ModelConfig, "heads" | "kvHeads" | "headDim"> {
  if ((text.hidden_act ?? "silu") !== "silu") throw unsupported(where, "hidden_act", text.hidden_act, "silu");
  const heads = text.num_attention_heads;
  const headDim = text.head_dim ?? text.hidden_size / heads;
  if (!Number.isInteger(headDim) || headDim % 16 !== 0) {
    throw unsupported(where, "head_dim", headDim, "a multiple of 16 up to 256");
  }
  const kvHeads = text.num_key_value_heads ?? heads;
  if (heads % kvHeads !== 0) {
    throw new CaravanError("bad_file", `num_key_value_heads: ${kvHeads} does not divide ${heads} heads`, {
      where,
    });
  }
  if (heads / kvHeads > 32) {
    throw unsupported(
      where,
      "num_key_value_heads",
      kvHeads,
      `at least ${Math.ceil(heads / 32)} for ${heads} heads`,
    );
  }
  return { heads, kvHeads, headDim };
}

function expertsOf(
  text: TextConfig,
  layers: LayerConfig[],
  where: string,
): Pick<ModelConfig, "experts" | "expertsPerToken"> {
  if (!layers.some((layer) => layer.moe)) return { experts: 0, expertsPerToken: 0 };
  const experts = text.num_local_experts ?? 0;
  const expertsPerToken = text.num_experts_per_tok ?? 1;
  if (expertsPerToken < 1 || expertsPerToken > experts) {
    throw new CaravanError(
      "bad_file",
      `num_experts_per_tok: ${expertsPerToken} of ${experts} experts cannot be chosen`,
      { where },
    );
  }
  return { experts, expertsPerToken };
}

/** MLX's object; the schemes of other makers (quant_method) pack their tensors in other ways. */
function quantizationKey(
  config: v.InferOutput<typeof Config>,
  where: string,
): Record<string, unknown> | undefined {
  if (config.quantization) return config.quantization;
  const method = config.quantization_config?.quant_method;
  if (method === undefined || method === null) return config.quantization_config ?? undefined;
  throw unsupported(
    where,
    "quantization_config.quant_method",
    method,
    "MLX's `quantization` (affine, mxfp4, mxfp8, nvfp4), unquantized files, and GGUF (caravan import)",
  );
}

function stringOf(value: unknown, key: string): string | undefined {
  const found =
    typeof value === "object" && value !== null ? (value as Record<string, unknown>)[key] : undefined;
  return typeof found === "string" ? found : undefined;
}

function dtypeOf(name: string | undefined): ModelConfig["dtype"] {
  return name === "float16" || name === "float32" ? name : "bfloat16";
}

function check<T extends v.GenericSchema>(
  schema: T,
  json: unknown,
  where: string,
  prefix = "",
): v.InferOutput<T> {
  const parsed = v.safeParse(schema, json);
  if (parsed.success) return parsed.output;
  const issue = parsed.issues[0];
  throw new CaravanError("bad_file", `${prefix}${v.getDotPath(issue) ?? "config"}: ${issue.message}`, {
    where,
  });
}

function unsupported(where: string, key: string, value: unknown, supported: string): CaravanError {
  return new CaravanError("unsupported_model", `${key}: ${JSON.stringify(value)} is not supported`, {
    where,
    hint: `Supported: ${supported}.`,
  });
}

function architectureOf(config: v.InferOutput<typeof Config>, where: string): "llama" | "llama4" {
  const named = config.architectures?.[0];
  const found = named === undefined ? MODEL_TYPES.get(config.model_type ?? "") : ARCHITECTURES.get(named);
  if (found !== undefined) return found;
  throw unsupported(
    where,
    named === undefined ? "model_type" : "architectures",
    named ?? config.model_type,
    [...ARCHITECTURES.keys()].join(", "),
  );
}

function eosOf(config: unknown): number[] | undefined {
  if (typeof config !== "object" || config === null || !("eos_token_id" in config)) return undefined;
  const parsed = v.safeParse(tokens, config.eos_token_id);
  if (!parsed.success) return undefined;
  return typeof parsed.output === "number" ? [parsed.output] : parsed.output;
}

/** Hugging Face's rules: no_rope_layers (1 = RoPE) or every interval-th without; layer_types over both; moe_layers or step. */
function layersOf(text: TextConfig, llama4: boolean, chunk: number, where: string): LayerConfig[] {
  const n = text.num_hidden_layers;
  const types = text.layer_types ?? undefined;
  if (types !== undefined && types.length !== n) {
    throw new CaravanError("bad_file", `layer_types: ${types.length} entries for ${n} layers`, { where });
  }
  const known = llama4 ? ["full_attention", "chunked_attention"] : ["full_attention"];
  const strange = types?.find((type) => !known.includes(type));
  if (strange !== undefined) throw unsupported(where, "layer_types", strange, known.join(", "));
  if (!llama4)
    return Array.from({ length: n }, () => ({
      chunked: false,
      rope: true,
      qkNorm: false,
      temperature: false,
      moe: false,
    }));
  const listed = text.no_rope_layers ?? [];
  if (listed.length !== 0 && listed.length < n) {
    throw new CaravanError("bad_file", `no_rope_layers: ${listed.length} entries for ${n} layers`, { where });
  }
  const interval = text.no_rope_layer_interval ?? 4;
  const step = text.interleave_moe_layer_step ?? 1;
  const moe = moeLayers(text, n, step, where);
  return Array.from({ length: n }, (_, i) => {
    const rope = listed.length === 0 ? (i + 1) % interval !== 0 : listed[i] !== 0;
    const chunked = types === undefined ? rope : types[i] === "chunked_attention";
    if (chunked && chunk === 0 && types !== undefined) {
      throw new CaravanError("bad_file", "layer_types: chunked_attention without attention_chunk_size", {
        where,
      });
    }
    return {
      chunked: chunked && chunk > 0,
      rope,
      qkNorm: rope && text.use_qk_norm !== false,
      temperature: !rope && Boolean(text.attn_temperature_tuning ?? true),
      moe: moe.has(i),
    };
  });
}

function moeLayers(text: TextConfig, n: number, step: number, where: string): Set<number> {
  const listed = text.moe_layers ?? undefined;
  const beyond = listed?.find((layer) => layer >= n);
  if (beyond !== undefined) {
    throw new CaravanError("bad_file", `moe_layers: there is no layer ${beyond} among ${n}`, { where });
  }
  if ((text.num_local_experts ?? 0) === 0) {
    if (listed !== undefined && listed.length > 0) {
      throw new CaravanError("bad_file", "moe_layers: layers with experts, but num_local_experts is 0", {
        where,
      });
    }
    return new Set();
  }
  if (listed !== undefined) return new Set(listed);
  const layers = new Set<number>();
  if (step > 0) for (let i = step - 1; i < n; i += step) layers.add(i);
  return layers;
}
