// What `caravan bench` measures: the real scheduler on the real engine in this process, with random prompts, ends of
// sequence banned, one warm-up of every setting and then `repeat` trials. Every stream has a prompt of its own, so no
// cache of prefixes could help.

import { cpus } from "node:os";
import { readModelConfig } from "../model/config.ts";
import { multiplyAddsOfPromptToken, weightBytesOfStep } from "../model/token-work.ts";
import { choosePolicy } from "../scheduler/policy.ts";
import { type BesideOptions, type BesideResult, besideContext, measureBeside } from "./bench-beside.ts";
import { type CachePerplexity, measurePerplexity } from "./bench-perplexity.ts";
import { measurePrefix, type PrefixResult } from "./bench-prefix.ts";
import { type RanksResult, RankWatch } from "./bench-ranks.ts";
import { quantile, round, type Spread, spread } from "./bench-statistics.ts";
import { HEAD_START, runTrial, type Trial } from "./bench-trial.ts";
import { bestCpu, cpuLevel, measureBandwidth, measureInt8 } from "./binding.ts";
import { type LoadedEngine, loadModel } from "./load-model.ts";
import type { RankOptions } from "./load-options.ts";
import type { DeviceChoice } from "./metal-device.ts";
import { RandomTokens } from "./random-tokens.ts";

export interface BenchOptions {
  /** Name for the report. */
  model: string;
  modelDir: string;
  promptTokens: readonly number[];
  generate: readonly number[];
  streams: readonly number[];
  /** Trials of every setting behind the warm-up, at least 1. */
  repeat: number;
  device?: DeviceChoice;
  compute?: "fast" | "exact";
  threads?: number;
  cpu?: string;
  scheduling?: "auto" | "sequential" | "batched";
  /** Ranks on this machine, processes of their own. */
  ranks?: RankOptions;
  /** Of the random prompts. */
  seed?: number;
  /** Also measure the machine's ceilings (about two seconds). */
  ceiling?: boolean;
  /** Also report memory. */
  memory?: boolean;
  /** Also measure prompts whose prefix is in the cache. */
  prefix?: boolean;
  /** Bits of the cache's elements. With 8 the report says what they change. */
  kvBits?: 8 | 16;
  /** Length of a prompt to measure beside the most streams. */
  beside?: number;
  onProgress?: (done: number, total: number, detail: string) => void;
}

export interface BenchResult {
  prompt_tokens: number;
  generate: number;
  streams: number;
  /** Prompt tokens of all streams over the time until all have their first token. */
  prompt_tps: Spread;
  /** Tokens of all streams over the wall time while all of them decode (bench-trial.ts). */
  generation_tps: Spread;
  /** From the request to its first token, over streams and trials. */
  ttft_ms: Spread;
  /** Between two tokens of a stream while all decode, over streams and trials. */
  itl_ms: { p50: number; p95: number; p99: number };
  /** Highest resident memory of the process (rank 0's) so far, mapped weights included. */
  peak_memory_bytes: number;
}

export interface BenchReport {
  model: string;
  device: string;
  threads: number;
  load_s: number;
  results: BenchResult[];
  /** The machine's ceilings, where asked for. */
  machine?: MachineCeiling;
  /** What loading planned and what the engine took, bytes, where asked for. */
  memory?: BenchMemory;
  /** First tokens with the prompt's prefix in the cache, one for each length of prompt, where asked for. */
  prefix?: PrefixResult[];
  /** A long prompt beside the most streams, where asked for. */
  beside?: BesideResult;
  /** How the cache is kept and batched, and what 8 bits change, where 8 bits were asked for. */
  cache?: { kv_bits: 8; policy: string; perplexity: CachePerplexity };
  /** What several ranks cost each other, where there are some. */
  ranks?: RanksResult;
}

export interface MachineCeiling {
  /** Name of the processor and of the kernel set. */
  processor: string;
  kernels: string;
  /** Why a better kernel set that the processor has is not used. */
  kernels_note?: string;
  /** Bytes a second over a buffer as large as the model (at most 4 GB), with the run's threads. */
  read_bandwidth: number;
  /** int8 multiply-adds a second; absent where the kernel set has no such instruction. */
  int8_multiply_adds?: number;
  /** By result: the speeds that these ceilings allow for the weights alone, tokens a second. */
  limits: { prompt_tps?: number; generation_tps: number }[];
}

export interface BenchMemory {
  planned: { weights: number; kv: number; scratch: number };
  engine: { weights: number; kv: number; scratch: number };
  /** Resident memory of the process, the interpreter included. */
  resident: number;
}

/** Bytes of the buffer whose reading is measured. Beyond a few gigabytes it says nothing new. */
const SMALLEST_BUFFER = 1 << 24;
const LARGEST_BUFFER = 4e9;

/** Every combination of prompt length, length of output and streams. Throws what loading throws, and engine errors. */
export async function runBench(options: BenchOptions): Promise<BenchReport> {
  const started = performance.now();
  const longest = Math.max(...options.promptTokens) + Math.max(...options.generate) + 1;
  // A head start may be given up where the model's context ends.
  const { contextLength } = readModelConfig(options.modelDir);
  const context = Math.max(longest, Math.min(longest + HEAD_START, contextLength));
  const { device, compute, threads, cpu } = options;
  const beside = besideOf(options);
  const model = await loadModel({
    model: options.model,
    modelDir: options.modelDir,
    context: Math.max(context, beside === undefined ? 0 : besideContext(beside, contextLength)),
    streams: Math.max(...options.streams) + (beside === undefined ? 0 : 1),
    ...(device === undefined ? {} : { device }),
    ...(compute === undefined ? {} : { compute }),
    ...(threads === undefined ? {} : { threads }),
    ...(cpu === undefined ? {} : { cpu }),
    ...(options.kvBits === undefined ? {} : { kvBits: options.kvBits }),
    ...options.ranks,
  });
  const load_s = (performance.now() - started) / 1000;
  try {
    const ceilings = options.ceiling ? measureCeilings(model) : undefined;
    const watch = new RankWatch(model);
    const results = await measureAll(model, options, watch);
    const ranks = watch.result();
    return {
      model: options.model,
      device: model.device,
      threads: model.threads,
      load_s: round(load_s, 3),
      results,
      ...(ranks === undefined ? {} : { ranks }),
      ...(ceilings === undefined
        ? {}
        : { machine: machineOf(model, results, ceilings, measureCeilings(model)) }),
      ...(options.prefix ? { prefix: await measurePrefixes(model, options) } : {}),
      ...(beside === undefined
        ? {}
        : { beside: await measureBeside(model, beside, randomFor(model, options)) }),
      ...(options.kvBits === 8 ? { cache: await measureCache(model, options) } : {}),
      ...(options.memory ? { memory: memoryOf(model) } : {}),
    };
  } finally {
    await model.close();
  }
}

async function measureAll(
  model: LoadedEngine,
  options: BenchOptions,
  watch: RankWatch,
): Promise<BenchResult[]> {
  const settings = options.promptTokens.flatMap((prompt_tokens) =>
    options.generate.flatMap((generate) =>
      options.streams.map((streams) => ({ prompt_tokens, generate, streams })),
    ),
  );
  const random = new RandomTokens(options.seed ?? 1, model.limits.vocab, model.stopTokens);
  const results: BenchResult[] = [];
  const total = settings.length * (options.repeat + 1);
  let done = 0;
  for (const setting of settings) {
    const trials: Trial[] = [];
    for (let i = 0; i <= options.repeat; i++) {
      const detail = `${setting.prompt_tokens} + ${setting.generate} tokens, ${setting.streams} streams`;
      options.onProgress?.(done, total, i === 0 ? `${detail}, warm-up` : `${detail}, trial ${i}`);
      const trial = await runTrial(model, {
        scheduling: options.scheduling ?? "auto",
        prompts: Array.from({ length: setting.streams }, () => random.tokens(setting.prompt_tokens)),
        generate: setting.generate,
      });
      if (i > 0) trials.push(trial);
      else await watch.start();
      done++;
    }
    await watch.stop();
    results.push({ ...setting, ...summarize(trials, setting) });
  }
  options.onProgress?.(total, total, "done");
  return results;
}

async function measurePrefixes(model: LoadedEngine, options: BenchOptions): Promise<PrefixResult[]> {
  const random = randomFor(model, options);
  const list: PrefixResult[] = [];
  for (const [i, length] of options.promptTokens.entries()) {
    options.onProgress?.(i, options.promptTokens.length, `${length} tokens of a known prompt`);
    list.push(await measurePrefix(model, length, options.repeat, random));
  }
  return list;
}

async function measureCache(
  model: LoadedEngine,
  options: BenchOptions,
): Promise<NonNullable<BenchReport["cache"]>> {
  const { modelDir, threads, cpu } = options;
  const { cacheKinds, backend } = model;
  const { reason } = choosePolicy({ cacheKinds, backend, requested: options.scheduling ?? "auto" });
  options.onProgress?.(0, 1, "perplexity with both caches");
  const load = {
    modelDir,
    ...(threads === undefined ? {} : { threads }),
    ...(cpu === undefined ? {} : { cpu }),
  };
  return {
    kv_bits: 8,
    policy: reason,
    perplexity: await measurePerplexity(load, model.config.contextLength, randomFor(model, options)),
  };
}

/** Other tokens than those of the trials. */
function randomFor(model: LoadedEngine, options: BenchOptions): RandomTokens {
  return new RandomTokens((options.seed ?? 1) + 1, model.limits.vocab, model.stopTokens);
}

function besideOf({ beside, streams, promptTokens }: BenchOptions): BesideOptions | undefined {
  if (beside === undefined) return undefined;
  return {
    streams: Math.max(...streams),
    streamPromptTokens: Math.min(...promptTokens),
    promptTokens: beside,
  };
}

interface Ceilings {
  bandwidth: number;
  int8: number | undefined;
}

/** With the engine loaded but idle. */
function measureCeilings({ memory, threads: each, ranks, cpu }: LoadedEngine): Ceilings {
  const threads = each * (ranks === undefined ? 1 : ranks.grid.tensor * ranks.grid.pipeline);
  const size = memory.weights_mapped + memory.weights_copied;
  return {
    bandwidth: measureBandwidth(Math.min(Math.max(size, SMALLEST_BUFFER), LARGEST_BUFFER), threads),
    int8: measureInt8(threads, cpuLevel(cpu)),
  };
}

/** The better of two measurements around the trials: whatever else ran on the machine only made one worse. */
function machineOf(
  model: LoadedEngine,
  results: readonly Setting[],
  before: Ceilings,
  after: Ceilings,
): MachineCeiling {
  const bandwidth = Math.max(before.bandwidth, after.bandwidth);
  const int8 =
    before.int8 === undefined || after.int8 === undefined ? undefined : Math.max(before.int8, after.int8);
  const promptWork = multiplyAddsOfPromptToken(model.plan);
  const { note } = bestCpu();
  return {
    processor: cpus()[0]?.model.trim() ?? "unknown processor",
    kernels: model.cpu,
    ...(note === undefined ? {} : { kernels_note: note }),
    read_bandwidth: Math.round(bandwidth),
    ...(int8 === undefined ? {} : { int8_multiply_adds: Math.round(int8) }),
    limits: results.map(({ streams }) => ({
      ...(int8 === undefined ? {} : { prompt_tps: round(int8 / promptWork, 1) }),
      generation_tps: round((streams * bandwidth) / weightBytesOfStep(model.plan, streams), 1),
    })),
  };
}

function memoryOf({ memory, memoryPlan }: LoadedEngine): BenchMemory {
  return {
    planned: {
      weights: memoryPlan.weightsMapped + memoryPlan.weightsCopied,
      kv: memoryPlan.kvBytes,
      scratch: memoryPlan.scratchBytes,
    },
    engine: {
      weights: memory.weights_mapped + memory.weights_copied,
      kv: memory.kv,
      scratch: memory.scratch,
    },
    resident: process.memoryUsage.rss(),
  };
}

type Setting = Pick<BenchResult, "prompt_tokens" | "generate" | "streams">;

function summarize(trials: Trial[], setting: Setting): Omit<BenchResult, keyof Setting> {
  const gaps = trials.flatMap((trial) => trial.gapsMs).sort((a, b) => a - b);
  const prompt = setting.prompt_tokens * setting.streams * 1000;
  return {
    prompt_tps: spread(
      trials.map((trial) => prompt / trial.allStartedMs),
      1,
    ),
    generation_tps: spread(
      trials.flatMap(({ generationTps }) => (generationTps > 0 ? [generationTps] : [])),
      1,
    ),
    ttft_ms: spread(
      trials.flatMap((trial) => trial.firstTokenMs),
      2,
    ),
    itl_ms: {
      p50: round(quantile(gaps, 0.5), 3),
      p95: round(quantile(gaps, 0.95), 3),
      p99: round(quantile(gaps, 0.99), 3),
    },
    peak_memory_bytes: process.resourceUsage().maxRSS * 1024,
  };
}
