// The scheduler on a toy model whose cache lives in real pages (fake-engine.ts): whatever the load, the pools and the
// order of events, every request gets the tokens that it would get alone, and exactly one end.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { CaravanError } from "../../src/errors.ts";
import type { Drafter } from "../../src/scheduler/drafter.ts";
import { Scheduler, type SchedulerOptions } from "../../src/scheduler/scheduler.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { FakeEngine, type FakeModel, generateAlone, promptLogprobsAlone, turn } from "./fake-engine.ts";

const MODEL: FakeModel = {
  geometry: { pageTokens: 4, chunk: 16, fullPages: 64, chunkPages: 40 },
  limits: { maxRows: 8, maxTokens: 32, maxLogits: 16, slots: 8, vocab: 97 },
};

interface Rig {
  model: FakeModel;
  engine: FakeEngine;
  scheduler: Scheduler;
  loop: StepLoop;
  events: GenerateEvent[];
  fatal: CaravanError[];
  clock: { ms: number };
  of: (id: string) => GenerateEvent[];
  tokens: (id: string) => number[];
  ends: (id: string) => GenerateEvent[];
  /** Runs steps until nothing is left to do. */
  drain: () => Promise<void>;
}

function rig(options: Partial<SchedulerOptions> & { model?: FakeModel; depth?: number } = {}): Rig {
  const { model = MODEL, depth = 2, ...rest } = options;
  const clock = { ms: 0 };
  const events: GenerateEvent[] = [];
  const fatal: CaravanError[] = [];
  const engine = new FakeEngine(model);
  const scheduler = new Scheduler({
    geometry: model.geometry,
    limits: model.limits,
    contextTokens: 1000,
    mode: "batched",
    maxWaiting: 100,
    now: () => clock.ms,
    emit: (event) => events.push(event),
    ...rest,
  });
  const loop = new StepLoop({ scheduler, engine, depth, onFatal: (error) => fatal.push(error) });
  const of = (id: string): GenerateEvent[] => events.filter((event) => event.id === id);
  return {
    model,
    engine,
    scheduler,
    loop,
    events,
    fatal,
    clock,
    of,
    tokens: (id) => of(id).flatMap((event) => (event.type === "token" ? [event.token] : [])),
    ends: (id) => of(id).filter((event) => event.type === "finish" || event.type === "error"),
    drain: async () => {
      for (let steps = 0; steps < 20_000; steps++) {
        await turn();
        clock.ms += 1;
        if (!engine.run() && engine.queued === 0) {
          await turn();
          if (engine.queued === 0) return;
        }
      }
      throw new Error("the work does not end");
    },
  };
}

function request(id: string, tokens: number[], more: Partial<GenerateRequest> = {}): GenerateRequest {
  return { id, tokens, max_tokens: 10, stop_tokens: [], sampling: GREEDY, ...more };
}

const range = (length: number, seed = 0): number[] =>
  Array.from({ length }, (_, i) => (i * 7 + seed * 13) % 97);

function expectAllPagesFree(r: Rig): void {
  // Pages are free or remembered by the prefix cache alone; when that forgets, all are free.
  const { full, chunked } = r.scheduler.pools;
  expect(full.available).toBe(r.model.geometry.fullPages);
  expect(chunked.available).toBe(r.model.geometry.chunkPages);
  r.scheduler.prefixes.clear();
  expect(full.free).toBe(r.model.geometry.fullPages);
  expect(chunked.free).toBe(r.model.geometry.chunkPages);
  expect(r.scheduler.running).toBe(0);
  expect(r.scheduler.waiting).toBe(0);
}

test("a step's events go out before the next step is planned while the engine has another one, and behind it otherwise", async () => {
  for (const depth of [1, 2]) {
    const said: string[] = [];
    const engine = new FakeEngine(MODEL);
    const submit = engine.submit.bind(engine);
    engine.submit = (step) => {
      said.push("planned");
      return submit(step);
    };
    const loop = new StepLoop({
      scheduler: new Scheduler({
        geometry: MODEL.geometry,
        limits: MODEL.limits,
        contextTokens: 1000,
        mode: "batched",
        maxWaiting: 1,
        now: () => 0,
        emit: ({ type }) => type === "token" && said.push("token"),
      }),
      engine,
      depth,
      onFatal: (error) => {
        throw error;
      },
      onEvents: () => said.push("events out"),
    });
    loop.add(request("r", range(5, 1), { max_tokens: 9 }));
    for (let steps = 0; steps < 50; steps++) {
      await turn();
      engine.run();
    }
    const decoding = said.join(", ");
    if (depth === 1) expect(decoding).toContain("token, planned, token, planned");
    else expect(decoding).toContain("token, events out, planned, token, events out, planned");
    if (depth === 1) expect(said).not.toContain("events out");
  }
});

describe("a pipeline", () => {
  const piped = (stages: number): FakeModel => ({
    ...MODEL,
    limits: { ...MODEL.limits, maxTokens: 256, stages },
  });

  test("has as many steps in flight as stages and the oldest one's next, each with its part of the streams", async () => {
    const r = rig({ model: piped(2) });
    for (let i = 0; i < 4; i++) r.loop.add(request(`r${i}`, range(5, i), { max_tokens: 20 }));
    await r.drain();
    const decoding = r.engine.seen.filter(({ rows }) => rows.every(({ count }) => count === 1));
    const steady = decoding.slice(2, -2);
    expect(steady.length).toBeGreaterThan(30);
    steady.forEach(({ rows }, i) => {
      expect(rows.map(({ last }) => last)).toEqual([true, true]);
      const before = steady[i - 1]?.rows.map(({ slot }) => slot) ?? [];
      expect(rows.some(({ slot }) => before.includes(slot))).toBe(false);
    });
    expect(r.engine.mostInFlight).toBe(3);
    for (let i = 0; i < 4; i++)
      expect(r.tokens(`r${i}`)).toEqual(
        generateAlone(r.model, request(`r${i}`, range(5, i), { max_tokens: 20 }), 1000).tokens,
      );
  });

  test("takes late streams into the steps that there are", async () => {
    const r = rig({ model: piped(2) });
    const add = (i: number) => r.loop.add(request(`r${i}`, range(5, i), { max_tokens: 40 }));
    for (let i = 0; i < 4; i++) add(i);
    for (let step = 0; step < 20; step++) {
      await turn();
      r.engine.run();
    }
    add(4);
    await turn();
    await r.drain();
    const sizes = r.engine.seen.map(({ rows }) => rows.length);
    const steady = sizes.slice(35, 60);
    expect(new Set(steady)).toEqual(new Set([2, 3]));
    for (let i = 0; i < 5; i++) expect(r.tokens(`r${i}`).length).toBe(40);
  });

  test("sends the pieces of one prompt behind each other, without waiting for the first to come out", async () => {
    const r = rig({ model: piped(3) });
    r.loop.add(request("long", range(150), { max_tokens: 2 }));
    await r.drain();
    const pieces = r.engine.seen.flatMap(({ rows }) => rows.filter(({ count }) => count > 1));
    expect(pieces.map(({ count }) => count)).toEqual([42, 42, 42, 24]);
    expect(r.engine.mostInFlight).toBe(3);
    expect(r.tokens("long").length).toBe(2);
  });

  test("does not hold up others for one that needs its last token", async () => {
    const r = rig({ model: piped(2) });
    r.loop.add(
      request("strict", range(5), { max_tokens: 20, sampling: { ...GREEDY, repetition_penalty: 1.3 } }),
    );
    r.loop.add(request("free", range(5, 1), { max_tokens: 20 }));
    await r.drain();
    expect([r.tokens("strict").length, r.tokens("free").length]).toEqual([20, 20]);
    const alone = r.engine.seen.filter(({ rows }) => rows.length === 1);
    expect(alone.length).toBeGreaterThan(30);
  });
});

describe("any load", () => {
  const models = fc.record({
    pageTokens: fc.constantFrom(2, 4, 8),
    chunkPages: fc.constantFrom(0, 2, 4),
    full: fc.boolean(),
    pools: fc.constantFrom(0, 1, 2, 4, 24),
    rows: fc.constantFrom(1, 2, 4, 6, 6),
    tokens: fc.integer({ min: 6, max: 40 }),
    stages: fc.constantFrom(1, 1, 1, 2, 3),
  });
  const jobs = fc.array(
    fc.record({
      prompt: fc.integer({ min: 1, max: 50 }),
      // Few, so that prompts begin alike.
      seed: fc.nat(6),
      /** Its prompt is an earlier one with its answer and something new: the next turn of a conversation. */
      continues: fc.option(fc.nat(19)),
      most: fc.constantFrom(1, 3, 12, 30, 30),
      stops: fc.array(fc.nat(96), { maxLength: 4 }),
      ban: fc.boolean(),
      penalty: fc.constantFrom(1, 1, 1.3),
      presence: fc.constantFrom(0, 0, 0.5),
      temperature: fc.constantFrom(0, 0.8),
      promptLogprobs: fc.boolean(),
      /** Steps of the simulation before it arrives, and before its client goes away (0 = never). */
      arrives: fc.nat(30),
      leaves: fc.constantFrom(0, 0, 0, 5, 20, 70),
    }),
    { minLength: 1, maxLength: 20 },
  );

  test("gives every request the tokens it gets alone, one end each, and all pages back", async () => {
    let preemptions = 0;
    let cached = 0;
    let accepted = 0;
    let dropped = 0;
    await fc.assert(
      fc.asyncProperty(
        models,
        jobs,
        fc.constantFrom(1, 2, 3),
        fc.infiniteStream(fc.nat(5)),
        fc.constantFrom(true, true, true, false),
        fc.option(fc.record({ right: fc.constantFrom(0, 3, 8, 10), logits: fc.nat(12) })),
        async (m, list, depth, dice, prefixCache, drafts) => {
          const chunk = m.chunkPages * m.pageTokens;
          const full = m.full || chunk === 0;
          const longest = Math.ceil(81 / m.pageTokens);
          const model: FakeModel = {
            geometry: {
              pageTokens: m.pageTokens,
              chunk,
              fullPages: full ? longest + m.pools : 0,
              chunkPages: chunk === 0 ? 0 : m.chunkPages + m.pools,
            },
            limits: {
              maxRows: m.rows,
              maxTokens: m.tokens,
              maxLogits: m.rows + (drafts?.logits ?? 0),
              slots: m.rows,
              vocab: 97,
              stages: m.stages,
            },
          };
          // Guesses from the tokens that each request gets alone, so many in ten of them right.
          const answers = new Map<string, number[]>();
          const drafter: Drafter = {
            draft: (id, known, most) => {
              const next = (answers.get(id) ?? []).slice(known.length, known.length + most);
              return next.map((token) => (Number(dice.next().value) * 2 < (drafts?.right ?? 0) ? token : 1));
            },
            end: () => {},
          };
          const r = rig({ model, depth, prefixCache, ...(drafts === null ? {} : { drafter }) });
          const requests: GenerateRequest[] = [];
          list.forEach((job, i) => {
            const earlier = job.continues === null ? undefined : requests[job.continues];
            const answer =
              earlier === undefined ? [] : generateAlone(model, earlier, r.scheduler.contextTokens).tokens;
            const tokens = [...(earlier?.tokens ?? []), ...answer, ...range(job.prompt, job.seed)];
            const made = request(`r${i}`, tokens.slice(0, 50), {
              max_tokens: job.most,
              stop_tokens: job.stops,
              ban_stop_tokens: job.ban,
              prompt_logprobs: job.promptLogprobs,
              sampling: {
                ...GREEDY,
                temperature: job.temperature,
                seed: job.seed,
                repetition_penalty: job.penalty,
                presence_penalty: job.presence,
              },
            });
            requests.push(made);
            const alone = generateAlone(model, made, r.scheduler.contextTokens).tokens;
            answers.set(made.id, [...made.tokens, ...alone]);
          });
          const last = Math.max(...list.map((job) => job.arrives + job.leaves));
          for (let time = 0; time <= last; time++) {
            list.forEach((job, i) => {
              if (job.arrives === time) r.loop.add(requests[i] as GenerateRequest);
              if (job.leaves > 0 && job.arrives + job.leaves === time) r.loop.cancel(`r${i}`);
            });
            await turn();
            if (dice.next().value !== 0) r.engine.run();
          }
          await r.drain();
          expect(r.fatal).toEqual([]);
          preemptions += r.scheduler.preemptions;
          cached += r.scheduler.prefixes.statistics.cachedTokens;
          accepted += r.scheduler.speculation.statistics.accepted;
          dropped += r.scheduler.speculation.statistics.drafted - r.scheduler.speculation.statistics.accepted;
          if (!prefixCache) expect(r.scheduler.prefixes.statistics.cachedTokens).toBe(0);
          list.forEach((job, i) => {
            const id = `r${i}`;
            const ends = r.ends(id);
            expect(ends.length).toBe(1);
            expect(r.of(id).at(-1)).toBe(ends[0] as GenerateEvent);
            const alone = generateAlone(model, requests[i] as GenerateRequest, r.scheduler.contextTokens);
            const end = ends[0];
            if (end?.type !== "finish") throw new Error(`${id} ended with ${JSON.stringify(end)}`);
            if (end.reason === "cancelled") {
              expect(job.leaves).toBeGreaterThan(0);
              expect(r.tokens(id)).toEqual(alone.tokens.slice(0, r.tokens(id).length));
            } else {
              expect(r.tokens(id)).toEqual(alone.tokens);
              expect(end.reason).toBe(alone.reason);
              expect(end.usage.completion_tokens).toBe(alone.tokens.length);
            }
            const logprobs = r.of(id).filter((event) => event.type === "prompt_logprobs");
            expect(logprobs.length).toBe(job.promptLogprobs && r.tokens(id).length > 0 ? 1 : 0);
          });
          expectAllPagesFree(r);
        },
      ),
      { numRuns: 600, seed: 20260801 },
    );
    // The pools are small enough that putting back is part of what was tested, and prefixes were shared.
    expect(preemptions).toBeGreaterThan(50);
    expect(cached).toBeGreaterThan(5000);
    expect(accepted).toBeGreaterThan(1000);
    expect(dropped).toBeGreaterThan(1000);
  }, 120_000);
});

describe("a batch", () => {
  test("carries a decode row of every running stream in each step while a long prompt is computed", async () => {
    const r = rig({ depth: 1 });
    for (const id of ["a", "b"]) r.loop.add(request(id, range(4), { max_tokens: 40 }));
    for (let i = 0; i < 3; i++) {
      await turn();
      r.engine.run();
    }
    await turn();
    const before = r.engine.seen.length;
    r.loop.add(request("long", range(150), { max_tokens: 1 }));
    await r.drain();
    const during = r.engine.seen.slice(before).filter((step) => step.rows.some((row) => row.count > 1));
    expect(during.length).toBeGreaterThan(4);
    for (const step of during) {
      expect(step.rows.filter((row) => row.count === 1).length).toBe(2);
      expect(step.rows.reduce((sum, row) => sum + row.count, 0)).toBeLessThanOrEqual(32);
    }
  });

  test("shares the prompt tokens of a step between prompts", async () => {
    const r = rig({ depth: 1 });
    r.loop.add(request("a", range(60), { max_tokens: 1 }));
    r.loop.add(request("b", range(60, 1), { max_tokens: 1 }));
    r.loop.add(request("c", range(5, 2), { max_tokens: 1 }));
    await turn();
    expect(r.engine.seen[0]?.rows.map((row) => row.count)).toEqual([14, 13, 5]);
    await r.drain();
  });

  test("shortens prompt pieces beside streams when steps turn out slow, and not when nothing else runs", async () => {
    const model = {
      ...MODEL,
      limits: { ...MODEL.limits, maxTokens: 500 },
      geometry: { ...MODEL.geometry, fullPages: 500, chunkPages: 400 },
    };
    const r = rig({ model, depth: 1, slowdown: 2 });
    // A step takes 100 ms and 1 ms for each token behind the first.
    r.engine.computeNs = (tokens) => (99 + tokens) * 1_000_000;
    r.loop.add(request("alone", range(900), { max_tokens: 60 }));
    await turn();
    expect(r.engine.seen[0]?.rows[0]?.count).toBe(500);
    for (let i = 0; i < 4; i++) {
      r.engine.run();
      await turn();
    }
    const before = r.engine.seen.length;
    r.loop.add(request("later", range(600, 1), { max_tokens: 1 }));
    await r.drain();
    const pieces = r.engine.seen.slice(before).flatMap((step) => step.rows.filter((row) => row.count > 1));
    // The first one goes by what a token cost in steps of prompts alone, the others by what it adds.
    expect(pieces.map((row) => row.count).slice(1, -1)).toEqual([100, 100, 100, 100, 100]);
  });

  test("runs one sequence at a time under the sequential policy, in order of arrival", async () => {
    const r = rig({ mode: "sequential" });
    const prompts = [range(20), range(5, 1), range(40, 2)];
    prompts.forEach((tokens, i) => {
      r.loop.add(request(`r${i}`, tokens));
    });
    await r.drain();
    for (const step of r.engine.seen) expect(step.rows.length).toBe(1);
    const order = r.events.flatMap((event) => (event.type === "finish" ? [event.id] : []));
    expect(order).toEqual(["r0", "r1", "r2"]);
    prompts.forEach((tokens, i) => {
      expect(r.tokens(`r${i}`)).toEqual(generateAlone(MODEL, request("", tokens), 256).tokens);
    });
  });

  test("keeps a step in flight while the one before is computed, and drops the row behind an end token", async () => {
    const alone = generateAlone(MODEL, request("", range(6)), 256).tokens;
    const stop = alone[4] as number;
    const r = rig();
    r.loop.add(request("a", range(6), { stop_tokens: [stop] }));
    await r.drain();
    expect(r.engine.mostInFlight).toBe(2);
    expect(r.engine.seen.slice(1).every((step) => step.rows[0]?.last === true)).toBe(true);
    expect(r.tokens("a")).toEqual(alone.slice(0, alone.indexOf(stop) + 1));
    const last = r.of("a").findLast((event) => event.type === "token");
    expect(last).toEqual({ type: "token", id: "a", token: stop, end: true });
    expect(r.engine.seen.length).toBe(r.tokens("a").length + 1);
    expectAllPagesFree(r);
  });

  test("does not queue a row ahead that needs its last token for penalties, and nobody is slowed to every other step", async () => {
    const r = rig();
    const sampling = { ...GREEDY, repetition_penalty: 1.2 };
    r.loop.add(request("penalized", range(6), { sampling, max_tokens: 8 }));
    r.loop.add(request("plain", range(6, 1), { max_tokens: 8 }));
    await r.drain();
    expect(r.engine.mostInFlight).toBe(1);
    expect(r.engine.seen.every((step) => step.rows.length === 2 && !step.rows.some((row) => row.last))).toBe(
      true,
    );
    expect(r.tokens("penalized")).toEqual(
      generateAlone(MODEL, request("", range(6), { sampling, max_tokens: 8 }), 256).tokens,
    );
  });

  test("computes nothing past max_tokens", async () => {
    const r = rig();
    r.loop.add(request("a", range(6), { max_tokens: 3 }));
    await r.drain();
    expect(r.engine.seen.length).toBe(3);
    expect(r.ends("a")[0]).toMatchObject({
      reason: "length",
      usage: { prompt_tokens: 6, completion_tokens: 3, cached_tokens: 0 },
    });
  });

  test("puts the youngest back when pages run out, and the oldest never", async () => {
    const model = { ...MODEL, geometry: { ...MODEL.geometry, fullPages: 16 } };
    const r = rig({ model });
    const list = ["a", "b", "c"].map((id, i) => request(id, range(8, i), { max_tokens: 40 }));
    for (const each of list) r.loop.add(each);
    await r.drain();
    expect(r.scheduler.preemptions).toBeGreaterThan(0);
    for (const each of list) expect(r.tokens(each.id)).toEqual(generateAlone(model, each, 64).tokens);
    const finished = r.events.flatMap((event) => (event.type === "finish" ? [event.id] : []));
    expect(finished[0]).toBe("a");
    expectAllPagesFree(r);
  });

  test("takes in everything that fits to its end, even when the pages are just enough", async () => {
    // Four pages each: 10 tokens of prompt and 6 of output.
    const model = { ...MODEL, geometry: { ...MODEL.geometry, fullPages: 16 } };
    const r = rig({ model });
    for (const id of ["a", "b", "c", "d", "e"]) r.loop.add(request(id, range(10), { max_tokens: 6 }));
    await turn();
    expect(r.scheduler.running).toBe(4);
    await r.drain();
    expect(r.scheduler.preemptions).toBe(0);
  });

  test("makes the youngest wait when it is the one that lacks a page", async () => {
    const model = { ...MODEL, geometry: { ...MODEL.geometry, fullPages: 16 } };
    const r = rig({ model, depth: 1 });
    // At 31 and 33 tokens the younger one asks for a ninth page while the older one has room in its eighth.
    r.loop.add(request("older", range(8), { max_tokens: 40 }));
    r.loop.add(request("younger", range(10, 1), { max_tokens: 40 }));
    await r.drain();
    const olderRows = r.engine.seen
      .slice(
        0,
        r.engine.seen.findIndex((step) => step.rows.some((row) => row.slot === 0 && row.first === 46)),
      )
      .map((step) => step.rows.find((row) => row.slot === 0)?.first);
    // Never put back: its positions go up without a gap.
    expect(olderRows).toEqual([0, ...Array.from({ length: 38 }, (_, i) => 8 + i)]);
    expect(r.ends("younger")[0]).toMatchObject({ reason: "length" });
  });

  test("does not starve an old long request under a stream of short ones", async () => {
    const model = { ...MODEL, geometry: { ...MODEL.geometry, fullPages: 20 } };
    const r = rig({ model, maxWaiting: 1000 });
    for (let i = 0; i < 3; i++) r.loop.add(request(`before${i}`, range(12, i), { max_tokens: 12 }));
    r.loop.add(request("long", range(70), { max_tokens: 5 }));
    for (let i = 0; i < 300 && r.ends("long").length === 0; i++) {
      r.loop.add(request(`after${i}`, range(10, i), { max_tokens: 6 }));
      await turn();
      r.engine.run();
      r.engine.run();
    }
    expect(r.ends("long").length).toBe(1);
    await r.drain();
    expectAllPagesFree(r);
  });

  test("reports prompt progress, log-probabilities of the prompt, and those of the output when asked", async () => {
    const r = rig({ depth: 1 });
    const tokens = range(40);
    r.loop.add(request("a", tokens, { max_tokens: 2, logprobs: 0, prompt_logprobs: true }));
    await r.drain();
    const progress = r.of("a").flatMap((event) => (event.type === "progress" ? [event.done] : []));
    expect(progress).toEqual([0, 8, 16, 24, 32, 40]);
    const event = r.of("a").find((each) => each.type === "prompt_logprobs");
    if (event?.type !== "prompt_logprobs") throw new Error("no prompt_logprobs event");
    const wanted = promptLogprobsAlone(MODEL, tokens);
    expect(event.logprobs[0]).toBeNull();
    for (let i = 1; i < tokens.length; i++) expect(event.logprobs[i] ?? 0).toBeCloseTo(wanted[i] ?? 0, 4);
    const first = r.of("a").find((each) => each.type === "token");
    expect(first).toMatchObject({ logprob: -(r.tokens("a")[0] ?? 0) / 97, top: [] });
  });
});

describe("a request", () => {
  test("is refused with queue_full and a time to retry when too many wait", async () => {
    const r = rig({ maxWaiting: 2 });
    for (let i = 0; i < 11; i++) r.loop.add(request(`r${i}`, range(3)));
    expect(r.ends("r10")[0]).toMatchObject({ type: "error", error: { code: "queue_full" } });
    const error = r.ends("r10")[0];
    expect(error?.type === "error" && (error.error.retry_after_seconds ?? 0)).toBeGreaterThanOrEqual(1);
    await r.drain();
    expect(r.events.filter((event) => event.type === "finish").length).toBe(10);
  });

  test("that does not fit the context is refused, and one that fills it ends with length", async () => {
    const r = rig({ contextTokens: 30 });
    r.loop.add(request("long", range(30)));
    expect(r.ends("long")[0]).toMatchObject({ type: "error", error: { code: "context_length_exceeded" } });
    r.loop.add(request("edge", range(25), { max_tokens: 100 }));
    await r.drain();
    expect(r.tokens("edge").length).toBe(5);
    expect(r.ends("edge")[0]).toMatchObject({ reason: "length" });
  });

  test("with tokens or parameters outside their range is refused alone", async () => {
    const r = rig();
    r.loop.add(request("good", range(5)));
    const wrong: [string, Partial<GenerateRequest>][] = [
      ["empty", { tokens: [] }],
      ["token", { tokens: [97] }],
      ["fraction", { tokens: [1.5] }],
      ["none", { max_tokens: 0 }],
      ["logprobs", { logprobs: 21 }],
      ["temperature", { sampling: { ...GREEDY, temperature: Number.NaN } }],
      ["bias", { sampling: { ...GREEDY, logit_bias: [[500, 1]] } }],
      ["seed", { sampling: { ...GREEDY, seed: -1 } }],
    ];
    for (const [id, more] of wrong) r.loop.add(request(id, range(5), more));
    for (const [id] of wrong) expect(r.ends(id)[0]).toMatchObject({ error: { code: "invalid_argument" } });
    await r.drain();
    expect(r.tokens("good").length).toBe(10);
  });

  test("ends at the next step when its client goes away, and frees its pages at once", async () => {
    const r = rig();
    r.loop.add(request("a", range(20), { max_tokens: 100 }));
    r.loop.add(request("b", range(20, 1), { max_tokens: 20 }));
    for (let i = 0; i < 4; i++) {
      await turn();
      r.engine.run();
    }
    const steps = r.engine.seen.length;
    r.loop.cancel("a");
    expect(r.ends("a")[0]).toMatchObject({ type: "finish", reason: "cancelled" });
    r.loop.cancel("a");
    r.loop.cancel("unknown");
    await r.drain();
    for (const step of r.engine.seen.slice(steps + 1)) expect(step.rows.length).toBe(1);
    expect(r.tokens("b")).toEqual(
      generateAlone(MODEL, request("", range(20, 1), { max_tokens: 20 }), 256).tokens,
    );
    expectAllPagesFree(r);
  });

  test("ends with deadline_exceeded, running or waiting", async () => {
    const r = rig({ mode: "sequential" });
    r.loop.add(request("running", range(4), { max_tokens: 200, deadline_ms: 50 }));
    r.loop.add(request("waiting", range(4), { max_tokens: 5, deadline_ms: 20 }));
    await r.drain();
    for (const id of ["running", "waiting"])
      expect(r.ends(id)).toMatchObject([{ type: "error", error: { code: "deadline_exceeded" } }]);
    expect(r.tokens("running").length).toBeGreaterThan(10);
    expectAllPagesFree(r);
  });

  test("ends by its deadline even when the engine hangs", async () => {
    const r = rig({ now: () => performance.now() });
    r.loop.add(request("a", range(4), { deadline_ms: 1 }));
    const limit = performance.now() + 20_000;
    while (r.ends("a").length === 0 && performance.now() < limit) await turn();
    expect(r.ends("a")[0]).toMatchObject({ error: { code: "deadline_exceeded" } });
  });

  test("never meets a banned stop token", async () => {
    const alone = generateAlone(MODEL, request("", range(6)), 256).tokens;
    const r = rig();
    r.loop.add(
      request("a", range(6), { stop_tokens: alone.slice(0, 3), ban_stop_tokens: true, max_tokens: 30 }),
    );
    await r.drain();
    expect(r.tokens("a").length).toBe(30);
    for (const token of alone.slice(0, 3)) expect(r.tokens("a")).not.toContain(token);
  });

  test("may name stop tokens that the vocabulary does not have", async () => {
    const r = rig();
    r.loop.add(request("a", range(6), { stop_tokens: [5000], ban_stop_tokens: true }));
    r.loop.add(request("b", range(6), { stop_tokens: [5000] }));
    await r.drain();
    expect(r.tokens("a").length).toBe(10);
    expect(r.tokens("b")).toEqual(r.tokens("a"));
  });

  test("measures waiting, prefill and decoding on the scheduler's clock", async () => {
    const r = rig({ mode: "sequential", depth: 1 });
    r.loop.add(request("a", range(4), { max_tokens: 5 }));
    r.loop.add(request("b", range(64), { max_tokens: 5 }));
    await r.drain();
    const end = r.ends("b")[0];
    if (end?.type !== "finish") throw new Error("b did not finish");
    expect(end.timing).toEqual({ queue_ms: 5, prefill_ms: 2, decode_ms: 4 });
  });
});

describe("a failing engine", () => {
  test("takes only the requests of the failed step with it", async () => {
    const r = rig({ depth: 1 });
    r.engine.failures.set(1, new CaravanError("engine_failed", "not a number in the logits"));
    r.loop.add(request("a", range(4)));
    await turn();
    r.engine.run();
    await turn();
    r.loop.add(request("b", range(4, 1)));
    await r.drain();
    expect(r.ends("a")).toMatchObject([{ type: "error", error: { code: "engine_failed" } }]);
    expect(r.tokens("b").length).toBe(10);
    expect(r.fatal).toEqual([]);
    expectAllPagesFree(r);
  });

  test("takes only the request of a failed row with it, while the next step is in flight", async () => {
    for (const position of [3, 7, 8]) {
      const r = rig({ depth: 2 });
      r.engine.failingRow = ({ slot, firstPosition, tokens }) =>
        slot === 1 && firstPosition + tokens.length - 1 === position
          ? new CaravanError("engine_failed", "not a number")
          : undefined;
      for (let i = 0; i < 3; i++) r.loop.add(request(`r${i}`, range(4, i)));
      await r.drain();
      r.engine.failingRow = () => undefined;
      expect(r.ends("r1")).toMatchObject([
        { type: "error", error: { code: "engine_failed", message: "not a number" } },
      ]);
      expect(r.tokens("r1").length).toBe(position - 3);
      for (const i of [0, 2])
        expect(r.tokens(`r${i}`)).toEqual(generateAlone(MODEL, request("", range(4, i)), 1000).tokens);
      r.loop.add(request("next", range(4, 1)));
      await r.drain();
      expect(r.tokens("next")).toEqual(generateAlone(MODEL, request("", range(4, 1)), 1000).tokens);
      expect(r.fatal).toEqual([]);
      expectAllPagesFree(r);
    }
  });

  test("that is gone ends every request once, and those that come later", async () => {
    const r = rig();
    r.engine.dies = true;
    r.engine.failures.set(2, new CaravanError("engine_failed", "aborted"));
    for (let i = 0; i < 12; i++) r.loop.add(request(`r${i}`, range(4, i)));
    await r.drain();
    r.loop.add(request("late", range(4)));
    await turn();
    for (const id of ["r0", "r11", "late"])
      expect(r.ends(id)).toMatchObject([
        { type: "error", error: { code: "engine_failed", message: "aborted" } },
      ]);
    expect(r.fatal.length).toBe(1);
    expectAllPagesFree(r);
  });
});
