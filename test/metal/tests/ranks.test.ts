// A model split over ranks on Metal, on the fake runtime: sums over ranks are made by the host between the GPU's operations, and
// the logits are the CPU's of one rank.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
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

async function logits(name: string, options: string[]): Promise<Float32Array> {
  const tokensFile = join(dir, "tokens.json");
  const out = join(dir, "logits.npy");
  writeFileSync(tokensFile, JSON.stringify({ tokens: Array.from({ length: TOKENS }, (_, i) => i * 7) }));
  const files = ["--tokens-file", tokensFile, "--out", out, "--prefill", "38", "--piece", "20"];
  const main = join(ROOT, "src/main.ts");
  const command = [process.execPath, main, "logits", join(DATA, name), "--compute", "exact", ...files];
  const run = Bun.spawn([...command, ...options], { stdout: "ignore", stderr: "pipe" });
  const said = await new Response(run.stderr).text();
  expect([await run.exited, said]).toEqual([0, ""]);
  const { data } = await readNpy(out);
  return data;
}

withFake.each([
  ["scout-4bit", ["--tensor", "2"]],
  ["maverick-4bit", ["--tensor", "2", "--pipeline", "2"]],
  ["llama-4bit", ["--pipeline", "2"]],
])(
  "%s with %p has the logits of one rank on the CPU",
  async (name, split) => {
    const one = await logits(name, ["--device", "cpu"]);
    const many = await logits(name, ["--device", "metal", ...split]);
    expect(many.length).toBe(one.length);
    const worst = one.reduce(
      (most, value, i) => Math.max(most, Math.abs(value - (many[i] ?? Number.NaN))),
      0,
    );
    expect(worst).toBeLessThan(1e-3);
  },
  120_000,
);
