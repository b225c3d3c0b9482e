// The ranks that this node computes: what the records of owners say that it should, against what runs here. Reserves
// memory before anything starts, starts and stops runners, and writes RankStates for the owners to read. There are no
// commands that could be lost: an owner's record is the order, and it is compared with what is here at every turn.

import type { Member } from "./membership.ts";
import type { MemoryLedger } from "./memory-ledger.ts";
import { reasonOf } from "./reason.ts";
import type { InstancePhase, InstanceSpec, InstanceState, NodeId, RankState } from "./types.ts";

export interface RankOrder {
  spec: InstanceSpec;
  epoch: number;
  owner: NodeId;
  rank: number;
}

/** Starts and ends the processes. Answers come through RankHost's methods, with the epoch that was asked for. */
export interface RankRunner {
  start(order: RankOrder): void;
  /** Ends in `stopped`, soon: it is killed where it does not end by itself. */
  stop(instance: string, epoch: number): void;
}

interface Wanted extends RankOrder {
  /** Run of the owner. */
  boot: string;
}

/** Ended epochs that are remembered. */
const MOST_ENDED = 256;

/** Phases of an instance in which its ranks compute. */
const ACTIVE: readonly InstancePhase[] = ["fetching", "loading", "ready", "stopping"];

interface Held {
  order: Wanted;
  state: RankState;
  /** over: nothing runs any more, the state is for the owner to read. */
  life: "running" | "stopping" | "over";
}

export interface RankHostOptions {
  id: NodeId;
  ledger: MemoryLedger;
  runner: RankRunner;
  /** Monotonic milliseconds. */
  now: () => number;
}

export class RankHost {
  /** By instance: a node computes at most one rank of an instance. */
  readonly #held = new Map<string, Held>();
  /** The last epoch that ended here, by instance and run of its owner: its other ranks have lost this one for good. */
  readonly #ended = new Map<string, number>();
  /** Whose epochs of which number began here: a process tells of itself by instance and epoch, so in two halves of a split cluster
   * that come together no second owner may use a number again. */
  readonly #begun = new Map<string, string>();
  readonly #options: RankHostOptions;

  constructor(options: RankHostOptions) {
    this.#options = options;
  }

  /** Also of those that are on their way out: they hold memory until they are gone. */
  states(): RankState[] {
    return [...this.#held.values()].map(({ state }) => ({ ...state }));
  }

  /** What runs here or is on its way out. */
  running(): { instance: string; epoch: number; owner: NodeId; rank: number }[] {
    return [...this.#held.values()]
      .filter(({ life }) => life !== "over")
      .map(({ order: { spec, epoch, owner, rank } }) => ({ instance: spec.id, epoch, owner, rank }));
  }

  /** Compares what is wanted with what is here. True where a state changed. */
  step(members: readonly Member[]): boolean {
    const wanted = this.#wanted(members);
    let changed = false;
    for (const [instance, held] of this.#held) {
      const order = wanted.get(instance);
      if (order !== undefined && order.epoch === held.order.epoch && order.owner === held.order.owner)
        continue;
      changed = this.#end(instance, held) || changed;
    }
    for (const [instance, order] of wanted)
      if (!this.#held.has(instance)) changed = this.#begin(instance, order) || changed;
    return changed;
  }

  progress(instance: string, epoch: number, phase: "fetching" | "loading", fraction: number): void {
    const held = this.#running(instance, epoch);
    if (held === undefined || held.state.phase === "ready") return;
    held.state = { ...held.state, phase, progress: Math.min(1, Math.max(0, fraction)) };
  }

  /** Loaded, and connected with the other ranks of this epoch. */
  ready(instance: string, epoch: number): void {
    const held = this.#running(instance, epoch);
    if (held !== undefined) held.state = { ...held.state, phase: "ready", progress: 1 };
  }

  /** The rank's process is gone, or never came to be. */
  failed(instance: string, epoch: number, cause: Exclude<RankState["cause"], "none">, reason: string): void {
    const held = this.#held.get(instance);
    if (held === undefined || held.order.epoch !== epoch) return;
    this.#options.ledger.release(instance);
    if (held.life === "stopping") {
      this.#held.delete(instance);
      return;
    }
    held.life = "over";
    held.state = { ...held.state, phase: "failed", progress: 0, cause, reason: reasonOf(reason), bytes: 0 };
  }

  /** The process that `stop` was called for is gone. */
  stopped(instance: string, epoch: number): void {
    const held = this.#held.get(instance);
    if (held === undefined || held.order.epoch !== epoch || held.life !== "stopping") return;
    this.#options.ledger.release(instance);
    this.#held.delete(instance);
  }

  #running(instance: string, epoch: number): Held | undefined {
    const held = this.#held.get(instance);
    return held?.order.epoch === epoch && held.life === "running" ? held : undefined;
  }

  /** Of two owners of one instance the newer one holds: both know that the other has to give way. */
  #wanted(members: readonly Member[]): Map<string, Wanted> {
    const wanted = new Map<string, Wanted>();
    for (const { record } of members)
      for (const { spec, phase, epoch } of record.info.instances) {
        if (!ACTIVE.includes(phase)) continue;
        const share = spec.ranks.find(({ node }) => node === this.#options.id);
        if (share === undefined) continue;
        const order = { spec, epoch, owner: record.info.id, rank: share.rank, boot: record.boot };
        const other = wanted.get(spec.id);
        if (other === undefined || isNewer(order, other)) wanted.set(spec.id, order);
      }
    return wanted;
  }

  #begin(instance: string, order: Wanted): boolean {
    const { ledger, runner, now } = this.#options;
    const { spec, epoch, owner, rank } = order;
    const bytes = spec.bytes[rank] ?? 0;
    if (epoch <= (this.#ended.get(endKey(order)) ?? 0)) {
      this.#refuse(instance, order, "group", "its rank of this epoch has ended");
      return true;
    }
    const number = `${spec.id} ${epoch}`;
    const other = this.#begun.get(number);
    if (other !== undefined && other !== order.boot) {
      this.#refuse(instance, order, "group", "another owner's epoch of the same number began here");
      return true;
    }
    const refusal = ledger.reserve({ key: instance, label: spec.model, bytes, busy: true, usedAt: now() });
    // Memory on its way back is waited for; the owner has a limit for ranks that do not begin.
    if (refusal !== undefined && [...this.#held.values()].some(({ life }) => life === "stopping"))
      return false;
    if (refusal !== undefined) {
      this.#refuse(instance, order, "memory", refusal);
      return true;
    }
    const state: RankState = {
      ...{ instance, epoch, owner, rank, bytes },
      ...{ phase: "fetching", progress: 0, reason: "", cause: "none" },
    };
    this.#held.set(instance, { order, state, life: "running" });
    this.#begun.set(number, order.boot);
    if (this.#begun.size > MOST_ENDED) this.#begun.delete(this.#begun.keys().next().value ?? number);
    runner.start({ spec, epoch, owner, rank });
    return true;
  }

  #refuse(instance: string, order: Wanted, cause: "memory" | "group", reason: string): void {
    const { epoch, owner, rank } = order;
    const state: RankState = {
      ...{ instance, epoch, owner, rank, bytes: 0 },
      ...{ phase: "failed", progress: 0, reason: reasonOf(reason), cause },
    };
    this.#held.set(instance, { order, state, life: "over" });
  }

  #end(instance: string, held: Held): boolean {
    if (held.life === "stopping") return false;
    const key = endKey(held.order);
    this.#ended.delete(key);
    this.#ended.set(key, held.order.epoch);
    if (this.#ended.size > MOST_ENDED) this.#ended.delete(this.#ended.keys().next().value ?? key);
    if (held.life === "over") {
      this.#held.delete(instance);
      return true;
    }
    held.life = "stopping";
    this.#options.runner.stop(instance, held.order.epoch);
    return true;
  }
}

function endKey({ spec, boot }: Wanted): string {
  return `${spec.id} ${boot}`;
}

export interface Claim {
  epoch: number;
  owner: NodeId;
}

/** Whether claim a on an instance beats claim b: on every node the same. */
export function isNewer(a: Claim, b: Claim): boolean {
  return a.epoch > b.epoch || (a.epoch === b.epoch && a.owner > b.owner);
}

/** Every owner's state of an instance in the view. */
export function claimsOn(
  instance: string,
  members: readonly Member[],
): { owner: NodeId; epoch: number; state: InstanceState }[] {
  return members.flatMap(({ record }) =>
    record.info.instances
      .filter(({ spec, phase }) => spec.id === instance && phase !== "gone")
      .map((state) => ({ owner: record.info.id, epoch: state.epoch, state })),
  );
}
