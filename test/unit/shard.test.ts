// What each rank loads: all ranks together have every element of the model once, cut where formats allow it, and heads,
// widths and layers that belong together stay together.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { evenShares } from "../../src/cluster/even-shares.ts";
import { type Share, shardPlan } from "../../src/cluster/shard.ts";
import { sharesOf } from "../../src/cluster/uneven-shares.ts";
import { CaravanError } from "../../src/errors.ts";
import { parseModelConfig } from "../../src/model/config.ts";
import {
  elementBits,
  type LoadPlan,
  makeLoadPlan,
  type PlannedTensor,
  placeOf,
  SCALE_BYTES,
  type SourceView,
  tensorMemory,
} from "../../src/model/load-plan.ts";
import { SLOT, type Slot } from "../../src/model/tensor-names.ts";
import { llama4Checkpoint, llama4Config, llama4Shards, llama4Tensors } from "../tools/llama4-shapes.ts";
import { type MixedModel, mixedModels, mixedPlan } from "../tools/mixed-shapes.ts";

const REPLICATED: readonly Slot[] = [SLOT.attnNorm, SLOT.ffnNorm, SLOT.router];

/** A model and a grid of ranks over it, with weights from none at all to uneven. */
const grids = mixedModels.chain((model) =>
  fc
    .record({
      tensor: fc.integer({ min: 1, max: 5 }),
      cuts: fc.subarray(Array.from({ length: model.layers - 1 }, (_, i) => i + 1)),
    })
    .chain(({ tensor, cuts }) =>
      fc
        .array(
          fc
            .array(fc.constantFrom(0, 1, 1, 2, 5), { minLength: tensor, maxLength: tensor })
            .filter((weights) => weights.some((weight) => weight > 0)),
          { minLength: cuts.length + 1, maxLength: cuts.length + 1 },
        )
        .map((weights) => ({ model, shares: sharesOf([0, ...cuts, model.layers], weights) })),
    ),
);

const cutAll = (whole: LoadPlan, shares: readonly Share[]) =>
  shares.map((_, rank) => shardPlan(whole, shares, rank));

type Interval = [start: number, end: number];

/** Byte ranges of one part of a tensor in its file. */
function intervals(t: PlannedTensor, view: SourceView, bytesOfRow: number): Interval[] {
  const out: Interval[] = [];
  const lines = t.transposed ? t.cols : t.rows;
  for (let e = 0; e < t.experts; e++)
    for (let r = 0; r < lines; r++) {
      const start = view.offset + e * view.outerStride + r * view.rowStride;
      out.push([start, start + bytesOfRow]);
    }
  return out;
}

/** Of codes, scales and biases together; they never share bytes. The global scale goes with every slice. */
function bytesOf(t: PlannedTensor): Interval[] {
  const line = t.transposed ? t.rows : t.cols;
  const out = intervals(t, t.weight, (line * elementBits(t)) / 8);
  const scales =
    t.group === 0 || t.scaleType === undefined ? 0 : (t.cols / t.group) * SCALE_BYTES[t.scaleType];
  for (const view of [t.scales, t.biases]) if (view !== undefined) out.push(...intervals(t, view, scales));
  return out;
}

/** Sorted and joined; throws where two overlap. */
function joined(list: Interval[]): Interval[] {
  const out: Interval[] = [];
  for (const [start, end] of list.sort((a, b) => a[0] - b[0])) {
    const last = out.at(-1);
    if (last !== undefined && start < last[1])
      throw new Error(`bytes ${start} to ${last[1]} are there twice`);
    if (last !== undefined && start === last[1]) last[1] = end;
    else out.push([start, end]);
  }
  return out;
}

/** The ranks' tensors of one tensor of the model, by rank. */
function partsOf(whole: PlannedTensor, plans: readonly LoadPlan[]): (PlannedTensor | undefined)[] {
  return plans.map((plan) => {
    const [first, end] = placeOf(plan).layers;
    if (whole.layer >= 0 && (whole.layer < first || whole.layer >= end)) return undefined;
    const layer = whole.layer < 0 ? -1 : whole.layer - first;
    return plan.tensors.find((t) => t.slot === whole.slot && t.layer === layer);
  });
}

describe("the ranks of any grid", () => {
  test("have every element of every tensor once, or all of it on every rank that needs it", () => {
    fc.assert(
      fc.property(grids, ({ model, shares }) => {
        const whole = mixedPlan(model);
        const plans = cutAll(whole, shares);
        const stages = placeOf(plans[0] as LoadPlan).stages;
        for (const t of whole.tensors) {
          const parts = partsOf(t, plans);
          const stageOf = (rank: number) => shares[rank]?.stage ?? -1;
          if (t.slot === SLOT.embed || t.slot === SLOT.finalNorm || REPLICATED.includes(t.slot)) {
            const needs = (rank: number): boolean =>
              t.slot === SLOT.embed
                ? stageOf(rank) === 0
                : t.slot === SLOT.finalNorm
                  ? stageOf(rank) === stages - 1
                  : inLayers(shares[rank], t.layer);
            parts.forEach((part, rank) => {
              expect(part === undefined ? undefined : { ...part, layer: t.layer }).toEqual(
                needs(rank) ? t : undefined,
              );
            });
            continue;
          }
          const found = parts.filter((part) => part !== undefined);
          expect(joined(found.flatMap(bytesOf))).toEqual(joined(bytesOf(t)));
          for (const part of found)
            expect([part.format, part.experts, part.globalScale]).toEqual([
              t.format,
              t.experts,
              t.globalScale,
            ]);
        }
        const count = plans.reduce((sum, plan) => sum + plan.tensors.length, 0);
        const known = whole.tensors.reduce((sum, t) => sum + partsOf(t, plans).filter(Boolean).length, 0);
        expect(count).toBe(known);
      }),
      { numRuns: 120 },
    );
  });

  test("cut codes on 32-bit words and scales on whole groups", () => {
    fc.assert(
      fc.property(grids, ({ model, shares }) => {
        const whole = mixedPlan(model);
        const plans = cutAll(whole, shares);
        for (const t of whole.tensors) {
          if (t.group === 0) continue;
          for (const part of partsOf(t, plans)) {
            if (part === undefined) continue;
            expect(part.cols % part.group).toBe(0);
            expect((part.weight.offset - t.weight.offset) % 4).toBe(0);
            expect((part.cols * part.bits) % 32).toBe(0);
          }
        }
      }),
      { numRuns: 80 },
    );
  });

  test("keep together what is computed together", () => {
    fc.assert(
      fc.property(grids, ({ model, shares }) => {
        const whole = mixedPlan(model);
        for (const plan of cutAll(whole, shares)) expectWholeShapes(model, plan);
      }),
      { numRuns: 80 },
    );
  });

  test("sum up to the model's bytes and what every rank has for itself", () => {
    fc.assert(
      fc.property(grids, ({ model, shares }) => {
        const whole = mixedPlan(model);
        const plans = cutAll(whole, shares);
        const bytes = (t: PlannedTensor) => bytesOf(t).reduce((sum, [start, end]) => sum + end - start, 0);
        const all = (list: readonly PlannedTensor[]) => list.reduce((sum, t) => sum + bytes(t), 0);
        const { tensorSize } = placeOf(plans[0] as LoadPlan);
        const replicated = whole.tensors.filter(
          ({ slot }) => slot === SLOT.embed || slot === SLOT.finalNorm || REPLICATED.includes(slot),
        );
        expect(plans.reduce((sum, plan) => sum + all(plan.tensors), 0)).toBe(
          all(whole.tensors) + (tensorSize - 1) * all(replicated),
        );
      }),
      { numRuns: 60 },
    );
  });

  test("are what they were where one rank has everything", () => {
    fc.assert(
      fc.property(mixedModels, (model) => {
        const whole = mixedPlan(model);
        const shard = shardPlan(whole, sharesOf([0, model.layers], [[1]]), 0);
        expect(shard.tensors).toEqual(whole.tensors);
        expect(placeOf(shard)).toEqual(placeOf(whole));
      }),
      { numRuns: 20 },
    );
  });
});

function inLayers(share: Share | undefined, layer: number): boolean {
  return share !== undefined && layer >= share.layers[0] && layer < share.layers[1];
}

/** The shapes that the engine asks of a rank's plan (caravan.h, "A rank's plan"). */
function expectWholeShapes(model: MixedModel, plan: LoadPlan): void {
  const place = placeOf(plan);
  const at = (slot: Slot, layer: number) => plan.tensors.find((t) => t.slot === slot && t.layer === layer);
  expect(place.heads).toBe(place.kvHeads * model.queriesPerKey);
  const { headDim, hidden } = model;
  const [first, end] = place.layers;
  const shape = (t: PlannedTensor | undefined) => t && [t.rows, t.cols];
  const attention = (rows: number, cols: number) => (place.heads === 0 ? undefined : [rows, cols]);
  const mlps = [
    [SLOT.gate, SLOT.up, SLOT.down],
    [SLOT.expertGate, SLOT.expertUp, SLOT.expertDown],
    [SLOT.sharedGate, SLOT.sharedUp, SLOT.sharedDown],
  ] as const;
  for (let layer = 0; layer < end - first; layer++) {
    expect(shape(at(SLOT.q, layer))).toEqual(attention(place.heads * headDim, hidden));
    expect(shape(at(SLOT.k, layer))).toEqual(attention(place.kvHeads * headDim, hidden));
    expect(shape(at(SLOT.v, layer))).toEqual(attention(place.kvHeads * headDim, hidden));
    expect(shape(at(SLOT.o, layer))).toEqual(attention(hidden, place.heads * headDim));
    if (model.biases) {
      expect(at(SLOT.qBias, layer)?.cols).toBe(place.heads === 0 ? undefined : place.heads * headDim);
      expect(at(SLOT.oBias, layer)?.cols).toBe(place.tensorRank === 0 ? hidden : undefined);
    }
    for (const [gate, up, down] of mlps) {
      const width = at(down, layer)?.cols;
      expect([at(gate, layer)?.rows, at(up, layer)?.rows]).toEqual([width, width]);
    }
    if (model.biases && model.architecture === "llama") {
      expect(at(SLOT.gateBias, layer)?.cols).toBe(at(SLOT.gate, layer)?.rows);
      expect(at(SLOT.downBias, layer)?.cols).toBe(place.tensorRank === 0 ? hidden : undefined);
    }
  }
  expect(at(SLOT.head, -1)?.rows ?? 0).toBe(place.vocabRows);
  if (place.stage < place.stages - 1) expect([place.vocabFirst, place.vocabRows]).toEqual([0, 0]);
}

const scout = () =>
  makeLoadPlan(
    parseModelConfig(llama4Config("scout"), "/m/config.json"),
    llama4Checkpoint(llama4Shards(llama4Tensors("scout")), "/m"),
  );

describe("Scout's 60.6 GB", () => {
  test("in four tensor ranks are a quarter each, two KV heads and 2048 columns, and only those are copied", () => {
    const whole = scout();
    const plans = cutAll(whole, evenShares(whole, 4, 1));
    for (const plan of plans) {
      expect(placeOf(plan)).toMatchObject({ heads: 10, kvHeads: 2, vocabRows: 202048 / 4 });
      const down = plan.tensors.find(({ slot }) => slot === SLOT.expertDown);
      expect(down).toMatchObject({ experts: 16, rows: 5120, cols: 2048 });
      let [mapped, copied] = [0, 0];
      for (const t of plan.tensors) {
        const memory = tensorMemory(t);
        mapped += memory.mapped;
        copied += memory.copied;
      }
      // The embedding table, 0.58 GB, is on every rank.
      expect(mapped + copied).toBeCloseTo((60.621e9 - 0.582e9) / 4 + 0.582e9, -7.5);
      expect(copied / (mapped + copied)).toBeLessThan(0.35);
    }
  });

  test("in three stages have whole layers with their own numbers, and the last one fewer for its head", () => {
    const whole = scout();
    const shares = evenShares(whole, 1, 3);
    const plans = cutAll(whole, shares);
    expect(shares.map(({ layers }) => layers)).toEqual([
      [0, 16],
      [16, 33],
      [33, 48],
    ]);
    const layersOf = (plan: LoadPlan) => new Set(plan.tensors.map(({ layer }) => layer));
    expect(plans.map((plan) => Math.max(...layersOf(plan)))).toEqual([15, 16, 14]);
    expect(plans.map((plan) => plan.tensors.some(({ slot }) => slot === SLOT.embed))).toEqual([
      true,
      false,
      false,
    ]);
    expect(plans.map((plan) => plan.tensors.some(({ slot }) => slot === SLOT.head))).toEqual([
      false,
      false,
      true,
    ]);
  });
});

describe("shares that make no grid are refused", () => {
  const whole = mixedPlan({
    architecture: "llama",
    layers: 4,
    kvHeads: 2,
    queriesPerKey: 2,
    headDim: 32,
    hidden: 64,
    dense: 128,
    expert: 128,
    experts: 1,
    vocab: 100,
    tied: false,
    biases: false,
    fusedExperts: false,
    formats: [],
  });
  const cases: [string, Share[], RegExp][] = [
    [
      "a gap between stages",
      sharesOf([0, 2, 4], [[1], [1]]).map((s, i) => (i === 1 ? { ...s, layers: [3, 4] } : s)),
      /rank 1 has layers 3 to 4/,
    ],
    ["layers that nobody has", sharesOf([0, 3], [[1, 1]]), /3 of 4 layers/],
    ["no ranks", [], /0 ranks/],
    ["ranks out of order", sharesOf([0, 4], [[1, 1]]).toReversed(), /place 0/],
    [
      "stages of different sizes",
      [...sharesOf([0, 2], [[1, 1]]), { rank: 2, stage: 1, tensorRank: 0, layers: [2, 4], weight: 1 }],
      /3 ranks in 2 stages/,
    ],
  ];
  test.each(cases)("%s", (_, shares, message) => {
    expect(() => shardPlan(whole, shares, 0)).toThrow(message);
  });

  test("more stages than layers", () => {
    expect(() => evenShares(whole, 1, 5)).toThrow(CaravanError);
    expect(() => evenShares(whole, 1, 5)).toThrow(/4 layers cannot be split into 5 stages/);
  });
});
