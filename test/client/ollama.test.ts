// Ollama's API as their own client sees it, over a real loopback socket.

import { afterEach, expect, test } from "bun:test";
import { type Message, Ollama, type Tool } from "ollama";
import { VERSION } from "../../src/version.ts";
import { bytesOf, byteText, END } from "../tools/byte-text.ts";
import { type LoopbackApi, loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const running: LoopbackApi[] = [];

function setup(...[script, settings]: Parameters<typeof loopbackApi>): { client: Ollama; api: LoopbackApi } {
  const api = loopbackApi(script, settings);
  running.push(api);
  return { api, client: new Ollama({ host: api.server.url }) };
}

afterEach(async () => {
  for (const { server } of running.splice(0)) await server.drain();
});

const messages: Message[] = [{ role: "user", content: "Rome and Oslo?" }];
const tools: Tool[] = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } } },
    },
  },
];

test("a whole chat has text and statistics, and options reach the engine", async () => {
  const { client, api } = setup(sayScript("Hello ✓"));
  const options = {
    temperature: 0.5,
    top_k: 7,
    seed: 3,
    repeat_penalty: 1.5,
    num_predict: 50,
    num_ctx: 2048,
  };
  const reply = await client.chat({ model: `${MODEL}:latest`, messages, options, keep_alive: "5m" });
  expect(reply).toMatchObject({ model: MODEL, done: true, done_reason: "stop" });
  expect(reply.message).toEqual({ role: "assistant", content: "Hello ✓" });
  const [request] = api.models.engine.requests;
  expect(request?.max_tokens).toBe(50);
  expect(request?.sampling).toMatchObject({ temperature: 0.5, top_k: 7, seed: 3, repetition_penalty: 1.5 });
  expect(reply.prompt_eval_count).toBe(request?.tokens.length ?? 0);
  expect(reply.eval_count).toBe(bytesOf("Hello ✓").length + 1);
  expect(reply.eval_duration).toBe(reply.eval_count * 1e6);
});

test("a streamed chat says the same, also after silence", async () => {
  const silence = Promise.withResolvers<void>();
  const gate = (position: number) => (position === 2 ? silence.promise : undefined);
  const { client } = setup({ ...sayScript("Hello ✓"), gate }, { keepAliveMs: 20 });
  const stream = await client.chat({ model: MODEL, messages, stream: true, options: { stop: ["✓"] } });
  let text = "";
  let last: unknown;
  for await (const part of stream) {
    if (text === "") setTimeout(silence.resolve, 100);
    text += part.message.content;
    last = part;
  }
  expect(text).toBe("Hello ");
  expect(last).toMatchObject({ done: true, done_reason: "stop" });
});

test("generate applies the template, and a raw prompt is used as it is", async () => {
  const { client, api } = setup(sayScript("ok"));
  const reply = await client.generate({ model: MODEL, prompt: "Hi", system: "Be brief." });
  expect(reply).toMatchObject({ response: "ok", done: true });
  let text = "";
  for await (const part of await client.generate({ model: MODEL, prompt: "Hi", raw: true, stream: true }))
    text += part.response;
  expect(text).toBe("ok");
  const prompts = api.models.engine.requests.map(({ tokens }) => byteText.decode(tokens));
  expect(prompts).toEqual([
    "<|begin|><|header|>system:Be brief.<|end|><|header|>user:Hi<|end|><|header|>assistant:",
    "<|begin|>Hi",
  ]);
});

test("tool calls have their arguments as values, whole and streamed", async () => {
  const { client } = setup(sayScript('[get_weather(city="Rome"), get_weather(city="Oslo")]'));
  const expected = ["Rome", "Oslo"].map((city) => ({ name: "get_weather", arguments: { city } }));
  const whole = await client.chat({ model: MODEL, messages, tools });
  expect(whole.message.tool_calls?.map((call) => call.function)).toEqual(expected);
  const calls = [];
  for await (const part of await client.chat({ model: MODEL, messages, tools, stream: true }))
    calls.push(...(part.message.tool_calls ?? []));
  expect(calls.map((call) => call.function)).toEqual(expected);
});

test("an agent that calls tools until there is an answer ends", async () => {
  const { client } = setup({
    answer: ({ tokens }) => {
      if (byteText.decode(tokens).includes("tool:15C")) return [...bytesOf("15 degrees."), END];
      return [...bytesOf('{"name": "get_weather", "parameters": {"city": "Rome"}}'), END];
    },
  });
  const history = [...messages];
  for (let turn = 0; turn < 4; turn++) {
    const { message } = await client.chat({ model: MODEL, messages: history, tools });
    history.push(message);
    if (!message.tool_calls) break;
    for (const call of message.tool_calls)
      history.push({ role: "tool", content: "15C", tool_name: call.function.name });
  }
  expect(history).toHaveLength(4);
  expect(history.at(-1)?.content).toBe("15 degrees.");
});

test("models are listed and shown, and a request without a prompt loads one", async () => {
  const { client, api } = setup(sayScript("x"));
  expect((await client.list()).models.map((model) => model.name)).toEqual([MODEL]);
  expect((await client.ps()).models.map((model) => model.name)).toEqual([MODEL]);
  expect(await client.show({ model: MODEL })).toMatchObject({ capabilities: ["completion"] });
  expect(await client.version()).toEqual({ version: VERSION });
  expect(await client.generate({ model: MODEL, prompt: "" })).toMatchObject({ done_reason: "load" });
  expect(await client.chat({ model: MODEL })).toMatchObject({ done_reason: "load" });
  expect(api.models.engine.requests).toHaveLength(0);
});

test("what is wrong or not built is refused in Ollama's form", async () => {
  const { client } = setup(sayScript("x"));
  const refused: [request: object, words: string][] = [
    [{ model: "none" }, "none"],
    [{ format: "yaml" }, "format"],
    [{ think: true }, "think"],
    [{ options: { num_ctx: 1e6 } }, "options.num_ctx"],
    [{ options: { mirostat: 2 } }, "options.mirostat"],
    [{ messages: [{ role: "user", content: "x", images: ["aGk="] }] }, "messages[0].images"],
    [{ no_such: 1 }, "no_such"],
  ];
  for (const [changes, words] of refused)
    await expect(client.chat({ model: MODEL, messages, ...changes })).rejects.toThrow(words);
  await expect(client.show({ model: "none" })).rejects.toThrow("none");
});

test("a stream that fails in the middle throws, and leaving one cancels the generation", async () => {
  const failing = setup({
    ...sayScript("Hello"),
    failAfter: () => ({ tokens: 2, error: { code: "engine_failed", message: "The engine died." } }),
  });
  const broken = await failing.client.chat({ model: MODEL, messages, stream: true });
  await expect(Array.fromAsync(broken)).rejects.toThrow("The engine died.");
  const { client, api } = setup({ answer: () => Array.from({ length: 100_000 }, () => 65) });
  const stream = await client.chat({ model: MODEL, messages, stream: true });
  let parts = 0;
  try {
    for await (const _ of stream) if (++parts === 2) stream.abort();
  } catch (thrown) {
    expect((thrown as Error).name).toBe("AbortError");
  }
  await until(() => api.models.engine.running === 0, "the engine is idle");
});
