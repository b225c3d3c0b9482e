// The C engine under the real scheduler, on a small random Llama 4 (tiny-llama4.ts): batches, pieces, pages and
// recomputes change no token, and a step that fails or an engine that stops fails only what it must.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { runBench } from "../../src/engine/bench-run.ts";
import { type LoadedEngine, loadModel } from "../../src/engine/load-model.ts";
import { runLogits } from "../../src/engine/logits.ts";
import {
  type GenerateEvent,
  type GenerateRequest,
  GREEDY,
  type Sampling,
} from "../../src/engine/protocol.ts";
import type { Drafter } from "../../src/scheduler/drafter.ts";
import { PagePools, SequencePages } from "../../src/scheduler/pages.ts";
import { logSumExp } from "../../src/scheduler/prompt-logprobs.ts";
import { PromptLookup } from "../../src/scheduler/prompt-lookup.ts";
import { Scheduler } from "../../src/scheduler/scheduler.ts";
import type { SpeculationStatistics } from "../../src/scheduler/speculation.ts";
import type { StepEngine, StepRow } from "../../src/scheduler/step.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { TINY_VOCAB, writeTinyLlama4 } from "../tools/tiny-llama4.ts";

/** Heads of 32, which an 8-bit cache needs. */
const DENSE = join(import.meta.dir, "../golden/data/llama-4bit");

let dir: string;
let model: LoadedEngine;

beforeAll(async () => {
  dir = mkdtempSync(join(tmpdir(), "caravan-engine-"));
  writeTinyLlama4(dir);
  model = await load();
});
afterAll(async () => {
  await model.close();
  rmSync(dir, { recursive: true });
});

function load(): Promise<LoadedEngine> {
  return loadModel({ model: "tiny", modelDir: dir, context: 512, streams: 8, compute: "exact", threads: 2 });
}

const prompt = (length: number, seed: number): number[] =>
  Array.from({ length }, (_, i) => (i * i * 7 + i * seed + seed * 31) % TINY_VOCAB);

function request(id: string, tokens: number[], more: Partial<GenerateRequest> = {}): GenerateRequest {
  return { id, tokens, max_tokens: 40, stop_tokens: [2, 3], sampling: GREEDY, ...more };
}

interface Run {
  events: Map<string, GenerateEvent[]>;
  preemptions: number;
  speculation: SpeculationStatistics;
}

/** Runs requests together; `pages` fewer than the engine has, to make them scarce. */
function generate(
  requests: GenerateRequest[],
  options: {
    mode?: "sequential" | "batched";
    fullPages?: number;
    maxTokens?: number;
    depth?: number;
    drafter?: Drafter;
  } = {},
): Promise<Run> {
  return new Promise((resolve, reject) => {
    const events = new Map<string, GenerateEvent[]>(requests.map(({ id }) => [id, []]));
    let open = requests.length;
    const scheduler = new Scheduler({
      geometry: { ...model.geometry, fullPages: options.fullPages ?? model.geometry.fullPages },
      limits: { ...model.limits, maxTokens: options.maxTokens ?? model.limits.maxTokens },
      contextTokens: model.contextTokens,
      mode: options.mode ?? "batched",
      prefixCache: false,
      ...(options.drafter === undefined ? {} : { drafter: options.drafter }),
      maxWaiting: requests.length,
      now: () => performance.now(),
      emit: (event) => {
        events.get(event.id)?.push(event);
        if (event.type !== "finish" && event.type !== "error") return;
        open--;
        const { preemptions, speculation } = scheduler;
        if (open === 0) resolve({ events, preemptions, speculation: speculation.statistics });
      },
    });
    const loop = new StepLoop({
      scheduler,
      engine: options.drafter === undefined ? model.engine : evenly(model.engine),
      depth: options.depth ?? 2,
      onFatal: reject,
    });
    for (const each of requests) loop.add(each);
  });
}

/** The same engine with steps that claim to take the same time whatever they carry, so that drafts always pay. */
function evenly(engine: StepEngine): StepEngine {
  return {
    submit: async (step) => ({ ...(await engine.submit(step)), computeNs: 1_000_000 }),
    giveMasks: (...masks) => engine.giveMasks(...masks),
    get failed() {
      return engine.failed;
    },
  };
}

const bytesOf = (data: Float32Array): Uint8Array =>
  new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

const tokensOf = (run: Run, id: string): number[] =>
  (run.events.get(id) ?? []).flatMap((event) => (event.type === "token" ? [event.token] : []));

const SAMPLINGS: Sampling[] = [
  GREEDY,
  { ...GREEDY, temperature: 0.8, seed: 1 },
  { ...GREEDY, temperature: 1.2, top_p: 0.9, top_k: 20, seed: 2 },
  { ...GREEDY, repetition_penalty: 1.3, presence_penalty: 0.5, frequency_penalty: 0.2 },
  { ...GREEDY, temperature: 1, min_p: 0.05, repetition_penalty: 1.1, seed: 3 },
  {
    ...GREEDY,
    temperature: 1,
    xtc_probability: 0.5,
    xtc_threshold: 0.1,
    seed: 4,
    logit_bias: [
      [5, -100],
      [9, 2],
    ],
  },
];

describe("streams on the C engine", () => {
  const requests = SAMPLINGS.flatMap((sampling, i) =>
    [11, 32, 75].map((length, k) =>
      request(`${i}-${length}`, prompt(length, i + k + 1), { sampling, max_tokens: 90, stop_tokens: [] }),
    ),
  );

  test("give the tokens that each gives alone: in batches, in small pieces, and put back for want of pages", async () => {
    const alone = await generate(requests, { mode: "sequential", depth: 1 });
    const longest = Math.max(...requests.map(({ id }) => tokensOf(alone, id).length));
    expect(longest).toBe(90);
    expect(new Set(requests.flatMap(({ id }) => tokensOf(alone, id))).size).toBeGreaterThan(50);
    const runs = {
      batched: await generate(requests),
      pieces: await generate(requests, { maxTokens: 19 }),
      scarce: await generate(requests, { fullPages: 9 }),
    };
    expect(runs.scarce.preemptions).toBeGreaterThan(0);
    for (const [name, run] of Object.entries(runs))
      for (const { id } of requests)
        expect(`${name} ${id}: ${tokensOf(run, id)}`).toBe(`${name} ${id}: ${tokensOf(alone, id)}`);
  });

  test("give the same tokens with drafts, right and wrong ones, over chunk edges and in batches", async () => {
    // What each gives alone, at other times something else.
    const alone = await generate(requests);
    const answers = new Map(requests.map(({ id, tokens }) => [id, [...tokens, ...tokensOf(alone, id)]]));
    const known: Drafter = {
      draft: (id, tokens, most) =>
        (answers.get(id) ?? [])
          .slice(tokens.length, tokens.length + most)
          .map((token, i) => ((tokens.length + i) % 7 === 3 ? 1 : token)),
      end: () => {},
    };
    const runs = {
      one: await generate(requests, { mode: "sequential", drafter: known }),
      batch: await generate(requests, { drafter: known }),
      scarce: await generate(requests, { drafter: known, fullPages: 9 }),
      lookup: await generate(requests, { mode: "sequential", drafter: new PromptLookup() }),
    };
    for (const [name, run] of Object.entries(runs))
      for (const { id } of requests)
        expect(`${name} ${id}: ${tokensOf(run, id)}`).toBe(`${name} ${id}: ${tokensOf(alone, id)}`);
    expect(runs.one.speculation.accepted).toBeGreaterThan(50);
    expect(runs.one.speculation.drafted).toBeGreaterThan(runs.one.speculation.accepted);
  });

  test("report the prompt's log-probabilities as the raw logits have them, across chunk edges", async () => {
    const tokens = prompt(70, 5);
    const run = await generate([
      request("a", tokens, { max_tokens: 1, logprobs: 3, prompt_logprobs: true }),
      request("b", prompt(40, 6)),
    ]);
    const event = run.events.get("a")?.find((each) => each.type === "prompt_logprobs");
    if (event?.type !== "prompt_logprobs") throw new Error("no prompt_logprobs");
    const { data, vocab } = await runLogits({
      modelDir: dir,
      tokens,
      compute: "exact",
      piece: 9,
      threads: 2,
    });
    for (let i = 1; i < tokens.length; i++) {
      const row = data.subarray((i - 1) * vocab, i * vocab);
      const wanted = (row[tokens[i] ?? 0] ?? 0) - logSumExp(row);
      expect(event.logprobs[i] ?? 0).toBeCloseTo(wanted, 5);
      expect(event.top[i]?.length).toBe(3);
      expect((event.top[i]?.[0]?.[1] ?? 0) + logSumExp(row)).toBeCloseTo(Math.max(...row), 5);
    }
  });
});

describe("logits", () => {
  test("are the same bits whole, in pieces, and one token at a time, in order and streamed", async () => {
    const tokens = prompt(90, 3);
    const common = { modelDir: dir, tokens, compute: "exact" as const, threads: 2 };
    const whole = await runLogits(common);
    expect(whole.data.length).toBe(90 * TINY_VOCAB);
    const pieces = await runLogits({ ...common, prefill: 61, piece: 17 });
    expect(Buffer.compare(bytesOf(whole.data), bytesOf(pieces.data))).toBe(0);
    const streamed: number[] = [];
    const empty = await runLogits({
      ...common,
      prefill: 0,
      onLogits: async (rows, vocab) => {
        expect(vocab).toBe(TINY_VOCAB);
        streamed.push(...rows);
      },
    });
    expect(empty.data.length).toBe(0);
    expect(Buffer.compare(bytesOf(Float32Array.from(streamed)), bytesOf(whole.data))).toBe(0);
  });

  test("refuse tokens outside the vocabulary and kernel sets that do not exist", async () => {
    const wrong = runLogits({ modelDir: dir, tokens: [1, TINY_VOCAB] });
    await expect(wrong).rejects.toMatchObject({ code: "invalid_argument", param: "tokens" });
    const cpu = runLogits({ modelDir: dir, tokens: [1], cpu: "abacus" });
    await expect(cpu).rejects.toMatchObject({ code: "invalid_argument", param: "cpu" });
  });
});

describe("a step", () => {
  function row(count: number, change: Partial<StepRow> = {}): StepRow {
    const pages = new SequencePages(new PagePools(model.geometry));
    pages.extend(count);
    const none = new Uint32Array(0);
    return {
      slot: 0,
      firstPosition: 0,
      tokens: Uint32Array.from(prompt(count, 1)),
      fullPages: pages.full?.view() ?? none,
      chunkPages: pages.chunked?.view() ?? none,
      chunkBase: 0,
      logits: "last",
      sample: true,
      returnLogits: false,
      logprob: false,
      topLogprobs: 0,
      sampling: GREEDY,
      bias: [],
      history: none,
      xtcKeep: none,
      ...change,
    };
  }

  test("that is wrong is rejected alone, and the engine goes on", async () => {
    const good = model.engine.submit({ rows: [row(20)], copies: [] });
    const bad = model.engine.submit({
      rows: [row(20, { fullPages: Uint32Array.of(9999, 9999) })],
      copies: [],
    });
    const after = model.engine.submit({ rows: [row(20)], copies: [] });
    await expect(bad).rejects.toMatchObject({ code: "internal_error" });
    expect((await good).rows[0]?.token).toBe((await after).rows[0]?.token as number);
    expect(model.engine.failed).toBeUndefined();
  });

  test("leaves the event loop free while it is computed", async () => {
    let turns = 0;
    let running = true;
    const count = (): void => {
      if (!running) return;
      turns++;
      setImmediate(count);
    };
    const steps = Array.from({ length: 8 }, () => model.engine.submit({ rows: [row(400)], copies: [] }));
    setImmediate(count);
    await Promise.all(steps);
    running = false;
    expect(turns).toBeGreaterThan(8);
  });

  test("in flight is rejected when the engine is closed, and so is every later one", async () => {
    const own = await load();
    const steps = Array.from({ length: 10 }, () => own.engine.submit({ rows: [row(400)], copies: [] }));
    const settled = Promise.allSettled(steps);
    await own.close();
    await own.close();
    const outcomes = await settled;
    expect(outcomes.at(-1)).toMatchObject({ status: "rejected", reason: { code: "engine_failed" } });
    await expect(own.engine.submit({ rows: [row(1)], copies: [] })).rejects.toMatchObject({
      code: "engine_failed",
    });
  });
});

describe("a bench run", () => {
  test("measures known prefixes, a long prompt beside streams, memory and an 8-bit cache where asked", async () => {
    const report = await runBench({
      ...{ model: "tiny", modelDir: DENSE, promptTokens: [100], generate: [4], streams: [2], repeat: 1 },
      ...{ threads: 1, ceiling: true, memory: true, prefix: true, beside: 150, kvBits: 8 },
    });
    expect(report.prefix).toMatchObject([{ prompt_tokens: 100, cached_tokens: 99 }]);
    expect(report.beside).toMatchObject({ streams: 2, prompt_tokens: 150, stream_prompt_tokens: 100 });
    expect(report.beside?.itl_beside_ms.p95).toBeGreaterThan(0);
    expect(report.machine?.read_bandwidth).toBeGreaterThan(1e6);
    expect(report.machine?.limits[0]?.generation_tps).toBeGreaterThan(0);
    expect(report.memory?.engine.kv).toBe(report.memory?.planned.kv as number);
    const { perplexity } = report.cache ?? {};
    expect(report.cache?.policy).toContain("batched");
    expect(perplexity?.kv16).toBeGreaterThan(1);
    expect(perplexity?.kv8).not.toBe(perplexity?.kv16 as number);
    expect(Math.abs(perplexity?.change_percent ?? 100)).toBeLessThan(5);
  });

  test("measures every setting in the fixed form", async () => {
    const progress: number[] = [];
    const report = await runBench({
      model: "tiny",
      modelDir: dir,
      promptTokens: [16, 40],
      generate: [8],
      streams: [1, 4],
      repeat: 2,
      threads: 1,
      onProgress: (done, total) => progress.push(done / total),
    });
    expect(report).toMatchObject({ model: "tiny", device: "cpu", threads: 1 });
    expect(report.load_s).toBeGreaterThan(0);
    const settings = report.results.map((r) => [r.prompt_tokens, r.generate, r.streams]);
    expect(settings).toEqual([
      [16, 8, 1],
      [16, 8, 4],
      [40, 8, 1],
      [40, 8, 4],
    ]);
    for (const result of report.results) {
      for (const spread of [result.prompt_tps, result.generation_tps, result.ttft_ms]) {
        expect(spread.min).toBeGreaterThan(0);
        expect(spread.median).toBeGreaterThanOrEqual(spread.min);
        expect(spread.max).toBeGreaterThanOrEqual(spread.median);
      }
      expect(result.itl_ms.p50).toBeGreaterThan(0);
      expect(result.itl_ms.p99).toBeGreaterThanOrEqual(result.itl_ms.p95);
      expect(result.peak_memory_bytes).toBeGreaterThan(1e6);
    }
    expect(progress.at(-1)).toBe(1);
  });
});
