// Event streams: framing, comments, failures after the headers, and readers that are slow or gone.

import { describe, expect, test } from "bun:test";
import { createApp } from "../../src/api/app.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { eventStream } from "../../src/api/sse.ts";
import { CaravanError } from "../../src/errors.ts";
import { bytesOf } from "../tools/byte-text.ts";
import type { Script } from "../tools/scripted-engine.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const hold = new Promise<void>(() => undefined);

function setup(script: Script, settings: Partial<ApiSettings> = {}) {
  const models = scriptedModels(script);
  const app = createApp({ models, settings });
  const stream = (more: object = {}) =>
    app.request("/v1/chat/completions", {
      method: "POST",
      body: JSON.stringify({
        model: MODEL,
        messages: [{ role: "user", content: "Hi" }],
        stream: true,
        ...more,
      }),
    });
  return { models, stream };
}

function readerOf(response: Response): ReadableStreamDefaultReader<Uint8Array> {
  if (response.body === null) throw new Error("the response has no body");
  return response.body.getReader() as ReadableStreamDefaultReader<Uint8Array>;
}

/** Reads until the text so far satisfies the condition. */
async function readUntil(
  reader: ReadableStreamDefaultReader<Uint8Array>,
  condition: (text: string) => boolean,
): Promise<string> {
  const decoder = new TextDecoder();
  let text = "";
  while (!condition(text)) {
    const { value, done } = await reader.read();
    if (done) throw new Error(`the stream ended with ${JSON.stringify(text)}`);
    text += decoder.decode(value, { stream: true });
  }
  return text;
}

describe("framing", () => {
  test("is data lines of JSON with the fields in place, and [DONE]", async () => {
    const { stream } = setup(sayScript("a\n\u2028"));
    const response = await stream({ stream_options: { include_usage: true } });
    expect(response.headers.get("content-type")).toBe("text/event-stream; charset=utf-8");
    expect(response.headers.get("cache-control")).toBe("no-cache");
    expect(response.headers.get("x-request-id")).toStartWith("req_");
    const frames = (await response.text()).split("\n\n");
    expect(frames.pop()).toBe("");
    expect(frames.pop()).toBe("data: [DONE]");
    const chunks = frames.map((frame) => {
      expect(frame).toStartWith("data: ");
      expect(frame).not.toContain("\n");
      return JSON.parse(frame.slice(6));
    });
    const head = {
      id: chunks[0].id,
      object: "chat.completion.chunk",
      created: chunks[0].created,
      model: MODEL,
      system_fingerprint: "fp_test",
    };
    const chunk = (delta: object, finish_reason: string | null = null) => ({
      ...head,
      choices: [{ index: 0, delta, logprobs: null, finish_reason }],
      usage: null,
    });
    expect(chunks.slice(0, -1)).toEqual([
      chunk({ role: "assistant", content: "", refusal: null }),
      chunk({ content: "a" }),
      chunk({ content: "\n" }),
      chunk({ content: "\u2028" }),
      chunk({}, "stop"),
    ]);
    expect(chunks.at(-1)).toMatchObject({ ...head, choices: [], usage: { completion_tokens: 6 } });
  });

  test("tells prefill progress in comments before the first chunk", async () => {
    const { stream } = setup({ ...sayScript("x"), progressSteps: 2 });
    const text = await (await stream()).text();
    expect(text).toMatch(/^: prefill \d+\/(\d+)\n\n: prefill \1\/\1\n\ndata: \{/);
  });

  test("sends keep-alive comments while nothing else comes", async () => {
    const { models, stream } = setup(
      { ...sayScript("ab"), gate: (position) => (position === 1 ? hold : undefined) },
      { keepAliveMs: 20 },
    );
    const reader = readerOf(await stream());
    const text = await readUntil(reader, (so_far) => so_far.split(": keep-alive\n\n").length > 3);
    expect(text).toContain('"content":"a"');
    await reader.cancel();
    expect(models.engine.cancelled).toHaveLength(1);
  });

  test("opens after the keep-alive interval even if there is nothing to say yet", async () => {
    const { models, stream } = setup({ ...sayScript("ab"), gate: () => hold }, { keepAliveMs: 20 });
    const reader = readerOf(await stream());
    expect(await readUntil(reader, (text) => text !== "")).toBe(": keep-alive\n\n");
    await reader.cancel();
    await until(() => models.engine.running === 0, "the engine ends the request");
  });
});

describe("failures", () => {
  const failing = (tokens: number): Script => ({
    ...sayScript("abc"),
    failAfter: () => ({ tokens, error: { code: "engine_failed", message: "The runner died." } }),
  });

  test("before the first event have their own status", async () => {
    const response = await setup(failing(0)).stream();
    expect(response.status).toBe(503);
    expect(await response.json()).toMatchObject({ error: { code: "engine_failed" } });
  });

  test("after it are a last data frame and the end, without [DONE] or a finish reason", async () => {
    const response = await setup(failing(2)).stream();
    expect(response.status).toBe(200);
    const text = await response.text();
    const frames = text.trimEnd().split("\n\n");
    expect(JSON.parse((frames.at(-1) ?? "").slice(6))).toEqual({
      error: { message: "The runner died.", type: "server_error", param: null, code: "engine_failed" },
    });
    expect(text).not.toContain("[DONE]");
    expect(text).not.toContain('"finish_reason":"');
  });
});

describe("readers", () => {
  const endless: Script = {
    answer: function* () {
      for (;;) yield* bytesOf("endless ");
    },
  };

  test("that do not read stop generation being read after a small buffer", async () => {
    const { models, stream } = setup(endless);
    const reader = readerOf(await stream());
    await reader.read();
    let before = -1;
    await until(() => {
      const same = models.engine.produced === before;
      before = models.engine.produced;
      return same;
    }, "production stops");
    // A chunk is about 200 bytes, the buffer 16 KiB.
    expect(models.engine.produced).toBeLessThan(200);
    await reader.cancel();
    await until(() => models.engine.running === 0, "the engine ends the request");
  });

  test("that take nothing for too long are given up", async () => {
    const { models, stream } = setup(endless, { keepAliveMs: 10, stallLimitMs: 30 });
    const reader = readerOf(await stream());
    await until(() => models.engine.cancelled.length === 1, "the engine is told");
    await until(() => models.engine.running === 0, "the engine ends the request");
    expect(models.engine.produced).toBeLessThan(200);
    await expect(
      Array.fromAsync({ [Symbol.asyncIterator]: () => ({ next: () => reader.read() as never }) }),
    ).rejects.toThrow("read nothing");
  });

  test("that leave give their place back", async () => {
    const { stream } = setup(endless, { maxConcurrentRequests: 1 });
    for (let round = 0; round < 3; round += 1) {
      const response = await stream();
      expect(response.status).toBe(200);
      await response.body?.cancel();
    }
  });
});

test("a stream tells once how it ended", async () => {
  const ends: (string | undefined)[] = [];
  const make = (frames: AsyncGenerator<string, void, void>) =>
    eventStream({
      frames,
      keepAliveMs: 1000,
      stallLimitMs: 1000,
      cancel: () => undefined,
      closed: (error) => ends.push(error?.code),
    });
  const whole = await make(
    (async function* () {
      yield "data: 1\n\n";
    })(),
  );
  expect(await whole.text()).toBe("data: 1\n\n");
  const broken = await make(
    (async function* () {
      yield "data: 1\n\n";
      throw new CaravanError("engine_failed", "x");
    })(),
  );
  await broken.text();
  const left = await make(
    (async function* () {
      yield "data: 1\n\n";
      await hold;
    })(),
  );
  await left.body?.cancel();
  expect(ends).toEqual([undefined, "engine_failed", "cancelled"]);
});
