// Raw logits of a token sequence, computed in this process (and its ranks): how the engine is judged. The prompt goes through in
// pieces, the rest one token at a time through the cache, over the same pages and steps that serving uses.

import { CaravanError } from "../errors.ts";
import { PagePools, SequencePages } from "../scheduler/pages.ts";
import type { StepRow } from "../scheduler/step.ts";
import { type LoadedEngine, loadModel } from "./load-model.ts";
import type { RankOptions } from "./load-options.ts";
import type { DeviceChoice } from "./metal-device.ts";
import { GREEDY } from "./protocol.ts";

export interface LogitsOptions {
  modelDir: string;
  /** At least one. */
  tokens: readonly number[];
  /** Tokens that are the prompt; default all. */
  prefill?: number;
  /** Most prompt tokens in one step. Default: 512, less where that many logits would not fit into 256 MB. */
  piece?: number;
  compute?: "exact" | "fast";
  /** Default: the CPU, whose arithmetic is the reference. */
  device?: DeviceChoice;
  /** Bits of the cache's elements. */
  kvBits?: 8 | 16;
  threads?: number;
  /** Kernel set to force, by name. */
  cpu?: string;
  /** Ranks on this machine, processes of their own. */
  ranks?: RankOptions;
  /** Takes the logits float32 [rows, vocab] of the next rows in order, instead of `data`. Waited for. */
  onLogits?: (rows: Float32Array, vocab: number) => void | Promise<void>;
}

export interface Logits {
  /** float32 [tokens, vocab]; empty when they went to onLogits. */
  data: Float32Array;
  tokens: number;
  vocab: number;
}

const LARGEST_PIECE_BYTES = 256 * 1024 * 1024;
const DEFAULT_PIECE = 512;
const NOTHING = new Uint32Array(0);

/** Throws what loading throws, invalid_argument for tokens outside the vocabulary, context_length_exceeded. */
export async function runLogits(options: LogitsOptions): Promise<Logits> {
  const { tokens } = options;
  if (tokens.length === 0) throw new CaravanError("invalid_argument", "no tokens", { param: "tokens" });
  const prefill = options.prefill ?? tokens.length;
  const model = await loadModel({
    model: options.modelDir,
    modelDir: options.modelDir,
    context: tokens.length,
    streams: 1,
    compute: options.compute ?? "fast",
    device: options.device ?? "cpu",
    ...(options.kvBits === undefined ? {} : { kvBits: options.kvBits }),
    ...(options.threads === undefined ? {} : { threads: options.threads }),
    ...(options.cpu === undefined ? {} : { cpu: options.cpu }),
    ...options.ranks,
    piece: (vocab) => Math.min(options.piece ?? defaultPiece(vocab), Math.max(1, prefill)),
  });
  try {
    return await computeLogits(model, options, prefill);
  } finally {
    await model.close();
  }
}

function defaultPiece(vocab: number): number {
  return Math.max(1, Math.min(DEFAULT_PIECE, Math.floor(LARGEST_PIECE_BYTES / (4 * vocab))));
}

async function computeLogits(model: LoadedEngine, options: LogitsOptions, prefill: number): Promise<Logits> {
  const { limits } = model;
  const tokens = Uint32Array.from(options.tokens);
  const wrong = options.tokens.find(
    (token) => !(Number.isInteger(token) && token >= 0 && token < limits.vocab),
  );
  if (wrong !== undefined)
    throw new CaravanError("invalid_argument", `token ${wrong} is not in the vocabulary of ${limits.vocab}`, {
      param: "tokens",
    });
  if (tokens.length > model.contextTokens)
    throw new CaravanError(
      "context_length_exceeded",
      `${tokens.length} tokens do not fit into a context of ${model.contextTokens}`,
      { param: "tokens" },
    );
  const data = new Float32Array(options.onLogits === undefined ? tokens.length * limits.vocab : 0);
  const pages = new SequencePages(new PagePools(model.geometry));
  const piece = Math.min(limits.maxTokens, limits.maxLogits);
  for (let first = 0; first < tokens.length; ) {
    pages.dropFinishedChunks(first);
    const wanted = first < prefill ? Math.min(piece, prefill - first) : 1;
    const count = pages.fitting(first, wanted);
    if (count === 0) throw new CaravanError("internal_error", `no page for position ${first}`);
    pages.extend(first + count);
    const result = await model.engine.submit({ rows: [row(tokens, first, count, pages)], copies: [] });
    const logits = result.rows[0]?.logits;
    if (logits === undefined || logits.length !== count * limits.vocab)
      throw new CaravanError("engine_failed", `${count} positions gave ${logits?.length ?? 0} logits`);
    if (options.onLogits === undefined) data.set(logits, first * limits.vocab);
    else await options.onLogits(logits, limits.vocab);
    first += count;
  }
  return { data, tokens: tokens.length, vocab: limits.vocab };
}

function row(tokens: Uint32Array, first: number, count: number, pages: SequencePages): StepRow {
  return {
    slot: 0,
    firstPosition: first,
    tokens: tokens.subarray(first, first + count),
    fullPages: pages.full?.view() ?? NOTHING,
    chunkPages: pages.chunked?.view() ?? NOTHING,
    chunkBase: pages.chunked?.base ?? 0,
    logits: "all",
    sample: false,
    returnLogits: true,
    logprob: false,
    topLogprobs: 0,
    sampling: GREEDY,
    bias: [],
    history: NOTHING,
    xtcKeep: NOTHING,
  };
}
