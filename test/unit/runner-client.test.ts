// RunnerClient with real processes (fake-runner.ts): streams, cancellation, and every way in which a runner can end.

import { afterEach, describe, expect, test } from "bun:test";
import { EventStream } from "../../src/engine/event-stream.ts";
import { LineSplitter } from "../../src/engine/line-splitter.ts";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { RunnerClient, type RunnerClientOptions } from "../../src/engine/runner-client.ts";
import { CaravanError } from "../../src/errors.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { until } from "../tools/until.ts";

const FAKE = [process.execPath, new URL("fake-runner.ts", import.meta.url).pathname];
const clients: RunnerClient[] = [];

afterEach(async () => {
  await Promise.all(clients.splice(0).map((client) => client.close()));
});

function client(model: string, more: Partial<RunnerClientOptions> = {}): RunnerClient {
  const made = new RunnerClient({ model, modelDir: "/nowhere", command: FAKE, onLog: () => {}, ...more });
  clients.push(made);
  return made;
}

function request(id: string, first: number, max_tokens: number): GenerateRequest {
  return { id, tokens: [first], max_tokens, stop_tokens: [], sampling: GREEDY };
}

async function collect(stream: AsyncIterable<GenerateEvent>): Promise<GenerateEvent[]> {
  const events: GenerateEvent[] = [];
  for await (const event of stream) events.push(event);
  return events;
}

const tokensOf = (events: GenerateEvent[]): number[] =>
  events.flatMap((event) => (event.type === "token" ? [event.token] : []));

describe("a runner client", () => {
  test("starts the runner, reports progress and hands every stream its own events", async () => {
    const progress: [number, string][] = [];
    const engine = client("ok", { onProgress: (fraction, detail) => progress.push([fraction, detail]) });
    expect(engine.status().state).toBe("loading");
    const streams = [0, 1, 2].map((i) => collect(engine.generate(request(`r${i}`, i * 100, 20))));
    const results = await Promise.all(streams);
    results.forEach((events, i) => {
      expect(tokensOf(events)).toEqual(Array.from({ length: 20 }, (_, k) => i * 100 + k));
      expect(events.at(-1)).toMatchObject({ type: "finish", reason: "length" });
    });
    expect(progress).toEqual([[0.5, "half"]]);
    expect(engine.status()).toMatchObject({ state: "ready", context: 100 });
  });

  test("cancels by id with a finish event, and by leaving the loop", async () => {
    const engine = client("ok");
    const byId = collect(engine.generate(request("a", 0, 1_000_000)));
    await engine.ready();
    for await (const event of engine.generate(request("b", 0, 1_000_000))) if (event.type === "token") break;
    engine.cancel("a");
    engine.cancel("a");
    expect((await byId).at(-1)).toMatchObject({ type: "finish", reason: "cancelled" });
    const after = await collect(engine.generate(request("c", 5, 2)));
    expect(tokensOf(after)).toEqual([5, 6]);
    await until(() => engine.status().running === 0, "the runner to have stopped b");
  });

  test("ends what runs and what comes later for the reason given, whatever closes it then", async () => {
    const engine = client("ok");
    const running = collect(engine.generate(request("a", 0, 1_000_000)));
    await engine.ready();
    engine.endRequests(new CaravanError("cluster_degraded", "b is gone", { retryAfterSeconds: 2 }));
    const later = collect(engine.generate(request("b", 0, 10)));
    await engine.close();
    for (const events of [await running, await later])
      expect(events.at(-1)).toMatchObject({
        type: "error",
        error: { code: "cluster_degraded", message: "b is gone" },
      });
  });

  test("cancels a request that still waits for the model", async () => {
    const engine = client("ok");
    const stream = collect(engine.generate(request("a", 0, 10)));
    engine.cancel("a");
    expect(await stream).toMatchObject([{ type: "finish", reason: "cancelled" }]);
  });

  test("refuses an id that is already running", async () => {
    const engine = client("ok");
    const first = collect(engine.generate(request("a", 0, 3)));
    expect(() => engine.generate(request("a", 0, 3))).toThrow("already running");
    await first;
  });

  test("ends every stream within a second when the runner is killed, and serves the next request", async () => {
    await inTime(1000, async () => {
      const engine = client("ok");
      const begun = new Set<string>();
      const streams = ["a", "b"].map(async (id) => {
        const events: GenerateEvent[] = [];
        for await (const event of engine.generate(request(id, 0, 1_000_000))) {
          events.push(event);
          begun.add(id);
        }
        return events;
      });
      await until(() => begun.size === 2, "both answers have begun");
      process.kill(engine.pid as number, "SIGKILL");
      const ms = await msOf(() => Promise.all(streams));
      for (const stream of streams)
        expect((await stream).at(-1)).toMatchObject({
          type: "error",
          error: { code: "engine_failed", retry_after_seconds: 2 },
        });
      expect(engine.status()).toMatchObject({ state: "failed", error: { code: "engine_failed" } });
      expect(tokensOf(await collect(engine.generate(request("c", 7, 3))))).toEqual([7, 8, 9]);
      expect(engine.status().state).toBe("ready");
      return ms;
    });
  });

  test("sends a request to the next runner when this one died without a word about it", async () => {
    const engine = client("ok");
    await engine.ready();
    process.kill(engine.pid as number, "SIGKILL");
    expect(tokensOf(await collect(engine.generate(request("a", 7, 3))))).toEqual([7, 8, 9]);
  });

  test("passes on the error of a model that cannot be loaded", async () => {
    const engine = client("no-file");
    const wanted = { code: "bad_file", message: "no such model", where: "/nowhere" };
    await expect(engine.ready()).rejects.toMatchObject(wanted);
    expect(await collect(engine.generate(request("a", 0, 1)))).toMatchObject([
      { type: "error", error: wanted },
    ]);
    expect(engine.status()).toMatchObject({ state: "failed", error: wanted });
  });

  test("says how a crash looked, and starts again no faster than its pauses allow", async () => {
    const engine = client("crash");
    const started = performance.now();
    for (let i = 0; i < 4; i++) {
      const events = await collect(engine.generate(request(`r${i}`, 0, 1)));
      expect(events).toMatchObject([{ type: "error", error: { code: "engine_failed" } }]);
      const error = events[0];
      expect(error?.type === "error" && error.error.message).toContain("exit code 3");
      expect(error?.type === "error" && error.error.message).toContain("segmentation fault in the fake");
    }
    // 0 + 0 + 250 + 500 ms.
    expect(performance.now() - started).toBeGreaterThan(740);
  });

  test("kills a runner that answers nothing, and ends its streams", async () => {
    const engine = client("hang", { hangLimitMs: 300 });
    const events = await collect(engine.generate(request("a", 0, 1)));
    expect(events.at(-1)).toMatchObject({ type: "error", error: { code: "engine_failed" } });
  });

  test("ends the streams of a runner that sends garbage", async () => {
    const engine = client("garbage");
    const events = await collect(engine.generate(request("a", 0, 1_000_000)));
    const last = events.at(-1);
    expect(last?.type === "error" && last.error.message).toContain("unreadable");
  });

  test("that cannot be started at all fails its requests", async () => {
    const engine = client("ok", { command: ["/no/such/program"] });
    expect(await collect(engine.generate(request("a", 0, 1)))).toMatchObject([
      { type: "error", error: { code: "engine_failed", where: "/no/such/program" } },
    ]);
  });

  test("ends everything when it is closed, and takes nothing afterwards", async () => {
    const engine = client("ok");
    const stream = collect(engine.generate(request("a", 0, 1_000_000)));
    await engine.ready();
    const pid = engine.pid as number;
    await engine.close();
    expect((await stream).at(-1)).toMatchObject({ type: "error", error: { code: "shutting_down" } });
    expect(() => process.kill(pid, 0)).toThrow();
    expect(engine.status().state).toBe("closed");
    expect(await collect(engine.generate(request("b", 0, 1)))).toMatchObject([
      { error: { code: "shutting_down" } },
    ]);
  });
});

describe("an event stream", () => {
  test("ends a read that waits when the reader leaves, and says so once", async () => {
    let left = 0;
    const stream = new EventStream(() => left++);
    const read = stream.next();
    await stream.return();
    await stream.return();
    expect(await read).toEqual({ done: true, value: undefined });
    expect(left).toBe(1);
    stream.push({ type: "token", id: "a", token: 1 });
    expect(await stream.next()).toEqual({ done: true, value: undefined });
  });
});

describe("lines", () => {
  test("come out the same however the bytes are cut", () => {
    const bytes = new TextEncoder().encode('{"a":"ü€😀"}\n\nlast\nrest');
    for (let size = 1; size <= bytes.length; size++) {
      const splitter = new LineSplitter();
      const lines: string[] = [];
      for (let i = 0; i < bytes.length; i += size) lines.push(...splitter.push(bytes.subarray(i, i + size)));
      expect(lines).toEqual(['{"a":"ü€😀"}', "", "last"]);
    }
  });
});
