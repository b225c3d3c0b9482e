// Anthropic's API as their own client sees it, over a real loopback socket.

import { afterEach, expect, test } from "bun:test";
import Anthropic from "@anthropic-ai/sdk";
import { bytesOf, byteText, END } from "../tools/byte-text.ts";
import { type LoopbackApi, loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const running: LoopbackApi[] = [];

function setup(...[script, settings]: Parameters<typeof loopbackApi>): {
  client: Anthropic;
  api: LoopbackApi;
} {
  const api = loopbackApi(script, settings);
  running.push(api);
  const apiKey = settings?.apiKeys?.[0] ?? "unused";
  return { api, client: new Anthropic({ baseURL: api.server.url, apiKey, maxRetries: 0 }) };
}

afterEach(async () => {
  for (const { server } of running.splice(0)) await server.drain();
});

const messages: Anthropic.MessageParam[] = [{ role: "user", content: "Rome and Oslo?" }];
const base = { model: MODEL, max_tokens: 500, messages };
const tools: Anthropic.Tool[] = [
  { name: "get_weather", input_schema: { type: "object", properties: { city: { type: "string" } } } },
];
const TWO = 'Both: <|python_start|>[get_weather(city="Rome"), get_weather(city="Oslo")]<|python_end|>';

async function refusal(promise: Promise<unknown>): Promise<InstanceType<typeof Anthropic.APIError>> {
  try {
    await promise;
  } catch (thrown) {
    if (thrown instanceof Anthropic.APIError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was refused");
}

test("a whole message has text, usage and the reason why it ended", async () => {
  const { client, api } = setup({ ...sayScript("Hello ✓"), cachedTokens: 5 });
  const system: Anthropic.TextBlockParam[] = [
    { type: "text", text: "Be brief.", cache_control: { type: "ephemeral" } },
  ];
  // The client's types no longer have them for their own models.
  const sampling = { temperature: 0.5, top_k: 7 };
  const message = await client.messages.create({ ...base, system, ...sampling });
  expect(message).toMatchObject({
    type: "message",
    role: "assistant",
    model: MODEL,
    stop_reason: "end_turn",
  });
  expect(message.content).toEqual([{ type: "text", text: "Hello ✓", citations: null }]);
  const [request] = api.models.engine.requests;
  expect(request?.sampling).toMatchObject(sampling);
  expect(byteText.decode(request?.tokens ?? [])).toContain("system:Be brief.");
  const { usage } = message;
  expect(usage.cache_read_input_tokens).toBe(5);
  expect(usage.input_tokens + 5).toBe(request?.tokens.length ?? 0);
  expect(usage.output_tokens).toBe(bytesOf("Hello ✓").length + 1);
});

test("a stream has the same message, and says so when a stop sequence or max_tokens ended it", async () => {
  const { client } = setup({ ...sayScript("one two three"), progressSteps: 2 });
  const stopped = await client.messages.stream({ ...base, stop_sequences: [" three"] }).finalMessage();
  expect(stopped.content).toMatchObject([{ type: "text", text: "one two" }]);
  expect(stopped).toMatchObject({ stop_reason: "stop_sequence", stop_sequence: " three" });
  const cut = await client.messages.stream({ ...base, max_tokens: 3 }).finalMessage();
  expect(cut).toMatchObject({
    stop_reason: "max_tokens",
    content: [{ text: "one" }],
    usage: { output_tokens: 3 },
  });
});

test("the events of a stream come in Anthropic's order", async () => {
  const { client } = setup(sayScript("Hi[]"));
  const stream = await client.messages.create({ ...base, stream: true });
  const types = (await Array.fromAsync(stream)).map((event) => event.type);
  expect([...new Set(types)]).toEqual([
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
  ]);
});

test("tool calls are blocks of their own, whole and streamed", async () => {
  const { client } = setup(sayScript(TWO));
  const expected = [
    { type: "text", text: "Both: " },
    { type: "tool_use", name: "get_weather", input: { city: "Rome" } },
    { type: "tool_use", name: "get_weather", input: { city: "Oslo" } },
  ];
  const whole = await client.messages.create({ ...base, tools });
  expect(whole.content).toMatchObject(expected);
  expect(whole.stop_reason).toBe("tool_use");
  const streamed = await client.messages.stream({ ...base, tools }).finalMessage();
  expect(streamed.content).toMatchObject(expected);
  expect(streamed.stop_reason).toBe("tool_use");
  const single = { type: "auto" as const, disable_parallel_tool_use: true };
  expect((await client.messages.create({ ...base, tools, tool_choice: single })).content).toHaveLength(2);
});

test("an agent that calls tools until there is an answer ends", async () => {
  const { client } = setup({
    answer: ({ tokens }) => {
      const prompt = byteText.decode(tokens);
      if (prompt.includes("tool:Error: no such city")) return [...bytesOf("I cannot say."), END];
      return [...bytesOf('<function=get_weather>{"city": "Atlantis"}</function>'), END];
    },
  });
  const history = [...messages];
  for (let turn = 0; turn < 4; turn++) {
    const reply = await client.messages.create({ ...base, messages: history, tools });
    history.push({ role: "assistant", content: reply.content });
    if (reply.stop_reason !== "tool_use") break;
    const results = reply.content.flatMap((block): Anthropic.ToolResultBlockParam[] =>
      block.type === "tool_use"
        ? [{ type: "tool_result", tool_use_id: block.id, content: "no such city", is_error: true }]
        : [],
    );
    history.push({ role: "user", content: results });
  }
  expect(history.at(-1)?.content).toMatchObject([{ type: "text", text: "I cannot say." }]);
  expect(history).toHaveLength(4);
});

test("count_tokens counts what a message would be charged for", async () => {
  const { client, api } = setup(sayScript("x"));
  const { input_tokens } = await client.messages.countTokens({ model: MODEL, messages, tools, system: "S" });
  await client.messages.create({ ...base, tools, system: "S" });
  expect(input_tokens).toBe(api.models.engine.requests[0]?.tokens.length ?? 0);
});

test("errors have Anthropic's form, the request's id and the parameter's name", async () => {
  const { client } = setup(sayScript("x"), { apiKeys: ["right"] });
  const cases: [changes: object, status: number, type: string, words: string][] = [
    [{ model: "none" }, 404, "not_found_error", "none"],
    [{ thinking: { type: "enabled", budget_tokens: 2000 } }, 400, "invalid_request_error", "thinking"],
    [{ tool_choice: { type: "any" } }, 400, "invalid_request_error", "tool_choice"],
    [{ no_such: 1 }, 400, "invalid_request_error", "no_such"],
    [{ max_tokens: 5000 }, 400, "invalid_request_error", "context"],
    [
      { messages: [...messages, { role: "assistant", content: "I" }] },
      400,
      "invalid_request_error",
      "messages[1].role",
    ],
    [
      {
        messages: [{ role: "user", content: [{ type: "image", source: { type: "url", url: "http://x" } }] }],
      },
      400,
      "invalid_request_error",
      "messages[0].content[0].type",
    ],
    [
      { messages: [{ role: "user", content: [{ type: "tool_result", tool_use_id: "q", content: "1" }] }] },
      400,
      "invalid_request_error",
      "tool_use_id",
    ],
  ];
  for (const [changes, status, type, words] of cases) {
    const error = await refusal(client.messages.create({ ...base, ...changes }));
    expect([error.status, error.type as string]).toEqual([status, type]);
    expect(error.message).toContain(words);
    expect(error.requestID).toStartWith("req_");
  }
  const stranger = client.withOptions({ apiKey: "wrong" });
  expect(await refusal(stranger.messages.create(base))).toBeInstanceOf(Anthropic.AuthenticationError);
});

test("a stream that fails in the middle ends with an error event", async () => {
  const { client } = setup({
    ...sayScript("Hello"),
    failAfter: () => ({ tokens: 2, error: { code: "engine_failed", message: "The engine died." } }),
  });
  const error = await refusal(client.messages.stream(base).finalMessage());
  expect(error.message).toContain("The engine died.");
});

test("leaving a stream cancels the generation", async () => {
  const { client, api } = setup({ answer: () => Array.from({ length: 100_000 }, () => 65) });
  const stream = await client.messages.create({ ...base, stream: true });
  for await (const event of stream) if (event.type === "content_block_delta") break;
  await until(() => api.models.engine.running === 0, "the engine is idle");
});
