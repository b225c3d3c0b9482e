// What this node says of its machine in its own record: memory, speed, models, links, RDMA devices. Read anew every few seconds; only news makes
// a new version.

import { availableMemory } from "../../model/machine-memory.ts";
import type { ClusterLogic } from "../cluster-logic.ts";
import type { MemoryLedger } from "../memory-ledger.ts";
import type { Link, ModelPresence, NodeId, NodeInfo, NodeSpeed, RdmaSurvey } from "../types.ts";
import type { Mesh } from "./mesh.ts";
import { machineInfo } from "./node-info.ts";

export interface OwnRecordOptions {
  id: NodeId;
  incarnation: () => number;
  models: () => ModelPresence[];
  /** From this node to others, of all kinds. */
  links: () => Link[];
  rdma: () => RdmaSurvey;
  compute: () => { device: "cpu" | "metal" };
  figures: () => { bandwidth: number; speed: NodeSpeed | null };
  ledger: MemoryLedger;
}

export class OwnRecord {
  readonly #options: OwnRecordOptions;

  constructor(options: OwnRecordOptions) {
    this.#options = options;
  }

  /** As it is when the node enters the cluster: it owns and computes nothing. */
  info(mesh: Mesh): NodeInfo {
    const { id, incarnation, models, compute, figures, rdma } = this.#options;
    return {
      ...machineInfo({ id, name: mesh.name, incarnation: incarnation(), port: mesh.port }),
      device: compute().device,
      ...figures(),
      rdma: rdma(),
      models: models(),
      instances: [],
      ranks: [],
      orphans: [],
      ended: [],
    };
  }

  /** Writes what has changed of the machine. Memory comes from the ledger, instances and ranks from the logic. */
  refresh(logic: ClusterLogic, mesh: Mesh): void {
    const { ledger } = this.#options;
    // Once weights are mapped, what the system calls available no longer says what they take.
    if (ledger.reserved === 0) ledger.setCapacity(availableMemory().available);
    const known = machinePart(logic.membership.own.info);
    const now = machinePart(this.info(mesh));
    const links = this.#options.links();
    if (JSON.stringify(known) !== JSON.stringify(now) || !sameLinks(logic.membership.own.links, links))
      logic.membership.update(now, links);
  }
}

function machinePart(info: NodeInfo): Omit<NodeInfo, "memory" | "instances" | "ranks" | "orphans" | "ended"> {
  const { memory: _, instances: __, ranks: ___, orphans: ____, ended: _____, ...machine } = info;
  return machine;
}

/** Measured values move all the time; a third more or less is news. */
function sameLinks(a: readonly Link[], b: readonly Link[]): boolean {
  const close = (x: number, y: number) => Math.abs(x - y) <= 0.3 * Math.max(x, y);
  return (
    a.length === b.length &&
    a.every((link) => {
      const other = b.find(({ to, kind }) => to === link.to && kind === link.kind);
      return (
        other !== undefined &&
        link.devices?.join() === other.devices?.join() &&
        close(link.latencyUs, other.latencyUs) &&
        close(link.bandwidth, other.bandwidth)
      );
    })
  );
}
