// The placement's sizes are those of the plans that ranks will load: checked against shardPlan and planMemory themselves.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { profileModel, rankWorks } from "../../src/cluster/model-profile.ts";
import { rankMemory } from "../../src/cluster/rank-memory.ts";
import { shardPlan } from "../../src/cluster/shard.ts";
import { sharesOf } from "../../src/cluster/uneven-shares.ts";
import { placeOf, tensorMemory } from "../../src/model/load-plan.ts";
import { planMemory } from "../../src/model/memory-plan.ts";
import { multiplyAddsOfPromptToken, weightBytesOfStep } from "../../src/model/token-work.ts";
import { mixedModels, mixedPlan } from "../tools/mixed-shapes.ts";

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
            .array(fc.constantFrom(0, 1, 1, 2, 0.37), { minLength: tensor, maxLength: tensor })
            .filter((weights) => weights.some((weight) => weight > 0)),
          { minLength: cuts.length + 1, maxLength: cuts.length + 1 },
        )
        .map((weights) => ({ model, shares: sharesOf([0, ...cuts, model.layers], weights) })),
    ),
);

describe("for any grid of ranks over any model", () => {
  test("weights are exactly those of the rank's load plan", () => {
    fc.assert(
      fc.property(grids, ({ model, shares }) => {
        const whole = mixedPlan(model);
        const works = rankWorks(profileModel(whole), shares);
        shares.forEach((_, rank) => {
          const plan = shardPlan(whole, shares, rank);
          const bytes = plan.tensors.reduce((sum, t) => {
            const { mapped, copied } = tensorMemory(t);
            return sum + mapped + copied;
          }, 0);
          expect(works[rank]?.weights).toBe(bytes);
          expect(works[rank]?.place).toEqual(placeOf(plan));
        });
      }),
      { numRuns: 150 },
    );
  });

  test("cache and scratch are exactly what loading plans for the rank", () => {
    const terms = {
      kvType: "bf16",
      threads: 4,
      maxTokens: 64,
      maxLogits: 20,
      streams: 3,
      context: 96,
    } as const;
    fc.assert(
      fc.property(grids, ({ model, shares }) => {
        const whole = mixedPlan(model);
        const profile = profileModel(whole);
        rankWorks(profile, shares).forEach((work, rank) => {
          const planned = planMemory(shardPlan(whole, shares, rank), { ...terms, available: 1e12 });
          expect(rankMemory(profile, work, terms)).toEqual({
            weights: planned.weightsMapped + planned.weightsCopied,
            kv: planned.kvBytes,
            scratch: planned.scratchBytes,
          });
        });
      }),
      { numRuns: 150 },
    );
  });

  test("what one rank reads and multiplies is what the whole model's plan says", () => {
    fc.assert(
      // A router of one row counts as a vector there.
      fc.property(
        mixedModels.filter(({ experts }) => experts > 1),
        (model) => {
          const whole = mixedPlan(model);
          const [work] = rankWorks(profileModel(whole), sharesOf([0, model.layers], [[1]]));
          const { experts, expertsPerToken } = whole.config;
          const touched = experts === 0 ? 0 : 1 - (1 - expertsPerToken / experts) ** 3;
          const read = (work?.read ?? 0) + (work?.readExperts ?? 0) * touched;
          expect(read).toBeCloseTo(weightBytesOfStep(whole, 3), 3);
          expect(work?.multiplyAdds).toBeCloseTo(multiplyAddsOfPromptToken(whole), 3);
        },
      ),
      { numRuns: 60 },
    );
  });
});
