// Shares of nodes that differ, against trying everything.

import { expect, test } from "bun:test";
import fc from "fast-check";
import {
  cappedFractions,
  type NodeStrength,
  type StageCosts,
  stageBounds,
} from "../../src/cluster/uneven-shares.ts";

const count = (max: number) => fc.integer({ min: 0, max });
const pipes = fc.integer({ min: 1, max: 7 }).chain((layers) =>
  fc.record({
    costs: fc.record({
      held: fc.array(fc.integer({ min: 1, max: 6 }), { minLength: layers, maxLength: layers }),
      read: fc.array(fc.integer({ min: 1, max: 6 }), { minLength: layers, maxLength: layers }),
      embedding: count(3),
      head: count(4),
      scratch: count(2),
    }),
    groups: fc.array(
      fc.array(fc.record({ usable: count(20), speed: fc.integer({ min: 1, max: 4 }) }), {
        minLength: 1,
        maxLength: 2,
      }),
      { minLength: 2, maxLength: Math.max(2, Math.min(4, layers)) },
    ),
    alone: fc.boolean(),
  }),
);

/** Time of a split, Infinity where a stage has no room. */
function timeOf(
  costs: StageCosts,
  groups: readonly NodeStrength[][],
  alone: boolean,
  bounds: readonly number[],
): number {
  const times = groups.map((group, s) => {
    const [first, end] = [bounds[s] ?? 0, bounds[s + 1] ?? 0];
    const sum = (list: readonly number[]) => list.slice(first, end).reduce((total, n) => total + n, 0);
    const head = s === groups.length - 1 ? costs.head : 0;
    const each = costs.scratch + (s === 0 ? costs.embedding : 0);
    const room = group.reduce((total, { usable }) => total + Math.max(0, usable - each), 0);
    if (sum(costs.held) + head > room) return Number.POSITIVE_INFINITY;
    return (sum(costs.read) + head) / group.reduce((total, { speed }) => total + speed, 0);
  });
  return alone ? times.reduce((total, t) => total + t, 0) : Math.max(...times);
}

/** Every way to cut `layers` into `stages`. */
function* cuts(layers: number, stages: number, bounds: number[] = [0]): Generator<number[]> {
  const last = bounds.at(-1) ?? 0;
  if (stages === 1) {
    if (layers > last) yield [...bounds, layers];
    return;
  }
  for (let next = last + 1; next < layers; next++) yield* cuts(layers, stages - 1, [...bounds, next]);
}

test("layers go to stages in the best of all ways, or nowhere when none fits", () => {
  fc.assert(
    fc.property(pipes, ({ costs, groups, alone }) => {
      let best = Number.POSITIVE_INFINITY;
      for (const bounds of cuts(costs.held.length, groups.length))
        best = Math.min(best, timeOf(costs, groups, alone, bounds));
      const found = stageBounds(costs, groups, alone);
      const time = found === undefined ? Number.POSITIVE_INFINITY : timeOf(costs, groups, alone, found);
      if (best === Number.POSITIVE_INFINITY) expect(found).toBeUndefined();
      else expect(time).toBeCloseTo(best, 9);
    }),
    { numRuns: 400 },
  );
});

test("fractions make one whole, none above its cap, those below it in proportion to speed", () => {
  const nodes = fc.array(
    fc.record({ speed: fc.integer({ min: 1, max: 50 }), cap: fc.double({ min: 0, max: 1, noNaN: true }) }),
    {
      minLength: 1,
      maxLength: 16,
    },
  );
  fc.assert(
    fc.property(nodes, (list) => {
      const caps = list.map(({ cap }) => cap);
      const fractions = cappedFractions(
        list.map(({ speed }) => speed),
        caps,
      );
      expect(fractions.reduce((sum, f) => sum + f, 0)).toBeCloseTo(1, 9);
      if (caps.reduce((sum, cap) => sum + cap, 0) <= 1) return;
      fractions.forEach((f, i) => {
        expect(f).toBeLessThanOrEqual((caps[i] ?? 0) + 1e-12);
      });
      const rates = fractions.flatMap((f, i) =>
        f < (caps[i] ?? 0) - 1e-9 ? [f / (list[i]?.speed ?? 1)] : [],
      );
      for (const rate of rates) expect(rate).toBeCloseTo(rates[0] ?? 0, 9);
    }),
    { numRuns: 400 },
  );
});
