// The API as LangChain's OpenAI client sees it, over a real loopback socket.

import { afterEach, expect, test } from "bun:test";
import { type BaseMessage, HumanMessage, ToolMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";
import { bytesOf, byteText, END } from "../tools/byte-text.ts";
import { type LoopbackApi, loopbackApi } from "../tools/loopback-api.ts";
import { MODEL, sayScript } from "../tools/scripted-models.ts";

const running: LoopbackApi[] = [];

function setup(script: Parameters<typeof loopbackApi>[0]): ChatOpenAI {
  const api = loopbackApi(script);
  running.push(api);
  return new ChatOpenAI({
    model: MODEL,
    apiKey: "unused",
    maxRetries: 0,
    configuration: { baseURL: `${api.server.url}/v1` },
  });
}

afterEach(async () => {
  for (const { server } of running.splice(0)) await server.drain();
});

const tools = [
  {
    type: "function" as const,
    function: {
      name: "get_weather",
      description: "Weather of a city",
      parameters: { type: "object", properties: { city: { type: "string" } } },
    },
  },
];
const TWO = '[get_weather(city="Rome"), get_weather(city="Oslo")]';

test("text is generated and streamed", async () => {
  const chat = setup(sayScript("Hello ✓"));
  expect((await chat.invoke("Hi")).content).toBe("Hello ✓");
  let text = "";
  for await (const chunk of await chat.stream("Hi")) text += String(chunk.content);
  expect(text).toBe("Hello ✓");
});

test("tool calls are read, whole and streamed", async () => {
  const chat = setup(sayScript(TWO)).bindTools(tools);
  const expected = ["Rome", "Oslo"].map((city) => ({ name: "get_weather", args: { city } }));
  expect((await chat.invoke("Rome and Oslo?")).tool_calls).toMatchObject(expected);
  const chunks = await Array.fromAsync(await chat.stream("Rome and Oslo?"));
  const [first, ...rest] = chunks;
  const whole = rest.reduce((sum, chunk) => sum?.concat(chunk), first);
  expect(whole?.tool_calls).toMatchObject(expected);
});

test("an agent that calls tools until there is an answer ends", async () => {
  const chat = setup({
    answer: ({ tokens }) => {
      if (byteText.decode(tokens).includes("tool:15C")) return [...bytesOf("15 degrees."), END];
      return [...bytesOf('{"name": "get_weather", "parameters": {"city": "Rome"}}'), END];
    },
  }).bindTools(tools);
  const history: BaseMessage[] = [new HumanMessage("Rome?")];
  for (let turn = 0; turn < 4; turn++) {
    const reply = await chat.invoke(history);
    history.push(reply);
    if (!reply.tool_calls?.length) break;
    for (const { id = "", name } of reply.tool_calls)
      history.push(new ToolMessage({ content: "15C", tool_call_id: id, name }));
  }
  expect(history).toHaveLength(4);
  expect(history.at(-1)?.content).toBe("15 degrees.");
});
