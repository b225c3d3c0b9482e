// What this node tells others about its machine. Read anew for every use, since memory, networks and models change.

import { cpus, networkInterfaces, platform, release } from "node:os";
import { availableMemory } from "../../model/machine-memory.ts";
import { VERSION } from "../../version.ts";
import { CARAVAN_PROTOCOL } from "../protocol-version.ts";
import type { NodeId, NodeInfo } from "../types.ts";
import { joinAddress } from "./dial.ts";

export interface OwnNode {
  id: NodeId;
  name: string;
  incarnation: number;
  /** Of the control plane. */
  port: number;
}

/** The machine's part of a NodeInfo; what the node holds and computes is for its owner to add. */
export function machineInfo(
  own: OwnNode,
): Omit<
  NodeInfo,
  "models" | "instances" | "ranks" | "orphans" | "ended" | "speed" | "bandwidth" | "device" | "rdma"
> {
  const { available, total } = availableMemory();
  return {
    id: own.id,
    name: own.name,
    protocol: CARAVAN_PROTOCOL,
    version: VERSION,
    incarnation: own.incarnation,
    addresses: localAddresses().map((address) => joinAddress(address, own.port)),
    os: `${platform()} ${release()}`,
    chip: cpus()[0]?.model.trim() || "unknown processor",
    memory: { total, available },
  };
}

/** Addresses at which others may reach this machine: no loopback, and no link-local ones, which mean nothing elsewhere. */
export function localAddresses(): string[] {
  return Object.values(networkInterfaces())
    .flatMap((addresses) => addresses ?? [])
    .filter(({ internal, address }) => !internal && !address.startsWith("fe80:"))
    .map(({ address }) => address)
    .slice(0, 16);
}
