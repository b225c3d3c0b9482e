// Page pools and tables: nothing lost, nothing given back twice, exactly the pages that queries read.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { PagePool } from "../../src/scheduler/page-pool.ts";
import { PagePools, SequencePages } from "../../src/scheduler/pages.ts";

describe("a page pool", () => {
  test("refuses to give a page back twice", () => {
    const pool = new PagePool(2);
    const page = pool.take();
    pool.release(page);
    expect(() => pool.release(page)).toThrow("given back twice");
    expect(() => pool.release(99)).toThrow("given back twice");
  });

  test("keeps a shared page until its last owner gives it back", () => {
    const pool = new PagePool(1);
    const page = pool.take();
    pool.retain(page);
    pool.release(page);
    expect(pool.free).toBe(0);
    expect(pool.take()).toBe(-1);
    pool.release(page);
    expect(pool.free).toBe(1);
    expect(() => pool.retain(page)).toThrow("not in use");
  });

  test("never hands a page to two owners and never loses one, whatever the order", () => {
    const operations = fc.array(fc.tuple(fc.constantFrom("take", "retain", "release"), fc.nat()), {
      maxLength: 200,
    });
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 12 }), operations, (capacity, list) => {
        const pool = new PagePool(capacity);
        const owners: number[] = [];
        for (const [what, pick] of list) {
          const owned = owners[owners.length === 0 ? 0 : pick % owners.length];
          if (what === "take") {
            const page = pool.take();
            if (page < 0) expect(new Set(owners).size).toBe(capacity);
            else {
              expect(owners).not.toContain(page);
              owners.push(page);
            }
          } else if (owned !== undefined && what === "retain") {
            pool.retain(owned);
            owners.push(owned);
          } else if (owned !== undefined) {
            pool.release(owned);
            owners.splice(owners.indexOf(owned), 1);
          }
          expect(pool.free).toBe(capacity - new Set(owners).size);
        }
      }),
      { numRuns: 200 },
    );
  });
});

describe("a sequence's page tables", () => {
  const geometry = { pageTokens: 4, chunk: 16, fullPages: 32, chunkPages: 12 };

  test("hold full pages for everything and chunked pages for the current chunk only", () => {
    const pools = new PagePools(geometry);
    const pages = new SequencePages(pools);
    pages.dropFinishedChunks(0);
    pages.extend(40);
    expect(pages.full?.count).toBe(10);
    expect(pages.chunked?.count).toBe(10);
    pages.dropFinishedChunks(40);
    expect(pages.chunked?.base).toBe(32);
    expect(pages.chunked?.count).toBe(2);
    pages.dropFinishedChunks(48);
    expect(pages.chunked?.base).toBe(48);
    expect(pages.chunked?.count).toBe(0);
    pages.clear();
    expect(pools.full.free).toBe(32);
    expect(pools.chunked.free).toBe(12);
  });

  test("never claim more than the pools hold, and cover every position that a query reads", () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 40 }), { maxLength: 60 }), (pieces) => {
        const pools = new PagePools(geometry);
        const pages = new SequencePages(pools);
        let position = 0;
        for (const piece of pieces) {
          pages.dropFinishedChunks(position);
          const count = pages.fitting(position, piece);
          expect(count).toBeLessThanOrEqual(piece);
          pages.extend(position + count);
          const chunkStart = position - (position % geometry.chunk);
          expect(pages.full?.end ?? 0).toBeGreaterThanOrEqual(position + count);
          if (count > 0) expect(pages.chunked?.base).toBe(chunkStart);
          expect(pages.chunked?.end ?? 0).toBeGreaterThanOrEqual(position + count);
          position += count;
        }
        // Alone, a sequence stops only where the pool for full attention ends.
        if (pieces.reduce((sum, piece) => sum + piece, 0) >= 128 && pieces.every((piece) => piece <= 32))
          expect(position).toBe(128);
        pages.clear();
        expect(pools.full.free).toBe(geometry.fullPages);
        expect(pools.chunked.free).toBe(geometry.chunkPages);
      }),
      { numRuns: 200 },
    );
  });

  test("exist only for the kinds of layers that the model has", () => {
    const onlyFull = new SequencePages(
      new PagePools({ pageTokens: 4, chunk: 0, fullPages: 3, chunkPages: 0 }),
    );
    expect(onlyFull.chunked).toBeUndefined();
    expect(onlyFull.fitting(0, 100)).toBe(12);
    const onlyChunked = new SequencePages(
      new PagePools({ pageTokens: 4, chunk: 8, fullPages: 0, chunkPages: 2 }),
    );
    expect(onlyChunked.full).toBeUndefined();
    expect(onlyChunked.fitting(0, 100)).toBe(8);
  });

  test("limit the longest sequence: by the full pool, and by a chunked pool smaller than one chunk", () => {
    const longest = (fullPages: number, chunkPages: number): number =>
      new PagePools({ pageTokens: 4, chunk: 16, fullPages, chunkPages }).longestSequence;
    expect(longest(9, 4)).toBe(36);
    expect(longest(9, 3)).toBe(12);
    expect(longest(0, 4)).toBe(Number.POSITIVE_INFINITY);
    expect(longest(0, 2)).toBe(8);
    expect(() => new PagePools({ pageTokens: 5, chunk: 16, fullPages: 9, chunkPages: 9 })).toThrow(
      "does not divide",
    );
  });
});
