import { expect, test } from "bun:test";
import fc from "fast-check";
import { createApp } from "../../src/api/app.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const app = createApp({ models: scriptedModels(sayScript('[f(a="xyz")]')) });

async function send(path: string, body: string): Promise<Response> {
  return app.request(`http://localhost${path}`, { method: "POST", body });
}

test("no body whatsoever makes the server fail", async () => {
  const names = [
    "system",
    "tools",
    "tool_choice",
    "stop_sequences",
    "thinking",
    "stream",
    "temperature",
    "top_k",
  ];
  const block = fc.oneof(
    fc.record({ type: fc.constant("text"), text: fc.string() }),
    fc.record({
      type: fc.constant("tool_use"),
      id: fc.constant("a"),
      name: fc.constant("f"),
      input: fc.object(),
    }),
    fc.record({
      type: fc.constant("tool_result"),
      tool_use_id: fc.constantFrom("a", "b"),
      content: fc.jsonValue(),
    }),
    fc.jsonValue({ maxDepth: 2 }),
  );
  const message = fc.record({
    role: fc.constantFrom("user", "assistant", "system"),
    content: fc.oneof(fc.string(), fc.array(block, { maxLength: 3 })),
  });
  const body = fc.record({
    messages: fc.oneof(fc.array(message, { maxLength: 3 }), fc.jsonValue()),
    rest: fc.dictionary(fc.constantFrom(...names), fc.jsonValue({ maxDepth: 3 }), { maxKeys: 2 }),
  });
  await fc.assert(
    fc.asyncProperty(body, async ({ messages, rest }) => {
      for (const path of ["/v1/messages", "/v1/messages/count_tokens"]) {
        const limit = path.endsWith("messages") ? { max_tokens: 9 } : {};
        const response = await send(path, JSON.stringify({ model: MODEL, messages, ...limit, ...rest }));
        expect([200, 400]).toContain(response.status);
        const text = await response.text();
        if (response.status === 400) expect(JSON.parse(text)).toMatchObject({ type: "error" });
      }
    }),
    { numRuns: 300 },
  );
});

test("a tool call that is cut off shows what there is of its input", async () => {
  const response = await send(
    "/v1/messages",
    JSON.stringify({
      model: MODEL,
      max_tokens: 8,
      messages: [{ role: "user", content: "x" }],
      tools: [{ name: "f", input_schema: { type: "object" } }],
    }),
  );
  expect(await response.json()).toMatchObject({
    stop_reason: "max_tokens",
    content: [{ type: "tool_use", name: "f", input: { INVALID_JSON: '{"a":"xy' } }],
  });
});
