// What a whole model takes of one node's memory, in a few numbers: from a model's headers, and small enough to tell other nodes, so that
// each of them can say what would fit where without having the headers. Pure.

import { pageBytes, pagesOf, pageTokensOf } from "../model/memory-plan.ts";
import type { ModelTerms } from "./instance-placer.ts";
import { rankWorks } from "./model-profile.ts";
import { DEFAULT_CONTEXT, STEP_TOKENS } from "./placement.ts";
import { rankMemory } from "./rank-memory.ts";
import { sharesOf } from "./uneven-shares.ts";

/** One stream. Bytes and tokens. */
export interface ModelNeed {
  /** Weights and scratch. */
  fixed: number;
  /** What is planned where no context is asked for, and the model's limit. */
  defaultContext: number;
  longestContext: number;
  pageTokens: number;
  /** Of a page of the cache, all layers of its kind; chunked layers keep at most so many pages. */
  fullPageBytes: number;
  chunkedPageBytes: number;
  mostChunkedPages: number;
}

export function modelNeed({ profile, kvType, threads }: ModelTerms): ModelNeed {
  const { config } = profile;
  const longest = config.contextLength;
  const defaultContext = Math.min(DEFAULT_CONTEXT, longest);
  const pageTokens = config.chunk === 0 ? 64 : pageTokensOf(config.chunk);
  const bytes = pageBytes(config, kvType, pageTokens);
  const [whole] = rankWorks(profile, sharesOf([0, config.layers.length], [[1]]));
  const terms = { context: defaultContext, streams: 1, kvType, threads };
  const memory =
    whole === undefined
      ? { weights: 0, scratch: 0 }
      : rankMemory(profile, whole, { ...terms, maxTokens: STEP_TOKENS, maxLogits: 1 });
  return {
    fixed: memory.weights + memory.scratch,
    ...{ defaultContext, longestContext: longest, pageTokens },
    fullPageBytes: bytes.full,
    chunkedPageBytes: bytes.chunked,
    mostChunkedPages: pagesOf(config, longest, pageTokens).chunked,
  };
}

/** With a cache of `context` tokens. */
export function neededBytes(need: ModelNeed, context: number): number {
  const pages = Math.ceil(context / need.pageTokens);
  return (
    need.fixed + pages * need.fullPageBytes + Math.min(pages, need.mostChunkedPages) * need.chunkedPageBytes
  );
}

/** The longest context, in whole pages, that `room` bytes hold; 0: not even a page. */
export function contextFor(need: ModelNeed, room: number): number {
  let low = 0;
  let high = Math.ceil(need.longestContext / need.pageTokens);
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (neededBytes(need, middle * need.pageTokens) <= room) low = middle;
    else high = middle - 1;
  }
  return Math.min(low * need.pageTokens, need.longestContext);
}
