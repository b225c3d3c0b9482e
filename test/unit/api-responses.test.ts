import { expect, test } from "bun:test";
import fc from "fast-check";
import { createApp } from "../../src/api/app.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

const models = scriptedModels(sayScript("ok"));
const app = createApp({ models });

async function send(body: object): Promise<Response> {
  return app.request("http://localhost/v1/responses", { method: "POST", body: JSON.stringify(body) });
}

test("no body whatsoever makes the server fail", async () => {
  const names = ["tools", "tool_choice", "text", "stream", "instructions", "store", "reasoning", "metadata"];
  const item = fc.oneof(
    fc.record({ role: fc.constantFrom("user", "assistant"), content: fc.oneof(fc.string(), fc.jsonValue()) }),
    fc.record({
      type: fc.constantFrom("function_call", "function_call_output", "reasoning"),
      call_id: fc.constantFrom("a", "b"),
      name: fc.constant("f"),
      arguments: fc.string(),
    }),
    fc.record({ type: fc.constant("function_call_output"), call_id: fc.constant("a"), output: fc.string() }),
  );
  const body = fc.record({
    input: fc.oneof(fc.string(), fc.array(item, { maxLength: 3 }), fc.jsonValue({ maxDepth: 3 })),
    rest: fc.dictionary(fc.constantFrom(...names), fc.jsonValue({ maxDepth: 3 }), { maxKeys: 2 }),
  });
  await fc.assert(
    fc.asyncProperty(body, async ({ input, rest }) => {
      const response = await send({ model: MODEL, input, ...rest });
      expect([200, 400]).toContain(response.status);
      await response.text();
    }),
    { numRuns: 300 },
  );
});

test("calls sent back belong to the assistant's message before them", async () => {
  const seen: unknown[] = [];
  const text = {
    ...models.model.text,
    renderChat: (input: Parameters<typeof models.model.text.renderChat>[0]) => {
      seen.push(...input.messages);
      return models.model.text.renderChat(input);
    },
  };
  const recording = createApp({ models: scriptedModels(sayScript("ok"), { text }) });
  const call = (call_id: string) => ({ type: "function_call", call_id, name: "f", arguments: "{}" });
  const input = [
    { role: "user", content: [{ type: "input_text", text: "x" }] },
    { role: "assistant", content: [{ type: "output_text", text: "I ask.", annotations: [] }] },
    call("a"),
    call("b"),
    { type: "function_call_output", call_id: "a", output: "1" },
  ];
  const body = JSON.stringify({ model: MODEL, input });
  const response = await recording.request("http://localhost/v1/responses", { method: "POST", body });
  expect(response.status).toBe(200);
  const made = (id: string) => ({ id, type: "function", function: { name: "f", arguments: "{}" } });
  expect(seen).toEqual([
    { role: "user", content: "x" },
    { role: "assistant", content: "I ask.", tool_calls: [made("a"), made("b")] },
    { role: "tool", content: "1", tool_call_id: "a", name: "f" },
  ]);
});
