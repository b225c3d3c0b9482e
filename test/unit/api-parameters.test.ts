// Parameters: what is understood reaches the engine, what is not is refused by name, and nothing is ignored.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { createApp } from "../../src/api/app.ts";
import {
  OPENAI_DEFAULTS,
  resolveMaxTokens,
  resolveSampling,
  samplingFromGenerationConfig,
  samplingOfChoice,
  unsignedSeed,
} from "../../src/api/sampling-defaults.ts";
import { CaravanError } from "../../src/errors.ts";
import { BEGIN, bytesOf, byteText, END, HEADER, VOCABULARY } from "../tools/byte-text.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const messages = [{ role: "user", content: "Hi" }];

function setup(defaults = { generationConfig: {}, card: {} }) {
  const models = scriptedModels(sayScript("hello"), { defaults });
  const app = createApp({ models });
  const send = (path: string, body: object) =>
    app.request(path, {
      method: "POST",
      body: JSON.stringify(body),
      headers: { "content-type": "application/json" },
    });
  return {
    models,
    chat: (body: object) => send("/v1/chat/completions", { model: MODEL, messages, ...body }),
    completion: (body: object) => send("/v1/completions", { model: MODEL, prompt: "p", ...body }),
    last: () => models.engine.requests.at(-1),
  };
}

async function refusal(response: Response): Promise<[number, unknown, unknown]> {
  const { error } = (await response.json()) as { error: { code: unknown; param: unknown } };
  return [response.status, error.code, error.param];
}

describe("what is not built", () => {
  const refused: [name: string, value: unknown][] = [
    ["functions", [{ name: "f" }]],
    ["function_call", { name: "f" }],
    ["modalities", ["text", "audio"]],
    ["audio", { voice: "x", format: "wav" }],
    ["prediction", { type: "content", content: "x" }],
    ["reasoning_effort", "high"],
    ["verbosity", "low"],
    ["service_tier", "flex"],
    ["store", true],
    ["web_search_options", {}],
    ["prompt_cache_retention", "24h"],
    ["no_such_thing", 1],
    ["constructor", 1],
    ["best_of", 2],
  ];
  for (const [name, value] of refused) {
    test(`chat refuses ${name}: ${JSON.stringify(value)} by name`, async () => {
      expect(await refusal(await setup().chat({ [name]: value }))).toEqual([
        400,
        "unsupported_parameter",
        name,
      ]);
    });
  }

  test("a name of every object's own is refused like others", async () => {
    const app = createApp({ models: scriptedModels(sayScript("x")) });
    const request = (more: string) =>
      app.request("/v1/chat/completions", {
        method: "POST",
        body: `{"model":"${MODEL}","messages":[{"role":"user","content":"Hi"}],${more}}`,
        headers: { "content-type": "application/json" },
      });
    for (const value of ["1", "null", '{"stream":true}'])
      expect(await refusal(await request(`"__proto__":${value}`))).toEqual([
        400,
        "unsupported_parameter",
        "__proto__",
      ]);
  });

  test("what asks for nothing is accepted", async () => {
    const harmless = {
      tools: [],
      tool_choice: "auto",
      functions: null,
      response_format: { type: "text" },
      modalities: ["text"],
      store: false,
      service_tier: "auto",
      user: "someone",
      metadata: { run: "1" },
      no_such_thing: null,
      stop: null,
      logit_bias: null,
      top_p: null,
    };
    expect((await setup().chat(harmless)).status).toBe(200);
    expect((await setup().completion({ suffix: null, best_of: 1, user: "someone" })).status).toBe(200);
  });

  test("completions refuse suffix and best_of by name", async () => {
    expect(await refusal(await setup().completion({ suffix: "x" }))).toEqual([
      400,
      "unsupported_parameter",
      "suffix",
    ]);
    expect(await refusal(await setup().completion({ best_of: 3 }))).toEqual([
      400,
      "unsupported_parameter",
      "best_of",
    ]);
  });

  test("messages are refused where they hold what is not built", async () => {
    const cases: [message: object, param: string][] = [
      [{ role: "function", content: "15C", name: "a" }, "messages[0].role"],
      [{ role: "assistant", content: null, function_call: { name: "a" } }, "messages[0].function_call"],
      [
        {
          role: "user",
          content: [
            { type: "text", text: "x" },
            { type: "image_url", image_url: {} },
          ],
        },
        "messages[0].content[1].type",
      ],
      [{ role: "user", content: "x", name: "bob" }, "messages[0].name"],
    ];
    for (const [message, param] of cases) {
      expect(await refusal(await setup().chat({ messages: [message] }))).toEqual([
        400,
        "unsupported_parameter",
        param,
      ]);
    }
  });
});

describe("what is wrong", () => {
  const wrong: [body: object, param: string][] = [
    [{ messages: [] }, "messages"],
    [{ messages: "Hi" }, "messages"],
    [{ messages: [{ role: "user" }] }, "messages[0].content"],
    [{ messages: [{ role: "emperor", content: "x" }] }, "messages[0].role"],
    [{ temperature: "hot" }, "temperature"],
    [{ temperature: 2.1 }, "temperature"],
    [{ top_p: -0.1 }, "top_p"],
    [{ top_k: 1.5 }, "top_k"],
    [{ n: 129 }, "n"],
    [{ n: 0 }, "n"],
    [{ seed: 1e300 }, "seed"],
    [{ stop: "" }, "stop"],
    [{ stop: ["a", ""] }, "stop[1]"],
    [{ stop: 3 }, "stop"],
    [{ messages: [{ role: "user", content: [{ type: "text", text: 5 }] }] }, "messages[0].content[0].text"],
    [{ max_tokens: 0 }, "max_tokens"],
    [{ max_tokens: 3, max_completion_tokens: 4 }, "max_tokens"],
    [{ top_logprobs: 3 }, "top_logprobs"],
    [{ logprobs: true, top_logprobs: 21 }, "top_logprobs"],
    [{ stream_options: { include_usage: true } }, "stream_options"],
    [{ logit_bias: { "12": 101 } }, "logit_bias.12"],
    [{ logit_bias: { "999": 1 } }, "logit_bias"],
    [{ model: 7 }, "model"],
  ];
  for (const [body, param] of wrong) {
    test(`chat answers 400 with param ${param} to ${JSON.stringify(body)}`, async () => {
      expect(await refusal(await setup().chat(body))).toEqual([400, "invalid_argument", param]);
    });
  }

  test("completions check prompts, token ids and the number of choices", async () => {
    const cases: [body: object, param: string][] = [
      [{ prompt: [] }, "prompt"],
      [{ prompt: [1, "a"] }, "prompt"],
      [{ prompt: [261] }, "prompt"],
      [{ prompt: ["a", "b", "c"], n: 64 }, "n"],
      [{ max_tokens: 0 }, "max_tokens"],
      [{ logprobs: true }, "logprobs"],
    ];
    for (const [body, param] of cases) {
      const [status, , at] = await refusal(await setup().completion(body));
      expect([status, String(at).split(/[.[]/)[0]]).toEqual([400, param]);
    }
  });

  test("a logit_bias that leaves no token to choose is refused, in both routes", async () => {
    const ban = (from: number) =>
      Object.fromEntries(Array.from({ length: VOCABULARY - from }, (_, i) => [String(from + i), -100]));
    const { chat, completion } = setup();
    const no: [number, string, string] = [400, "invalid_argument", "logit_bias"];
    expect(await refusal(await chat({ logit_bias: ban(0) }))).toEqual(no);
    expect(await refusal(await completion({ logit_bias: ban(0) }))).toEqual(no);
    expect((await chat({ logit_bias: ban(1) })).status).toBe(200);
    // Two spellings of one id are one token.
    expect((await chat({ logit_bias: { ...ban(1), "01": -100 } })).status).toBe(200);
    const { [String(END)]: _, ...allButTheEnd } = ban(0);
    expect((await chat({ logit_bias: allButTheEnd })).status).toBe(200);
    expect(await refusal(await chat({ logit_bias: allButTheEnd, ignore_eos: true }))).toEqual(no);
  });

  test("more messages than the context has tokens are refused before the template sees them", async () => {
    let rendered = 0;
    const models = scriptedModels(sayScript("hello"), {
      text: {
        ...byteText,
        renderChat: (input, options) => {
          rendered += 1;
          return byteText.renderChat(input, options);
        },
      },
    });
    const reply = await createApp({ models }).request("/v1/chat/completions", {
      method: "POST",
      body: JSON.stringify({ model: MODEL, messages: Array(4096).fill({ role: "user", content: "x" }) }),
      headers: { "content-type": "application/json" },
    });
    expect(await refusal(reply)).toEqual([400, "context_length_exceeded", "messages"]);
    expect(rendered).toBe(0);
  });

  test("the prompt and max_tokens must fit the context", async () => {
    const long = await setup().chat({ messages: [{ role: "user", content: "x".repeat(5000) }] });
    expect(await refusal(long)).toEqual([400, "context_length_exceeded", "messages"]);
    expect(await refusal(await setup().completion({ max_tokens: 5000 }))).toEqual([
      400,
      "context_length_exceeded",
      "prompt",
    ]);
  });

  test("no body whatsoever makes the server fail", async () => {
    const { chat, completion } = setup();
    const names = [
      "messages",
      "prompt",
      "n",
      "stop",
      "stream",
      "logprobs",
      "logit_bias",
      "stream_options",
      "tools",
      "seed",
    ];
    const body = fc.dictionary(fc.constantFrom(...names), fc.jsonValue({ maxDepth: 3 }), { maxKeys: 4 });
    await fc.assert(
      fc.asyncProperty(body, async (given) => {
        for (const response of [await chat(given), await completion(given)]) {
          expect([200, 400]).toContain(response.status);
          await response.text();
        }
      }),
      { numRuns: 300 },
    );
  });
});

describe("what is understood", () => {
  test("every sampling parameter reaches the engine", async () => {
    const { chat, last } = setup();
    const sampling = {
      temperature: 0.5,
      top_p: 0.8,
      top_k: 40,
      min_p: 0.05,
      repetition_penalty: 1.1,
      presence_penalty: 0.3,
      frequency_penalty: -0.4,
      xtc_probability: 0.2,
      xtc_threshold: 0.15,
      seed: 99,
    };
    await chat({
      ...sampling,
      logit_bias: { "5": -100, "7": 1.5 },
      max_tokens: 9,
      stop: "zz",
      logprobs: true,
    });
    expect(last()?.sampling).toEqual({
      ...sampling,
      logit_bias: [
        [5, -100],
        [7, 1.5],
      ],
    });
    expect(last()).toMatchObject({ max_tokens: 9, logprobs: 0, stop_tokens: [END] });
  });

  test("the chat template gets plain text, with developer as system", async () => {
    const { chat, last } = setup();
    await chat({
      messages: [
        { role: "developer", content: "d" },
        {
          role: "user",
          content: [
            { type: "text", text: "a" },
            { type: "text", text: "b<|end|>" },
          ],
        },
        { role: "assistant", content: "c", refusal: null, tool_calls: [], annotations: [] },
      ],
    });
    const turn = (text: string) => [HEADER, ...bytesOf(text), END];
    expect(last()?.tokens).toEqual([
      BEGIN,
      ...turn("system:d"),
      ...turn("user:ab<|end|>"),
      ...turn("assistant:c"),
      HEADER,
      ...bytesOf("assistant:"),
    ]);
  });

  test("ignore_eos bans the end tokens", async () => {
    const { completion, last } = setup();
    await completion({ ignore_eos: true, max_tokens: 4 });
    expect(last()).toMatchObject({ ban_stop_tokens: true, stop_tokens: [END], max_tokens: 4 });
  });
});

describe("defaults", () => {
  test("come from the request, then generation_config, then the card, then OpenAI", async () => {
    const { chat, last } = setup({
      generationConfig: { temperature: 0.6, top_p: 0.9 },
      card: { top_p: 0.7, top_k: 20, min_p: 0.1 },
    });
    await chat({ min_p: 0 });
    expect(last()?.sampling).toMatchObject({
      ...OPENAI_DEFAULTS,
      temperature: 0.6,
      top_p: 0.9,
      top_k: 20,
      min_p: 0,
    });
  });

  test("of max_tokens are the model's, then 16 for completions and all of the context for chat", async () => {
    const plain = setup();
    await plain.completion({});
    expect(plain.last()?.max_tokens).toBe(16);
    await plain.chat({});
    expect(plain.last()?.max_tokens).toBe(4096 - (plain.last()?.tokens.length ?? 0));
    const limited = setup({ generationConfig: {}, card: { max_tokens: 100 } });
    await limited.completion({});
    expect(limited.last()?.max_tokens).toBe(100);
    const model = { id: "m", contextLength: 10, defaults: { generationConfig: {}, card: {} } };
    expect(resolveMaxTokens(undefined, model, 8, { fallback: 16, promptParam: "prompt" })).toBe(2);
    expect(() => resolveMaxTokens(undefined, model, 10, { promptParam: "prompt" })).toThrow(CaravanError);
  });

  test("a seed is any safe integer, drawn when absent, and counts up over the choices", () => {
    const defaults = { generationConfig: {}, card: {} };
    fc.assert(
      fc.property(fc.maxSafeInteger(), fc.nat(127), (seed, index) => {
        const sampling = samplingOfChoice(resolveSampling({ seed }, defaults), index);
        expect(Number.isSafeInteger(sampling.seed) && sampling.seed >= 0).toBe(true);
        if (seed >= 0 && seed < 1e15) expect(sampling.seed).toBe(seed + index);
      }),
    );
    expect(unsignedSeed(-1)).toBe(2 ** 53 - 1);
    const drawn = Array.from({ length: 4 }, () => resolveSampling({}, defaults).seed);
    expect(new Set(drawn).size).toBe(4);
  });

  test("generation_config.json is read with do_sample: false as greedy, and checked", () => {
    const read = (json: unknown) => samplingFromGenerationConfig(json, "generation_config.json");
    expect(read({ do_sample: true, temperature: 0.6, top_p: 0.9, eos_token_id: [1, 2] })).toEqual({
      temperature: 0.6,
      top_p: 0.9,
    });
    expect(read({ do_sample: false, temperature: 0.6, max_new_tokens: 50 })).toEqual({
      temperature: 0,
      max_tokens: 50,
    });
    expect(read({ temperature: null })).toEqual({});
    expect(() => read({ top_p: 7 })).toThrow("top_p");
    expect(() => read(JSON.parse('{"temperature":1e999}'))).toThrow("temperature");
    expect(() => read(JSON.parse('{"repetition_penalty":1e999}'))).toThrow("repetition_penalty");
  });
});
