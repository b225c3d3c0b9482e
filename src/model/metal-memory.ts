// What the Metal backend needs beside weights and cache, and how much of a Mac's memory its GPU may use. Pure; the sizes are
// those of native/backend/metal/metal.c (open_scratch) and native/engine/graph.c, which the tests compare.

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
/** Each buffer is whole pages; there are about this many. */
const PAGE_ROUNDING = 40 * 16384;
/** Of the working set that is left to the system: its own buffers, other programs' windows. */
const RESERVED_SHARE = 0.05;
const MOST_RESERVED = 2 ** 30;

/** Bytes of activations, tables and scratch of one rank. */
export function metalScratchBytes(
  plan: Pick<LoadPlan, "config" | "place" | "tensors">,
  { kvType, maxTokens, maxLogits }: { kvType: KvType; maxTokens: number; maxLogits: number },
): number {
  const { config } = plan;
  const { heads, kvHeads, tensorSize, stages } = placeOf(plan);
  const { hiddenSize: hidden, headDim, vocabSize: vocab, experts } = config;
  const element = kvType === "f32" ? 4 : 2;
  const moe = experts > 0;
  const ff = widestMlp(plan);
  const q = heads * headDim;
  const exchanged = tensorSize * stages > 1 ? 2 * maxTokens * hidden * 4 + maxLogits * vocab * 4 : 0;
  const graph = maxTokens * (hidden + 2 * q + 2 * kvHeads * headDim) * 4 + maxLogits * vocab * 4 + exchanged;
  const chosen = moe ? config.expertsPerToken : 0;
  const pairs = maxTokens * chosen;
  const tables = maxTokens * (TOKEN_BYTES + headDim * 4 + 2 * TILE_BYTES) + maxLogits * 4 + PAGE_TABLE_BYTES;
  const rows =
    Math.max(maxTokens, maxLogits) * hidden * element +
    Math.max(ff, hidden, q) * 4 +
    Math.max(maxTokens, FEW * (chosen + 1)) * ff * element +
    FEW * heads * ATTENTION_SPLITS * (headDim + 2) * 4;
  const routed = moe
    ? maxTokens * experts * 4 +
      pairs * (ff * element + hidden * 4 + 12) +
      maxTokens * hidden * 4 +
      (Math.floor(pairs / TILE_TOKENS) + experts + 1) * EXPERT_TILE_BYTES
    : 0;
  return graph + tables + rows + routed + PAGE_ROUNDING;
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
