// Pages of the KV cache as the scheduler sees them: two pools of page numbers with reference counts (layers with full
// attention, layers with chunked attention), and for each sequence a table into each pool.
//
// Steps run in the order they were submitted. A page may therefore be given back, and handed to another sequence of a
// *later* step, while a step that reads it is still in flight; it may not be handed out within the step that still
// reads it. The scheduler frees before it plans rows, never in between, which is what keeps that true.

import { CaravanError } from "../errors.ts";

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

/** Page numbers 0..capacity-1 with reference counts. Broken accounting is a bug and throws internal_error. */
export class PagePool {
  readonly capacity: number;
  readonly #free: Uint32Array;
  readonly #references: Uint32Array;
  #freeCount: number;

  constructor(capacity: number) {
    this.capacity = capacity;
    this.#free = new Uint32Array(capacity);
    this.#references = new Uint32Array(capacity);
    this.#freeCount = capacity;
    // Low numbers are handed out first, so a small load touches little memory.
    for (let i = 0; i < capacity; i++) this.#free[i] = capacity - 1 - i;
  }

  get free(): number {
    return this.#freeCount;
  }

  /** A free page with one reference, or -1 when there is none. */
  take(): number {
    if (this.#freeCount === 0) return -1;
    this.#freeCount--;
    const page = this.#free[this.#freeCount] ?? 0;
    if (this.#references[page] !== 0) throw broken(`page ${page} was free and in use`);
    this.#references[page] = 1;
    return page;
  }

  /** One more owner of a page that is in use. */
  retain(page: number): void {
    const references = this.#references[page];
    if (references === undefined || references === 0) throw broken(`page ${page} was shared but not in use`);
    this.#references[page] = references + 1;
  }

  /** One owner less; the page is free again when the last one is gone. */
  release(page: number): void {
    const references = this.#references[page];
    if (references === undefined || references === 0) throw broken(`page ${page} was given back twice`);
    this.#references[page] = references - 1;
    if (references === 1) {
      this.#free[this.#freeCount] = page;
      this.#freeCount++;
    }
  }

  references(page: number): number {
    return this.#references[page] ?? 0;
  }
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

  /** End that could be reached with the pool's free pages. */
  get reach(): number {
    return this.#base + (this.#count + this.#pool.free) * this.#pageTokens;
  }

  /** The page numbers; a view that the next change of the table invalidates. */
  view(): Uint32Array {
    return this.#pages.subarray(0, this.#count);
  }

  /** Takes pages until positions below `end` are covered. The caller has checked `reach`. */
  extend(end: number): void {
    while (this.end < end) {
      const page = this.#pool.take();
      if (page < 0)
        throw broken(`pages ran out at position ${this.end} of ${end} after they had been counted`);
      if (this.#count === this.#pages.length) {
        const larger = new Uint32Array(this.#pages.length * 2);
        larger.set(this.#pages);
        this.#pages = larger;
      }
      this.#pages[this.#count] = page;
      this.#count++;
    }
  }

  /** Moves the base up to `position` (a multiple of the page size) and gives back the pages below it. */
  dropBelow(position: number): void {
    if (position <= this.#base) return;
    const dropped = Math.min(this.#count, (position - this.#base) / this.#pageTokens);
    for (let i = 0; i < dropped; i++) this.#pool.release(this.#pages[i] ?? 0);
    this.#pages.copyWithin(0, dropped, this.#count);
    this.#count -= dropped;
    this.#base = position;
  }

  /** Gives everything back; the table starts at position 0 again. */
  clear(): void {
    for (let i = 0; i < this.#count; i++) this.#pool.release(this.#pages[i] ?? 0);
    this.#count = 0;
    this.#base = 0;
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
  readonly #chunk: number;

  constructor(pools: PagePools) {
    const { pageTokens, chunk } = pools.geometry;
    this.#chunk = chunk;
    this.full = pools.full.capacity === 0 ? undefined : new PageTable(pools.full, pageTokens);
    this.chunked = pools.chunked.capacity === 0 ? undefined : new PageTable(pools.chunked, pageTokens);
  }

  /** Gives back pages of chunks that no query at or behind `position` reads. */
  dropFinishedChunks(position: number): void {
    this.chunked?.dropBelow(position - (position % this.#chunk));
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
    this.full?.clear();
    this.chunked?.clear();
  }
}

function broken(message: string): CaravanError {
  return new CaravanError("internal_error", `page accounting: ${message}`, {
    hint: "this is a bug in caravan; the model is loaded again",
  });
}
