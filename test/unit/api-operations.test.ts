// What operators see of the API: metrics in Prometheus's form, traces of requests, measured completions.

import { describe, expect, test } from "bun:test";
import { createApp } from "../../src/api/app.ts";
import { History } from "../../src/api/ops/history.ts";
import { ServingMetrics } from "../../src/api/ops/metrics.ts";
import { Histogram } from "../../src/api/ops/prometheus.ts";
import { TraceLog } from "../../src/api/ops/request-trace.ts";
import { CaravanError } from "../../src/errors.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const chat = (more: object = {}, headers: Record<string, string> = {}): RequestInit => ({
  method: "POST",
  body: JSON.stringify({ model: MODEL, messages: [{ role: "user", content: "Hi" }], ...more }),
  headers,
});

/** Sample name with labels → value. Throws on a line that is not of the text format. */
function samplesOf(text: string): Map<string, number> {
  const samples = new Map<string, number>();
  for (const line of text.trimEnd().split("\n")) {
    if (/^# (HELP|TYPE) [a-z_:0-9]+ .+$/.test(line)) continue;
    const match = /^([a-z_:0-9]+(?:\{(?:[a-z_]+="(?:[^"\\]|\\.)*",?)*\})?) (-?[\d.e+-]+|NaN)$/.exec(line);
    if (match === null) throw new Error(`not a sample: ${line}`);
    const name = match[1] ?? "";
    if (samples.has(name)) throw new Error(`twice: ${name}`);
    samples.set(name, Number(match[2]));
  }
  return samples;
}

const labels = `model_name="${MODEL}",engine="0"`;

test("the last hour is kept in pieces of ten seconds", () => {
  let now = 1_700_000_000_000;
  const history = new History(() => now);
  history.begun();
  history.begun();
  history.firstToken(80);
  history.nextToken(10);
  history.nextToken(20);
  history.ended(7, false);
  now += 10_000;
  history.ended(3, true);
  const { data } = JSON.parse(JSON.stringify(history));
  expect(data).toEqual([
    {
      ...{ at: 1_700_000_000, tokens: 3, prompt_tokens: 7, inter_token_ms: 15, first_token_ms: 80 },
      ...{ requests: 1, failures: 0, running: 2 },
    },
    {
      ...{ at: 1_700_000_010, tokens: 0, prompt_tokens: 3, inter_token_ms: null, first_token_ms: null },
      ...{ requests: 1, failures: 1, running: 1 },
    },
  ]);
  now += 3_600_000;
  expect(JSON.parse(JSON.stringify(history)).data).toEqual([
    {
      ...{ at: 1_700_003_610, tokens: 0, prompt_tokens: 0, inter_token_ms: null, first_token_ms: null },
      ...{ requests: 0, failures: 0, running: 0 },
    },
  ]);
});

describe("metrics", () => {
  test("count what requests did, under vLLM's names", async () => {
    const app = createApp({ models: scriptedModels({ ...sayScript("hello"), cachedTokens: 2 }) });
    const whole = await app.request("/v1/chat/completions", chat({ n: 2 }));
    expect(whole.status).toBe(200);
    const { usage } = (await whole.json()) as { usage: { prompt_tokens: number } };
    await (await app.request("/v1/chat/completions", chat({ stream: true }))).text();
    await app.request("/v1/chat/completions", chat({ surprise: true }));
    await app.request("/made-up/by-a-client");

    const reply = await app.request("/metrics");
    expect(reply.headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
    const samples = samplesOf(await reply.text());
    const value = (name: string) => samples.get(name);
    expect(value(`vllm:request_success_total{${labels},finished_reason="stop"}`)).toBe(3);
    expect(value(`vllm:prompt_tokens_total{${labels}}`)).toBe(3 * usage.prompt_tokens);
    expect(value(`vllm:generation_tokens_total{${labels}}`)).toBe(3 * 6);
    expect(value(`vllm:time_to_first_token_seconds_count{${labels}}`)).toBe(3);
    expect(value(`vllm:inter_token_latency_seconds_count{${labels}}`)).toBe(3 * 5);
    expect(value(`vllm:e2e_request_latency_seconds_count{${labels}}`)).toBe(2);
    expect(value(`vllm:request_params_n_sum{${labels}}`)).toBe(3);
    expect(value(`vllm:num_requests_running{${labels}}`)).toBe(0);
    const http = (route: string, method: string, status: number) =>
      value(`caravan_http_requests_total{route="${route}",method="${method}",status="${status}"}`);
    expect(http("/v1/chat/completions", "POST", 200)).toBe(2);
    expect(http("/v1/chat/completions", "POST", 400)).toBe(1);
    expect(http("other", "other", 404)).toBe(1);
    expect(value("caravan_generations_running")).toBe(0);
    expect(value("process_resident_memory_bytes")).toBeGreaterThan(1e6);
  });

  test("failures are counted by code and clients that leave as aborts", async () => {
    const error = { code: "engine_failed", message: "gone" };
    const failing = createApp({
      models: scriptedModels({ ...sayScript("hello"), failAfter: () => ({ tokens: 1, error }) }),
    });
    expect((await failing.request("/v1/chat/completions", chat())).status).toBe(503);
    const failed = samplesOf(await (await failing.request("/metrics")).text());
    expect(failed.get(`caravan_request_failures_total{model_name="${MODEL}",code="engine_failed"}`)).toBe(1);

    const models = scriptedModels({
      ...sayScript("hello"),
      gate: (at) => (at === 2 ? new Promise<void>(() => undefined) : undefined),
    });
    const held = createApp({ models });
    const leaving = new AbortController();
    const reply = held.request("/v1/chat/completions", { ...chat(), signal: leaving.signal });
    await until(() => models.engine.produced === 2, "the request is under way");
    const samples = async () => samplesOf(await (await held.request("/metrics")).text());
    expect((await samples()).get("caravan_generations_running")).toBe(1);
    leaving.abort();
    await reply;
    const name = `vllm:request_success_total{${labels},finished_reason="abort"}`;
    expect((await samples()).get(name)).toBe(1);
  });

  test("a histogram's buckets add up from the lowest, and label values are escaped", () => {
    const histogram = new Histogram({ name: "t", help: "two\nlines", labels: ["a"] }, [1, 2]);
    for (const value of [0.5, 1, 1.5, 7]) histogram.observe(['say "\\"\n'], value);
    expect(histogram.text().split("\n")).toEqual([
      "# HELP t two\\nlines",
      "# TYPE t histogram",
      't_bucket{a="say \\"\\\\\\"\\n",le="1"} 2',
      't_bucket{a="say \\"\\\\\\"\\n",le="2"} 3',
      't_bucket{a="say \\"\\\\\\"\\n",le="+Inf"} 4',
      't_sum{a="say \\"\\\\\\"\\n"} 10',
      't_count{a="say \\"\\\\\\"\\n"} 4',
      "",
    ]);
  });
});

describe("request traces", () => {
  test("tell a request's phases in order, its tokens and its end, and hold no text", async () => {
    const app = createApp({ models: scriptedModels(sayScript("hello")) });
    await (
      await app.request("/v1/chat/completions", chat({ stream: true }, { "x-request-id": "mine" }))
    ).text();
    const reply = await app.request("/requests/mine");
    const trace = (await reply.json()) as Record<string, unknown> & {
      phases: { name: string; start_ms: number; ms: number }[];
    };
    expect(trace).toMatchObject({
      id: "mine",
      path: "/v1/chat/completions",
      stream: true,
      state: "complete",
      model: MODEL,
      usage: { completion_tokens: 6 },
      choices: [{ index: 0, tokens: 6, finish_reason: "stop" }],
    });
    expect(trace.phases.map(({ name }) => name)).toEqual([
      "body",
      "model",
      "prompt",
      "first_token",
      "generation",
      "reply",
    ]);
    for (const { ms } of trace.phases) expect(ms).toBeGreaterThanOrEqual(0);
    expect(JSON.stringify(trace)).not.toContain("Hi");
    const list = (await (await app.request("/requests")).json()) as { data: { id: string }[] };
    expect(list.data.map(({ id }) => id)).toEqual(["mine"]);
  });

  test("tell why a request failed", async () => {
    const app = createApp({ models: scriptedModels(sayScript("hello")) });
    await app.request("/v1/chat/completions", chat({ max_tokens: 5000 }, { "x-request-id": "long" }));
    expect(await (await app.request("/requests/long")).json()).toMatchObject({
      state: "failed",
      error: { code: "context_length_exceeded" },
    });
  });

  test("an unknown id is 404 request_not_found", async () => {
    const app = createApp({ models: scriptedModels(sayScript("hello")) });
    const reply = await app.request("/requests/nobody");
    expect(reply.status).toBe(404);
    expect(await reply.json()).toMatchObject({ error: { code: "request_not_found" } });
  });

  test("only the last ones are kept, running ones always", () => {
    const log = new TraceLog(new ServingMetrics(), new History(), 3);
    const begin = (id: string) => log.begin({ id, path: "/", stream: false, startedMs: 0 });
    const running = begin("running");
    for (const id of ["a", "b", "c", "d"]) log.end(begin(id), undefined);
    expect(log.get("a")).toBeUndefined();
    expect(log.list(10)).toMatchObject(["running", "d", "c", "b"].map((id) => ({ id })));
    expect(log.get("running")).toEqual(running.toJSON());
    expect(log.measured("running")).toBe(running);
  });
});

describe("loading and unloading", () => {
  const post = (path: string, body: object, key = "admin"): [string, RequestInit] => [
    path,
    { method: "POST", body: JSON.stringify(body), headers: { authorization: `Bearer ${key}` } },
  ];
  const keyed = () => {
    const models = scriptedModels(sayScript("hello"));
    return { models, app: createApp({ models, settings: { apiKeys: ["user"], adminKeys: ["admin"] } }) };
  };

  test("take a key of administration, wait for the load, and name models that are not here", async () => {
    const { app, models } = keyed();
    expect((await app.request(...post("/models/load", { model: MODEL }, "user"))).status).toBe(403);
    models.failures.push(new CaravanError("model_loading", "half-way", { retryAfterSeconds: 5 }));
    const loaded = await app.request(...post("/models/load", { model: "scripted" }));
    expect(await loaded.json()).toEqual({ model: MODEL, state: "ready", context_length: 4096 });
    const unload = async () => (await app.request(...post("/models/unload", { model: MODEL }))).json();
    expect(await unload()).toEqual({ model: MODEL, state: "available", was_loaded: true });
    expect(await unload()).toEqual({ model: MODEL, state: "available", was_loaded: false });
    expect((await app.request(...post("/models/unload", { model: "org/x" }))).status).toBe(404);
    expect((await app.request(...post("/models/load", { model: "org/x" }))).status).toBe(404);
  });

  test("work as Ollama's clients unload: a keep_alive of 0 without a prompt", async () => {
    const { app, models } = keyed();
    const body = { model: MODEL, keep_alive: 0 };
    expect((await app.request(...post("/api/generate", body, "user"))).status).toBe(403);
    const reply = await app.request(...post("/api/generate", body));
    expect(await reply.json()).toMatchObject({ done: true, done_reason: "unload" });
    expect(models.info.state).toBe("available");
    expect(await (await app.request(...post("/api/generate", { model: MODEL }))).json()).toMatchObject({
      done_reason: "load",
    });
  });
});

test("health shows the node's id where it has one", async () => {
  const app = createApp({ models: scriptedModels(sayScript("x")), nodeId: "0123456789abcdef" });
  expect(await (await app.request("/health")).json()).toEqual({ status: "ok", node: "0123456789abcdef" });
});

describe("measured completions", () => {
  test("come with their speed", async () => {
    const app = createApp({ models: scriptedModels({ ...sayScript("hello"), cachedTokens: 1 }) });
    const reply = await app.request("/bench/chat/completions", chat());
    const body = (await reply.json()) as {
      usage: { prompt_tokens: number };
      generation_stats: Record<string, unknown> & { itl_ms: Record<string, number> };
    };
    const stats = body.generation_stats;
    expect(body).toMatchObject({ object: "chat.completion", choices: [{ message: { content: "hello" } }] });
    // The script says 1 ms of prefill and 1 ms a token.
    expect(stats).toMatchObject({
      prompt_tokens: body.usage.prompt_tokens,
      cached_tokens: 1,
      generation_tokens: 6,
      prompt_tps: (body.usage.prompt_tokens - 1) * 1000,
      generation_tps: (5 * 1000) / 6,
      prefill_ms: 1,
      decode_ms: 6,
      peak_memory_bytes: null,
      rank_peak_memory_bytes: [null],
    });
    expect(stats.ttft_ms).toBeGreaterThan(0);
    expect(stats.itl_ms.p50).toBeLessThanOrEqual(stats.itl_ms.p99 ?? 0);
    expect(stats.itl_ms.p99).toBeLessThanOrEqual(stats.itl_ms.max ?? 0);
  });

  test("refuse to stream, and errors are those of the chat", async () => {
    const models = scriptedModels(sayScript("hello"));
    const app = createApp({ models });
    const streamed = await app.request("/bench/chat/completions", chat({ stream: true }));
    expect(streamed.status).toBe(400);
    expect(await streamed.json()).toMatchObject({ error: { param: "stream" } });
    const wrong = await app.request("/bench/chat/completions", chat({ temperature: 9 }));
    expect(await wrong.json()).toMatchObject({ error: { param: "temperature" } });
    await until(() => models.engine.running === 0, "the stream is given up");
  });
});
