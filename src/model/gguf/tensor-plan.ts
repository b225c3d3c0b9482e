// Which MLX tensor each GGUF tensor becomes. Every name must be known, every shape must be the one the sizes in the
// metadata give, and nothing may be missing: what passes here can be converted without looking back.

import type { Hyperparameters } from "./hyperparameters.ts";
import type { Metadata } from "./metadata.ts";
import type { GgufTensor } from "./parse.ts";
import type { GgufModel } from "./split.ts";

export type SourceTensor = GgufTensor & { path: string };

export interface PlannedTensor {
  source: SourceTensor;
  /** Output name without `.weight` or `.bias`. */
  module: string;
  kind: "weight" | "bias";
  /** Heads whose rows are to be put back from interleaved into half-split order; 0 for rows left as they are. */
  unpermuteHeads: number;
}

export interface TensorPlan {
  tensors: PlannedTensor[];
  /** Factors of the RoPE frequencies, where the file has them. */
  ropeFreqs: SourceTensor | undefined;
  tiedEmbeddings: boolean;
  vocabSize: number;
  moeLayers: number[];
  attentionBias: boolean;
  mlpBias: boolean;
}

interface Role {
  module: string;
  shape: number[];
}

const ROPE_FREQS = "rope_freqs.weight";
const DENSE = ["ffn_gate", "ffn_up", "ffn_down"];
const ROUTED = ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];
const SHARED = ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"];
const EVERY_LAYER = ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output"];
const MAX_LAYERS = 4096;

/** @throws CaravanError bad_file for missing tensors and wrong shapes, unsupported_model for unknown tensors */
export function planTensors(model: GgufModel, hp: Hyperparameters, meta: Metadata): TensorPlan {
  if (hp.layers > MAX_LAYERS) throw meta.bad(`${hp.layers} layers are more than any model has`);
  const embedding = model.tensors.get("token_embd.weight");
  if (embedding === undefined) throw meta.bad("tensor token_embd.weight is missing");
  const vocabSize = embedding.shape[0] ?? 0;
  const roles = layerRoles(hp);
  const tensors: PlannedTensor[] = [];
  for (const [name, source] of model.tensors) {
    if (name === ROPE_FREQS) continue;
    tensors.push(planTensor(name, source, { hp, meta, roles, vocabSize }));
  }
  checkComplete(model, hp, meta);
  const has = (pattern: RegExp) => [...model.tensors.keys()].some((n) => pattern.test(n));
  return {
    tensors,
    ropeFreqs: model.tensors.get(ROPE_FREQS),
    tiedEmbeddings: !model.tensors.has("output.weight"),
    vocabSize,
    moeLayers: layerNumbers(hp).filter((i) => isMoe(model, i)),
    attentionBias: has(/\.attn_(q|k|v|output)\.bias$/),
    mlpBias: has(/\.ffn_(gate|up|down)\.bias$/),
  };
}

interface Context {
  hp: Hyperparameters;
  meta: Metadata;
  roles: Map<string, Role>;
  vocabSize: number;
}

function planTensor(
  name: string,
  source: SourceTensor,
  { hp, meta, roles, vocabSize }: Context,
): PlannedTensor {
  const prefix = hp.architecture === "llama4" ? "language_model." : "";
  const top: Record<string, Role> = {
    "token_embd.weight": { module: `${prefix}model.embed_tokens`, shape: [vocabSize, hp.hidden] },
    "output_norm.weight": { module: `${prefix}model.norm`, shape: [hp.hidden] },
    "output.weight": { module: `${prefix}lm_head`, shape: [vocabSize, hp.hidden] },
  };
  const match = /^blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)$/.exec(name);
  const layer = Number(match?.[1] ?? 0);
  const layerRole = match === null ? undefined : roles.get(match[2] ?? "");
  const role = Object.hasOwn(top, name) ? top[name] : layerRole;
  if (role === undefined || layer >= hp.layers) {
    throw meta.unsupported(
      `has a tensor ${JSON.stringify(name.slice(0, 200))} that a ${hp.architecture} model does not`,
    );
  }
  const kind = match?.[3] === "bias" ? "bias" : "weight";
  const shape = kind === "bias" ? role.shape.slice(0, 1) : role.shape;
  if (`${source.shape}` !== `${shape}`) {
    throw meta.bad(`tensor ${name} is [${source.shape}]; the metadata asks for [${shape}]`);
  }
  const rotated =
    hp.architecture === "llama" ? { attn_q: hp.heads, attn_k: hp.kvHeads }[match?.[2] ?? ""] : 0;
  const module = match === null ? role.module : `${prefix}model.layers.${layer}.${role.module}`;
  return { source, module, kind, unpermuteHeads: rotated ?? 0 };
}

/** Module and shape of every tensor a layer may have, by the middle of its GGUF name. */
function layerRoles(hp: Hyperparameters): Map<string, Role> {
  const { hidden, heads, kvHeads, headDim, feedForward, moe } = hp;
  const mlp = hp.architecture === "llama4" ? "feed_forward" : "mlp";
  const roles: Record<string, Role> = {
    attn_norm: { module: "input_layernorm", shape: [hidden] },
    ffn_norm: { module: "post_attention_layernorm", shape: [hidden] },
    attn_q: { module: "self_attn.q_proj", shape: [heads * headDim, hidden] },
    attn_k: { module: "self_attn.k_proj", shape: [kvHeads * headDim, hidden] },
    attn_v: { module: "self_attn.v_proj", shape: [kvHeads * headDim, hidden] },
    attn_output: { module: "self_attn.o_proj", shape: [hidden, heads * headDim] },
    ffn_gate: { module: `${mlp}.gate_proj`, shape: [feedForward, hidden] },
    ffn_up: { module: `${mlp}.up_proj`, shape: [feedForward, hidden] },
    ffn_down: { module: `${mlp}.down_proj`, shape: [hidden, feedForward] },
  };
  if (moe !== undefined) {
    const { experts, expertFeedForward: inner } = moe;
    roles.ffn_gate_inp = { module: `${mlp}.router`, shape: [experts, hidden] };
    roles.ffn_gate_exps = { module: `${mlp}.experts.gate_proj`, shape: [experts, inner, hidden] };
    roles.ffn_up_exps = { module: `${mlp}.experts.up_proj`, shape: [experts, inner, hidden] };
    roles.ffn_down_exps = { module: `${mlp}.experts.down_proj`, shape: [experts, hidden, inner] };
    roles.ffn_gate_shexp = { module: `${mlp}.shared_expert.gate_proj`, shape: [inner, hidden] };
    roles.ffn_up_shexp = { module: `${mlp}.shared_expert.up_proj`, shape: [inner, hidden] };
    roles.ffn_down_shexp = { module: `${mlp}.shared_expert.down_proj`, shape: [hidden, inner] };
  }
  return new Map(Object.entries(roles));
}

function checkComplete(model: GgufModel, hp: Hyperparameters, meta: Metadata): void {
  const need = (name: string) => {
    if (!model.tensors.has(name)) throw meta.bad(`tensor ${name} is missing`);
  };
  need("output_norm.weight");
  for (const layer of layerNumbers(hp)) {
    const [feedForward, other] = isMoe(model, layer)
      ? [[...ROUTED, ...SHARED], DENSE]
      : [DENSE, [...ROUTED, ...SHARED]];
    for (const name of [...EVERY_LAYER, ...feedForward]) need(`blk.${layer}.${name}.weight`);
    for (const name of other) {
      if (model.tensors.has(`blk.${layer}.${name}.weight`)) {
        throw meta.bad(`layer ${layer} has both a dense and a routed feed-forward (${name})`);
      }
    }
  }
}

function isMoe(model: GgufModel, layer: number): boolean {
  return model.tensors.has(`blk.${layer}.ffn_gate_inp.weight`);
}

function layerNumbers(hp: Hyperparameters): number[] {
  return Array.from({ length: hp.layers }, (_, i) => i);
}
