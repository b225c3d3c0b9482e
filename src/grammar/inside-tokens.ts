// Which tokens are possible in a state of a grammar's automata, whatever stands around it: those whose bytes stay
// inside the automaton, and the places in the vocabulary's tree where it may be left. The first is what takes time, and
// it depends on the state alone, so it is kept.

import { type Grammar, STRING_START, stringAutomaton } from "./grammar.ts";
import type { TokenTrie } from "./token-trie.ts";

/** Fewer tokens than this are kept as a list instead of a bit set. */
const SHORT_LIST = 2048;
/** Memory of a grammar's kept states: bit sets and rows. */
const MOST_KEPT_BYTES = 48 << 20;
const MOST_ROWS = 8192;

/** State of the string automaton between two characters; a character is counted where it begins. */
export const STRING_BODY = STRING_START + 1;

export interface InsideTokens {
  /** [(vocab + 31) / 32] All of them, when they are many. */
  readonly bits: Uint32Array | undefined;
  /** All of them, when they are few. */
  readonly list: Int32Array;
  /** Triples (tree node, label, characters): the automaton may be left behind this node, which has children. */
  readonly exits: Int32Array;
  /** In strings: pairs (token, characters) of tokens that stay inside, most characters first. */
  readonly counted: Int32Array;
  /** In strings: pairs (token, characters) of tokens that end with the closing quote. */
  readonly closing: Int32Array;
  /** Most characters that a token or exit has. */
  readonly most: number;
}

/** The automata of one grammar over one vocabulary. */
export class Automata {
  readonly grammar: Grammar;
  readonly trie: TokenTrie;
  readonly #rows = new Map<number, Int32Array>();
  readonly #kept = new Map<number, InsideTokens>();
  readonly #strings: Map<number, InsideTokens>;
  readonly #stringStates: number;
  #keptBytes = 0;

  /** `strings`: the states of the string automaton, which all grammars of a vocabulary share. */
  constructor(grammar: Grammar, trie: TokenTrie, strings: Map<number, InsideTokens>, stringStates: number) {
    this.grammar = grammar;
    this.trie = trie;
    this.#strings = strings;
    this.#stringStates = stringStates;
  }

  /** [256] The next state by byte, -1 = none. */
  row(state: number): Int32Array {
    let row = this.#rows.get(state);
    if (row !== undefined) return row;
    const { firstRange, lows, highs, rangeTargets } = this.grammar;
    row = new Int32Array(256).fill(-1);
    for (let i = firstRange[state] ?? 0; i < (firstRange[state + 1] ?? 0); i++)
      row.fill(rangeTargets[i] ?? -1, lows[i], (highs[i] ?? 0) + 1);
    if (this.#rows.size >= MOST_ROWS) this.#rows.clear();
    this.#rows.set(state, row);
    return row;
  }

  label(state: number): number {
    return this.grammar.labels[state] ?? -1;
  }

  /** Whether the automaton may go on from the state. */
  goesOn(state: number): boolean {
    const { firstRange } = this.grammar;
    return firstRange[state] !== firstRange[state + 1];
  }

  inside(state: number): InsideTokens {
    const shared = state < this.#stringStates;
    const kept = shared ? this.#strings : this.#kept;
    let tokens = kept.get(state);
    if (tokens !== undefined) return tokens;
    tokens = this.#walk(state, shared);
    if (shared) kept.set(state, tokens);
    else this.keep(state, tokens);
    return tokens;
  }

  /** Keeps a state's tokens that were found elsewhere. */
  keep(state: number, tokens: InsideTokens): void {
    this.#keptBytes +=
      256 + tokens.list.byteLength + tokens.exits.byteLength + (tokens.bits?.byteLength ?? 0);
    if (this.#keptBytes > MOST_KEPT_BYTES) {
      this.#kept.clear();
      this.#keptBytes = 0;
    }
    this.#kept.set(state, tokens);
  }

  #walk(from: number, counts: boolean): InsideTokens {
    const { bytes, ends, depths, tokens, twins, height, vocab } = this.trie;
    const { labels } = this.grammar;
    const rows: Int32Array[] = new Array(height + 1);
    const characters = new Int32Array(height + 1);
    const states = new Int32Array(height + 1);
    rows[0] = this.row(from);
    states[0] = from;
    const found = new Int32Array(vocab);
    const within = new Int32Array(counts ? vocab : 0);
    const closes = new Uint8Array(counts ? vocab : 0);
    const exits: number[] = [];
    let some = 0;
    let most = 0;
    const count = bytes.length;
    for (let node = 0; node < count; ) {
      const depth = depths[node] as number;
      const state = (rows[depth] as Int32Array)[bytes[node] as number] as number;
      const end = ends[node] as number;
      if (state < 0) {
        node = end;
        continue;
      }
      const label = labels[state] as number;
      let inside = 0;
      if (counts) {
        inside = (characters[depth] as number) + (states[depth] === STRING_BODY && label < 0 ? 1 : 0);
        characters[depth + 1] = inside;
        states[depth + 1] = state;
        if (inside > most) most = inside;
      }
      for (let id = tokens[node] as number; id >= 0; id = twins[id] as number) {
        if (counts) {
          within[some] = inside;
          closes[some] = label >= 0 ? 1 : 0;
        }
        found[some++] = id;
      }
      if (end > node + 1) {
        if (label >= 0) exits.push(node, label, inside);
        rows[depth + 1] = this.row(state);
      }
      node++;
    }
    const all = found.slice(0, some);
    const few = some < SHORT_LIST;
    return {
      bits: few ? undefined : bitsOf(all, vocab),
      list: few ? all : new Int32Array(0),
      exits: Int32Array.from(exits),
      counted: counts ? byCharacters(all, within, closes, most) : new Int32Array(0),
      closing: counts ? closingTokens(all, within, closes) : new Int32Array(0),
      most,
    };
  }
}

/** Pairs (token, characters) of the tokens that do not close, most characters first. */
function byCharacters(tokens: Int32Array, within: Int32Array, closes: Uint8Array, most: number): Int32Array {
  const starts = new Int32Array(most + 2);
  let count = 0;
  for (let i = 0; i < tokens.length; i++)
    if (closes[i] === 0) {
      count++;
      starts[within[i] as number] = (starts[within[i] as number] as number) + 1;
    }
  for (let characters = most, at = 0; characters >= 0; characters--) {
    const here = starts[characters] as number;
    starts[characters] = at;
    at += here;
  }
  const pairs = new Int32Array(2 * count);
  for (let i = 0; i < tokens.length; i++) {
    if (closes[i] === 1) continue;
    const characters = within[i] as number;
    const at = 2 * (starts[characters] as number);
    starts[characters] = (starts[characters] as number) + 1;
    pairs[at] = tokens[i] as number;
    pairs[at + 1] = characters;
  }
  return pairs;
}

function closingTokens(tokens: Int32Array, within: Int32Array, closes: Uint8Array): Int32Array {
  const pairs: number[] = [];
  for (let i = 0; i < tokens.length; i++)
    if (closes[i] === 1) pairs.push(tokens[i] as number, within[i] as number);
  return Int32Array.from(pairs);
}

function bitsOf(tokens: Int32Array, vocab: number): Uint32Array {
  const bits = new Uint32Array(Math.ceil(vocab / 32));
  for (const token of tokens) bits[token >> 5] = (bits[token >> 5] as number) | (1 << (token & 31));
  return bits;
}

/** How many states the string automaton has in front of every grammar's own. */
export function stringStates(): number {
  return stringAutomaton().edges.length;
}
