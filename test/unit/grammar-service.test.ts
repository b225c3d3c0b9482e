// Grammars on the runner's side: compiled in workers that may be slow or die, followed by sequences that share their
// steps with others.

import { afterEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { bytesOf } from "../../src/chat/token-table.ts";
import { GrammarGate } from "../../src/engine/grammar-gate.ts";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { StepEncoder } from "../../src/engine/step-encoder.ts";
import { GrammarService } from "../../src/grammar/grammar-service.ts";
import type { GrammarMatcher } from "../../src/grammar/matcher.ts";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import type { Drafter } from "../../src/scheduler/drafter.ts";
import { Scheduler } from "../../src/scheduler/scheduler.ts";
import {
  type RowResult,
  type Step,
  type StepEngine,
  type StepResult,
  TOKEN_LAST,
} from "../../src/scheduler/step.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { allowed, JSON_WORDS, matcherSource, smallVocabulary } from "../tools/grammar-walk.ts";
import { until } from "../tools/until.ts";

const DIR = join(import.meta.dir, "../fixtures/chat/tiny-bytes");
const VOCAB = 720;
const integers: GrammarSpec = { type: "json_schema", schema: { type: "integer" }, param: "format" };
/** Takes seconds to compile. */
const slow: GrammarSpec = {
  type: "json_schema",
  schema: { type: "string", pattern: "^([^a]|b[^c]){900}$" },
  param: "format",
};

const services: GrammarService[] = [];
function service(options: { compileLimitMs?: number; workerUrl?: URL; dir?: string } = {}): GrammarService {
  const made = new GrammarService({ dir: DIR, vocab: VOCAB, ...options });
  services.push(made);
  return made;
}
afterEach(() => {
  for (const each of services.splice(0)) each.close();
});

async function failureOf(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    () => "no failure",
    (thrown: unknown) => thrown,
  );
}

describe("the grammar service", () => {
  test("compiles each schema once and gives every request a matcher of its own", async () => {
    const grammars = service();
    const [one, other] = await Promise.all([grammars.matcher(integers), grammars.matcher({ ...integers })]);
    expect(one).not.toBe(other);
    const tokens = allowed(one.mask([]));
    expect(tokens.length).toBeGreaterThan(10);
    one.accept(tokens[0] ?? 0);
    expect(allowed(other.mask([]))).toEqual(tokens);
    expect(grammars.workers).toBe(1);
  });

  test("refuses a schema with the parameter's name", async () => {
    const wrong: GrammarSpec = { type: "json_schema", schema: { $dynamicRef: "#a" }, param: "format" };
    const failure = await failureOf(service().matcher(wrong));
    expect(failure).toMatchObject({ code: "unsupported_parameter", param: "format" });
    expect(String(failure)).toContain("#/$dynamicRef: $dynamicRef can be enforced where");
  });

  test("ends a schema that takes too long, and only that one", async () => {
    const grammars = service({ compileLimitMs: 300 });
    await grammars.matcher(integers);
    const failing = failureOf(grammars.matcher(slow));
    const other = await grammars.matcher({ ...integers, param: "other" });
    expect(other.mayEnd).toBe(false);
    const failure = await failing;
    expect(failure).toMatchObject({ code: "unsupported_parameter", param: "format" });
    expect(String(failure)).toContain("longer than 300 ms");
    expect((await grammars.matcher({ ...integers, param: "later" })).complete).toBe(false);
  });

  test("is prepared ahead of the first request, and tells of what it lacks when there is one", async () => {
    const grammars = service();
    const { trie } = await grammars.prepare();
    expect(trie.nodes.length).toBeGreaterThan(100);
    const began = grammars.workers;
    expect((await grammars.matcher(integers)).complete).toBe(false);
    expect([began, grammars.workers]).toEqual([1, 1]);
    const lacking = service({ dir: "/no/such/folder" });
    expect(await failureOf(lacking.prepare())).toMatchObject({ code: "bad_file" });
    expect(await failureOf(lacking.matcher(integers))).toMatchObject({ code: "bad_file" });
  });

  test("tells of a worker that dies, and of a model without a tokenizer", async () => {
    const dying = URL.createObjectURL(new Blob(["self.onmessage = () => process.exit(3);"]));
    const failure = await failureOf(service({ workerUrl: new URL(dying) }).matcher(integers));
    expect(failure).toMatchObject({ code: "engine_failed" });
    expect(await failureOf(service({ dir: "/no/such/folder" }).matcher(integers))).toMatchObject({
      code: "bad_file",
    });
  });
});

describe("requests that wait for their grammar", () => {
  const request = (id: string, grammar: GrammarSpec): GenerateRequest => ({
    id,
    tokens: [1],
    max_tokens: 4,
    stop_tokens: [0],
    sampling: GREEDY,
    grammar,
  });

  test("can be cancelled, are passed on when it is ready, and hear of its failure", async () => {
    const events: GenerateEvent[] = [];
    const passed: string[] = [];
    let turns = 0;
    const gate = new GrammarGate({
      dir: DIR,
      vocab: VOCAB,
      pass: ({ id }) => passed.push(id),
      emit: (event) => events.push(event),
      onTurn: () => turns++,
    });
    gate.add(request("good", integers));
    gate.add(request("bad", { type: "json_schema", schema: { $dynamicRef: "#a" }, param: "format" }));
    gate.add(request("gone", integers));
    expect(gate.cancel("gone")).toBe(true);
    expect(gate.cancel("gone")).toBe(false);
    await until(() => passed.length === 1 && events.length === 2, "both grammars are settled");
    expect(passed).toEqual(["good"]);
    expect(events).toMatchObject([
      { type: "finish", id: "gone", reason: "cancelled" },
      { type: "error", id: "bad", error: { code: "unsupported_parameter", param: "format" } },
    ]);
    expect(turns).toBeGreaterThan(2);
    gate.close();
  });
});

const vocabulary = smallVocabulary(JSON_WORDS);
const SIZE = vocabulary.end + 1;

const WORDS = Math.ceil(SIZE / 32);

/** Samples by a hash of the slot's seed and the position, among the tokens that the masks allow, which it waits for. */
class HashEngine implements StepEngine {
  readonly failed = undefined;
  masked = 0;
  /** Rows with masks and drafts, and rows that were begun before the token in front of them was known. */
  maskedDrafts = 0;
  ahead = 0;
  most = 0;
  submitted = 0;
  computed = 0;
  /** The step with this number (from 1) gives nothing. */
  failing = 0;
  readonly #given = new Map<Step, Map<number, Uint32Array | undefined>>();
  #before: Promise<unknown> = Promise.resolve();

  giveMasks(step: Step, row: number, masks: Uint32Array | undefined): void {
    expect(step.rows[row]?.maskLater).toBe(true);
    const given = this.#given.get(step);
    expect(given?.has(row)).toBe(false);
    given?.set(row, masks?.slice());
  }

  submit(step: Step): Promise<StepResult> {
    this.#given.set(step, new Map());
    const fails = ++this.submitted === this.failing;
    const result = this.#before.then(() => this.#compute(step));
    this.#before = result;
    return fails ? result.then(() => Promise.reject(new Error("the step failed"))) : result;
  }

  async #compute(step: Step): Promise<StepResult> {
    const { rows } = step;
    this.most = Math.max(this.most, rows.length);
    const waiting = rows.filter(({ maskLater }) => maskLater === true).length;
    await until(() => this.#given.get(step)?.size === waiting, "the step's masks have come");
    const results = rows.map((row, i): RowResult => {
      expect(row.mask).toBeUndefined();
      const masks = this.#given.get(step)?.get(i);
      if (masks !== undefined) this.masked++;
      if (masks !== undefined && row.sampleAll === true) this.maskedDrafts++;
      if (masks !== undefined && row.tokens[0] === TOKEN_LAST) this.ahead++;
      if (masks !== undefined) expect(masks.length).toBe(WORDS * (row.sampleAll ? row.tokens.length : 1));
      const sample = (at: number): number => {
        const mask = masks?.subarray(row.sampleAll ? at * WORDS : 0).subarray(0, WORDS);
        const tokens = mask === undefined ? Array.from({ length: SIZE }, (_, id) => id) : allowed(mask);
        const hash = Math.imul(row.sampling.seed * 7919 + row.firstPosition + at + 1, 0x9e3779b1) >>> 8;
        return tokens[hash % tokens.length] ?? 0;
      };
      const top: [number, number][] = row.sampleAll ? [...row.tokens].map((_, at) => [sample(at), 0]) : [];
      return { token: row.sample ? sample(row.tokens.length - 1) : 0, logprob: 0, top, logits: undefined };
    });
    this.#given.delete(step);
    this.computed++;
    return { rows: results, computeNs: 1_000_000, queuedNs: 0 };
  }
}

interface Run {
  events: GenerateEvent[];
  engine: HashEngine;
}

async function run(
  requests: { request: GenerateRequest; grammar?: GrammarMatcher }[],
  drafter?: Drafter,
  failing = 0,
): Promise<Run> {
  const events: GenerateEvent[] = [];
  const engine = new HashEngine();
  engine.failing = failing;
  const scheduler = new Scheduler({
    geometry: { pageTokens: 4, chunk: 16, fullPages: 400, chunkPages: 400 },
    limits: { maxRows: 8, maxTokens: 64, maxLogits: 64, slots: 8, vocab: SIZE },
    contextTokens: 1000,
    mode: "batched",
    maxWaiting: 100,
    ...(drafter === undefined ? {} : { drafter }),
    now: () => performance.now(),
    emit: (event) => events.push(event),
  });
  const loop = new StepLoop({ scheduler, engine, depth: 2, onFatal: (error) => Promise.reject(error) });
  for (const { request, grammar } of requests) loop.add(request, grammar);
  const ended = () => events.filter(({ type }) => type === "finish" || type === "error").length;
  await until(() => ended() === requests.length, "every request ends");
  return { events, engine };
}

const request = (id: string, seed: number): GenerateRequest => ({
  id,
  tokens: [seed, 2, 3, 2, 3, 2],
  max_tokens: 120,
  stop_tokens: [vocabulary.end],
  sampling: { ...GREEDY, temperature: 1, seed },
});

const textOf = (events: GenerateEvent[], id: string): string =>
  new TextDecoder().decode(
    Uint8Array.from(
      events.flatMap((event) =>
        event.type === "token" && event.id === id && event.end !== true
          ? [...bytesOf(vocabulary.table, event.token)]
          : [],
      ),
    ),
  );

describe("constrained sequences", () => {
  const small = matcherSource(
    {
      type: "json_schema",
      param: "s",
      schema: { type: "array", items: { enum: [1, "a", null] }, minItems: 2, maxItems: 9 },
    },
    vocabulary,
  );
  const always: Drafter = { draft: (_id, _known, most) => new Array<number>(most).fill(5), end: () => {} };

  test("get the same tokens alone and beside others that draft, and end where their grammar does", async () => {
    const alone = await Promise.all(
      [1, 2, 3].map(async (seed) => {
        const { events, engine } = await run([{ request: request("x", seed), grammar: small() }]);
        // The next step is begun before the token in front of it is known.
        expect(engine.ahead).toBeGreaterThan(1);
        return events;
      }),
    );
    const mixed = [1, 2, 3].flatMap((seed) => [
      { request: request(`x${seed}`, seed), grammar: small() },
      { request: request(`free${seed}`, seed + 50) },
    ]);
    const { events, engine } = await run(mixed, always);
    expect(engine.most).toBe(6);
    expect(engine.masked).toBeGreaterThan(10);
    [1, 2, 3].forEach((seed, i) => {
      const text = textOf(events, `x${seed}`);
      expect(text).toBe(textOf(alone[i] ?? [], "x"));
      expect(JSON.parse(text).length).toBeWithin(2, 10);
      const last = events.find((event) => event.type === "finish" && event.id === `x${seed}`);
      expect(last).toMatchObject({ reason: "stop" });
    });
  });

  test("get the same tokens when they are drafted, right or wrong, and nothing that the grammar forbids", async () => {
    const alone = (await run([{ request: request("x", 4), grammar: small() }])).events;
    const tokens = alone.flatMap((event) => (event.type === "token" ? [event.token] : []));
    const prompt = request("x", 4).tokens.length;
    // What will come, then what will not: a token that fits but is not chosen, and one that never fits.
    const knowing: Drafter = {
      draft: (_id, known, most) => {
        const next = tokens.slice(known.length - prompt, known.length - prompt + 2);
        const wrong = allowed(small().mask([])).slice(0, 1);
        return [...next, ...wrong, 5].slice(0, most);
      },
      end: () => {},
    };
    const { events, engine } = await run([{ request: request("x", 4), grammar: small() }], knowing);
    expect(engine.maskedDrafts).toBeGreaterThan(1);
    expect(textOf(events, "x")).toBe(textOf(alone, "x"));
    expect(events.find(({ type }) => type === "finish")).toMatchObject({ reason: "stop" });
  });

  test("fail alone when their grammar does", async () => {
    const broken = small();
    broken.masks = () => {
      throw new Error("the grammar broke");
    };
    const { events } = await run([
      { request: request("broken", 1), grammar: broken },
      { request: request("whole", 2), grammar: small() },
      { request: request("free", 3) },
    ]);
    const ends = events.filter(({ type }) => type === "finish" || type === "error");
    expect(ends.find(({ id }) => id === "broken")).toMatchObject({ type: "error" });
    expect(ends.find(({ id }) => id === "whole")).toMatchObject({ type: "finish", reason: "stop" });
    expect(ends.find(({ id }) => id === "free")).toMatchObject({ type: "finish" });
  });

  test("leave no step waiting for masks when the step before it fails", async () => {
    const { events, engine } = await run(
      [
        { request: request("x", 1), grammar: small() },
        { request: request("y", 2), grammar: small() },
      ],
      undefined,
      3,
    );
    expect(events.filter(({ type }) => type === "error").map(({ id }) => id)).toEqual(["x", "y"]);
    await until(() => engine.computed === engine.submitted, "the step behind the failed one is computed");
    expect(engine.submitted).toBeGreaterThan(3);
  });

  test("are refused where end tokens are banned", async () => {
    const grammar: GrammarSpec = { type: "json_object", param: "format" };
    const banned = { ...request("x", 1), ban_stop_tokens: true, grammar };
    const { events } = await run([{ request: banned, grammar: small() }]);
    expect(events).toMatchObject([
      { type: "error", error: { code: "invalid_argument", param: "ignore_eos" } },
    ]);
  });
});

test("a row's mask is among the step's tables", () => {
  const none = new Uint32Array(0);
  const mask = Uint32Array.of(0xdeadbeef, 1);
  const bytes = new StepEncoder().encode({
    rows: [
      {
        ...{
          slot: 0,
          firstPosition: 0,
          tokens: Uint32Array.of(7),
          fullPages: none,
          chunkPages: none,
          chunkBase: 0,
        },
        ...{ logits: "last" as const, sample: true, returnLogits: false, logprob: false, topLogprobs: 0 },
        ...{ sampling: GREEDY, bias: [], history: none, xtcKeep: none, mask },
      },
    ],
    copies: [],
  });
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const rows = view.getUint32(24, true);
  const at = view.getUint32(rows + 128, true);
  expect([view.getUint32(at, true), view.getUint32(at + 4, true)]).toEqual([0xdeadbeef, 1]);
});
