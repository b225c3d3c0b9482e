// Requests that one node passes to another: streams arrive as they are made, leaving cancels, a lost node ends the stream in
// words that its reader understands.

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createApp } from "../../src/api/app.ts";
import type { ClusterService, PassedRequest } from "../../src/api/cluster/service.ts";
import { type CallOptions, callNode, serveCall } from "../../src/cluster/net/call.ts";
import type { Channel } from "../../src/cluster/net/channel.ts";
import { newCluster } from "../../src/cluster/net/cluster-file.ts";
import { dial } from "../../src/cluster/net/dial.ts";
import { newIdentity } from "../../src/cluster/net/identity.ts";
import { listen } from "../../src/cluster/net/listener.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const LOG = createLogger({ level: "silent" });
const HOME = newCluster("home");
const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** Both ends of a connection between members. */
async function connection(): Promise<{ caller: Channel; callee: Channel }> {
  const settings = (identity: { id: string }, name: string) => ({
    cluster: HOME,
    node: { id: identity.id, name, version: "1", incarnation: 1, port: 0 },
  });
  const [a, b] = [newIdentity(), newIdentity()];
  const arrived = Promise.withResolvers<Channel>();
  const listener = await listen({
    identity: b,
    settings: () => settings(b, "b"),
    host: "127.0.0.1",
    port: 0,
    log: LOG,
    onPeer: (channel) => arrived.resolve(channel),
  });
  cleanups.push(() => listener.close());
  const { channel } = await dial({
    identity: a,
    settings: settings(a, "a"),
    address: `127.0.0.1:${listener.port}`,
    purpose: "call",
  });
  cleanups.push(() => channel.close());
  return { caller: channel, callee: await arrived.promise };
}

interface Call {
  reply: Promise<Response>;
  heard: () => number;
  ended: () => number;
  callee: Channel;
  caller: Channel;
}

async function call(
  handle: (request: Request) => Promise<Response>,
  request: Partial<CallOptions["request"]> = {},
  maxBodyBytes = 1 << 20,
): Promise<Call> {
  const { caller, callee } = await connection();
  void serveCall({ channel: callee, maxBodyBytes, handle });
  let heard = 0;
  let ended = 0;
  const reply = callNode({
    channel: caller,
    request: {
      method: "POST",
      path: "/v1/chat/completions?x=1",
      headers: new Headers({ "x-request-id": "r1", authorization: "Bearer client-key", host: "example" }),
      body: Buffer.from("{}"),
      ...request,
    },
    onHeard: () => {
      heard++;
    },
    onEnd: () => {
      ended++;
    },
    onBroken: (error) => Buffer.from(`last words: ${error.code}`),
  });
  return { reply, heard: () => heard, ended: () => ended, callee, caller };
}

/** A stream whose pieces the test gives. */
function given(signal?: AbortSignal) {
  let controller: ReadableStreamDefaultController<Uint8Array> | undefined;
  let cancelled = false;
  const body = new ReadableStream<Uint8Array>({
    start(made) {
      controller = made;
    },
    cancel() {
      cancelled = true;
    },
  });
  signal?.addEventListener("abort", () => {
    cancelled = true;
  });
  return {
    reply: new Response(body, { headers: { "content-type": "text/event-stream" } }),
    give: (text: string) => controller?.enqueue(Buffer.from(text)),
    end: () => controller?.close(),
    cancelled: () => cancelled,
  };
}

describe("a call", () => {
  test("carries path, body and headers, but no keys of the client, and the whole answer back", async () => {
    let seen: { url: string; headers: Headers; body: string } | undefined;
    const body = "x".repeat(700_000);
    const { reply, ended } = await call(
      async (request) => {
        seen = { url: request.url, headers: request.headers, body: await request.text() };
        return Response.json({ answer: body }, { status: 201, headers: { "retry-after": "3" } });
      },
      { body: Buffer.from(body) },
    );
    const answer = await reply;
    expect(answer.status).toBe(201);
    expect(answer.headers.get("retry-after")).toBe("3");
    expect(await answer.json()).toEqual({ answer: body });
    expect(new URL(seen?.url ?? "").search).toBe("?x=1");
    expect(seen?.body).toBe(body);
    expect(seen?.headers.get("x-request-id")).toBe("r1");
    expect(seen?.headers.get("authorization")).toBeNull();
    expect(ended()).toBe(1);
  });

  test("streams: each piece arrives before the next is made", async () => {
    const stream = given();
    const { reply, ended } = await call(async () => stream.reply);
    const reader = (await reply).body?.getReader();
    for (const piece of ["one", "two", "three"]) {
      stream.give(piece);
      const { value } = (await reader?.read()) ?? {};
      expect(Buffer.from(value ?? []).toString()).toBe(piece);
    }
    expect(ended()).toBe(0);
    stream.end();
    expect((await reader?.read())?.done).toBe(true);
    expect(ended()).toBe(1);
  });

  test("that gives nothing for a while is heard to be alive", async () => {
    const late = Promise.withResolvers<Response>();
    const { reply, heard } = await call(() => late.promise);
    await until(() => heard() >= 3, "signs of life");
    late.resolve(new Response("done"));
    expect(await (await reply).text()).toBe("done");
  });

  test("whose client leaves is cancelled at the other node within a moment", async () => {
    await inTime(100, async () => {
      let stream: ReturnType<typeof given> | undefined;
      const { reply, ended } = await call(async (request) => {
        stream = given(request.signal);
        return stream.reply;
      });
      const { body } = await reply;
      const ms = await msOf(async () => {
        await body?.cancel();
        await until(() => stream?.cancelled() === true, "the other node cancels");
      });
      expect(ended()).toBe(1);
      return ms;
    });
  });

  test("whose node is lost in the middle ends with words for the reader; before the answer, with a retryable error", async () => {
    const stream = given();
    const first = await call(async () => stream.reply);
    stream.give("half ");
    const answer = await first.reply;
    const reader = answer.body?.getReader();
    await reader?.read();
    first.callee.close();
    expect(Buffer.from((await reader?.read())?.value ?? []).toString()).toBe("last words: cluster_degraded");
    expect((await reader?.read())?.done).toBe(true);

    const second = await call(() => new Promise(() => undefined));
    second.callee.close();
    await expect(second.reply).rejects.toMatchObject({ code: "cluster_degraded", status: 503 });
    expect(second.ended()).toBe(1);
  });

  test("to a node that falls silent ends after two seconds", async () => {
    await inTime(3000, async () => {
      const stream = given();
      const { reply, callee } = await call(async () => stream.reply);
      const { body } = await reply;
      callee.send = () => undefined;
      return msOf(async () => expect(await new Response(body).text()).toBe("last words: cluster_degraded"));
    });
  });

  test("with a body that is too large for the other node is broken off", async () => {
    const { reply } = await call(async () => new Response("never"), { body: Buffer.alloc(3000) }, 1000);
    await expect(reply).rejects.toMatchObject({ code: "cluster_degraded" });
  });
});

describe("the API of a node in a cluster", () => {
  const body = JSON.stringify({ model: "far", max_tokens: 7, messages: [{ role: "user", content: "Hi" }] });

  const here = { release: () => undefined };

  function app(pass: ClusterService["pass"], mayPass = true) {
    const service: ClusterService = {
      state: () => ({ cluster: "home" }),
      watch: () => () => undefined,
      accept: async () => "x",
      plan: async (model, asked) => ({ model, asked }),
      createInstance: async (model) => {
        if (model === "none") throw new CaravanError("model_not_found", "no such model");
        return "id";
      },
      stopInstance: async (id) => id === "known",
      removeNode: async (name) => ({ name, told: [], away: [] }),
      cleanParts: async (model) => model?.length ?? 0,
      mayPass: () => mayPass,
      pass,
    };
    return createApp({
      models: scriptedModels(sayScript("here")),
      cluster: service,
      settings: { adminKeys: ["admin-key"], apiKeys: ["user-key"] },
    });
  }
  const ask = (key = "user-key") => ({
    method: "POST",
    body,
    headers: { authorization: `Bearer ${key}`, host: "localhost" },
  });

  test("passes a request on with its name, size and body, and gives the answer back", async () => {
    let passed: PassedRequest | undefined;
    const reply = await app(async (request) => {
      passed = request;
      request.onEnd();
      return new Response("from afar", { headers: { "content-type": "text/plain" } });
    }).request("http://localhost/v1/chat/completions", ask());
    expect(await reply.text()).toBe("from afar");
    expect(passed?.model).toBe("far");
    expect(passed?.tokens).toBe(Math.ceil(body.length / 4) + 7);
    expect(Buffer.from(passed?.body ?? []).toString()).toBe(body);
  });

  test("asks for the client's key before anything is passed on, and trusts what a member passes here", async () => {
    let passes = 0;
    const made = app(async () => {
      passes++;
      return here;
    });
    expect((await made.request("http://localhost/v1/chat/completions", ask("wrong"))).status).toBe(401);
    expect(passes).toBe(0);
    const keyless = new Request("http://localhost/v1/chat/completions", { method: "POST", body });
    const reply = await made.fetch(keyless, { fromMember: true });
    expect(reply.status).toBe(404); // no model here, and not passed on again
    expect(passes).toBe(0);
  });

  test("answers itself, from the same body, where nobody else should", async () => {
    const released: string[] = [];
    const made = app(async ({ model }) => ({ release: () => released.push(model) }));
    const reply = await made.request("http://localhost/v1/chat/completions", ask());
    expect(reply.status).toBe(404);
    expect(await reply.json()).toMatchObject({ error: { code: "model_not_found" } });
    expect(released).toEqual(["far"]);
  });

  test("ends a broken stream in the form of each API family", async () => {
    const words: Record<string, string> = {};
    for (const [path, type] of [
      ["/v1/chat/completions", "text/event-stream"],
      ["/v1/messages", "text/event-stream"],
      ["/api/chat", "application/x-ndjson"],
    ] as const) {
      await app(async ({ onBroken, onEnd }) => {
        const error = new CaravanError("cluster_degraded", "lost");
        const last = onBroken(error, new Response(null, { headers: { "content-type": type } }));
        words[path] = Buffer.from(last ?? []).toString();
        expect(
          onBroken(error, new Response(null, { headers: { "content-type": "application/json" } })),
        ).toBeUndefined();
        onEnd();
        return new Response("");
      }).request(`http://localhost${path}`, ask());
    }
    expect(words["/v1/chat/completions"]).toMatch(/^\n\ndata: \{"error":\{"message":"lost\.".*\n\n$/);
    expect(words["/v1/messages"]).toMatch(/^\n\nevent: error\ndata: \{"type":"error"/);
    expect(JSON.parse(words["/api/chat"] ?? "")).toHaveProperty("error");
  });

  test("keeps instances and codes for administrators, and plans for everybody", async () => {
    const made = app(async () => here);
    const send = (path: string, method: string, key: string, value?: object) =>
      made.request(`http://localhost${path}`, {
        method,
        headers: { authorization: `Bearer ${key}`, host: "localhost" },
        ...(value === undefined ? {} : { body: JSON.stringify(value) }),
      });
    expect((await send("/cluster/instances", "POST", "user-key", { model: "m" })).status).toBe(403);
    expect((await send("/cluster/accept", "POST", "user-key", { code: "x" })).status).toBe(403);
    expect((await send("/cluster/instances", "POST", "admin-key", { model: "m" })).status).toBe(202);
    expect((await send("/cluster/instances", "POST", "admin-key", { model: "none" })).status).toBe(404);
    expect((await send("/cluster/instances", "POST", "admin-key", { model: "m", tensor: 0 })).status).toBe(
      400,
    );
    expect((await send("/cluster/instances/known", "DELETE", "admin-key")).status).toBe(200);
    expect((await send("/cluster/instances/other", "DELETE", "admin-key")).status).toBe(404);
    const plan = await send("/cluster/plan?model=m&tensor=2", "GET", "user-key");
    expect(await plan.json()).toEqual({ model: "m", asked: { tensor: 2 } });
    expect((await send("/cluster/plan?model=m&tensor=two", "GET", "user-key")).status).toBe(400);
  });

  test("streams the state at the beginning and at changes", async () => {
    const stream = await app(async () => here).request("http://localhost/cluster/events", {
      headers: { authorization: "Bearer user-key", host: "localhost" },
    });
    const reader = stream.body?.getReader();
    const { value } = (await reader?.read()) ?? {};
    expect(Buffer.from(value ?? []).toString()).toBe('event: state\ndata: {"cluster":"home"}\n\n');
    await reader?.cancel();
  });
});
