// A plan of placements as other programs read it (caravan plan --json, GET /cluster/plan) and as a person does.

import type { Placement, PlacementNode, PlacementPlan } from "./placement.ts";
import { gigabytes, shapeName } from "./placement-words.ts";

/** Field names are part of the API. Bytes, tokens/s, milliseconds. */
export function planJson(model: string, plan: PlacementPlan, nodes: readonly PlacementNode[]): object {
  const name = (id: string) => nodes.find((node) => node.id === id)?.name ?? id;
  return {
    model,
    reason: plan.reason,
    assumptions: plan.assumptions,
    placements: plan.placements.map((placement, i) => ({
      recommended: i === 0,
      tensor: placement.tensor,
      pipeline: placement.pipeline,
      context: placement.context,
      streams: placement.streams,
      longest_context: placement.longestContext,
      tokens_per_second: rounded(placement.predicted.decode),
      tokens_per_second_all_streams: rounded(placement.predicted.decodeAll),
      prompt_tokens_per_second: rounded(placement.predicted.prefill),
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

function rounded(value: number | null): number | null {
  return value === null ? null : Math.round(value * 1000) / 1000;
}

/** Rows that a table shows; the others are counted. */
const SHOWN = 12;

/** Several lines: the recommendation with its nodes, all placements, what does not fit, what is assumed. */
export function planText(model: string, plan: PlacementPlan, nodes: readonly PlacementNode[]): string {
  const name = (id: string) => nodes.find((node) => node.id === id)?.name ?? id;
  const best = plan.placements[0];
  if (best === undefined) return `${plan.reason}\n`;
  const where = (placement: Placement) => placement.ranks.map(({ node }) => name(node)).join(", ");
  const lines = [
    `${model}: ${shapeName(best.tensor, best.pipeline)} on ${where(best)}, context ${best.context}, ${best.streams === 1 ? "1 stream" : `${best.streams} streams`}`,
    `  ${plan.reason}`,
    `  the longest context that fits: ${best.longestContext} tokens`,
    "",
    ...table([
      ["node", "rank", "layers", "share", "weights", "cache", "scratch", "of usable"],
      ...best.bytes.map((b) => [
        name(b.node),
        String(b.rank),
        (best.ranks[b.rank]?.layers ?? []).join("–"),
        shareOf(best, b.rank),
        gigabytes(b.weights),
        gigabytes(b.kv),
        gigabytes(b.scratch),
        gigabytes(b.usable),
      ]),
    ]),
    "",
    ...table([
      [
        "placement",
        "nodes",
        "tokens/s",
        "all streams",
        "prompt tokens/s",
        "read",
        "overhead",
        "exchange",
        "most bytes",
      ],
      ...plan.placements
        .slice(0, SHOWN)
        .map((p) => [
          shapeName(p.tensor, p.pipeline),
          String(p.ranks.length),
          figure(p.predicted.decode),
          figure(p.predicted.decodeAll),
          figure(p.predicted.prefill),
          `${p.predicted.readMs.toFixed(1)} ms`,
          `${p.predicted.overheadMs.toFixed(1)} ms`,
          `${p.predicted.exchangeMs.toFixed(1)} ms`,
          gigabytes(Math.max(...p.bytes.map(({ total }) => total))),
        ]),
    ]),
  ];
  if (plan.placements.length > SHOWN)
    lines.push(`  and ${plan.placements.length - SHOWN} more (--json lists them)`);
  const warned = plan.placements.slice(0, SHOWN).filter(({ warnings }) => warnings.length > 0);
  if (warned.length > 0) lines.push("");
  for (const p of warned)
    for (const warning of p.warnings) lines.push(`warning: ${shapeName(p.tensor, p.pipeline)}: ${warning}`);
  if (plan.refused.length > 0) lines.push("");
  for (const { tensor, pipeline, reason } of plan.refused.slice(0, SHOWN))
    lines.push(`does not fit: ${shapeName(tensor, pipeline)}: ${reason}`);
  if (plan.assumptions.length > 0) lines.push("");
  for (const assumption of plan.assumptions) lines.push(`note: ${assumption}`);
  return `${lines.join("\n")}\n`;
}

function shareOf({ ranks }: Placement, rank: number): string {
  const mine = ranks[rank];
  const group = ranks.filter(({ stage }) => stage === mine?.stage);
  const all = group.reduce((sum, { weight }) => sum + weight, 0);
  return `${(((mine?.weight ?? 0) / all) * 100).toFixed(0)} %`;
}

function figure(value: number | null): string {
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
