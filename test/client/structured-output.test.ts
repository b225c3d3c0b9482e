// Answers that follow a form, as real clients ask for them: the built executable with SmolLM2, whose own words would
// be anything but JSON at temperature 2.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import Anthropic from "@anthropic-ai/sdk";
import { ChatOpenAI } from "@langchain/openai";
import { generateObject, jsonSchema } from "ai";
import Ajv2020 from "ajv/dist/2020";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { built, type Node, Place, SMOLLM2, smollm2Here } from "../tools/built-caravan.ts";

const here = built && smollm2Here();
const MODEL = "smol-tools";
const TOOLS_PLACE =
  "{% if tools %}<|im_start|>system\nCall one of these functions:\n{{ tools | tojson }}<|im_end|>\n{% endif %}";
const person = {
  type: "object",
  properties: {
    name: { type: "string", minLength: 1, maxLength: 12 },
    age: { type: "integer", minimum: 0, maximum: 150 },
    mood: { enum: ["glad", "sad"] },
  },
  required: ["name", "age", "mood"],
  additionalProperties: false,
};
const ajv = new Ajv2020({ strict: false });
const isPerson = ajv.compile(person);
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Who are you?" }];
const weather: OpenAI.ChatCompletionFunctionTool = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 10 } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const stop: OpenAI.ChatCompletionFunctionTool = {
  type: "function",
  function: { name: "stop", parameters: { type: "object", properties: {} } },
};
/** As wild as the API allows. */
const base = { model: MODEL, messages, temperature: 2, max_completion_tokens: 200 };

const place = new Place();
let node: Node;
let openai: OpenAI;

describe.skipIf(!here)("answers that follow a form", () => {
  beforeAll(async () => {
    const folder = join(place.models, MODEL);
    mkdirSync(folder);
    for (const file of readdirSync(SMOLLM2))
      if (file !== "tokenizer_config.json") symlinkSync(join(SMOLLM2, file), join(folder, file));
    // SmolLM2's own template has no place for tools.
    const config = JSON.parse(readFileSync(join(SMOLLM2, "tokenizer_config.json"), "utf8")) as {
      chat_template: string;
    };
    config.chat_template = TOOLS_PLACE + config.chat_template;
    writeFileSync(join(folder, "tokenizer_config.json"), JSON.stringify(config));
    expect(existsSync(join(folder, "config.json"))).toBe(true);
    node = await place.serve([MODEL]);
    openai = new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "unused", maxRetries: 5 });
    await openai.chat.completions.create({ ...base, max_completion_tokens: 1 });
  }, 120_000);
  afterAll(() => place.remove());

  test("openai: response_format json_schema, streamed and whole, several at once", async () => {
    const format = {
      type: "json_schema" as const,
      json_schema: { name: "person", strict: true, schema: person },
    };
    const replies = await Promise.all(
      [1, 2, 3, 4].map((seed) =>
        openai.chat.completions.create({ ...base, seed, response_format: format, n: 2 }),
      ),
    );
    const choices = replies.flatMap((reply) => reply.choices);
    expect(choices).toHaveLength(8);
    for (const { message, finish_reason } of choices) {
      expect(finish_reason).toBe("stop");
      expect([message.content, isPerson(JSON.parse(message.content ?? ""))]).toEqual([message.content, true]);
    }
    const stream = openai.chat.completions.stream({ ...base, response_format: format });
    const streamed = await stream.finalChatCompletion();
    expect(isPerson(JSON.parse(streamed.choices[0]?.message.content ?? ""))).toBe(true);
  }, 120_000);

  test("openai: any JSON object, raw completions, responses", async () => {
    const object = await openai.chat.completions.create({
      ...base,
      temperature: 0,
      response_format: { type: "json_object" },
    });
    expect(object.choices[0]?.message.content).toStartWith("{");
    if (object.choices[0]?.finish_reason === "stop")
      expect(JSON.parse(object.choices[0]?.message.content ?? "")).toBeObject();
    const format = { type: "json_schema", json_schema: { name: "p", schema: person } };
    const completion = await openai.completions.create({
      model: MODEL,
      prompt: "A person:",
      temperature: 2,
      max_tokens: 200,
      response_format: format,
    } as OpenAI.CompletionCreateParamsNonStreaming);
    expect(isPerson(JSON.parse(completion.choices[0]?.text ?? ""))).toBe(true);
    const response = await openai.responses.create({
      model: MODEL,
      input: "Who are you?",
      temperature: 2,
      text: { format: { type: "json_schema", name: "person", schema: person, strict: true } },
    });
    expect(isPerson(JSON.parse(response.output_text))).toBe(true);
  }, 120_000);

  test("what cannot be enforced is 400 with the keyword and its place, streamed or not", async () => {
    const schema = { type: "object", properties: { a: { $dynamicRef: "#a" } } };
    const format = { type: "json_schema" as const, json_schema: { name: "x", schema } };
    for (const stream of [false, true]) {
      const failed = openai.chat.completions.create({ ...base, stream, response_format: format });
      const error = await failed.then(
        () => undefined,
        (thrown: unknown) => thrown,
      );
      expect(error).toBeInstanceOf(OpenAI.BadRequestError);
      expect(error).toMatchObject({
        status: 400,
        code: "unsupported_parameter",
        param: "response_format.json_schema.schema",
        message: expect.stringMatching(/#\/properties\/a\/\$dynamicRef: \$dynamicRef can be enforced where/),
      });
    }
  }, 120_000);

  test("openai: tool_choice required and named give calls whose arguments satisfy their schema", async () => {
    const tools = [weather, stop];
    for (const tool_choice of [
      "required" as const,
      { type: "function" as const, function: { name: "get_weather" } },
    ]) {
      const reply = await openai.chat.completions.create({
        ...base,
        tools,
        tool_choice,
        parallel_tool_calls: false,
      });
      const [choice] = reply.choices;
      expect(choice?.finish_reason).toBe("tool_calls");
      expect(choice?.message.tool_calls).toHaveLength(1);
      const call = choice?.message.tool_calls?.[0];
      if (call?.type !== "function") throw new Error("no call of a function");
      const parameters = tools.find((tool) => tool.function.name === call.function.name)?.function.parameters;
      expect(ajv.validate(parameters ?? false, JSON.parse(call.function.arguments))).toBe(true);
      if (typeof tool_choice === "object") expect(call.function.name).toBe("get_weather");
    }
  }, 120_000);

  test("a form beside tools that may be called: the answer is the one or the other", async () => {
    const strict = { ...weather, function: { ...weather.function, strict: true } };
    const format = { type: "json_schema" as const, json_schema: { name: "person", schema: person } };
    const replies = await Promise.all(
      [1, 2, 3, 4, 5, 6].map((seed) =>
        openai.chat.completions.create({ ...base, seed, tools: [strict, stop], response_format: format }),
      ),
    );
    for (const { choices } of replies) {
      const [choice] = choices;
      const calls = choice?.message.tool_calls ?? [];
      if (choice?.finish_reason === "stop")
        expect(isPerson(JSON.parse(choice.message.content ?? ""))).toBe(true);
      else expect(["tool_calls", "length"]).toContain(choice?.finish_reason ?? "");
      expect(choice?.finish_reason === "tool_calls").toBe(
        calls.length > 0 && choice?.finish_reason !== "length",
      );
      for (const call of choice?.finish_reason === "tool_calls" ? calls : [])
        if (call.type === "function" && call.function.name === "get_weather")
          expect(
            ajv.validate(weather.function.parameters ?? false, JSON.parse(call.function.arguments)),
          ).toBe(true);
    }
    const must = await openai.chat.completions.create({
      ...{ ...base, tools: [strict], tool_choice: "required", response_format: format },
      parallel_tool_calls: false,
    });
    expect(must.choices[0]?.finish_reason).toBe("tool_calls");
    const ollama = new Ollama({ host: node.url });
    const chat = await ollama.chat({
      model: MODEL,
      messages: [{ role: "user", content: "Who are you?" }],
      tools: [
        { type: "function", function: { name: "stop", description: "", parameters: { type: "object" } } },
      ] as never,
      format: person,
      options: { temperature: 2, num_predict: 200 },
    });
    const { content, tool_calls: called = [] } = chat.message;
    expect(called.length > 0 || isPerson(JSON.parse(content))).toBe(true);
  }, 120_000);

  test("openai: an agent that must call tools comes to its end", async () => {
    const history = [...messages];
    let calls = 0;
    for (let turn = 0; turn < 4; turn++) {
      const tool_choice = turn < 2 ? ("required" as const) : ("none" as const);
      const reply = await openai.chat.completions.create({
        ...base,
        max_completion_tokens: 60,
        messages: history,
        tools: [weather],
        tool_choice,
        parallel_tool_calls: false,
      });
      const message = reply.choices[0]?.message;
      if (message === undefined) throw new Error("no message");
      history.push(message);
      if (message.tool_calls === undefined) break;
      calls += message.tool_calls.length;
      for (const { id } of message.tool_calls)
        history.push({ role: "tool", tool_call_id: id, content: "15C" });
    }
    expect(calls).toBe(2);
    expect(history.at(-1)).toMatchObject({ role: "assistant" });
    expect(history).toHaveLength(6);
  }, 120_000);

  test("a strict tool may be left alone or called in its form", async () => {
    const strict = { ...weather, function: { ...weather.function, strict: true } };
    const replies = await Promise.all(
      [1, 2, 3, 4, 5, 6].map((seed) =>
        openai.chat.completions.create({ ...base, max_completion_tokens: 60, seed, tools: [strict] }),
      ),
    );
    for (const { choices } of replies)
      for (const call of choices[0]?.message.tool_calls ?? [])
        if (call.type === "function" && choices[0]?.finish_reason === "tool_calls")
          expect(
            ajv.validate(weather.function.parameters ?? false, JSON.parse(call.function.arguments)),
          ).toBe(true);
    expect(replies).toHaveLength(6);
  }, 120_000);

  test("ai-sdk: generateObject", async () => {
    const provider = createOpenAICompatible({
      name: "caravan",
      baseURL: `${node.url}/v1`,
      supportsStructuredOutputs: true,
    });
    const { object } = await generateObject({
      model: provider(MODEL),
      schema: jsonSchema(person as never),
      prompt: "Who are you?",
      temperature: 2,
    });
    expect(isPerson(object)).toBe(true);
  }, 120_000);

  test("langchain: withStructuredOutput, by schema and by a function", async () => {
    const model = new ChatOpenAI({
      model: MODEL,
      apiKey: "unused",
      temperature: 2,
      maxTokens: 200,
      configuration: { baseURL: `${node.url}/v1` },
    });
    for (const method of ["jsonSchema", "functionCalling"] as const) {
      const answer = await model
        .withStructuredOutput({ title: "person", ...person }, { method, name: "person" })
        .invoke("Who are you?");
      expect(isPerson(answer)).toBe(true);
    }
  }, 120_000);

  test("ollama: format json and a schema", async () => {
    const ollama = new Ollama({ host: node.url });
    const options = { temperature: 2, num_predict: 200 };
    const chat = await ollama.chat({
      model: MODEL,
      messages: [{ role: "user", content: "Who are you?" }],
      format: person,
      options,
    });
    expect(isPerson(JSON.parse(chat.message.content))).toBe(true);
    const made = await ollama.generate({
      model: MODEL,
      prompt: "Some JSON:",
      format: "json",
      options: { temperature: 0, num_predict: 60 },
    });
    expect(made.response).toStartWith("{");
  }, 120_000);

  test("anthropic: tool_choice any and tool", async () => {
    const anthropic = new Anthropic({ baseURL: node.url, apiKey: "unused" });
    const tools: Anthropic.Tool[] = [
      { name: "get_weather", input_schema: weather.function.parameters as Anthropic.Tool.InputSchema },
    ];
    for (const tool_choice of [
      { type: "any" as const, disable_parallel_tool_use: true },
      { type: "tool" as const, name: "get_weather", disable_parallel_tool_use: true },
    ]) {
      const message = await anthropic.messages.create({
        model: MODEL,
        max_tokens: 200,
        messages: [{ role: "user", content: "Weather?" }],
        tools,
        tool_choice,
      });
      expect(message.stop_reason).toBe("tool_use");
      expect(message.content).toMatchObject([{ type: "tool_use", name: "get_weather" }]);
      const [block] = message.content;
      if (block?.type === "tool_use")
        expect(ajv.validate(weather.function.parameters ?? false, block.input)).toBe(true);
    }
  }, 120_000);
});
