// Seconds after which a refused client should try again, from how long requests have taken lately.

export class RetryEstimate {
  readonly #streams: number;
  #requestMs = 1000;

  constructor(streams: number) {
    this.#streams = streams;
  }

  /** Learns from a request that ran to its end. */
  observe(requestMs: number): void {
    this.#requestMs = this.#requestMs * 0.8 + requestMs * 0.2;
  }

  /** Time until `ahead` requests have been served, 1 to 60 (clients ignore more). */
  seconds(ahead: number): number {
    const rounds = Math.ceil((ahead + 1) / this.#streams);
    return Math.max(1, Math.min(60, Math.ceil((rounds * this.#requestMs) / 1000)));
  }
}
