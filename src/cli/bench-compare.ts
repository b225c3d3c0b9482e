// Compares a bench report with an earlier one: a figure has become worse only where the two spreads do not overlap, so
// that noise is not called a regression.

import * as v from "valibot";
import type { BenchReport, BenchResult } from "../engine/bench-run.ts";
import type { Spread } from "../engine/bench-statistics.ts";

const SpreadSchema = v.object({ median: v.number(), min: v.number(), max: v.number() });

/** The part of an earlier report that comparing needs. */
export const EarlierReportSchema = v.object({
  model: v.string(),
  threads: v.number(),
  results: v.array(
    v.object({
      prompt_tokens: v.number(),
      generate: v.number(),
      streams: v.number(),
      prompt_tps: SpreadSchema,
      generation_tps: SpreadSchema,
      ttft_ms: SpreadSchema,
    }),
  ),
});

export type EarlierReport = v.InferOutput<typeof EarlierReportSchema>;

export interface Comparison {
  prompt_tokens: number;
  generate: number;
  streams: number;
  figure: "prompt_tps" | "generation_tps" | "ttft_ms";
  before: Spread;
  now: Spread;
  /** Median now over median before. */
  ratio: number;
  verdict: "worse" | "same" | "better";
}

/** Medians closer than this are the same even where the spreads do not overlap (few trials have narrow spreads). */
const TOLERANCE = 0.03;

/** One entry for each figure that both reports have. */
export function compareReports(before: EarlierReport, now: Pick<BenchReport, "results">): Comparison[] {
  const list: Comparison[] = [];
  for (const result of now.results) {
    const earlier = before.results.find((each) => sameSetting(each, result));
    if (earlier === undefined) continue;
    const { prompt_tokens, generate, streams } = result;
    for (const figure of ["prompt_tps", "generation_tps", "ttft_ms"] as const) {
      const compared = compare(earlier[figure], result[figure], figure !== "ttft_ms");
      list.push({
        ...{ prompt_tokens, generate, streams, figure },
        ...{ before: earlier[figure], now: result[figure], ...compared },
      });
    }
  }
  return list;
}

type Setting = Pick<BenchResult, "prompt_tokens" | "generate" | "streams">;

function sameSetting(a: Setting, b: Setting): boolean {
  return a.prompt_tokens === b.prompt_tokens && a.generate === b.generate && a.streams === b.streams;
}

function compare(before: Spread, now: Spread, moreIsBetter: boolean): Pick<Comparison, "ratio" | "verdict"> {
  const ratio = before.median === 0 ? 1 : now.median / before.median;
  const lower = now.max < before.min && ratio < 1 - TOLERANCE;
  const higher = now.min > before.max && ratio > 1 + TOLERANCE;
  if (!lower && !higher) return { ratio, verdict: "same" };
  return { ratio, verdict: higher === moreIsBetter ? "better" : "worse" };
}

/** For a terminal, one line a figure. */
export function showComparison(list: readonly Comparison[]): string {
  const spread = ({ median, min, max }: Spread): string => `${median} (${min}–${max})`;
  const lines = list.map(({ prompt_tokens, generate, streams, figure, before, now, ratio, verdict }) =>
    [
      `${prompt_tokens} + ${generate}, ${streams} streams`.padEnd(26),
      figure.padEnd(15),
      `${spread(before)} → ${spread(now)}`.padEnd(52),
      `${(ratio * 100 - 100).toFixed(1)} %`.padStart(8),
      ` ${verdict}`,
    ].join(" "),
  );
  return `${lines.join("\n")}\n`;
}
