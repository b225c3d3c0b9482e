// Where other nodes may be reached, and when to try next: addresses from beacons, from --peer, and from nodes that were
// met before. Pure bookkeeping: mesh.ts dials. Every failure doubles the pause, up to a limit; the number of addresses is bounded.

import type { NodeId } from "../types.ts";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
/** An address that only beacons know is forgotten after so long without one. */
const BEACON_LIFE_MS = 30_000;
const MAX_ADDRESSES = 512;
/** Beyond so many, hints are not taken. */
const MAX_HINTED = 256;

export interface Candidate {
  readonly address: string;
  /** Who should answer there; undefined: whoever does (--peer). */
  id: NodeId | undefined;
  /** Asked for by a person, or met before: never forgotten by age. */
  lasting: boolean;
  heardMs: number;
  nextTryMs: number;
  failures: number;
  dialling: boolean;
  /** Why the last try failed; "" = it did not. */
  problem: string;
}

export class AddressBook {
  readonly #candidates = new Map<string, Candidate>();

  /** An address was heard of. A beacon brings a node that had gone back at once. */
  learn(address: string, id: NodeId | undefined, lasting: boolean, nowMs: number): void {
    const known = this.#candidates.get(address);
    if (known === undefined) {
      if (this.#candidates.size >= MAX_ADDRESSES && !this.#dropOldest()) return;
      this.#candidates.set(address, {
        address,
        id,
        lasting,
        heardMs: nowMs,
        nextTryMs: nowMs,
        failures: 0,
        dialling: false,
        problem: "",
      });
      return;
    }
    known.heardMs = nowMs;
    known.lasting ||= lasting;
    if (id === undefined || known.id === id) return;
    // Another node has taken the address over.
    known.id = id;
    known.nextTryMs = nowMs;
    known.failures = 0;
  }

  /** What may be a lie about `id`: takes no address from another node, and no room from addresses that are known. */
  hint(address: string, id: NodeId, nowMs: number): void {
    const known = this.#candidates.get(address);
    if (known === undefined ? this.#candidates.size < MAX_HINTED : known.id === id)
      this.learn(address, id, false, nowMs);
  }

  /** Addresses to try now: those of nodes that are not `linked`, one of a node at a time. */
  due(nowMs: number, linked: (id: NodeId) => boolean): Candidate[] {
    const chosen: Candidate[] = [];
    const busy = new Set<NodeId>();
    for (const { id, dialling } of this.#candidates.values()) if (dialling && id !== undefined) busy.add(id);
    for (const candidate of [...this.#candidates.values()].sort(byScope)) {
      const { id, dialling, nextTryMs, heardMs, lasting } = candidate;
      if (!lasting && nowMs - heardMs > BEACON_LIFE_MS) {
        this.#candidates.delete(candidate.address);
        continue;
      }
      if (dialling || nextTryMs > nowMs || (id !== undefined && (linked(id) || busy.has(id)))) continue;
      if (id !== undefined) busy.add(id);
      chosen.push(candidate);
    }
    return chosen;
  }

  succeeded(candidate: Candidate, id: NodeId): void {
    candidate.dialling = false;
    candidate.id = id;
    candidate.failures = 0;
    candidate.problem = "";
    candidate.nextTryMs = 0;
  }

  failed(candidate: Candidate, problem: string, nowMs: number): void {
    candidate.dialling = false;
    candidate.problem = problem;
    candidate.nextTryMs = nowMs + Math.min(FIRST_PAUSE_MS * 2 ** candidate.failures, LONGEST_PAUSE_MS);
    candidate.failures++;
  }

  /** Of one node, the ones that worked first. */
  addressesOf(id: NodeId): string[] {
    return [...this.#candidates.values()]
      .filter((candidate) => candidate.id === id)
      .sort((a, b) => a.failures - b.failures || byScope(a, b) || b.heardMs - a.heardMs)
      .map(({ address }) => address);
  }

  /** Where these nodes were is of no interest any more. */
  forget(gone: (id: NodeId) => boolean): void {
    for (const [address, { id }] of this.#candidates)
      if (id !== undefined && gone(id)) this.#candidates.delete(address);
  }

  /** Addresses that do not answer, with the reason. */
  problems(): { address: string; problem: string }[] {
    return [...this.#candidates.values()].flatMap(({ address, problem }) =>
      problem === "" ? [] : [{ address, problem }],
    );
  }

  #dropOldest(): boolean {
    const oldest = [...this.#candidates.values()]
      .filter(({ lasting, dialling }) => !lasting && !dialling)
      .sort((a, b) => a.heardMs - b.heardMs)[0];
    return oldest !== undefined && this.#candidates.delete(oldest.address);
  }
}

/** Link-local IPv6 addresses last: they are as good, but say nothing to people and other machines. */
function byScope(a: Candidate, b: Candidate): number {
  return Number(a.address.startsWith("[fe80:")) - Number(b.address.startsWith("[fe80:"));
}
