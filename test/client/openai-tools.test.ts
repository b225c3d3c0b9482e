// Tool calls as the `openai` client sees them, over a real loopback socket.

import { afterEach, expect, test } from "bun:test";
import OpenAI from "openai";
import { bytesOf, byteText, END } from "../tools/byte-text.ts";
import { type LoopbackApi, loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";

const running: LoopbackApi[] = [];

function setup(script: Parameters<typeof loopbackApi>[0]): OpenAI {
  const api = loopbackApi(script);
  running.push(api);
  return new OpenAI({ baseURL: `${api.server.url}/v1`, apiKey: "unused", maxRetries: 0 });
}

afterEach(async () => {
  for (const { server } of running.splice(0)) await server.drain();
});

const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Rome and Oslo?" }];
const tools: OpenAI.ChatCompletionTool[] = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const TWO = '[get_weather(city="Rome"), get_weather(city="Oslo")]';

test("a whole reply has parallel calls with ids, names and arguments", async () => {
  const reply = await setup(sayScript(TWO)).chat.completions.create({ model: MODEL, messages, tools });
  const [choice] = reply.choices;
  expect(choice?.finish_reason).toBe("tool_calls");
  expect(choice?.message.content).toBeNull();
  const calls = choice?.message.tool_calls ?? [];
  expect(calls.map((call) => call.type === "function" && JSON.parse(call.function.arguments))).toEqual([
    { city: "Rome" },
    { city: "Oslo" },
  ]);
  expect(new Set(calls.map((call) => call.id)).size).toBe(2);
});

test("a stream has a call's name once and its arguments in pieces", async () => {
  const stream = await setup(sayScript(TWO)).chat.completions.create({
    model: MODEL,
    messages,
    tools,
    stream: true,
  });
  const chunks = await Array.fromAsync(stream);
  const deltas = chunks.flatMap((chunk) => chunk.choices[0]?.delta.tool_calls ?? []);
  const second = deltas.filter((delta) => delta.index === 1);
  expect(second[0]).toMatchObject({
    index: 1,
    type: "function",
    function: { name: "get_weather", arguments: "" },
  });
  expect(second.slice(1).every((delta) => delta.id === undefined && !delta.function?.name)).toBe(true);
  expect(second.length).toBeGreaterThan(4);
  expect(second.map((delta) => delta.function?.arguments).join("")).toBe('{"city":"Oslo"}');
  expect(chunks.every((chunk) => !chunk.choices[0]?.delta.content)).toBe(true);
  expect(chunks.at(-1)?.choices[0]).toMatchObject({ delta: {}, finish_reason: "tool_calls" });
});

test("the stream helper assembles the same message", async () => {
  const final = await setup(sayScript(`<|python_start|>Both.<|python_end|>${TWO}`))
    .chat.completions.stream({ model: MODEL, messages, tools })
    .finalChatCompletion();
  expect(final.choices[0]?.message.content).toBe("Both.");
  expect(final.choices[0]?.message.tool_calls).toHaveLength(2);
  expect(final.choices[0]?.finish_reason).toBe("tool_calls");
});

test("an agent that calls tools until there is an answer ends", async () => {
  const client = setup({
    answer: ({ tokens }) => {
      const prompt = byteText.decode(tokens);
      if (prompt.includes("tool:7C")) return [...bytesOf("Rome 15C, Oslo 7C."), END];
      const city = prompt.includes("tool:15C") ? "Oslo" : "Rome";
      return [...bytesOf(`{"name": "get_weather", "parameters": {"city": "${city}"}}`), END];
    },
  });
  const asked: string[] = [];
  const runner = client.chat.completions.runTools(
    {
      model: MODEL,
      messages,
      tools: [
        {
          type: "function",
          function: {
            name: "get_weather",
            description: "Weather of a city",
            parameters: { type: "object", properties: { city: { type: "string" } } },
            parse: JSON.parse,
            function: ({ city }: { city: string }) => {
              asked.push(city);
              return city === "Rome" ? "15C" : "7C";
            },
          },
        },
      ],
    },
    { maxChatCompletions: 5 },
  );
  expect(await runner.finalContent()).toBe("Rome 15C, Oslo 7C.");
  expect(asked).toEqual(["Rome", "Oslo"]);
});
