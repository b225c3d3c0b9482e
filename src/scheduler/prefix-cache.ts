// Connects sequences with the prefix tree: a sequence that starts takes over the pages of the longest prefix that may be
// resumed, and each page that a finished step has filled, of prompt or answer, becomes known to the tree. Pages are only
// ever written behind a sequence's resume position, in pages of its own, so what is shared never changes: a sequence that
// resumes inside a page gets a copy of it.

import type { PagePools } from "./pages.ts";
import { PrefixTree } from "./prefix-tree.ts";
import type { Sequence } from "./sequence.ts";

export interface PrefixStatistics {
  /** Sequences that started, and those that resumed behind position 0. */
  lookups: number;
  hits: number;
  /** Positions of all of them, and those that need not be computed. */
  tokens: number;
  cachedTokens: number;
}

export class PrefixCache {
  readonly #pools: PagePools;
  readonly #tree: PrefixTree | undefined;
  readonly #statistics: PrefixStatistics = { lookups: 0, hits: 0, tokens: 0, cachedTokens: 0 };

  constructor(pools: PagePools, enabled: boolean) {
    this.#pools = pools;
    this.#tree = enabled ? new PrefixTree(pools) : undefined;
  }

  get enabled(): boolean {
    return this.#tree !== undefined;
  }

  get statistics(): Readonly<PrefixStatistics> {
    return this.#statistics;
  }

  /** Gives a sequence that has computed nothing the pages of its longest known prefix. At least one known token is left
   * to compute, and every prompt token whose log-probability is still asked for. */
  attach(sequence: Sequence): void {
    this.detach(sequence);
    if (this.#tree === undefined || sequence.promptLogprobs?.complete === false) return;
    const match = this.#tree.match(sequence.tokens(0, sequence.known - 1));
    sequence.pages.adopt(match.position, match.full, match.chunked);
    const inside = this.#tree.inside(match.node, sequence.tokens(match.position, sequence.known - 1));
    const copied = inside !== undefined && sequence.pages.adoptCopy(inside.full, inside.chunked);
    sequence.resume(match.position + (copied ? inside.count : 0), match.node, match.position);
  }

  /** The opposite: the sequence would start at 0. */
  detach(sequence: Sequence): void {
    sequence.pages.clear();
    sequence.resume(0, this.#tree?.root);
  }

  /** Counts a sequence that starts now. */
  started(sequence: Sequence): void {
    if (this.#tree === undefined) return;
    this.#statistics.lookups++;
    if (sequence.computed > 0) this.#statistics.hits++;
    this.#statistics.tokens += sequence.known;
    this.#statistics.cachedTokens += sequence.computed;
  }

  /** First position whose chunked page the tree has not been offered. */
  keepFrom(sequence: Sequence): number {
    return this.#tree === undefined ? Number.POSITIVE_INFINITY : sequence.published;
  }

  /** Offers the tree every page that finished steps have filled. */
  publish(sequence: Sequence): void {
    const tree = this.#tree;
    if (tree === undefined) return;
    const { pageTokens } = this.#pools.geometry;
    // What it built on was evicted: its own pages have the same contents.
    if (sequence.node?.attached !== true) {
      sequence.node = tree.root;
      sequence.published = 0;
    }
    let node = sequence.node;
    while (sequence.published + pageTokens <= sequence.settled) {
      const start = sequence.published;
      const full = sequence.pages.full?.pageAt(start);
      const chunked = sequence.pages.chunkedPageAt(start);
      node = tree.add(node, sequence.tokens(start, start + pageTokens), full, chunked);
      sequence.node = node;
      sequence.published = start + pageTokens;
    }
    sequence.pages.releaseRetired(sequence.published);
  }

  /** Offers the tree the page that a sequence leaves unfinished. */
  ended(sequence: Sequence): void {
    const { published, settled, node, pages } = sequence;
    if (this.#tree === undefined || node?.attached !== true || settled <= published) return;
    const tokens = sequence.tokens(published, settled);
    if (tokens.length >= this.#pools.geometry.pageTokens) return;
    this.#tree.add(node, tokens, pages.full?.pageAt(published), pages.chunkedPageAt(published));
  }

  /** Forgets everything (tests and measurements). */
  clear(): void {
    this.#tree?.clear();
  }
}
