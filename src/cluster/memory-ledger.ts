// What a node's memory is promised to: every rank reserves its planned bytes before it loads, and nothing is promised twice.
// Says what is loaded, what would have to go for a further model, and how much is left. Pure.

import { PLANNED_SHARE } from "../model/memory-plan.ts";
import { gigabytes } from "./placement-words.ts";

export interface LedgerEntry {
  /** Instance. */
  key: string;
  /** Model, for people. */
  label: string;
  /** Planned bytes. */
  bytes: number;
  /** Runs requests or loads. */
  busy: boolean;
  /** When it was used last, milliseconds of one clock. */
  usedAt: number;
}

export class MemoryLedger {
  readonly #entries = new Map<string, LedgerEntry>();
  #capacity: number;

  /** capacity: bytes that models may have on this node, those that are loaded included. */
  constructor(capacity: number) {
    this.#capacity = capacity;
  }

  /** Memory came or went beside the models. What is reserved stays so. */
  setCapacity(bytes: number): void {
    this.#capacity = Math.max(0, bytes);
  }

  /** Bytes that may be planned in all. */
  get planned(): number {
    return Math.floor(this.#capacity * PLANNED_SHARE);
  }

  get reserved(): number {
    let sum = 0;
    for (const { bytes } of this.#entries.values()) sum += bytes;
    return sum;
  }

  get free(): number {
    return Math.max(0, this.planned - this.reserved);
  }

  /** What a placement may count on (NodeInfo.memory.available): of it PLANNED_SHARE is free. */
  get available(): number {
    return Math.floor(this.free / PLANNED_SHARE);
  }

  entries(): LedgerEntry[] {
    return [...this.#entries.values()].map((entry) => ({ ...entry }));
  }

  has(key: string): boolean {
    return this.#entries.has(key);
  }

  /** undefined: it is reserved. Otherwise why not, with numbers; nothing has changed then. */
  reserve(entry: LedgerEntry): string | undefined {
    if (this.#entries.has(entry.key)) return `${entry.label} is loaded here already`;
    if (entry.bytes <= this.free) {
      this.#entries.set(entry.key, { ...entry });
      return undefined;
    }
    const others = this.entries().map(({ label, bytes }) => `${label} ${gigabytes(bytes)}`);
    return `${entry.label} needs ${gigabytes(entry.bytes)}, ${gigabytes(this.free)} of ${gigabytes(this.planned)} are free: ${gigabytes(entry.bytes - this.free)} missing${others.length === 0 ? "" : ` (loaded: ${others.join(", ")})`}`;
  }

  /** The rank's process is gone and its memory with it. */
  release(key: string): void {
    this.#entries.delete(key);
  }

  use(key: string, busy: boolean, now: number): void {
    const entry = this.#entries.get(key);
    if (entry !== undefined) Object.assign(entry, { busy, usedAt: now });
  }

  /**
   * What would be unloaded so that `bytes` more fit: idle entries, those that were used longest ago first, and none more
   * than needed. undefined: not even all idle ones together would do.
   */
  wouldUnload(bytes: number): LedgerEntry[] | undefined {
    let missing = bytes - this.free;
    const out: LedgerEntry[] = [];
    const idle = this.entries()
      .filter(({ busy }) => !busy)
      .sort((a, b) => a.usedAt - b.usedAt || (a.key < b.key ? -1 : 1));
    for (const entry of idle) {
      if (missing <= 0) break;
      out.push(entry);
      missing -= entry.bytes;
    }
    if (missing > 0) return undefined;
    // An early small one may not be needed any more once a later large one goes.
    return out.filter((entry) => {
      if (missing + entry.bytes > 0) return true;
      missing += entry.bytes;
      return false;
    });
  }
}
