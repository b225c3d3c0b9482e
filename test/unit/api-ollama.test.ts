import { expect, test } from "bun:test";
import fc from "fast-check";
import { createApp } from "../../src/api/app.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const app = createApp({ models: scriptedModels(sayScript('[f(a="xyz")]')) });

async function send(path: string, body: object): Promise<Response> {
  return app.request(`http://localhost${path}`, { method: "POST", body: JSON.stringify(body) });
}

const tools = [{ type: "function", function: { name: "f", parameters: { type: "object" } } }];
const messages = [{ role: "user", content: "x" }];

test("no body whatsoever makes the server fail", async () => {
  const names = [
    "messages",
    "prompt",
    "system",
    "raw",
    "tools",
    "options",
    "format",
    "stream",
    "images",
    "name",
  ];
  const options = fc.dictionary(
    fc.constantFrom("temperature", "stop", "num_predict", "num_ctx"),
    fc.jsonValue(),
  );
  const body = fc.dictionary(fc.constantFrom(...names), fc.oneof(fc.jsonValue({ maxDepth: 3 }), options), {
    maxKeys: 4,
  });
  await fc.assert(
    fc.asyncProperty(body, async (given) => {
      for (const path of ["/api/chat", "/api/generate", "/api/show"]) {
        const response = await send(path, { model: MODEL, ...given });
        expect([200, 400]).toContain(response.status);
        const text = await response.text();
        if (response.status === 400) expect(typeof JSON.parse(text).error).toBe("string");
      }
    }),
    { numRuns: 300 },
  );
});

test("without a stream parameter the reply is lines of JSON", async () => {
  const response = await send("/api/chat", { model: MODEL, messages });
  expect(response.headers.get("content-type")).toBe("application/x-ndjson");
  const lines = (await response.text()).trim().split("\n");
  expect(lines.length).toBeGreaterThan(5);
  expect(lines.map((line) => JSON.parse(line).done).indexOf(true)).toBe(lines.length - 1);
});

test("a tool call that is cut off shows what there is of its arguments", async () => {
  const response = await send("/api/chat", {
    model: MODEL,
    messages,
    tools,
    stream: false,
    options: { num_predict: 8 },
  });
  expect(await response.json()).toMatchObject({
    done_reason: "length",
    message: {
      content: "",
      tool_calls: [{ function: { name: "f", arguments: { INVALID_JSON: '{"a":"xy' } } }],
    },
  });
});
