// From a model folder to an engine that computes steps, in this process: config, checkpoint headers, load plan, memory
// plan, cv_open. The runner, `caravan logits` and `caravan bench` all load this way.

import { availableParallelism } from "node:os";
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
import { bestCpu, cpuName } from "./binding.ts";
import type { LoadOptions } from "./load-options.ts";
import { encodePlan } from "./plan-encoder.ts";
import { NativeStepEngine } from "./step-engine.ts";

/** Most threads of cv_plan. */
const MOST_THREADS = 256;
/** New tokens a step: enough for matrix products at full speed, few enough to answer a cancel soon. */
const STEP_TOKENS = 512;
/** Share of the progress that reading config and headers stands for. */
const HEADERS_SHARE = 0.05;
/** CV_CPU_* of caravan.h. */
const CPU_LEVELS = [1, 2, 3, 4, 5, 16, 17, 18];
/** The graph has one batched attention kernel that reads both kinds of pages. */
const CPU_BACKEND: BackendCapabilities = { name: "cpu", batchedKinds: ["full", "chunked", "quantized"] };

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
  device: "cpu" | "metal";
  threads: number;
  /** Name of the kernel set. */
  cpu: string;
  /** Bytes, as the engine counts them. */
  memory: { weights_mapped: number; weights_copied: number; kv: number; scratch: number };
  close(): Promise<void>;
}

export interface LoadModelOptions extends LoadOptions {
  /** Most positions of one row, all with logits, from the vocabulary's size (`caravan logits`). */
  piece?: (vocab: number) => number;
}

/** 0 to 1, and what is being done. */
export type LoadProgress = (progress: number, detail: string) => void;

/** Throws bad_file, unsupported_model, out_of_memory, invalid_argument or not_built_yet, naming file or option. */
export async function loadModel(options: LoadModelOptions, onProgress?: LoadProgress): Promise<LoadedEngine> {
  const cpuLevel = options.cpu === undefined ? 0 : cpuLevelOf(options.cpu);
  onProgress?.(0, "reading config.json");
  const config = readModelConfig(options.modelDir);
  onProgress?.(0.02, "reading the checkpoint's headers");
  const plan = makeLoadPlan(config, await openCheckpoint(options.modelDir));

  const compute = options.compute ?? "fast";
  const threads = Math.min(options.threads ?? availableParallelism(), MOST_THREADS);
  const kvType = options.kvBits === 8 ? "q8" : kvTypeOf(config, compute);
  const piece = options.piece?.(config.vocabSize) ?? 0;
  const rows = options.streams ?? MOST_STREAMS;
  const maxTokens = Math.max(options.piece === undefined ? STEP_TOKENS : 1, rows, piece);
  const maxLogits = options.piece === undefined ? rows + PROMPT_LOGITS_A_STEP : Math.max(rows, piece);
  const memory = planMemory(plan, {
    ...(options.context === undefined ? {} : { context: options.context }),
    ...(options.streams === undefined ? {} : { streams: options.streams }),
    kvType,
    threads,
    maxTokens,
    maxLogits,
    available: availableMemory().available,
  });
  const { pageTokens, fullPages, chunkPages, streams } = memory;
  const bytes = encodePlan(plan, {
    device: options.device ?? "cpu",
    compute,
    threads,
    pageTokens,
    fullPages,
    chunkPages,
    kvType,
    maxRows: streams,
    maxTokens,
    maxLogits,
    slots: streams,
    cpuLevel,
  });

  const weights = memory.weightsMapped + memory.weightsCopied;
  const detail = `loading ${(weights / 1e9).toFixed(2)} GB of weights`;
  onProgress?.(HEADERS_SHARE, detail);
  const engine = await NativeStepEngine.load(bytes, config.vocabSize, (done) =>
    onProgress?.(HEADERS_SHARE + (1 - HEADERS_SHARE) * Math.min(1, done / weights), detail),
  );
  const stats = engine.stats();
  if (cpuLevel !== 0 && stats.cpuLevel !== cpuLevel) {
    await engine.close();
    throw new CaravanError("invalid_argument", `this machine cannot run the kernel set "${options.cpu}"`, {
      param: "cpu",
      hint: `its best is "${bestCpu().name}"`,
    });
  }
  return {
    engine,
    config,
    plan,
    memoryPlan: memory,
    geometry: { pageTokens, chunk: config.chunk, fullPages, chunkPages },
    limits: { maxRows: streams, maxTokens, maxLogits, slots: streams, vocab: config.vocabSize },
    contextTokens: memory.context,
    cacheKinds: [
      ...new Set<CacheKind>(config.layers.map((layer) => (layer.chunked ? "chunked" : "full"))),
      ...(kvType === "q8" ? (["quantized"] as const) : []),
    ],
    backend: CPU_BACKEND,
    stopTokens: config.eosTokens,
    device: options.device ?? "cpu",
    threads: stats.threads,
    cpu: cpuName(stats.cpuLevel),
    memory: {
      weights_mapped: stats.weightsMapped,
      weights_copied: stats.weightsCopied,
      kv: stats.kvBytes,
      scratch: stats.scratchBytes,
    },
    close: () => engine.close(),
  };
}

/** The cache keeps what the model's makers computed with; `exact` keeps everything. */
function kvTypeOf(config: ModelConfig, compute: "fast" | "exact"): KvType {
  if (compute === "exact") return "f32";
  return config.dtype === "bfloat16" ? "bf16" : "f16";
}

function cpuLevelOf(name: string): number {
  const level = CPU_LEVELS.find((each) => cpuName(each) === name);
  if (level !== undefined) return level;
  throw new CaravanError("invalid_argument", `there is no kernel set "${name}"`, {
    param: "cpu",
    hint: `the sets are ${CPU_LEVELS.map(cpuName).join(", ")}`,
  });
}
