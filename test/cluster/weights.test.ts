// A node without a model gets the part that its rank reads from a node that has it: the right bytes, once, checked, and going on
// where an interruption left it.

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { evenShares } from "../../src/cluster/even-shares.ts";
import type { Channel } from "../../src/cluster/net/channel.ts";
import { newCluster } from "../../src/cluster/net/cluster-file.ts";
import { dial } from "../../src/cluster/net/dial.ts";
import { FileVerdicts } from "../../src/cluster/net/file-verdicts.ts";
import { newIdentity } from "../../src/cluster/net/identity.ts";
import { listen } from "../../src/cluster/net/listener.ts";
import { ModelSourceChannel, serveModelFiles } from "../../src/cluster/net/model-files.ts";
import { GRACE_HOURS, ModelParts } from "../../src/cluster/net/model-parts.ts";
import { readPartNote } from "../../src/cluster/net/part-note.ts";
import { fetchShard, hasShard } from "../../src/cluster/net/shard-store.ts";
import { shardPlan } from "../../src/cluster/shard.ts";
import { run, type Strips, stripBytes } from "../../src/cluster/strips.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { readModelConfig } from "../../src/model/config.ts";
import {
  elementBits,
  type LoadPlan,
  makeLoadPlan,
  type PlannedTensor,
  SCALE_BYTES,
  type SourceView,
} from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { MisbehavingHub } from "../tools/misbehaving-hub.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { ClusterLab, eventually, libraryHere, loopbackHosts } from "./cluster-lab.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

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

/** The tiny model as the hub's cache has it: files are links to blobs that are called by their hashes. */
function pulled(models: string): { blob: string } {
  const made = writeTinyChatModel(join(folder(), "tiny"), 1);
  mkdirSync(join(models, "blobs"));
  mkdirSync(join(models, "tiny"));
  let blob = "";
  for (const name of readdirSync(made)) {
    const content = readFileSync(join(made, name));
    const lfs = name.endsWith(".safetensors");
    const hash = lfs
      ? createHash("sha256").update(content).digest("hex")
      : createHash("sha1").update(`blob ${content.length}\0`).update(content).digest("hex");
    writeFileSync(join(models, "blobs", hash), content);
    symlinkSync(join("..", "blobs", hash), join(models, "tiny", name));
    if (lfs) blob = join(models, "blobs", hash);
  }
  return { blob };
}

/** Flips a bit behind the header and keeps size and time. */
function alter(path: string): void {
  const { atime, mtime } = statSync(path);
  const content = readFileSync(path);
  const at = content.length - 5;
  content[at] = (content[at] ?? 0) ^ 1;
  writeFileSync(path, content);
  utimesSync(path, atime, mtime);
}

/** Asks a holder over a connection of its own. */
async function source(folderOf: (model: string) => string, model = "tiny") {
  const settings = (id: string) => ({
    cluster: HOME,
    node: { id, name: "n", version: "1", incarnation: 1, port: 0 },
  });
  const [a, b] = [newIdentity(), newIdentity()];
  const verdicts = new FileVerdicts(join(folder(), "checked.json"));
  const listener = await listen({
    identity: b,
    settings: () => settings(b.id),
    host: "127.0.0.1",
    port: 0,
    log: LOG,
    onPeer: (channel) => void serveModelFiles(channel, { folderOf, verdicts }),
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

/** Which bytes of the file a rank reads, one by one: 1. And the header, which everybody needs. */
function neededBytes(plan: LoadPlan, content: Buffer): Uint8Array {
  const needed = new Uint8Array(content.length);
  needed.fill(1, 0, 8 + Number(content.readBigUint64LE(0)));
  for (const t of plan.tensors) {
    const mark = (view: SourceView | undefined, experts: number, rows: number, bytes: number) => {
      if (view === undefined) return;
      for (let e = 0; e < experts; e++)
        for (let r = 0; r < rows; r++) {
          const at = view.offset + e * view.outerStride + r * view.rowStride;
          needed.fill(1, at, at + bytes);
        }
    };
    const scale = t.scaleType === undefined ? 0 : SCALE_BYTES[t.scaleType];
    const bits = elementBits(t);
    if (t.transposed) mark(t.weight, t.experts, t.cols, (t.rows * bits) / 8);
    else mark(t.weight, t.experts, t.rows, (t.cols * bits) / 8);
    mark(t.scales, t.experts, t.rows, (t.cols / (t.group || 1)) * scale);
    mark(t.biases, t.experts, t.rows, (t.cols / (t.group || 1)) * scale);
    mark(t.globalScale, 1, 1, 4 * t.experts);
  }
  return needed;
}

/** Where a needed byte is another one; -1: nowhere. */
function firstWrong(needed: Uint8Array, here: Buffer, there: Buffer): number {
  for (let at = 0; at < needed.length; at++) if (needed[at] === 1 && here[at] !== there[at]) return at;
  return -1;
}

/** Bytes of files that come over a connection, and in how many answers. */
function counted(channel: Channel): { bytes: number; answers: number } {
  const count = { bytes: 0, answers: 0 };
  const receive = channel.read.bind(channel);
  channel.read = async (limit) => {
    const frame = await receive(limit);
    if (frame?.kind === "bytes") count.bytes += frame.bytes.length;
    else if (frame !== undefined && JSON.stringify(frame.value).startsWith('{"sha256"')) count.answers++;
    return frame;
  };
  return count;
}

/** A model of the goldens without what belongs to the tests. */
function golden(name: string): { dir: string; content: Buffer; small: number } {
  const from = join(import.meta.dir, "../golden/data", name);
  const dir = join(folder(), name);
  mkdirSync(dir);
  let small = 0;
  for (const file of readdirSync(from).filter((each) => !each.startsWith("golden"))) {
    copyFileSync(join(from, file), join(dir, file));
    if (file !== "model.safetensors") small += statSync(join(from, file)).size;
  }
  return { dir, content: readFileSync(join(dir, "model.safetensors")), small };
}

/** Of every layout and kind of quantization. */
const CHECKPOINTS = [
  ...["scout-4bit", "scout-hf-bf16", "scout-mixed", "maverick-4bit", "llama-4bit"],
  ...["formats-nvfp4", "formats-mxfp4", "formats-5bit", "formats-llama-biases"],
];

const grids: [number, number][] = [
  [2, 1],
  [1, 2],
  [2, 2],
  [1, 4],
  [3, 1],
];

describe("the part of a rank", () => {
  test("has every byte that the rank reads, at its place", async () => {
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
    }
  });

  for (const name of CHECKPOINTS)
    test(`costs exactly the bytes that the rank reads, in few answers: ${name}`, async () => {
      const { dir: original, content, small } = golden(name);
      const plan = await planOf(original);
      for (const shares of [
        evenShares(plan, 2, 2),
        evenShares(plan, 3, 1).map((share) => ({ ...share, weight: [3, 0, 1][share.rank] ?? 1 })),
      ]) {
        for (const rank of [0, shares.length - 1]) {
          const { channel, ask } = await source(() => original);
          const wire = counted(channel);
          const signal = new AbortController().signal;
          const onProgress = () => undefined;
          const order = { source: await ask(), model: name, shares, rank, onProgress, signal };
          const dir = await fetchShard(folder(), order);
          const needed = neededBytes(shardPlan(plan, shares, rank), content);
          expect(wire.bytes).toBe(needed.filter((bit) => bit === 1).length + small);
          // The length of the header, the header, the weights, and the other files.
          expect(wire.answers).toBeLessThanOrEqual(readdirSync(original).length + 2);
          const here = readFileSync(join(dir, "model.safetensors"));
          expect(here.length).toBe(content.length);
          expect(firstWrong(needed, here, content)).toBe(-1);
          expect(await hasShard(dir, shares, rank)).toBe(true);
        }
      }
    });

  test("of another division costs only what is not here yet", async () => {
    const name = "scout-4bit";
    const { dir: original, content, ...sizes } = golden(name);
    let { small } = sizes;
    const plan = await planOf(original);
    const parts = folder();
    const have = new Uint8Array(content.length);
    let dir = "";
    for (const [tensor, pipeline, rank] of [
      [2, 1, 1],
      [2, 2, 1],
      [1, 2, 0],
      [2, 1, 0],
      [1, 1, 0],
    ] as const) {
      const { channel, ask } = await source(() => original);
      const wire = counted(channel);
      const shares = evenShares(plan, tensor, pipeline);
      const signal = new AbortController().signal;
      const order = { source: await ask(), model: name, shares, rank, onProgress: () => undefined, signal };
      dir = await fetchShard(parts, order);
      let more = 0;
      neededBytes(shardPlan(plan, shares, rank), content).forEach((bit, at) => {
        if (bit === 1 && have[at] === 0) {
          have[at] = 1;
          more++;
        }
      });
      expect(wire.bytes).toBe(more + small);
      small = 0; // they came with the first one
    }
    const held = readPartNote(dir)?.files["model.safetensors"]?.held ?? [];
    expect(readFileSync(join(dir, "model.safetensors")).equals(content)).toBe(true);
    expect(held).toEqual([run(0, content.length)]);
  });

  test("arrives whole where two ranks of one model fetch at one time into one folder", async () => {
    const name = "scout-4bit";
    const { dir: original, content } = golden(name);
    const plan = await planOf(original);
    const shares = evenShares(plan, 2, 1);
    const parts = folder();
    const signal = new AbortController().signal;
    await Promise.all(
      shares.map(async ({ rank }) => {
        const { ask } = await source(() => original);
        const order = { source: await ask(), model: name, shares, rank, onProgress: () => undefined, signal };
        return await fetchShard(parts, order);
      }),
    );
    const [dir = ""] = readdirSync(parts);
    const here = readFileSync(join(parts, dir, "model.safetensors"));
    for (const { rank } of shares) {
      const needed = neededBytes(shardPlan(plan, shares, rank), content);
      expect(firstWrong(needed, here, content)).toBe(-1);
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
      from.read = async (name, strips) => {
        bytes += stripBytes(strips);
        if (bytes > limit) throw new CaravanError("download_failed", "cut");
        return await read(name, strips);
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
    expect(second).toEqual({ bytes: 0, done: true });
    const [dir = ""] = readdirSync(parts);
    writeFileSync(join(parts, dir, "part.json"), "{damaged");
    const third = await fetch(Number.POSITIVE_INFINITY);
    expect(third).toEqual({ bytes: first.bytes, done: true });
    rmSync(join(parts, dir), { recursive: true });
    expect((await fetch(first.bytes / 2)).done).toBe(false);
    expect((await fetch(Number.POSITIVE_INFINITY)).done).toBe(true);
  });

  test("is fetched again when other weights of the same size were written over those of the holder", async () => {
    const models = folder();
    const original = join(writeTinyChatModel(join(models, "tiny"), 1), "model.safetensors");
    const plan = await planOf(join(models, "tiny"));
    const shares = evenShares(plan, 2, 1);
    const parts = folder();
    const fetch = async () => {
      const { ask } = await source((name) => join(models, name));
      const options = { source: await ask(), model: "tiny", shares, rank: 0, onProgress: () => undefined };
      return await fetchShard(parts, { ...options, signal: new AbortController().signal });
    };
    const dir = await fetch();
    const content = readFileSync(original);
    const headerEnd = 8 + Number(content.readBigUint64LE(0));
    content.subarray(headerEnd).forEach((byte, i, all) => {
      all[i] = byte ^ 1;
    });
    writeFileSync(original, content);
    utimesSync(original, 1e9, 1e9);
    expect(await fetch()).toBe(dir);
    const here = readFileSync(join(dir, "model.safetensors"));
    const held = readPartNote(dir)?.files["model.safetensors"]?.held ?? [];
    expect(stripBytes(held)).toBeGreaterThan(headerEnd);
    for (const [first, length, stride, rows] of held)
      for (let row = 0; row < rows; row++) {
        const [start, end] = [first + row * stride, first + row * stride + length];
        expect(here.subarray(start, end).equals(content.subarray(start, end))).toBe(true);
      }
  });

  test("ends when the holder's weights are written over while they come", async () => {
    const models = folder();
    const original = join(writeTinyChatModel(join(models, "tiny"), 1), "model.safetensors");
    const { ask } = await source((name) => join(models, name));
    const from = await ask();
    await from.read("model.safetensors", [run(0, 8)]);
    utimesSync(original, 1e9, 1e9);
    await expect(from.read("model.safetensors", [run(0, 8)])).rejects.toMatchObject({ code: "bad_file" });
  });
});

describe("what the hub states of a file", () => {
  const order = async (models: string, tensor: number) => {
    const plan = await planOf(join(models, "tiny"));
    const { ask } = await source((name) => join(models, name));
    const shares = evenShares(plan, tensor, 1);
    const signal = new AbortController().signal;
    return { source: await ask(), model: "tiny", shares, rank: 0, onProgress: () => undefined, signal };
  };

  test("is compared here where the whole file has come, and at the holder where only ranges have", async () => {
    const models = folder();
    pulled(models);
    const dir = await fetchShard(folder(), await order(models, 1));
    const files = readPartNote(dir)?.files ?? {};
    expect(Object.values(files).map(({ checked }) => checked)).toEqual(
      Object.values(files).map(() => "whole"),
    );
    const part = await fetchShard(folder(), await order(models, 2));
    const note = readPartNote(part)?.files ?? {};
    expect(note["model.safetensors"]?.checked).toBe("source");
    expect(note["config.json"]?.checked).toBe("whole");
  });

  for (const tensor of [1, 2])
    test(`finds a weight file that was altered at the holder: ${tensor === 1 ? "whole" : "ranges"}`, async () => {
      const models = folder();
      const { blob } = pulled(models);
      alter(blob);
      const parts = folder();
      const failed = fetchShard(parts, await order(models, tensor));
      await expect(failed).rejects.toMatchObject({
        code: "bad_file",
        where: expect.stringContaining("model.safetensors"),
      });
      // Nothing of the file counts as fetched.
      const [dir = ""] = readdirSync(parts);
      expect(readPartNote(join(parts, dir))?.files["model.safetensors"]?.held).toEqual([]);
    });

  test("is read once at the holder, and again when the file has changed", async () => {
    const models = folder();
    const { blob } = pulled(models);
    const remembered = join(folder(), "checked.json");
    const hash = { kind: "sha256", value: basename(blob) } as const;
    const first = new FileVerdicts(remembered).check(blob, hash);
    await first.result;
    expect(first.done).toBe(statSync(blob).size);
    const again = new FileVerdicts(remembered).check(blob, hash);
    await again.result;
    expect(again.done).toBe(0);
    alter(blob);
    utimesSync(blob, new Date(), new Date());
    await expect(new FileVerdicts(remembered).check(blob, hash).result).rejects.toThrow(
      "not what the hub states",
    );
  });
});

describe("parts on the disk", () => {
  const partsOf = (dir: string, models: string, used: Set<string>, holders: string[] = ["x"]) =>
    new ModelParts({
      folder: dir,
      holders: () => holders,
      open: async () => (await source((name) => join(models, name))).channel,
      nameOf: () => "x",
      inUse: () => used,
      log: LOG,
    });
  const missing = new CaravanError("model_not_found", "none");

  test("are found again after a restart, also where no other node has the model any more", async () => {
    const [models, dir] = [folder(), folder()];
    pulled(models);
    const shares = evenShares(await planOf(join(models, "tiny")), 2, 1);
    const order = {
      model: "tiny",
      shares,
      rank: 1,
      onProgress: () => undefined,
      signal: new AbortController().signal,
    };
    const { path } = await partsOf(dir, models, new Set()).prepare(order, missing);
    const restarted = partsOf(dir, models, new Set(), []);
    expect(restarted.find("tiny")?.path).toBe(path);
    expect((await restarted.prepare(order, missing)).path).toBe(path);
    // Another rank reads what is not here.
    await expect(restarted.prepare({ ...order, rank: 0 }, missing)).rejects.toThrow("none");
  });

  test("go when no rank has read them for the grace, when asked for, and when room is needed; those in use stay", async () => {
    const [models, dir] = [folder(), folder()];
    pulled(models);
    const used = new Set<string>(["tiny"]);
    const parts = partsOf(dir, models, used);
    const shares = evenShares(await planOf(join(models, "tiny")), 2, 1);
    const order = {
      model: "tiny",
      shares,
      rank: 1,
      onProgress: () => undefined,
      signal: new AbortController().signal,
    };
    await parts.prepare(order, missing);
    const hour = 3_600_000;
    await parts.age(0);
    await parts.age(1000 * hour);
    expect(parts.list()).toMatchObject([{ model: "tiny", inUse: true, idleHours: 0 }]);
    expect(await parts.clean()).toBe(0);
    used.clear();
    await parts.age((1000 + GRACE_HOURS - 1) * hour);
    expect(parts.list()).toMatchObject([{ model: "tiny", inUse: false, idleHours: GRACE_HOURS - 1 }]);
    // Noted: a restart does not begin the grace anew.
    expect(partsOf(dir, models, used).list()[0]?.idleHours).toBe(GRACE_HOURS - 1);
    await parts.age((1000 + GRACE_HOURS) * hour);
    expect(readdirSync(dir)).toEqual([]);

    await parts.prepare(order, missing);
    expect(await parts.clean("another")).toBe(0);
    expect(await parts.clean("tiny")).toBeGreaterThan(1000);
    expect(readdirSync(dir)).toEqual([]);
  });

  test("a disk without room is told before anything comes; unused parts make way", async () => {
    const [models, dir] = [folder(), folder()];
    pulled(models);
    const shares = evenShares(await planOf(join(models, "tiny")), 2, 1);
    const { ask } = await source((name) => join(models, name));
    const asked: number[] = [];
    const failed = fetchShard(dir, {
      ...{ source: await ask(), model: "tiny", shares, rank: 1, onProgress: () => undefined },
      signal: new AbortController().signal,
      spareBytes: 1e18,
      makeRoom: async (bytes) => void asked.push(bytes),
    });
    await expect(failed).rejects.toMatchObject({ code: "disk_full" });
    expect(asked.length).toBe(1);
    expect(asked[0]).toBeGreaterThan(1e17);
  });

  test("a disk that fills up while fetching ends with one clear error, and the fetch goes on when there is room", async () => {
    const small = folder();
    if (Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small]).exitCode !== 0) {
      console.log("skipped: no file system can be mounted here");
      return;
    }
    cleanups.push(() => Bun.spawnSync(["umount", small]));
    const models = folder();
    pulled(models);
    const { size } = statSync(join(models, "tiny", "model.safetensors"));
    const shares = evenShares(await planOf(join(models, "tiny")), 1, 1);
    const order = async () => {
      const { ask } = await source((name) => join(models, name));
      return {
        ...{ source: await ask(), model: "tiny", shares, rank: 0, onProgress: () => undefined },
        ...{ signal: new AbortController().signal, spareBytes: Number.NEGATIVE_INFINITY },
      };
    };
    writeFileSync(join(small, "ballast"), Buffer.alloc(200_000));
    expect(size).toBeGreaterThan(56_000);
    await expect(fetchShard(join(small, "parts"), await order())).rejects.toMatchObject({
      code: "disk_full",
      where: expect.stringContaining(small),
    });
    rmSync(join(small, "ballast"));
    Bun.spawnSync(["mount", "-o", "remount,size=16m", small]);
    const dir = await fetchShard(join(small, "parts"), await order());
    expect(await hasShard(dir, shares, 0)).toBe(true);
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
    await expect(from.read("../tiny/secret.pem", [run(0, 6)])).rejects.toThrow();
    await channel.closed;
    const wishes: [string, unknown][] = [
      ["config.json", [run(0, 1e9)]],
      ["config.json", [run(5, 5)]],
      ["config.json", []],
      ["config.json", [run(0, 1), [0, 8, 1e15, 1e15]]],
      ["config.json", [[0, 8, 4, 2]]],
      ["config.json", [[-4, 1, 1, 1]]],
      ["config.json", Array.from({ length: 600 }, () => run(0, 1))],
      // More bytes than one answer may have, all of them inside the file.
      ["model.safetensors", Array.from({ length: 400 }, () => run(0, 50_000))],
      ["secret.pem", [run(0, 6)]],
      ["none.json", [run(0, 1)]],
    ];
    for (const [name, strips] of wishes) {
      const again = await (await source((model) => join(models, model))).ask();
      await expect(
        again.read(name, strips as Strips[]),
        JSON.stringify(strips).slice(0, 60),
      ).rejects.toThrow();
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
    await expect(from.read("config.json", [run(0, 20)])).rejects.toThrow("not what it read");
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
    // Nor has it the headers: a says what the model needs.
    await eventually("b knows what would fit on each node", 15_000, async () => {
      const told = (await b.state()).nodes.map(({ ledger }) => ledger?.next ?? []);
      return (
        told.length === 2 &&
        told.every((next) => next.some((each) => each.model === "tiny" && each.context_that_fits > 0))
      );
    });
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
  180_000,
);

test.skipIf(!libraryHere)(
  "four nodes cause one download from outside: one pulls, the others' parts come from it",
  async () => {
    const made = writeTinyChatModel(join(folder(), "tiny"), 1);
    const files = readdirSync(made).map((path) => ({ path, content: readFileSync(join(made, path)) }));
    const hub = await MisbehavingHub.start("org/tiny", files);
    cleanups.push(() => hub.stop());
    const all = files.reduce((sum, { content }) => sum + content.length, 0);
    const lab = new ClusterLab(
      loopbackHosts(4).map((host) => {
        const [models, cache] = [folder(), folder()];
        const env = { CARAVAN_MODELS_DIR: models, HF_HUB_CACHE: cache, HF_ENDPOINT: hub.url };
        return { ...host, args: ["--transport", "tcp"], env: { ...host.env, ...env } };
      }),
    );
    cleanups.push(() => lab.close());
    await lab.start();
    const [a, b, , d] = lab.nodes;
    if (a === undefined || b === undefined || d === undefined) throw new Error("four nodes");
    const pulled = await a.post("/models/pull", { model: "org/tiny" });
    expect(await pulled.text()).toContain("success");
    expect(hub.bytesServed()).toBe(all);
    await eventually(
      "b hears of the model",
      40_000,
      // Not by a plan: that would read headers from the hub.
      async () => JSON.stringify((await b.state()).nodes).includes('"org/tiny"'),
    );
    const alone = await b.say("org/tiny", 30);
    // Every node has a rank.
    const instance = await lab.place(b, { model: "org/tiny", tensor: 2, pipeline: 2 });
    expect(new Set(instance.ranks.map(({ node }) => node)).size).toBe(4);
    for (const node of lab.nodes) expect(await node.say("org/tiny", 30)).toBe(alone);
    expect(hub.bytesServed(), "bytes from outside").toBe(all);
    const parts = await Promise.all(lab.nodes.map(async (node) => (await node.state()).parts ?? []));
    expect(parts.map(({ length }) => length)).toEqual([0, 1, 1, 1]);
    expect(parts[1]).toMatchObject([{ model: "org/tiny", in_use: true }]);
    const sizes = parts.map((each) => each[0]?.bytes ?? 0);
    console.log(`  ${all} bytes from outside, ${sizes.join(" + ")} of them from the first node`);
    // Parts that are in use stay; those that are not go when asked.
    expect(await (await d.fetch("/cluster/parts", { method: "DELETE" })).json()).toEqual({ bytes: 0 });
    await lab.removeAll();
    await eventually("the part is free", 40_000, async () => (await d.state()).parts?.[0]?.in_use === false);
    const cleaned = await d.fetch("/cluster/parts?model=org/tiny", { method: "DELETE" });
    expect(await cleaned.json()).toEqual({ bytes: sizes[3] });
    expect(readdirSync(join(lab.folder, "d", "parts"))).toEqual([]);
    expect(hub.bytesServed(), "bytes from outside").toBe(all);
  },
  240_000,
);
