// Multiples of a number as automata over their digits. Fractions have to be sums of halves, quarters and so on (0.5, 1.25):
// those are exact as doubles, so all validators agree on their multiples. On others they do not: to most of them 5.1 and
// 19.99 are no multiples of 0.01.

import type { BuildBudget, Dfa } from "./automaton.ts";
import { TooLarge } from "./limits.ts";

const MOST_REMAINDERS = 5000;
/** Digits behind the point. */
const MOST_PLACES = 8;

const ZERO = 0x30;
const MINUS = 0x2d;
const POINT = 0x2e;

/** How many digits behind the point say it exactly; undefined: too many, or no number of them as a double. */
export function exactPlaces(divisor: number): number | undefined {
  for (let places = 0; places <= MOST_PLACES; places++)
    if (Number.isInteger(divisor * 2 ** places)) return places;
  return undefined;
}

/** Numbers that `divisor` divides, with as many digits behind the point as it has at most. Throws TooLarge. */
export function multiples(divisor: number, budget: BuildBudget): Dfa {
  const places = exactPlaces(divisor);
  // What is left when the digits so far, without the point, are divided by this: the divisor in its last place.
  const size = divisor * 10 ** (places ?? 0);
  if (places === undefined || size > MOST_REMAINDERS)
    throw new TooLarge(`multipleOf has too many digits, or is more than ${MOST_REMAINDERS}`);
  budget.spend(size * 10 * (places + 1));
  // State 0: nothing read; 1: a sign; then for each number of digits behind the point all remainders.
  const state = (behind: number, remainder: number): number => 2 + behind * size + remainder;
  const digits = (behind: number, remainder: number): number[] =>
    Array.from({ length: 10 }, (_, digit) => [
      ...[ZERO + digit, ZERO + digit],
      state(behind, (10 * remainder + digit) % size),
    ]).flat();
  const edges = [[MINUS, MINUS, 1, ...digits(0, 0)], digits(0, 0)];
  const labels = [-1, -1];
  for (let behind = 0; behind <= places; behind++)
    for (let remainder = 0; remainder < size; remainder++) {
      const point = places > 0 && behind === 0 ? [POINT, POINT, state(places + 1, remainder)] : [];
      edges.push([...point, ...(behind === 0 ? digits(0, remainder) : [])]);
      if (behind > 0 && behind < places) edges[edges.length - 1] = digits(behind + 1, remainder);
      labels.push((remainder * 10 ** (places - behind)) % size === 0 ? 0 : -1);
    }
  // Behind the point, before a digit.
  for (let remainder = 0; places > 0 && remainder < size; remainder++) {
    edges.push(digits(1, remainder));
    labels.push(-1);
  }
  return { edges, labels };
}
