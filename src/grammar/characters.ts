// Characters of JSON strings as bytes. Every character has one spelling here (raw where JSON allows it, else its short
// escape or \u00XX), so that sets of strings can be intersected and subtracted on their bytes.

import type { Nfa } from "./automaton.ts";

/** Code points, ascending, not overlapping: [low, high, low, high, …]. */
export type CharacterSet = readonly number[];

export const LAST_CHARACTER = 0x10ffff;
export const ANY_CHARACTER: CharacterSet = [0, LAST_CHARACTER];

/** Sorted, joined. */
export function characterSet(ranges: readonly (readonly [low: number, high: number])[]): CharacterSet {
  const sorted = [...ranges].filter(([low, high]) => low <= high).sort((a, b) => a[0] - b[0]);
  const out: number[] = [];
  for (const [low, high] of sorted) {
    const last = out.at(-1);
    if (last !== undefined && low <= last + 1) out[out.length - 1] = Math.max(last, high);
    else out.push(low, high);
  }
  return out;
}

export function rangesOf(set: CharacterSet): [low: number, high: number][] {
  const out: [number, number][] = [];
  for (let i = 0; i < set.length; i += 2) out.push([set[i] ?? 0, set[i + 1] ?? 0]);
  return out;
}

export function inverse(set: CharacterSet): CharacterSet {
  const out: [number, number][] = [];
  let from = 0;
  for (const [low, high] of rangesOf(set)) {
    out.push([from, low - 1]);
    from = high + 1;
  }
  out.push([from, LAST_CHARACTER]);
  return characterSet(out);
}

const SHORT: ReadonlyMap<number, string> = new Map([
  [0x08, "\\b"],
  [0x09, "\\t"],
  [0x0a, "\\n"],
  [0x0c, "\\f"],
  [0x0d, "\\r"],
  [0x22, '\\"'],
  [0x5c, "\\\\"],
]);
/** Characters that stand for themselves between quotes; surrogates are no characters. */
const RAW: [low: number, high: number][] = [
  [0x20, 0x21],
  [0x23, 0x5b],
  [0x5d, 0xd7ff],
  [0xe000, LAST_CHARACTER],
];

/** Edges from `from` to `to` for each character of the set, as it stands between the quotes of a JSON string. */
export function addCharacters(nfa: Nfa, from: number, to: number, set: CharacterSet): void {
  for (const [low, high] of rangesOf(set)) {
    for (const [first, last] of RAW) {
      const a = Math.max(low, first);
      const b = Math.min(high, last);
      if (a <= b) addUtf8(nfa, from, to, a, b);
    }
    for (let code = low; code <= Math.min(high, 0x5c); code++) {
      if (code >= 0x20 && code !== 0x22 && code !== 0x5c) continue;
      const spelling = SHORT.get(code) ?? `\\u${code.toString(16).padStart(4, "0")}`;
      nfa.epsilon(nfa.text(from, spelling), to);
    }
  }
}

/** Edges from `from` to `to` for each character of the set, as it stands in plain text. */
export function addRawCharacters(nfa: Nfa, from: number, to: number, set: CharacterSet): void {
  for (const [low, high] of rangesOf(set))
    for (const [first, last] of [
      [0, 0xd7ff],
      [0xe000, LAST_CHARACTER],
    ] as const) {
      const a = Math.max(low, first);
      const b = Math.min(high, last);
      if (a <= b) addUtf8(nfa, from, to, a, b);
    }
}

/** UTF-8 of the characters from `low` to `high`, cut so that each piece is a product of byte ranges. */
function addUtf8(nfa: Nfa, from: number, to: number, low: number, high: number): void {
  for (const edge of [0x7f, 0x7ff, 0xffff])
    if (low <= edge && edge < high) {
      addUtf8(nfa, from, to, low, edge);
      addUtf8(nfa, from, to, edge + 1, high);
      return;
    }
  if (high > 0x7f)
    for (const bits of [6, 12, 18]) {
      const below = 2 ** bits - 1;
      if (Math.floor(low / 2 ** bits) === Math.floor(high / 2 ** bits)) continue;
      const cut =
        (low & below) !== 0 ? (low | below) + 1 : (high & below) !== below ? high & ~below : undefined;
      if (cut === undefined) continue;
      addUtf8(nfa, from, to, low, cut - 1);
      addUtf8(nfa, from, to, cut, high);
      return;
    }
  const first = utf8(low);
  const last = utf8(high);
  let at = from;
  first.forEach((byte, i) => {
    const next = i === first.length - 1 ? to : nfa.state();
    nfa.range(at, byte, last[i] ?? byte, next);
    at = next;
  });
}

function utf8(code: number): number[] {
  if (code < 0x80) return [code];
  if (code < 0x800) return [0xc0 | (code >> 6), 0x80 | (code & 63)];
  if (code < 0x10000) return [0xe0 | (code >> 12), 0x80 | ((code >> 6) & 63), 0x80 | (code & 63)];
  return [0xf0 | (code >> 18), 0x80 | ((code >> 12) & 63), 0x80 | ((code >> 6) & 63), 0x80 | (code & 63)];
}
