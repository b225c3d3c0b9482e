// /v1/responses as the `openai` client sees it, over a real loopback socket.

import { afterEach, expect, test } from "bun:test";
import OpenAI from "openai";
import { bytesOf, byteText, END } from "../tools/byte-text.ts";
import { type LoopbackApi, loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";

const running: LoopbackApi[] = [];

function setup(script: Parameters<typeof loopbackApi>[0]): { client: OpenAI; api: LoopbackApi } {
  const api = loopbackApi(script);
  running.push(api);
  return { api, client: new OpenAI({ baseURL: `${api.server.url}/v1`, apiKey: "unused", maxRetries: 0 }) };
}

afterEach(async () => {
  for (const { server } of running.splice(0)) await server.drain();
});

const base = { model: MODEL, input: "Rome and Oslo?" };
const tools: OpenAI.Responses.FunctionTool[] = [
  { type: "function", name: "get_weather", parameters: { type: "object" }, strict: false },
];

async function failure(action: () => PromiseLike<unknown>): Promise<InstanceType<typeof OpenAI.APIError>> {
  try {
    await action();
  } catch (thrown) {
    if (thrown instanceof OpenAI.APIError) return thrown;
    throw thrown;
  }
  throw new Error("nothing failed");
}

test("a whole reply has text, status and usage", async () => {
  const { client, api } = setup({ ...sayScript("Hello ✓"), cachedTokens: 4 });
  const reply = await client.responses.create({ ...base, instructions: "Be brief.", temperature: 0.5 });
  expect(reply).toMatchObject({ object: "response", status: "completed", model: MODEL, temperature: 0.5 });
  expect(reply.output_text).toBe("Hello ✓");
  expect(reply.usage).toMatchObject({ input_tokens_details: { cached_tokens: 4 } });
  const [request] = api.models.engine.requests;
  expect(byteText.decode(request?.tokens ?? [])).toContain("system:Be brief.");
  const cut = await client.responses.create({ ...base, max_output_tokens: 2 });
  expect(cut).toMatchObject({ status: "incomplete", incomplete_details: { reason: "max_output_tokens" } });
});

test("the events of a stream come in order, with numbers, and say the same", async () => {
  const { client } = setup({ ...sayScript("Hello ✓"), progressSteps: 2 });
  const events = await Array.fromAsync(await client.responses.create({ ...base, stream: true }));
  expect([...new Set(events.map((event) => event.type as string))]).toEqual([
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
  ]);
  expect(events.map((event) => event.sequence_number)).toEqual(events.map((_, index) => index));
  const final = await client.responses.stream(base).finalResponse();
  expect(final.output_text).toBe("Hello ✓");
});

test("function calls are items of their own, whole and streamed", async () => {
  const { client } = setup(sayScript('[get_weather(city="Rome"), get_weather(city="Oslo")]'));
  const expected = ["Rome", "Oslo"].map((city) => ({
    type: "function_call",
    name: "get_weather",
    arguments: JSON.stringify({ city }),
    status: "completed",
  }));
  expect((await client.responses.create({ ...base, tools })).output).toMatchObject(expected);
  expect((await client.responses.stream({ ...base, tools }).finalResponse()).output).toMatchObject(expected);
});

test("an agent that calls tools until there is an answer ends", async () => {
  const { client } = setup({
    answer: ({ tokens }) => {
      if (byteText.decode(tokens).includes("tool:15C")) return [...bytesOf("15 degrees."), END];
      return [...bytesOf('{"name": "get_weather", "parameters": {"city": "Rome"}}'), END];
    },
  });
  const input: OpenAI.Responses.ResponseInputItem[] = [{ role: "user", content: "Rome?" }];
  let text = "";
  for (let turn = 0; turn < 4 && text === ""; turn++) {
    const reply = await client.responses.create({ model: MODEL, input, tools });
    text = reply.output_text;
    for (const item of reply.output) {
      if (item.type !== "function_call") continue;
      input.push(item, { type: "function_call_output", call_id: item.call_id, output: "15C" });
    }
  }
  expect(text).toBe("15 degrees.");
  expect(input).toHaveLength(3);
});

test("what refers to an earlier reply, and what is not built, is refused by name", async () => {
  const { client } = setup(sayScript("x"));
  const refused: [changes: object, param: string][] = [
    [{ previous_response_id: "resp_1" }, "previous_response_id"],
    [{ store: true }, "store"],
    [{ tools: [{ type: "web_search" }] }, "tools[0].type"],
    [{ text: { verbosity: "high" } }, "text.verbosity"],
    [{ input: [{ type: "item_reference", id: "x" }] }, "input[0].type"],
    [{ input: [{ role: "user", content: [{ type: "input_image" }] }] }, "input[0].content[0].type"],
    [{ no_such: 1 }, "no_such"],
  ];
  for (const [changes, param] of refused) {
    const error = await failure(() => client.responses.create({ ...base, ...changes }));
    expect([error.status, error.code, error.param]).toEqual([400, "unsupported_parameter", param]);
  }
  const orphan = [{ type: "function_call_output" as const, call_id: "x", output: "y" }];
  const error = await failure(() => client.responses.create({ ...base, input: orphan }));
  expect(error.param).toBe("input[0].call_id");
});

test("a stream that fails in the middle throws", async () => {
  const { client } = setup({
    ...sayScript("Hello"),
    failAfter: () => ({ tokens: 2, error: { code: "engine_failed", message: "The engine died." } }),
  });
  const error = await failure(async () =>
    Array.fromAsync(await client.responses.create({ ...base, stream: true })),
  );
  expect(error.message).toContain("The engine died.");
});
