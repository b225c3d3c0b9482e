// Bytes that a rank of a placement takes on its node, as planMemory counts them for the same rank: weights, cache pages of
// the context and streams that were asked for, scratch; and the longest context that a node has room for. Pure.

import { type KvType, pageBytes, pagesOf, pageTokensOf, scratchBytes } from "../model/memory-plan.ts";
import type { ModelProfile, RankWork } from "./model-profile.ts";

/** The same on all nodes of an instance. */
export interface MemoryTerms {
  /** Tokens. */
  context: number;
  streams: number;
  kvType: KvType;
  threads: number;
  /** Most tokens, and most rows of logits, of a step. */
  maxTokens: number;
  maxLogits: number;
}

export interface RankMemory {
  weights: number;
  kv: number;
  scratch: number;
}

export function rankMemory(profile: ModelProfile, work: RankWork, terms: MemoryTerms): RankMemory {
  return {
    weights: work.weights,
    kv: terms.streams * contextBytes(profile, work, terms, terms.context),
    scratch: rankScratch(profile, work, terms),
  };
}

/** Cache of one sequence of `context` tokens. */
export function contextBytes(
  { config }: ModelProfile,
  { place }: Pick<RankWork, "place">,
  { kvType }: Pick<MemoryTerms, "kvType">,
  context: number,
): number {
  const pageTokens = config.chunk === 0 ? 64 : pageTokensOf(config.chunk);
  const pages = pagesOf(config, context, pageTokens);
  const bytes = pageBytes(config, kvType, pageTokens, place);
  return pages.full * bytes.full + pages.chunked * bytes.chunked;
}

/** The longest context, in whole pages, of which every rank has room for all streams; 0 where not even a page fits.
 * rooms: bytes that each rank's node has for the cache. */
export function longestContext(
  profile: ModelProfile,
  works: readonly RankWork[],
  rooms: readonly number[],
  terms: Pick<MemoryTerms, "kvType" | "streams">,
): number {
  const { config } = profile;
  const pageTokens = config.chunk === 0 ? 64 : pageTokensOf(config.chunk);
  const fits = (context: number) =>
    works.every((work, r) => terms.streams * contextBytes(profile, work, terms, context) <= (rooms[r] ?? 0));
  let low = 0;
  let high = Math.ceil(config.contextLength / pageTokens);
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(middle * pageTokens)) low = middle;
    else high = middle - 1;
  }
  return Math.min(low * pageTokens, config.contextLength);
}

function rankScratch({ config, widest }: ModelProfile, work: RankWork, terms: MemoryTerms): number {
  const { tensorSize, stages } = work.place;
  if (tensorSize * stages === 1) return scratchBytes({ config, tensors: [] }, terms);
  const tensors = widest === undefined || work.widest === 0 ? [] : [{ ...widest, rows: work.widest }];
  return scratchBytes({ config, place: work.place, tensors }, terms);
}
