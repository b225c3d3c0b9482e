// `--compute fast` (activations in 8 bits where the weights are quantized, the cache in 16): the same bits however the
// prompt is cut and whichever kernel set computes; close to the reference where that can be asked for. In a model with
// experts a rounding can choose another expert, which in these random checkpoints changes everything after it: their
// figures are printed, not judged.

import { describe, expect, test } from "bun:test";
import { bestCpu, cpuName } from "../../src/engine/binding.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { bitsOf, type GoldenCase, goldenCases, PIECES } from "./golden-case.ts";
import { type Closeness, closeness } from "./logit-closeness.ts";

/** Where the reference prefers its first token by this much, in logits, rounding must not choose another. */
const CLEAR_MARGIN = 0.5;
const MEAN_KL = 0.01;
/** The definition, scalar.c, is slow. */
const TIME_LIMIT_MS = 60_000;
/** CV_CPU_NEON of caravan.h: the sets of x86 are numbered below it, arm64's from it on. */
const FIRST_ARM_LEVEL = 16;
/** Compared over all kernel sets beside the small ones, which have a format each. */
const LARGER = ["scout-mixed", "llama4text-bf16"];

/** Names of the kernel sets that this machine can run, the definition first. */
function kernelSets(): string[] {
  const best = bestCpu().level;
  const first = best >= FIRST_ARM_LEVEL ? FIRST_ARM_LEVEL : 2;
  return [1, ...Array.from({ length: Math.max(0, best - first + 1) }, (_, i) => first + i)].map(cpuName);
}

async function fastCloseness(golden: GoldenCase, vocab: number): Promise<Closeness> {
  const [reference] = golden.references;
  if (reference === undefined) throw new Error(`no reference in ${golden.dir}`);
  return closeness(await golden.run({ compute: "fast" }), reference.logits, vocab, CLEAR_MARGIN);
}

const cases = goldenCases();

describe.each(cases)("$name in fast", ({ name, load }) => {
  test("gives the same bits whatever the pieces", async () => {
    const golden = await load();
    const whole = await golden.run({ compute: "fast" });
    for (const piece of PIECES)
      expect(bitsOf(await golden.run({ compute: "fast", piece }), whole), `pieces of ${piece}`).toBe(
        "the same bits",
      );
  });

  test("stays close to the reference, or says how far it is where experts are chosen", async () => {
    const golden = await load();
    const { vocabSize, layers } = readModelConfig(golden.dir);
    const found = await fastCloseness(golden, vocabSize);
    const { meanKl, worstKl, clear, clearAgreed, agreed, rows } = found;
    console.log(
      `${name} fast: mean KL ${meanKl.toExponential(1)}, worst ${worstKl.toExponential(1)}; ` +
        `same top token ${agreed}/${rows}, where the margin is above ${CLEAR_MARGIN} ${clearAgreed}/${clear}`,
    );
    expect(rows).toBe(golden.tokens.length);
    expect(Number.isFinite(meanKl)).toBe(true);
    if (layers.some(({ moe }) => moe)) return;
    expect(meanKl).toBeLessThan(MEAN_KL);
    expect(clear).toBeGreaterThan(0);
    expect(clearAgreed).toBe(clear);
  });
});

describe("every kernel set of this machine", () => {
  const sets = kernelSets();
  console.log(`kernel sets compared: ${sets.join(", ")}`);

  const compared = cases.filter(({ name }) => name.startsWith("formats-") || LARGER.includes(name));

  test.each(
    compared.flatMap((each) => [
      { ...each, compute: "exact" as const },
      { ...each, compute: "fast" as const },
    ]),
  )(
    "gives the same bits in $compute on $name, whole and token by token",
    async ({ load, compute }) => {
      const golden = await load();
      const wanted = await golden.run({ compute, cpu: "scalar" });
      for (const cpu of sets)
        for (const piece of [golden.prefill, 1])
          expect(
            bitsOf(await golden.run({ compute, cpu, piece }), wanted),
            `${cpu}, pieces of ${piece}`,
          ).toBe("the same bits");
    },
    TIME_LIMIT_MS,
  );
});
