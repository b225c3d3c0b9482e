// The size of prompt pieces beside running streams settles where a step takes the wanted multiple of the streams' own time.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { shareFairly, TokenBudget } from "../../src/scheduler/token-budget.ts";

const options = { maxTokens: 512, slowdown: 2, firstTargetMs: 200, minTokens: 8 };

/** Runs steps against a machine: time of streams, and of a piece beside them. Gives the pieces and steps' times. */
function run(
  budget: TokenBudget,
  steps: number,
  machine: { streams: (step: number) => number; piece: (tokens: number) => number },
): { pieces: number[]; ms: number[] } {
  const pieces: number[] = [];
  const ms: number[] = [];
  for (let i = 0; i < steps; i++) {
    const tokens = budget.promptTokens(8);
    const time = machine.streams(i) + (tokens === 0 ? 0 : machine.piece(tokens));
    budget.observe(8, tokens, time * 1e6);
    pieces.push(tokens);
    ms.push(time);
  }
  return { pieces, ms };
}

describe("a budget of prompt tokens", () => {
  test("gives a prompt everything when nothing else runs", () => {
    expect(new TokenBudget(options).promptTokens(0)).toBe(512);
  });

  test("measures the streams alone first, then fills a step up to the wanted time", () => {
    const { pieces, ms } = run(new TokenBudget(options), 30, { streams: () => 40, piece: (n) => n * 0.5 });
    expect(pieces[0]).toBe(0);
    expect(pieces.at(-1)).toBe(80);
    expect(ms.at(-1)).toBe(80);
  });

  test("settles where small pieces cost more a token than large ones", () => {
    // 20 ms to read the weights once, and 0.25 ms a token.
    const { ms } = run(new TokenBudget(options), 60, { streams: () => 40, piece: (n) => 20 + n * 0.25 });
    for (const time of ms.slice(40)) expect(Math.abs(time - 80)).toBeLessThan(4);
  });

  test("follows streams that become slower, by a step of theirs now and then", () => {
    const { pieces, ms } = run(new TokenBudget(options), 600, {
      streams: (step) => (step < 100 ? 20 : 60),
      piece: (n) => n,
    });
    expect(Math.abs((ms[90] ?? 0) - 40)).toBeLessThan(3);
    expect(ms.slice(500).filter((time) => time > 125)).toEqual([]);
    expect(pieces.at(-1) ?? 0).toBeGreaterThan(40);
    expect(pieces.filter((tokens) => tokens === 0).length).toBeLessThan(24);
  });

  test("lets prompts advance even where a single token costs more than the streams", () => {
    const { pieces } = run(new TokenBudget(options), 20, { streams: () => 1, piece: (n) => n * 10 });
    expect(pieces.at(-1)).toBe(8);
  });
});

test("shares are whole, nobody is cut while another gets more, and the first ones get what is left over", () => {
  expect(shareFairly([100, 5, 100], 45)).toEqual([20, 5, 20]);
  expect(shareFairly([60, 60, 5], 32)).toEqual([14, 13, 5]);
  expect(shareFairly([3, 2], 45)).toEqual([3, 2]);
  expect(shareFairly([9, 9, 9], 2)).toEqual([1, 1, 0]);
  expect(shareFairly([9, 9], 0)).toEqual([0, 0]);
  fc.assert(
    fc.property(
      fc.array(fc.integer({ min: 1, max: 50 }), { minLength: 1, maxLength: 9 }),
      fc.nat(200),
      (wants, budget) => {
        const shares = shareFairly(wants, budget);
        const sum = (list: number[]): number => list.reduce((total, each) => total + each, 0);
        expect(sum(shares)).toBe(Math.min(budget, sum(wants)));
        const most = Math.max(...shares);
        for (const [i, share] of shares.entries()) {
          expect(share).toBeLessThanOrEqual(wants[i] ?? 0);
          if (share < (wants[i] ?? 0)) expect(share).toBeGreaterThanOrEqual(most - 1);
        }
      },
    ),
    { numRuns: 300, seed: 20260804 },
  );
});
