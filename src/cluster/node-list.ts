// A cluster described in a JSON file, for planning before anything is bought or started: nodes with memory and bandwidth,
// and what connects them. Sizes are in GB (1e9 bytes), as data sheets give them.

import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { knownChips, sheetBandwidth } from "./chips.ts";
import { MOST_NODES, type PlacementNode } from "./placement.ts";
import { ASSUMED_SPEED } from "./predict.ts";
import type { Link } from "./types.ts";

const positive = v.pipe(v.number(), v.finite(), v.gtValue(0));
const atLeast0 = v.pipe(v.number(), v.finite(), v.minValue(0));
const name = v.pipe(v.string(), v.minLength(1), v.maxLength(120));

const LinkSchema = v.strictObject({
  kind: v.picklist(["tcp", "rdma"]),
  /** Round trip. */
  latency_us: positive,
  bandwidth_gb: positive,
});

export const NodeListSchema = v.strictObject({
  nodes: v.pipe(
    v.array(
      v.strictObject({
        name,
        /** Gives the bandwidth of chips that are known. */
        chip: v.optional(name),
        /** metal where the chip is Apple's, else cpu. */
        device: v.optional(v.picklist(["cpu", "metal"])),
        memory_gb: positive,
        /** What a model may have of it; default: 75 % (the GPU's share on a Mac), 90 % on others. */
        available_gb: v.optional(positive),
        bandwidth_gb: v.optional(positive),
        /** Multiply-adds/s of matrix products, in units of 1e12. */
        tera_multiply_adds: v.optional(positive),
        step_us: v.optional(atLeast0),
        dense_layer_us: v.optional(atLeast0),
        moe_layer_us: v.optional(atLeast0),
        handover_us: v.optional(atLeast0),
      }),
    ),
    v.minLength(1),
    v.maxLength(MOST_NODES),
  ),
  /** Between every two nodes that `links` does not name. */
  link: v.optional(LinkSchema),
  /** Both ways. */
  links: v.optional(v.array(v.strictObject({ from: name, to: name, ...LinkSchema.entries }))),
});

export type NodeList = v.InferOutput<typeof NodeListSchema>;

/** where: the file, for messages. Throws invalid_argument. */
export function nodesOf(list: NodeList, where: string): { nodes: PlacementNode[]; links: Link[] } {
  const names = new Set<string>();
  const nodes = list.nodes.map((node): PlacementNode => {
    if (names.has(node.name)) throw wrong(where, `two nodes are called "${node.name}"`);
    names.add(node.name);
    return nodeOf(node, where);
  });
  const links = new Map<string, Link>();
  const set = (from: string, to: string, link: v.InferOutput<typeof LinkSchema>) => {
    const { kind, latency_us: latencyUs, bandwidth_gb } = link;
    const figures = { kind, latencyUs, bandwidth: bandwidth_gb * 1e9 };
    links.set(`${from} ${to}`, { from, to, ...figures });
    links.set(`${to} ${from}`, { from: to, to: from, ...figures });
  };
  if (list.link !== undefined)
    for (const from of names) for (const to of names) if (from !== to) set(from, to, list.link);
  for (const link of list.links ?? []) {
    for (const end of [link.from, link.to])
      if (!names.has(end)) throw wrong(where, `a link names "${end}", which is not among the nodes`);
    set(link.from, link.to, link);
  }
  return { nodes, links: [...links.values()] };
}

function nodeOf(node: NodeList["nodes"][number], where: string): PlacementNode {
  const sheet = node.chip === undefined ? undefined : sheetBandwidth(node.chip);
  const bandwidth = node.bandwidth_gb === undefined ? sheet : node.bandwidth_gb * 1e9;
  if (bandwidth === undefined)
    throw new CaravanError("invalid_argument", `the memory bandwidth of "${node.name}" is not known`, {
      where,
      hint: `Give bandwidth_gb, or a chip of these: ${knownChips().join(", ")}.`,
    });
  const device = node.device ?? (sheet === undefined ? "cpu" : "metal");
  const share = device === "metal" ? 0.75 : 0.9;
  const total = node.memory_gb * 1e9;
  const figures = [
    node.step_us,
    node.dense_layer_us,
    node.moe_layer_us,
    node.handover_us,
    node.tera_multiply_adds,
  ];
  const assumed = ASSUMED_SPEED[device];
  return {
    id: node.name,
    name: node.name,
    device,
    memory: { total, available: node.available_gb === undefined ? total * share : node.available_gb * 1e9 },
    bandwidth,
    speed: figures.every((figure) => figure === undefined)
      ? null
      : {
          multiplyAdds: (node.tera_multiply_adds ?? 0) * 1e12,
          stepUs: node.step_us ?? assumed.stepUs,
          denseLayerUs: node.dense_layer_us ?? assumed.denseLayerUs,
          moeLayerUs: node.moe_layer_us ?? assumed.moeLayerUs,
          handoverUs: node.handover_us ?? assumed.handoverUs,
        },
  };
}

function wrong(where: string, message: string): CaravanError {
  return new CaravanError("invalid_argument", message, { where });
}
