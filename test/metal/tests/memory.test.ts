// Memory on the fake runtime, which is told a working set and fails what exceeds it: the plan's numbers are enough and not too
// many, everything is resident before the first step, and a model that takes most of the GPU's memory loads and computes.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readModelConfig } from "../../../src/model/config.ts";
import { makeLoadPlan } from "../../../src/model/load-plan.ts";
import { type MemoryPlan, planMemory } from "../../../src/model/memory-plan.ts";
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

/** What `caravan logits` plans for the checkpoint. */
async function planned(name: string): Promise<MemoryPlan> {
  const folder = join(DATA, name);
  const plan = makeLoadPlan(readModelConfig(folder), await openCheckpoint(folder));
  return planMemory(plan, {
    ...{ context: TOKENS, streams: 1, kvType: "bf16", threads: 1, available: 1e12 },
    ...{ maxTokens: PIECE, maxLogits: PIECE, gpu: { workingSet: 1e12, total: 1e12, alone: true } },
  });
}

const bytesOf = (plan: MemoryPlan) =>
  plan.weightsMapped + plan.weightsCopied + plan.kvBytes + plan.scratchBytes;

/** The share that the plan leaves to the system, so that it uses `bytes`. */
const workingSetFor = (bytes: number) => Math.ceil(bytes / 0.95) + 1;

async function logits(name: string, env: Record<string, string>) {
  const [tokensFile, out, log] = ["tokens.json", "logits.npy", "gpu.log"].map((file) => join(dir, file)) as [
    string,
    string,
    string,
  ];
  writeFileSync(tokensFile, JSON.stringify({ tokens: Array.from({ length: TOKENS }, (_, i) => i * 7) }));
  rmSync(log, { force: true });
  const options = ["--tokens-file", tokensFile, "--out", out, "--prefill", "38", "--piece", `${PIECE}`];
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
