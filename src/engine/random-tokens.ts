// Reproducible random token ids for measurements, none of which ends a sequence.

export class RandomTokens {
  readonly #vocab: number;
  readonly #avoided: ReadonlySet<number>;
  #state: number;

  /** The same seed gives the same tokens (xorshift32). */
  constructor(seed: number, vocab: number, avoided: readonly number[]) {
    this.#vocab = vocab;
    this.#avoided = new Set(avoided);
    this.#state = (Math.imul(seed, 0x9e3779b1) ^ 0x5bd1e995) >>> 0 || 1;
  }

  tokens(count: number): number[] {
    const list: number[] = [];
    while (list.length < count) {
      this.#state ^= this.#state << 13;
      this.#state ^= this.#state >>> 17;
      this.#state = (this.#state ^ (this.#state << 5)) >>> 0;
      const token = this.#state % this.#vocab;
      if (!this.#avoided.has(token)) list.push(token);
    }
    return list;
  }
}
