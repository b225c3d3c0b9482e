// The instances that this node owns, from the request to the end: placing → fetching → loading → ready, and from anywhere
// to failed, stopping, gone. The owner alone decides; ranks are told by its record and answer by theirs. What was lost is
// placed again on who is left, and moves back when a lost node returns. Loading is tried a bounded number of times; after
// that only a change of the cluster starts it anew, or for ranks that cannot reach each other a minute's rest. No I/O.

import { CaravanError } from "../errors.ts";
import {
  DRAIN_MS,
  FREE_MS,
  GONE_SHOWN_MS,
  HEALTHY_MS,
  MOST_ATTEMPTS,
  MOST_LOST,
  MOST_OWNED,
  REFUSED_MS,
  REGROUP_MS,
  REPLACE_MS,
  RETURN_MS,
  STALL_MS,
  UNLOAD_CHECK_MS,
  UNLOAD_MS,
} from "./instance-limits.ts";
import { judgeLoading } from "./instance-loading.ts";
import { idleInTheWay, isInTheWay, worthwhileMove } from "./instance-moves.ts";
import type { PlacedSpec, Placer } from "./instance-placer.ts";
import { clusterStamp, hasRanks, isEnded, nameOf, ranksOf, type SeenRank } from "./instance-view.ts";
import type { Member } from "./membership.ts";
import { hasModel } from "./orphans.ts";
import { claimsOn, isNewer } from "./rank-host.ts";
import { reasonOf } from "./reason.ts";
import type { InstancePhase, InstanceState, NodeId, PlacementRequest, RankState } from "./types.ts";

export interface InstanceLifeOptions {
  id: NodeId;
  /** Monotonic milliseconds. */
  now: () => number;
  placer: Placer;
  /** Every request that runs on this epoch of the instance ends with the error. */
  endRequests: (instance: string, epoch: number, error: CaravanError) => void;
  /** The instance belongs to the first rank of its spec from now on. */
  handOver: (state: InstanceState) => void;
  /** It was stopped on purpose. */
  ended: (instance: string, epoch: number) => void;
}

interface Owned {
  state: InstanceState;
  /** When the phase began. */
  since: number;
  /** Not before this. */
  notBefore: number;
  attempts: number;
  /** The cluster as it was when loading was given up. */
  givenUp: string | undefined;
  /** Somebody has just asked for it, so idle instances may go. What is placed again by itself takes nothing from others. */
  mayUnload: boolean;
  /** What it waits to be unloaded since. */
  unloadSince: number | undefined;
  /** Why it stops: to end, or to move. */
  stopping: "end" | "move" | undefined;
  /** Where it moves, from the decision until it is ready there. */
  move: PlacedSpec | undefined;
  failedMoves: number;
  moveNotBefore: number;
  /** Sum of progress, and when it rose. */
  progress: number;
  progressAt: number;
  checkedAt: number;
}

export class InstanceLife {
  readonly #options: InstanceLifeOptions;
  readonly #owned = new Map<string, Owned>();

  constructor(options: InstanceLifeOptions) {
    this.#options = options;
  }

  states(): InstanceState[] {
    return [...this.#owned.values()].map(({ state }) => state);
  }

  /** A new instance with this node as its owner. It is placed at the next step. Throws invalid_argument beyond MOST_OWNED. */
  create(id: string, model: string, asked: PlacementRequest): void {
    if (this.#owned.has(id)) return;
    if (this.#owned.size >= MOST_OWNED)
      throw new CaravanError("invalid_argument", `this node owns ${MOST_OWNED} instances already`, {
        where: model,
        hint: "Stop one that is not needed.",
      });
    const spec = {
      ...{ id, model, asked, tensor: 1, pipeline: 1, ranks: [], bytes: [] },
      ...{ context: asked.context ?? 0, streams: asked.streams ?? 1, transport: "auto" as const },
    };
    this.#own({
      ...{ spec, phase: "placing", epoch: 0, progress: 0, reason: "", outstandingTokens: 0 },
      ...{ lost: [], unload: [], usedAt: 0 },
    });
    const owned = this.#owned.get(id);
    if (owned !== undefined) owned.mayUnload = true;
  }

  /** Takes over what another node owned. */
  adopt(state: InstanceState): void {
    const owned = this.#owned.get(state.spec.id);
    // It was taken over before it was known how far the owner before had come: all that is older must count for nothing.
    if (owned !== undefined && owned.state.epoch <= state.epoch) {
      this.#fail(owned, "lost", "its owner before had come further", []);
      owned.state = { ...owned.state, epoch: state.epoch };
    }
    if (owned !== undefined || this.#owned.size >= MOST_OWNED) return;
    this.#own({
      ...state,
      ...{ phase: "placing", epoch: state.epoch + 1, progress: 0, outstandingTokens: 0, unload: [] },
      reason: "its owner is gone",
      lost: nodesOf([...state.lost, ...state.spec.ranks.map(({ node }) => node)]),
    });
  }

  /** Ends it for good: requests may finish. False where this node does not own it. */
  stop(id: string): boolean {
    const owned = this.#owned.get(id);
    if (owned === undefined) return false;
    if (owned.state.phase === "gone" || owned.stopping === "end") return true;
    this.#options.ended(id, owned.state.epoch);
    this.#enter(owned, "stopping", "it was asked to stop");
    owned.stopping = "end";
    return true;
  }

  /** What runs and waits on the instance, for the choice between instances. usedAt: wall clock, milliseconds since 1970. */
  load(id: string, outstandingTokens: number, usedAt: number): void {
    const owned = this.#owned.get(id);
    if (owned !== undefined) owned.state = { ...owned.state, outstandingTokens, usedAt };
  }

  /** As load() told it last: the record tells the others of it a beat later. */
  outstanding(id: string): number {
    return this.#owned.get(id)?.state.outstandingTokens ?? 0;
  }

  /** The ranks of this epoch do not compute together any more (reported by this node's own rank). */
  engineFailed(id: string, epoch: number, reason: string): void {
    const owned = this.#owned.get(id);
    if (owned === undefined || owned.state.epoch !== epoch) return;
    if (["loading", "ready", "stopping"].includes(owned.state.phase)) this.#fail(owned, "group", reason, []);
  }

  /** One turn over all instances. */
  step(members: readonly Member[]): void {
    for (const [id, owned] of this.#owned) {
      if (this.#yields(id, owned, members)) continue;
      if (isEnded(id, members)) this.stop(id);
      switch (owned.state.phase) {
        case "placing":
          this.#place(owned, members);
          break;
        case "fetching":
        case "loading":
          this.#watchLoading(owned, members);
          break;
        case "ready":
          this.#watchReady(owned, members);
          break;
        case "failed":
          this.#reconsider(owned, members);
          break;
        case "stopping":
          this.#drain(owned, members);
          break;
        case "gone":
          if (this.#options.now() - owned.since > GONE_SHOWN_MS) this.#owned.delete(id);
      }
    }
  }

  #own(state: InstanceState): void {
    const now = this.#options.now();
    this.#owned.set(state.spec.id, {
      state,
      ...{ since: now, notBefore: now, attempts: 0, givenUp: undefined, unloadSince: undefined },
      ...{ mayUnload: false, stopping: undefined, move: undefined, failedMoves: 0, moveNotBefore: now },
      ...{ progress: 0, progressAt: now, checkedAt: now },
    });
  }

  #enter(owned: Owned, phase: InstancePhase, reason: string): void {
    const now = this.#options.now();
    owned.state = { ...owned.state, phase, reason: reasonOf(reason), progress: phase === "ready" ? 1 : 0 };
    Object.assign(owned, { since: now, progress: 0, progressAt: now, checkedAt: now });
  }

  /** Another node owns the instance too, with a newer claim: this one gives way. */
  #yields(id: string, owned: Owned, members: readonly Member[]): boolean {
    const mine = { epoch: owned.state.epoch, owner: this.#options.id };
    const other = claimsOn(id, members).find((claim) => claim.owner !== mine.owner && isNewer(claim, mine));
    if (other === undefined || owned.state.phase === "gone") return false;
    this.#endRequests(owned, "the instance belongs to another node now");
    this.#owned.delete(id);
    return true;
  }

  #place(owned: Owned, members: readonly Member[]): void {
    const { now, placer, id: self } = this.#options;
    const { spec } = owned.state;
    if (now() < owned.notBefore) return;
    if (now() - owned.since < FREE_MS && hasRanks(spec.id, members)) return;
    const candidates = members.filter(({ direct }) => direct);
    // What was promised to be better is what it becomes: another look could come to the old place again, and so on for ever.
    if (owned.move?.ranks.every(({ node }) => candidates.some(({ record }) => record.info.id === node))) {
      this.#begin(owned, owned.move);
      return;
    }
    const result = placer.place(spec.model, spec.asked, candidates, { first: self });
    if (result.kind === "pending") {
      owned.state = { ...owned.state, reason: reasonOf(result.reason) };
      return;
    }
    if (result.kind === "placed") {
      this.#begin(owned, result.placement);
      return;
    }
    const elsewhere = placer.place(spec.model, spec.asked, candidates, {});
    const heir = elsewhere.kind === "placed" ? elsewhere.placement.ranks[0]?.node : undefined;
    const able = heir !== undefined && heir !== self && hasModel(heir, spec.model, members);
    if (elsewhere.kind === "placed" && able) {
      const state = { ...owned.state, epoch: owned.state.epoch + 1, reason: "moves to another owner" };
      this.#owned.delete(spec.id);
      this.#options.handOver({ ...state, spec: { ...spec, ...elsewhere.placement } });
      return;
    }
    owned.notBefore = now() + UNLOAD_CHECK_MS;
    if (owned.mayUnload && this.#unloadOthers(owned, candidates)) return;
    owned.mayUnload = false;
    owned.state = { ...owned.state, unload: [] };
    this.#enter(owned, "failed", result.reason);
    owned.notBefore = now() + REFUSED_MS;
  }

  #begin(owned: Owned, placement: { ranks: InstanceState["spec"]["ranks"] }): void {
    const { spec, epoch, lost } = owned.state;
    const nodes = placement.ranks.map(({ node }) => node);
    owned.state = {
      ...owned.state,
      epoch: epoch + 1,
      spec: { ...spec, ...placement },
      lost: [...new Set([...lost, ...spec.ranks.map(({ node }) => node)])].filter(
        (id) => !nodes.includes(id),
      ),
      unload: [],
    };
    owned.unloadSince = undefined;
    owned.mayUnload = false;
    this.#enter(owned, "fetching", "");
  }

  /** Asks for idle instances to go; false where that would not help or did not. */
  #unloadOthers(owned: Owned, members: readonly Member[]): boolean {
    const { placer, now, id: self } = this.#options;
    if (owned.unloadSince !== undefined && now() - owned.unloadSince > UNLOAD_MS) {
      owned.unloadSince = undefined;
      return false;
    }
    const unload = idleInTheWay(owned.state, members, placer, self);
    // Those that were asked to go may be gone, and their memory about to be free.
    if (unload === undefined) return owned.unloadSince !== undefined;
    owned.state = { ...owned.state, unload, reason: `waits for ${unload.length} idle to be unloaded` };
    owned.unloadSince ??= now();
    return true;
  }

  #watchLoading(owned: Owned, members: readonly Member[]): void {
    const { now } = this.#options;
    const ranks = this.#ranks(owned, members);
    if (ranks === undefined) return;
    const verdict = judgeLoading(ranks, now() - owned.since, members);
    if (verdict.kind === "failed") this.#fail(owned, verdict.cause, verdict.reason, []);
    else if (verdict.kind === "ready") {
      if (owned.move !== undefined) owned.failedMoves = 0;
      owned.move = undefined;
      this.#enter(owned, "ready", "");
    } else {
      const { phase, progress } = verdict;
      owned.state = { ...owned.state, phase, progress };
      if (progress > owned.progress) Object.assign(owned, { progress, progressAt: now() });
      else if (now() - owned.progressAt > STALL_MS)
        this.#fail(owned, "process", `loading made no progress for ${STALL_MS / 1000} s`, []);
    }
  }

  #watchReady(owned: Owned, members: readonly Member[]): void {
    const { now } = this.#options;
    const ranks = this.#ranks(owned, members);
    if (ranks === undefined) return;
    const broken = ranks.find(({ state }) => state?.phase !== "ready");
    if (broken !== undefined) {
      const { state, node } = broken;
      const why = state?.phase === "failed" ? state.reason : "it does not run its rank any more";
      this.#fail(
        owned,
        state?.phase === "failed" ? state.cause : "group",
        `${nameOf(node, members)}: ${why}`,
        [],
      );
      return;
    }
    if (now() - owned.since > HEALTHY_MS) owned.attempts = 0;
    if (isInTheWay(owned.state, members)) {
      this.stop(owned.state.spec.id);
      return;
    }
    if (now() - owned.checkedAt < REFUSED_MS) return;
    owned.checkedAt = now();
    if (now() < owned.moveNotBefore) return;
    owned.move = worthwhileMove(owned.state, members, this.#options.placer, this.#options.id);
    if (owned.move === undefined) return;
    this.#enter(owned, "stopping", "moves to a node that is back");
    owned.stopping = "move";
  }

  #drain(owned: Owned, members: readonly Member[]): void {
    const { now } = this.#options;
    const { state, stopping } = owned;
    const over = now() - owned.since >= DRAIN_MS;
    if (state.outstandingTokens > 0 && !over) {
      const ranks = this.#ranks(owned, members);
      if (ranks === undefined || ranks.every((rank) => rank.state?.phase === "ready")) return;
    }
    this.#endRequests(owned, stopping === "end" ? "the model was stopped" : "the model moves to other nodes");
    owned.stopping = undefined;
    if (stopping === "end") this.#enter(owned, "gone", "it was asked to stop");
    else this.#enter(owned, "placing", state.reason);
  }

  #reconsider(owned: Owned, members: readonly Member[]): void {
    const { now } = this.#options;
    if (owned.givenUp === undefined) {
      if (now() < owned.notBefore) return;
    } else {
      const stamp = clusterStamp(members);
      if (owned.givenUp === GIVEN_UP_NOW) owned.givenUp = stamp;
      if (owned.givenUp === stamp) return;
      owned.attempts = 0;
      owned.givenUp = undefined;
    }
    const { reason } = owned.state;
    this.#enter(owned, "placing", reason);
    // Nothing of it runs: there is nothing to wait for.
    owned.notBefore = now();
  }

  /** States of all ranks; undefined where a node is lost, which has been dealt with then. */
  #ranks(owned: Owned, members: readonly Member[]): SeenRank[] | undefined {
    const { ranks, lost } = ranksOf(owned.state, this.#options.id, members);
    if (lost.length === 0) return ranks;
    const names = lost.map((node) => nameOf(node, members)).join(", ");
    this.#fail(owned, "lost", `${names} ${lost.length === 1 ? "is" : "are"} gone`, lost);
    return undefined;
  }

  #fail(owned: Owned, cause: RankState["cause"] | "lost", reason: string, lost: readonly NodeId[]): void {
    const { now } = this.#options;
    const wasStopping = owned.stopping === "end";
    this.#endRequests(owned, reason);
    if (owned.move !== undefined) {
      // It costs running requests every time: what does not come about is tried less and less often.
      owned.move = undefined;
      owned.failedMoves++;
      owned.moveNotBefore = now() + RETURN_MS * 2 ** Math.min(8, owned.failedMoves);
    }
    owned.state = { ...owned.state, lost: nodesOf([...owned.state.lost, ...lost]) };
    if (wasStopping) {
      owned.stopping = undefined;
      this.#enter(owned, "gone", "it was asked to stop");
      return;
    }
    owned.stopping = undefined;
    owned.attempts++;
    if (cause !== "lost" && owned.attempts >= MOST_ATTEMPTS) {
      const tried = `after ${owned.attempts} attempts: ${reason}`;
      if (cause === "group") {
        this.#enter(owned, "failed", `waits for a minute ${tried}`);
        owned.notBefore = now() + REGROUP_MS;
      } else {
        this.#enter(owned, "failed", `given up ${tried}`);
        owned.givenUp = GIVEN_UP_NOW;
      }
      return;
    }
    this.#enter(owned, "placing", reason);
    const pause = cause === "lost" ? 0 : REPLACE_MS * 2 ** Math.min(4, owned.attempts - 1);
    owned.notBefore = now() + pause;
  }

  #endRequests({ state }: Owned, reason: string): void {
    this.#options.endRequests(
      state.spec.id,
      state.epoch,
      new CaravanError("cluster_degraded", `${state.spec.model}: ${reason}`, {
        hint: "Send the request again in a few seconds.",
        retryAfterSeconds: 2,
      }),
    );
  }
}

/** Stands for the cluster's stamp until the next turn knows it. */
const GIVEN_UP_NOW = "";

/** Each once, the latest ones. */
function nodesOf(nodes: readonly NodeId[]): NodeId[] {
  return [...new Set(nodes)].slice(-MOST_LOST);
}
