// Instances whose owner is gone. Everybody remembers what owners said last and repeats what became of it, so that one of
// the survivors, the same one in every view, takes it over and places it again. Instances that were stopped on purpose stay so.

import type { Member } from "./membership.ts";
import { claimsOn } from "./rank-host.ts";
import type { EndedInstance, InstanceState, NodeId } from "./types.ts";

/** So long an orphan is known before somebody takes it: every view has heard of it and of each other by then. */
export const SETTLE_MS = 2000;
/** So long a node that was cut off may bring back what was stopped meanwhile, and is told better. */
export const ENDED_MS = 600_000;
const MOST = 64;

interface Orphan {
  state: InstanceState;
  since: number;
}

export class Orphans {
  readonly #id: NodeId;
  readonly #now: () => number;
  /** What live owners said last. */
  readonly #seen = new Map<string, InstanceState>();
  readonly #orphans = new Map<string, Orphan>();
  readonly #ended = new Map<string, { epoch: number; at: number; own: boolean }>();

  constructor(id: NodeId, now: () => number) {
    this.#id = id;
    this.#now = now;
  }

  /** To be told to everybody. */
  published(): InstanceState[] {
    return [...this.#orphans.values()].map(({ state }) => state);
  }

  /** What this node stopped itself, and what others must be told because they still own it or hold it for an orphan. */
  ended(members: readonly Member[]): EndedInstance[] {
    const isClaimed = (id: string) =>
      claimsOn(id, members).length > 0 ||
      members.some(({ record }) => record.info.orphans.some(({ spec }) => spec.id === id));
    return [...this.#ended]
      .filter(([id, { own }]) => own || isClaimed(id))
      .map(([id, { epoch }]) => ({ id, epoch }));
  }

  /** This node stopped its instance on purpose. */
  end(id: string, epoch: number): void {
    this.#bury(id, epoch, true);
  }

  /** This node gives an instance to the first rank of its new spec. */
  handOver(state: InstanceState): void {
    const { id } = state.spec;
    this.#seen.delete(id);
    const known = this.#orphans.get(id);
    if (known === undefined || replaces(state, known.state))
      this.#orphans.set(id, { state, since: this.#now() });
  }

  /** Brings the memory up to date with the view; the orphans that are this node's to adopt. */
  step(members: readonly Member[]): InstanceState[] {
    this.#learnEnds(members);
    this.#remember(members);
    for (const { record } of members) for (const state of record.info.orphans) this.#orphaned(state, members);
    const adopted: InstanceState[] = [];
    for (const [id, { state, since }] of this.#orphans) {
      if (this.#isOver(id, state.epoch, members)) this.#orphans.delete(id);
      else if (this.#now() - since >= SETTLE_MS && heirOf(state, members) === this.#id) {
        this.#orphans.delete(id);
        adopted.push(state);
      }
    }
    return adopted;
  }

  #learnEnds(members: readonly Member[]): void {
    const now = this.#now();
    for (const [id, { at }] of this.#ended) if (now - at > ENDED_MS) this.#ended.delete(id);
    for (const { record } of members) {
      for (const { id, epoch } of record.info.ended) this.#bury(id, epoch, false);
      for (const { spec, epoch, phase } of record.info.instances)
        if (phase === "gone") this.#bury(spec.id, epoch, false);
    }
  }

  #bury(id: string, epoch: number, own: boolean): void {
    const known = this.#ended.get(id);
    if (known === undefined && this.#ended.size >= MOST) {
      const oldest = this.#ended.keys().next().value;
      if (oldest !== undefined) this.#ended.delete(oldest);
    }
    this.#ended.set(id, {
      epoch: Math.max(epoch, known?.epoch ?? 0),
      at: known?.at ?? this.#now(),
      own: own || known?.own === true,
    });
  }

  #remember(members: readonly Member[]): void {
    for (const [id, state] of this.#seen)
      if (claimsOn(id, members).length === 0) {
        this.#seen.delete(id);
        this.#orphaned(state, members);
      }
    for (const { record } of members)
      for (const state of record.info.instances)
        if (state.phase !== "gone") {
          const known = this.#seen.get(state.spec.id);
          if (known === undefined || known.epoch <= state.epoch) this.#seen.set(state.spec.id, state);
        }
  }

  #orphaned(state: InstanceState, members: readonly Member[]): void {
    const { id } = state.spec;
    if (this.#isOver(id, state.epoch, members)) return;
    const known = this.#orphans.get(id);
    if (known !== undefined && !replaces(state, known.state)) return;
    if (known === undefined && this.#orphans.size >= MOST) return;
    this.#orphans.set(id, { state, since: this.#now() });
  }

  /** Somebody has it, or nobody wants it. */
  #isOver(id: string, epoch: number, members: readonly Member[]): boolean {
    return this.#ended.has(id) || claimsOn(id, members).some((claim) => claim.epoch >= epoch);
  }
}

/** Of two tales of an orphan every view keeps the same one: the heir is read from it. */
function replaces(a: InstanceState, b: InstanceState): boolean {
  const nodes = ({ spec }: InstanceState) => spec.ranks.map(({ node }) => node).join();
  return a.epoch > b.epoch || (a.epoch === b.epoch && nodes(a) > nodes(b));
}

/** The first of its ranks whose node is here; else the lowest id of those that have the model, or of all. */
export function heirOf({ spec }: InstanceState, members: readonly Member[]): NodeId | undefined {
  const here = members.map(({ record }) => record.info.id).sort();
  const rank = spec.ranks.find(({ node }) => here.includes(node));
  if (rank !== undefined) return rank.node;
  return here.find((id) => hasModel(id, spec.model, members)) ?? here[0];
}

/** Whether the node has all of the model's files. */
export function hasModel(id: NodeId, model: string, members: readonly Member[]): boolean {
  const member = members.find(({ record }) => record.info.id === id);
  return member?.record.info.models.some((m) => m.model === model && m.bytes >= m.total) === true;
}
