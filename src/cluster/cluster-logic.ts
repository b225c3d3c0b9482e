// All decisions of one node in its cluster, put together: membership, the instances it owns, the ranks it computes, what it
// takes over from nodes that are gone, the requests it passed on. Events go in, messages and orders to runners come out; the
// sockets, processes and clocks are the caller's, so that the simulation can be one.

import type { CaravanError } from "../errors.ts";
import { InstanceLife } from "./instance-life.ts";
import type { Placer } from "./instance-placer.ts";
import { type Member, Membership } from "./membership.ts";
import type { MemoryLedger } from "./memory-ledger.ts";
import { Orphans } from "./orphans.ts";
import { RankHost, type RankRunner } from "./rank-host.ts";
import { Requests, type RunningRequest } from "./requests.ts";
import type { Exchange, NodeId, NodeInfo } from "./types.ts";

export interface ClusterLogicOptions {
  cluster: string;
  protocol: number;
  boot: string;
  /** Without what is written here: instances, ranks, orphans, ended, available memory. */
  info: NodeInfo;
  ledger: MemoryLedger;
  placer: Placer;
  runner: RankRunner;
  /** Monotonic milliseconds. */
  now: () => number;
  send: (to: NodeId, message: Exchange) => void;
  /** A request of this node's clients ended without its answer. */
  failRequest: (request: RunningRequest, error: CaravanError) => void;
  /** Every request that this node computes as owner of that epoch is to end with the error: tell its gateways. */
  endRequests: (instance: string, epoch: number, error: CaravanError) => void;
}

export class ClusterLogic {
  readonly membership: Membership;
  readonly instances: InstanceLife;
  readonly ranks: RankHost;
  readonly requests: Requests;
  readonly #orphans: Orphans;
  readonly #options: ClusterLogicOptions;
  #turning = false;
  #again = false;
  /** What the own record says of this, as JSON. */
  #published = "";

  constructor(options: ClusterLogicOptions) {
    this.#options = options;
    const { now, info, ledger, runner, placer } = options;
    const { id } = info;
    this.ranks = new RankHost({ id, ledger, runner, now });
    this.#orphans = new Orphans(id, now);
    this.requests = new Requests({
      now,
      fail: options.failRequest,
      own: (instance) => this.instances.outstanding(instance),
    });
    this.instances = new InstanceLife({
      id,
      now,
      placer,
      endRequests: (instance, epoch, error) => {
        this.requests.endEpoch(instance, epoch, error);
        options.endRequests(instance, epoch, error);
      },
      handOver: (state) => this.#orphans.handOver(state),
      ended: (instance, epoch) => this.#orphans.end(instance, epoch),
    });
    this.membership = new Membership({
      cluster: options.cluster,
      protocol: options.protocol,
      boot: options.boot,
      info: { ...info, memory: { ...info.memory, available: ledger.available } },
      now,
      send: options.send,
      onChange: () => this.turn(),
    });
  }

  /** What this node takes for the cluster. Alone, where another node has its identity. */
  get members(): Member[] {
    return this.membership.members();
  }

  /** To be called every BEAT_MS or so. */
  tick(): void {
    this.membership.tick();
    this.turn();
  }

  /** Brings everything in line with the view; also after every event of a runner. */
  turn(): void {
    if (this.#turning) {
      this.#again = true;
      return;
    }
    this.#turning = true;
    try {
      // A change of the own record is a change of the view: a few rounds settle it, the next turn does what is left.
      for (let round = 0; round < 4; round++) {
        this.#again = false;
        this.#round();
        if (!this.#again) break;
      }
    } finally {
      this.#turning = false;
    }
  }

  #round(): void {
    this.#publish();
    for (const state of this.#orphans.step(this.members)) this.instances.adopt(state);
    this.instances.step(this.members);
    this.#publish();
    this.ranks.step(this.members);
    this.#publish();
    this.requests.step(this.members);
  }

  #publish(): void {
    const { info } = this.membership.own;
    const { ledger } = this.#options;
    const next = {
      memory: { total: info.memory.total, available: ledger.available },
      instances: this.instances.states(),
      ranks: this.ranks.states(),
      orphans: this.#orphans.published(),
      ended: this.#orphans.ended(this.members),
    };
    const text = JSON.stringify(next);
    if (text === this.#published) return;
    this.#published = text;
    this.membership.update(next);
  }
}
