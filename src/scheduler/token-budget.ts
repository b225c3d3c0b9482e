// How many prompt tokens a step may carry, and who gets them.
//
// Alone, a prompt gets the engine's largest step. Beside running streams a step must not take much longer than
// `targetMs`, or the streams stall: the budget then follows from the measured time a token. It never falls below
// `minTokens`, so prompts always advance.

export class TokenBudget {
  readonly #maxTokens: number;
  readonly #targetMs: number;
  readonly #minTokens: number;
  /** Smoothed time a token in steps with prompts; NaN until measured. */
  #msPerToken = Number.NaN;

  constructor(options: { maxTokens: number; targetMs: number; minTokens: number }) {
    this.#maxTokens = options.maxTokens;
    this.#targetMs = options.targetMs;
    this.#minTokens = Math.min(options.minTokens, options.maxTokens);
  }

  /** Learns from a finished step. Steps with few tokens say nothing about the cost of many. */
  observe(tokens: number, computeNs: number): void {
    if (tokens < this.#minTokens || computeNs <= 0) return;
    const ms = computeNs / 1e6 / tokens;
    this.#msPerToken = Number.isNaN(this.#msPerToken) ? ms : this.#msPerToken * 0.75 + ms * 0.25;
  }

  /** Prompt tokens for a step that already carries `decodeRows` decode rows. */
  promptTokens(decodeRows: number): number {
    const room = this.#maxTokens - decodeRows;
    if (decodeRows === 0) return room;
    // Before the first measurement a small piece finds out what a token costs.
    const affordable = Number.isNaN(this.#msPerToken)
      ? 4 * this.#minTokens
      : Math.floor(this.#targetMs / this.#msPerToken);
    return Math.max(0, Math.min(room, Math.max(this.#minTokens, affordable)));
  }
}

/** Splits `budget` so that nobody gets more than it wants and nobody is cut while another gets more: the smallest wants
 * are served whole, the rest share equally, down to single tokens. The whole budget is used if the wants allow it. */
export function shareFairly(wants: readonly number[], budget: number): number[] {
  const shares = new Array<number>(wants.length).fill(0);
  const order = wants.map((_, index) => index).sort((a, b) => (wants[a] ?? 0) - (wants[b] ?? 0) || a - b);
  let left = budget;
  let open = order.length;
  for (const index of order) {
    const share = Math.min(wants[index] ?? 0, Math.floor(left / open));
    shares[index] = share;
    left -= share;
    open--;
  }
  return shares;
}
