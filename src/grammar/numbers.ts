// JSON numbers within bounds, as automata over their digits. Bounds are compared digit by digit, so that they are exact.

import { type BuildBudget, combine, type Dfa, Nfa } from "./automaton.ts";
import { TooLarge } from "./limits.ts";
import { multiples } from "./multiples.ts";

/** Digits before the point where nothing bounds them: every whole number so written is exact as a double. */
const MOST_DIGITS = 15;
/** Digits behind the point beside those that a bound has. */
const FRACTION_DIGITS = 6;
/** Digits before the point of a number that must not be whole. */
const BROKEN_DIGITS = 9;

export interface NumberRange {
  low?: number;
  lowExcluded?: boolean;
  high?: number;
  highExcluded?: boolean;
  /** Only whole numbers. */
  whole: boolean;
  /** No whole numbers. */
  broken?: boolean;
  /** Each divides the number; numbers above 0 that are exact as doubles. */
  divisors: readonly number[];
}

const ZERO = 0x30;
const MINUS = 0x2d;

/** Undefined = there is no such number. Throws TooLarge. */
export function numberAutomaton(range: NumberRange, budget: BuildBudget): Dfa | undefined {
  const nfa = new Nfa(budget);
  const start = nfa.state();
  const end = nfa.state();
  const unbounded = range.low === undefined && range.high === undefined;
  if (unbounded && !range.whole) addAnyNumber(nfa, start, end);
  else {
    const low = range.low === undefined ? undefined : decimal(range.low, range.lowExcluded ?? false);
    const high = range.high === undefined ? undefined : decimal(range.high, range.highExcluded ?? false);
    addSide(nfa, start, end, positivePart(low, high), range.whole);
    const minus = nfa.state();
    nfa.range(start, MINUS, MINUS, minus);
    addSide(nfa, minus, end, negativePart(low, high), range.whole);
  }
  let dfa = nfa.determinise(start, new Map([[end, 0]]));
  if (range.broken && dfa !== undefined) dfa = combine(dfa, fractions(budget), "both", budget);
  for (const divisor of range.divisors)
    dfa = dfa === undefined ? undefined : combine(dfa, multiples(divisor, budget), "both", budget);
  return dfa;
}

/** Whether the number is within the bounds, and whole or not as it must be. */
export function inRange(value: number, range: NumberRange): boolean {
  const { low, high, lowExcluded, highExcluded, whole, broken } = range;
  if (Number.isInteger(value) ? broken === true : whole) return false;
  if (low !== undefined && (value < low || (value === low && lowExcluded === true))) return false;
  return high === undefined || value < high || (value === high && highExcluded !== true);
}

/** A bound's size; `digits` of whole part and fraction without needless zeros. */
interface Decimal {
  negative: boolean;
  whole: string;
  fraction: string;
  excluded: boolean;
}

function decimal(value: number, excluded: boolean): Decimal {
  const [mantissa = "0", exponent = "0"] = Math.abs(value).toString().split("e");
  const [whole = "0", fraction = ""] = mantissa.split(".");
  const shift = Number(exponent);
  const digits = whole + fraction;
  const point = whole.length + shift;
  if (Math.abs(shift) > 400) throw new TooLarge("a bound is too far from 1");
  const padded = point > 0 ? digits.padEnd(point, "0") : "0".repeat(1 - point) + digits;
  const at = Math.max(point, 1);
  return {
    negative: value < 0 || Object.is(value, -0),
    whole: padded.slice(0, at).replace(/^0+(?=\d)/, ""),
    fraction: padded.slice(at).replace(/0+$/, ""),
    excluded,
  };
}

/** Sizes from `low` to `high`, either absent. */
interface Side {
  low: Decimal | undefined;
  high: Decimal | undefined;
  /** -0 is not written. */
  zero: boolean;
}

const isZero = ({ whole, fraction }: Decimal): boolean => whole === "0" && fraction === "";

function positivePart(low: Decimal | undefined, high: Decimal | undefined): Side | undefined {
  if (high?.negative === true && !isZero(high)) return undefined;
  return { low: low?.negative === true && !isZero(low) ? undefined : low, high, zero: true };
}

function negativePart(low: Decimal | undefined, high: Decimal | undefined): Side | undefined {
  if (low !== undefined && (!low.negative || isZero(low))) return undefined;
  return { low: high?.negative === true ? high : undefined, high: low, zero: false };
}

/** Any number with digits enough for a double, so that an answer cannot be digits for ever. */
function addAnyNumber(nfa: Nfa, start: number, end: number): void {
  const signed = nfa.state();
  nfa.epsilon(start, signed);
  nfa.range(start, MINUS, MINUS, signed);
  const whole = nfa.state();
  nfa.range(signed, ZERO, ZERO, whole);
  let at = nfa.state();
  nfa.range(signed, ZERO + 1, ZERO + 9, at);
  nfa.epsilon(at, whole);
  at = addDigits(nfa, at, whole, MOST_DIGITS - 1);
  nfa.epsilon(whole, end);
  const point = nfa.text(whole, ".");
  const fraction = nfa.state();
  addDigits(nfa, point, fraction, MOST_DIGITS);
  nfa.epsilon(fraction, end);
  for (const from of [whole, fraction])
    for (const letter of ["e", "E"]) {
      const sign = nfa.text(from, letter);
      const digits = nfa.state();
      nfa.epsilon(sign, digits);
      nfa.range(sign, 0x2b, 0x2b, digits);
      nfa.range(sign, MINUS, MINUS, digits);
      addDigits(nfa, digits, end, 2);
    }
}

/** One to `most` digits; each may be the last. */
function addDigits(nfa: Nfa, from: number, end: number, most: number): number {
  let at = from;
  for (let i = 0; i < most; i++) {
    const next = nfa.state();
    nfa.range(at, ZERO, ZERO + 9, next);
    nfa.epsilon(next, end);
    at = next;
  }
  return at;
}

/** Numbers without sign from side.low to side.high. */
function addSide(nfa: Nfa, from: number, end: number, side: Side | undefined, whole: boolean): void {
  if (side === undefined) return;
  const low: Decimal = side.low ?? { negative: false, whole: "0", fraction: "", excluded: false };
  const high = side.high;
  if (low.whole.length > MOST_DIGITS) throw new TooLarge(`a bound has more than ${MOST_DIGITS} digits`);
  const longest = Math.min(high?.whole.length ?? MOST_DIGITS, MOST_DIGITS);
  const writer = new SideWriter(nfa, end, low, high, whole, side.zero);
  for (let length = low.whole.length; length <= longest; length++)
    writer.wholePart(from, length, length === low.whole.length, length === high?.whole.length);
}

class SideWriter {
  readonly #states = new Map<string, number>();
  readonly #fractionDigits: number;

  constructor(
    readonly nfa: Nfa,
    readonly end: number,
    readonly low: Decimal,
    readonly high: Decimal | undefined,
    readonly whole: boolean,
    readonly zero: boolean,
  ) {
    const bound = Math.max(low.fraction.length, high?.fraction.length ?? 0);
    this.#fractionDigits = Math.min(bound + FRACTION_DIGITS, 40);
  }

  /** Numbers whose whole part has `length` digits. `tightLow`: the digits so far are those of the lower bound. */
  wholePart(from: number, length: number, tightLow: boolean, tightHigh: boolean): void {
    let states = new Map([[key(tightLow, tightHigh, false), from]]);
    for (let i = 0; i < length; i++) {
      const next = new Map<string, number>();
      for (const [name, state] of states) {
        const [atLow, atHigh, nonZero] = flags(name);
        const least = atLow ? digitOf(this.low.whole, i) : i === 0 && length > 1 ? 1 : 0;
        const most = atHigh ? digitOf(this.high?.whole ?? "", i) : 9;
        for (let digit = least; digit <= most; digit++) {
          const to = key(atLow && digit === least, atHigh && digit === most, nonZero || digit > 0);
          let target = next.get(to);
          if (target === undefined) {
            target = this.nfa.state();
            next.set(to, target);
          }
          this.nfa.range(state, ZERO + digit, ZERO + digit, target);
        }
      }
      states = next;
    }
    for (const [name, state] of states) {
      const [atLow, atHigh, nonZero] = flags(name);
      if (this.#mayEnd(0, atLow, atHigh, nonZero)) this.nfa.epsilon(state, this.end);
      if (this.whole) continue;
      const point = this.nfa.text(state, ".");
      this.nfa.epsilon(point, this.#fraction(0, atLow, atHigh, nonZero));
    }
  }

  /** The state in which `index` digits behind the point are written. */
  #fraction(index: number, atLow: boolean, atHigh: boolean, nonZero: boolean): number {
    const name = `${index} ${key(atLow, atHigh, nonZero)}`;
    const before = this.#states.get(name);
    if (before !== undefined) return before;
    const state = this.nfa.state();
    this.#states.set(name, state);
    if (index > 0 && this.#mayEnd(index, atLow, atHigh, nonZero)) this.nfa.epsilon(state, this.end);
    if (index >= this.#fractionDigits) return state;
    const least = atLow ? digitOf(this.low.fraction, index) : 0;
    const most = atHigh ? digitOf(this.high?.fraction ?? "", index) : 9;
    for (let digit = least; digit <= most; digit++) {
      const to = this.#fraction(
        index + 1,
        atLow && digit === least,
        atHigh && digit === most,
        nonZero || digit > 0,
      );
      this.nfa.range(state, ZERO + digit, ZERO + digit, to);
    }
    return state;
  }

  /** Whether the number may end behind `index` digits of the fraction. */
  #mayEnd(index: number, atLow: boolean, atHigh: boolean, nonZero: boolean): boolean {
    if (!nonZero && !this.zero) return false;
    const rest = (bound: string): boolean => !/[1-9]/.test(bound.slice(index));
    if (atLow && (!rest(this.low.fraction) || this.low.excluded)) return false;
    return !(atHigh && this.high?.excluded === true && rest(this.high.fraction));
  }
}

function digitOf(digits: string, index: number): number {
  return index < digits.length ? digits.charCodeAt(index) - ZERO : 0;
}

function key(atLow: boolean, atHigh: boolean, nonZero: boolean): string {
  return `${atLow ? "l" : "-"}${atHigh ? "h" : "-"}${nonZero ? "n" : "-"}`;
}

function flags(name: string): [atLow: boolean, atHigh: boolean, nonZero: boolean] {
  return [name[0] === "l", name[1] === "h", name[2] === "n"];
}

/** Numbers that are not whole, with digits few enough that they are not as doubles either. */
function fractions(budget: BuildBudget): Dfa {
  const nfa = new Nfa(budget);
  const start = nfa.state();
  const signed = nfa.state();
  nfa.epsilon(start, signed);
  nfa.range(start, MINUS, MINUS, signed);
  const whole = nfa.state();
  addDigits(nfa, signed, whole, BROKEN_DIGITS);
  const point = nfa.text(whole, ".");
  const end = nfa.state();
  let at = point;
  for (let i = 0; i < FRACTION_DIGITS; i++) {
    nfa.range(at, ZERO + 1, ZERO + 9, end);
    const next = nfa.state();
    nfa.range(at, ZERO, ZERO + 9, next);
    at = next;
  }
  const dfa = nfa.determinise(start, new Map([[end, 0]]));
  if (dfa === undefined) throw new TooLarge("no number is left");
  return dfa;
}
