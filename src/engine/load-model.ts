// From a model folder to an engine that computes steps, in this process: config, checkpoint headers, load plan, memory
// plan, cv_open; and where several ranks were asked for, the processes of the others. The runner, `caravan logits` and
// `caravan bench` all load this way.

import { availableParallelism } from "node:os";
import { evenShares } from "../cluster/even-shares.ts";
import { shardPlan } from "../cluster/shard.ts";
import { CaravanError } from "../errors.ts";
import { type ModelConfig, readModelConfig } from "../model/config.ts";
import { type LoadPlan, makeLoadPlan } from "../model/load-plan.ts";
import { availableMemory } from "../model/machine-memory.ts";
import { type KvType, type MemoryPlan, MOST_STREAMS, planMemory } from "../model/memory-plan.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import type { CacheGeometry } from "../scheduler/pages.ts";
import type { BackendCapabilities, CacheKind } from "../scheduler/policy.ts";
import { PROMPT_LOGITS_A_STEP } from "../scheduler/scheduler.ts";
import type { StepLimits } from "../scheduler/step.ts";
import { bestCpu, cpuLevel, cpuName, cpuNames, type GroupPointer, performanceCores } from "./binding.ts";
import { engineSizes, STEP_TOKENS } from "./instance-sizes.ts";
import type { LoadOptions } from "./load-options.ts";
import { LocalRanks } from "./local-ranks.ts";
import { type ChosenDevice, chooseDevice, type Device } from "./metal-device.ts";
import { encodePlan } from "./plan-encoder.ts";
import type { RankReady } from "./rank-process.ts";
import { MOST_RANKS, type RankLoad, type RankMemory } from "./rank-protocol.ts";
import type { Ranks } from "./ranks.ts";
import type { RemoteRanks } from "./remote-ranks.ts";
import { NativeStepEngine } from "./step-engine.ts";

/** Most threads of cv_plan. */
const MOST_THREADS = 256;
/** Share of the progress that reading config and headers stands for. */
const HEADERS_SHARE = 0.05;
/** The graph has one batched attention kernel that reads both kinds of pages. */
const BACKENDS: Record<Device, BackendCapabilities> = {
  cpu: { name: "cpu", batchedKinds: ["full", "chunked", "quantized"] },
  metal: { name: "metal", batchedKinds: ["full", "chunked", "quantized"] },
};

export interface LoadedEngine {
  engine: NativeStepEngine;
  config: ModelConfig;
  plan: LoadPlan;
  memoryPlan: MemoryPlan;
  geometry: CacheGeometry;
  limits: StepLimits;
  contextTokens: number;
  cacheKinds: CacheKind[];
  backend: BackendCapabilities;
  /** End-of-sequence tokens of the model. */
  stopTokens: readonly number[];
  device: Device;
  /** Why this device, in a sentence. */
  deviceReason: string;
  /** Of each rank. */
  threads: number;
  /** Name of the kernel set. */
  cpu: string;
  /** Bytes, as the engines of all ranks count them. */
  memory: RankMemory;
  /** The other ranks; when one is lost, the engine takes no further steps. */
  ranks?: Ranks;
  close(): Promise<void>;
}

export interface LoadModelOptions extends LoadOptions {
  /** Most positions of one row, all with logits, from the vocabulary's size (`caravan logits`). */
  piece?: (vocab: number) => number;
}

/** 0 to 1, and what is being done. */
export type LoadProgress = (progress: number, detail: string) => void;

/** Throws bad_file, unsupported_model, out_of_memory, invalid_argument, engine_failed or not_built_yet, naming file or
 * option. On failure nothing that it started is left running. remote: the connected ranks of `options.instance`. */
export async function loadModel(
  options: LoadModelOptions,
  onProgress?: LoadProgress,
  remote?: RemoteRanks,
): Promise<LoadedEngine> {
  const prepared = await prepare(options, onProgress);
  const { memory, load } = prepared;
  const weights = memory.weightsMapped + memory.weightsCopied;
  const detail = `loading ${(weights / 1e9).toFixed(2)} GB of weights`;
  const onBytes = (done: number) =>
    onProgress?.(HEADERS_SHARE + (1 - HEADERS_SHARE) * Math.min(1, done / weights), detail);
  onProgress?.(HEADERS_SHARE, detail);
  if (load.shares.length === 1) {
    const engine = await openEngine(prepared, onBytes, null);
    return await loaded(prepared, options, engine, undefined, []);
  }
  if (remote !== undefined) {
    const engine = await openEngine(prepared, onBytes, remote.group.pointer);
    return await loaded(prepared, options, engine, remote, []);
  }
  const { tensor = 1, pipeline = 1, transport = "auto" } = options;
  const ranks = await LocalRanks.start({ tensor, pipeline, transport });
  let engine: NativeStepEngine | undefined;
  try {
    const opening = openEngine(prepared, (done) => onBytes(done + ranks.loadedBytes), ranks.group.pointer);
    const [opened, others] = await Promise.allSettled([opening, ranks.load(load)]);
    if (opened.status === "fulfilled") engine = opened.value;
    // A rank that cannot load fails the group, and with it rank 0: its own reason says more.
    if (others.status === "rejected") throw others.reason;
    if (opened.status === "rejected") throw opened.reason;
    return await loaded(prepared, options, opened.value, ranks, others.value);
  } catch (thrown) {
    await ranks.close(async () => await engine?.close());
    throw thrown;
  }
}

/** What is decided before anything is loaded. */
interface Prepared {
  config: ModelConfig;
  /** Of the whole model. */
  plan: LoadPlan;
  /** Of all ranks together. */
  memory: MemoryPlan;
  load: RankLoad;
  chosen: ChosenDevice;
}

async function prepare(options: LoadModelOptions, onProgress?: LoadProgress): Promise<Prepared> {
  const cpuLevel = options.cpu === undefined ? 0 : cpuLevelOf(options.cpu);
  onProgress?.(0, "reading config.json");
  const config = readModelConfig(options.modelDir);
  onProgress?.(0.02, "reading the checkpoint's headers");
  const plan = makeLoadPlan(config, await openCheckpoint(options.modelDir));
  const { instance, tensor = 1, pipeline = 1 } = options;
  if (tensor * pipeline > MOST_RANKS)
    throw new CaravanError(
      "invalid_argument",
      `${tensor * pipeline} ranks: at most ${MOST_RANKS} are possible`,
      {
        param: "tensor",
      },
    );
  const shares = instance?.shares ?? evenShares(plan, tensor, pipeline);
  const compute = options.compute ?? "fast";
  const cores = performanceCores() || availableParallelism();
  const here = instance === undefined ? shares.length : 1;
  const threads = Math.min(options.threads ?? Math.max(1, Math.floor(cores / here)), MOST_THREADS);
  const chosen = chooseDevice(options.device ?? "auto", {
    config,
    kvType: (bfloat) => (options.kvBits === 8 ? "q8" : kvTypeOf(config, compute, bfloat)),
  });
  const { device, kvType, metal } = chosen;
  const piece = options.piece?.(config.vocabSize) ?? 0;
  const rows = instance?.sizes.maxRows ?? options.streams ?? MOST_STREAMS;
  const maxTokens = Math.max(options.piece === undefined ? STEP_TOKENS : 1, rows, piece);
  const maxLogits = options.piece === undefined ? rows + PROMPT_LOGITS_A_STEP : Math.max(rows, piece);
  const machine = availableMemory();
  const ranksHere = shares.slice(0, here).map((_, rank) => shardPlan(plan, shares, rank));
  const memory = planMemory(shares.length === 1 ? plan : ranksHere, {
    ...(options.context === undefined ? {} : { context: options.context }),
    ...(options.streams === undefined && instance === undefined ? {} : { streams: rows }),
    kvType,
    exact: compute === "exact",
    threads,
    maxTokens,
    maxLogits,
    available: machine.available,
    ...(metal === undefined
      ? {}
      : {
          gpu: {
            workingSet: metal.workingSet,
            total: machine.total,
            alone: process.platform === "darwin",
          },
        }),
  });
  const load: RankLoad = {
    modelDir: options.modelDir,
    shares,
    sizes: instance?.sizes ?? {
      ...engineSizes(memory, { compute, kvType, streams: memory.streams, maxTokens, maxLogits }),
      checkRanks: options.checkRanks ?? false,
    },
    threads,
    device,
    cpuLevel,
  };
  return { config, plan, memory, load, chosen };
}

/** Rank 0's engine. */
async function openEngine(
  { config, plan, load }: Prepared,
  onBytes: (done: number) => void,
  group: GroupPointer | null,
): Promise<NativeStepEngine> {
  const { shares, sizes, threads, device = "cpu", cpuLevel = 0 } = load;
  const shard = shares.length === 1 ? plan : shardPlan(plan, shares, 0);
  const bytes = encodePlan(shard, { ...sizes, threads, device, cpuLevel });
  return await NativeStepEngine.load(bytes, config.vocabSize, onBytes, group);
}

async function loaded(
  { config, plan, memory, load, chosen }: Prepared,
  options: LoadModelOptions,
  engine: NativeStepEngine,
  ranks: Ranks | undefined,
  others: readonly RankReady[],
): Promise<LoadedEngine> {
  const stats = engine.stats();
  const { cpuLevel, sizes } = load;
  if (cpuLevel !== undefined && cpuLevel !== 0 && stats.cpuLevel !== cpuLevel) {
    if (ranks === undefined) await engine.close();
    throw new CaravanError("invalid_argument", `this machine cannot run the kernel set "${options.cpu}"`, {
      param: "cpu",
      hint: `its best is "${bestCpu().name}"`,
    });
  }
  const { pageTokens, fullPages, chunkPages, kvType, maxRows, maxTokens, maxLogits, slots } = sizes;
  const sum = (key: keyof RankMemory, own: number) =>
    others.reduce((total, other) => total + other.memory[key], own);
  ranks?.lost.then((why) => engine.abort(why));
  return {
    engine,
    config,
    plan,
    memoryPlan: memory,
    geometry: { pageTokens, chunk: config.chunk, fullPages, chunkPages },
    limits: {
      maxRows,
      maxTokens,
      maxLogits,
      slots,
      vocab: config.vocabSize,
      stages: ranks?.grid.pipeline ?? 1,
    },
    contextTokens: memory.context,
    cacheKinds: [
      ...new Set<CacheKind>(config.layers.map((layer) => (layer.chunked ? "chunked" : "full"))),
      ...(kvType === "q8" ? (["quantized"] as const) : []),
    ],
    backend: BACKENDS[chosen.device],
    stopTokens: config.eosTokens,
    device: chosen.device,
    deviceReason: chosen.reason,
    threads: stats.threads,
    cpu: cpuName(stats.cpuLevel),
    memory: {
      weights_mapped: sum("weights_mapped", stats.weightsMapped),
      weights_copied: sum("weights_copied", stats.weightsCopied),
      kv: sum("kv", stats.kvBytes),
      scratch: sum("scratch", stats.scratchBytes),
    },
    ...(ranks === undefined ? {} : { ranks }),
    close: () => (ranks === undefined ? engine.close() : ranks.close(() => engine.close())),
  };
}

/** The cache keeps what the model's makers computed with; `exact` keeps everything. */
function kvTypeOf(config: ModelConfig, compute: "fast" | "exact", bfloat: boolean): KvType {
  if (compute === "exact") return "f32";
  return config.dtype === "bfloat16" && bfloat ? "bf16" : "f16";
}

function cpuLevelOf(name: string): number {
  const level = cpuLevel(name);
  if (level !== undefined) return level;
  throw new CaravanError("invalid_argument", `there is no kernel set "${name}"`, {
    param: "cpu",
    hint: `the sets are ${cpuNames().join(", ")}`,
  });
}
