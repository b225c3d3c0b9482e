// Time that passes only when something happens: events in the order of their times, ties in the order of their making, and
// one seeded source of everything random, so that a seed is a run.

import { seededRandom } from "../tools/seeded-random.ts";

interface Event {
  at: number;
  order: number;
  run: () => void;
}

export class VirtualTime {
  /** Milliseconds. */
  now = 0;
  readonly #heap: Event[] = [];
  #order = 0;

  after(ms: number, run: () => void): void {
    this.#push({ at: this.now + Math.max(0, ms), order: this.#order++, run });
  }

  /** Runs `run` now and every `ms` for as long as it returns true. */
  every(ms: number, run: () => boolean): void {
    const again = () => {
      if (run()) this.after(ms, again);
    };
    again();
  }

  /** Lets time pass. */
  runUntil(end: number): void {
    for (let event = this.#heap[0]; event !== undefined && event.at <= end; event = this.#heap[0]) {
      this.#pop();
      this.now = event.at;
      event.run();
    }
    this.now = end;
  }

  #push(event: Event): void {
    const heap = this.#heap;
    heap.push(event);
    let i = heap.length - 1;
    while (i > 0) {
      const parent = (i - 1) >> 1;
      if (!this.#swapIf(i, parent)) break;
      i = parent;
    }
  }

  #pop(): void {
    const heap = this.#heap;
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return;
    heap[0] = last;
    let i = 0;
    for (;;) {
      const left = 2 * i + 1;
      const right = left + 1;
      const least = right < heap.length && this.#before(right, left) ? right : left;
      if (least >= heap.length || !this.#swapIf(least, i)) break;
      i = least;
    }
  }

  #before(a: number, b: number): boolean {
    const x = this.#heap[a] as Event;
    const y = this.#heap[b] as Event;
    return x.at < y.at || (x.at === y.at && x.order < y.order);
  }

  #swapIf(child: number, parent: number): boolean {
    if (!this.#before(child, parent)) return false;
    const heap = this.#heap;
    [heap[child], heap[parent]] = [heap[parent] as Event, heap[child] as Event];
    return true;
  }
}

export class Dice {
  readonly #next: () => number;

  constructor(seed: number) {
    this.#next = seededRandom(seed);
    // Small seeds begin alike.
    for (let i = 0; i < 8; i++) this.#next();
  }

  /** [low, high) */
  between(low: number, high: number): number {
    return low + (high - low) * this.#next();
  }

  /** 0 … n - 1 */
  below(n: number): number {
    return Math.floor(this.#next() * n);
  }

  chance(p: number): boolean {
    return this.#next() < p;
  }

  pick<T>(list: readonly T[]): T {
    return list[this.below(list.length)] as T;
  }
}
