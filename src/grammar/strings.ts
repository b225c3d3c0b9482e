// JSON strings with a pattern, a length, or names that they must not be, as automata over what stands between the quotes.

import { BuildBudget, combine, type Dfa, Nfa } from "./automaton.ts";
import { ANY_CHARACTER, addCharacters } from "./characters.ts";
import { TooLarge } from "./limits.ts";
import { addPattern } from "./pattern.ts";
import type { StringShape } from "./shape.ts";

/** A length beside a pattern is counted in states. */
const MOST_COUNTED = 1000;

/** Strings in which the pattern is found. Throws PatternError, TooLarge. Undefined = there is none. */
export function patternAutomaton(pattern: string, budget: BuildBudget): Dfa | undefined {
  const nfa = new Nfa(budget);
  const start = nfa.state();
  const end = addPattern(nfa, start, pattern);
  return nfa.determinise(start, new Map([[end, 0]]));
}

/** Throws TooLarge. */
function checkLength(min: number, max: number): void {
  if (Math.max(min, max === Number.POSITIVE_INFINITY ? 0 : max) > MOST_COUNTED)
    throw new TooLarge(`a length above ${MOST_COUNTED} beside a pattern is too long`);
}

/** Strings of `min` to `max` characters; Infinity = no limit. Throws TooLarge. */
export function lengthAutomaton(min: number, max: number, budget: BuildBudget): Dfa | undefined {
  checkLength(min, max);
  if (min > max) return undefined;
  const nfa = new Nfa(budget);
  const start = nfa.state();
  const end = nfa.state();
  let at = start;
  const step = (): void => {
    const next = nfa.state();
    addCharacters(nfa, at, next, ANY_CHARACTER);
    at = next;
  };
  for (let i = 0; i < min; i++) step();
  nfa.epsilon(at, end);
  if (max === Number.POSITIVE_INFINITY) addCharacters(nfa, at, at, ANY_CHARACTER);
  else
    for (let i = min; i < max; i++) {
      step();
      nfa.epsilon(at, end);
    }
  return nfa.determinise(start, new Map([[end, 0]]));
}

let anything: Dfa | undefined;

/** Strings that every pattern is found in, of a length. Throws PatternError, TooLarge. */
export function matchingStrings(
  patterns: readonly string[],
  min: number,
  max: number,
  budget: BuildBudget,
): Dfa | undefined {
  const counted = min > 0 || max < Number.POSITIVE_INFINITY;
  if (!counted && patterns.length === 0) {
    anything ??= lengthAutomaton(0, Number.POSITIVE_INFINITY, new BuildBudget());
    return anything;
  }
  if (counted) checkLength(min, max);
  const all = patterns.map((pattern) => patternAutomaton(pattern, budget));
  if (counted) all.push(lengthAutomaton(min, max, budget));
  return all.reduce((a, b) =>
    a === undefined || b === undefined ? undefined : combine(a, b, "both", budget),
  );
}

/** Strings of a shape. Throws PatternError, TooLarge. Undefined = there is none. */
export function stringAutomaton(
  { patterns, min, max, excluded, unmatched }: StringShape,
  budget: BuildBudget,
): Dfa | undefined {
  const sources = patterns.map(([pattern]) => pattern);
  const all = matchingStrings(sources, min, max, budget);
  if (excluded.length === 0 && unmatched.length === 0) return all;
  const others = otherNames(excluded, [], unmatched, budget);
  return all && others && combine(all, others, "both", budget);
}

/** Names that are none of `taken`, in which the patterns of `matched` are found and those of `unmatched` are not. */
export function otherNames(
  taken: readonly string[],
  matched: readonly string[],
  unmatched: readonly string[],
  budget: BuildBudget,
): Dfa | undefined {
  let names = matchingStrings(matched, 0, Number.POSITIVE_INFINITY, budget);
  const remove = (others: Dfa | undefined): void => {
    if (names !== undefined && others !== undefined) names = combine(names, others, "not second", budget);
  };
  for (const pattern of unmatched) remove(patternAutomaton(pattern, budget));
  if (taken.length > 0) {
    const nfa = new Nfa(budget);
    const start = nfa.state();
    const ends = taken.map((name): [number, number] => [
      nfa.text(start, JSON.stringify(name).slice(1, -1)),
      0,
    ]);
    remove(nfa.determinise(start, new Map(ends)));
  }
  return names;
}

/** Writes the quoted strings of an automaton from `from` on; returns where they end. */
export function writeQuoted(nfa: Nfa, from: number, strings: Dfa | undefined): number {
  const open = nfa.text(from, '"');
  const inside = nfa.state();
  if (strings !== undefined) nfa.insert(open, strings, [inside]);
  return nfa.text(inside, '"');
}
