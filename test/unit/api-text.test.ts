import { expect, test } from "bun:test";
import fc from "fast-check";
import { createApp } from "../../src/api/app.ts";
import { BEGIN, bytesOf, END } from "../tools/byte-text.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const models = scriptedModels(sayScript("x"));
const app = createApp({ models });

async function send(path: string, body: object): Promise<[number, unknown]> {
  const given = JSON.stringify({ model: MODEL, ...body });
  const response = await app.request(`http://localhost/v1/${path}`, { method: "POST", body: given });
  return [response.status, await response.json()];
}

const messages = [{ role: "user", content: "Hi" }];
const tools = [{ type: "function", function: { name: "f" } }];

test("a prompt is tokenized as completions would, or without begin and control tokens", async () => {
  const tokens = [BEGIN, ...bytesOf("a"), END];
  expect(await send("tokenize", { prompt: "a<|end|>" })).toEqual([
    200,
    { tokens, count: 3, max_model_len: 4096 },
  ]);
  const plain = { prompt: "a<|end|>", add_special_tokens: false, parse_special: false };
  expect(await send("tokenize", plain)).toMatchObject([200, { tokens: bytesOf("a<|end|>") }]);
  expect(await send("tokenize", { prompt: "<|begin|>" })).toMatchObject([200, { tokens: [BEGIN] }]);
});

test("messages are tokenized and rendered as chat would", async () => {
  const [, counted] = await send("tokenize", { messages, tools });
  await send("chat/completions", { messages, tools });
  const { tokens = [] } = models.engine.requests.at(-1) ?? {};
  expect(counted).toEqual({ tokens, count: tokens.length, max_model_len: 4096 });
  expect(await send("apply-template", { messages, tools })).toEqual([
    200,
    { prompt: models.model.text.decode(tokens) },
  ]);
  expect(await send("apply-template", { messages, add_generation_prompt: false })).toEqual([
    200,
    { prompt: "<|begin|><|header|>user:Hi<|end|>" },
  ]);
});

test("ids become the text that they came from", async () => {
  await fc.assert(
    fc.asyncProperty(fc.string({ unit: "grapheme" }), async (prompt) => {
      const tokens = bytesOf(prompt);
      expect(await send("detokenize", { tokens })).toEqual([200, { prompt }]);
    }),
    { numRuns: 100 },
  );
});

test("what is wrong is refused by name", async () => {
  const cases: [path: string, body: object, param: string][] = [
    ["tokenize", {}, "prompt"],
    ["tokenize", { prompt: "a", messages }, "prompt"],
    ["tokenize", { prompt: "a", tools }, "tools"],
    ["tokenize", { messages, parse_special: true }, "parse_special"],
    ["tokenize", { prompt: "a", no_such: 1 }, "no_such"],
    ["detokenize", { tokens: [100_000] }, "tokens"],
    ["detokenize", {}, "tokens"],
    ["apply-template", {}, "messages"],
    [
      "apply-template",
      { messages: [{ role: "tool", content: "x", tool_call_id: "y" }] },
      "messages[0].tool_call_id",
    ],
  ];
  for (const [path, body, param] of cases)
    expect(await send(path, body)).toMatchObject([400, { error: { param } }]);
  expect(await send("tokenize", { model: "none", prompt: "a" })).toMatchObject([404, {}]);
});
