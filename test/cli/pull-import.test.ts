// Bringing models here with the built executable: from a hub that misbehaves, and from GGUF files.

import { afterAll, afterEach, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { built, Place } from "../tools/built-caravan.ts";
import { buildGguf, tinyModel } from "../tools/gguf-writer.ts";
import { COMMIT, type HubFile, MisbehavingHub } from "../tools/misbehaving-hub.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { until } from "../tools/until.ts";

const place = new Place();
afterAll(() => place.remove());

const source = writeTinyChatModel(place.path("source"));
const FILES: HubFile[] = readdirSync(source).map((path) => ({
  path,
  content: new Uint8Array(readFileSync(join(source, path))),
}));
const WEIGHTS = "model.safetensors";

const hubs: MisbehavingHub[] = [];
afterEach(() => {
  for (const hub of hubs.splice(0)) hub.stop();
});

async function hubWith(
  id: string,
  files = FILES,
): Promise<{ hub: MisbehavingHub; env: Record<string, string> }> {
  const hub = await MisbehavingHub.start(id, files);
  hubs.push(hub);
  return { hub, env: { HF_ENDPOINT: hub.url } };
}

describe.skipIf(!built)("pull", () => {
  test("brings a model over a line that breaks, and it runs", async () => {
    const { hub, env } = await hubWith("org/tiny");
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier === 0 ? { do: "drop", afterBytes: 50_000 } : undefined;
    const pulled = await place.run(["pull", "org/tiny"], { env });
    expect(pulled.code).toBe(0);
    expect(pulled.out.trim()).toEndWith(`snapshots/${COMMIT}`);
    expect(pulled.err).toContain("run it with: caravan run org/tiny");
    const said = await place.run(["run", "org/tiny", "hello", "-n", "4", "-t", "0"]);
    expect(said).toMatchObject({ code: 0 });
    expect(said.err).toContain("answer 4 tokens");
    expect((await place.run(["models"])).out).toContain("org/tiny");
    const again = await place.run(["pull", "org/tiny", "--json"], { env });
    expect(JSON.parse(again.out)).toMatchObject({ id: "org/tiny", commit: COMMIT, downloadedBytes: 0 });
    expect(hub.bytesServed(WEIGHTS)).toBeLessThan(
      2 * (FILES.find((f) => f.path === WEIGHTS)?.content.length ?? 0),
    );
  });

  test("over HTTP brings a model that answers, and a delete takes it away", async () => {
    const { env } = await hubWith("org/served");
    const node = await place.serve([], { ...env, CARAVAN_ADMIN_KEYS: "an-administration-key" });
    const post = (path: string, body: object) =>
      fetch(`${node.url}${path}`, {
        method: "POST",
        headers: { authorization: "Bearer an-administration-key" },
        body: JSON.stringify({ model: "org/served", ...body }),
      });
    const lines = (await (await post("/models/pull", {})).text()).trim().split("\n");
    expect(JSON.parse(lines.at(-1) ?? "")).toMatchObject({ status: "success" });
    const messages = [{ role: "user", content: "Hi" }];
    expect((await post("/v1/chat/completions", { messages, max_tokens: 2 })).status).toBe(200);
    const deleted = (await (await post("/models/delete", {})).json()) as { freed_bytes: number };
    expect(deleted.freed_bytes).toBeGreaterThan(0);
    expect((await post("/v1/chat/completions", { messages })).status).toBe(404);
    node.kill("SIGTERM");
    expect((await node.ended).code).toBe(0);
  });

  test("refuses content with another hash and leaves no model", async () => {
    const { hub, env } = await hubWith("org/forged");
    const forged = new Uint8Array(FILES.find((file) => file.path === WEIGHTS)?.content ?? []);
    forged[forged.length - 1] = (forged.at(-1) ?? 0) ^ 1;
    hub.behave = ({ path }) => (path === WEIGHTS ? { do: "other-content", content: forged } : undefined);
    const pulled = await place.run(["pull", "org/forged"], { env });
    expect(pulled).toMatchObject({ code: 1, out: "" });
    expect(pulled.err).toContain(WEIGHTS);
    const run = await place.run(["run", "org/forged", "x"]);
    expect(run.code).toBe(1);
    expect(run.err).toContain("caravan pull org/forged");
  }, 120_000);

  test("says that a repository is not there", async () => {
    const { env } = await hubWith("org/other");
    const pulled = await place.run(["pull", "org/missing"], { env });
    expect(pulled).toMatchObject({ code: 1, out: "" });
    expect(pulled.err).toContain("org/missing");
  });

  test("stopped with Ctrl-C keeps what came and goes on from there", async () => {
    const { hub, env } = await hubWith("org/slow");
    hub.behave = ({ path, earlier }) =>
      path === WEIGHTS && earlier === 0 ? { do: "stall", afterBytes: 300_000 } : undefined;
    const running = place.start(["pull", "org/slow"], { env });
    await until(() => hub.bytesServed(WEIGHTS) >= 300_000, "the download is under way");
    running.kill("SIGINT");
    const ended = await running.ended;
    expect(ended).toMatchObject({ code: 130, out: "" });
    expect(ended.err).toContain("run the command again to go on");
    expect((await place.run(["models"])).out).toContain("org/slow is incomplete");
    expect(await place.run(["pull", "org/slow"], { env })).toMatchObject({ code: 0 });
  });
});

function writeGguf(name: string): string {
  const { metadata, tensors } = tinyModel("llama4");
  const path = place.path(name);
  writeFileSync(path, buildGguf(metadata, tensors));
  return path;
}

describe.skipIf(!built)("import", () => {
  test("puts a model among caravan's own, under the file's name or another", async () => {
    const file = writeGguf("My Tiny.GGUF");
    const plain = await place.run(["import", file]);
    expect(plain).toMatchObject({ code: 0, out: "" });
    expect(plain.err).toContain("run it with: caravan run my-tiny");
    const named = await place.run(["import", file, "--name", "other.name", "--scales", "f16", "--json"]);
    expect(JSON.parse(named.out)).toMatchObject({
      architecture: "llama4",
      path: join(place.models, "other.name"),
      lossless: true,
    });
    const listed = await place.run(["models"]);
    expect(listed.out).toMatch(/^my-tiny /m);
    expect(listed.out).toMatch(/^other\.name /m);
    writeFileSync(place.path("ids.json"), '{"tokens":[0,1,2,3]}');
    const out = place.path("imported.npy");
    const args = ["logits", "my-tiny", "--tokens-file", place.path("ids.json"), "--out", out];
    expect(await place.run(args)).toEqual({ code: 0, out: "", err: "" });
    expect(existsSync(out)).toBe(true);
  });

  test("writes where --out says, and never over a model", async () => {
    const file = writeGguf("out.gguf");
    const out = place.path("imported");
    expect(await place.run(["import", file, "--out", out])).toMatchObject({ code: 0 });
    expect(readdirSync(out)).toEqual(
      expect.arrayContaining(["config.json", "tokenizer.json", "model.safetensors"]),
    );
    const before = readFileSync(join(out, "config.json"));
    const again = await place.run(["import", file, "--out", out]);
    expect(again.code).not.toBe(0);
    expect(again.err).toContain(out);
    expect(readFileSync(join(out, "config.json"))).toEqual(before);
  });

  test.each([
    ["cut short", (path: string) => truncateSync(path, 3000)],
    ["not a GGUF", (path: string) => writeFileSync(path, "hello there, this is text")],
    ["not there", (path: string) => writeFileSync(`${path}.other`, "")],
  ])("of a file that is %s names it and leaves nothing", async (what, damage) => {
    const dir = place.path(`damaged ${what}`);
    mkdirSync(dir);
    const file = join(dir, "file.gguf");
    if (what !== "not there") writeFileSync(file, readFileSync(writeGguf("whole.gguf")));
    damage(file);
    const out = join(dir, "out");
    const ended = await place.run(["import", file, "--out", out]);
    expect(ended).toMatchObject({ out: "" });
    expect([1, 2]).toContain(ended.code);
    expect(ended.err).toContain(file);
    expect(ended.err).not.toMatch(/^\s+at /m);
    expect(readdirSync(dir).filter((name) => name.startsWith("out"))).toEqual([]);
  });
});
