// A node without a model gets the part that its rank reads from a node that has it: the right bytes, once, checked, and going on
// where an interruption left it.

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import fc from "fast-check";
import { evenShares } from "../../src/cluster/even-shares.ts";
import { newCluster } from "../../src/cluster/net/cluster-file.ts";
import { dial } from "../../src/cluster/net/dial.ts";
import { newIdentity } from "../../src/cluster/net/identity.ts";
import { listen } from "../../src/cluster/net/listener.ts";
import { ModelSourceChannel, serveModelFiles } from "../../src/cluster/net/model-files.ts";
import { fetchShard } from "../../src/cluster/net/shard-store.ts";
import { shardPlan } from "../../src/cluster/shard.ts";
import {
  type ByteRange,
  mergeRanges,
  missingRanges,
  shardRanges,
  totalBytes,
} from "../../src/cluster/shard-ranges.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { elementBits, makeLoadPlan, type PlannedTensor } from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { ClusterLab, libraryHere, loopbackHosts } from "./cluster-lab.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(60_000);

const LOG = createLogger({ level: "silent" });
const HOME = newCluster("home");
const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "caravan-weights-"));
  cleanups.push(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

/** Asks a holder over a connection of its own. */
async function source(folderOf: (model: string) => string, model = "tiny") {
  const settings = (id: string) => ({
    cluster: HOME,
    node: { id, name: "n", version: "1", incarnation: 1, port: 0 },
  });
  const [a, b] = [newIdentity(), newIdentity()];
  const listener = await listen({
    identity: b,
    settings: () => settings(b.id),
    host: "127.0.0.1",
    port: 0,
    log: LOG,
    onPeer: (channel) => void serveModelFiles(channel, folderOf),
  });
  cleanups.push(() => listener.close());
  const { channel } = await dial({
    identity: a,
    settings: settings(a.id),
    address: `127.0.0.1:${listener.port}`,
    purpose: "file",
  });
  cleanups.push(() => channel.close());
  return { channel, ask: () => ModelSourceChannel.ask(channel, model) };
}

async function planOf(dir: string) {
  return makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
}

/** Every byte of a planned tensor, in the order in which the engine reads it. */
function bytesOf(t: PlannedTensor, files: readonly { path: string }[]): Buffer {
  const row = t.transposed ? (t.rows * elementBits(t)) / 8 : (t.cols * elementBits(t)) / 8;
  const rows = t.transposed ? t.cols : t.rows;
  const data = readFileSync(files[t.weight.file]?.path ?? "");
  const parts: Buffer[] = [];
  for (let e = 0; e < t.experts; e++)
    for (let r = 0; r < rows; r++) {
      const at = t.weight.offset + e * t.weight.outerStride + r * t.weight.rowStride;
      parts.push(data.subarray(at, at + row));
    }
  return Buffer.concat(parts);
}

const grids: [number, number][] = [
  [2, 1],
  [1, 2],
  [2, 2],
  [1, 4],
  [3, 1],
];

describe("the part of a rank", () => {
  test("has every byte that the rank reads and, together with the others', not much more than the model", async () => {
    const models = folder();
    const original = writeTinyChatModel(join(models, "tiny"), 1);
    const plan = await planOf(original);
    for (const [tensor, pipeline] of grids) {
      const shares = evenShares(plan, tensor, pipeline);
      for (const { rank } of shares) {
        const parts = folder();
        const { ask } = await source((name) => join(models, name));
        let last = 0;
        const dir = await fetchShard(parts, {
          source: await ask(),
          model: "tiny",
          shares,
          rank,
          onProgress: (fraction) => {
            expect(fraction).toBeGreaterThanOrEqual(last);
            last = fraction;
          },
          signal: new AbortController().signal,
        });
        expect(last).toBe(1);
        const [there, here] = [shardPlan(plan, shares, rank), shardPlan(await planOf(dir), shares, rank)];
        expect(here.tensors.length).toBe(there.tensors.length);
        there.tensors.forEach((t, i) => {
          const mine = here.tensors[i];
          if (mine === undefined) throw new Error(t.name);
          expect(bytesOf(mine, here.files).equals(bytesOf(t, there.files)), `${t.name} of rank ${rank}`).toBe(
            true,
          );
        });
        expect(readFileSync(join(dir, "tokenizer.json"), "utf8")).toBe(
          readFileSync(join(original, "tokenizer.json"), "utf8"),
        );
      }
      if (pipeline > 1 && tensor === 1) {
        const whole = statSync(join(original, "model.safetensors")).size;
        const sum = shares
          .map(({ rank }) =>
            [...shardRanges(shardPlan(plan, shares, rank)).values()].reduce((n, r) => n + totalBytes(r), 0),
          )
          .reduce((n, bytes) => n + bytes, 0);
        // Norms and neighbours within 64 KiB are fetched twice; the tiny model is small against that.
        expect(sum).toBeLessThan(whole * 1.5);
      }
    }
  });

  test("is fetched once: what is there already is not asked for again, also after an interruption", async () => {
    const models = folder();
    const plan = await planOf(writeTinyChatModel(join(models, "tiny"), 1));
    const shares = evenShares(plan, 1, 2);
    const parts = folder();
    const fetch = async (limit: number) => {
      const { ask } = await source((name) => join(models, name));
      const from = await ask();
      let bytes = 0;
      const read = from.read.bind(from);
      from.read = async (name, start, end) => {
        bytes += end - start;
        if (bytes > limit) throw new CaravanError("download_failed", "cut");
        return await read(name, start, end);
      };
      const options = { source: from, model: "tiny", shares, rank: 1, onProgress: () => undefined };
      const done = await fetchShard(parts, { ...options, signal: new AbortController().signal }).then(
        () => true,
        () => false,
      );
      return { bytes, done };
    };
    const first = await fetch(Number.POSITIVE_INFINITY);
    expect(first.done).toBe(true);
    const second = await fetch(Number.POSITIVE_INFINITY);
    // Only the 8 bytes that say how long a header is.
    expect(second).toEqual({ bytes: 8, done: true });
    const [dir = ""] = readdirSync(parts);
    writeFileSync(join(parts, dir, "held.ranges"), "{damaged");
    const third = await fetch(Number.POSITIVE_INFINITY);
    expect(third).toEqual({ bytes: first.bytes, done: true });
    rmSync(join(parts, dir), { recursive: true });
    expect((await fetch(first.bytes / 2)).done).toBe(false);
    expect((await fetch(Number.POSITIVE_INFINITY)).done).toBe(true);
  });
});

describe("a holder", () => {
  test("gives nothing but a model's own files", async () => {
    const models = folder();
    writeTinyChatModel(join(models, "tiny"), 1);
    writeFileSync(join(models, "tiny", "secret.pem"), "secret");
    const { channel, ask } = await source((name) => join(models, name));
    const from = await ask();
    expect(from.files.map(({ name }) => name)).not.toContain("secret.pem");
    await expect(from.read("../tiny/secret.pem", 0, 6)).rejects.toThrow();
    await channel.closed;
    for (const [name, start, end] of [
      ["config.json", 0, 1e9],
      ["config.json", 5, 5],
      ["secret.pem", 0, 6],
      ["none.json", 0, 1],
    ] as const) {
      const again = await (await source((model) => join(models, model))).ask();
      await expect(again.read(name, start, end), name).rejects.toThrow();
    }
  });

  test("without the model says so", async () => {
    const { ask } = await source(() => {
      throw new CaravanError("model_not_found", "no such model here");
    });
    await expect(ask()).rejects.toMatchObject({ code: "model_not_found" });
  });

  test("that sends other bytes than it read is found out", async () => {
    const models = folder();
    writeTinyChatModel(join(models, "tiny"), 1);
    const { ask, channel } = await source((name) => join(models, name));
    const from = await ask();
    const receive = channel.read.bind(channel);
    channel.read = async (limit) => {
      const frame = await receive(limit);
      if (frame?.kind === "bytes") frame.bytes[0] = (frame.bytes[0] ?? 0) ^ 1;
      return frame;
    };
    await expect(from.read("config.json", 0, 20)).rejects.toThrow("not what it read");
  });
});

describe("ranges", () => {
  const ranges = fc
    .array(fc.tuple(fc.nat(200), fc.nat(200)), { maxLength: 12 })
    .map((pairs) => mergeRanges(pairs.map(([a, b]): ByteRange => [Math.min(a, b), Math.max(a, b)])));
  const inside = (list: readonly ByteRange[], at: number) =>
    list.some(([start, end]) => at >= start && at < end);

  test("merge and subtract like sets of bytes", () => {
    fc.assert(
      fc.property(ranges, ranges, (wanted, held) => {
        const missing = missingRanges(wanted, held);
        for (let at = 0; at <= 200; at++)
          expect(inside(missing, at)).toBe(inside(wanted, at) && !inside(held, at));
        expect(mergeRanges(missing)).toEqual(missing);
      }),
    );
  });
});

test.skipIf(!libraryHere)(
  "a node that has no model computes its rank from the part that it fetched, and passes on what it cannot compute",
  async () => {
    const hosts = loopbackHosts(2);
    const empty = folder();
    const lab = new ClusterLab(
      hosts.map((host, i) => (i === 1 ? { ...host, env: { ...host.env, CARAVAN_MODELS_DIR: empty } } : host)),
    );
    cleanups.push(() => lab.close());
    await lab.start();
    const [a, b] = lab.nodes;
    if (a === undefined || b === undefined) throw new Error("two nodes");
    const alone = await a.say("tiny", 30);
    // b has no files at all: the request goes to a, which loads the model.
    expect(await b.say("tiny", 30)).toBe(alone);
    const plan = await (await b.fetch("/cluster/plan?model=tiny&tensor=2&pipeline=1")).json();
    expect((plan as { placements: unknown[] }).placements.length).toBe(1);
    const instance = await lab.place(b, { tensor: 2, pipeline: 1 });
    expect(instance.ranks.length).toBe(2);
    expect(await b.say("tiny", 30)).toBe(alone);
    const parts = join(lab.folder, "b", "parts");
    expect(existsSync(parts)).toBe(true);
    const [dir = ""] = readdirSync(parts);
    const { size, blocks } = statSync(join(parts, dir, "model.safetensors"));
    expect(size).toBe(statSync(join(lab.folder, "models", "tiny", "model.safetensors")).size);
    console.log(`  ${basename(dir)}: ${blocks * 512} of ${size} bytes on the disk`);
    expect(existsSync(join(lab.folder, "a", "parts"))).toBe(false);
  },
  60_000,
);
