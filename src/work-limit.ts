// A limit on the time that this thread works for something. It counts processor time: what is done in time on an idle machine is
// also done in time on one that is busy with other work, only later.

export class WorkLimit {
  readonly #before = process.threadCpuUsage();
  #nextLookMs: number;

  /** Begins now. */
  constructor(readonly ms: number) {
    this.#nextLookMs = performance.now() + ms;
  }

  /** What is left, in milliseconds; below 0 when the limit is passed. */
  get leftMs(): number {
    const { user, system } = process.threadCpuUsage(this.#before);
    return this.ms - (user + system) / 1000;
  }

  /** Whether it is passed. A look at the clock, as long as that says enough. */
  get passed(): boolean {
    const now = performance.now();
    if (now < this.#nextLookMs) return false;
    const left = this.leftMs;
    this.#nextLookMs = now + left;
    return left <= 0;
  }
}
