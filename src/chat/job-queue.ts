// Whose turn it is in the text worker: new jobs before those that have had a slice, small new ones before large, and
// nobody waits for ever. A pure data structure; time comes in as an argument.

/** However many new jobs come, the job that has waited longest gets a slice at least this often. */
const LONGEST_WAIT_MS = 16;

interface Waiting<T> {
  readonly job: T;
  readonly size: number;
  /** When it came, or had its last slice. */
  readonly sinceMs: number;
  readonly fresh: boolean;
}

export class JobQueue<T> {
  #waiting: Waiting<T>[] = [];
  #lastOldestMs = Number.NEGATIVE_INFINITY;

  /** A new job. `size`: roughly how much text it has, in any unit. */
  add(job: T, size: number, nowMs: number): void {
    this.#waiting.push({ job, size, sinceMs: nowMs, fresh: true });
  }

  /** A job that had a slice and needs more. */
  putBack(job: T, nowMs: number): void {
    this.#waiting.push({ job, size: Number.POSITIVE_INFINITY, sinceMs: nowMs, fresh: false });
  }

  /** Takes out the job whose turn it is; undefined when none waits. */
  next(nowMs: number): T | undefined {
    let oldest: Waiting<T> | undefined;
    let smallest: Waiting<T> | undefined;
    for (const waiting of this.#waiting) {
      if (oldest === undefined || waiting.sinceMs < oldest.sinceMs) oldest = waiting;
      if (waiting.fresh && (smallest === undefined || waiting.size < smallest.size)) smallest = waiting;
    }
    const oldestIsDue = nowMs - this.#lastOldestMs > LONGEST_WAIT_MS;
    const chosen = oldestIsDue ? oldest : (smallest ?? oldest);
    if (chosen === oldest) this.#lastOldestMs = nowMs;
    this.#waiting = this.#waiting.filter((waiting) => waiting !== chosen);
    return chosen?.job;
  }

  /** Drops the jobs for which `test` holds. */
  remove(test: (job: T) => boolean): void {
    this.#waiting = this.#waiting.filter(({ job }) => !test(job));
  }
}
