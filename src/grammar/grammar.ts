// A compiled grammar: plain arrays that can be handed to another thread. Two levels: nodes with edges, which call each
// other with a stack (values in values), and below them the states of deterministic automata over bytes.

import { BuildBudget, type Dfa, joinAlike, Nfa } from "./automaton.ts";
import { addCharacters, type CharacterSet } from "./characters.ts";
import { MOST_NODES, MOST_STATES, SchemaError, TooLarge } from "./limits.ts";

/** Kinds of an edge and what its three numbers are: */
export const EDGE_TERM = 0; /* start state, offset of its targets (by label), number of targets */
export const EDGE_STRING = 1; /* start state of an automaton whose characters are counted, offset of (least, most (-1 = any number), target) in targets, - */
export const EDGE_CALL = 2; /* node to call, target, - */
export const EDGE_DECIDE = 3; /* as EDGE_TERM; behind it there is no other way to read the text */
export const EDGE_SIZE = 4;

/** States of the automaton of any JSON string, the same in every grammar. */
export const STRING_START = 0;

export interface Grammar {
  root: number;
  /** [nodes] 1 = the node may end. */
  accepts: Uint8Array;
  /** [nodes + 1] Node n has the edges firstEdge[n] to firstEdge[n + 1]. */
  firstEdge: Int32Array;
  /** [edges * EDGE_SIZE] Kind and its three numbers. */
  edges: Int32Array;
  /** Targets of term edges, and triples of string edges. */
  targets: Int32Array;
  /** [states + 1] State q has the ranges firstRange[q] to firstRange[q + 1]. */
  firstRange: Int32Array;
  lows: Uint8Array;
  highs: Uint8Array;
  rangeTargets: Int32Array;
  /** [states] Label that a state accepts with, -1 = none. */
  labels: Int32Array;
  /** [states] 0, or one of a string's whose characters are counted: 2 = the state between two characters, 1 = another. */
  counted: Uint8Array;
}

/** A way on from a node: `lead` and white space, then `text`, then what `write` adds; what is absent is empty, but not
 * everything is. Parts of a term share what they begin with, which keeps its automaton small. */
export interface Part {
  /** Names the language together with lead and text, in the whole builder. */
  key?: string;
  lead?: string;
  text?: string;
  /** Writes the language from `from` on; returns where it ends. */
  write?: (nfa: Nfa, from: number) => number;
  target: number;
}

type Edge =
  | { kind: "term"; parts: Part[]; path: string; decides: boolean }
  | { kind: "string"; set: CharacterSet | undefined; min: number; max: number; target: number }
  | { kind: "call"; rule: number; target: number };

export class GrammarBuilder {
  readonly #budget: BuildBudget;
  readonly #edges: Edge[][] = [];
  readonly #accepts: boolean[] = [];
  #serials = 0;

  constructor(budget: BuildBudget) {
    this.#budget = budget;
  }

  /** A number for the keys of one who writes into the builder beside others; each gets another. */
  serial(): number {
    return this.#serials++;
  }

  node(accepts = false): number {
    this.#budget.spend(1);
    if (this.#edges.length >= MOST_NODES) throw new TooLarge("it has too many parts");
    this.#accepts.push(accepts);
    return this.#edges.push([]) - 1;
  }

  /** One automaton for several ways on; `path`: the schema to name when it grows too large. `decides`: what has come by one
   * of them can be read in no other way, whatever else is possible up to there. */
  term(from: number, parts: Part[], path: string, decides = false): void {
    if (parts.length > 0) this.#edges[from]?.push({ kind: "term", parts, path, decides });
  }

  /** JSON strings of `min` to `max` characters of a set, Infinity = no limit; without a set any, in every spelling. */
  string(from: number, min: number, max: number, target: number, set?: CharacterSet): void {
    this.#edges[from]?.push({ kind: "string", set, min, max, target });
  }

  call(from: number, rule: number, target: number): void {
    this.#edges[from]?.push({ kind: "call", rule, target });
  }

  /** Throws SchemaError when nothing satisfies the grammar, or it is too large. */
  finish(root: number): Grammar {
    const alive = this.#productive();
    if (alive[root] === 0) throw new SchemaError("#", "no value can satisfy it");
    const assembler = new Assembler(this.#budget);
    const accepts = Uint8Array.from(this.#accepts, Number);
    const firstEdge = new Int32Array(this.#edges.length + 1);
    this.#edges.forEach((edges, node) => {
      for (const edge of edges) assembler.add(edge, alive);
      firstEdge[node + 1] = assembler.edges.length / EDGE_SIZE;
    });
    return { root, accepts, firstEdge, ...assembler.arrays() };
  }

  /** Nodes from which the end can be reached. */
  #productive(): Uint8Array {
    const alive = Uint8Array.from(this.#accepts, Number);
    for (let changed = true; changed; ) {
      changed = false;
      // Backwards, since most edges lead to later nodes.
      for (let node = this.#edges.length - 1; node >= 0; node--) {
        if (alive[node] === 1) continue;
        this.#budget.spend(1);
        const edges = this.#edges[node] ?? [];
        if (!edges.some((edge) => leadsOn(edge, alive))) continue;
        alive[node] = 1;
        changed = true;
      }
    }
    return alive;
  }
}

function leadsOn(edge: Edge, alive: Uint8Array): boolean {
  if (edge.kind === "term") return edge.parts.some(({ target }) => alive[target] === 1);
  return alive[edge.target] === 1 && (edge.kind === "string" ? edge.min <= edge.max : alive[edge.rule] === 1);
}

class Assembler {
  readonly edges: number[] = [];
  readonly #targets: number[] = [];
  readonly #firstRange = [0];
  readonly #ranges: number[] = [];
  readonly #labels: number[] = [];
  readonly #counted: number[] = [];
  /** Start states by language. */
  readonly #starts = new Map<string, number>();
  readonly #budget: BuildBudget;

  constructor(budget: BuildBudget) {
    this.#budget = budget;
    this.#place(stringAutomaton(), true);
  }

  add(edge: Edge, alive: Uint8Array): void {
    if (!leadsOn(edge, alive)) return;
    if (edge.kind === "string") this.#string(edge);
    else if (edge.kind === "call") this.edges.push(EDGE_CALL, edge.rule, edge.target, 0);
    else
      this.#term(
        edge.parts.filter(({ target }) => alive[target] === 1),
        edge.path,
        edge.decides ? EDGE_DECIDE : EDGE_TERM,
      );
  }

  #string({ set, min, max, target }: Extract<Edge, { kind: "string" }>): void {
    const key = `string ${set?.join()}`;
    let start = set === undefined ? STRING_START : this.#starts.get(key);
    if (start === undefined) {
      start = this.#place(stringOf(set ?? [], this.#budget), true);
      this.#starts.set(key, start);
    }
    this.edges.push(EDGE_STRING, start, this.#targets.length, 0);
    this.#targets.push(min, max === Number.POSITIVE_INFINITY ? -1 : max, target);
  }

  #term(parts: readonly Part[], path: string, kind: number): void {
    const targets = [...new Set(parts.map(({ target }) => target))];
    const label = (part: Part): number => targets.indexOf(part.target);
    const key = parts.map((part) => JSON.stringify([label(part), part.key, part.lead, part.text])).join("\n");
    let start = this.#starts.get(key);
    if (start === undefined) {
      const nfa = new Nfa(this.#budget);
      const from = nfa.state();
      try {
        const ends = new Map<number, number>();
        const leads = new Map<string, TextTree>();
        for (const part of parts) {
          let tree = leads.get(part.lead ?? "none");
          if (tree === undefined) {
            const behind = part.lead === undefined ? nfa.state() : writeSpace(nfa, nfa.text(from, part.lead));
            if (part.lead === undefined) nfa.epsilon(from, behind);
            tree = new TextTree(nfa, behind);
            leads.set(part.lead ?? "none", tree);
          }
          const end = tree.add(part.text ?? "");
          // One text may be the beginning of another: each has an end of its own.
          const own = nfa.state();
          nfa.epsilon(part.write === undefined ? end : part.write(nfa, end), own);
          ends.set(own, label(part));
        }
        const dfa = nfa.determinise(from, ends);
        start = dfa === undefined ? -1 : this.#place(dfa);
      } catch (thrown) {
        if (thrown instanceof TooLarge) throw new SchemaError(path, thrown.message);
        throw thrown;
      }
      this.#starts.set(key, start);
    }
    if (start < 0) return;
    this.edges.push(kind, start, this.#targets.length, targets.length);
    this.#targets.push(...targets);
  }

  /** `counted`: the second state is the one between two characters, which are counted. */
  #place({ edges, labels }: Dfa, counted = false): number {
    const base = this.#labels.length;
    if (base + edges.length > MOST_STATES) throw new TooLarge("its automata have too many states");
    edges.forEach((list, q) => {
      for (let i = 0; i < list.length; i += 3)
        this.#ranges.push(list[i] ?? 0, list[i + 1] ?? 0, base + (list[i + 2] ?? 0));
      this.#firstRange.push(this.#ranges.length / 3);
      this.#labels.push(labels[q] ?? -1);
      this.#counted.push(counted ? (q === 1 ? 2 : 1) : 0);
    });
    return base;
  }

  arrays(): Omit<Grammar, "root" | "accepts" | "firstEdge"> {
    const every = (offset: number): number[] => this.#ranges.filter((_, i) => i % 3 === offset);
    return {
      edges: Int32Array.from(this.edges),
      targets: Int32Array.from(this.#targets),
      firstRange: Int32Array.from(this.#firstRange),
      lows: Uint8Array.from(every(0)),
      highs: Uint8Array.from(every(1)),
      rangeTargets: Int32Array.from(every(2)),
      labels: Int32Array.from(this.#labels),
      counted: Uint8Array.from(this.#counted),
    };
  }
}

/** Texts from one state on that share their beginnings. */
class TextTree {
  readonly #children = new Map<number, Map<number, number>>();

  constructor(
    readonly nfa: Nfa,
    readonly root: number,
  ) {}

  /** Where the text ends. */
  add(text: string): number {
    let at = this.root;
    for (const byte of new TextEncoder().encode(text)) {
      let children = this.#children.get(at);
      if (children === undefined) {
        children = new Map();
        this.#children.set(at, children);
      }
      let next = children.get(byte);
      if (next === undefined) {
        next = this.nfa.state();
        this.nfa.range(at, byte, byte, next);
        children.set(byte, next);
      }
      at = next;
    }
    return at;
  }
}

/** Blanks and tabs behind a line break. */
const INDENT_BLANKS = 40;
const INDENT_TABS = 10;

/** White space between the parts of an array or object: none, a blank, or a line break and its indentation. */
export function writeSpace(nfa: Nfa, from: number): number {
  const end = nfa.state();
  nfa.epsilon(from, end);
  nfa.range(from, 0x20, 0x20, end);
  const line = nfa.text(from, "\n");
  nfa.epsilon(line, end);
  for (const [byte, most] of [
    [0x20, INDENT_BLANKS],
    [0x09, INDENT_TABS],
  ] as const) {
    let at = line;
    for (let i = 0; i < most; i++) {
      const next = nfa.state();
      nfa.range(at, byte, byte, next);
      nfa.epsilon(next, end);
      at = next;
    }
  }
  return end;
}

/** Strings of characters of a set, of which there is one; each in its shortest spelling. Its second state is "between two
 * characters". */
function stringOf(set: CharacterSet, budget: BuildBudget): Dfa {
  const nfa = new Nfa(budget);
  const start = nfa.state();
  const body = nfa.state();
  const end = nfa.state();
  nfa.range(start, 0x22, 0x22, body);
  nfa.range(body, 0x22, 0x22, end);
  addCharacters(nfa, body, body, set);
  const dfa = nfa.determinise(start, new Map([[end, 0]]));
  if (dfa === undefined) throw new TooLarge("the automaton of strings is empty");
  // Behind a character in its escaped spelling stands the same state as behind any other.
  return joinAlike(dfa);
}

let anyString: Dfa | undefined;

/** Any JSON string, in every spelling; no half of a surrogate pair. Its second state is "between two characters". */
export function stringAutomaton(): Dfa {
  anyString ??= buildStringAutomaton();
  return anyString;
}

function buildStringAutomaton(): Dfa {
  const nfa = new Nfa(new BuildBudget());
  const start = nfa.state();
  const body = nfa.state();
  const end = nfa.state();
  nfa.range(start, 0x22, 0x22, body);
  nfa.range(body, 0x22, 0x22, end);
  nfa.range(body, 0x20, 0x21, body);
  nfa.range(body, 0x23, 0x5b, body);
  nfa.range(body, 0x5d, 0x7f, body);
  const tail = nfa.state();
  nfa.range(tail, 0x80, 0xbf, body);
  const tails = nfa.state();
  nfa.range(tails, 0x80, 0xbf, tail);
  const next = (from: number, low: number, high: number, to: number): void => nfa.range(from, low, high, to);
  next(body, 0xc2, 0xdf, tail);
  const between = (first: number, low: number, high: number, to: number): void => {
    const second = nfa.state();
    next(body, first, first, second);
    next(second, low, high, to);
  };
  between(0xe0, 0xa0, 0xbf, tail);
  next(body, 0xe1, 0xec, tails);
  between(0xed, 0x80, 0x9f, tail);
  next(body, 0xee, 0xef, tails);
  between(0xf0, 0x90, 0xbf, tails);
  const long = nfa.state();
  next(body, 0xf1, 0xf3, long);
  next(long, 0x80, 0xbf, tails);
  between(0xf4, 0x80, 0x8f, tails);
  const backslash = nfa.text(body, "\\");
  for (const letter of '"\\/bfnrt') next(backslash, letter.charCodeAt(0), letter.charCodeAt(0), body);
  addUnicodeEscapes(nfa, nfa.text(backslash, "u"), body);
  const dfa = nfa.determinise(start, new Map([[end, 0]]));
  if (dfa === undefined) throw new TooLarge("the automaton of strings is empty");
  return dfa;
}

/** Four hexadecimal digits; of surrogates only a whole pair. */
function addUnicodeEscapes(nfa: Nfa, from: number, to: number): void {
  const digits = (at: number, sets: string[], end: number): void => {
    let state = at;
    sets.forEach((set, i) => {
      const target = i === sets.length - 1 ? end : nfa.state();
      for (const digit of set + set.toUpperCase())
        nfa.range(state, digit.charCodeAt(0), digit.charCodeAt(0), target);
      state = target;
    });
  };
  const any = "0123456789abcdef";
  digits(from, [any.replace("d", ""), any, any, any], to);
  digits(from, ["d", "01234567", any, any], to);
  const high = nfa.state();
  digits(from, ["d", "89ab", any, any], high);
  digits(nfa.text(high, "\\u"), ["d", "cdef", any, any], to);
}
