// The states of a grammar's automata as rows of a table: where each byte leads. Bytes that no state tells apart share a
// column. A row is made when it is first asked for: of large automata an answer sees few states.

import type { Grammar } from "./grammar.ts";

const FIRST_ROWS = 64;
/** Entries that are kept; above it all rows are made anew. */
const MOST_ENTRIES = 4 << 20;

export class StateRows {
  /** [256] Column of a byte. */
  readonly columns = new Uint8Array(256);
  /** Columns of a row. */
  readonly width: number;
  readonly #grammar: Grammar;
  /** [states] Where a state's row begins, -1 = not made. */
  readonly #offsets: Int32Array;
  #entries: Int32Array;
  #used = 0;

  constructor(grammar: Grammar) {
    const { lows, highs, labels } = grammar;
    const cut = new Uint8Array(257);
    for (let i = 0; i < lows.length; i++) {
      cut[lows[i] as number] = 1;
      cut[(highs[i] as number) + 1] = 1;
    }
    let column = 0;
    for (let byte = 0; byte < 256; byte++) {
      if (byte > 0 && cut[byte] === 1) column++;
      this.columns[byte] = column;
    }
    this.width = column + 1;
    this.#grammar = grammar;
    this.#offsets = new Int32Array(labels.length).fill(-1);
    this.#entries = new Int32Array(FIRST_ROWS * this.width);
  }

  /** The next states by row and column, -1 = none. Replaced when a row is made. */
  get entries(): Int32Array {
    return this.#entries;
  }

  /** Where the state's row begins. */
  offset(state: number): number {
    const offset = this.#offsets[state] as number;
    return offset >= 0 ? offset : this.#make(state);
  }

  /** The state behind a byte, -1 = none. */
  next(state: number, byte: number): number {
    const offset = this.offset(state);
    return this.#entries[offset + (this.columns[byte] as number)] as number;
  }

  /** Makes room when too many rows are kept; offsets are not valid afterwards. */
  tidy(): void {
    if (this.#used <= MOST_ENTRIES) return;
    this.#offsets.fill(-1);
    this.#entries = new Int32Array(FIRST_ROWS * this.width);
    this.#used = 0;
  }

  #make(state: number): number {
    const { firstRange, lows, highs, rangeTargets } = this.#grammar;
    const offset = this.#used;
    this.#used += this.width;
    if (this.#used > this.#entries.length) {
      const larger = new Int32Array(this.#entries.length * 2);
      larger.set(this.#entries);
      this.#entries = larger;
    }
    this.#entries.fill(-1, offset, this.#used);
    for (let i = firstRange[state] as number; i < (firstRange[state + 1] as number); i++) {
      const from = offset + (this.columns[lows[i] as number] as number);
      const to = offset + (this.columns[highs[i] as number] as number);
      this.#entries.fill(rangeTargets[i] as number, from, to + 1);
    }
    this.#offsets[state] = offset;
    return offset;
  }
}
