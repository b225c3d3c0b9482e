// Pages of the KV cache as the scheduler sees them: two pools of page numbers (layers with full attention, layers with
// chunked attention), and for each sequence a table into each pool.
//
// Steps run in the order they were submitted. A page may therefore be given back, and handed to another sequence of a
// *later* step, while a step that reads it is still in flight; it may not be handed out within the step that still
// reads it. The scheduler frees before it plans rows, never in between, which is what keeps that true.

import { CaravanError } from "../errors.ts";
import { broken, PagePool } from "./page-pool.ts";
import type { PageCopy } from "./step.ts";

/** Sizes of a model's cache, fixed at load. */
export interface CacheGeometry {
  /** Tokens a page. */
  pageTokens: number;
  /** Attention chunk in tokens, a multiple of pageTokens; 0 = no chunked layers. */
  chunk: number;
  /** Pages of the pool for full attention; 0 = no such layers. */
  fullPages: number;
  /** Pages of the pool for chunked layers; 0 = no such layers. Fewer than a chunk's hold only shorter sequences. */
  chunkPages: number;
}

/** One sequence's pages of one pool, in order of position, without gaps. */
export class PageTable {
  readonly #pool: PagePool;
  readonly #pageTokens: number;
  #pages = new Uint32Array(16);
  #count = 0;
  #base = 0;

  constructor(pool: PagePool, pageTokens: number) {
    this.#pool = pool;
    this.#pageTokens = pageTokens;
  }

  /** First position of the table, a multiple of the page size. */
  get base(): number {
    return this.#base;
  }

  get count(): number {
    return this.#count;
  }

  /** First position that no page of this table covers. */
  get end(): number {
    return this.#base + this.#count * this.#pageTokens;
  }

  /** End that could be reached with the pages that the pool can hand out. */
  get reach(): number {
    return this.#base + (this.#count + this.#pool.available) * this.#pageTokens;
  }

  /** The page numbers; a view that the next change of the table invalidates. */
  view(): Uint32Array {
    return this.#pages.subarray(0, this.#count);
  }

  /** Page that covers `position`; undefined where the table does not reach. */
  pageAt(position: number): number | undefined {
    const index = Math.floor((position - this.#base) / this.#pageTokens);
    return index < 0 || index >= this.#count ? undefined : this.#pages[index];
  }

  /** Takes pages until positions below `end` are covered. The caller has checked `reach`. */
  extend(end: number): void {
    while (this.end < end) {
      const page = this.#pool.take();
      if (page < 0)
        throw broken(`pages ran out at position ${this.end} of ${end} after they had been counted`);
      this.#push(page);
    }
  }

  /** Starts the (empty) table at `base` with pages that others hold or held; each gets one more owner. */
  adopt(base: number, pages: readonly number[]): void {
    if (this.#count > 0) throw broken("a table with pages was to start anew");
    this.#base = base;
    for (const page of pages) {
      this.#pool.retain(page);
      this.#push(page);
    }
  }

  /** Adds a page that the caller has taken for this table. */
  append(page: number): void {
    this.#push(page);
  }

  /** Moves the base up to `position` (a multiple of the page size) and gives back the pages below it, except those from
   * `keepFrom` on, which go to `keep` with their positions and still belong to the caller. */
  dropBelow(
    position: number,
    keepFrom = Number.POSITIVE_INFINITY,
    keep: (position: number, page: number) => void = () => {},
  ): void {
    if (position <= this.#base) return;
    const dropped = Math.min(this.#count, (position - this.#base) / this.#pageTokens);
    // The last positions first: where pages become idle, the ends of prefixes go before what they build on.
    for (let i = dropped - 1; i >= 0; i--) {
      const page = this.#pages[i] ?? 0;
      const start = this.#base + i * this.#pageTokens;
      if (start >= keepFrom) keep(start, page);
      else this.#pool.release(page);
    }
    this.#pages.copyWithin(0, dropped, this.#count);
    this.#count -= dropped;
    this.#base = position;
  }

  /** Gives everything back, the last positions first; the table starts at position 0 again. */
  clear(): void {
    for (let i = this.#count - 1; i >= 0; i--) this.#pool.release(this.#pages[i] ?? 0);
    this.#count = 0;
    this.#base = 0;
  }

  #push(page: number): void {
    if (this.#count === this.#pages.length) {
      const larger = new Uint32Array(this.#pages.length * 2);
      larger.set(this.#pages);
      this.#pages = larger;
    }
    this.#pages[this.#count] = page;
    this.#count++;
  }
}

/** Both pools of a model. */
export class PagePools {
  readonly geometry: CacheGeometry;
  readonly full: PagePool;
  readonly chunked: PagePool;

  constructor(geometry: CacheGeometry) {
    const { pageTokens, chunk, chunkPages, fullPages } = geometry;
    if (pageTokens < 1 || (chunk > 0 && chunk % pageTokens !== 0))
      throw new CaravanError(
        "internal_error",
        `page of ${pageTokens} tokens does not divide the chunk of ${chunk}`,
      );
    this.geometry = geometry;
    this.full = new PagePool(fullPages);
    this.chunked = new PagePool(chunk > 0 ? chunkPages : 0);
  }

  /** Longest sequence that fits when it is alone, in tokens; Infinity when only current chunks are kept. */
  get longestSequence(): number {
    const { pageTokens, chunk } = this.geometry;
    const full = this.full.capacity === 0 ? Number.POSITIVE_INFINITY : this.full.capacity * pageTokens;
    const chunked = this.chunked.capacity * pageTokens;
    return this.chunked.capacity === 0 || chunked >= chunk ? full : Math.min(full, chunked);
  }

  /** Pages that a sequence of `length` tokens holds at its end. */
  demand(length: number): { full: number; chunked: number } {
    const { pageTokens, chunk } = this.geometry;
    const pages = Math.ceil(length / pageTokens);
    return {
      full: this.full.capacity === 0 ? 0 : pages,
      chunked: this.chunked.capacity === 0 ? 0 : Math.min(pages, chunk / pageTokens),
    };
  }
}

/** One sequence's tables of both kinds. */
export class SequencePages {
  readonly full: PageTable | undefined;
  readonly chunked: PageTable | undefined;
  readonly #pools: PagePools;
  /** Pages of finished chunks whose last step has not ended, by position: the prefix tree may want them then. */
  readonly #retired = new Map<number, number>();
  /** Copies that the sequence's first step has to make; their sources have one more owner until then. */
  #copies: PageCopy[] = [];

  constructor(pools: PagePools) {
    const { pageTokens } = pools.geometry;
    this.#pools = pools;
    this.full = pools.full.capacity === 0 ? undefined : new PageTable(pools.full, pageTokens);
    this.chunked = pools.chunked.capacity === 0 ? undefined : new PageTable(pools.chunked, pageTokens);
  }

  /** Pages that wait for `releaseRetired`. */
  get retired(): number {
    return this.#retired.size;
  }

  /** Lets go of pages of chunks that no query at or behind `position` reads. Those from `keepFrom` on are kept aside
   * until `releaseRetired`. */
  dropFinishedChunks(position: number, keepFrom = Number.POSITIVE_INFINITY): void {
    const { chunk } = this.#pools.geometry;
    this.chunked?.dropBelow(position - (position % chunk), keepFrom, (start, page) => {
      this.#retired.set(start, page);
    });
  }

  /** Gives back retired pages below `position`. */
  releaseRetired(position: number): void {
    if (this.#retired.size === 0) return;
    for (const start of [...this.#retired.keys()].sort((a, b) => b - a)) {
      if (start >= position) continue;
      this.#pools.chunked.release(this.#retired.get(start) ?? 0);
      this.#retired.delete(start);
    }
  }

  /** Page of the chunked pool with the keys of `position`, if it is still held. */
  chunkedPageAt(position: number): number | undefined {
    return this.#retired.get(position) ?? this.chunked?.pageAt(position);
  }

  /** Starts the (empty) tables with pages for everything that a query at `position` reads. */
  adopt(position: number, full: readonly number[], chunked: readonly number[]): void {
    const { chunk } = this.#pools.geometry;
    this.full?.adopt(0, full);
    this.chunked?.adopt(position - (position % chunk), chunked);
  }

  /** Adds a new page to each table, to become a copy of a page that others hold or held. False = there are no pages left, and
   * nothing has changed. */
  adoptCopy(full: number | undefined, chunked: number | undefined): boolean {
    const wanted = [
      { pool: "full" as const, pages: this.#pools.full, table: this.full, from: full },
      { pool: "chunked" as const, pages: this.#pools.chunked, table: this.chunked, from: chunked },
    ];
    const copies: PageCopy[] = [];
    for (const { pool, pages, table, from } of wanted) {
      if (table === undefined || from === undefined) continue;
      // Held before a page is taken, which might be this one otherwise.
      pages.retain(from);
      const to = pages.take();
      copies.push({ pool, from, to });
    }
    if (copies.some(({ to }) => to < 0)) {
      for (const { pool, from, to } of copies) {
        this.#pools[pool].release(from);
        if (to >= 0) this.#pools[pool].release(to);
      }
      return false;
    }
    for (const { pool, to } of copies) this[pool]?.append(to);
    this.#copies = copies;
    return true;
  }

  /** The copies to be made by the step that is being built, once. Their sources may be handed out afterwards: to later steps. */
  takeCopies(): PageCopy[] {
    const copies = this.#copies;
    this.#copies = [];
    for (const { pool, from } of copies) this.#pools[pool].release(from);
    return copies;
  }

  /** How many of the `wanted` tokens from `position` on can be stored now. */
  fitting(position: number, wanted: number): number {
    const full = this.full === undefined ? wanted : this.full.reach - position;
    const chunked = this.chunked === undefined ? wanted : this.chunked.reach - position;
    return Math.max(0, Math.min(wanted, full, chunked));
  }

  /** Covers positions below `end`; `fitting` has said that they fit. */
  extend(end: number): void {
    this.full?.extend(end);
    this.chunked?.extend(end);
  }

  clear(): void {
    this.takeCopies();
    this.full?.clear();
    this.chunked?.clear();
    this.releaseRetired(Number.POSITIVE_INFINITY);
  }
}
