// What a step reads and a prompt token multiplies, by the load plan alone.

import { expect, test } from "bun:test";
import type { LoadPlan, PlannedTensor } from "../../src/model/load-plan.ts";
import { SLOT } from "../../src/model/tensor-names.ts";
import { multiplyAddsOfPromptToken, weightBytesOfStep } from "../../src/model/token-work.ts";

function tensor(change: Partial<PlannedTensor>): PlannedTensor {
  return {
    ...{ slot: SLOT.q, layer: 0, name: "t", format: "bf16", bits: 0, group: 0, scaleType: undefined },
    ...{ transposed: false, experts: 1, rows: 8, cols: 16 },
    weight: { file: 0, offset: 0, outerStride: 256, rowStride: 32 },
    ...{ scales: undefined, biases: undefined, globalScale: undefined, ...change },
  };
}

// Only the fields that are read.
const plan = {
  config: { experts: 4, expertsPerToken: 1 },
  tensors: [
    tensor({ slot: SLOT.embed, rows: 100 }),
    tensor({ slot: SLOT.head, rows: 100 }),
    tensor({}),
    tensor({ slot: SLOT.expertUp, experts: 4 }),
  ],
} as unknown as LoadPlan;

test("a step reads the head and the layers, and of the experts those that its rows picked", () => {
  const expert = 8 * 16 * 2;
  const fixed = 100 * 16 * 2 + expert;
  expect(weightBytesOfStep(plan, 1)).toBeCloseTo(fixed + expert, 6);
  expect(weightBytesOfStep(plan, 2)).toBeCloseTo(fixed + 4 * expert * (1 - 0.75 ** 2), 6);
  expect(weightBytesOfStep(plan, 1000)).toBeCloseTo(fixed + 4 * expert, 6);
});

test("a prompt token passes its own expert and every other matrix but the head", () => {
  expect(multiplyAddsOfPromptToken(plan)).toBe(8 * 16 * 2);
});
