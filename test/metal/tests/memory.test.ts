// Memory on the fake runtime, which is told a working set and fails what exceeds it: the plan's numbers are enough and not too
// many, everything is resident before the first step, and a model that takes most of the GPU's memory loads and computes.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { evenShares } from "../../../src/cluster/even-shares.ts";
import { shardPlan } from "../../../src/cluster/shard.ts";
import { loadModel } from "../../../src/engine/load-model.ts";
import { readModelConfig } from "../../../src/model/config.ts";
import { type LoadPlan, makeLoadPlan } from "../../../src/model/load-plan.ts";
import { type KvType, type MemoryPlan, planMemory } from "../../../src/model/memory-plan.ts";
import { metalCountedBytes } from "../../../src/model/metal-memory.ts";
import { openCheckpoint } from "../../../src/model/safetensors.ts";

const ROOT = join(import.meta.dir, "../../..");
const DATA = join(ROOT, "test/golden/data");
const ready = (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && (process.env.MSLC ?? "") !== "";
if (!ready) console.log("skipped: memory on Metal needs the fake runtime: bash test/metal/run.sh");
const withFake = test.skipIf(!ready);
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-metal-memory-"));
});
afterAll(() => rmSync(dir, { recursive: true }));

const TOKENS = 40;
const PIECE = 20;

async function loadPlan(name: string): Promise<LoadPlan> {
  const folder = join(DATA, name);
  return makeLoadPlan(readModelConfig(folder), await openCheckpoint(folder));
}

/** The plans of the model's ranks, where it is split over `tensor` of them. */
async function ranksOf(name: string, tensor: number): Promise<LoadPlan[]> {
  const plan = await loadPlan(name);
  const shares = evenShares(plan, tensor, 1);
  return tensor === 1 ? [plan] : shares.map((_, rank) => shardPlan(plan, shares, rank));
}

/** What `caravan logits` plans for the checkpoint, or for its ranks together. */
async function planned(name: string, tensor = 1): Promise<MemoryPlan> {
  return planMemory(await ranksOf(name, tensor), {
    ...{ context: TOKENS, streams: 1, kvType: "bf16", threads: 1, available: 1e12 },
    ...{ maxTokens: PIECE, maxLogits: PIECE, gpu: { workingSet: 1e12, total: 1e12, alone: true } },
  });
}

const bytesOf = (plan: MemoryPlan) =>
  plan.weightsMapped + plan.weightsCopied + plan.kvBytes + plan.scratchBytes;

/** The share that the plan leaves to the system, so that it uses `bytes`. */
const workingSetFor = (bytes: number) => Math.ceil(bytes / 0.95) + 1;

async function logits(name: string, env: Record<string, string>, more: string[] = []) {
  const [tokensFile, out, log] = ["tokens.json", "logits.npy", "gpu.log"].map((file) => join(dir, file)) as [
    string,
    string,
    string,
  ];
  writeFileSync(tokensFile, JSON.stringify({ tokens: Array.from({ length: TOKENS }, (_, i) => i * 7) }));
  rmSync(log, { force: true });
  const options = [
    "--tokens-file",
    tokensFile,
    "--out",
    out,
    "--prefill",
    "38",
    "--piece",
    `${PIECE}`,
    ...more,
  ];
  const run = Bun.spawn(
    [
      process.execPath,
      join(ROOT, "src/main.ts"),
      "logits",
      join(DATA, name),
      "--device",
      "metal",
      ...options,
    ],
    { stdout: "pipe", stderr: "pipe", env: { ...process.env, FAKEMETAL_LOG: log, ...env } },
  );
  const [stderr, code] = await Promise.all([run.stderr.text(), run.exited]);
  const lines = existsSync(log) ? readFileSync(log, "utf8").trim().split("\n") : [];
  return { code, stderr, steps: lines.map((line) => JSON.parse(line) as { failed: boolean }) };
}

for (const name of ["scout-4bit", "maverick-4bit", "llama-4bit", "scout-hf-bf16"]) {
  withFake(
    `${name} runs in the memory that the plan says, all of it resident before the first step`,
    async () => {
      const needed = bytesOf(await planned(name));
      const { code, stderr, steps } = await logits(name, {
        FAKEMETAL_WORKING_SET: `${workingSetFor(needed)}`,
        FAKEMETAL_RESIDENT: "1",
      });
      expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
      expect(steps.length).toBe(4);
      expect(steps.some(({ failed }) => failed)).toBe(false);
    },
  );
}

withFake(
  "a model that takes 70 % of the working set loads and computes, in buffers smaller than a file",
  async () => {
    const needed = bytesOf(await planned("scout-4bit"));
    const { code, stderr } = await logits("scout-4bit", {
      FAKEMETAL_WORKING_SET: `${Math.ceil(needed / 0.7)}`,
      FAKEMETAL_MAX_BUFFER: "1200000",
      FAKEMETAL_RESIDENT: "1",
    });
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
  },
);

withFake.each([
  ["scout-4bit", 1],
  ["maverick-4bit", 1],
  ["llama-4bit", 1],
  ["scout-4bit", 2],
] as const)(
  "what is planned for %s on %d ranks is what the engines count, to the byte, with each kind of cache",
  async (name, tensor) => {
    const terms: [compute: "fast" | "exact", bits: 8 | 16, KvType][] = [
      ["fast", 16, "bf16"],
      ["exact", 16, "f32"],
      ["fast", 8, "q8"],
      ["exact", 8, "q8"],
    ];
    const ranks = await ranksOf(name, tensor);
    for (const [compute, bits, kvType] of terms.slice(tensor - 1)) {
      const loaded = await loadModel({
        ...{ model: name, modelDir: join(DATA, name), context: 300, streams: 3, threads: 1, tensor, compute },
        ...(bits === 8 ? { kvBits: bits } : {}),
        ...{ device: "metal", piece: () => 64 },
      });
      const { memory, memoryPlan, limits } = loaded;
      await loaded.close();
      const counted = ranks.reduce(
        (sum, rank) => sum + metalCountedBytes(rank, { kvType, exact: compute === "exact", ...limits }),
        0,
      );
      expect({ compute, bits, ...memory }).toEqual({
        ...{ compute, bits, weights_mapped: memoryPlan.weightsMapped },
        ...{ weights_copied: memoryPlan.weightsCopied, kv: memoryPlan.kvBytes, scratch: counted },
      });
      // Beside that: whole pages and hand-overs.
      expect(memoryPlan.scratchBytes).toBeGreaterThanOrEqual(counted);
      expect(memoryPlan.scratchBytes).toBeLessThan(counted + tensor * 1.2e6);
    }
  },
  60_000,
);

withFake(
  "ranks of one Mac are planned against its one working set, together, and refused together",
  async () => {
    const needed = bytesOf(await planned("scout-4bit", 2));
    const alone = bytesOf(await planned("scout-4bit"));
    expect(needed).toBeGreaterThan(alone);
    const enough = { FAKEMETAL_WORKING_SET: `${workingSetFor(needed)}` };
    const { code, stderr } = await logits("scout-4bit", enough, ["--tensor", "2"]);
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    // What one rank with the whole model could still have:
    const tight = { FAKEMETAL_WORKING_SET: `${workingSetFor(needed) - 5000}` };
    const refused = await logits("scout-4bit", tight, ["--tensor", "2"]);
    expect(refused.code).not.toBe(0);
    expect(refused.steps).toEqual([]);
    expect(refused.stderr).toMatch(/the GPU's working set is [\d.]+ GB/);
    expect((await logits("scout-4bit", tight)).code).toBe(0);
  },
  60_000,
);

withFake("without residency sets (macOS 14) the same model runs", async () => {
  const { code, stderr } = await logits("scout-4bit", { FAKEMETAL_MACOS: "14.5" });
  expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
});

withFake("without bfloat16 (macOS 13) it runs with float16", async () => {
  const { code, stderr } = await logits("scout-4bit", { FAKEMETAL_MACOS: "13.6" });
  expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
});

withFake("a model that exceeds the working set is refused with numbers and the way to raise it", async () => {
  const needed = bytesOf(await planned("scout-4bit"));
  const { code, stderr, steps } = await logits("scout-4bit", {
    FAKEMETAL_WORKING_SET: `${workingSetFor(needed) - 5000}`,
  });
  expect(code).not.toBe(0);
  expect(steps).toEqual([]);
  expect(stderr).toMatch(
    /the model needs [\d.]+ GB \(weights [\d.]+ GB, cache [\d.]+ GB, scratch [\d.]+ GB\)/,
  );
  expect(stderr).toMatch(/the GPU's working set is [\d.]+ GB/);
  expect(stderr).toMatch(/sudo sysctl iogpu\.wired_limit_mb=\d+/);
});
