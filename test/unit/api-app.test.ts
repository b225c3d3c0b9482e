// What every request meets: routing, request ids, keys, host and origin, limits, health and shutdown.

import { describe, expect, test } from "bun:test";
import { type AppOptions, createApp } from "../../src/api/app.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import type { ModelInfo } from "../../src/api/model-directory.ts";
import { notReady } from "../../src/api/ops/ready.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

function app(settings: Partial<ApiSettings> = {}, more: Partial<AppOptions> = {}) {
  return createApp({ models: scriptedModels(sayScript("hello")), settings, ...more });
}

const chatBody = JSON.stringify({ model: MODEL, messages: [{ role: "user", content: "Hi" }] });
const post = (body: string, headers: Record<string, string> = {}): RequestInit => ({
  method: "POST",
  body,
  headers,
});

async function errorOf(response: Response): Promise<Record<string, unknown>> {
  const body = (await response.json()) as { error: Record<string, unknown> };
  expect(Object.keys(body.error).sort()).toEqual(["code", "message", "param", "type"]);
  return body.error;
}

describe("routing", () => {
  test("an unknown path is 404 unknown_url", async () => {
    const response = await app().request("/v1/nothing");
    expect(response.status).toBe(404);
    expect(await errorOf(response)).toMatchObject({ code: "unknown_url", type: "invalid_request_error" });
  });

  test("a wrong method is 405 with Allow", async () => {
    const response = await app().request("/v1/chat/completions");
    expect(response.status).toBe(405);
    expect(response.headers.get("allow")).toBe("POST, OPTIONS");
    expect(await errorOf(response)).toMatchObject({ code: "method_not_allowed" });
    const removal = await app().request(`/v1/models/${MODEL}`, { method: "DELETE" });
    expect(removal.status).toBe(405);
    expect(removal.headers.get("allow")).toBe("GET, HEAD, OPTIONS");
  });

  test("HEAD answers as GET without a body, OPTIONS with Allow", async () => {
    const head = await app().request("/v1/models", { method: "HEAD" });
    expect(head.status).toBe(200);
    expect(await head.text()).toBe("");
    const options = await app().request("/v1/models", { method: "OPTIONS" });
    expect(options.status).toBe(204);
    expect(options.headers.get("allow")).toBe("GET, HEAD, OPTIONS");
  });

  test("a model is found by its name, encoded or not, and by an alias", async () => {
    for (const name of [MODEL, encodeURIComponent(MODEL), "scripted"]) {
      const response = await app().request(`/v1/models/${name}`);
      expect(await response.json()).toMatchObject({
        id: MODEL,
        object: "model",
        context_length: 4096,
        state: "ready",
        policy: { mode: "batched" },
      });
    }
  });

  test("every reply has an x-request-id, the client's own if it sent a sound one", async () => {
    for (const path of ["/health", "/v1/nothing", "/v1/completions"]) {
      expect((await app().request(path)).headers.get("x-request-id")).toMatch(/^req_[0-9a-f]{32}$/);
    }
    const sent = async (id: string) =>
      (await app().request("/health", { headers: { "x-request-id": id } })).headers.get("x-request-id");
    expect(await sent("trace-1")).toBe("trace-1");
    expect(await sent("has space")).toStartWith("req_");
  });
});

describe("keys", () => {
  const keyed = () => app({ apiKeys: ["alpha", "beta"] });
  const withHeaders = (headers: Record<string, string>) => keyed().request("/v1/models", { headers });

  test("any of them opens the API, as bearer or x-api-key", async () => {
    expect((await withHeaders({ authorization: "Bearer alpha" })).status).toBe(200);
    expect((await withHeaders({ authorization: "bearer beta" })).status).toBe(200);
    expect((await withHeaders({ "x-api-key": "beta" })).status).toBe(200);
  });

  test("a missing or wrong key is 401 everywhere but at /health", async () => {
    for (const headers of [
      {},
      { authorization: "Bearer alph" },
      { authorization: "Basic alpha" },
      { "x-api-key": "" },
    ]) {
      const response = await withHeaders(headers as Record<string, string>);
      expect(response.status).toBe(401);
      expect(response.headers.get("www-authenticate")).toStartWith("Bearer");
      expect(await errorOf(response)).toMatchObject({
        code: "invalid_api_key",
        type: "authentication_error",
      });
    }
    for (const path of ["/ready", "/v1/models/x", "/v1/nothing"]) {
      expect((await keyed().request(path)).status).toBe(401);
    }
    expect((await keyed().request("/health")).status).toBe(200);
  });
});

describe("host and origin", () => {
  const from = (headers: Record<string, string>, settings: Partial<ApiSettings> = {}) =>
    app(settings).request("/v1/models", { headers });

  test("a loopback server answers to loopback names only", async () => {
    for (const host of ["localhost:11711", "127.0.0.1:80", "[::1]:11711", "LOCALHOST", "page.localhost"]) {
      expect((await from({ host })).status).toBe(200);
    }
    for (const host of [
      "evil.example",
      "evil.example:11711",
      "localhost.evil.example",
      "127.0.0.1.evil.example",
      "a@localhost",
      "",
    ]) {
      const response = await from({ host });
      expect(response.status).toBe(403);
      expect(await errorOf(response)).toMatchObject({ code: "permission_denied", type: "permission_error" });
    }
    expect((await from({ host: "mac.local" }, { allowedHosts: ["mac.local"] })).status).toBe(200);
  });

  test("a server on the network answers to any name unless names are listed", async () => {
    expect((await from({ host: "mac.local" }, { host: "0.0.0.0" })).status).toBe(200);
    const listed = { host: "0.0.0.0", allowedHosts: ["mac.local"] };
    expect((await from({ host: "mac.local" }, listed)).status).toBe(200);
    expect((await from({ host: "evil.example" }, listed)).status).toBe(403);
  });

  test("pages of other origins are refused before anything is done", async () => {
    for (const origin of ["https://evil.example", "null", "http://localhost:9999"]) {
      const response = await from({ host: "localhost:11711", origin });
      expect(response.status).toBe(403);
      expect(response.headers.get("access-control-allow-origin")).toBeNull();
    }
    const own = await from({ host: "localhost:11711", origin: "http://localhost:11711" });
    expect(own.status).toBe(200);
    expect(own.headers.get("access-control-allow-origin")).toBeNull();
  });

  test("listed origins get CORS headers, and preflights need no key", async () => {
    const settings = { corsOrigins: ["https://app.example"], apiKeys: ["k"] };
    const reply = await from(
      { host: "localhost", origin: "https://app.example", authorization: "Bearer k" },
      settings,
    );
    expect(reply.headers.get("access-control-allow-origin")).toBe("https://app.example");
    const preflight = await app(settings).request("/v1/chat/completions", {
      method: "OPTIONS",
      headers: {
        origin: "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
      },
    });
    expect(preflight.status).toBe(204);
    expect(preflight.headers.get("access-control-allow-methods")).toContain("POST");
    expect(preflight.headers.get("access-control-allow-headers")).toContain("x-stainless-os");
    const foreign = await app(settings).request("/v1/models", {
      method: "OPTIONS",
      headers: { origin: "https://evil.example", "access-control-request-method": "GET" },
    });
    expect(foreign.status).toBe(403);
  });
});

describe("bodies", () => {
  test("over the limit are 413, with and without a content-length", async () => {
    const small = app({ maxBodyBytes: 1000 });
    const large = JSON.stringify({ model: MODEL, prompt: "x".repeat(1000) });
    const declared = await small.request(
      "/v1/completions",
      post(large, { "content-length": String(large.length) }),
    );
    expect(declared.status).toBe(413);
    expect(await errorOf(declared)).toMatchObject({
      code: "request_too_large",
      type: "invalid_request_error",
    });
    const pieces = new ReadableStream({
      pull: (controller) => controller.enqueue(new TextEncoder().encode("x".repeat(100))),
    });
    const endless = await small.request("/v1/completions", { method: "POST", body: pieces });
    expect(endless.status).toBe(413);
  });

  test("that stop arriving are given up", async () => {
    const stuck = new ReadableStream({ pull: () => new Promise<void>(() => undefined) });
    const response = await app({ bodyTimeoutMs: 20 }).request("/v1/completions", {
      method: "POST",
      body: stuck,
    });
    expect(response.status).toBe(400);
    expect((await errorOf(response)).message).toContain("did not arrive");
  });

  test("that are no JSON object are 400 invalid_json", async () => {
    for (const body of ["", "{", "[]", "null", '"text"', "{} trailing"]) {
      const response = await app().request("/v1/chat/completions", post(body));
      expect(response.status).toBe(400);
      expect(await errorOf(response)).toMatchObject({ code: "invalid_json" });
    }
    const latin1 = await app().request("/v1/completions", {
      method: "POST",
      body: Uint8Array.of(0x22, 0xe9, 0x22),
    });
    expect(await errorOf(latin1)).toMatchObject({ code: "invalid_json" });
  });
});

describe("health, ready and shutdown", () => {
  test("health is always 200 and ready follows the models", async () => {
    const models = scriptedModels(sayScript("x"));
    const it = app({}, { models });
    expect((await it.request("/ready")).status).toBe(200);
    models.info.state = "loading";
    models.info.progress = 0.42;
    const loading = await it.request("/ready");
    expect(loading.status).toBe(503);
    expect(loading.headers.get("retry-after")).toBe("5");
    const error = await errorOf(loading);
    expect(error).toMatchObject({ code: "model_loading", type: "server_error" });
    expect(error.message).toContain("42 %");
    expect((await it.request("/health")).status).toBe(200);
  });

  test("ready says why not", () => {
    const model = (state: ModelInfo["state"], error?: string): ModelInfo => ({
      id: state,
      created: 0,
      ownedBy: "",
      state,
      ...(error === undefined ? {} : { error }),
    });
    expect(notReady([])?.code).toBe("cluster_degraded");
    expect(notReady([model("failed", "bad header")])?.message).toContain("bad header");
    expect(notReady([model("failed"), model("available")])).toBeUndefined();
    expect(notReady([model("available"), model("loading")])?.code).toBe("model_loading");
    expect(notReady([model("loading"), model("ready")])).toBeUndefined();
  });

  test("a draining node refuses all but /health with shutting_down and Retry-After", async () => {
    const lifecycle = new Lifecycle();
    const it = app({}, { lifecycle });
    lifecycle.beginDrain();
    for (const path of ["/ready", "/v1/models"]) {
      const response = await it.request(path);
      expect(response.status).toBe(503);
      expect(response.headers.get("retry-after")).toBe("10");
      expect(await errorOf(response)).toMatchObject({ code: "shutting_down" });
    }
    expect((await it.request("/health")).status).toBe(200);
  });

  test("requests over the limit of concurrent ones are 429, and the place is given back", async () => {
    let open: () => void = () => undefined;
    const gate = new Promise<void>((resolve) => {
      open = resolve;
    });
    const models = scriptedModels({
      ...sayScript("hello"),
      gate: (position) => (position === 0 ? gate : undefined),
    });
    const it = app({ maxConcurrentRequests: 1 }, { models });
    const first = it.request("/v1/chat/completions", post(chatBody));
    const second = await it.request("/v1/chat/completions", post(chatBody));
    expect(second.status).toBe(429);
    expect(second.headers.get("retry-after")).toBe("2");
    expect(await errorOf(second)).toMatchObject({ code: "queue_full", type: "rate_limit_error" });
    open();
    expect((await first).status).toBe(200);
    expect((await it.request("/v1/chat/completions", post(chatBody))).status).toBe(200);
  });
});

describe("failures", () => {
  test("a client that leaves while its prompt is rendered ends that work and gives its place back", async () => {
    const models = scriptedModels(sayScript("x"));
    let given: AbortSignal | undefined;
    models.model.text.renderChat = (_input, options) => {
      given = options?.signal;
      return new Promise((_, reject) => {
        given?.addEventListener("abort", () => reject(new Error("dropped")));
      });
    };
    const lifecycle = new Lifecycle();
    const abort = new AbortController();
    const reply = app({}, { models, lifecycle }).request("/v1/chat/completions", {
      ...post(chatBody),
      signal: abort.signal,
    });
    await until(() => given !== undefined, "rendering begins");
    expect(lifecycle.running).toBe(1);
    abort.abort();
    expect((await reply).status).toBe(499);
    expect(lifecycle.running).toBe(0);
    expect(models.engine.requests).toHaveLength(0);
  });

  test("a model whose engine is loading is 503 model_loading with its progress", async () => {
    const models = scriptedModels(sayScript("x"));
    models.engine.state = "loading";
    models.engine.progress = 0.5;
    const response = await app({}, { models }).request("/v1/chat/completions", post(chatBody));
    expect(response.status).toBe(503);
    expect(response.headers.get("retry-after")).toBe("5");
    expect((await errorOf(response)).message).toContain("50 %");
    models.engine.state = "failed";
    models.engine.error = { code: "bad_file", message: "The header is cut off." };
    const failed = await app({}, { models }).request("/v1/chat/completions", post(chatBody));
    expect(failed.status).toBe(500);
    expect(failed.headers.get("x-should-retry")).toBe("false");
  });

  test("an unexpected exception is 500 internal_error that tells nothing of the inside", async () => {
    const models = scriptedModels(sayScript("x"));
    models.find = async () => {
      throw new Error("secret /path/inside");
    };
    const lines: unknown[] = [];
    const record = (message: string, fields?: unknown) => void lines.push([message, fields]);
    const quiet = () => undefined;
    const log = { debug: quiet, info: quiet, warn: record, error: record, child: () => log };
    const response = await app({}, { models, log }).request("/v1/chat/completions", post(chatBody));
    expect(response.status).toBe(500);
    const error = await errorOf(response);
    expect(error).toMatchObject({ code: "internal_error", type: "server_error" });
    expect(error.message).not.toContain("secret");
    expect(JSON.stringify(lines)).toContain("secret /path/inside");
    expect(JSON.stringify(lines)).toContain(response.headers.get("x-request-id") ?? "no id");
  });
});
