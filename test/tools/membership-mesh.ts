// Memberships that talk to each other directly, under one clock that the test moves.

import { BEAT_MS, Membership } from "../../src/cluster/membership.ts";
import type { Exchange, NodeInfo } from "../../src/cluster/types.ts";

export function nodeInfo(id: string, incarnation = 1, change: Partial<NodeInfo> = {}): NodeInfo {
  return {
    ...{ id, name: id, protocol: 1, version: "0", incarnation, addresses: [] },
    ...{ os: "test", chip: "test", device: "cpu", memory: { total: 1e9, available: 1e9 } },
    ...{ bandwidth: 1e9, speed: null, rdma: { reason: "test" }, models: [] },
    ...{ instances: [], ranks: [], orphans: [], ended: [] },
    ...change,
  };
}

export class MembershipMesh {
  now = 1000;
  readonly nodes = new Map<string, Membership>();
  /** "a b": what a sends to b is lost. */
  readonly lost = new Set<string>();
  /** Everything that was sent, for replays. */
  readonly log: { from: string; to: string; message: Exchange }[] = [];

  add(
    id: string,
    options: { incarnation?: number; boot?: string; cluster?: string; protocol?: number; key?: string } = {},
  ): Membership {
    const key = options.key ?? id;
    const node = new Membership({
      cluster: options.cluster ?? "home",
      protocol: options.protocol ?? 1,
      boot: options.boot ?? `boot-${options.incarnation ?? 1}`,
      info: nodeInfo(id, options.incarnation, { name: key }),
      now: () => this.now,
      send: (to, message) => {
        this.log.push({ from: id, to, message });
        if (this.lost.has(`${key} ${to}`)) return;
        // As over a wire: a copy. To every node that listens under this id.
        for (const [name, other] of this.nodes)
          if (name !== key && other.id === to && !this.lost.has(`${key} ${name}`))
            other.receive(id, JSON.parse(JSON.stringify(message)));
      },
    });
    this.nodes.set(key, node);
    for (const [name, other] of this.nodes)
      if (name !== key) {
        other.peerUp(id);
        node.peerUp(other.id);
      }
    return node;
  }

  /** Moves the clock in beats; all nodes but the ones named have their turns. */
  pass(ms: number, ...asleep: string[]): void {
    for (let left = ms; left > 0; left -= BEAT_MS) {
      this.now += Math.min(BEAT_MS, left);
      for (const [key, node] of this.nodes) if (!asleep.includes(key)) node.tick();
    }
  }

  /** As a crash: no goodbye, and links that are found silent after a while. */
  kill(key: string): void {
    const node = this.nodes.get(key);
    this.nodes.delete(key);
    if (node !== undefined) for (const other of this.nodes.values()) other.peerDown(node.id, false);
  }

  view(key: string): string[] {
    return (
      this.nodes
        .get(key)
        ?.members()
        .map(({ record }) => record.info.id) ?? []
    );
  }
}
