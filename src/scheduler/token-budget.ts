// How many prompt tokens a step may carry, and who gets them.
//
// Alone, a prompt gets the engine's largest step. Beside running streams a step should take at most `slowdown` times what
// it takes without prompts, or the streams stall. Both costs are measured: steps of streams alone by their number of
// rows, and what each prompt token adds to such a step. A piece's cost a token depends on its size (more rows share one
// read of the weights), so the measured cost is the one of recent pieces and the size settles where it fits the target.

/** Weight of the newest measurement. */
const NEWEST = 0.25;
/** Steps with prompts or drafts after which the cost of streams alone is measured again, with one step that carries neither. */
const STALE_STEPS = 32;

interface StreamsCost {
  ms: number;
  /** Other steps since it was measured. */
  age: number;
}

export interface TokenBudgetOptions {
  maxTokens: number;
  /** Wanted time of a step with prompts and streams, over the time of the streams alone; above 1. */
  slowdown: number;
  /** Wanted time of such a step while the streams' own cost is unknown. */
  firstTargetMs: number;
  /** Prompts always advance by so many tokens, whatever they cost. */
  minTokens: number;
}

export class TokenBudget {
  readonly #options: TokenBudgetOptions;
  /** By rows. */
  readonly #streams = new Map<number, StreamsCost>();
  /** Smoothed time that a prompt token adds: in steps with prompts alone, and beside streams. NaN until measured. */
  #aloneMs = Number.NaN;
  #besideMs = Number.NaN;
  #probing = false;

  constructor(options: TokenBudgetOptions) {
    this.#options = { ...options, minTokens: Math.min(options.minTokens, options.maxTokens) };
  }

  /** What a step of so many decode rows takes without anything else; undefined where that is to be measured (again). */
  streamsMs(decodeRows: number): number | undefined {
    const streams = this.#nearest(decodeRows);
    return streams === undefined || streams.age >= STALE_STEPS ? undefined : streams.ms;
  }

  /** A step went by that measured something else. */
  skipped(): void {
    for (const cost of this.#streams.values()) cost.age++;
  }

  /** Learns from a finished step without drafts. */
  observe(decodeRows: number, promptTokens: number, computeNs: number): void {
    if (computeNs <= 0) return;
    const ms = computeNs / 1e6;
    if (promptTokens === 0) {
      this.#probing = false;
      const known = this.#streams.get(decodeRows);
      this.#streams.set(decodeRows, { ms: known === undefined ? ms : typical(known.ms, ms), age: 0 });
      return;
    }
    if (decodeRows === 0) {
      // Few tokens say nothing about the cost of many.
      if (promptTokens >= this.#options.minTokens) this.#aloneMs = smooth(this.#aloneMs, ms / promptTokens);
      return;
    }
    this.skipped();
    const own = this.#nearest(decodeRows)?.ms ?? 0;
    this.#besideMs = smooth(this.#besideMs, Math.max(ms - own, ms * 0.05) / promptTokens);
  }

  /** Prompt tokens for a step that already carries `decodeRows` decode rows. 0 now and then, to measure those alone. */
  promptTokens(decodeRows: number): number {
    const { maxTokens, minTokens, slowdown, firstTargetMs } = this.#options;
    const room = maxTokens - decodeRows;
    if (decodeRows === 0) return room;
    const streams = this.#nearest(decodeRows);
    if ((streams === undefined || streams.age >= STALE_STEPS) && !this.#probing) {
      this.#probing = true;
      return 0;
    }
    const tokenMs = Number.isNaN(this.#besideMs) ? this.#aloneMs : this.#besideMs;
    const spareMs = streams === undefined ? firstTargetMs : streams.ms * (slowdown - 1);
    // Before the first measurement a small piece finds out what a token costs.
    const affordable = Number.isNaN(tokenMs) ? 4 * minTokens : Math.floor(spareMs / tokenMs);
    return Math.max(0, Math.min(room, Math.max(minTokens, affordable)));
  }

  /** What about as many rows cost: up to a quarter more or less, or one. */
  #nearest(rows: number): StreamsCost | undefined {
    let best: StreamsCost | undefined;
    let distance = Math.max(1, rows / 4);
    for (const [measured, cost] of this.#streams) {
      const away = Math.abs(measured - rows);
      if (away > distance || (away === distance && best !== undefined)) continue;
      best = cost;
      distance = away;
    }
    return best;
  }
}

/** Nearer to the usual time than to the mean: a step that something else held up says little about the next one. */
function typical(before: number, now: number): number {
  const weight = now < before ? 2 * NEWEST : 0.6 * NEWEST;
  return before * (1 - weight) + now * weight;
}

function smooth(before: number, now: number): number {
  return Number.isNaN(before) ? now : before * (1 - NEWEST) + now * NEWEST;
}

/** Splits `budget` so that nobody gets more than it wants and nobody is cut while another gets more: the smallest wants
 * are served whole, the rest share equally, down to single tokens, which go to the first ones. The whole budget is used
 * if the wants allow it. With prompts in order of age the oldest therefore advances whatever the budget is. */
export function shareFairly(wants: readonly number[], budget: number): number[] {
  const order = wants.toSorted((a, b) => a - b);
  let left = budget;
  let level = 0;
  for (const [i, want] of order.entries()) {
    const open = order.length - i;
    level = Math.floor(left / open);
    if (want > level) break;
    level = want;
    left -= want;
  }
  const shares = wants.map((want) => Math.min(want, level));
  let rest = budget - shares.reduce((sum, share) => sum + share, 0);
  for (const [i, want] of wants.entries()) {
    if (rest === 0) break;
    if (want <= level) continue;
    shares[i] = level + 1;
    rest--;
  }
  return shares;
}
