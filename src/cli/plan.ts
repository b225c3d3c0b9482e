// caravan plan: what of a model would go where, in bytes for each node, and how fast it would be. For the cluster of the node that runs here,
// for a cluster that a file describes, or for this machine. Reads headers only, from the hub where the model is not here.

import { availableParallelism, cpus, hostname } from "node:os";
import { profileModel } from "../cluster/model-profile.ts";
import { NodeListSchema, nodesOf } from "../cluster/node-list.ts";
import { type PlacementNode, planPlacements } from "../cluster/placement.ts";
import { type PlanReport, planReport, planText } from "../cluster/plan-report.ts";
import { ASSUMED_SPEED } from "../cluster/predict.ts";
import type { Link, PlacementRequest } from "../cluster/types.ts";
import { measureBandwidth, measureVectorInt8 } from "../engine/binding.ts";
import { CaravanError } from "../errors.ts";
import { readModelConfig } from "../model/config.ts";
import { readHubModel } from "../model/download/hub-headers.ts";
import { type LoadPlan, makeLoadPlan } from "../model/load-plan.ts";
import { availableMemory } from "../model/machine-memory.ts";
import type { KvType } from "../model/memory-plan.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import { weightBytesOfStep } from "../model/token-work.ts";
import type { Arguments, Command } from "./command.ts";
import { readJsonFile } from "./json-file.ts";
import { findWeights } from "./model-argument.ts";
import { clusterNode, planAt } from "./node-client.ts";
import { formatBytes } from "./progress.ts";

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
    speed: { ...ASSUMED_SPEED.cpu, multiplyAdds: PROMPT_SHARE * (measureVectorInt8(threads) ?? 0) },
  };
}

function kvTypeOf(plan: LoadPlan, args: Arguments): KvType {
  if (args.choice("kv-bits", ["8", "16"]) === "8") return "q8";
  return plan.config.dtype === "bfloat16" ? "bf16" : "f16";
}

function requestOf(args: Arguments): PlacementRequest {
  const context = args.integer("context", 1, 2 ** 40);
  const streams = args.integer("streams", 1, 4096);
  const tensor = args.integer("tensor", 1, 16);
  const pipeline = args.integer("pipeline", 1, 16);
  return {
    ...(context === undefined ? {} : { context }),
    ...(streams === undefined ? {} : { streams }),
    ...(tensor === undefined ? {} : { tensor }),
    ...(pipeline === undefined ? {} : { pipeline }),
  };
}

interface ModelHere {
  name: string;
  plan: LoadPlan;
  /** Where its headers were read. */
  headers: string;
}

/** From the disk, or from the hub where it is not there. */
async function modelOf(name: string): Promise<ModelHere> {
  try {
    const model = findWeights(name);
    const plan = makeLoadPlan(readModelConfig(model.path), await openCheckpoint(model.path));
    return { name: model.name, plan, headers: "this machine's disk" };
  } catch (thrown) {
    if (!(thrown instanceof CaravanError) || thrown.code !== "model_not_found") throw thrown;
    const model = await readHubModel(name).catch((failed) => {
      // A name that no hub could know is simply not here.
      throw failed instanceof CaravanError && failed.code === "model_not_found" ? thrown : failed;
    });
    const { config, checkpoint, id, readBytes, totalBytes } = model;
    const read = `${formatBytes(readBytes)} of ${formatBytes(totalBytes)}`;
    return { name: id, plan: makeLoadPlan(config, checkpoint), headers: `the hub, ${read}` };
  }
}

/** Planned by this process. */
async function planHere(args: Arguments, asked: PlacementRequest): Promise<PlanReport> {
  const threads = args.integer("threads", 1, 256) ?? availableParallelism();
  const file = args.text("nodes");
  const list = file === undefined ? undefined : nodesOf(readJsonFile(file, NodeListSchema), file);
  const { name, plan: loadPlan, headers } = await modelOf(args.positional(0));
  const { nodes, links }: { nodes: PlacementNode[]; links: Link[] } = list ?? {
    nodes: [thisMachine(loadPlan, threads)],
    links: [],
  };
  const terms = { asked, kvType: kvTypeOf(loadPlan, args), threads };
  return planReport(name, headers, planPlacements(profileModel(loadPlan), nodes, links, terms), nodes);
}

export const plan: Command = {
  name: "plan",
  summary: "show what of a model would go where, and how fast it would be",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    nodes: {
      value: "FILE.json",
      help: "plan for the cluster that the file describes",
    },
    local: { help: "plan for this machine alone, even where a node of a cluster runs here" },
    context: { value: "N", help: "tokens of context that every stream may reach (default 8192)" },
    streams: { value: "N", help: "requests at once (default 1)" },
    tensor: { value: "N", help: "only placements with N tensor parallel ranks a stage" },
    pipeline: { value: "N", help: "only placements with N stages" },
    "kv-bits": { value: "8|16", help: "bits of the cache (default 16); with --local or --nodes" },
    threads: {
      value: "T",
      help: "compute threads of this machine (default: the machine's); with --local or --nodes",
    },
    json: { help: "print one JSON object" },
  },
  details: `Where a node of a cluster runs on this machine it is asked, and plans for all nodes that it sees.
Headers of a model that is not on disk are read from the hub: some hundred kilobytes, nothing is downloaded.
FILE.json: {"nodes": [{"name": "a", "chip": "M3 Ultra", "memory_gb": 512}, …],
"link": {"kind": "rdma", "latency_us": 16, "bandwidth_gb": 6}}. See docs/cluster.md for all fields.
Speeds are predicted from bandwidths, the time of a layer and links; notes name what was not measured.`,
  async run(args) {
    const asked = requestOf(args);
    const own = args.flag("local") || args.text("nodes") !== undefined;
    const member = own ? undefined : await clusterNode();
    if (member !== undefined)
      for (const option of ["kv-bits", "threads"])
        if (args.text(option) !== undefined)
          throw new CaravanError("invalid_argument", `--${option} is the running node's to choose`, {
            where: member.node.url,
            hint: "Add --local to plan for this machine alone.",
          });
    const report =
      member === undefined
        ? await planHere(args, asked)
        : await planAt(member.node, { model: args.positional(0), ...asked });
    if (args.flag("json")) {
      const source = member === undefined ? {} : { node: member.node.url, cluster: member.cluster };
      process.stdout.write(`${JSON.stringify({ ...source, ...report })}\n`);
      return 0;
    }
    if (member !== undefined)
      process.stdout.write(
        `Planned by the running node ${member.node.url} for the ${member.nodes} nodes of the cluster "${member.cluster}" that it sees.\n\n`.replace(
          "the 1 nodes",
          "the one node",
        ),
      );
    process.stdout.write(planText(report));
    return 0;
  },
};
