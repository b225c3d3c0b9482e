// Names of checkpoint tensors: which engine slot each belongs to, in MLX's and Hugging Face's layouts.

/** Engine slots (CV_T_* of caravan.h), in its numbering. */
export const SLOT = {
  embed: 1,
  finalNorm: 2,
  head: 3,
  attnNorm: 4,
  ffnNorm: 5,
  q: 6,
  k: 7,
  v: 8,
  o: 9,
  qBias: 10,
  kBias: 11,
  vBias: 12,
  oBias: 13,
  gate: 14,
  up: 15,
  down: 16,
  gateBias: 17,
  upBias: 18,
  downBias: 19,
  router: 20,
  expertGate: 21,
  expertUp: 22,
  expertDown: 23,
  sharedGate: 24,
  sharedUp: 25,
  sharedDown: 26,
} as const;

export type Slot = (typeof SLOT)[keyof typeof SLOT];

/** Tensors that text generation does not need: vision towers, and tables that old exporters saved. */
export function isSkipped(name: string): boolean {
  return (
    /(^|\.)(vision_model|vision_tower|multi_modal_projector)\./.test(name) ||
    name.endsWith("rotary_emb.inv_freq")
  );
}

/** Where the decoder's names begin: `language_model.` in multimodal checkpoints, else nothing. */
export function namePrefix(names: Iterable<string>): string {
  for (const name of names) if (name.startsWith("language_model.")) return "language_model.";
  return "";
}

/** Modules of every layer, below `model.layers.N.`. */
export const ATTENTION_MODULES: readonly [Slot, string][] = [
  [SLOT.q, "self_attn.q_proj"],
  [SLOT.k, "self_attn.k_proj"],
  [SLOT.v, "self_attn.v_proj"],
  [SLOT.o, "self_attn.o_proj"],
];

/** Dense feed-forward modules, below `mlp.` (llama) or `feed_forward.` (llama4). */
export const DENSE_MODULES: readonly [Slot, string][] = [
  [SLOT.gate, "gate_proj"],
  [SLOT.up, "up_proj"],
  [SLOT.down, "down_proj"],
];

export const EXPERT_MODULES: readonly [Slot, string][] = [
  [SLOT.expertGate, "experts.gate_proj"],
  [SLOT.expertUp, "experts.up_proj"],
  [SLOT.expertDown, "experts.down_proj"],
];

export const SHARED_MODULES: readonly [Slot, string][] = [
  [SLOT.sharedGate, "shared_expert.gate_proj"],
  [SLOT.sharedUp, "shared_expert.up_proj"],
  [SLOT.sharedDown, "shared_expert.down_proj"],
];

/** The bias slot that goes with a matrix slot, where there is one. */
export const BIAS_OF: Partial<Record<Slot, Slot>> = {
  [SLOT.q]: SLOT.qBias,
  [SLOT.k]: SLOT.kBias,
  [SLOT.v]: SLOT.vBias,
  [SLOT.o]: SLOT.oBias,
  [SLOT.gate]: SLOT.gateBias,
  [SLOT.up]: SLOT.upBias,
  [SLOT.down]: SLOT.downBias,
};
