// What the Metal backend needs beside weights and cache, and how much of a Mac's memory its GPU may use. Pure; the sizes are
// those of native/backend/metal/metal.c (open_scratch), native/engine/graph.c and engine.c, which the tests compare to the byte.

import { type LoadPlan, placeOf } from "./load-plan.ts";
import { type KvType, widestMlp } from "./memory-plan.ts";

/** Few tokens (CV_FEW), parts of split attention (CV_ATTN_SPLITS), first room of the page table in bytes. */
const FEW = 16;
const ATTENTION_SPLITS = 64;
const PAGE_TABLE_BYTES = 4 * 16384;
/** Tile of sorted rows (CV_MATMUL_TOKENS) and the sizes of cv_token, cv_tile and cv_expert_tile. */
const TILE_TOKENS = 32;
const TOKEN_BYTES = 24;
const TILE_BYTES = 8;
const EXPERT_TILE_BYTES = 12;
/** The sampler's tables, by token of the vocabulary (native/engine/engine.c). */
const SAMPLER_BYTES = 12;
/** Words that a hand-over shares with the GPU (CV_HAND_OVER_WORDS). */
const HAND_OVER_WORD_BYTES = 4 * 64;
/** Each buffer is whole pages; there are about this many. */
const PAGE_ROUNDING = 40 * 16384;
/** Of the working set that is left to the system: its own buffers, other programs' windows. */
const RESERVED_SHARE = 0.05;
const MOST_RESERVED = 2 ** 30;

export interface MetalTerms {
  kvType: KvType;
  /** Float32 activations. Of a cache of 16 or 32 bits its type says it already. */
  exact?: boolean;
  maxTokens: number;
  maxLogits: number;
}

/** Bytes of one activation. */
function activationBytes({ kvType, exact = false }: Pick<MetalTerms, "kvType" | "exact">): number {
  return kvType === "f32" || (kvType === "q8" && exact) ? 4 : 2;
}

/** Bytes that a rank's engine counts as scratch when it is open, to the byte: activations, tables, the sampler. */
export function metalCountedBytes(
  plan: Pick<LoadPlan, "config" | "place" | "tensors">,
  { kvType, exact = false, maxTokens, maxLogits }: MetalTerms,
): number {
  const { config } = plan;
  const { heads, kvHeads, vocabRows } = placeOf(plan);
  const { hiddenSize: hidden, headDim, vocabSize: vocab, experts } = config;
  const element = activationBytes({ kvType, exact });
  const moe = experts > 0;
  const ff = widestMlp(plan);
  const q = heads * headDim;
  const graph = maxTokens * (hidden + 2 * q + 2 * kvHeads * headDim) * 4 + maxLogits * vocabRows * 4;
  const chosen = moe ? config.expertsPerToken : 0;
  const pairs = maxTokens * chosen;
  const tables = maxTokens * (TOKEN_BYTES + headDim * 4 + 2 * TILE_BYTES) + maxLogits * 4 + PAGE_TABLE_BYTES;
  const rows =
    Math.max(maxTokens, maxLogits) * hidden * element +
    Math.max(ff, hidden, q) * 4 +
    Math.max(maxTokens, FEW * (chosen + 1)) * ff * element +
    FEW * heads * ATTENTION_SPLITS * (headDim + 2) * 4;
  const routed = moe
    ? maxTokens * experts * 4 + pairs * (ff * element + hidden * 4 + 12) + maxTokens * hidden * 4
    : 0;
  const expertTiles = 4 + (Math.floor(pairs / TILE_TOKENS) + experts + 1) * EXPERT_TILE_BYTES;
  return graph + tables + rows + routed + expertTiles + vocab * SAMPLER_BYTES;
}

/** Bytes of activations, tables and scratch of one rank: what its engine counts, what several ranks need to hand numbers over (copies of
 * the few rows of a step that the GPU waits for, the transport's own), and what buffers of whole pages take beyond their contents. */
export function metalScratchBytes(
  plan: Pick<LoadPlan, "config" | "place" | "tensors">,
  terms: MetalTerms,
): number {
  const { hiddenSize: hidden, vocabSize: vocab } = plan.config;
  const { tensorSize, stages } = placeOf(plan);
  const { maxTokens, maxLogits } = terms;
  // The second copy is that of the measurement of the ways.
  const handOver = 2 * FEW * hidden * 4 + HAND_OVER_WORD_BYTES;
  const exchanged = 2 * maxTokens * hidden * 4 + maxLogits * vocab * 4;
  const split = tensorSize * stages > 1 ? handOver + exchanged : 0;
  return metalCountedBytes(plan, terms) + split + PAGE_ROUNDING;
}

/** Bytes that a model may use of a GPU whose commands may use `workingSet`. */
export function usableOfWorkingSet(workingSet: number): number {
  return workingSet - Math.min(workingSet * RESERVED_SHARE, MOST_RESERVED);
}

/** The command that lets the GPU use `bytes` and its reserve; undefined when the machine's memory is too small for it. */
export function raiseLimitCommand(bytes: number, machineBytes: number): string | undefined {
  const wanted = bytes + Math.min(bytes * RESERVED_SHARE * 1.1, MOST_RESERVED);
  const megabytes = Math.ceil(wanted / 2 ** 20);
  // Below this the system itself no longer runs well.
  const kept = Math.max(machineBytes * 0.08, 3 * 2 ** 30);
  return wanted + kept <= machineBytes ? `sudo sysctl iogpu.wired_limit_mb=${megabytes}` : undefined;
}
