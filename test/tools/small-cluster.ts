// A few ClusterLogics under one clock, joined by perfect links, with runners that do what the test tells them.

import { ClusterLogic } from "../../src/cluster/cluster-logic.ts";
import type { Placer } from "../../src/cluster/instance-placer.ts";
import { BEAT_MS } from "../../src/cluster/membership.ts";
import { MemoryLedger } from "../../src/cluster/memory-ledger.ts";
import type { RankOrder } from "../../src/cluster/rank-host.ts";
import type { RunningRequest } from "../../src/cluster/requests.ts";
import type { InstanceState } from "../../src/cluster/types.ts";
import type { CaravanError } from "../../src/errors.ts";
import { nodeInfo } from "./membership-mesh.ts";

export interface SmallNode {
  id: string;
  logic: ClusterLogic;
  ledger: MemoryLedger;
  started: RankOrder[];
  stopped: [instance: string, epoch: number][];
  failedRequests: [RunningRequest, CaravanError][];
  endedEpochs: [instance: string, epoch: number, CaravanError][];
}

export class SmallCluster {
  now = 0;
  readonly nodes = new Map<string, SmallNode>();
  /** Ranks load in no time, unless the test takes it over. */
  automatic = true;

  constructor(readonly placer: Placer) {}

  add(id: string, capacity: number, incarnation = 1): SmallNode {
    const ledger = new MemoryLedger(capacity);
    const node: SmallNode = {
      ...{ id, ledger, started: [], stopped: [], failedRequests: [], endedEpochs: [] },
      logic: undefined as unknown as ClusterLogic,
    };
    node.logic = new ClusterLogic({
      ...{ cluster: "home", protocol: 1, boot: `${id}${incarnation}`, ledger, placer: this.placer },
      info: nodeInfo(id, incarnation, { memory: { total: capacity, available: capacity } }),
      runner: {
        start: (order) => {
          node.started.push(order);
        },
        stop: (instance, epoch) => {
          node.stopped.push([instance, epoch]);
        },
      },
      now: () => this.now,
      send: (to, message) =>
        this.nodes.get(to)?.logic.membership.receive(id, JSON.parse(JSON.stringify(message))),
      failRequest: (request, error) => {
        node.failedRequests.push([request, error]);
      },
      endRequests: (instance, epoch, error) => {
        node.endedEpochs.push([instance, epoch, error]);
      },
    });
    this.nodes.set(id, node);
    for (const other of this.nodes.values())
      if (other !== node) {
        other.logic.membership.peerUp(id);
        node.logic.membership.peerUp(other.id);
        const link = { kind: "tcp", latencyUs: 100, bandwidth: 1e9 } as const;
        const { links } = node.logic.membership.own;
        node.logic.membership.update({}, [...links, { from: id, to: other.id, ...link }]);
      }
    return node;
  }

  kill(id: string): void {
    this.nodes.delete(id);
    for (const other of this.nodes.values()) other.logic.membership.peerDown(id, false);
  }

  pass(ms: number): void {
    for (let left = ms; left > 0; left -= BEAT_MS) {
      this.now += Math.min(BEAT_MS, left);
      for (const node of this.nodes.values()) node.logic.tick();
      if (this.automatic) this.settle();
    }
  }

  /** Every rank that was asked for is ready, every one that was stopped is gone. */
  settle(): void {
    for (let round = 0; round < 5; round++)
      for (const { logic, started, stopped } of this.nodes.values()) {
        for (const [instance, epoch] of stopped.splice(0)) logic.ranks.stopped(instance, epoch);
        for (const { spec, epoch } of started.splice(0)) logic.ranks.ready(spec.id, epoch);
        logic.turn();
      }
  }

  /** Of the first node that owns it. */
  state(instance: string): InstanceState | undefined {
    for (const { logic } of this.nodes.values()) {
      const found = logic.instances.states().find(({ spec }) => spec.id === instance);
      if (found !== undefined) return found;
    }
    return undefined;
  }

  node(id: string): SmallNode {
    const node = this.nodes.get(id);
    if (node === undefined) throw new Error(`there is no node ${id}`);
    return node;
  }
}
