// How often each token occurred in a sequence, in the form that the sampler's penalties read: triples of
// (token, times in the output, times in prompt and output).

export class TokenHistory {
  readonly #places = new Map<number, number>();
  #triples = new Uint32Array(3 * 32);

  add(token: number, inOutput: boolean): void {
    let place = this.#places.get(token);
    if (place === undefined) {
      place = this.#places.size * 3;
      if (place === this.#triples.length) {
        const larger = new Uint32Array(this.#triples.length * 2);
        larger.set(this.#triples);
        this.#triples = larger;
      }
      this.#places.set(token, place);
      this.#triples[place] = token;
    }
    if (inOutput) this.#triples[place + 1] = (this.#triples[place + 1] ?? 0) + 1;
    this.#triples[place + 2] = (this.#triples[place + 2] ?? 0) + 1;
  }

  /** A view that the next `add` may invalidate. */
  view(): Uint32Array {
    return this.#triples.subarray(0, this.#places.size * 3);
  }
}
