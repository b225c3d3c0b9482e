// Nobody waits for ever: whatever keeps arriving, whatever pages and budgets are short, every request that was taken ends
// within a number of steps that does not depend on what came after it.

import { describe, expect, test } from "bun:test";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { Scheduler, type SchedulerOptions } from "../../src/scheduler/scheduler.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { FakeEngine, type FakeModel, turn } from "./fake-engine.ts";

const MODEL: FakeModel = {
  geometry: { pageTokens: 4, chunk: 16, fullPages: 64, chunkPages: 40 },
  limits: { maxRows: 8, maxTokens: 32, maxLogits: 16, slots: 8, vocab: 97 },
};

function rig(options: Partial<SchedulerOptions> & { model?: FakeModel } = {}) {
  const { model = MODEL, ...rest } = options;
  const events: GenerateEvent[] = [];
  const engine = new FakeEngine(model);
  const clock = { ms: 0 };
  const scheduler = new Scheduler({
    geometry: model.geometry,
    limits: model.limits,
    contextTokens: 1000,
    mode: "batched",
    maxWaiting: 1000,
    now: () => clock.ms,
    emit: (event) => events.push(event),
    ...rest,
  });
  const onFatal = (error: Error): void => {
    throw error;
  };
  const loop = new StepLoop({ scheduler, engine, depth: 2, onFatal });
  const ended = (id: string): GenerateEvent | undefined =>
    events.find((event) => event.id === id && (event.type === "finish" || event.type === "error"));
  /** Steps until `id` ends; `each` happens before every one. */
  const stepsUntil = async (id: string, most: number, each: (step: number) => void): Promise<number> => {
    for (let step = 0; step < most; step++) {
      if (ended(id) !== undefined) return step;
      each(step);
      await turn();
      engine.run();
      clock.ms++;
    }
    throw new Error(`${id} has not ended after ${most} steps`);
  };
  return { engine, scheduler, loop, ended, events, clock, stepsUntil };
}

const range = (length: number, seed = 0): number[] =>
  Array.from({ length }, (_, i) => (i * 7 + seed * 13) % 97);
const request = (id: string, tokens: number[], more: Partial<GenerateRequest> = {}): GenerateRequest => ({
  ...{ id, tokens, max_tokens: 6, stop_tokens: [], sampling: GREEDY, ...more },
});

describe("an old request", () => {
  test("gets its prompt computed while new long prompts keep coming and streams leave hardly any budget", async () => {
    const { engine, loop, stepsUntil } = rig();
    // Beside streams two prompt tokens a step are all that there is.
    engine.computeNs = (tokens) => tokens * 1_000_000_000;
    loop.add(request("stream", range(4), { max_tokens: 200 }));
    await stepsUntil("nobody", 5, () => {}).catch(() => {});
    loop.add(request("old", range(20, 1), { max_tokens: 1 }));
    const steps = await stepsUntil("old", 200, (step) => {
      if (step < 100) loop.add(request(`new${step}`, range(60, 2 + step), { max_tokens: 1 }));
    });
    expect(steps).toBeLessThan(60);
  });

  test("that needs most of the pages gets in while short ones keep coming", async () => {
    const { loop, stepsUntil } = rig({
      model: { ...MODEL, geometry: { ...MODEL.geometry, fullPages: 20 } },
    });
    for (let i = 0; i < 8; i++) loop.add(request(`before${i}`, range(10, i)));
    loop.add(request("large", range(60, 20), { max_tokens: 12 }));
    const steps = await stepsUntil("large", 400, (step) => {
      loop.add(request(`after${step}`, range(10, 30 + step)));
    });
    expect(steps).toBeLessThan(120);
  });

  test("whose beginning another one computes goes on when that one is cancelled again and again", async () => {
    const { loop, stepsUntil } = rig();
    loop.add(request("first", range(120), { max_tokens: 1 }));
    loop.add(request("waits", range(120), { max_tokens: 1 }));
    const steps = await stepsUntil("waits", 100, (step) => {
      if (step === 1) loop.cancel("first");
      // Later ones with the same beginning must follow it, not lead it.
      loop.add(request(`like${step}`, range(130), { max_tokens: 1 }));
      loop.cancel(`like${step - 1}`);
    });
    expect(steps).toBeLessThan(30);
  });
});

describe("streams", () => {
  test("get a token in every step while prompts keep coming", async () => {
    const { engine, loop, stepsUntil } = rig();
    loop.add(request("a", range(4), { max_tokens: 60 }));
    loop.add(request("b", range(4, 1), { max_tokens: 60 }));
    let arrived = 0;
    const steps = await stepsUntil("a", 200, () => {
      loop.add(request(`p${arrived++}`, range(50, arrived), { max_tokens: 1 }));
    });
    expect(steps).toBeLessThan(75);
    const beside = engine.seen.filter((step) => step.rows.some((row) => row.count > 1));
    expect(beside.length).toBeGreaterThan(30);
  });
});

describe("limits", () => {
  test("refuse what the queue cannot hold at once, with a time that grows with the queue, and take more later", async () => {
    const { loop, events, stepsUntil, ended } = rig({ maxWaiting: 16 });
    for (let i = 0; i < 40; i++) loop.add(request(`r${i}`, range(8, i)));
    const refused = events.flatMap((event) =>
      event.type === "error" && event.error.code === "queue_full" ? [event] : [],
    );
    // Eight may run and sixteen wait.
    expect(refused.map(({ id }) => id)).toEqual(Array.from({ length: 16 }, (_, i) => `r${24 + i}`));
    for (const { error } of refused) {
      expect(error.retry_after_seconds).toBeGreaterThanOrEqual(1);
      expect(error.retry_after_seconds).toBeLessThanOrEqual(60);
    }
    await stepsUntil("r23", 400, () => {});
    loop.add(request("again", range(8)));
    await stepsUntil("again", 400, () => {});
    expect(ended("again")).toMatchObject({ type: "finish" });
  });

  test("end a request by its deadline while it waits for another one's pages", async () => {
    const { clock, engine, loop, scheduler, ended, stepsUntil } = rig();
    loop.add(request("first", range(120), { max_tokens: 1 }));
    loop.add(request("waits", range(120), { max_tokens: 1, deadline_ms: 3 }));
    await turn();
    engine.run();
    clock.ms = 5;
    scheduler.expire();
    expect(ended("waits")).toMatchObject({ type: "error", error: { code: "deadline_exceeded" } });
    await stepsUntil("first", 100, () => {});
    expect(ended("first")).toMatchObject({ type: "finish" });
    expect(scheduler.pools.full.available).toBe(64);
  });
});
