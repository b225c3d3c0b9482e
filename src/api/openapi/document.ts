// GET /openapi.json: the API's description, made from the schemas that check the requests, so that it cannot say
// something else than they do.

import type * as v from "valibot";
import { VERSION } from "../../version.ts";
import { countSchema, messagesSchema } from "../anthropic/schema.ts";
import type { Scope } from "../auth.ts";
import { showSchema } from "../ollama/models.ts";
import { chatSchema as ollamaChatSchema, generateSchema as ollamaGenerateSchema } from "../ollama/schema.ts";
import { responsesSchema } from "../openai/responses-schema.ts";
import { chatSchema, completionSchema } from "../openai/schema.ts";
import { loginSchema } from "../ops/login.ts";
import { modelNameSchema } from "../ops/models-admin.ts";
import { detokenizeSchema, templateSchema, tokenizeSchema } from "../text/text-routes.ts";
import { type JsonSchema, jsonSchemaOf, orNull } from "./json-schema.ts";
import { errorReplies, replies } from "./replies.ts";

interface Operation {
  path: string;
  method: "get" | "post";
  tag: "OpenAI" | "Anthropic" | "Ollama" | "Text" | "Operations";
  summary: string;
  /** The body of the request. */
  body?: v.GenericSchema;
  /** The body of the reply; absent = text. */
  reply?: keyof typeof replies;
  /** Content type of the streamed reply. */
  stream?: string;
  /** There is no other reply. */
  streamOnly?: boolean;
  errors?: keyof typeof errorReplies;
  /** No key is asked for. */
  open?: boolean;
  scope?: Scope;
}

const SSE = "text/event-stream";
const NDJSON = "application/x-ndjson";

/** Every route but the page's files. `{id}` stands for a parameter of the path. */
const OPERATIONS: Operation[] = [
  post("/v1/chat/completions", "OpenAI", "Chat", chatSchema, "chat", { stream: SSE }),
  post("/v1/completions", "OpenAI", "Continue raw prompts", completionSchema, "completion", { stream: SSE }),
  post("/v1/responses", "OpenAI", "Chat in the form of responses", responsesSchema, "response", {
    stream: SSE,
  }),
  get("/v1/models", "OpenAI", "The models of this node", "models"),
  get("/v1/models/{id}", "OpenAI", "One model", "model"),
  post("/v1/messages", "Anthropic", "Chat", messagesSchema, "message", { stream: SSE, errors: "anthropic" }),
  post("/v1/messages/count_tokens", "Anthropic", "Size of a chat in tokens", countSchema, "tokenCount", {
    errors: "anthropic",
  }),
  post("/api/chat", "Ollama", "Chat", ollamaChatSchema, "ollamaChat", { stream: NDJSON, errors: "ollama" }),
  post("/api/generate", "Ollama", "Answer a prompt", ollamaGenerateSchema, "ollamaGenerate", {
    stream: NDJSON,
    errors: "ollama",
  }),
  get("/api/tags", "Ollama", "The models of this node", "ollamaModels", { errors: "ollama" }),
  get("/api/ps", "Ollama", "The loaded models", "ollamaModels", { errors: "ollama" }),
  post("/api/show", "Ollama", "One model", showSchema, "ollamaShow", { errors: "ollama" }),
  get("/api/version", "Ollama", "The version", "version", { errors: "ollama" }),
  post("/v1/tokenize", "Text", "Text or messages to token ids", tokenizeSchema, "tokens"),
  post("/v1/detokenize", "Text", "Token ids to text", detokenizeSchema, "prompt"),
  post("/v1/apply-template", "Text", "Messages to the prompt's text", templateSchema, "prompt"),
  post("/bench/chat/completions", "Operations", "Chat, with its speed", chatSchema, "bench"),
  get("/health", "Operations", "The process answers", "health", { open: true }),
  get("/ready", "Operations", "A request would be served now", "ready"),
  get("/metrics", "Operations", "Metrics for Prometheus"),
  get("/history", "Operations", "The last hour in pieces of ten seconds", "history"),
  get("/login", "Operations", "Who one is", "login", { open: true }),
  post("/login", "Operations", "A key for a browser's cookie", loginSchema, "login", { open: true }),
  { path: "/logout", method: "post", tag: "Operations", summary: "End the session", reply: "login" },
  get("/requests", "Operations", "The newest generation requests", "requests", { scope: "administration" }),
  get("/requests/{id}", "Operations", "What happened to a generation request", "request"),
  post("/models/load", "Operations", "Load a model", modelNameSchema, "loaded", { scope: "administration" }),
  post("/models/unload", "Operations", "Take a model out of memory", modelNameSchema, "unloaded", {
    scope: "administration",
  }),
  {
    path: "/models/pull",
    method: "post",
    tag: "Operations",
    summary: "Download a model from the hub; a line of JSON for each step",
    body: modelNameSchema,
    stream: NDJSON,
    streamOnly: true,
    scope: "administration",
  },
  post("/models/delete", "Operations", "Delete a model from the disk", modelNameSchema, "deleted", {
    scope: "administration",
  }),
  get("/openapi.json", "Operations", "This description", "document"),
];

type More = Pick<Operation, "stream" | "errors" | "open" | "scope">;

function get(
  path: string,
  tag: Operation["tag"],
  summary: string,
  reply?: keyof typeof replies,
  more: More = {},
): Operation {
  return { path, method: "get", tag, summary, ...(reply === undefined ? {} : { reply }), ...more };
}

function post(
  path: string,
  tag: Operation["tag"],
  summary: string,
  body: v.GenericSchema,
  reply: keyof typeof replies,
  more: More = {},
): Operation {
  return { path, method: "post", tag, summary, body, reply, ...more };
}

/** The body's schema. null is as good as absent at its first level (parameters.ts). */
function requestSchema(body: v.GenericSchema): JsonSchema {
  const schema = jsonSchemaOf(body);
  const required = new Set(Array.isArray(schema.required) ? schema.required : []);
  const properties = Object.entries((schema.properties ?? {}) as Record<string, JsonSchema>).map(
    ([name, property]) => [name, required.has(name) ? property : orNull(property)],
  );
  return { ...schema, properties: Object.fromEntries(properties) };
}

function describe(operation: Operation): JsonSchema {
  const { path, tag, summary, body, reply, stream, errors = "openai", open, scope } = operation;
  const parameters = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => ({
    name,
    in: "path",
    required: true,
    schema: { type: "string", minLength: 1 },
  }));
  const content = operation.streamOnly
    ? {}
    : reply === undefined
      ? { "text/plain": { schema: { type: "string" } } }
      : { "application/json": { schema: { $ref: `#/components/schemas/reply_${reply}` } } };
  return {
    operationId: `${operation.method}${path.replace(/\W+/g, "_")}`,
    tags: [tag],
    summary,
    ...(scope === undefined ? {} : { description: "For keys with the scope of administration." }),
    ...(open === true ? { security: [] } : {}),
    ...(parameters.length === 0 ? {} : { parameters }),
    ...(body === undefined
      ? {}
      : {
          requestBody: { required: true, content: { "application/json": { schema: requestSchema(body) } } },
        }),
    responses: {
      "200": {
        description: "Done.",
        content: {
          ...content,
          ...(stream === undefined ? {} : { [stream]: { schema: {} } }),
        },
      },
      default: {
        description: "Refused or failed; docs/api.md lists statuses and codes.",
        content: { "application/json": { schema: { $ref: `#/components/schemas/error_${errors}` } } },
      },
    },
  };
}

function makeDocument(): JsonSchema {
  const paths: Record<string, Record<string, JsonSchema>> = {};
  for (const operation of OPERATIONS)
    paths[operation.path] = { ...paths[operation.path], [operation.method]: describe(operation) };
  const named = (prefix: string, schemas: Record<string, v.GenericSchema>) =>
    Object.entries(schemas).map(([name, schema]) => [`${prefix}_${name}`, jsonSchemaOf(schema)]);
  return {
    openapi: "3.1.0",
    info: { title: "caravan", version: VERSION },
    security: [{ bearer: [] }, { header: [] }, { cookie: [] }],
    paths,
    components: {
      schemas: Object.fromEntries([...named("reply", replies), ...named("error", errorReplies)]),
      securitySchemes: {
        bearer: { type: "http", scheme: "bearer" },
        header: { type: "apiKey", in: "header", name: "x-api-key" },
        cookie: { type: "apiKey", in: "cookie", name: "caravan_session" },
      },
    },
  };
}

let made: string | undefined;

export function openapiRoute() {
  return (): Response => {
    made ??= JSON.stringify(makeDocument());
    return new Response(made, { headers: { "content-type": "application/json" } });
  };
}
