// Drafts by prompt lookup: where the last few tokens occurred before in prompt or answer, what followed them then is likely
// to follow again. Good for answers that quote their prompt: code that is edited, documents that are summed up, tables.

import type { Drafter } from "./drafter.ts";

/** Tokens that must be the same before a guess is made. */
const MATCH = 3;
const MULTIPLIER = 0x9e3779b1;

export class PromptLookup implements Drafter {
  readonly #indexes = new Map<string, Index>();

  draft(id: string, known: Uint32Array, most: number): readonly number[] {
    let index = this.#indexes.get(id);
    if (index === undefined) {
      index = new Index();
      this.#indexes.set(id, index);
    }
    const from = index.find(known);
    if (from < 0) return [];
    const draft: number[] = [];
    // What repeats with a short period goes on repeating: the draft is read as if it were known.
    for (let i = 0; i < most; i++) {
      const at = from + i;
      draft.push((at < known.length ? known[at] : draft[at - known.length]) ?? 0);
    }
    return draft;
  }

  end(id: string): void {
    this.#indexes.delete(id);
  }
}

/** By the hash of MATCH tokens, where they last ended: a table that forgets on collision, checked when read. */
class Index {
  /** Position behind the tokens, 0 = none. */
  #table = new Int32Array(1 << 10);
  /** Ends up to here are in the table. */
  #indexed = MATCH;

  /** Position behind the latest earlier occurrence of the last tokens, or -1. */
  find(known: Uint32Array): number {
    if (known.length <= MATCH) return -1;
    if (known.length * 2 > this.#table.length) this.#grow(known.length);
    for (; this.#indexed < known.length; this.#indexed++)
      this.#table[this.#slot(known, this.#indexed)] = this.#indexed;
    const found = this.#table[this.#slot(known, known.length)] ?? 0;
    if (found === 0) return -1;
    for (let i = 1; i <= MATCH; i++) if (known[found - i] !== known[known.length - i]) return -1;
    return found;
  }

  #grow(tokens: number): void {
    let size = this.#table.length;
    while (size < tokens * 2) size *= 2;
    this.#table = new Int32Array(size * 2);
    this.#indexed = MATCH;
  }

  #slot(known: Uint32Array, end: number): number {
    let hash = 0;
    for (let i = end - MATCH; i < end; i++) {
      hash = Math.imul(hash ^ (known[i] ?? 0), MULTIPLIER);
      hash ^= hash >>> 15;
    }
    return (hash >>> 0) & (this.#table.length - 1);
  }
}
