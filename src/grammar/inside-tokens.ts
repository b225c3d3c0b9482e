// Which tokens are possible in a state of a grammar's automata, whatever stands around it: those whose bytes stay
// inside the automaton, and the places in the vocabulary's tree where it may be left. The first is what takes time, and
// it depends on the state alone, so it is kept.

import { type Grammar, STRING_START, stringAutomaton } from "./grammar.ts";
import { StateRows } from "./state-rows.ts";
import { DEPTH_BITS, type TokenTrie } from "./token-trie.ts";

/** Fewer tokens than this are kept as a list instead of a bit set. */
const SHORT_LIST = 2048;
/** Memory of a grammar's kept states. */
const MOST_KEPT_BYTES = 48 << 20;
const DEPTH_MASK = 2 ** DEPTH_BITS - 1;

/** State of the string automaton between two characters; a character is counted where it begins. */
export const STRING_BODY = STRING_START + 1;

/** In grammar.counted: a state of an automaton whose characters are counted, and the one of them between two characters. */
export const COUNTED = 1;
export const COUNTED_BODY = 2;

export interface InsideTokens {
  /** [(vocab + 31) / 32] All of them, when they are many. */
  readonly bits: Uint32Array | undefined;
  /** All of them, when they are few. */
  readonly list: Int32Array;
  /** Triples (tree node, label, characters): the automaton may be left behind this node, which has children. */
  readonly exits: Int32Array;
  /** Where characters are counted: tokens that stay inside, most characters first. */
  readonly counted: Int32Array;
  /** [most + 1] How many of `counted` have more characters than the index. */
  readonly longer: Int32Array;
  /** Where characters are counted: pairs (token, characters) of tokens that end with the closing quote. */
  readonly closing: Int32Array;
  /** Most characters that a token or exit has. */
  readonly most: number;
}

/** The automata of one grammar over one vocabulary. */
export class Automata {
  readonly grammar: Grammar;
  readonly trie: TokenTrie;
  readonly #rows: StateRows;
  readonly #kept = new Map<number, InsideTokens>();
  readonly #strings: Map<number, InsideTokens>;
  readonly #stringStates: number;
  #keptBytes = 0;

  /** `strings`: the states of the string automaton, which all grammars of a vocabulary share. */
  constructor(grammar: Grammar, trie: TokenTrie, strings: Map<number, InsideTokens>, stringStates: number) {
    this.grammar = grammar;
    this.trie = trie;
    this.#rows = new StateRows(grammar);
    this.#strings = strings;
    this.#stringStates = stringStates;
  }

  /** The next state, -1 = none. */
  next(state: number, byte: number): number {
    return this.#rows.next(state, byte);
  }

  label(state: number): number {
    return this.grammar.labels[state] ?? -1;
  }

  /** Whether the automaton may go on from the state. */
  goesOn(state: number): boolean {
    const { firstRange } = this.grammar;
    return firstRange[state] !== firstRange[state + 1];
  }

  /** Sets the bytes that may come next in a state. */
  addBytes(state: number, bytes: Uint8Array): void {
    const { firstRange, lows, highs } = this.grammar;
    for (let i = firstRange[state] as number; i < (firstRange[state + 1] as number); i++)
      bytes.fill(1, lows[i], (highs[i] as number) + 1);
  }

  inside(state: number): InsideTokens {
    const shared = state < this.#stringStates;
    const kept = shared ? this.#strings : this.#kept;
    let tokens = kept.get(state);
    if (tokens !== undefined) return tokens;
    tokens = this.grammar.counted[state] === 0 ? this.#walk(state) : this.#walkCounted(state);
    if (shared) kept.set(state, tokens);
    else this.keep(state, tokens);
    return tokens;
  }

  /** Keeps a state's tokens that were found elsewhere. */
  keep(state: number, tokens: InsideTokens): void {
    const { list, exits, counted, closing, bits } = tokens;
    this.#keptBytes += 256 + (bits?.byteLength ?? 0);
    for (const array of [list, exits, counted, closing]) this.#keptBytes += array.byteLength;
    if (this.#keptBytes > MOST_KEPT_BYTES) {
      this.#kept.clear();
      this.#keptBytes = 0;
    }
    this.#kept.set(state, tokens);
  }

  /** Hundreds of thousands of tree nodes where most text fits: this loop is what a mask costs. */
  #walk(from: number): InsideTokens {
    const rows = this.#rows;
    rows.tidy();
    const { nodes, ends, tokens, twins, height, vocab } = this.trie;
    const { labels } = this.grammar;
    const { columns } = rows;
    const places = new Int32Array(height + 1);
    const bits = new Uint32Array(Math.ceil(vocab / 32));
    const exits: number[] = [];
    const alike = twins.length > 0;
    let some = 0;
    places[0] = rows.offset(from);
    let { entries } = rows;
    const count = nodes.length;
    for (let node = 0; node < count; ) {
      const packed = nodes[node] as number;
      const depth = (packed >>> 8) & DEPTH_MASK;
      const state = entries[(places[depth] as number) + (columns[packed & 255] as number)] as number;
      if (state < 0) {
        node = ends[node] as number;
        continue;
      }
      let id = tokens[node] as number;
      if (id >= 0) {
        bits[id >> 5] = (bits[id >> 5] as number) | (1 << (id & 31));
        some++;
        if (alike)
          for (id = twins[id] as number; id >= 0; id = twins[id] as number) {
            bits[id >> 5] = (bits[id >> 5] as number) | (1 << (id & 31));
            some++;
          }
      }
      if (packed < 0) {
        const label = labels[state] as number;
        if (label >= 0) exits.push(node, label, 0);
        places[depth + 1] = rows.offset(state);
        entries = rows.entries;
      }
      node++;
    }
    const few = some < SHORT_LIST;
    const none = new Int32Array(0);
    return {
      bits: few ? undefined : bits,
      list: few ? listOf(bits, some) : none,
      exits: Int32Array.from(exits),
      counted: none,
      longer: none,
      closing: none,
      most: 0,
    };
  }

  /** The same with the characters of each token and exit. */
  #walkCounted(from: number): InsideTokens {
    const rows = this.#rows;
    rows.tidy();
    const { nodes, ends, tokens, twins, height, vocab } = this.trie;
    const { labels, counted: kinds } = this.grammar;
    const { columns } = rows;
    const characters = new Int32Array(height + 1);
    const places = new Int32Array(height + 1);
    /** Whether a character begins behind the node, by depth. */
    const begins = new Uint8Array(height + 1);
    places[0] = rows.offset(from);
    begins[0] = kinds[from] === COUNTED_BODY ? 1 : 0;
    let { entries } = rows;
    const bits = new Uint32Array(Math.ceil(vocab / 32));
    const exits: number[] = [];
    const closing: number[] = [];
    const scratch = scratchOf(2 * vocab);
    let some = 0;
    let most = 0;
    for (let node = 0; node < nodes.length; ) {
      const packed = nodes[node] as number;
      const depth = (packed >>> 8) & DEPTH_MASK;
      const state = entries[(places[depth] as number) + (columns[packed & 255] as number)] as number;
      if (state < 0) {
        node = ends[node] as number;
        continue;
      }
      const label = labels[state] as number;
      const inside = (characters[depth] as number) + (label < 0 ? (begins[depth] as number) : 0);
      if (inside > most) most = inside;
      for (let id = tokens[node] as number; id >= 0; id = twins[id] ?? -1) {
        bits[id >> 5] = (bits[id >> 5] as number) | (1 << (id & 31));
        if (label >= 0) closing.push(id, inside);
        else {
          scratch[2 * some] = id;
          scratch[2 * some + 1] = inside;
          some++;
        }
      }
      if (packed < 0) {
        if (label >= 0) exits.push(node, label, inside);
        characters[depth + 1] = inside;
        begins[depth + 1] = kinds[state] === COUNTED_BODY ? 1 : 0;
        places[depth + 1] = rows.offset(state);
        entries = rows.entries;
      }
      node++;
    }
    const all = some + closing.length / 2;
    const few = all < SHORT_LIST;
    return {
      bits: few ? undefined : bits,
      list: few ? listOf(bits, all) : new Int32Array(0),
      exits: Int32Array.from(exits),
      ...byCharacters(scratch, some, most),
      closing: Int32Array.from(closing),
      most,
    };
  }
}

let scratch = new Int32Array(0);

/** The same memory for every walk of this thread. */
function scratchOf(length: number): Int32Array {
  if (scratch.length < length) scratch = new Int32Array(length);
  return scratch;
}

/** `pairs`: `count` tokens with their characters. The tokens with most characters first, and how many of them have more
 * characters than each number. */
function byCharacters(
  pairs: Int32Array,
  count: number,
  most: number,
): Pick<InsideTokens, "counted" | "longer"> {
  const longer = new Int32Array(most + 1);
  for (let i = 0; i < count; i++) {
    const characters = pairs[2 * i + 1] as number;
    if (characters > 0) longer[characters - 1] = (longer[characters - 1] as number) + 1;
  }
  for (let c = most - 1; c >= 0; c--) longer[c] = (longer[c] as number) + (longer[c + 1] as number);
  const next = longer.slice();
  const counted = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    const characters = pairs[2 * i + 1] as number;
    const at = next[characters] as number;
    next[characters] = at + 1;
    counted[at] = pairs[2 * i] as number;
  }
  return { counted, longer };
}

function listOf(bits: Uint32Array, count: number): Int32Array {
  const list = new Int32Array(count);
  let found = 0;
  for (let word = 0; found < count && word < bits.length; word++)
    for (let rest = bits[word] as number; rest !== 0; rest &= rest - 1)
      list[found++] = 32 * word + (31 - Math.clz32(rest & -rest));
  return list;
}

/** How many states the string automaton has in front of every grammar's own. */
export function stringStates(): number {
  return stringAutomaton().edges.length;
}
