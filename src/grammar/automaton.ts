// Finite automata over bytes: the regular parts of a grammar (literals, numbers, strings with a pattern, keys) are
// put together as an NFA and made deterministic. Acceptance carries a label, so that one automaton can say which of
// several alternatives the text was.

import type { WorkLimit } from "../work-limit.ts";
import { MOST_AUTOMATON_STATES, MOST_BUILD_STEPS, TooLarge } from "./limits.ts";

/** Deterministic. State 0 is the start. `edges[q]` is a flat list (low byte, high byte, target), ascending. */
export interface Dfa {
  edges: number[][];
  /** Label that a state accepts with, -1 = none. */
  labels: number[];
}

/** Steps between two looks at the time. */
const LOOK_EVERY = 4096;

/** Counts work across the automata of one grammar. Throws TooLarge. */
export class BuildBudget {
  #steps = 0;
  #nextLook = LOOK_EVERY;

  /** Without `time` only the steps are limited. */
  constructor(readonly time?: WorkLimit) {}

  spend(steps: number): void {
    this.#steps += steps;
    if (this.#steps > MOST_BUILD_STEPS) throw new TooLarge("it takes too long to compile");
    if (this.time === undefined || this.#steps < this.#nextLook) return;
    this.#nextLook = this.#steps + LOOK_EVERY;
    if (this.time.passed) throw new TooLarge(`it takes longer than ${this.time.ms} ms to compile`);
  }
}

/** When an epsilon edge may be taken: always, before the first byte, or behind the last one. */
type When = "always" | "at start" | "at end";

export class Nfa {
  readonly #ranges: number[][] = [];
  readonly #always: number[][] = [];
  readonly #atStart: number[][] = [];
  readonly #atEnd: number[][] = [];
  readonly #budget: BuildBudget;
  readonly #marks: number[] = [];
  #round = 0;

  constructor(budget: BuildBudget) {
    this.#budget = budget;
  }

  get budget(): BuildBudget {
    return this.#budget;
  }

  state(): number {
    this.#budget.spend(4);
    this.#always.push([]);
    this.#atStart.push([]);
    this.#atEnd.push([]);
    return this.#ranges.push([]) - 1;
  }

  range(from: number, low: number, high: number, to: number): void {
    this.#budget.spend(1);
    this.#ranges[from]?.push(low, high, to);
  }

  epsilon(from: number, to: number, when: When = "always"): void {
    this.#budget.spend(1);
    const edges = when === "always" ? this.#always : when === "at start" ? this.#atStart : this.#atEnd;
    edges[from]?.push(to);
  }

  /** A way through `bytes` from `from`; returns where it ends. */
  bytes(from: number, bytes: Uint8Array): number {
    let at = from;
    for (const byte of bytes) {
      const next = this.state();
      this.range(at, byte, byte, next);
      at = next;
    }
    return at;
  }

  text(from: number, text: string): number {
    return this.bytes(from, new TextEncoder().encode(text));
  }

  /** A copy of `dfa` from `from` on; each label's accepting states lead to `exits[label]`. */
  insert(from: number, dfa: Dfa, exits: readonly number[]): void {
    const states = dfa.edges.map((_, q) => (q === 0 ? from : this.state()));
    // The start may have edges into it, which must not be taken for edges into `from`.
    if (dfa.edges.some((edges) => edges.some((to, i) => i % 3 === 2 && to === 0))) {
      states[0] = this.state();
      this.epsilon(from, states[0]);
    }
    dfa.edges.forEach((edges, q) => {
      const state = states[q] ?? from;
      for (let i = 0; i < edges.length; i += 3)
        this.range(state, edges[i] ?? 0, edges[i + 1] ?? 0, states[edges[i + 2] ?? 0] ?? from);
      const exit = exits[dfa.labels[q] ?? -1];
      if (exit !== undefined) this.epsilon(state, exit);
    });
  }

  /** The deterministic automaton from `start`; `finals` gives accepting states their label. No state is a dead end;
   * undefined = it accepts nothing. Two labels for one text: the lower one. */
  determinise(start: number, finals: ReadonlyMap<number, number>): Dfa | undefined {
    const sets: number[][] = [];
    const known = new Map<string, number>();
    const edges: number[][] = [];
    const labels: number[] = [];
    const intern = (set: number[], first: boolean): number => {
      const key = (first ? "^" : "") + set.join();
      const before = known.get(key);
      if (before !== undefined) return before;
      if (sets.length >= MOST_AUTOMATON_STATES) throw new TooLarge("its automaton has too many states");
      const id = sets.push(set) - 1;
      known.set(key, id);
      labels.push(this.#label(set, first, finals));
      edges.push([]);
      return id;
    };
    intern(this.#closure([start], true, false), true);
    for (let q = 0; q < sets.length; q++) {
      const set = sets[q] ?? [];
      const out = edges[q] ?? [];
      for (const [low, high, targets] of this.#segments(set)) {
        const to = intern(this.#closure(targets, false, false), false);
        if (out.at(-1) === to && out.at(-2) === low - 1) out[out.length - 2] = high;
        else out.push(low, high, to);
      }
    }
    return trim({ edges, labels });
  }

  #label(set: readonly number[], first: boolean, finals: ReadonlyMap<number, number>): number {
    let label = -1;
    const atEnd = set.some((state) => (this.#atEnd[state]?.length ?? 0) > 0);
    for (const state of atEnd ? this.#closure(set, first, true) : set) {
      const final = finals.get(state);
      if (final !== undefined && (label < 0 || final < label)) label = final;
    }
    return label;
  }

  #closure(from: readonly number[], atStart: boolean, atEnd: boolean): number[] {
    // A mark a state instead of a set: most closures are small and there are many.
    const round = ++this.#round;
    const marks = this.#marks;
    const found: number[] = [];
    const add = (state: number): void => {
      if (marks[state] === round) return;
      marks[state] = round;
      found.push(state);
    };
    for (const state of from) add(state);
    for (let i = 0; i < found.length; i++) {
      const state = found[i] as number;
      for (const to of this.#always[state] ?? []) add(to);
      if (atStart) for (const to of this.#atStart[state] ?? []) add(to);
      if (atEnd) for (const to of this.#atEnd[state] ?? []) add(to);
    }
    this.#budget.spend(found.length);
    return found.length < 2 ? found : found.sort((a, b) => a - b);
  }

  /** The bytes that leave a set of states, cut where the targets change. */
  *#segments(set: readonly number[]): Generator<[low: number, high: number, targets: number[]]> {
    const cut = new Uint8Array(257);
    const all: number[] = [];
    for (const state of set) {
      const ranges = this.#ranges[state] ?? [];
      for (let i = 0; i < ranges.length; i += 3) {
        const low = ranges[i] ?? 0;
        const high = ranges[i + 1] ?? 0;
        cut[low] = 1;
        cut[high + 1] = 1;
        all.push(low, high, ranges[i + 2] ?? 0);
      }
    }
    for (let low = 0; low < 256; ) {
      let high = low;
      while (high < 255 && cut[high + 1] === 0) high++;
      const targets: number[] = [];
      for (let i = 0; i < all.length; i += 3)
        if ((all[i] ?? 0) <= low && (all[i + 1] ?? 0) >= high) targets.push(all[i + 2] ?? 0);
      this.#budget.spend(all.length / 3 + 1);
      if (targets.length > 0) yield [low, high, targets];
      low = high + 1;
    }
  }
}

/** Without the states that no accepting one can be reached from; undefined when that is the start. */
export function trim(dfa: Dfa): Dfa | undefined {
  const back: number[][] = dfa.edges.map(() => []);
  dfa.edges.forEach((edges, q) => {
    for (let i = 2; i < edges.length; i += 3) back[edges[i] ?? 0]?.push(q);
  });
  const alive = new Uint8Array(dfa.edges.length);
  const stack = dfa.labels.flatMap((label, q) => (label >= 0 ? [q] : []));
  for (const q of stack) alive[q] = 1;
  for (let q = stack.pop(); q !== undefined; q = stack.pop())
    for (const from of back[q] ?? [])
      if (alive[from] === 0) {
        alive[from] = 1;
        stack.push(from);
      }
  if (alive[0] === 0) return undefined;
  const names = new Int32Array(dfa.edges.length).fill(-1);
  let count = 0;
  for (let q = 0; q < names.length; q++) if (alive[q] === 1) names[q] = count++;
  const kept: Dfa = { edges: [], labels: [] };
  dfa.edges.forEach((edges, q) => {
    if (alive[q] === 0) return;
    const out: number[] = [];
    for (let i = 0; i < edges.length; i += 3) {
      const to = names[edges[i + 2] ?? 0] ?? -1;
      if (to >= 0) out.push(edges[i] ?? 0, edges[i + 1] ?? 0, to);
    }
    kept.edges.push(out);
    kept.labels.push(dfa.labels[q] ?? -1);
  });
  return kept;
}

/** Joins states that accept alike (Moore's refinement); states keep the order of the first of each. Of small automata: its time
 * grows with the states times the longest way through them. */
export function joinAlike({ edges, labels }: Dfa): Dfa {
  let classes = labels.map((label) => label + 1);
  for (let count = new Set(classes).size; ; ) {
    const names = new Map<string, number>();
    const next = edges.map((list, q) => {
      const parts = [String(classes[q])];
      for (const [low, high, to] of joined(list, classes)) parts.push(`${low} ${high} ${to}`);
      const key = parts.join();
      let name = names.get(key);
      if (name === undefined) {
        name = names.size;
        names.set(key, name);
      }
      return name;
    });
    classes = next;
    if (names.size === count) break;
    count = names.size;
  }
  const out: Dfa = { edges: [], labels: [] };
  edges.forEach((list, q) => {
    const name = classes[q] ?? 0;
    if (name < out.edges.length) return;
    out.edges.push(joined(list, classes).flat());
    out.labels.push(labels[q] ?? -1);
  });
  return out;
}

/** A state's edges with its targets' classes, neighbours of one class as one. */
function joined(
  list: readonly number[],
  classes: readonly number[],
): [low: number, high: number, to: number][] {
  const out: [number, number, number][] = [];
  for (let i = 0; i < list.length; i += 3) {
    const [low, high, to] = [list[i] ?? 0, list[i + 1] ?? 0, classes[list[i + 2] ?? 0] ?? 0];
    const last = out.at(-1);
    if (last !== undefined && last[2] === to && last[1] === low - 1) last[1] = high;
    else out.push([low, high, to]);
  }
  return out;
}

/** What both accept, or what the first accepts and the second does not; labels are the first one's. */
export function combine(a: Dfa, b: Dfa, how: "both" | "not second", budget: BuildBudget): Dfa | undefined {
  const pairs: [number, number][] = [];
  const known = new Map<number, number>();
  const edges: number[][] = [];
  const labels: number[] = [];
  const intern = (p: number, q: number): number => {
    const key = p * 0x200000 + q + 1;
    const before = known.get(key);
    if (before !== undefined) return before;
    if (pairs.length >= MOST_AUTOMATON_STATES) throw new TooLarge("its automaton has too many states");
    const id = pairs.push([p, q]) - 1;
    known.set(key, id);
    const second = (b.labels[q] ?? -1) >= 0;
    labels.push(second === (how === "both") ? (a.labels[p] ?? -1) : -1);
    edges.push([]);
    return id;
  };
  intern(0, 0);
  for (let i = 0; i < pairs.length; i++) {
    const [p, q] = pairs[i] ?? [0, -1];
    const out = edges[i] ?? [];
    const first = a.edges[p] ?? [];
    const second = b.edges[q] ?? [];
    for (let e = 0; e < first.length; e += 3) {
      const top = first[e + 1] ?? 0;
      const to = first[e + 2] ?? 0;
      let at = first[e] ?? 0;
      for (let s = 0; s < second.length && at <= top; s += 3) {
        budget.spend(1);
        const low = Math.max(second[s] ?? 0, at);
        const high = Math.min(second[s + 1] ?? 0, top);
        if (low > high) continue;
        if (low > at && how === "not second") out.push(at, low - 1, intern(to, -1));
        out.push(low, high, intern(to, second[s + 2] ?? 0));
        at = high + 1;
      }
      if (at <= top && how === "not second") out.push(at, top, intern(to, -1));
    }
  }
  return trim({ edges, labels });
}
