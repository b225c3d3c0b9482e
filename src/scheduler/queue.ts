// Sequences that wait for a slot and pages, oldest first. One that was put back keeps its age, so it comes before
// everything that arrived later and cannot be starved.

import type { Sequence } from "./sequence.ts";

export class WaitingQueue {
  readonly #sequences: Sequence[] = [];

  get length(): number {
    return this.#sequences.length;
  }

  first(): Sequence | undefined {
    return this.#sequences[0];
  }

  /** Inserts by age; a new arrival ends up last at once. */
  add(sequence: Sequence): void {
    let place = this.#sequences.length;
    while (place > 0 && (this.#sequences[place - 1]?.order ?? -1) > sequence.order) place--;
    this.#sequences.splice(place, 0, sequence);
  }

  /** False when it was not waiting. */
  remove(sequence: Sequence): boolean {
    const place = this.#sequences.indexOf(sequence);
    if (place < 0) return false;
    this.#sequences.splice(place, 1);
    return true;
  }

  /** In order of age; not to be changed while iterating. */
  [Symbol.iterator](): Iterator<Sequence> {
    return this.#sequences[Symbol.iterator]();
  }
}
