// Whole models on the Metal backend over the fake runtime: logits of the tiny checkpoints against Hugging Face's, the command
// line, and what a decoded token costs in dispatches, allocations and waits.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { runLogits } from "../../../src/engine/logits.ts";
import { readNpy } from "../../../src/model/npy.ts";
import { floats, integers, largestDifference, readGolden } from "../../golden/read-golden.ts";

const DATA = join(import.meta.dir, "../../golden/data");
const MAIN = join(import.meta.dir, "../../../src/main.ts");
const ready = (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && (process.env.MSLC ?? "") !== "";
if (!ready) console.log("skipped: whole models on Metal need the fake runtime: bash test/metal/run.sh");
const models = readdirSync(DATA).filter((name) => existsSync(join(DATA, name, "golden.safetensors")));
const withFake = test.skipIf(!ready);
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-metal-"));
});
afterAll(() => {
  rmSync(dir, { recursive: true });
});

interface Golden {
  folder: string;
  tokens: number[];
  /** Hugging Face's logits of every position, where the checkpoint has them. */
  wanted?: Float32Array;
}

async function golden(name: string): Promise<Golden> {
  const folder = join(DATA, name);
  const own = await readGolden(join(folder, "golden.safetensors"));
  const tokens = [...integers(own, "prompt"), ...integers(own, "tokens").slice(0, -1)];
  const path = join(folder, "golden_hf.safetensors");
  if (!existsSync(path)) return { folder, tokens };
  const hf = await readGolden(path);
  const parts = [floats(hf, "hf_prefill"), floats(hf, "hf_decode")];
  return { folder, tokens, wanted: Float32Array.from(parts.flatMap((part) => [...(part ?? [])])) };
}

/**
 * Of the middle position: root mean square of the difference over that of `b`. The checkpoints have random routers, so a
 * rounding chooses another expert here and there, and such a position differs much; the middle one does not.
 */
function middleDifference(a: Float32Array, b: Float32Array, positions: number): number {
  const width = b.length / positions;
  const all = Array.from({ length: positions }, (_, position) => {
    let difference = 0;
    let size = 0;
    for (let i = position * width; i < (position + 1) * width; i++) {
      difference += ((a[i] ?? 0) - (b[i] ?? 0)) ** 2;
      size += (b[i] ?? 0) ** 2;
    }
    return Math.sqrt(difference / size);
  });
  return all.sort((x, y) => x - y)[positions >> 1] ?? Number.NaN;
}

for (const name of models) {
  withFake(
    `exact logits of ${name} are the reference's within 1e-3, through tiles and through single rows`,
    async () => {
      const { folder, tokens, wanted } = await golden(name);
      const options = { modelDir: folder, tokens, compute: "exact" } as const;
      const cpu = await runLogits({ ...options, device: "cpu" });
      // 40 tokens in tiles, 16 as a batch of rows, the rest alone
      const tiles = await runLogits({ ...options, device: "metal", prefill: 56, piece: 40 });
      expect(largestDifference(tiles.data, cpu.data)).toBeLessThan(1e-3);
      if (wanted !== undefined) expect(largestDifference(tiles.data, wanted)).toBeLessThan(1e-3);
      const rows = await runLogits({ ...options, device: "metal", prefill: 40, piece: 7 });
      expect(largestDifference(rows.data, tiles.data)).toBeLessThan(1e-3);
    },
    60_000,
  );

  withFake(
    `serving arithmetic of ${name} stays near the exact logits`,
    async () => {
      const { folder, tokens } = await golden(name);
      const exact = await runLogits({ modelDir: folder, tokens, compute: "exact" });
      const fast = await runLogits({
        modelDir: folder,
        tokens,
        compute: "fast",
        device: "metal",
        prefill: 40,
      });
      expect(middleDifference(fast.data, exact.data, tokens.length)).toBeLessThan(0.06);
    },
    60_000,
  );
}

for (const name of ["scout-4bit", "maverick-4bit", "llama-4bit", "llama4text-bf16"])
  withFake(
    `with a cache of 8 bits the logits of ${name} are the CPU's with such a cache, but for codes that rounding moves by one`,
    async () => {
      const { folder, tokens } = await golden(name);
      const options = { modelDir: folder, tokens, kvBits: 8 } as const;
      const cpu = await runLogits({ ...options, compute: "exact" });
      for (const steps of [
        { prefill: 56, piece: 40 },
        { prefill: 40, piece: 7 },
      ]) {
        const gpu = await runLogits({ ...options, ...steps, compute: "exact", device: "metal" });
        expect(middleDifference(gpu.data, cpu.data, tokens.length)).toBeLessThan(2e-3);
      }
      const exact = await runLogits({ modelDir: folder, tokens, compute: "exact" });
      const fast = await runLogits({ ...options, compute: "fast", device: "metal", prefill: 40 });
      expect(middleDifference(fast.data, exact.data, tokens.length)).toBeLessThan(0.06);
    },
    120_000,
  );

interface CommandBuffer {
  failed: boolean;
  dispatches: number;
  allocations: number;
  pipelines: number;
  command_buffers: number;
  waits: number;
  /** `read`: bytes by buffer index, of checked runs. */
  kernels: { name: string; threadgroups: number; read: number[] }[];
}

/** Runs `caravan logits` on Metal in a process of its own; returns its logits and the fake runtime's log. */
async function command(
  tokens: number[],
  folder: string,
  options: string[],
  env: Record<string, string> = {},
) {
  const [tokensFile, out, log] = ["tokens.json", "logits.npy", "gpu.log"].map((name) => join(dir, name)) as [
    string,
    string,
    string,
  ];
  writeFileSync(tokensFile, JSON.stringify({ tokens }));
  rmSync(log, { force: true });
  const run = Bun.spawn(
    [
      process.execPath,
      MAIN,
      "logits",
      folder,
      "--device",
      "metal",
      "--tokens-file",
      tokensFile,
      "--out",
      out,
      ...options,
    ],
    {
      stdout: "pipe",
      stderr: "pipe",
      env: { ...process.env, FAKEMETAL_LOG: log, ...env },
    },
  );
  const [stderr, code] = await Promise.all([run.stderr.text(), run.exited]);
  const lines = existsSync(log) ? readFileSync(log, "utf8").trim().split("\n") : [];
  return { code, stderr, out, log: lines.map((line) => JSON.parse(line) as CommandBuffer) };
}

withFake(
  "caravan logits --device metal: the reference's logits; a token is one command buffer, few dispatches, no allocation",
  async () => {
    const { folder, tokens, wanted } = await golden("scout-4bit");
    const { code, stderr, out, log } = await command(tokens, folder, [
      "--compute",
      "exact",
      "--prefill",
      "40",
      "--piece",
      "20",
    ]);
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    const { data } = await readNpy(out);
    expect(largestDifference(data, wanted ?? new Float32Array(0))).toBeLessThan(1e-3);
    const decode = log.slice(2);
    expect(decode.length).toBe(tokens.length - 40);
    const layers = 8;
    const first = decode[1];
    for (const [i, token] of decode.entries()) {
      expect(token.dispatches).toBe(7 * layers + 2); // 8 a layer where a long context is split
      expect(token.waits - (log[i + 1]?.waits ?? 0)).toBe(1); // the host waits once, at the end of a step
      if (i < 2 || first === undefined) continue;
      expect(token.allocations).toBe(first.allocations);
      expect(token.pipelines).toBe(first.pipelines);
    }
  },
  60_000,
);

withFake(
  "where a context is split over threadgroups a token takes one dispatch more in layers with full attention",
  async () => {
    const { folder } = await golden("scout-4bit");
    const tokens = Array.from({ length: 292 }, (_, i) => (i * 7) % 500);
    const { code, stderr, log } = await command(tokens, folder, ["--prefill", "288", "--piece", "144"]);
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    for (const { dispatches, kernels } of log.slice(-4)) {
      const joins = kernels.filter(({ name }) => name.startsWith("attention_join")).length;
      expect(joins).toBeGreaterThan(0);
      expect(dispatches).toBe(7 * 8 + joins + 2);
      expect(dispatches).toBeLessThanOrEqual(8 * 8 + 8);
    }
  },
  60_000,
);

withFake(
  "caravan logits --device metal --kv-bits 8: near the reference's logits, in as few dispatches, checked for races and bounds",
  async () => {
    const { folder, tokens, wanted } = await golden("llama-4bit");
    const options = ["--compute", "exact", "--kv-bits", "8", "--prefill", "60", "--piece", "30"];
    const { code, stderr, out, log } = await command(tokens, folder, options, { FAKEMETAL_CHECKED: "1" });
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    const { data } = await readNpy(out);
    const near = wanted ?? (await runLogits({ modelDir: folder, tokens, compute: "exact" })).data;
    expect(middleDifference(data, near, tokens.length)).toBeLessThan(0.02);
    const layers = log.at(-1)?.kernels.filter(({ name }) => name.startsWith("rope_store")).length ?? 0;
    expect(log.at(-1)?.dispatches).toBe(6 * layers + 2);
  },
  120_000,
);

withFake(
  "a decoded token reads each code of a weight once",
  async () => {
    const { folder, tokens } = await golden("scout-4bit");
    const { code, log } = await command(
      tokens.slice(0, 20),
      folder,
      ["--compute", "exact", "--prefill", "18"],
      { FAKEMETAL_CHECKED: "1" },
    );
    expect(code).toBe(0);
    const token = log.at(-1)?.kernels ?? [];
    // The checkpoint: hidden 64, vocabulary 512, 8 heads and 4 of keys of 32, experts of 128 rows, 4 bits in groups of 64, bfloat16 scales.
    // A lane takes 16 columns, so four lanes load a group's scale: in one instruction, from one place, which memory sees once.
    // Tensors of one file share pages, so what was read counts for several buffers: their sum is what can be compared.
    const matrix = (rows: number, cols: number) => (rows * cols) / 2 + (rows * cols) / 8 + (rows * cols) / 8;
    const read = (prefix: string, buffers: number) =>
      token
        .filter(({ name }) => name.startsWith(prefix))
        .map((kernel) => kernel.read.slice(0, buffers).reduce((sum, bytes) => sum + bytes, 0));
    expect(read("matvec", 3).at(-1)).toBe(matrix(512, 64));
    expect(read("matvec", 9)[0]).toBe(matrix(256, 64) + 2 * matrix(128, 64));
    expect(read("experts_up", 12)).toEqual(Array(8).fill(4 * matrix(128, 64)));
    expect(read("experts_down", 6)).toEqual(Array(8).fill(2 * matrix(64, 128)));
  },
  60_000,
);

withFake(
  "a step is checked for races, bounds and uninitialised memory, in a random order of threads",
  async () => {
    const { folder, tokens, wanted } = await golden("scout-mixed");
    const { code, stderr, out } = await command(
      tokens,
      folder,
      ["--compute", "exact", "--prefill", "60", "--piece", "30"],
      { FAKEMETAL_CHECKED: "1" },
    );
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
    const { data } = await readNpy(out);
    if (wanted !== undefined) expect(largestDifference(data, wanted)).toBeLessThan(1e-3);
  },
  120_000,
);

const SMOLLM2 = join(import.meta.dir, "../../../.models/smollm2");
const withSmolLm = test.skipIf(!ready || !existsSync(join(SMOLLM2, "config.json")));
withSmolLm(
  "SmolLM2 (135M, `make fixtures`): exact logits and the next tokens are the CPU's",
  async () => {
    const tokens = Array.from({ length: 24 }, (_, i) => (i * 7919 + 13) % 49000);
    const options = { modelDir: SMOLLM2, tokens, compute: "exact", prefill: 20 } as const;
    const cpu = await runLogits({ ...options, device: "cpu" });
    const gpu = await runLogits({ ...options, device: "metal" });
    expect(largestDifference(gpu.data, cpu.data)).toBeLessThan(1e-3);
    const largest = (data: Float32Array, position: number) => {
      const row = data.subarray(position * cpu.vocab, (position + 1) * cpu.vocab);
      return row.indexOf(row.reduce((a, b) => Math.max(a, b)));
    };
    for (let i = 0; i < tokens.length; i++) expect(largest(gpu.data, i)).toBe(largest(cpu.data, i));
  },
  120_000,
);

withFake("a system without Metal says so", async () => {
  const { folder, tokens } = await golden("scout-4bit");
  const { code, stderr } = await command(tokens, folder, [], { CARAVAN_METAL_LIBRARY: "" });
  expect(code).not.toBe(0);
  expect(stderr).toMatch(/Metal is not available on this system/);
});
