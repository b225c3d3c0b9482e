// /openapi.json: every route is described, requests as they are checked, and replies as they are.

import { describe, expect, test } from "bun:test";
import * as v from "valibot";
import { createApp } from "../../src/api/app.ts";
import { jsonSchemaOf } from "../../src/api/openapi/json-schema.ts";
import { errorReplies, replies } from "../../src/api/openapi/replies.ts";
import { PAGE_FILES } from "../../src/dashboard/page.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";

interface Document {
  openapi: string;
  paths: Record<
    string,
    Record<
      string,
      {
        requestBody?: { content: { "application/json": { schema: Record<string, unknown> } } };
        responses: Record<string, { content: Record<string, { schema: { $ref?: string } }> }>;
      }
    >
  >;
  components: { schemas: Record<string, object> };
}

const newApp = () => createApp({ models: scriptedModels(sayScript("hello")) });
const read = async (): Promise<Document> =>
  (await (await newApp().request("/openapi.json")).json()) as Document;

describe("the document", () => {
  test("describes every route and no other", async () => {
    const { paths } = await read();
    const described = Object.entries(paths).flatMap(([path, methods]) =>
      Object.keys(methods).map((method) => `${method.toUpperCase()} ${path}`),
    );
    const registered = newApp()
      .routes.filter(({ method, path }) => method !== "ALL" && !(path in PAGE_FILES))
      // The cluster's routes are between nodes and their own tools.
      .filter(({ path }) => !path.startsWith("/cluster"))
      .map(({ method, path }) => `${method} ${path.replace(/:(\w+)(\{[^}]*\})?/g, "{$1}")}`);
    expect(described.toSorted()).toEqual([...new Set(registered)].toSorted());
  });

  test("refers only to what it has", async () => {
    const document = await read();
    expect(document.openapi).toBe("3.1.0");
    for (const [, name] of JSON.stringify(document).matchAll(/#\/components\/schemas\/(\w+)/g))
      expect(Object.keys(document.components.schemas)).toContain(name ?? "");
  });

  test("says of chat what the checks say", async () => {
    const { paths } = await read();
    const schema = paths["/v1/chat/completions"]?.post?.requestBody?.content["application/json"].schema;
    expect(schema).toMatchObject({
      type: "object",
      additionalProperties: false,
      required: ["model", "messages"],
      properties: {
        temperature: { anyOf: [{ type: "number", minimum: 0, maximum: 2 }, { type: "null" }] },
        n: { anyOf: [{ type: "integer", minimum: 1, maximum: 128 }, { type: "null" }] },
        messages: { type: "array", minItems: 1 },
      },
    });
  });
});

test("each kind of schema becomes what it accepts", () => {
  const cases: [v.GenericSchema, object][] = [
    [v.pipe(v.string(), v.minLength(1), v.maxLength(9)), { type: "string", minLength: 1, maxLength: 9 }],
    [v.pipe(v.string(), v.regex(/^a+$/)), { type: "string", pattern: "^a+$" }],
    [v.pipe(v.number(), v.gtValue(0), v.maxValue(2)), { type: "number", exclusiveMinimum: 0, maximum: 2 }],
    [v.pipe(v.number(), v.safeInteger(), v.minValue(3)), { type: "integer", minimum: 3 }],
    [v.literal("x"), { const: "x" }],
    [v.picklist(["a", "b"]), { enum: ["a", "b"] }],
    [v.pipe(v.array(v.boolean()), v.length(2)), { type: "array", minItems: 2, maxItems: 2 }],
    [v.tuple([v.number(), v.null()]), { prefixItems: [{ type: "number" }, { type: "null" }] }],
    [v.nullish(v.string()), { anyOf: [{ type: "string" }, { type: "null" }] }],
    [v.record(v.string(), v.number()), { type: "object", additionalProperties: { type: "number" } }],
    [v.unknown(), {}],
    [
      v.strictObject({ a: v.string(), b: v.optional(v.number()) }),
      {
        properties: { a: { type: "string" }, b: { type: "number" } },
        required: ["a"],
        additionalProperties: false,
      },
    ],
  ];
  for (const [schema, expected] of cases) expect(jsonSchemaOf(schema)).toMatchObject(expected);
});

describe("replies are as described:", () => {
  const messages = [{ role: "user", content: "Hi" }];
  /** Without a body: GET. */
  const CASES: [path: string, reply: keyof typeof replies, body?: object][] = [
    ["/v1/chat/completions", "chat", { messages, logprobs: true }],
    ["/v1/completions", "completion", { prompt: "Hi", max_tokens: 2 }],
    ["/v1/responses", "response", { input: "Hi" }],
    ["/v1/models", "models"],
    [`/v1/models/${MODEL}`, "model"],
    ["/v1/messages", "message", { messages, max_tokens: 9 }],
    ["/v1/messages/count_tokens", "tokenCount", { messages }],
    ["/api/chat", "ollamaChat", { messages, stream: false }],
    ["/api/generate", "ollamaGenerate", { prompt: "Hi", stream: false }],
    ["/api/generate", "ollamaGenerate", { keep_alive: 0 }],
    ["/api/tags", "ollamaModels"],
    ["/api/ps", "ollamaModels"],
    ["/api/show", "ollamaShow", {}],
    ["/api/version", "version"],
    ["/v1/tokenize", "tokens", { prompt: "Hi" }],
    ["/v1/detokenize", "prompt", { tokens: [72] }],
    ["/v1/apply-template", "prompt", { messages }],
    ["/bench/chat/completions", "bench", { messages }],
    ["/health", "health"],
    ["/ready", "ready"],
    ["/login", "login"],
    ["/requests", "requests"],
    ["/models/load", "loaded", {}],
    ["/models/unload", "unloaded", {}],
    ["/openapi.json", "document"],
  ];
  for (const [path, reply, body] of CASES) {
    test(`${path} gives ${reply}`, async () => {
      const answer = await newApp().request(
        path,
        body === undefined ? {} : { method: "POST", body: JSON.stringify({ model: MODEL, ...body }) },
      );
      expect(answer.status).toBe(200);
      expect(answer.headers.get("content-type")).toStartWith("application/json");
      const parsed = v.safeParse(replies[reply], await answer.json());
      expect(parsed.issues ?? []).toEqual([]);
    });
  }

  test("errors, in the form of each family", async () => {
    for (const [path, family] of [
      ["/v1/chat/completions", "openai"],
      ["/v1/messages", "anthropic"],
      ["/api/chat", "ollama"],
    ] as const) {
      const answer = await newApp().request(path, { method: "POST", body: "{}" });
      expect(answer.status).toBe(400);
      expect(v.is(errorReplies[family], await answer.json())).toBe(true);
    }
  });
});
