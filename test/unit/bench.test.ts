// What bench makes of measurements, without an engine: speeds from times, comparisons, the page.

import { describe, expect, test } from "bun:test";
import { compareReports } from "../../src/cli/bench-compare.ts";
import { reportHtml } from "../../src/cli/bench-report.ts";
import type { BenchReport, BenchResult } from "../../src/engine/bench-run.ts";
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

const flat = (median: number, width = 1) => ({ median, min: median - width, max: median + width });

function result(change: Partial<BenchResult> = {}): BenchResult {
  return {
    ...{ prompt_tokens: 512, generate: 128, streams: 1 },
    ...{ prompt_tps: flat(400), generation_tps: flat(100), ttft_ms: flat(50) },
    ...{ itl_ms: { p50: 10, p95: 11, p99: 12 }, peak_memory_bytes: 1e9 },
    ...change,
  };
}

describe("comparing with an earlier report", () => {
  const before = { model: "m", threads: 2, results: [result()] };
  const verdicts = (change: Partial<BenchResult>) =>
    compareReports(before, { results: [result(change)] }).map(({ verdict }) => verdict);

  test("calls a figure worse only beyond both spreads and the tolerance", () => {
    expect(verdicts({})).toEqual(["same", "same", "same"]);
    expect(verdicts({ generation_tps: flat(90) })).toEqual(["same", "worse", "same"]);
    expect(verdicts({ generation_tps: flat(90, 9.5) })).toEqual(["same", "same", "same"]);
    expect(verdicts({ generation_tps: flat(97.5, 0.1) })).toEqual(["same", "same", "same"]);
    expect(verdicts({ prompt_tps: flat(500) })).toEqual(["better", "same", "same"]);
  });

  test("knows that a later first token is worse", () => {
    expect(verdicts({ ttft_ms: flat(70) })).toEqual(["same", "same", "worse"]);
    expect(verdicts({ ttft_ms: flat(30) })).toEqual(["same", "same", "better"]);
  });

  test("takes only results of the same setting", () => {
    expect(compareReports(before, { results: [result({ streams: 8 })] })).toEqual([]);
  });
});

describe("a report as a page", () => {
  const report: BenchReport = {
    ...{ model: "<model>", device: "cpu", threads: 2, load_s: 0.5 },
    results: [512, 4096].flatMap((prompt_tokens) =>
      [1, 8].map((streams) => result({ prompt_tokens, streams })),
    ),
    machine: {
      ...{ processor: "A & B", kernels: "scalar", read_bandwidth: 2e10 },
      limits: Array.from({ length: 4 }, () => ({ generation_tps: 200 })),
    },
    memory: {
      planned: { weights: 1e9, kv: 1e8, scratch: 1e7 },
      engine: { weights: 1e9, kv: 1e8, scratch: 1e7 },
      resident: 1.3e9,
    },
  };
  const html = reportHtml(report, new Date(0));

  test("asks nothing of the network, runs no script and escapes names", () => {
    expect(html).not.toMatch(/https?:|src=|href=|<script|@import|url\(/);
    expect(html).toContain("&#60;model&#62; on A &#38; B");
  });

  test("plots every series with as many points as there are results, inside the picture", () => {
    const plots = html.split("<svg").slice(1);
    expect(plots.length).toBe(4);
    for (const plot of plots) {
      expect(plot).not.toMatch(/NaN|Infinity|undefined/);
      const lines = [...plot.matchAll(/points="([^"]*)"/g)];
      expect(lines.length).toBeGreaterThanOrEqual(2);
      for (const [, points] of lines)
        for (const pair of (points ?? "").split(" ")) {
          const [x = Number.NaN, y = Number.NaN] = pair.split(",").map(Number);
          expect(x >= 0 && x <= 560 && y >= 0 && y <= 320).toBe(true);
        }
    }
    expect(html).toContain("50 % of 200");
  });
});
