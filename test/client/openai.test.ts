// The API as the `openai` client sees it, over a real loopback socket.

import { afterEach, describe, expect, test } from "bun:test";
import OpenAI from "openai";
import { createApp } from "../../src/api/app.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { type RunningServer, startServer } from "../../src/api/server.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { bytesOf, END } from "../tools/byte-text.ts";
import { type Script, scriptedLogprob } from "../tools/scripted-engine.ts";
import { MODEL, type ScriptedModels, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

interface Setup {
  client: OpenAI;
  models: ScriptedModels;
  server: RunningServer;
}

const running: RunningServer[] = [];

function setup(script: Script, settings: Partial<ApiSettings> = {}): Setup {
  const models = scriptedModels(script);
  const lifecycle = new Lifecycle();
  const app = createApp({ models, lifecycle, settings });
  const server = startServer({
    app,
    lifecycle,
    host: "127.0.0.1",
    port: 0,
    drainSeconds: 0,
    keyed: true,
    log: createLogger({ level: "silent" }),
  });
  running.push(server);
  const apiKey = settings.apiKeys?.[0] ?? "unused";
  return { client: new OpenAI({ baseURL: `${server.url}/v1`, apiKey, maxRetries: 0 }), models, server };
}

afterEach(async () => {
  for (const server of running.splice(0)) await server.drain();
});

const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Hi" }];

async function caught(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise;
  } catch (thrown) {
    return thrown;
  }
  throw new Error("nothing was thrown");
}

describe("chat completions", () => {
  test("a whole reply has the text, the finish reason and the usage", async () => {
    const { client, models } = setup({ ...sayScript("Hello, wörld ✓"), cachedTokens: 3 });
    const reply = await client.chat.completions.create({ model: MODEL, messages });
    expect(reply.object).toBe("chat.completion");
    expect(reply.id).toStartWith("chatcmpl-");
    expect(reply.model).toBe(MODEL);
    expect(reply.choices).toHaveLength(1);
    expect(reply.choices[0]?.message).toEqual({
      role: "assistant",
      content: "Hello, wörld ✓",
      refusal: null,
    });
    expect(reply.choices[0]?.finish_reason).toBe("stop");
    const prompt = models.engine.requests[0]?.tokens.length ?? 0;
    const completion = bytesOf("Hello, wörld ✓").length + 1;
    expect(reply.usage?.prompt_tokens).toBe(prompt);
    expect(reply.usage?.completion_tokens).toBe(completion);
    expect(reply.usage?.total_tokens).toBe(prompt + completion);
    expect(reply.usage?.prompt_tokens_details?.cached_tokens).toBe(3);
  });

  test("a streamed reply says the same, begins with the role and has one id", async () => {
    const { client } = setup(sayScript("Hello, wörld ✓"));
    const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
    const chunks = await Array.fromAsync(stream);
    expect(chunks[0]?.choices[0]?.delta.role).toBe("assistant");
    expect(new Set(chunks.map((chunk) => `${chunk.id} ${chunk.created} ${chunk.object}`)).size).toBe(1);
    expect(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("")).toBe("Hello, wörld ✓");
    expect(chunks.at(-1)?.choices[0]?.finish_reason).toBe("stop");
    expect(chunks.every((chunk) => !("usage" in chunk))).toBe(true);
  });

  test("the usage chunk comes last and only when it is asked for", async () => {
    const { client } = setup({ ...sayScript("ok"), cachedTokens: 2, progressSteps: 3 });
    const stream = await client.chat.completions.create({
      model: MODEL,
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    const chunks = await Array.fromAsync(stream);
    expect(chunks.slice(0, -1).every((chunk) => chunk.usage === null)).toBe(true);
    expect(chunks.at(-1)?.choices).toEqual([]);
    expect(chunks.at(-1)?.usage?.completion_tokens).toBe(3);
    expect(chunks.at(-1)?.usage?.prompt_tokens_details?.cached_tokens).toBe(2);
  });

  test("the stream helper assembles the final completion", async () => {
    const { client } = setup(sayScript("assembled"));
    const final = await client.chat.completions
      .stream({ model: MODEL, messages, n: 2, logprobs: true, top_logprobs: 1 })
      .finalChatCompletion();
    expect(final.choices.map((choice) => choice.message.content)).toEqual(["assembled", "assembled"]);
    expect(final.choices[1]?.logprobs?.content).toHaveLength("assembled".length);
  });

  test("n answers run in parallel with seeds that count up", async () => {
    const { client, models } = setup({
      answer: (request) => [...bytesOf(`seed ${request.sampling.seed}`), END],
    });
    const reply = await client.chat.completions.create({ model: MODEL, messages, n: 5, seed: 40 });
    expect(reply.choices.map((choice) => choice.message.content)).toEqual(
      [40, 41, 42, 43, 44].map((seed) => `seed ${seed}`),
    );
    expect(reply.choices.map((choice) => choice.index)).toEqual([0, 1, 2, 3, 4]);
    expect(reply.usage?.prompt_tokens).toBe(models.engine.requests[0]?.tokens.length ?? -1);
    expect(reply.usage?.completion_tokens).toBe(5 * 8);
  });

  test("128 streamed answers each end with a finish reason", async () => {
    const { client } = setup(sayScript("abc"));
    const stream = await client.chat.completions.create({ model: MODEL, messages, n: 128, stream: true });
    const texts = Array.from({ length: 128 }, () => "");
    const reasons: (string | null)[] = [];
    for await (const chunk of stream) {
      for (const { index, delta, finish_reason } of chunk.choices) {
        texts[index] += delta.content ?? "";
        if (finish_reason !== null) reasons.push(finish_reason);
      }
    }
    expect(texts.every((text) => text === "abc")).toBe(true);
    expect(reasons).toEqual(Array.from({ length: 128 }, () => "stop"));
  });

  test("a stop string ends the text, cancels the engine and is not in the reply", async () => {
    const forever = function* () {
      for (let index = 0; ; index += 1) yield* bytesOf(`line ${index}\n`);
    };
    const { client, models } = setup({ answer: forever });
    const reply = await client.chat.completions.create({ model: MODEL, messages, stop: ["2\nli", "never"] });
    expect(reply.choices[0]?.message.content).toBe("line 0\nline 1\nline ");
    expect(reply.choices[0]?.finish_reason).toBe("stop");
    expect(reply.usage?.completion_tokens).toBe("line 0\nline 1\nline 2\nli".length);
    expect(models.engine.cancelled).toEqual(models.engine.requests.map((request) => request.id));
    await until(() => models.engine.running === 0, "the engine ends the request");
  });

  test("max_completion_tokens ends with length", async () => {
    const { client } = setup(sayScript("abcdef"));
    const reply = await client.chat.completions.create({ model: MODEL, messages, max_completion_tokens: 3 });
    expect(reply.choices[0]?.message.content).toBe("abc");
    expect(reply.choices[0]?.finish_reason).toBe("length");
  });

  test("log-probabilities carry bytes, also for parts of a character", async () => {
    const { client } = setup(sayScript("aé"));
    const reply = await client.chat.completions.create({
      model: MODEL,
      messages,
      logprobs: true,
      top_logprobs: 2,
    });
    const content = reply.choices[0]?.logprobs?.content ?? [];
    expect(content.map((token) => token.token)).toEqual(["a", "bytes:\\xc3", "bytes:\\xa9"]);
    expect(content.map((token) => token.bytes)).toEqual([[0x61], [0xc3], [0xa9]]);
    expect(content[0]?.logprob).toBe(scriptedLogprob(0x61));
    expect(content[0]?.top_logprobs.map((top) => top.token)).toEqual(["a", "`"]);
    expect(reply.choices[0]?.logprobs?.refusal).toBeNull();
  });

  test("streamed log-probabilities are those of the whole reply, cut at a stop string", async () => {
    const { client } = setup(sayScript("one two three"));
    const parameters = { model: MODEL, messages, logprobs: true, top_logprobs: 1, stop: " three" };
    const whole = await client.chat.completions.create(parameters);
    const stream = await client.chat.completions.create({ ...parameters, stream: true });
    const tokens = [];
    for await (const chunk of stream) tokens.push(...(chunk.choices[0]?.logprobs?.content ?? []));
    expect(tokens.map((token) => token.token).join("")).toBe("one two");
    expect(tokens).toEqual(whole.choices[0]?.logprobs?.content ?? []);
  });
});

describe("completions", () => {
  test("a raw prompt is encoded with the begin token and answered", async () => {
    const { client, models } = setup(sayScript(" world"));
    const reply = await client.completions.create({ model: MODEL, prompt: "hello<|end|>" });
    expect(reply.object).toBe("text_completion");
    expect(reply.choices[0]?.text).toBe(" world");
    expect(reply.choices[0]?.logprobs).toBeNull();
    expect(models.engine.requests[0]?.tokens).toEqual([256, ...bytesOf("hello"), END]);
    expect(models.engine.requests[0]?.max_tokens).toBe(16);
  });

  test("several prompts with n give choices in prompt order", async () => {
    const { client } = setup({
      answer: (request) => [
        ...bytesOf(`${String.fromCharCode(request.tokens.at(-1) ?? 0)}${request.sampling.seed}`),
        END,
      ],
    });
    const reply = await client.completions.create({ model: MODEL, prompt: ["A", "B"], n: 2, seed: 7 });
    expect(reply.choices.map((choice) => choice.text)).toEqual(["A7", "A8", "B7", "B8"]);
    const ids = await client.completions.create({ model: MODEL, prompt: [[67], [68]], seed: 1 });
    expect(ids.choices.map((choice) => choice.text)).toEqual(["C1", "D1"]);
    const stream = await client.completions.create({
      model: MODEL,
      prompt: ["A", "B"],
      seed: 7,
      stream: true,
    });
    const texts = ["", ""];
    for await (const chunk of stream) for (const { index, text } of chunk.choices) texts[index] += text;
    expect(texts).toEqual(["A7", "B7"]);
  });

  test("log-probabilities come as parallel arrays with text offsets", async () => {
    const { client } = setup(sayScript("xyz"));
    const reply = await client.completions.create({ model: MODEL, prompt: "p", logprobs: 2 });
    const logprobs = reply.choices[0]?.logprobs;
    expect(logprobs?.tokens).toEqual(["x", "y", "z"]);
    expect(logprobs?.text_offset).toEqual([0, 1, 2]);
    expect(logprobs?.token_logprobs).toEqual(bytesOf("xyz").map(scriptedLogprob));
    expect(Object.keys(logprobs?.top_logprobs?.[0] ?? {})).toEqual(["x", "w"]);
  });

  test("echo puts the prompt first and scores it", async () => {
    const { client } = setup(sayScript("!"));
    const reply = await client.completions.create({ model: MODEL, prompt: "ab", echo: true, logprobs: 1 });
    expect(reply.choices[0]?.text).toBe("ab!");
    const logprobs = reply.choices[0]?.logprobs;
    expect(logprobs?.tokens).toEqual(["<|begin|>", "a", "b", "!"]);
    expect(logprobs?.text_offset).toEqual([0, 0, 1, 2]);
    expect(logprobs?.token_logprobs?.[0]).toBeNull();
    expect(logprobs?.token_logprobs?.slice(1)).toEqual(bytesOf("ab!").map(scriptedLogprob));
  });

  test("echo with max_tokens 0 only scores", async () => {
    const { client, models } = setup(sayScript("never shown"));
    const scored = await client.completions.create({
      model: MODEL,
      prompt: [97, 98],
      echo: true,
      max_tokens: 0,
      logprobs: 1,
    });
    expect(scored.choices[0]?.text).toBe("ab");
    expect(scored.choices[0]?.logprobs?.tokens).toEqual(["a", "b"]);
    expect(scored.choices[0]?.finish_reason).toBe("length");
    expect(scored.usage?.completion_tokens).toBe(0);
    const plain = await client.completions.create({ model: MODEL, prompt: "ab", echo: true, max_tokens: 0 });
    expect(plain.choices[0]?.text).toBe("ab");
    expect(models.engine.requests).toHaveLength(1);
  });
});

describe("models", () => {
  test("are listed and retrieved, with a slash in the name", async () => {
    const { client } = setup(sayScript(""));
    const list = await client.models.list();
    expect(list.data.map((model) => model.id)).toEqual([MODEL]);
    const model = await client.models.retrieve(MODEL);
    expect(model).toMatchObject({ id: MODEL, object: "model", created: 1_700_000_000, owned_by: "test" });
    expect(await caught(client.models.retrieve("absent"))).toBeInstanceOf(OpenAI.NotFoundError);
  });
});

describe("errors", () => {
  test("have the client's classes, a code, a param and the request id", async () => {
    const { client } = setup(sayScript("x"));
    const unknown = await caught(client.chat.completions.create({ model: "absent", messages }));
    expect(unknown).toBeInstanceOf(OpenAI.NotFoundError);
    expect(unknown).toMatchObject({ code: "model_not_found", param: "model", status: 404 });
    expect((unknown as InstanceType<typeof OpenAI.APIError>).requestID).toStartWith("req_");
    const long = await caught(client.chat.completions.create({ model: MODEL, messages, max_tokens: 5000 }));
    expect(long).toBeInstanceOf(OpenAI.BadRequestError);
    expect(long).toMatchObject({ code: "context_length_exceeded" });
  });

  test("a wrong key is an AuthenticationError", async () => {
    const { server } = setup(sayScript("x"), { apiKeys: ["right"] });
    const wrong = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "wrong", maxRetries: 0 });
    expect(await caught(wrong.models.list())).toBeInstanceOf(OpenAI.AuthenticationError);
    const right = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "right", maxRetries: 0 });
    expect((await right.models.list()).data).toHaveLength(1);
  });

  test("in the middle of a stream become an APIError after the text so far, without a finish reason", async () => {
    const { client } = setup({
      ...sayScript("partial text"),
      failAfter: () => ({ tokens: 7, error: { code: "engine_failed", message: "The runner died." } }),
    });
    const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
    let text = "";
    const reasons: unknown[] = [];
    const error = await caught(
      (async () => {
        for await (const chunk of stream) {
          text += chunk.choices[0]?.delta.content ?? "";
          reasons.push(chunk.choices[0]?.finish_reason);
        }
      })(),
    );
    expect(text).toBe("partial");
    expect(reasons.every((reason) => reason === null)).toBe(true);
    expect(error).toBeInstanceOf(OpenAI.APIError);
    expect(error).toMatchObject({ code: "engine_failed", type: "server_error" });
    expect((error as Error).message).toContain("The runner died.");
  });

  test("of one of several answers cancel the others", async () => {
    const hold = new Promise<void>(() => undefined);
    const { client, models } = setup({
      ...sayScript("abcdefgh"),
      gate: (position, request) => (request.sampling.seed !== 1 && position === 2 ? hold : undefined),
      failAfter: (request) =>
        request.sampling.seed === 1
          ? { tokens: 3, error: { code: "out_of_memory", message: "No pages." } }
          : undefined,
    });
    const error = await caught(client.chat.completions.create({ model: MODEL, messages, n: 3, seed: 0 }));
    expect(error).toMatchObject({ status: 503, code: "out_of_memory" });
    await until(() => models.engine.running === 0, "all sequences end");
    expect(models.engine.cancelled.length).toBeGreaterThanOrEqual(2);
  });

  test("queue_full from the engine is a RateLimitError even for a stream", async () => {
    const { client } = setup({
      answer: () => [],
      failAfter: () => ({
        tokens: 0,
        error: { code: "queue_full", message: "The queue is full.", retry_after_seconds: 3 },
      }),
    });
    const error = await caught(client.chat.completions.create({ model: MODEL, messages, stream: true }));
    expect(error).toBeInstanceOf(OpenAI.RateLimitError);
    expect((error as InstanceType<typeof OpenAI.APIError>).headers?.get("retry-after")).toBe("3");
  });

  test("429 and 503 are retried by the client as Retry-After says", async () => {
    const { client, models } = setup(sayScript("after two retries"));
    models.failures.push(
      new CaravanError("queue_full", "The queue is full.", { retryAfterSeconds: 1 }),
      new CaravanError("model_loading", "The model is loading: 50 % done.", { retryAfterSeconds: 1 }),
    );
    const started = performance.now();
    const reply = await client.chat.completions.create({ model: MODEL, messages }, { maxRetries: 2 });
    expect(reply.choices[0]?.message.content).toBe("after two retries");
    expect(performance.now() - started).toBeGreaterThan(1900);
  });
});

describe("a client that leaves", () => {
  const hold = new Promise<void>(() => undefined);

  test("in the middle of a stream cancels the engine's request", async () => {
    const { client, models } = setup({
      ...sayScript("abcdef"),
      gate: (position) => (position === 3 ? hold : undefined),
    });
    const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
    let text = "";
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      if (text === "abc") break;
    }
    await until(() => models.engine.cancelled.length > 0, "the engine is told");
    expect(models.engine.cancelled[0]).toBe(models.engine.requests[0]?.id ?? "");
    await until(() => models.engine.running === 0, "the engine ends the request");
  });

  test("while a whole reply is made cancels every sequence", async () => {
    const { client, models } = setup({ ...sayScript("abc"), gate: () => hold });
    const abort = new AbortController();
    const reply = caught(
      client.chat.completions.create({ model: MODEL, messages, n: 3 }, { signal: abort.signal }),
    );
    await until(() => models.engine.running === 3, "the engine runs");
    abort.abort();
    expect(await reply).toBeInstanceOf(OpenAI.APIUserAbortError);
    await until(() => models.engine.running === 0, "the engine ends the requests");
    expect(new Set(models.engine.cancelled).size).toBe(3);
  });

  test("before the first token of a stream cancels it too", async () => {
    const { client, models } = setup({ ...sayScript("abc"), gate: () => hold });
    const abort = new AbortController();
    const reply = caught(
      client.chat.completions.create({ model: MODEL, messages, stream: true }, { signal: abort.signal }),
    );
    await until(() => models.engine.running === 1, "the engine runs");
    abort.abort();
    await reply;
    await until(() => models.engine.running === 0, "the engine ends the request");
  });
});
