// The engine's logits in `--compute exact` of tiny checkpoints against what other programs computed in float32 over the
// same weights: prompt and continuation, through the cache, the prompt whole and in pieces.

import { describe, expect, test } from "bun:test";
import { bitsOf, goldenCases, PIECES } from "./golden-case.ts";
import { largestDifference } from "./read-golden.ts";

/** Two other float32 implementations differ by up to 4e-5 on these checkpoints. */
const TOLERANCE = 2e-4;

const cases = goldenCases();

test("the committed goldens are there", () => {
  const names = cases.map(({ name }) => name);
  for (const name of [
    "formats-2bit",
    "formats-3bit",
    "formats-5bit",
    "formats-f16-f32",
    "formats-llama-biases",
    "formats-mxfp4",
    "formats-mxfp8",
    "formats-nvfp4",
    "llama-4bit",
    "llama4text-bf16",
    "maverick-4bit",
    "scout-4bit",
    "scout-hf-bf16",
    "scout-mixed",
  ])
    expect(names).toContain(name);
});

describe.each(cases)("$name", ({ load }) => {
  test.each(PIECES)("gives the reference's logits with the prompt in pieces of %d", async (piece) => {
    const golden = await load();
    const logits = await golden.run({ compute: "exact", piece });
    expect(golden.references.length).toBeGreaterThan(0);
    for (const { by, logits: wanted } of golden.references)
      expect(largestDifference(logits, wanted), `difference from ${by}`).toBeLessThan(TOLERANCE);
  });

  test("gives the same bits whatever the pieces", async () => {
    const golden = await load();
    const whole = await golden.run({ compute: "exact" });
    for (const piece of PIECES)
      expect(bitsOf(await golden.run({ compute: "exact", piece }), whole), `pieces of ${piece}`).toBe(
        "the same bits",
      );
  });
});
