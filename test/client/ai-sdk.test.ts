// The API as the AI SDK's OpenAI-compatible provider sees it, over a real loopback socket.

import { afterEach, expect, test } from "bun:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { bytesOf, byteText, END } from "../tools/byte-text.ts";
import { type LoopbackApi, loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";

const running: LoopbackApi[] = [];

function setup(script: Parameters<typeof loopbackApi>[0]) {
  const api = loopbackApi(script);
  running.push(api);
  const provider = createOpenAICompatible({ name: "caravan", baseURL: `${api.server.url}/v1` });
  return provider(MODEL);
}

afterEach(async () => {
  for (const { server } of running.splice(0)) await server.drain();
});

const agent = {
  answer: ({ tokens }: { tokens: number[] }) => {
    if (byteText.decode(tokens).includes("tool:15C")) return [...bytesOf("15 degrees."), END];
    return [...bytesOf('[get_weather(city="Rome")]'), END];
  },
};
const asked: string[] = [];
const tools = {
  get_weather: tool({
    description: "Weather of a city",
    inputSchema: jsonSchema<{ city: string }>({ type: "object", properties: { city: { type: "string" } } }),
    execute: async ({ city }) => {
      asked.push(city);
      return "15C";
    },
  }),
};

test("text is generated and streamed", async () => {
  const model = setup(sayScript("Hello ✓"));
  const whole = await generateText({ model, prompt: "Hi", temperature: 0.5 });
  expect(whole.text).toBe("Hello ✓");
  expect(whole.finishReason).toBe("stop");
  const stream = streamText({ model, prompt: "Hi" });
  expect((await Array.fromAsync(stream.textStream)).join("")).toBe("Hello ✓");
});

test("an agent that calls tools ends, whole and streamed", async () => {
  const model = setup(agent);
  const whole = await generateText({ model, prompt: "Rome?", tools, stopWhen: stepCountIs(5) });
  expect(whole.text).toBe("15 degrees.");
  expect(whole.steps).toHaveLength(2);
  const stream = streamText({ model, prompt: "Rome?", tools, stopWhen: stepCountIs(5) });
  expect(await stream.text).toBe("15 degrees.");
  expect(asked.splice(0)).toEqual(["Rome", "Rome"]);
});

test("what is refused throws with the parameter's name", async () => {
  const model = setup(sayScript("x"));
  const imagined = { type: "tool" as const, toolName: "none" as never };
  const forced = generateText({ model, prompt: "x", tools, toolChoice: imagined, maxRetries: 0 });
  await expect(forced).rejects.toThrow("tool_choice");
});
