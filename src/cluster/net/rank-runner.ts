// The ranks that this node computes, as processes: carries out what the rank host (../rank-host.ts) decides from the owners'
// records, and lets other nodes ask for their part of instances that this node owns.

import * as v from "valibot";
import type { RankLoad } from "../../engine/rank-protocol.ts";
import { type CaravanError, CaravanError as Failure } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import type { InstalledModel } from "../../model/store.ts";
import type { OpenModel, RunOptions } from "../../node/open-model.ts";
import type { RankOrder, RankRunner } from "../rank-host.ts";
import type { NodeId, RankState } from "../types.ts";
import type { Channel } from "./channel.ts";
import type { ClusterWork } from "./cluster-node.ts";
import { FollowerRank } from "./follower-rank.ts";
import { groupHost } from "./group-host.ts";
import type { Peer, Purpose } from "./hello.ts";
import { LeaderRank, refuse } from "./leader-rank.ts";
import type { Mesh } from "./mesh.ts";
import { causeOf, type RankReports, type RdmaOptions, type RunningRank } from "./rank-life.ts";
import { RankAskSchema } from "./rank-order.ts";

const ASK_LIMIT_MS = 5000;
/** A node may have read the owner's record before the owner has acted on it. */
const LEADER_WAIT_MS = 5000;
const LEADER_POLL_MS = 20;

export interface RankRunnerOptions {
  /** Has what the rank reads of the model on this node, fetched from another one if need be. Rejects with why not. */
  prepare: (
    order: RankOrder,
    onProgress: (fraction: number) => void,
    signal: AbortSignal,
  ) => Promise<InstalledModel>;
  /** Whether any rank of the epoch still gets its files. */
  fetching: (instance: string, epoch: number) => boolean;
  run: RunOptions;
  compute: () => Pick<RankLoad, "threads" | "device">;
  nodeName: (id: NodeId) => string;
  /** How a rank uses RDMA; nodes: by rank. */
  rdma: (nodes: readonly NodeId[], rank: number) => Promise<RdmaOptions>;
  progress: (instance: string, epoch: number, phase: "fetching" | "loading", fraction: number) => void;
  ready: (instance: string, epoch: number) => void;
  failed: (
    instance: string,
    epoch: number,
    cause: Exclude<RankState["cause"], "none">,
    reason: string,
  ) => void;
  stopped: (instance: string, epoch: number) => void;
  /** An instance that this node owns answers, or no more. */
  onOpen: (order: RankOrder, model: OpenModel) => void;
  onClosed: (order: RankOrder) => void;
  log: Logger;
  /** Command line of a rank process; replaced in tests. */
  command?: readonly string[];
}

export class ProcessRanks implements RankRunner, ClusterWork {
  readonly #options: RankRunnerOptions;
  /** By instance. */
  readonly #running = new Map<string, { epoch: number; rank: RunningRank }>();
  #mesh: Mesh | undefined;

  constructor(options: RankRunnerOptions) {
    this.#options = options;
  }

  onMesh(mesh: Mesh | undefined): void {
    this.#mesh = mesh;
    if (mesh === undefined) this.stopAll();
  }

  onChannel(channel: Channel, peer: Peer, purpose: Purpose): boolean {
    if (purpose !== "rank") return false;
    void this.#admit(channel, peer.id);
    return true;
  }

  /** Process ids of ranks > 0. */
  pids(): number[] {
    return [...this.#running.values()].flatMap(({ rank }) =>
      rank instanceof FollowerRank && rank.pid !== undefined ? [rank.pid] : [],
    );
  }

  start(order: RankOrder): void {
    const { spec, epoch, rank } = order;
    const reports = this.#reports(order);
    const log = this.#options.log.child({ model: spec.model, epoch });
    log.info("computing a rank", { rank, of: spec.ranks.length });
    const running = rank === 0 ? this.#lead(order, reports, log) : this.#follow(order, reports, log);
    this.#running.set(spec.id, { epoch, rank: running });
  }

  stop(instance: string, epoch: number): void {
    const held = this.#running.get(instance);
    if (held?.epoch === epoch) held.rank.stop();
    else this.#options.stopped(instance, epoch);
  }

  stopAll(): void {
    for (const { rank } of this.#running.values()) rank.stop();
  }

  #reports(order: RankOrder): RankReports {
    const { id } = order.spec;
    const { epoch, rank } = order;
    let stopped = false;
    return {
      fetching: (fraction) => this.#options.progress(id, epoch, "fetching", fraction),
      loading: (fraction) => this.#options.progress(id, epoch, "loading", fraction),
      ready: () => this.#options.ready(id, epoch),
      over: (error: CaravanError | undefined) => {
        if (stopped) return;
        stopped = true;
        if (this.#running.get(id)?.epoch === epoch) this.#running.delete(id);
        if (rank === 0) this.#options.onClosed(order);
        if (error === undefined) this.#options.stopped(id, epoch);
        else this.#options.failed(id, epoch, causeOf(error), error.message);
      },
    };
  }

  #lead(order: RankOrder, reports: RankReports, log: Logger): RunningRank {
    const { spec, epoch } = order;
    return new LeaderRank({
      spec,
      epoch,
      prepare: (signal) => this.#options.prepare(order, reports.fetching, signal),
      fetching: () => this.#options.fetching(spec.id, epoch),
      run: this.#options.run,
      host: () => this.#hostFor(spec.ranks.find(({ rank }) => rank > 0)?.node),
      nodeName: this.#options.nodeName,
      rdma: () => this.#options.rdma(nodesOf(spec), 0),
      reports,
      onOpen: (model) => this.#options.onOpen(order, model),
      log,
    });
  }

  #follow(order: RankOrder, reports: RankReports, log: Logger): RunningRank {
    const { spec, epoch, owner, rank } = order;
    const { command } = this.#options;
    return new FollowerRank({
      ask: { instance: spec.id, epoch, rank },
      open: (signal) => {
        if (this.#mesh === undefined)
          return Promise.reject(new Failure("cluster_degraded", "this node has left the cluster"));
        return this.#mesh.open(owner, "rank", signal);
      },
      prepare: async (signal) => (await this.#options.prepare(order, reports.fetching, signal)).path,
      compute: this.#options.compute,
      rdma: () => this.#options.rdma(nodesOf(spec), rank),
      bytes: spec.bytes[rank] ?? 0,
      reports,
      log,
      ...(command === undefined ? {} : { command }),
    });
  }

  /** This machine's address as another node of the instance sees it. */
  #hostFor(other: NodeId | undefined): string {
    const link = other === undefined ? undefined : this.#mesh?.linkTo(other);
    return link === undefined ? "127.0.0.1" : groupHost(link.channel.socket);
  }

  async #admit(channel: Channel, from: NodeId): Promise<void> {
    try {
      const ask = v.parse(RankAskSchema, await channel.readJson(ASK_LIMIT_MS));
      const leader = await this.#leaderOf(ask.instance, ask.epoch);
      if (leader === undefined)
        refuse(channel, new Failure("cluster_degraded", "this node does not own that instance (any more)"));
      else await leader.admit(channel, from, ask);
    } catch {
      channel.close(); // whoever asks for nothing that makes sense gets nothing
    }
  }

  async #leaderOf(instance: string, epoch: number): Promise<LeaderRank | undefined> {
    const deadline = performance.now() + LEADER_WAIT_MS;
    for (;;) {
      const held = this.#running.get(instance);
      if (held?.rank instanceof LeaderRank && held.epoch === epoch) return held.rank;
      if (performance.now() > deadline || (held !== undefined && held.epoch > epoch)) return undefined;
      await Bun.sleep(LEADER_POLL_MS);
    }
  }
}

function nodesOf(spec: RankOrder["spec"]): NodeId[] {
  return spec.ranks.map(({ node }) => node);
}
