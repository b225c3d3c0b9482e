// Resuming behind known prefixes on the C engine and the goldens' checkpoints: tokens and log-probabilities are the same
// bits as without a prefix cache, for Scout's and Maverick's shapes and a dense Llama.

import { afterEach, describe, expect, test } from "bun:test";
import { type LoadedEngine, loadModel } from "../../src/engine/load-model.ts";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { Scheduler } from "../../src/scheduler/scheduler.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { goldenFolders } from "./read-golden.ts";

const NAMES = ["llama-4bit", "maverick-4bit", "scout-4bit", "llama4text-bf16"];
const folders = goldenFolders("golden.safetensors").filter(({ name }) => NAMES.includes(name));

test("the checkpoints are there", () => {
  expect(folders.map(({ name }) => name)).toEqual([...NAMES].sort());
});

interface Answer {
  /** Everything that was sampled, with its log-probabilities and alternatives. */
  events: string;
  tokens: number[];
  cached: number;
}

/** An engine's pages belong to one scheduler. `share` of them, to make them scarce. */
function place(model: LoadedEngine, prefixCache: boolean, share = 1) {
  const waiting = new Map<string, { events: GenerateEvent[]; resolve: (answer: Answer) => void }>();
  const emit = (event: GenerateEvent): void => {
    const mine = waiting.get(event.id);
    if (mine === undefined) return;
    if (event.type === "error") throw new Error(JSON.stringify(event.error));
    if (event.type === "token") mine.events.push(event);
    if (event.type !== "finish") return;
    waiting.delete(event.id);
    const tokens = mine.events.flatMap((each) => (each.type === "token" ? [each.token] : []));
    mine.resolve({ events: JSON.stringify(mine.events), tokens, cached: event.usage.cached_tokens });
  };
  const { geometry } = model;
  const scheduler = new Scheduler({
    geometry: {
      ...geometry,
      fullPages: Math.ceil(geometry.fullPages * share),
      chunkPages: Math.ceil(geometry.chunkPages * share),
    },
    limits: model.limits,
    contextTokens: model.contextTokens,
    ...{ mode: "batched", maxWaiting: 100, now: () => performance.now(), emit, prefixCache },
  });
  const onFatal = (error: Error): void => {
    throw error;
  };
  const loop = new StepLoop({ scheduler, engine: model.engine, depth: 2, onFatal });
  const ask = (each: GenerateRequest): Promise<Answer> =>
    new Promise((resolve) => {
      waiting.set(each.id, { events: [], resolve });
      loop.add(each);
    });
  return { scheduler, ask };
}

const prompt = (length: number, seed: number): number[] =>
  Array.from({ length }, (_, i) => 4 + ((i * i * 7 + i * seed + seed * 31) % 400));

function request(tokens: number[], temperature = 0): GenerateRequest {
  return {
    ...{ id: "r", tokens, max_tokens: 24, stop_tokens: [], logprobs: 5 },
    sampling: { ...GREEDY, temperature, seed: 7 },
  };
}

describe.each(folders)("$name", ({ dir, name }) => {
  const loaded: LoadedEngine[] = [];
  afterEach(async () => {
    for (const model of loaded.splice(0)) await model.close();
  });

  test.each(["exact", "fast"] as const)(
    "answers with the same bits as without a cache (%s)",
    async (compute) => {
      const load = async (): Promise<LoadedEngine> => {
        const common = { model: name, modelDir: dir, context: 512, streams: 3, threads: 2 };
        const model = await loadModel({ ...common, compute });
        loaded.push(model);
        return model;
      };
      const first = await load();
      const { pageTokens } = first.geometry;
      const plain = place(first, false);
      const cached = place(await load(), true);
      /** How many tokens were cached. */
      const check = async (each: GenerateRequest, at = cached): Promise<number> => {
        const wanted = await plain.ask(each);
        const got = await at.ask(each);
        expect(wanted.cached).toBe(0);
        expect(got.tokens).toEqual(wanted.tokens);
        expect(got.events === wanted.events, "log-probabilities differ").toBe(true);
        expect(got.tokens.length).toBe(24);
        return got.cached;
      };
      // Inside a page too, where its copy saves enough (prefix-tree.ts).
      const least = Math.max(1, Math.floor(pageTokens / 8));
      const whole = (tokens: number): number => tokens - (tokens % pageTokens);
      const known = (tokens: number): number => (tokens % pageTokens >= least ? tokens : whole(tokens));
      // Fresh, which fills the cache; the same again; the same with a seed.
      const long = prompt(200, 3);
      expect(await check(request(long))).toBe(0);
      expect(await check(request(long))).toBe(known(199));
      expect(await check(request(long, 0.9))).toBe(known(199));
      // Other ends, in the middle of chunks and behind their edges.
      for (const shared of [65, 128, 135, 150]) {
        const other = request([...long.slice(0, shared), ...prompt(40, shared)]);
        // The page to copy may have lost its chunked half to another prompt.
        expect([known(shared), whole(shared)]).toContain(await check(other));
      }
      // The next turn, a rewind to a prompt before it, and an edit of the first one.
      const { tokens } = await plain.ask(request(long));
      const next = [...long, ...tokens, ...prompt(30, 9)];
      expect(await check(request(next))).toBeGreaterThanOrEqual(whole(long.length));
      const rewound = await check(request([...long, ...prompt(50, 11)]));
      expect([known(long.length), whole(long.length)]).toContain(rewound);
      expect(await check(request([...prompt(3, 99), ...long.slice(3)]))).toBe(0);
      // Pages for hardly more than one sequence: prefixes come and go.
      const scarce = place(await load(), true, 0.4);
      let hits = 0;
      for (let i = 0; i < 8; i++) hits += await check(request(prompt(170, 20 + (i % 3)), i % 2), scarce);
      for (let i = 0; i < 3; i++)
        hits += await check(request([...prompt(100 + 20 * i, 21), ...prompt(9, i)]), scarce);
      expect(hits).toBeGreaterThan(0);
      const { full, chunked } = scarce.scheduler.pools;
      expect([full.available, chunked.available]).toEqual([full.capacity, chunked.capacity]);
    },
  );
});
