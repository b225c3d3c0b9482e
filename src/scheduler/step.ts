// One forward pass as the scheduler asks for it and as the engine answers: the typed form of caravan.h's cv_step and
// cv_result. Page tables and token lists are views that are valid until `submit` returns, so a step costs no copies here.

import type { Sampling, TopLogprobs } from "../engine/protocol.ts";
import type { CaravanError } from "../errors.ts";

/** As a token: the one last sampled for the row's slot, which is not known here yet. */
export const TOKEN_LAST = 0xffffffff;

/** Positions of a row for which logits are computed. */
export type RowLogits = "none" | "last" | "all";

export interface StepRow {
  /** Sequence slot: remembers the last sampled token. */
  slot: number;
  /** Position of the first new token. */
  firstPosition: number;
  /** New tokens, at least one. */
  tokens: Uint32Array;
  fullPages: Uint32Array;
  chunkPages: Uint32Array;
  /** First position of chunkPages. */
  chunkBase: number;
  logits: RowLogits;
  /** Sample behind the last token. */
  sample: boolean;
  /** Sample behind every token instead, with logits "all": tokens behind the first are drafts. */
  sampleAll?: boolean;
  /** Raw logits in the result. */
  returnLogits: boolean;
  /** Log-probability of the sampled token in the result. */
  logprob: boolean;
  /** Alternatives in the result, 0 to 64. */
  topLogprobs: number;
  sampling: Sampling;
  /** Added to logits before everything else; -Infinity bans. */
  bias: readonly (readonly [token: number, bias: number])[];
  /** Triples (token, count in output, count in context) for the penalties, or empty. */
  history: Uint32Array;
  /** Tokens that XTC never removes. */
  xtcKeep: Uint32Array;
  /** [(vocab + 31) / 32] Bit set = the token may be sampled; absent = all may. */
  mask?: Uint32Array;
  /** The row's masks come by giveMasks while the step is computed; it samples when they are there. */
  maskLater?: boolean;
}

/** Copies one page before the step computes. */
export interface PageCopy {
  pool: "full" | "chunked";
  from: number;
  to: number;
}

export interface Step {
  rows: StepRow[];
  copies: PageCopy[];
}

export interface RowResult {
  /** Why this row has no token although the step was computed; the other rows are not concerned. */
  failure?: CaravanError;
  /** Sampled token; TOKEN_LAST when none was asked for. */
  token: number;
  /** 0 unless asked for. */
  logprob: number;
  /** Most probable first; empty unless asked for. With sampleAll: the sample behind each token and its log-probability. */
  top: TopLogprobs;
  /** float32 [positions, vocab] when asked for. */
  logits: Float32Array | undefined;
}

export interface StepResult {
  rows: RowResult[];
  /** Time that the step computed, and that it waited before. */
  computeNs: number;
  queuedNs: number;
  /** Of computeNs, waiting for masks; default 0. */
  maskNs?: number;
}

/** What the scheduler needs of an engine. */
export interface StepEngine {
  /** Steps are computed in the order of submission. A rejected promise means that this step gave nothing. */
  submit(step: Step): Promise<StepResult>;
  /** Masks of a row with maskLater of a submitted step (copied): one, or with sampleAll one for each of its tokens, behind
   * each other. Undefined: its sample does not matter any more. Nothing for a step that has ended. */
  giveMasks(step: Step, row: number, masks: Uint32Array | undefined): void;
  /** Why the engine takes no further steps; undefined while it lives. */
  readonly failed: CaravanError | undefined;
}

/** Fixed limits of a loaded engine. */
export interface StepLimits {
  /** Sequences a step. */
  maxRows: number;
  /** New tokens a step. */
  maxTokens: number;
  /** Positions a step with logits, >= maxRows. */
  maxLogits: number;
  /** Sequence slots. */
  slots: number;
  vocab: number;
  /** Stages of the engine's pipeline, which compute different steps at the same time; default 1. */
  stages?: number;
}
