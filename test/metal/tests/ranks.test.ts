// A model split over ranks on Metal, on the fake runtime: sums over ranks are made by the host between the GPU's operations, and
// the logits are the CPU's of one rank, in whatever way GPU and host wait for each other. A decoded token is one command buffer
// with as many hand-overs as there are sums; a rank that dies or stops ends the others soon, though their GPUs wait for it.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readNpy } from "../../../src/model/npy.ts";

const ROOT = join(import.meta.dir, "../../..");
const DATA = join(ROOT, "test/golden/data");
const ready = (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && (process.env.MSLC ?? "") !== "";
if (!ready) console.log("skipped: ranks on Metal need the fake runtime: bash test/metal/run.sh");
const withFake = test.skipIf(!ready);
const TOKENS = 40;
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-metal-ranks-"));
});
afterAll(() => rmSync(dir, { recursive: true }));

/** `caravan logits` over TOKENS tokens, the prompt in two pieces of 15, then token by token. */
function start(name: string, options: string[], env: Record<string, string> = {}) {
  const tokensFile = join(dir, "tokens.json");
  const out = join(dir, "logits.npy");
  writeFileSync(tokensFile, JSON.stringify({ tokens: Array.from({ length: TOKENS }, (_, i) => i * 7) }));
  const files = ["--tokens-file", tokensFile, "--out", out, "--prefill", "30", "--piece", "15"];
  const main = join(ROOT, "src/main.ts");
  const command = [process.execPath, main, "logits", join(DATA, name), "--compute", "exact", ...files];
  const run = Bun.spawn([...command, ...options], {
    ...{ stdout: "ignore", stderr: "pipe" },
    env: { ...process.env, ...env },
  });
  return { run, out };
}

async function logits(name: string, options: string[], env: Record<string, string> = {}) {
  const { run, out } = start(name, options, env);
  const said = await new Response(run.stderr).text();
  expect([await run.exited, said]).toEqual([0, ""]);
  const { data } = await readNpy(out);
  return data;
}

/** Of one rank on the CPU, computed once. */
const onOne = new Map<string, Promise<Float32Array>>();
function reference(name: string): Promise<Float32Array> {
  const known = onOne.get(name) ?? logits(name, ["--device", "cpu"]);
  onOne.set(name, known);
  return known;
}

const worst = (a: Float32Array, b: Float32Array) =>
  a.reduce((most, value, i) => Math.max(most, Math.abs(value - (b[i] ?? Number.NaN))), 0);

withFake.each([
  ["scout-4bit", ["--tensor", "2"]],
  ["maverick-4bit", ["--tensor", "2", "--pipeline", "2"]],
  ["llama-4bit", ["--pipeline", "2"]],
])(
  "%s with %p has the logits of one rank on the CPU",
  async (name, split) => {
    const one = await reference(name);
    const many = await logits(name, ["--device", "metal", ...split]);
    expect(many.length).toBe(one.length);
    expect(worst(one, many)).toBeLessThan(1e-3);
  },
  120_000,
);

interface CommandBuffer {
  failed: boolean;
  event_waits: number;
  waits: number;
  kernels: { name: string }[];
}

const LAYERS = 8;

describe("tensor 2, a hand-over by", () => {
  withFake.each(["spin", "event", "look", "wait"])(
    "%s: the logits of one rank, on both ranks only the hand-overs that the sums need",
    async (way) => {
      for (const file of readdirSync(dir)) if (file.startsWith("gpu-")) rmSync(join(dir, file));
      const one = await reference("scout-4bit");
      const many = await logits("scout-4bit", ["--device", "metal", "--tensor", "2"], {
        FAKEMETAL_LOG: join(dir, "gpu-%d.log"),
        CARAVAN_METAL_HAND_OVER: way,
        CARAVAN_METAL_PATIENCE_MS: "5000",
      });
      expect(worst(one, many)).toBeLessThan(1e-3);
      const logs = readdirSync(dir).filter((file) => file.startsWith("gpu-"));
      expect(logs.length).toBe(2);
      for (const log of logs) {
        const lines = readFileSync(join(dir, log), "utf8").trim().split("\n");
        const buffers = lines.map((line) => JSON.parse(line) as CommandBuffer);
        const within = way === "spin" || way === "event";
        // The last tokens: one command buffer each where the GPU waits for the host, else one for each part of the step.
        const each = within ? 1 : 2 * LAYERS + 1;
        const last = buffers.slice(-each * 5);
        expect(last.every(({ failed }) => !failed)).toBe(true);
        const kernels = last.flatMap((buffer) => buffer.kernels.map(({ name }) => name));
        const handOvers = kernels.filter((name) => name === "hand_over").length;
        expect(handOvers).toBe(way === "spin" ? 5 * 2 * LAYERS : 0);
        expect(kernels.length - handOvers).toBe(5 * (7 * LAYERS + 2));
        const before = buffers.at(-each * 5 - 1);
        const waits = (last.at(-1)?.event_waits ?? 0) - (before?.event_waits ?? 0);
        expect(waits).toBe(way === "event" ? 5 * 2 * LAYERS : 0);
        if (within) expect((last.at(-1)?.waits ?? 0) - (before?.waits ?? 0)).toBeLessThanOrEqual(6); // at the end of a token; the log is written a little before or after
      }
    },
    120_000,
  );

  withFake.each([
    ["spin", "SIGKILL"],
    ["event", "SIGKILL"],
    ["spin", "SIGSTOP"],
    ["event", "SIGSTOP"],
  ] as const)(
    "%s: a rank that gets %s in a step ends the other within its deadline, with an error",
    async (way, signal) => {
      for (const file of readdirSync(dir)) if (file.startsWith("gpu-")) rmSync(join(dir, file));
      const { run } = start("scout-4bit", ["--device", "metal", "--tensor", "2"], {
        FAKEMETAL_LOG: join(dir, "gpu-%d.log"),
        CARAVAN_METAL_HAND_OVER: way,
      });
      const said = new Response(run.stderr).text();
      // The other rank's process, when it has begun to compute.
      const other = await until(() =>
        readdirSync(dir)
          .map((file) => /^gpu-(\d+)\.log$/.exec(file)?.[1])
          .find((pid) => pid !== undefined && Number(pid) !== run.pid && steps(pid) > 0),
      );
      const struck = performance.now();
      process.kill(Number(other), signal);
      expect(await run.exited).not.toBe(0);
      const seconds = (performance.now() - struck) / 1000;
      if (signal === "SIGSTOP") killIfThere(Number(other));
      expect(await said).toMatch(/rank 1|told to stop/); // whoever was the first to see it
      expect(seconds).toBeLessThan(20);
    },
    60_000,
  );
});

/** Command buffers that a process has logged. */
const steps = (pid: string) => readFileSync(join(dir, `gpu-${pid}.log`), "utf8").split("\n").length - 1;

async function until<T>(look: () => T | undefined): Promise<T> {
  for (const end = performance.now() + 40_000; performance.now() < end; ) {
    const found = look();
    if (found !== undefined) return found;
    await Bun.sleep(5);
  }
  throw new Error("it did not come");
}

function killIfThere(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // the one that started it has ended it
  }
}
