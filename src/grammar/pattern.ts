// ECMAScript patterns (with the u flag, as JSON Schema has them) as automata over the inside of JSON strings. What is
// not regular (look-around, back-references, word boundaries) is refused.

import type { Nfa } from "./automaton.ts";
import {
  ANY_CHARACTER,
  addCharacters,
  type CharacterSet,
  characterSet,
  inverse,
  LAST_CHARACTER,
  rangesOf,
} from "./characters.ts";
import { MOST_REPEATS, TooLarge } from "./limits.ts";

/** The pattern cannot be enforced; the message says why. */
export class PatternError extends Error {}

type Tree =
  | { kind: "set"; set: CharacterSet }
  | { kind: "sequence" | "choice"; parts: Tree[] }
  | { kind: "repeat"; part: Tree; least: number; most: number }
  | { kind: "start" | "end" };

const MOST_GROUPS_DEEP = 50;
const DIGIT = characterSet([[0x30, 0x39]]);
const WORD = characterSet([
  [0x30, 0x39],
  [0x41, 0x5a],
  [0x5f, 0x5f],
  [0x61, 0x7a],
]);
const SPACE = characterSet(
  [0x20, 0xa0, 0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000, 0xfeff]
    .map((code): [number, number] => [code, code])
    .concat([
      [0x09, 0x0d],
      [0x2000, 0x200a],
    ]),
);
const LINE_ENDS = characterSet([
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
]);
const CONTROL: ReadonlyMap<string, number> = new Map([
  ["n", 10],
  ["r", 13],
  ["t", 9],
  ["f", 12],
  ["v", 11],
  ["0", 0],
]);

/** Throws PatternError for what is no pattern or cannot be enforced. */
export function checkPattern(pattern: string): void {
  readPattern(pattern);
}

function readPattern(pattern: string): Tree {
  try {
    new RegExp(pattern, "u");
  } catch (thrown) {
    throw new PatternError(thrown instanceof Error ? thrown.message : String(thrown));
  }
  return new PatternReader(pattern).read();
}

/** Where the pattern says no more than that there are `least` to `most` characters of a set (`^[a-z]{3,8}$`). Throws
 * PatternError. */
export function characterRun(
  pattern: string,
): { set: CharacterSet; least: number; most: number } | undefined {
  const tree = readPattern(pattern);
  if (tree.kind !== "sequence" || tree.parts.length !== 3) return undefined;
  const [first, run, last] = tree.parts;
  if (first?.kind !== "start" || last?.kind !== "end" || run?.kind !== "repeat") return undefined;
  let { part } = run;
  while (part.kind === "sequence" && part.parts.length === 1 && part.parts[0] !== undefined)
    part = part.parts[0];
  if (part.kind !== "set" || part.set.length === 0) return undefined;
  return { set: part.set, least: run.least, most: run.most };
}

/** The strings in which the pattern is found somewhere, from `from` to the returned state. Throws PatternError, TooLarge. */
export function addPattern(nfa: Nfa, from: number, pattern: string): number {
  const tree = readPattern(pattern);
  const parts = tree.kind === "sequence" ? tree.parts : [];
  const begin = nfa.state();
  nfa.epsilon(from, begin);
  // Where an anchor settles it, nothing stands in front or behind: that saves most of the states.
  if (parts[0]?.kind !== "start") addCharacters(nfa, begin, begin, ANY_CHARACTER);
  const end = new PatternWriter(nfa).write(tree, begin);
  if (parts.at(-1)?.kind !== "end") addCharacters(nfa, end, end, ANY_CHARACTER);
  return end;
}

/** Reads a pattern that the platform has found to be well formed. */
class PatternReader {
  readonly #characters: string[];
  #at = 0;
  #depth = 0;

  constructor(pattern: string) {
    this.#characters = [...pattern];
  }

  read(): Tree {
    const tree = this.#choice();
    if (this.#at < this.#characters.length) throw new PatternError(`unexpected ${this.#peek()}`);
    return tree;
  }

  #peek(ahead = 0): string {
    return this.#characters[this.#at + ahead] ?? "";
  }

  #take(): string {
    const character = this.#peek();
    this.#at++;
    return character;
  }

  #skip(text: string): boolean {
    for (let i = 0; i < text.length; i++) if (this.#peek(i) !== text[i]) return false;
    this.#at += text.length;
    return true;
  }

  #choice(): Tree {
    if (++this.#depth > MOST_GROUPS_DEEP) throw new PatternError("its groups are nested too deeply");
    const parts = [this.#sequence()];
    while (this.#skip("|")) parts.push(this.#sequence());
    this.#depth--;
    const [only] = parts;
    return parts.length === 1 && only !== undefined ? only : { kind: "choice", parts };
  }

  #sequence(): Tree {
    const parts: Tree[] = [];
    while (!["", "|", ")"].includes(this.#peek())) parts.push(this.#quantified());
    return { kind: "sequence", parts };
  }

  #quantified(): Tree {
    const part = this.#atom();
    let least: number;
    let most: number;
    if (this.#skip("*")) [least, most] = [0, Number.POSITIVE_INFINITY];
    else if (this.#skip("+")) [least, most] = [1, Number.POSITIVE_INFINITY];
    else if (this.#skip("?")) [least, most] = [0, 1];
    else if (this.#skip("{")) [least, most] = this.#counts();
    else return part;
    // Lazy or greedy: the same strings.
    this.#skip("?");
    return { kind: "repeat", part, least, most };
  }

  #counts(): [least: number, most: number] {
    const number = (): number => {
      let digits = "";
      while (/\d/.test(this.#peek())) digits += this.#take();
      return Number(digits);
    };
    const least = number();
    let most = least;
    if (this.#skip(",")) most = this.#peek() === "}" ? Number.POSITIVE_INFINITY : number();
    this.#skip("}");
    return [least, most];
  }

  #atom(): Tree {
    const character = this.#take();
    switch (character) {
      case "^":
        return { kind: "start" };
      case "$":
        return { kind: "end" };
      case ".":
        return { kind: "set", set: inverse(LINE_ENDS) };
      case "(":
        return this.#group();
      case "[":
        return { kind: "set", set: this.#class() };
      case "\\":
        return { kind: "set", set: this.#escape() };
      default:
        return { kind: "set", set: one(character) };
    }
  }

  #group(): Tree {
    if (this.#skip("?:")) return this.#closed();
    for (const look of ["?=", "?!", "?<=", "?<!"])
      if (this.#skip(look)) throw new PatternError(`look-around, (${look}…), cannot be enforced`);
    if (this.#skip("?<")) while (this.#take() !== ">");
    else if (this.#peek() === "?") throw new PatternError("groups with flags cannot be enforced");
    return this.#closed();
  }

  #closed(): Tree {
    const tree = this.#choice();
    this.#take();
    return tree;
  }

  #class(): CharacterSet {
    const negated = this.#skip("^");
    const ranges: [number, number][] = [];
    while (!this.#skip("]")) {
      const low = this.#classPart();
      const range = this.#peek() === "-" && this.#peek(1) !== "]";
      if (!range) {
        ranges.push(...rangesOf(low));
        continue;
      }
      this.#take();
      const high = this.#classPart();
      ranges.push([low[0] ?? 0, high[0] ?? 0]);
    }
    const set = characterSet(ranges);
    return negated ? inverse(set) : set;
  }

  #classPart(): CharacterSet {
    const character = this.#take();
    if (character !== "\\") return one(character);
    if (this.#skip("b")) return characterSet([[8, 8]]);
    if (this.#skip("-")) return one("-");
    return this.#escape();
  }

  /** What follows a backslash. */
  #escape(): CharacterSet {
    const letter = this.#take();
    if (letter === "d") return DIGIT;
    if (letter === "D") return inverse(DIGIT);
    if (letter === "w") return WORD;
    if (letter === "W") return inverse(WORD);
    if (letter === "s") return SPACE;
    if (letter === "S") return inverse(SPACE);
    if (letter === "b" || letter === "B") throw new PatternError(`\\${letter} cannot be enforced`);
    if (/[1-9k]/.test(letter)) throw new PatternError("back-references cannot be enforced");
    if (letter === "p" || letter === "P") return this.#property(letter);
    if (letter === "c") {
      const code = (this.#take().codePointAt(0) ?? 0) % 32;
      return characterSet([[code, code]]);
    }
    if (letter === "x" || letter === "u") {
      const code = this.#hexadecimal(letter);
      return characterSet([[code, code]]);
    }
    const control = CONTROL.get(letter);
    return control === undefined ? one(letter) : characterSet([[control, control]]);
  }

  #hexadecimal(letter: string): number {
    const digits = (count: number): number => {
      let text = "";
      for (let i = 0; i < count; i++) text += this.#take();
      return Number.parseInt(text, 16);
    };
    if (letter === "x") return digits(2);
    if (this.#skip("{")) {
      let text = "";
      while (this.#peek() !== "}") text += this.#take();
      this.#take();
      return Number.parseInt(text, 16);
    }
    const high = digits(4);
    if (high < 0xd800 || high > 0xdbff || !(this.#peek() === "\\" && this.#peek(1) === "u")) return high;
    this.#at += 2;
    return 0x10000 + (high - 0xd800) * 0x400 + (digits(4) - 0xdc00);
  }

  #property(letter: string): CharacterSet {
    let name = "";
    while (this.#peek() !== "}") name += this.#take();
    this.#take();
    const set = propertySet(name.slice(1));
    return letter === "p" ? set : inverse(set);
  }
}

const properties = new Map<string, CharacterSet>();

/** Code points looked at in one go. */
const BLOCK = 0x1000;

/** Characters with a Unicode property: the platform knows them, and finds the runs of them in a text of all characters. */
function propertySet(name: string): CharacterSet {
  const before = properties.get(name);
  if (before !== undefined) return before;
  const runs = new RegExp(`\\p{${name}}+`, "gu");
  const ranges: [number, number][] = [];
  for (let first = 0; first <= LAST_CHARACTER; first += BLOCK) {
    // Halves of pairs are no characters.
    const last = first === 0xd000 ? 0xd7ff : first + BLOCK - 1;
    const units = first > 0xffff ? 2 : 1;
    const text = String.fromCodePoint(...Array.from({ length: last - first + 1 }, (_, i) => first + i));
    for (const { 0: run, index } of text.matchAll(runs)) {
      const from = first + index / units;
      ranges.push([from, from + run.length / units - 1]);
    }
  }
  const set = characterSet(ranges);
  if (properties.size < 64) properties.set(name, set);
  return set;
}

function one(character: string): CharacterSet {
  const code = character.codePointAt(0) ?? 0;
  return [code, code];
}

/** Writes a tree as states; each method returns the state behind the part. */
class PatternWriter {
  readonly #nfa: Nfa;
  #repeats = 0;

  constructor(nfa: Nfa) {
    this.#nfa = nfa;
  }

  write(tree: Tree, from: number): number {
    const nfa = this.#nfa;
    if (tree.kind === "sequence") return tree.parts.reduce((at, part) => this.write(part, at), from);
    if (tree.kind === "repeat") return this.#repeat(tree, from);
    const to = nfa.state();
    if (tree.kind === "set") addCharacters(nfa, from, to, tree.set);
    else if (tree.kind === "choice") for (const part of tree.parts) nfa.epsilon(this.write(part, from), to);
    else nfa.epsilon(from, to, tree.kind === "start" ? "at start" : "at end");
    return to;
  }

  #repeat({ part, least, most }: Extract<Tree, { kind: "repeat" }>, from: number): number {
    const nfa = this.#nfa;
    this.#repeats += most === Number.POSITIVE_INFINITY ? least : most;
    if (this.#repeats > MOST_REPEATS)
      throw new TooLarge(`its quantifiers repeat more than ${MOST_REPEATS} times`);
    let at = from;
    for (let i = 0; i < least; i++) at = this.write(part, at);
    const end = nfa.state();
    if (most === Number.POSITIVE_INFINITY) {
      // A state of its own, so that the loop is not entered from before.
      const loop = nfa.state();
      nfa.epsilon(at, loop);
      nfa.epsilon(this.write(part, loop), loop);
      nfa.epsilon(loop, end);
      return end;
    }
    for (let i = least; i < most; i++) {
      nfa.epsilon(at, end);
      at = this.write(part, at);
    }
    nfa.epsilon(at, end);
    return end;
  }
}
