// Load plans of Llama 4 at any number of bits, and the four Mac Studios of the published table, for tests of placement.

import { type ModelProfile, profileModel } from "../../src/cluster/model-profile.ts";
import type { PlacementNode } from "../../src/cluster/placement.ts";
import type { Link, NodeSpeed } from "../../src/cluster/types.ts";
import { parseModelConfig } from "../../src/model/config.ts";
import { type LoadPlan, makeLoadPlan } from "../../src/model/load-plan.ts";
import {
  type Llama4Name,
  llama4Checkpoint,
  llama4Config,
  llama4Shards,
  llama4Tensors,
} from "./llama4-shapes.ts";

export function llama4Plan(name: Llama4Name, bits: number, layers = 48): LoadPlan {
  const specs = llama4Tensors(name, layers).map((spec) =>
    spec.dtype === "U32"
      ? { ...spec, shape: [...spec.shape.slice(0, -1), ((spec.shape.at(-1) ?? 0) * bits) / 4] }
      : spec,
  );
  const config = { ...llama4Config(name, layers), quantization: { group_size: 64, bits, mode: "affine" } };
  return makeLoadPlan(
    parseModelConfig(config, "/m/config.json"),
    llama4Checkpoint(llama4Shards(specs), "/m"),
  );
}

export function llama4Profile(name: Llama4Name, bits: number, layers = 48): ModelProfile {
  return profileModel(llama4Plan(name, bits, layers));
}

export function macs(
  count: number,
  change: Partial<PlacementNode> & { speed?: NodeSpeed | null } = {},
): PlacementNode[] {
  return Array.from({ length: count }, (_, i) => ({
    id: `mac-${String(i + 1).padStart(2, "0")}`,
    name: `mac-${i + 1}`,
    device: "metal" as const,
    memory: { total: 512e9, available: 480e9 },
    bandwidth: 819e9,
    speed: { multiplyAdds: 14e12, stepUs: 1900, denseLayerUs: 70, moeLayerUs: 172, handoverUs: 4 },
    ...change,
  }));
}

/** Every pair the same, both ways. */
export function mesh(nodes: readonly { id: string }[], link: Omit<Link, "from" | "to">): Link[] {
  return nodes.flatMap((a) => nodes.flatMap((b) => (a === b ? [] : [{ from: a.id, to: b.id, ...link }])));
}

/** A Thunderbolt 5 cable: 8 µs one way, 6 GB/s. */
export const THUNDERBOLT = { kind: "rdma", latencyUs: 16, bandwidth: 6e9 } as const;
export const GIGABIT = { kind: "tcp", latencyUs: 300, bandwidth: 117e6 } as const;
