// A plan of placements as other programs read it (caravan plan --json, GET /cluster/plan) and as a person does: the text is made of the
// same report, whichever process planned.

import * as v from "valibot";
import type { PlacementNode, PlacementPlan } from "./placement.ts";
import { gigabytes, shapeName } from "./placement-words.ts";

const figure = v.number();
const perhaps = v.nullable(v.number());

/** Field names are part of the API. Bytes, tokens/s, milliseconds. */
export const PlanReportSchema = v.object({
  model: v.string(),
  /** Where its headers were read. */
  headers: v.string(),
  reason: v.string(),
  assumptions: v.array(v.string()),
  /** The recommended one first, then by speed. */
  placements: v.array(
    v.object({
      recommended: v.boolean(),
      tensor: figure,
      pipeline: figure,
      context: figure,
      streams: figure,
      longest_context: figure,
      tokens_per_second: perhaps,
      tokens_per_second_all_streams: perhaps,
      prompt_tokens_per_second: perhaps,
      milliseconds_a_token: v.object({ read: figure, overhead: figure, exchange: figure }),
      warnings: v.array(v.string()),
      ranks: v.array(
        v.object({
          node: v.string(),
          node_id: v.string(),
          rank: figure,
          stage: figure,
          layers: v.tuple([figure, figure]),
          weight: figure,
          bytes: v.object({ weights: figure, kv: figure, scratch: figure, total: figure, usable: figure }),
        }),
      ),
    }),
  ),
  refused: v.array(v.object({ tensor: figure, pipeline: figure, reason: v.string() })),
});
export type PlanReport = v.InferOutput<typeof PlanReportSchema>;
type ReportedPlacement = PlanReport["placements"][number];

/** headers: where the model's headers were read, as "this node's disk". */
export function planReport(
  model: string,
  headers: string,
  plan: PlacementPlan,
  nodes: readonly PlacementNode[],
): PlanReport {
  const name = (id: string) => nodes.find((node) => node.id === id)?.name ?? id;
  return {
    model,
    headers,
    reason: plan.reason,
    assumptions: plan.assumptions,
    placements: plan.placements.map((placement, i) => ({
      recommended: i === 0,
      tensor: placement.tensor,
      pipeline: placement.pipeline,
      context: placement.context,
      streams: placement.streams,
      longest_context: placement.longestContext,
      tokens_per_second: orNull(placement.predicted.decode),
      tokens_per_second_all_streams: orNull(placement.predicted.decodeAll),
      prompt_tokens_per_second: orNull(placement.predicted.prefill),
      milliseconds_a_token: {
        read: rounded(placement.predicted.readMs),
        overhead: rounded(placement.predicted.overheadMs),
        exchange: rounded(placement.predicted.exchangeMs),
      },
      warnings: placement.warnings,
      ranks: placement.bytes.map(({ node, rank, weights, kv, scratch, total, usable }) => ({
        node: name(node),
        node_id: node,
        rank,
        stage: placement.ranks[rank]?.stage ?? 0,
        layers: placement.ranks[rank]?.layers ?? [0, 0],
        weight: placement.ranks[rank]?.weight ?? 1,
        bytes: { weights, kv, scratch, total, usable },
      })),
    })),
    refused: plan.refused.map(({ tensor, pipeline, reason }) => ({ tensor, pipeline, reason })),
  };
}

function orNull(value: number | null): number | null {
  return value === null ? null : rounded(value);
}

function rounded(value: number): number {
  return Math.round(value * 1000) / 1000;
}

/** Rows that a table shows; the others are counted. */
const SHOWN = 12;

/** Several lines: the recommendation with its nodes, all placements, what does not fit, what is assumed. */
export function planText({ model, headers, reason, assumptions, placements, refused }: PlanReport): string {
  const best = placements[0];
  if (best === undefined) return `${reason}\n`;
  const where = best.ranks.map(({ node }) => node).join(", ");
  const lines = [
    `${model}: ${shapeName(best.tensor, best.pipeline)} on ${where}, context ${best.context}, ${best.streams === 1 ? "1 stream" : `${best.streams} streams`}`,
    `  ${reason}`,
    `  the longest context that fits: ${best.longest_context} tokens`,
    ...(headers === "" ? [] : [`  headers: ${headers}`]),
    "",
    ...table([
      ["node", "rank", "layers", "share", "weights", "cache", "scratch", "of usable"],
      ...best.ranks.map((rank) => [
        rank.node,
        String(rank.rank),
        rank.layers.join("–"),
        shareOf(best, rank),
        gigabytes(rank.bytes.weights),
        gigabytes(rank.bytes.kv),
        gigabytes(rank.bytes.scratch),
        gigabytes(rank.bytes.usable),
      ]),
    ]),
    "",
    ...table([
      [
        ...["placement", "nodes", "tokens/s", "all streams", "prompt tokens/s"],
        ...["read", "overhead", "exchange", "most bytes"],
      ],
      ...placements
        .slice(0, SHOWN)
        .map((p) => [
          shapeName(p.tensor, p.pipeline),
          String(p.ranks.length),
          speed(p.tokens_per_second),
          speed(p.tokens_per_second_all_streams),
          speed(p.prompt_tokens_per_second),
          `${p.milliseconds_a_token.read.toFixed(1)} ms`,
          `${p.milliseconds_a_token.overhead.toFixed(1)} ms`,
          `${p.milliseconds_a_token.exchange.toFixed(1)} ms`,
          gigabytes(Math.max(...p.ranks.map(({ bytes }) => bytes.total))),
        ]),
    ]),
  ];
  if (placements.length > SHOWN) lines.push(`  and ${placements.length - SHOWN} more (--json lists them)`);
  const warned = placements.slice(0, SHOWN).filter(({ warnings }) => warnings.length > 0);
  if (warned.length > 0) lines.push("");
  for (const p of warned)
    for (const warning of p.warnings) lines.push(`warning: ${shapeName(p.tensor, p.pipeline)}: ${warning}`);
  if (refused.length > 0) lines.push("");
  for (const shape of refused.slice(0, SHOWN))
    lines.push(`does not fit: ${shapeName(shape.tensor, shape.pipeline)}: ${shape.reason}`);
  if (assumptions.length > 0) lines.push("");
  for (const assumption of assumptions) lines.push(`note: ${assumption}`);
  return `${lines.join("\n")}\n`;
}

function shareOf(
  { ranks }: ReportedPlacement,
  { stage, weight }: ReportedPlacement["ranks"][number],
): string {
  const all = ranks.reduce((sum, rank) => sum + (rank.stage === stage ? rank.weight : 0), 0);
  return `${((weight / all) * 100).toFixed(0)} %`;
}

function speed(value: number | null): string {
  return value === null ? "unknown" : value.toFixed(value < 10 ? 2 : 1);
}

function table(rows: readonly (readonly string[])[]): string[] {
  const widths = rows.reduce<number[]>(
    (most, row) => row.map((cell, i) => Math.max(most[i] ?? 0, cell.length)),
    [],
  );
  return rows.map((row) =>
    `  ${row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  ")}`.trimEnd(),
  );
}
