// What bench makes of the times at which tokens came, without an engine.

import { describe, expect, test } from "bun:test";
import { quantile, spread } from "../../src/engine/bench-statistics.ts";
import { trialOf } from "../../src/engine/bench-trial.ts";

/** Times first, first + step, … */
const every = (first: number, step: number, count: number): number[] =>
  Array.from({ length: count }, (_, i) => first + i * step);

describe("tokens a second of several streams", () => {
  test("count only while all of them decode, whatever the head start of one", () => {
    // The first stream had its first token at 100 and runs alone, twice as fast, until the other one starts at 200.
    const early = [...every(100, 5, 20), ...every(200, 10, 9)];
    const late = every(200, 10, 9);
    const trial = trialOf([early, late], true, 8);
    expect(trial.generationTps).toBeCloseTo(200, 6);
    expect(trial.firstTokenMs).toEqual([100, 200]);
    expect(trial.allStartedMs).toBe(200);
    expect(new Set(trial.gapsMs)).toEqual(new Set([10]));
  });

  test("go until the slowest stream has its tokens, and count what the others produced meanwhile", () => {
    const fast = every(100, 5, 41);
    const slow = every(100, 10, 11);
    // 10 further tokens of the slow one are 100 ms, 20 of the fast one.
    expect(trialOf([fast, slow], true, 10).generationTps).toBeCloseTo(300, 6);
  });

  test("end where a stream ended by itself before the others were done", () => {
    const short = every(100, 10, 5);
    const long = every(100, 10, 50);
    expect(trialOf([short, long], true, 20).generationTps).toBeCloseTo(200, 6);
  });

  test("are each stream's own where one runs after the other", () => {
    const trial = trialOf([every(50, 10, 11), every(300, 10, 11)], false, 10);
    expect(trial.generationTps).toBeCloseTo(100, 6);
    expect(trial.gapsMs.length).toBe(20);
  });
});

test("spreads and quantiles of nothing and of one value are what they are", () => {
  expect(spread([], 1)).toEqual({ median: 0, min: 0, max: 0 });
  expect(spread([2.26], 1)).toEqual({ median: 2.3, min: 2.3, max: 2.3 });
  expect(quantile([1, 2, 3, 4], 0.5)).toBe(2.5);
});
