// Log-probabilities of a prompt's own tokens, from the raw logits of the positions in front of them.

import type { TopLogprobs } from "../engine/protocol.ts";

/** Fills in one entry a prompt token; the first token has none. Survives a recompute: known entries are not asked for again. */
export class PromptLogprobs {
  readonly logprobs: (number | null)[];
  readonly top: (TopLogprobs | null)[];
  readonly #alternatives: number;
  #known = 1;

  constructor(promptTokens: number, alternatives: number) {
    this.logprobs = new Array<number | null>(promptTokens).fill(null);
    this.top = new Array<TopLogprobs | null>(promptTokens).fill(null);
    this.#alternatives = alternatives;
  }

  /** First prompt index whose log-probability is missing; the prompt's length when complete. */
  get known(): number {
    return this.#known;
  }

  get complete(): boolean {
    return this.#known >= this.logprobs.length;
  }

  /** Logits [positions, vocab] of the positions from `firstPosition` on, with the prompt's tokens. */
  accept(prompt: Uint32Array, firstPosition: number, logits: Float32Array, vocab: number): void {
    const positions = Math.floor(logits.length / vocab);
    for (let i = 0; i < positions; i++) {
      const index = firstPosition + i + 1;
      if (index !== this.#known || index >= this.logprobs.length) continue;
      const row = logits.subarray(i * vocab, (i + 1) * vocab);
      const shift = logSumExp(row);
      this.logprobs[index] = (row[prompt[index] ?? 0] ?? Number.NEGATIVE_INFINITY) - shift;
      this.top[index] = mostProbable(row, this.#alternatives, shift);
      this.#known = index + 1;
    }
  }
}

/** ln Σ exp(x), without overflow. */
export function logSumExp(row: Float32Array): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < row.length; i++) if ((row[i] ?? 0) > largest) largest = row[i] ?? 0;
  if (largest === Number.NEGATIVE_INFINITY) return largest;
  let sum = 0;
  for (let i = 0; i < row.length; i++) sum += Math.exp((row[i] ?? 0) - largest);
  return largest + Math.log(sum);
}

/** The `count` largest entries minus `shift`, largest first; the first index wins ties. */
function mostProbable(row: Float32Array, count: number, shift: number): TopLogprobs {
  const best: TopLogprobs = [];
  if (count === 0) return best;
  let threshold = Number.NEGATIVE_INFINITY;
  for (let token = 0; token < row.length; token++) {
    const value = row[token] ?? 0;
    if (best.length === count && value <= threshold) continue;
    let place = best.length;
    while (place > 0 && (best[place - 1]?.[1] ?? 0) < value) place--;
    best.splice(place, 0, [token, value]);
    if (best.length > count) best.pop();
    threshold = best.at(-1)?.[1] ?? Number.NEGATIVE_INFINITY;
  }
  for (const entry of best) entry[1] -= shift;
  return best;
}
