// What a model, or the ranks of one that run on this machine, need of memory, known before anything is loaded: weights,
// cache pages, scratch. Chooses the context that fits where none was asked for, and refuses with numbers what cannot fit. Pure.

import { CaravanError } from "../errors.ts";
import type { ModelConfig } from "./config.ts";
import { type LoadPlan, placeOf, tensorMemory } from "./load-plan.ts";
import { metalScratchBytes, raiseLimitCommand, usableOfWorkingSet } from "./metal-memory.ts";
import { layersAt, type RankPlace, wholeModel } from "./rank-place.ts";
import { SLOT } from "./tensor-names.ts";

/** How the cache keeps keys and values. q8: int8 in groups of 32 with a float32 scale each. */
export type KvType = "f32" | "f16" | "bf16" | "q8";

export interface MemoryRequest {
  /** Longest sequence asked for; undefined = what fits, up to the model's limit. */
  context?: number;
  /** Sequences that run at once; undefined = what fits, up to MOST_STREAMS. */
  streams?: number;
  kvType: KvType;
  /** `--compute exact`: float32 activations on a GPU also beside a cache of 8 bits. */
  exact?: boolean;
  threads: number;
  maxTokens: number;
  maxLogits: number;
  /** Bytes that may be used in all. */
  available: number;
  /** Where the GPU computes: bytes that its commands may use, and the machine's memory. On Macs the GPU's limit is the only one
   * (mapped weights count as free memory's cache); elsewhere `available` holds too. */
  gpu?: { workingSet: number; total: number; alone: boolean };
}

export interface MemoryPlan {
  context: number;
  streams: number;
  pageTokens: number;
  fullPages: number;
  chunkPages: number;
  /** Bytes. Mapped weights are shared with the file cache and can be dropped by the system; the others cannot. */
  weightsMapped: number;
  weightsCopied: number;
  kvBytes: number;
  scratchBytes: number;
}

/** Sequences at once where nobody says otherwise and memory is plenty. */
export const MOST_STREAMS = 16;
/** A context that most conversations fit into: streams are added beyond one only for contexts up to this. */
const COMFORTABLE_CONTEXT = 8192;
/** Share of the available memory that is planned; the rest is for the text worker, buffers and others. */
export const PLANNED_SHARE = 0.9;

/** Sizes of the CPU backend's scratch (cpu.h: CV_TILE_FLOATS, CV_ATTN_QUERIES, CV_ATTN_BLOCK; cpu.c: parts of long attention). */
const TILE_FLOATS = 1 << 16;
const QUERIES = 64;
const KEY_BLOCK = 256;
const SPLIT_PARTS = 512;
/** What a kernel keeps of a block of rows beside what grows with the columns. */
const KERNEL_BYTES = 1 << 15;
/** Tables whose size hardly depends on the model. */
const FIXED_BYTES = 1 << 17;

const KV_BYTES: Record<KvType, number> = { f32: 4, f16: 2, bf16: 2, q8: 1 + 4 / 32 };

/** Tokens a page: 64, or the largest power of two from 16 on that divides the attention chunk. */
export function pageTokensOf(chunk: number): number {
  for (const size of [64, 32, 16]) if (chunk % size === 0) return size;
  throw new CaravanError("unsupported_model", `attention_chunk_size ${chunk} is not a multiple of 16`);
}

/** Bytes of one page of each pool, all layers and KV heads of the place together. */
export function pageBytes(
  config: ModelConfig,
  kvType: KvType,
  pageTokens: number,
  place: RankPlace = wholeModel(config),
): { full: number; chunked: number } {
  const layer = 2 * place.kvHeads * config.headDim * pageTokens * KV_BYTES[kvType];
  const layers = layersAt(config, place);
  const chunked = layers.filter((each) => each.chunked).length;
  return { full: layer * (layers.length - chunked), chunked: layer * chunked };
}

/** Pages that one sequence of `context` tokens needs. Page numbers are the same on all ranks, whatever layers they have. */
export function pagesOf(
  config: ModelConfig,
  context: number,
  pageTokens: number,
): { full: number; chunked: number } {
  const all = Math.ceil(context / pageTokens);
  const hasFull = config.layers.some((layer) => !layer.chunked);
  // While a piece crosses a chunk's edge both chunks are held; one page more than a chunk is enough, since pieces
  // are cut to what is free (scheduler/pages.ts).
  const chunk = config.chunk === 0 ? 0 : Math.min(all, config.chunk / pageTokens + 1);
  return { full: hasFull ? all : 0, chunked: chunk };
}

/** Bytes of activations and tables in one rank's engine, and of the CPU backend's scratch (native/backend/cpu/cpu.c). */
export function scratchBytes(
  plan: Pick<LoadPlan, "config" | "place" | "tensors">,
  request: Pick<MemoryRequest, "threads" | "maxTokens" | "maxLogits">,
): number {
  const { config } = plan;
  const place = placeOf(plan);
  const { hiddenSize: hidden, headDim, vocabSize: vocab } = config;
  const { heads, kvHeads } = place;
  const { threads, maxTokens: tokens, maxLogits: logits } = request;
  const moe = config.experts > 0;
  const ff = widestMlp(plan);
  const q = heads * headDim;
  const graph = tokens * (hidden + 2 * q + 2 * kvHeads * headDim) * 4 + logits * vocab * 4;
  // What goes to another rank or comes from it.
  const exchanged = place.tensorSize * place.stages > 1 ? 2 * tokens * hidden * 4 + logits * vocab * 4 : 0;
  // float32 and int8 by three group sizes, with their scales and sums, in padded rows
  const act = (rows: number, cols: number) =>
    rows *
    [32, 64, 128].reduce(
      (sum, group) => sum + padded(cols, 64) + 8 * padded(Math.floor(cols / group) + 1, 16),
      4 * padded(cols, 16),
    );
  const places = moe ? tokens * config.expertsPerToken : 0;
  const backend =
    act(Math.max(tokens, logits), Math.max(hidden, q)) +
    act(tokens, ff) +
    act(places, hidden) +
    act(places, ff) +
    (places + (moe ? tokens : 0)) * hidden * 4 +
    tokens * headDim * 4;
  const routing = moe ? tokens * config.experts * 4 : 0;
  const split = threads > 1 ? heads * SPLIT_PARTS * (headDim * 4 + 8) : 0;
  const thread =
    KERNEL_BYTES +
    2 * TILE_FLOATS * 4 +
    QUERIES * (KEY_BLOCK + 3 * headDim) * 4 +
    64 * headDim * 4 +
    44 * Math.max(hidden, q, ff);
  return Math.round(
    graph + exchanged + backend + routing + split + threads * thread + vocab * 12 + FIXED_BYTES,
  );
}

function padded(count: number, to: number): number {
  return Math.ceil(count / to) * to;
}

/** Inner width of the widest MLP or expert of the plan's rank. */
export function widestMlp({
  config,
  place,
  tensors,
}: Pick<LoadPlan, "config" | "place" | "tensors">): number {
  if (place === undefined) {
    const dense = config.layers.some((layer) => !layer.moe);
    return Math.max(dense ? config.intermediateSize : 0, config.experts > 0 ? config.expertSize : 0);
  }
  const inner: readonly number[] = [SLOT.gate, SLOT.expertGate, SLOT.sharedGate];
  return tensors.reduce((most, { slot, rows }) => (inner.includes(slot) ? Math.max(most, rows) : most), 0);
}

/**
 * ranks: the model's plan, or those of all its ranks on this machine; the sizes are theirs together. The context, the streams
 * and the numbers of pages must be the same on every machine of an instance, so it has to ask for the first two.
 * Throws out_of_memory, saying by how much, or invalid_argument for a context beyond the model's limit.
 */
export function planMemory(ranks: LoadPlan | readonly LoadPlan[], request: MemoryRequest): MemoryPlan {
  const plans: readonly LoadPlan[] = "config" in ranks ? [ranks] : ranks;
  const config = plans[0]?.config;
  if (config === undefined) throw new CaravanError("internal_error", "no rank of a model to plan for");
  if (request.context !== undefined && request.context > config.contextLength) {
    throw new CaravanError(
      "invalid_argument",
      `a context of ${request.context} tokens was asked for; the model's limit is ${config.contextLength}`,
      { where: config.where, param: "context" },
    );
  }
  const pageTokens = config.chunk === 0 ? 64 : pageTokensOf(config.chunk);
  const bytes = { full: 0, chunked: 0 };
  let weightsMapped = 0;
  let weightsCopied = 0;
  let scratch = 0;
  for (const plan of plans) {
    const { full, chunked } = pageBytes(config, request.kvType, pageTokens, placeOf(plan));
    bytes.full += full;
    bytes.chunked += chunked;
    scratch += request.gpu === undefined ? scratchBytes(plan, request) : metalScratchBytes(plan, request);
    for (const tensor of plan.tensors) {
      const { mapped, copied } = tensorMemory(tensor);
      weightsMapped += mapped;
      weightsCopied += copied;
    }
  }
  const room = usableBytes(request) - weightsMapped - weightsCopied - scratch;
  const cost = (context: number): number => {
    const { full, chunked } = pagesOf(config, context, pageTokens);
    return full * bytes.full + chunked * bytes.chunked;
  };
  // Each of the streams that were asked for may reach the context; where none were, further ones are a bonus.
  const certain = request.streams ?? 1;
  const context =
    request.context ?? largestContext(config, pageTokens, (tokens) => certain * cost(tokens), room);
  if (context === 0 || cost(context) > room)
    throw tooLarge(
      config,
      request,
      weightsMapped + weightsCopied,
      scratch,
      cost(Math.max(context, pageTokens)),
    );
  const each = pagesOf(config, context, pageTokens);
  const streams = request.streams ?? streamsThatFit(config, context, cost, room);
  // Several sequences share the pool; one alone may use all of it.
  const typical = pagesOf(config, Math.min(context, COMFORTABLE_CONTEXT), pageTokens);
  const asked = request.streams === undefined ? typical : each;
  const fullPages = each.full + (streams - 1) * asked.full;
  const chunkPages = each.chunked + (streams - 1) * asked.chunked;
  const kvBytes = fullPages * bytes.full + chunkPages * bytes.chunked;
  if (kvBytes > room) throw tooLarge(config, request, weightsMapped + weightsCopied, scratch, kvBytes);
  return {
    context,
    streams,
    pageTokens,
    fullPages,
    chunkPages,
    weightsMapped,
    weightsCopied,
    kvBytes,
    scratchBytes: scratch,
  };
}

/** Bytes that may be planned. */
function usableBytes({ available, gpu }: MemoryRequest): number {
  const machine = available * PLANNED_SHARE;
  if (gpu === undefined) return machine;
  const usable = usableOfWorkingSet(gpu.workingSet);
  return gpu.alone ? usable : Math.min(usable, machine);
}

/** The most tokens, in whole pages, whose cache fits; 0 when not even one page does. */
function largestContext(
  config: ModelConfig,
  pageTokens: number,
  cost: (context: number) => number,
  room: number,
): number {
  let low = 0;
  let high = Math.ceil(config.contextLength / pageTokens);
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (cost(middle * pageTokens) <= room) low = middle;
    else high = middle - 1;
  }
  return Math.min(low * pageTokens, config.contextLength);
}

function streamsThatFit(
  config: ModelConfig,
  context: number,
  cost: (context: number) => number,
  room: number,
): number {
  const more = (room - cost(context)) / cost(Math.min(context, COMFORTABLE_CONTEXT, config.contextLength));
  return Math.max(1, Math.min(MOST_STREAMS, 1 + Math.floor(more)));
}

function tooLarge(
  config: ModelConfig,
  request: MemoryRequest,
  weights: number,
  scratch: number,
  kv: number,
): CaravanError {
  const gigabytes = (n: number) => `${(n / 1e9).toFixed(2)} GB`;
  const usable = usableBytes(request);
  const needed = weights + scratch + kv;
  const { gpu } = request;
  const raise = gpu === undefined ? undefined : raiseLimitCommand(needed, gpu.total);
  return new CaravanError(
    "out_of_memory",
    `the model needs ${gigabytes(needed)} (weights ${gigabytes(weights)}, cache ${gigabytes(kv)}, scratch ${gigabytes(scratch)}), ` +
      `${gigabytes(usable)} can be used${gpu === undefined ? "" : ` (the GPU's working set is ${gigabytes(gpu.workingSet)})`}: ${gigabytes(needed - usable)} too much`,
    {
      where: config.where,
      hint: [
        weights + scratch < usable
          ? "Ask for a shorter context with --context."
          : "Use a smaller or more strongly quantized model.",
        ...(raise === undefined ? [] : [`Or let the GPU use more memory until the next restart: ${raise}`]),
      ].join("\n  "),
    },
  );
}
