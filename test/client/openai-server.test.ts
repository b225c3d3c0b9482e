// The server on a real socket: its end in order, a port that is taken, large bodies, and readers that are slow.

import { afterEach, describe, expect, test } from "bun:test";
import { connect, type Socket } from "node:net";
import OpenAI from "openai";
import { createApp } from "../../src/api/app.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { drainOnSignals, type RunningServer, startServer } from "../../src/api/server.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { bytesOf } from "../tools/byte-text.ts";
import type { Script } from "../tools/scripted-engine.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

const running: RunningServer[] = [];
const sockets: Socket[] = [];
const log = createLogger({ level: "silent" });
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Hi" }];

function start(script: Script, { drainSeconds = 0, settings = {} as Partial<ApiSettings> } = {}) {
  const models = scriptedModels(script);
  const lifecycle = new Lifecycle();
  const app = createApp({ models, lifecycle, settings });
  const server = startServer({ app, lifecycle, host: "127.0.0.1", port: 0, drainSeconds, keyed: false, log });
  running.push(server);
  const client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "unused", maxRetries: 0 });
  return { models, server, client, lifecycle };
}

/** A raw connection that sends `request` and collects what comes. */
function dial(server: RunningServer, request: string): { socket: Socket; received: () => string } {
  const socket = connect(server.port, "127.0.0.1");
  sockets.push(socket);
  let text = "";
  socket.on("data", (data) => {
    text += data.toString("latin1");
  });
  socket.on("error", () => undefined);
  socket.write(request);
  return { socket, received: () => text };
}

function postHead(length: number): string {
  return `POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${length}\r\n\r\n`;
}

/** A gate at the given event that the test opens. */
function gateAt(position: number): { gate: NonNullable<Script["gate"]>; open: () => void } {
  let open: () => void = () => undefined;
  const opened = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { gate: (at) => (at === position ? opened : undefined), open: () => open() };
}

afterEach(async () => {
  for (const socket of sockets.splice(0)) socket.destroy();
  for (const server of running.splice(0)) {
    void server.drain();
    await server.drain();
  }
});

test("a request without a Host header (HTTP/1.0) is refused with 400, whatever its path", async () => {
  const { server } = start(sayScript("hello"));
  for (const path of ["/v1/models", "/health", "/"]) {
    const { received } = dial(server, `GET ${path} HTTP/1.0\r\n\r\n`);
    await until(() => received().includes("}}"), "the reply is there");
    expect(received()).toStartWith("HTTP/1.1 400");
    expect(received()).toContain("Host header");
  }
});

describe("shutdown", () => {
  test("refuses new requests with shutting_down while running ones finish", async () => {
    const { gate, open } = gateAt(2);
    const { server, client, models } = start({ ...sayScript("abcd"), gate }, { drainSeconds: 10 });
    const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
    const drained = server.drain();
    const refused = await fetch(`${server.url}/v1/models`);
    expect(refused.status).toBe(503);
    expect(refused.headers.get("retry-after")).toBe("10");
    expect(await refused.json()).toMatchObject({ error: { code: "shutting_down", type: "server_error" } });
    expect((await fetch(`${server.url}/health`)).status).toBe(200);
    open();
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
    expect(text).toBe("abcd");
    await drained;
    expect(models.engine.cancelled).toEqual([]);
    expect(
      await fetch(`${server.url}/health`).then(
        () => "reached",
        () => "closed",
      ),
    ).toBe("closed");
  });

  test("at the limit ends running requests with an error, not with silence", async () => {
    const { gate } = gateAt(2);
    const { server, client, models } = start({ ...sayScript("abcd"), gate }, { drainSeconds: 0.05 });
    const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
    const whole = client.chat.completions.create({ model: MODEL, messages }).catch((thrown) => thrown);
    await until(() => models.engine.running === 2, "both requests run");
    const drained = server.drain();
    const error = await Array.fromAsync(stream).catch((thrown) => thrown);
    expect(error).toBeInstanceOf(OpenAI.APIError);
    expect(error).toMatchObject({ code: "shutting_down" });
    expect(await whole).toMatchObject({ status: 503, code: "shutting_down" });
    await drained;
    expect(models.engine.running).toBe(0);
  });

  test("a second signal ends it at once", async () => {
    const { gate } = gateAt(1);
    const { server, client, models, lifecycle } = start(
      { ...sayScript("abcd"), gate },
      { drainSeconds: 600 },
    );
    const reply = client.chat.completions.create({ model: MODEL, messages }).catch((thrown) => thrown);
    await until(() => models.engine.running === 1, "the request runs");
    const remove = drainOnSignals(server);
    process.kill(process.pid, "SIGTERM");
    await until(() => lifecycle.draining, "the first signal arrives");
    expect(models.engine.running).toBe(1);
    expect((await fetch(`${server.url}/ready`)).status).toBe(503);
    process.kill(process.pid, "SIGTERM");
    await server.stopped;
    remove();
    expect(await reply).toMatchObject({ code: "shutting_down" });
  });
});

describe("binding", () => {
  test("a port that is taken is an error that names the port and the flag", () => {
    const { server, lifecycle } = start(sayScript("x"));
    const app = createApp({ models: scriptedModels(sayScript("x")), lifecycle });
    const again = () =>
      startServer({
        app,
        lifecycle,
        host: "127.0.0.1",
        port: server.port,
        drainSeconds: 0,
        keyed: true,
        log,
      });
    expect(again).toThrow(CaravanError);
    try {
      again();
    } catch (thrown) {
      expect(thrown).toMatchObject({ param: "--port", where: `127.0.0.1:${server.port}` });
      expect((thrown as CaravanError).toText()).toContain(`Port ${server.port} is already in use`);
      expect((thrown as CaravanError).toText()).toContain("--port");
    }
  });

  test("an address of another machine is an error that names the flag", () => {
    const { lifecycle } = start(sayScript("x"));
    const app = createApp({ models: scriptedModels(sayScript("x")), lifecycle });
    const bind = () =>
      startServer({ app, lifecycle, host: "192.0.2.1", port: 0, drainSeconds: 0, keyed: true, log });
    expect(bind).toThrow("cannot listen on 192.0.2.1:0");
  });
});

describe("bodies", () => {
  test("a declared length over the limit is 413 before anything is sent", async () => {
    const { server } = start(sayScript("x"));
    const { received } = dial(server, postHead(50_000_000_000));
    await until(() => received().includes("request_too_large"), "the refusal arrives");
    expect(received()).toStartWith("HTTP/1.1 413");
  });

  test("a body that stops half-way is given up and the connection freed", async () => {
    const { server, lifecycle } = start(sayScript("x"), { settings: { bodyTimeoutMs: 50 } });
    const { received } = dial(server, `${postHead(100)}{"model":`);
    await until(() => received().includes("did not arrive"), "the refusal arrives");
    expect(received()).toStartWith("HTTP/1.1 400");
    expect(lifecycle.running).toBe(0);
  });
});

describe("readers", () => {
  const body = JSON.stringify({ model: MODEL, messages, stream: true, max_tokens: 4_000_000 });

  test("one that stops reading stops the flow, and leaving cancels", async () => {
    const models = scriptedModels(
      {
        answer: function* () {
          for (;;) yield* bytesOf("more and more ");
        },
      },
      { contextLength: 8_000_000 },
    );
    const lifecycle = new Lifecycle();
    const app = createApp({ models, lifecycle });
    const server = startServer({
      app,
      lifecycle,
      host: "127.0.0.1",
      port: 0,
      drainSeconds: 0,
      keyed: true,
      log,
    });
    running.push(server);
    const { socket } = dial(server, postHead(body.length) + body);
    socket.pause();
    await until(() => models.engine.produced > 100, "the stream runs");
    let before = 0;
    let quiet = 0;
    await until(() => {
      quiet = models.engine.produced === before ? quiet + 1 : 0;
      before = models.engine.produced;
      return quiet > 50;
    }, "production stops");
    // What the kernel's socket buffers take, at about 200 bytes a token; far below the 4 M tokens asked for.
    expect(models.engine.produced).toBeLessThan(200_000);
    socket.destroy();
    await until(() => models.engine.running === 0, "the engine ends the request");
    expect(lifecycle.running).toBe(0);
  });

  test("one that closes its connection while a whole reply is made cancels it", async () => {
    const { gate } = gateAt(1);
    const { server, models, lifecycle } = start({ ...sayScript("abc"), gate });
    const text = JSON.stringify({ model: MODEL, messages });
    const { socket } = dial(server, postHead(text.length) + text);
    await until(() => models.engine.running === 1, "the engine runs");
    socket.end();
    await until(() => models.engine.running === 0, "the engine ends the request");
    expect(models.engine.cancelled).toHaveLength(1);
    expect(lifecycle.running).toBe(0);
  });
});
