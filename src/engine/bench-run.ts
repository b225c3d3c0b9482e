// What `caravan bench` measures: the real scheduler on the real engine in this process, with random prompts, ends of
// sequence banned, one warm-up of every setting and then `repeat` trials. Every stream has a prompt of its own, so no
// cache of prefixes could help.

import { CaravanError } from "../errors.ts";
import { choosePolicy } from "../scheduler/policy.ts";
import { Scheduler } from "../scheduler/scheduler.ts";
import { StepLoop } from "../scheduler/step-loop.ts";
import { type LoadedEngine, loadModel } from "./load-model.ts";
import { type GenerateEvent, GREEDY } from "./protocol.ts";

export interface BenchOptions {
  /** Name for the report. */
  model: string;
  modelDir: string;
  promptTokens: readonly number[];
  generate: readonly number[];
  streams: readonly number[];
  /** Trials of every setting behind the warm-up, at least 1. */
  repeat: number;
  device?: "cpu" | "metal";
  compute?: "fast" | "exact";
  threads?: number;
  cpu?: string;
  scheduling?: "auto" | "sequential" | "batched";
  /** Of the random prompts. */
  seed?: number;
  onProgress?: (done: number, total: number, detail: string) => void;
}

export interface Spread {
  median: number;
  min: number;
  max: number;
}

export interface BenchResult {
  prompt_tokens: number;
  generate: number;
  streams: number;
  /** Prompt tokens of all streams over the time until all have their first token. */
  prompt_tps: Spread;
  /** Tokens of all streams over the wall time, from the moment all have their first token. */
  generation_tps: Spread;
  /** From the request to its first token, over streams and trials. */
  ttft_ms: Spread;
  /** Between two tokens of a stream, over streams and trials. */
  itl_ms: { p50: number; p95: number; p99: number };
  /** Highest resident memory of the process so far, mapped weights included. */
  peak_memory_bytes: number;
}

export interface BenchReport {
  model: string;
  device: string;
  threads: number;
  load_s: number;
  results: BenchResult[];
}

interface Trial {
  /** Milliseconds from the start, one list a stream. */
  times: number[][];
}

/** Every combination of prompt length, length of output and streams. Throws what loading throws, and engine errors. */
export async function runBench(options: BenchOptions): Promise<BenchReport> {
  const started = performance.now();
  const longest = Math.max(...options.promptTokens) + Math.max(...options.generate);
  const { device, compute, threads, cpu } = options;
  const model = await loadModel({
    model: options.model,
    modelDir: options.modelDir,
    context: longest,
    streams: Math.max(...options.streams),
    ...(device === undefined ? {} : { device }),
    ...(compute === undefined ? {} : { compute }),
    ...(threads === undefined ? {} : { threads }),
    ...(cpu === undefined ? {} : { cpu }),
  });
  const load_s = (performance.now() - started) / 1000;
  try {
    const results = await measureAll(model, options);
    return {
      model: options.model,
      device: model.device,
      threads: model.threads,
      load_s: round(load_s, 3),
      results,
    };
  } finally {
    await model.close();
  }
}

async function measureAll(model: LoadedEngine, options: BenchOptions): Promise<BenchResult[]> {
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
      const trial = await runTrial(model, options.scheduling ?? "auto", setting, random);
      if (i > 0) trials.push(trial);
      done++;
    }
    results.push({ ...setting, ...summarize(trials, setting) });
  }
  options.onProgress?.(total, total, "done");
  return results;
}

type Setting = Pick<BenchResult, "prompt_tokens" | "generate" | "streams">;

/** All streams start together. */
function runTrial(
  model: LoadedEngine,
  scheduling: "auto" | "sequential" | "batched",
  setting: Setting,
  random: RandomTokens,
): Promise<Trial> {
  return new Promise((resolve, reject) => {
    const times = Array.from({ length: setting.streams }, (): number[] => []);
    let open = setting.streams;
    const started = performance.now();
    const emit = (event: GenerateEvent): void => {
      if (event.type === "token") times[Number(event.id)]?.push(performance.now() - started);
      if (event.type === "error") reject(CaravanError.fromJSON({ ...event.error }));
      if (event.type === "finish" && --open === 0) resolve({ times });
    };
    const scheduler = new Scheduler({
      geometry: model.geometry,
      limits: model.limits,
      contextTokens: model.contextTokens,
      mode: choosePolicy({ cacheKinds: model.cacheKinds, backend: model.backend, requested: scheduling })
        .mode,
      maxWaiting: setting.streams,
      now: () => performance.now(),
      emit,
    });
    const loop = new StepLoop({ scheduler, engine: model.engine, depth: 2, onFatal: reject });
    for (let i = 0; i < setting.streams; i++)
      loop.add({
        id: String(i),
        tokens: random.tokens(setting.prompt_tokens),
        max_tokens: setting.generate,
        stop_tokens: [...model.stopTokens],
        ban_stop_tokens: true,
        sampling: GREEDY,
      });
  });
}

function summarize(trials: Trial[], setting: Setting): Omit<BenchResult, keyof Setting> {
  const prompt: number[] = [];
  const generation: number[] = [];
  const first: number[] = [];
  const gaps: number[] = [];
  for (const { times } of trials) {
    const allStarted = Math.max(...times.map((list) => list[0] ?? 0));
    const end = Math.max(...times.map((list) => list.at(-1) ?? 0));
    const behind = times.flat().filter((time) => time > allStarted).length;
    prompt.push((setting.prompt_tokens * setting.streams * 1000) / allStarted);
    if (behind > 0) generation.push((behind * 1000) / (end - allStarted));
    for (const list of times) {
      first.push(list[0] ?? 0);
      for (let i = 1; i < list.length; i++) gaps.push((list[i] ?? 0) - (list[i - 1] ?? 0));
    }
  }
  gaps.sort((a, b) => a - b);
  return {
    prompt_tps: spread(prompt, 1),
    generation_tps: spread(generation, 1),
    ttft_ms: spread(first, 2),
    itl_ms: {
      p50: round(quantile(gaps, 0.5), 3),
      p95: round(quantile(gaps, 0.95), 3),
      p99: round(quantile(gaps, 0.99), 3),
    },
    peak_memory_bytes: process.resourceUsage().maxRSS * 1024,
  };
}

function spread(values: number[], digits: number): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  return {
    median: round(quantile(sorted, 0.5), digits),
    min: round(sorted[0] ?? 0, digits),
    max: round(sorted.at(-1) ?? 0, digits),
  };
}

/** Linear between neighbours; 0 for an empty list (one generated token has no gaps). */
export function quantile(sorted: readonly number[], fraction: number): number {
  const place = fraction * (sorted.length - 1);
  const low = sorted[Math.floor(place)];
  const high = sorted[Math.ceil(place)];
  if (low === undefined || high === undefined) return 0;
  return low + (high - low) * (place - Math.floor(place));
}

function round(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}

/** Reproducible token ids, none of which ends a sequence (xorshift32). */
class RandomTokens {
  readonly #vocab: number;
  readonly #avoided: ReadonlySet<number>;
  #state: number;

  constructor(seed: number, vocab: number, avoided: readonly number[]) {
    this.#vocab = vocab;
    this.#avoided = new Set(avoided);
    this.#state = (Math.imul(seed, 0x9e3779b1) ^ 0x5bd1e995) >>> 0 || 1;
  }

  tokens(count: number): number[] {
    const list: number[] = [];
    while (list.length < count) {
      this.#state ^= this.#state << 13;
      this.#state ^= this.#state >>> 17;
      this.#state = (this.#state ^ (this.#state << 5)) >>> 0;
      const token = this.#state % this.#vocab;
      if (!this.#avoided.has(token)) list.push(token);
    }
    return list;
  }
}
