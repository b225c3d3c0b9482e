// caravan plan: what of a model would go where, in bytes for each node, and how fast it would be. For this machine, or for a
// cluster that a file describes. Reads headers only.

import { availableParallelism, cpus, hostname } from "node:os";
import { profileModel } from "../cluster/model-profile.ts";
import { NodeListSchema, nodesOf } from "../cluster/node-list.ts";
import { type PlacementNode, planPlacements } from "../cluster/placement.ts";
import { planJson, planText } from "../cluster/plan-report.ts";
import { ASSUMED_SPEED } from "../cluster/predict.ts";
import type { Link, PlacementRequest } from "../cluster/types.ts";
import { measureBandwidth, measureInt8 } from "../engine/binding.ts";
import { readModelConfig } from "../model/config.ts";
import { type LoadPlan, makeLoadPlan } from "../model/load-plan.ts";
import { availableMemory } from "../model/machine-memory.ts";
import type { KvType } from "../model/memory-plan.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import { weightBytesOfStep } from "../model/token-work.ts";
import type { Arguments, Command } from "./command.ts";
import { readJsonFile } from "./json-file.ts";
import { findWeights } from "./model-argument.ts";

/** Bytes that are read to measure bandwidth: as many as a token needs, within what is worth the time. */
const LEAST_READ = 1 << 26;
const MOST_READ = 1 << 30;

/** Share of the int8 peak that prompts reach, everything beside the products included. */
const PROMPT_SHARE = 0.3;

/** Measures for a moment. The time of a layer beside reading is a typical one. */
function thisMachine(plan: LoadPlan, threads: number): PlacementNode {
  const bytes = Math.min(MOST_READ, Math.max(LEAST_READ, weightBytesOfStep(plan, 1)));
  const { total, available } = availableMemory();
  return {
    id: "here",
    name: hostname() || cpus()[0]?.model.trim() || "this machine",
    device: "cpu",
    memory: { total, available },
    bandwidth: measureBandwidth(Math.min(bytes, available / 4), threads),
    speed: { ...ASSUMED_SPEED.cpu, multiplyAdds: PROMPT_SHARE * (measureInt8(threads) ?? 0) },
  };
}

function kvTypeOf(plan: LoadPlan, args: Arguments): KvType {
  if (args.choice("kv-bits", ["8", "16"]) === "8") return "q8";
  return plan.config.dtype === "bfloat16" ? "bf16" : "f16";
}

export const plan: Command = {
  name: "plan",
  summary: "show what of a model would go where, and how fast it would be",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    nodes: {
      value: "FILE.json",
      help: "plan for the cluster that the file describes instead of this machine",
    },
    context: { value: "N", help: "tokens of context that every stream may reach (default 8192)" },
    streams: { value: "N", help: "requests at once (default 1)" },
    tensor: { value: "N", help: "only placements with N tensor parallel ranks a stage" },
    pipeline: { value: "N", help: "only placements with N stages" },
    "kv-bits": { value: "8|16", help: "bits of the cache (default 16)" },
    threads: { value: "T", help: "compute threads of this machine (default: the machine's)" },
    json: { help: "print one JSON object" },
  },
  details: `FILE.json: {"nodes": [{"name": "a", "chip": "M3 Ultra", "memory_gb": 512}, …],
"link": {"kind": "rdma", "latency_us": 16, "bandwidth_gb": 6}}. See docs/cluster.md for all fields.
Speeds are predicted from bandwidths, the time of a layer and links; notes name what was not measured.`,
  async run(args) {
    const threads = args.integer("threads", 1, 256) ?? availableParallelism();
    const context = args.integer("context", 1, 2 ** 40);
    const streams = args.integer("streams", 1, 4096);
    const tensor = args.integer("tensor", 1, 16);
    const pipeline = args.integer("pipeline", 1, 16);
    const asked: PlacementRequest = {
      ...(context === undefined ? {} : { context }),
      ...(streams === undefined ? {} : { streams }),
      ...(tensor === undefined ? {} : { tensor }),
      ...(pipeline === undefined ? {} : { pipeline }),
    };
    const file = args.text("nodes");
    const list = file === undefined ? undefined : nodesOf(readJsonFile(file, NodeListSchema), file);
    const model = findWeights(args.positional(0));
    const loadPlan = makeLoadPlan(readModelConfig(model.path), await openCheckpoint(model.path));
    const { nodes, links }: { nodes: PlacementNode[]; links: Link[] } = list ?? {
      nodes: [thisMachine(loadPlan, threads)],
      links: [],
    };
    const kvType = kvTypeOf(loadPlan, args);
    const found = planPlacements(profileModel(loadPlan), nodes, links, { asked, kvType, threads });
    process.stdout.write(
      args.flag("json")
        ? `${JSON.stringify(planJson(model.name, found, nodes))}\n`
        : planText(model.name, found, nodes),
    );
    return 0;
  },
};
