// `caravan logits` from the command line: the file that it writes holds the reference's logits.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readNpy } from "../../src/model/npy.ts";
import { floats, integers, largestDifference, readGolden } from "./read-golden.ts";

const MODEL = join(import.meta.dir, "data/scout-4bit");
const MAIN = join(import.meta.dir, "../../src/main.ts");
let dir: string;

beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-golden-"));
});
afterAll(() => {
  rmSync(dir, { recursive: true });
});

test("caravan logits writes the reference's logits as float32 [tokens, vocabulary]", async () => {
  const golden = await readGolden(join(MODEL, "golden_hf.safetensors"));
  const own = await readGolden(join(MODEL, "golden.safetensors"));
  const tokens = [...integers(own, "prompt"), ...integers(own, "tokens").slice(0, -1)];
  const tokensFile = join(dir, "tokens.json");
  const out = join(dir, "logits.npy");
  writeFileSync(tokensFile, JSON.stringify({ tokens }));
  const options = ["--tokens-file", tokensFile, "--out", out, "--compute", "exact"];
  const run = Bun.spawn(
    [process.execPath, MAIN, "logits", MODEL, ...options, "--prefill", "40", "--piece", "7"],
    { stdout: "pipe", stderr: "pipe" },
  );
  const [stderr, code] = await Promise.all([run.stderr.text(), run.exited]);
  expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" });
  const { shape, data } = await readNpy(out);
  expect(shape).toEqual([70, 512]);
  const wanted = [floats(golden, "hf_prefill"), floats(golden, "hf_decode")].flatMap((part) => [
    ...(part ?? []),
  ]);
  expect(largestDifference(data, Float32Array.from(wanted))).toBeLessThan(2e-4);
});
