// `caravan serve` as a user has it: models by name, crashes of the runner, the end of the node, and the chat in the
// terminal that uses it. The client is the openai package.

import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { rmSync } from "node:fs";
import { join } from "node:path";
import OpenAI from "openai";
import { built, isAlive, type Node, Place, PROGRAM, runnersOf } from "../tools/built-caravan.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { until } from "../tools/until.ts";

const place = new Place();
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Hi" }];
/** Longer than any test lasts. */
const LONG = { max_completion_tokens: 200_000, ignore_eos: true, temperature: 0 };
const SHORT = { max_completion_tokens: 8, ignore_eos: true, temperature: 0 };

beforeAll(() => {
  writeTinyChatModel(join(place.models, "first"), 1);
  writeTinyChatModel(join(place.models, "second"), 2);
  writeTinyChatModel(place.path("elsewhere"), 3);
});
afterAll(() => place.remove());

const nodes: Node[] = [];
afterEach(async () => {
  for (const node of nodes.splice(0)) {
    const runners = runnersOf(node.pid);
    node.kill("SIGKILL");
    await node.ended;
    await until(() => !runners.some(isAlive), "the runners of a killed node end");
  }
});

async function serve(args: string[] = [], env: Record<string, string> = {}): Promise<Node> {
  const node = await place.serve(args, env);
  nodes.push(node);
  return node;
}

function client(node: Node): OpenAI {
  return new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "unused", maxRetries: 0 });
}

/** A stream that has given its first text. */
async function longStream(node: Node, model: string) {
  const stream = await client(node).chat.completions.create({ model, messages, stream: true, ...LONG });
  const chunks = stream[Symbol.asyncIterator]();
  for (;;) {
    const { value, done } = await chunks.next();
    if (done) throw new Error("the stream ended");
    if (value.choices[0]?.delta.content) return chunks;
  }
}

async function say(node: Node, model: string): Promise<string> {
  const reply = await client(node).chat.completions.create({ model, messages, ...SHORT });
  return reply.choices[0]?.message.content ?? "";
}

describe.skipIf(!built)("models of a node", () => {
  test("are loaded when a request names them, each once, and answer side by side", async () => {
    const node = await serve();
    expect(runnersOf(node.pid)).toEqual([]);
    const [a, again, b] = await Promise.all([say(node, "first"), say(node, "first"), say(node, "second")]);
    expect(again).toBe(a);
    expect(b).not.toBe(a);
    expect(runnersOf(node.pid)).toHaveLength(2);
    const { data } = await client(node).models.list();
    expect(data.map((model) => model.id).sort()).toEqual(["first", "second"]);
    expect(data.every((model) => "state" in model && model.state === "ready")).toBe(true);
  });

  test("that are not here give 404 with the line that brings them", async () => {
    const node = await serve();
    for (const [model, hint] of [
      ["org/nothing", "caravan pull org/nothing"],
      ["smollm2", "caravan pull smollm2"],
      [place.path("elsewhere"), "caravan models lists what is here"],
    ] as [string, string][]) {
      const reply = await fetch(`${node.url}/v1/chat/completions`, {
        method: "POST",
        body: JSON.stringify({ model, messages }),
      });
      expect(reply.status).toBe(404);
      const { error } = (await reply.json()) as { error: { code: string; message: string } };
      expect(error.code).toBe("model_not_found");
      expect(error.message).toContain(hint);
    }
  });

  test("of a folder are called by its last part, with the context that was asked for", async () => {
    const node = await serve([place.path("elsewhere"), "--context", "96"]);
    await until(() => node.err().includes("model ready"), "the model is loaded");
    expect(node.err()).toContain("context=96");
    const model = await client(node).models.retrieve("elsewhere");
    expect(model).toMatchObject({ id: "elsewhere", context_length: 96 });
    const long = "word ".repeat(200);
    const refused = await client(node)
      .chat.completions.create({ model: "elsewhere", messages: [{ role: "user", content: long }] })
      .catch((thrown) => thrown);
    expect(refused).toMatchObject({ status: 400, code: "context_length_exceeded" });
  });

  test("that cannot be loaded give the reason to the client and leave the node up", async () => {
    const broken = writeTinyChatModel(join(place.models, "broken"));
    const config = JSON.parse(await Bun.file(join(broken, "config.json")).text());
    await Bun.write(join(broken, "config.json"), JSON.stringify({ ...config, architectures: ["GPTNeoX"] }));
    const node = await serve();
    const error = await say(node, "broken").catch((thrown) => thrown);
    expect(error).toMatchObject({ status: 400, code: "unsupported_model" });
    expect(error.message).toContain("GPTNeoX");
    expect(await say(node, "first")).not.toBe("");
    expect(await client(node).models.retrieve("broken")).toMatchObject({ state: "failed" });
    await Bun.write(join(broken, "config.json"), JSON.stringify(config));
    expect(await say(node, "broken")).not.toBe("");
    rmSync(broken, { recursive: true });
  });
});

describe.skipIf(!built)("a runner that is killed in mid-answer", () => {
  test("gives the client an error event within a second, and the next request works", async () => {
    const node = await serve(["first"]);
    const before = await say(node, "first");
    await inTime(1000, async () => {
      const chunks = await longStream(node, "first");
      const [runner] = runnersOf(node.pid);
      if (runner === undefined) throw new Error("there is no runner");
      const rest = (async () => {
        for (;;) if ((await chunks.next()).done) return "the stream ended as if it were complete";
      })().catch((thrown) => thrown);
      process.kill(runner, "SIGKILL");
      const ms = await msOf(() => rest);
      const error = await rest;
      console.log(`from kill -9 to the error event: ${ms.toFixed(0)} ms`);
      expect(error).toBeInstanceOf(OpenAI.APIError);
      expect(error).toMatchObject({ code: "engine_failed" });
      expect(error.message).toContain("SIGKILL");
      expect((await fetch(`${node.url}/health`)).status).toBe(200);
      expect(await say(node, "first")).toBe(before);
      expect(runnersOf(node.pid)).not.toContain(runner);
      return ms;
    });
  });

  test("again and again is started again each time", async () => {
    const node = await serve(["first"]);
    const before = await say(node, "first");
    for (let i = 0; i < 3; i++) {
      for (const runner of runnersOf(node.pid)) process.kill(runner, "SIGKILL");
      await until(() => runnersOf(node.pid).length === 0, "the runner is gone");
      expect(await say(node, "first")).toBe(before);
    }
  });
});

describe.skipIf(!built)("the end of a node", () => {
  test("waits for running answers at SIGTERM and leaves with 0", async () => {
    const node = await serve(["first"]);
    await say(node, "first");
    const chunks = await longStream(node, "first");
    node.kill("SIGTERM");
    await until(() => node.err().includes("shutting down"), "the node drains");
    const refused = await fetch(`${node.url}/v1/models`);
    expect(refused.status).toBe(503);
    expect(isAlive(node.pid)).toBe(true);
    await chunks.return?.(undefined); // the client has heard enough
    expect((await node.ended).code).toBe(0);
  });

  test("comes at once with the second SIGTERM, with an error for the client", async () => {
    const node = await serve(["first"]);
    await say(node, "first");
    const chunks = await longStream(node, "first");
    const [runner] = runnersOf(node.pid);
    node.kill("SIGTERM");
    await until(() => node.err().includes("shutting down"), "the node drains");
    node.kill("SIGTERM");
    const error = await (async () => {
      for (;;) if ((await chunks.next()).done) return undefined;
    })().catch((thrown) => thrown);
    expect(error).toMatchObject({ code: "shutting_down" });
    expect((await node.ended).code).toBe(0);
    expect(runner === undefined || isAlive(runner)).toBe(false);
  });

  test("by kill -9 ends its runners too", async () => {
    const node = await serve(["first"]);
    await say(node, "first");
    const runners = runnersOf(node.pid);
    expect(runners).toHaveLength(1);
    node.kill("SIGKILL");
    await node.ended;
    await until(() => !runners.some(isAlive), "the runner ends by itself");
  });

  test("does not come when nobody reads its output", async () => {
    const node = await serve();
    // The pipes of the first line are still open; a node whose reader left at once is one more.
    const bash = Bun.spawn(
      ["bash", "-c", `"$0" serve --port 0 --log-level silent | head -1; echo over`, PROGRAM],
      { env: place.env, cwd: place.cwd, stdout: "pipe", stderr: "pipe" },
    );
    const lines = bash.stdout.getReader();
    const first = new TextDecoder().decode((await lines.read()).value);
    const url = /listens at (\S+)/.exec(first)?.[1];
    if (url === undefined) throw new Error(`unexpected: ${first}`);
    expect((await fetch(`${url}/health`)).status).toBe(200);
    const pid = Bun.spawnSync(["ps", "-o", "pid=", "--ppid", String(bash.pid)])
      .stdout.toString()
      .trim();
    process.kill(Number(pid.split("\n")[0]), "SIGTERM");
    expect(await bash.exited).toBe(0);
    expect((await fetch(`${node.url}/health`)).status).toBe(200);
  });

  test("while a model is loading does not wait for it", async () => {
    const node = await serve(["first"]);
    node.kill("SIGTERM");
    expect((await node.ended).code).toBe(0);
  });
});

describe.skipIf(!built)("settings of a node", () => {
  test("a port that is taken ends with 69 and says what to do", async () => {
    const node = await serve();
    const second = await place.run(["serve", "--port", node.port]);
    expect(second).toMatchObject({ code: 69, out: "" });
    expect(second.err).toContain(`Port ${node.port} is already in use`);
    expect(second.err).toContain("--port");
  });

  test("a model that is not there ends it before it listens", async () => {
    const ended = await place.run(["serve", "--port", "0", "org/none"]);
    expect(ended).toMatchObject({ code: 1, out: "" });
    expect(ended.err).toContain("caravan pull org/none");
  });

  test("come from variables: key, queue and body size", async () => {
    const node = await serve([], {
      CARAVAN_API_KEYS: "one,two",
      CARAVAN_MAX_QUEUE: "0",
      CARAVAN_MAX_BODY_BYTES: "2000",
      CARAVAN_SPELLING: "wrong",
    });
    await until(() => node.err().includes("CARAVAN_SPELLING is not a setting"), "the warning");
    expect((await fetch(`${node.url}/v1/models`)).status).toBe(401);
    const headers = { authorization: "Bearer two" };
    expect((await fetch(`${node.url}/v1/models`, { headers })).status).toBe(200);
    const body = JSON.stringify({ model: "first", messages: [{ role: "user", content: "x".repeat(3000) }] });
    const large = await fetch(`${node.url}/v1/chat/completions`, { method: "POST", headers, body });
    expect(large.status).toBe(413);
  });
});

describe.skipIf(!built)("caravan run beside a node", () => {
  test("uses the node instead of a second copy, by name and by folder", async () => {
    const node = await serve([place.path("elsewhere")]);
    await until(() => node.err().includes("model ready"), "the model is loaded");
    const args = ["-n", "8", "-t", "0", "--port", node.port];
    // By the name that the node has for a folder of its own, which means nothing here.
    const found = await place.run(["run", "elsewhere", "Hi", ...args]);
    expect(found.err).toContain(`elsewhere, answered by the node at ${node.url}`);
    const unknown = await place.run(["run", "nowhere", "Hi", ...args]);
    expect(unknown).toMatchObject({ code: 1, out: "" });
    const [named, folder, here] = await Promise.all([
      place.run(["run", "first", "Hi", ...args]),
      place.run(["run", place.path("elsewhere"), "Hi", ...args]),
      place.run(["run", place.path("elsewhere"), "Hi", ...args, "--here"]),
    ]);
    expect(named).toMatchObject({ code: 0 });
    expect(named.err).toContain(`first, answered by the node at ${node.url}`);
    expect(folder.err).toContain(`elsewhere, answered by the node at ${node.url}`);
    expect(here.err).toContain("elsewhere on cpu");
    expect(folder.out).toBe(here.out);
    expect(found.out).toBe(here.out);
    expect(runnersOf(node.pid)).toHaveLength(2);
  });

  test("says what has no effect there, and when the node refuses its key", async () => {
    const node = await serve([], { CARAVAN_API_KEYS: "secret" });
    const args = ["run", "first", "Hi", "-n", "4", "--port", node.port];
    const keyed = await place.run([...args, "--context", "64"], { env: { CARAVAN_API_KEYS: "secret" } });
    expect(keyed.err).toContain("--context has no effect on the node");
    expect(keyed.code).toBe(0);
    const refused = await place.run(args);
    expect(refused.err).toContain("wants an API key");
    expect(refused.err).toContain("first on cpu");
    expect(refused.code).toBe(0);
  });

  test("tells of a node that goes away in mid-answer", async () => {
    const node = await serve(["first"]);
    await say(node, "first");
    const running = place.start(["run", "first", "Hi", "-n", "200000", "-t", "0", "--port", node.port]);
    await until(() => running.out().length > 20, "the answer has begun");
    node.kill("SIGKILL");
    const ended = await running.ended;
    expect(ended.code).toBe(1);
    expect(ended.err).toContain("the node went away before the answer was complete");
    expect(ended.err).not.toMatch(/^\s+at /m);
  });
});
