// The engine's logits of tiny checkpoints against what Hugging Face transformers and mlx-lm computed in float32 over the
// same weights: prompt and continuation, through the cache, the prompt whole and in pieces.

import { describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { runLogits } from "../../src/engine/logits.ts";
import {
  FURTHER,
  floats,
  type GoldenTensors,
  goldenFolders,
  integers,
  largestDifference,
  readGolden,
} from "./read-golden.ts";

/** Two other float32 implementations differ by up to 4e-5 on these checkpoints. */
const TOLERANCE = 2e-4;
/** Most prompt tokens fed at once. The goldens' chunks are of 16 tokens: 7 and 10 straddle edges, 16 ends on them. */
const PIECES = [40, 1, 7, 10, 16];

interface Reference {
  by: string;
  /** float32 [prompt + decoded, vocab] */
  logits: Float32Array;
}

/** What to compare with: mlx-lm with the model's own eps in QK norm (its release has another), and Hugging Face. */
function references(mlx: GoldenTensors, hf: GoldenTensors): Reference[] {
  const fixed = mlx.has("fixeps_prefill") ? "fixeps_" : "";
  const pairs: [string, GoldenTensors, string][] = [
    ["mlx-lm", mlx, fixed],
    ["Hugging Face", hf, "hf_"],
  ];
  return pairs.flatMap(([by, tensors, prefix]) => {
    const prefill = floats(tensors, `${prefix}prefill`);
    const decode = floats(tensors, `${prefix}decode`);
    return prefill === undefined || decode === undefined
      ? []
      : [{ by, logits: Float32Array.from([...prefill, ...decode]) }];
  });
}

const folders = goldenFolders("golden.safetensors");

test("the committed goldens are there", () => {
  const names = folders.map(({ name }) => name);
  for (const name of [
    "llama-4bit",
    "llama4text-bf16",
    "maverick-4bit",
    "scout-4bit",
    "scout-hf-bf16",
    "scout-mixed",
  ])
    expect(names).toContain(name);
});

test.skipIf(!existsSync(FURTHER))(
  "further goldens are compared too (skipped where ../shared/golden is not)",
  () => {
    expect(existsSync(FURTHER)).toBe(true);
  },
);

describe.each(folders)("$name", ({ dir }) => {
  test.each(PIECES)("gives the reference's logits with the prompt in pieces of %d", async (piece) => {
    const mlx = await readGolden(join(dir, "golden.safetensors"));
    const all = references(mlx, await readGolden(join(dir, "golden_hf.safetensors")));
    const prompt = integers(mlx, "prompt");
    // The last greedy token was never fed.
    const tokens = [...prompt, ...integers(mlx, "tokens").slice(0, -1)];
    const { data, vocab } = await runLogits({
      modelDir: dir,
      tokens,
      prefill: prompt.length,
      piece,
      compute: "exact",
      threads: 2,
    });
    expect(data.length).toBe(tokens.length * vocab);
    expect(all.length).toBeGreaterThan(0);
    for (const { by, logits } of all)
      expect(largestDifference(data, logits), `difference from ${by}`).toBeLessThan(TOLERANCE);
  });
});
