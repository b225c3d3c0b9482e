// The real runner process on a small random model: generation, a kill in the middle, and its end with its parent.

import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ownCommand } from "../../src/engine/child-process.ts";
import { LineSplitter } from "../../src/engine/line-splitter.ts";
import type { GenerateEvent, RunnerMessage } from "../../src/engine/protocol.ts";
import { RunnerClient, type RunnerClientOptions } from "../../src/engine/runner-client.ts";
import { collect, tinyRequest as request, tokensOf } from "../tools/engine-requests.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { writeTinyLlama4 } from "../tools/tiny-llama4.ts";
import { until } from "../tools/until.ts";

let dir: string;
const clients: RunnerClient[] = [];
/** Tokens of an answer that is not over before the test does something to it, however slow the test is. */
const LONG = 60_000;

beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-runner-"));
  writeTinyLlama4(dir, 7, { contextTokens: 65_536 });
});
afterEach(async () => {
  await Promise.all(clients.splice(0).map((client) => client.close()));
});
afterAll(() => rmSync(dir, { recursive: true }));

function client(more: Partial<RunnerClientOptions> = {}): RunnerClient {
  const made = new RunnerClient({
    model: "tiny",
    modelDir: dir,
    threads: 1,
    context: 2048,
    streams: 4,
    onLog: () => {},
    ...more,
  });
  clients.push(made);
  return made;
}

describe("the runner", () => {
  test("loads a model, says what it is, and generates the same tokens alone and together", async () => {
    const progress: number[] = [];
    const engine = client({ onProgress: (fraction) => progress.push(fraction) });
    const requests = [5, 40, 90].map((length) => request(`alone${length}`, length, 30));
    const alone: number[][] = [];
    for (const each of requests) alone.push(tokensOf(await collect(engine.generate(each))));
    const together = await Promise.all(
      requests.map((each) => collect(engine.generate({ ...each, id: `with${each.tokens.length}` }))),
    );
    expect(together.map(tokensOf)).toEqual(alone);
    for (const events of together) expect(events.at(-1)).toMatchObject({ type: "finish", reason: "length" });
    expect(progress.length).toBeGreaterThan(1);
    const status = engine.status();
    expect(status).toMatchObject({
      state: "ready",
      device: "cpu",
      threads: 1,
      context: 2048,
      policy: { mode: "batched" },
    });
    expect(status.memory?.weights_mapped).toBeGreaterThan(0);
    expect(status.pages?.chunked.total).toBeGreaterThan(0);
  });

  test("runs one stream at a time when the operator asks for it", async () => {
    const engine = client({ scheduling: "sequential" });
    const both = ["a", "b"].map((id) => collect(engine.generate(request(id, 8, 20))));
    const ends = (await Promise.all(both)).map((events) => events.at(-1));
    const queued = ends.map((end) => (end?.type === "finish" ? end.timing.queue_ms : Number.NaN));
    const first = ends[0]?.type === "finish" ? ends[0].timing : undefined;
    expect(queued[1]).toBeGreaterThan(first?.decode_ms ?? Number.NaN);
    expect(engine.status().policy).toEqual({ mode: "sequential", reason: "sequential, as configured" });
  });

  test("that is killed while it generates ends its streams within a second; the next request is answered", async () => {
    const engine = client({ context: 65_536 });
    const wanted = tokensOf(await collect(engine.generate(request("before", 20, 10))));
    await inTime(1000, async () => {
      const events: GenerateEvent[][] = [[], []];
      const ended = events.map(async (list, i) => {
        for await (const event of engine.generate(request(`s${i}`, 20, LONG))) list.push(event);
      });
      await until(
        () => events.every((list) => list.some(({ type }) => type === "token")),
        "both streams to run",
      );
      process.kill(engine.pid as number, "SIGKILL");
      const ms = await msOf(() => Promise.all(ended));
      for (const list of events)
        expect(list.at(-1)).toMatchObject({ type: "error", error: { code: "engine_failed" } });
      return ms;
    });
    expect(tokensOf(await collect(engine.generate(request("after", 20, 10))))).toEqual(wanted);
  });

  test("stops computing for a client that has gone, and frees its pages", async () => {
    const engine = client();
    for await (const event of engine.generate(request("a", 20, 2000))) if (event.type === "token") break;
    await collect(engine.generate(request("b", 20, 300)));
    await until(() => engine.status().running === 0, "the abandoned stream to end");
    const { pages } = engine.status();
    expect(pages?.full.free).toBe(pages?.full.total as number);
    expect(pages?.chunked.free).toBe(pages?.chunked.total as number);
  });

  test("refuses a model that is not there with the file's name", async () => {
    const engine = client({ modelDir: join(dir, "missing") });
    await expect(engine.ready()).rejects.toMatchObject({
      code: "bad_file",
      where: join(dir, "missing", "config.json"),
    });
  });

  test("ends when its parent is gone, even in the middle of a generation, and not at an interrupt", async () => {
    const child = Bun.spawn(ownCommand("runner"), { stdin: "pipe", stdout: "pipe", stderr: "inherit" });
    child.stdin.write(`${JSON.stringify({ model: "tiny", modelDir: dir, threads: 1, context: 2048 })}\n`);
    child.stdin.write(`${JSON.stringify({ type: "generate", request: request("a", 8, 2000) })}\n`);
    child.stdin.flush();
    const lines = new LineSplitter();
    for await (const chunk of child.stdout) {
      const messages = lines.push(chunk).map((line): RunnerMessage => JSON.parse(line));
      if (messages.some((message) => message.type === "ready")) child.kill("SIGINT");
      if (messages.some((message) => message.type === "token")) break;
    }
    expect(child.exitCode).toBeNull();
    child.stdin.end();
    expect(await child.exited).toBe(0);
  });
});
