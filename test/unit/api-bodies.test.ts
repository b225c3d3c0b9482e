// Bodies of requests: how much memory all of them may hold together, and how much work one may make.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { createApp } from "../../src/api/app.ts";
import { BodyBudget } from "../../src/api/body-budget.ts";
import { JsonBounds } from "../../src/api/json-bounds.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { CaravanError } from "../../src/errors.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const KIB = 1024;
const settings: Partial<ApiSettings> = { maxBodyBytes: 256 * KIB, maxTotalBodyBytes: 512 * KIB };
const encoder = new TextEncoder();

/** A body of `size` letters inside JSON that stays open until it is let go. */
function heldBody(size: number): { body: ReadableStream<Uint8Array>; finish: () => void } {
  const { promise, resolve } = Promise.withResolvers<void>();
  let step = 0;
  const body = new ReadableStream<Uint8Array>({
    async pull(controller) {
      step += 1;
      if (step === 1) controller.enqueue(encoder.encode(`{"model":"${MODEL}","prompt":"${"x".repeat(size)}`));
      else {
        await promise;
        controller.enqueue(encoder.encode(`","max_tokens":1}`));
        controller.close();
      }
    },
  });
  return { body, finish: resolve };
}

describe("the memory of all bodies", () => {
  test("is bounded: the next large one gets 429 with Retry-After, small ones are served, and all again afterwards", async () => {
    const app = createApp({
      models: scriptedModels(sayScript("x"), { contextLength: 1e6 }),
      settings,
    });
    const post = (body: ReadableStream<Uint8Array> | string) =>
      app.request("/v1/completions", { method: "POST", body });
    const held = [heldBody(250 * KIB), heldBody(250 * KIB)];
    const waiting = held.map(({ body }) => post(body));
    const large = JSON.stringify({ model: MODEL, prompt: "y".repeat(250 * KIB), max_tokens: 1 });
    let refused = await post(large);
    while (refused.status === 200) refused = await post(large);
    expect(refused.status).toBe(429);
    expect(Number(refused.headers.get("retry-after"))).toBeGreaterThan(0);
    expect(await refused.json()).toMatchObject({ error: { code: "queue_full", type: "rate_limit_error" } });
    expect((await post(JSON.stringify({ model: MODEL, prompt: "small" }))).status).toBe(200);
    for (const { finish } of held) finish();
    for (const reply of await Promise.all(waiting)) expect(reply.status).toBe(200);
    expect((await post(large)).status).toBe(200);
  });

  test("is held by a stream until the client has all of it", async () => {
    const gate = Promise.withResolvers<void>();
    const app = createApp({
      models: scriptedModels(
        { ...sayScript("x"), gate: (at) => (at === 1 ? gate.promise : undefined) },
        { contextLength: 1e6 },
      ),
      settings: { ...settings, maxTotalBodyBytes: 256 * KIB },
    });
    const body = JSON.stringify({ model: MODEL, prompt: "y".repeat(200 * KIB), max_tokens: 2, stream: true });
    const post = () => app.request("/v1/completions", { method: "POST", body });
    const first = await post();
    expect((await post()).status).toBe(429);
    gate.resolve();
    await first.text();
    expect((await post()).status).toBe(200);
  });

  test("is given back when the client leaves", async () => {
    const models = scriptedModels(
      { ...sayScript("x"), gate: (at) => (at === 1 ? new Promise<void>(() => undefined) : undefined) },
      { contextLength: 1e6 },
    );
    const app = createApp({ models, settings: { ...settings, maxTotalBodyBytes: 256 * KIB } });
    const body = JSON.stringify({ model: MODEL, prompt: "y".repeat(200 * KIB), max_tokens: 2, stream: true });
    const post = () => app.request("/v1/completions", { method: "POST", body });
    const first = await post();
    await first.body?.cancel();
    await until(() => models.engine.running === 0, "the first is given up");
    expect((await post()).status).toBe(200);
  });

  test("counts what each holds beyond its free share, exactly", () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.nat(5), fc.nat(300 * KIB)), { maxLength: 50 }), (steps) => {
        const budget = new BodyBudget(1000 * KIB);
        const leases = Array.from({ length: 6 }, () => ({ lease: budget.open(), size: 0 }));
        for (const [which, size] of steps) {
          const each = leases[which];
          if (each === undefined) continue;
          if (size < 10 * KIB) {
            each.lease.release();
            each.lease = budget.open();
            each.size = 0;
            continue;
          }
          try {
            each.lease.grow(Math.max(size, each.size));
            each.size = Math.max(size, each.size);
          } catch (thrown) {
            if (!(thrown instanceof CaravanError)) throw thrown;
          }
        }
        const expected = leases.reduce((sum, { size }) => sum + Math.max(0, size - 64 * KIB), 0);
        expect(budget.used).toBe(expected);
        expect(budget.used).toBeLessThanOrEqual(budget.limitBytes);
      }),
    );
  });
});

describe("the structure of JSON", () => {
  const limits = { maxValues: 20, maxObjects: 5, maxDepth: 4 };
  const accepted = (text: string, cut = text.length): boolean => {
    const bounds = new JsonBounds(limits);
    const bytes = encoder.encode(text);
    try {
      bounds.add(bytes.subarray(0, cut));
      bounds.add(bytes.subarray(cut));
      return true;
    } catch (thrown) {
      if (thrown instanceof CaravanError && thrown.code === "request_too_large") return false;
      throw thrown;
    }
  };

  test("is bounded in values, objects and depth, and texts may say what they like", () => {
    expect(accepted(`[${"1,".repeat(18)}1]`)).toBe(true);
    expect(accepted(`[${"1,".repeat(20)}1]`)).toBe(false);
    expect(accepted(`[${"{},".repeat(4)}{}]`)).toBe(true);
    expect(accepted(`[${"{},".repeat(5)}{}]`)).toBe(false);
    expect(accepted("[[[[]]]]")).toBe(true);
    expect(accepted("[[[[[]]]]]")).toBe(false);
    const hostile = ["[{,".repeat(50), '"', "\\", '\\"[[[[[[[[', "}]".repeat(50)];
    expect(accepted(JSON.stringify(hostile))).toBe(true);
  });

  test("is counted no lower than it is, wherever the pieces are cut", () => {
    const count = (value: unknown): { values: number; objects: number; depth: number } => {
      if (typeof value !== "object" || value === null) return { values: 0, objects: 0, depth: 0 };
      const inner = Object.values(value).map(count);
      return {
        values: inner.length + inner.reduce((sum, each) => sum + each.values, 0),
        objects: (Array.isArray(value) ? 0 : 1) + inner.reduce((sum, each) => sum + each.objects, 0),
        depth: 1 + Math.max(0, ...inner.map((each) => each.depth)),
      };
    };
    fc.assert(
      fc.property(fc.jsonValue({ maxDepth: 6 }), fc.nat(), (value, at) => {
        const text = JSON.stringify(value);
        const { values, objects, depth } = count(value);
        const over = values > limits.maxValues + 1 || objects > limits.maxObjects || depth > limits.maxDepth;
        const cut = at % (encoder.encode(text).length + 1);
        expect(accepted(text, cut)).toBe(accepted(text));
        if (over) expect(accepted(text)).toBe(false);
      }),
    );
  });

  test("that is refused is 413 in the API", async () => {
    const app = createApp({ models: scriptedModels(sayScript("x")) });
    const post = (body: string) => app.request("/v1/chat/completions", { method: "POST", body });
    for (const body of [
      `{"messages":${"[".repeat(200)}${"]".repeat(200)}}`,
      `{"messages":[${"{},".repeat(100_001)}{}]}`,
      `{"prompt":[${"1,".repeat(1_000_001)}1]}`,
    ]) {
      const reply = await post(body);
      expect(reply.status).toBe(413);
      expect(await reply.json()).toMatchObject({ error: { code: "request_too_large" } });
    }
  });
});

describe("every API family", () => {
  const app = () => createApp({ models: scriptedModels(sayScript("x"), { contextLength: 50 }) });
  const messages = Array.from({ length: 60 }, () => ({ role: "user", content: "x" }));

  test("refuses more messages than the context has tokens before the template sees them", async () => {
    for (const [path, body] of [
      ["/v1/chat/completions", { messages }],
      ["/v1/responses", { input: messages }],
      ["/v1/messages", { messages, max_tokens: 1 }],
      ["/v1/messages/count_tokens", { messages }],
      ["/api/chat", { messages }],
      ["/v1/tokenize", { messages }],
      ["/v1/apply-template", { messages }],
    ] as const) {
      const reply = await app().request(path, {
        method: "POST",
        body: JSON.stringify({ model: MODEL, ...body }),
      });
      expect([path, reply.status]).toEqual([path, 400]);
      expect(await reply.text()).toContain("60 messages");
    }
  });

  test("answers wrong methods and unknown paths in its own form", async () => {
    const wrong = async (path: string) => (await app().request(path, { method: "PUT" })).json();
    expect(await wrong("/v1/messages")).toMatchObject({
      type: "error",
      error: { type: "invalid_request_error" },
    });
    expect(await wrong("/v1/messages/nothing")).toMatchObject({ type: "error" });
    expect(await wrong("/api/chat")).toEqual({ error: expect.any(String) });
    expect(await wrong("/api/nothing")).toEqual({ error: expect.any(String) });
    expect(await wrong("/v1/completions")).toMatchObject({ error: { code: "method_not_allowed" } });
  });

  test("takes the same ranges of sampling values", async () => {
    const message = { messages: [{ role: "user", content: "x" }] };
    const status = async (path: string, body: object) =>
      (await app().request(path, { method: "POST", body: JSON.stringify({ model: MODEL, ...body }) })).status;
    for (const [value, expected] of [
      [{ temperature: 2 }, 200],
      [{ temperature: 2.1 }, 400],
      [{ top_p: 1.1 }, 400],
    ] as const) {
      expect(await status("/v1/chat/completions", { ...message, max_tokens: 1, ...value })).toBe(expected);
      expect(await status("/v1/responses", { input: "x", max_output_tokens: 1, ...value })).toBe(expected);
      expect(await status("/api/chat", { ...message, options: { num_predict: 1, ...value } })).toBe(expected);
    }
    for (const top_k of [-1, 0]) {
      expect(await status("/v1/chat/completions", { ...message, max_tokens: 1, top_k })).toBe(200);
      expect(await status("/v1/messages", { ...message, max_tokens: 1, top_k })).toBe(200);
      expect(await status("/api/chat", { ...message, options: { num_predict: 1, top_k } })).toBe(200);
    }
  });
});
