// What the pages of the KV cache hold, so that a prompt that begins like an earlier sequence need not be computed again.
//
// A node is one full page of tokens behind its parent's; it names the page of each pool that holds their keys and
// values, or none. A sequence may resume at position p only if every page for full attention below p is held, and every
// chunked page of [floor(p/C)·C, p): a query at p reads nothing else. Chunked pages are lost one by one; losing a page
// for full attention makes everything behind it useless, so the node goes with all that follow it.
//
// A sequence may also resume *inside* a page: the page's first tokens' keys do not depend on what follows them, so it gets
// a copy of the page, which it then continues. Therefore the last, unfinished page of an ended sequence is remembered too,
// as a node with fewer tokens that nothing can follow.
//
// Pages are evicted by their pools, longest idle first (page-pool.ts). Sequences give their pages back from the end, so
// the end of a prefix is always idle for longer than what it builds on.

import type { PagePool } from "./page-pool.ts";
import type { PagePools } from "./pages.ts";

const NONE = -1;
/** A page is copied for at least this part of its tokens: below, computing them costs as little. */
const LEAST_SHARE = 8;
const TOKEN_BYTES = 4;

export class PrefixNode {
  readonly parent: PrefixNode | undefined;
  /** The page's tokens as a string of bytes; fewer than a page's where a sequence ended. */
  readonly key: string;
  readonly children = new Map<string, PrefixNode>();
  full = NONE;
  chunked = NONE;
  /** False when it was cut from the tree; nothing may be added behind it. */
  attached = true;

  constructor(parent: PrefixNode | undefined, key: string) {
    this.parent = parent;
    this.key = key;
  }
}

export interface PrefixMatch {
  /** Where to resume, a multiple of the page size; 0 = nothing found. */
  position: number;
  /** Pages of positions [0, position). */
  full: number[];
  /** Pages of positions [floor(position/C)·C, position). */
  chunked: number[];
  /** Node whose page ends at `position`. */
  node: PrefixNode;
}

/** Pages whose first `count` tokens are wanted. */
export interface InsideMatch {
  count: number;
  full: number | undefined;
  chunked: number | undefined;
}

export class PrefixTree {
  readonly root = new PrefixNode(undefined, "");
  readonly #pools: PagePools;
  readonly #fullOwner = new Map<number, PrefixNode>();
  readonly #chunkedOwner = new Map<number, PrefixNode>();

  /** One tree for a pair of pools: it takes over their eviction. */
  constructor(pools: PagePools) {
    this.#pools = pools;
    pools.full.onEvict = (page) => this.#lose(this.#fullOwner, page, (node) => this.#cut(node));
    pools.chunked.onEvict = (page) => this.#lose(this.#chunkedOwner, page, (node) => this.#loseChunked(node));
  }

  /** Pages that the tree knows, in use or idle. */
  get pages(): { full: number; chunked: number } {
    return { full: this.#fullOwner.size, chunked: this.#chunkedOwner.size };
  }

  /** The largest position up to `tokens.length` at which a sequence that begins with `tokens` may resume. The pages are
   * not retained: take them before anything else takes pages. */
  match(tokens: Uint32Array): PrefixMatch {
    const { pageTokens, chunk } = this.#pools.geometry;
    const path = this.#walk(tokens);
    const hasFull = this.#pools.full.capacity > 0;
    const hasChunked = this.#pools.chunked.capacity > 0;
    let pages = path.length;
    if (hasFull) {
      const gap = path.findIndex((node) => node.full === NONE);
      if (gap >= 0) pages = gap;
    }
    const chunkPages = hasChunked ? chunk / pageTokens : 0;
    const firstOfChunk = (count: number): number => (hasChunked ? count - (count % chunkPages) : count);
    // Down to the position whose chunk is whole; a chunk's edge needs no chunked pages at all.
    while (pages > 0) {
      const missing = path.findIndex(
        (node, i) => i >= firstOfChunk(pages) && i < pages && node.chunked === NONE,
      );
      if (missing < 0) break;
      pages = missing;
    }
    const used = path.slice(0, pages);
    return {
      position: pages * pageTokens,
      full: hasFull ? used.map((node) => node.full) : [],
      chunked: hasChunked ? used.slice(firstOfChunk(pages)).map((node) => node.chunked) : [],
      node: used.at(-1) ?? this.root,
    };
  }

  /** The page behind `node` that begins with most of `tokens`, which are fewer than a page has or differ from all pages that
   * may be resumed behind. Undefined where copying is not worth it. Pages are not retained. */
  inside(node: PrefixNode, tokens: Uint32Array): InsideMatch | undefined {
    const { pageTokens } = this.#pools.geometry;
    const hasFull = this.#pools.full.capacity > 0;
    const hasChunked = this.#pools.chunked.capacity > 0;
    const wanted = keyOf(tokens.subarray(0, pageTokens));
    let most = Math.max(1, Math.floor(pageTokens / LEAST_SHARE)) - 1;
    let best: InsideMatch | undefined;
    for (const child of node.children.values()) {
      if ((hasFull && child.full === NONE) || (hasChunked && child.chunked === NONE)) continue;
      const count = commonTokens(wanted, child.key);
      if (count <= most) continue;
      most = count;
      best = {
        count,
        full: hasFull ? child.full : undefined,
        chunked: hasChunked ? child.chunked : undefined,
      };
    }
    return best;
  }

  /** Remembers that the page of `tokens` (as many as a page has, or the fewer with which a sequence ends) behind `parent`,
   * which is attached, lies in these pages of the caller. What is known already stays as it is. */
  add(
    parent: PrefixNode,
    tokens: Uint32Array,
    full: number | undefined,
    chunked: number | undefined,
  ): PrefixNode {
    const key = keyOf(tokens);
    let node = parent.children.get(key);
    if (node === undefined) {
      node = new PrefixNode(parent, key);
      parent.children.set(key, node);
    }
    if (node.full === NONE && full !== undefined && !this.#fullOwner.has(full)) {
      node.full = full;
      remember(this.#pools.full, this.#fullOwner, full, node);
    }
    if (node.chunked === NONE && chunked !== undefined && !this.#chunkedOwner.has(chunked)) {
      node.chunked = chunked;
      remember(this.#pools.chunked, this.#chunkedOwner, chunked, node);
    }
    return node;
  }

  /** Forgets everything; pages that sequences own stay theirs. */
  clear(): void {
    for (const child of [...this.root.children.values()]) this.#cut(child);
  }

  /** Nodes of the tokens' whole pages, as far as the tree has them. */
  #walk(tokens: Uint32Array): PrefixNode[] {
    const { pageTokens } = this.#pools.geometry;
    const path: PrefixNode[] = [];
    let node = this.root;
    for (let start = 0; start + pageTokens <= tokens.length; start += pageTokens) {
      const child = node.children.get(keyOf(tokens.subarray(start, start + pageTokens)));
      if (child === undefined) break;
      path.push(child);
      node = child;
    }
    return path;
  }

  #lose(owners: Map<number, PrefixNode>, page: number, drop: (node: PrefixNode) => void): void {
    const node = owners.get(page);
    if (node !== undefined) drop(node);
  }

  #loseChunked(node: PrefixNode): void {
    // With nothing else to remember, what follows can only be reached through this page.
    if (node.full === NONE) this.#cut(node);
    else this.#forgetChunked(node);
  }

  #forgetChunked(node: PrefixNode): void {
    if (node.chunked === NONE) return;
    this.#chunkedOwner.delete(node.chunked);
    this.#pools.chunked.forget(node.chunked);
    node.chunked = NONE;
  }

  /** Takes a node and everything behind it out of the tree. */
  #cut(top: PrefixNode): void {
    top.parent?.children.delete(top.key);
    const open = [top];
    for (let node = open.pop(); node !== undefined; node = open.pop()) {
      open.push(...node.children.values());
      node.children.clear();
      node.attached = false;
      this.#forgetChunked(node);
      if (node.full === NONE) continue;
      this.#fullOwner.delete(node.full);
      this.#pools.full.forget(node.full);
      node.full = NONE;
    }
    // Nodes that only led here remember nothing.
    for (let up = top.parent; up?.parent !== undefined && isEmpty(up); up = up.parent) {
      up.parent.children.delete(up.key);
      up.attached = false;
    }
  }
}

function isEmpty(node: PrefixNode): boolean {
  return node.full === NONE && node.chunked === NONE && node.children.size === 0;
}

function remember(pool: PagePool, owners: Map<number, PrefixNode>, page: number, node: PrefixNode): void {
  pool.keep(page);
  owners.set(page, node);
}

/** One character a byte: exact, and hashed by the engine. */
function keyOf(tokens: Uint32Array): string {
  return Buffer.from(tokens.buffer, tokens.byteOffset, tokens.byteLength).toString("latin1");
}

/** Whole tokens with which both keys begin. */
function commonTokens(a: string, b: string): number {
  const end = Math.min(a.length, b.length);
  let at = 0;
  while (at < end && a.charCodeAt(at) === b.charCodeAt(at)) at++;
  return Math.floor(at / TOKEN_BYTES);
}
