// Page numbers of one pool of the KV cache. A page is free, in use (owned by one sequence or shared by several), or idle:
// in use by nobody, but its contents are known to the prefix tree. Idle pages are handed out when no free ones are left,
// the one that has been idle for longest first.

import { CaravanError } from "../errors.ts";

const NONE = -1;

/** Pages 0..capacity-1. Broken accounting is a bug and throws internal_error. */
export class PagePool {
  readonly capacity: number;
  /** Called with an idle page that is about to be handed out; must `forget` it. Set by the prefix tree. */
  onEvict: (page: number) => void = (page) => this.forget(page);
  readonly #free: Uint32Array;
  readonly #references: Uint32Array;
  readonly #kept: Uint8Array;
  /** Idle pages as a doubly linked list, oldest first. */
  readonly #next: Int32Array;
  readonly #previous: Int32Array;
  #oldest = NONE;
  #newest = NONE;
  #freeCount: number;
  #idleCount = 0;

  constructor(capacity: number) {
    this.capacity = capacity;
    this.#free = new Uint32Array(capacity);
    this.#references = new Uint32Array(capacity);
    this.#kept = new Uint8Array(capacity);
    this.#next = new Int32Array(capacity).fill(NONE);
    this.#previous = new Int32Array(capacity).fill(NONE);
    this.#freeCount = capacity;
    // Low numbers are handed out first, so a small load touches little memory.
    for (let i = 0; i < capacity; i++) this.#free[i] = capacity - 1 - i;
  }

  /** Pages that nobody owns or remembers. */
  get free(): number {
    return this.#freeCount;
  }

  /** Pages that only the prefix tree remembers. */
  get idle(): number {
    return this.#idleCount;
  }

  /** Pages that `take` can hand out. */
  get available(): number {
    return this.#freeCount + this.#idleCount;
  }

  /** A page with one owner, or -1 when all are in use. */
  take(): number {
    if (this.#freeCount === 0 && this.#oldest !== NONE) {
      const page = this.#oldest;
      this.onEvict(page);
      if (this.#kept[page] !== 0) throw broken(`page ${page} was to be evicted and is still kept`);
    }
    if (this.#freeCount === 0) return NONE;
    this.#freeCount--;
    const page = this.#free[this.#freeCount] ?? 0;
    if (this.#references[page] !== 0) throw broken(`page ${page} was free and in use`);
    this.#references[page] = 1;
    return page;
  }

  /** One more owner of a page that is in use or idle. */
  retain(page: number): void {
    const references = this.#references[page];
    if (references === undefined || (references === 0 && this.#kept[page] === 0))
      throw broken(`page ${page} was shared but not in use`);
    if (references === 0) this.#unlink(page);
    this.#references[page] = references + 1;
  }

  /** One owner less; without any the page is free again, or idle where it is kept. */
  release(page: number): void {
    const references = this.#references[page];
    if (references === undefined || references === 0) throw broken(`page ${page} was given back twice`);
    this.#references[page] = references - 1;
    if (references > 1) return;
    if (this.#kept[page] === 0) this.#pushFree(page);
    else this.#link(page);
  }

  /** The prefix tree knows what is in this page, which is in use: it becomes idle instead of free. */
  keep(page: number): void {
    if (this.#references[page] === 0 || this.#kept[page] !== 0) throw broken(`page ${page} cannot be kept`);
    this.#kept[page] = 1;
  }

  /** The opposite of `keep`. */
  forget(page: number): void {
    if (this.#kept[page] !== 1) throw broken(`page ${page} was forgotten but not kept`);
    this.#kept[page] = 0;
    if (this.#references[page] !== 0) return;
    this.#unlink(page);
    this.#pushFree(page);
  }

  /** Owners, the prefix tree not counted. */
  references(page: number): number {
    return this.#references[page] ?? 0;
  }

  #pushFree(page: number): void {
    this.#free[this.#freeCount] = page;
    this.#freeCount++;
  }

  #link(page: number): void {
    this.#previous[page] = this.#newest;
    this.#next[page] = NONE;
    if (this.#newest === NONE) this.#oldest = page;
    else this.#next[this.#newest] = page;
    this.#newest = page;
    this.#idleCount++;
  }

  #unlink(page: number): void {
    const before = this.#previous[page] ?? NONE;
    const after = this.#next[page] ?? NONE;
    if (before === NONE) this.#oldest = after;
    else this.#next[before] = after;
    if (after === NONE) this.#newest = before;
    else this.#previous[after] = before;
    this.#idleCount--;
  }
}

export function broken(message: string): CaravanError {
  return new CaravanError("internal_error", `page accounting: ${message}`, {
    hint: "this is a bug in caravan; the model is loaded again",
  });
}
