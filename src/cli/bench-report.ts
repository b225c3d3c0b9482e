// A bench report as one HTML page: a table of every figure and plots against prompt length, context and streams.
// Everything is inside the page.

import type { BenchReport, BenchResult } from "../engine/bench-run.ts";
import type { Spread } from "../engine/bench-statistics.ts";
import { formatBytes } from "./progress.ts";
import { escapeHtml, type Plot, type PlotSeries, plotSvg } from "./svg-plot.ts";

const STYLE = `body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#111;background:#fff}
table{border-collapse:collapse}th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
small{color:#666}svg{margin:.5rem}svg text{font:12px system-ui,sans-serif;fill:#333}svg .title{font-weight:600;font-size:14px}
svg .grid{stroke:#ddd}@media(prefers-color-scheme:dark){body{color:#eee;background:#111}svg text{fill:#ccc}svg .grid{stroke:#333}td,th{border-color:#333}}`;

/** `now`: for the heading. */
export function reportHtml(report: BenchReport, now: Date): string {
  const title = `${report.model} on ${report.machine?.processor ?? report.device}`;
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>${escapeHtml(title)}</title><style>${STYLE}</style></head><body>
<h1>${escapeHtml(title)}</h1>
<p>${escapeHtml(heading(report))}<br><small>${now.toISOString()}</small></p>
${table(report)}
<div>${plots(report).map(plotSvg).join("\n")}</div>
${prefixes(report)}
${memory(report)}
</body></html>
`;
}

function heading({ threads, load_s, machine, device }: BenchReport): string {
  const parts = [`${threads} threads on ${device}`, `loaded in ${load_s} s`];
  if (machine !== undefined) {
    const note = machine.kernels_note === undefined ? "" : ` (${machine.kernels_note})`;
    parts.push(
      `kernels ${machine.kernels}${note}`,
      `reads ${(machine.read_bandwidth / 1e9).toFixed(1)} GB/s`,
    );
    if (machine.int8_multiply_adds !== undefined)
      parts.push(`${(machine.int8_multiply_adds / 1e9).toFixed(0)} G int8 multiply-adds/s`);
  }
  return parts.join(", ");
}

function table(report: BenchReport): string {
  const cell = ({ median, min, max }: Spread, limit?: number): string =>
    `<td>${median} <small>${min}–${max}${limit === undefined ? "" : `, ${percent(median, limit)} of ${limit}`}</small></td>`;
  const rows = report.results.map((r, i) => {
    const limits = report.machine?.limits[i];
    return `<tr><td>${r.prompt_tokens}</td><td>${r.generate}</td><td>${r.streams}</td>${cell(r.prompt_tps, limits?.prompt_tps)}${cell(r.generation_tps, limits?.generation_tps)}${cell(r.ttft_ms)}<td>${r.itl_ms.p50} / ${r.itl_ms.p95} / ${r.itl_ms.p99}</td></tr>`;
  });
  return `<table><tr><th>prompt</th><th>answer</th><th>streams</th><th>prompt tokens/s</th><th>answer tokens/s</th><th>first token ms</th><th>between tokens ms p50/p95/p99</th></tr>
${rows.join("\n")}</table>`;
}

export function percent(value: number, limit: number): string {
  return `${((value / limit) * 100).toFixed(0)} %`;
}

function plots(report: BenchReport): Plot[] {
  const { results, machine } = report;
  const streams = [...new Set(results.map((r) => r.streams))].sort((a, b) => a - b);
  const bySize = (figure: "prompt_tps" | "generation_tps" | "ttft_ms"): PlotSeries[] =>
    streams.map((n) => ({
      name: n === 1 ? "1 stream" : `${n} streams`,
      points: results.filter((r) => r.streams === n).map((r) => point(r.prompt_tokens, r[figure])),
    }));
  const prompts = [...new Set(results.map((r) => r.prompt_tokens))].sort((a, b) => a - b);
  const byStreams = prompts.map((n) => ({
    name: `after ${n} tokens`,
    points: results
      .filter((r) => r.prompt_tokens === n)
      .map((r: BenchResult) => point(r.streams, r.generation_tps)),
  }));
  const limit: PlotSeries[] =
    machine === undefined
      ? []
      : [
          {
            name: "read bandwidth",
            dashed: true,
            points: results.map((r, i) => ({ x: r.streams, y: machine.limits[i]?.generation_tps ?? 0 })),
          },
        ];
  return [
    { title: "Reading a prompt", x: "prompt tokens", y: "tokens/s", series: bySize("prompt_tps") },
    {
      title: "Answering after a prompt",
      x: "context tokens",
      y: "tokens/s",
      series: bySize("generation_tps"),
    },
    {
      title: "Answering many streams",
      x: "streams",
      y: "tokens/s, all together",
      series: [...byStreams, ...limit],
    },
    { title: "First token", x: "prompt tokens", y: "ms", series: bySize("ttft_ms") },
  ];
}

function point(x: number, { median, min, max }: Spread) {
  return { x, y: median, low: min, high: max };
}

function prefixes({ prefix }: BenchReport): string {
  if (prefix === undefined) return "";
  const rows = prefix.map(
    (p) =>
      `<tr><td>${p.prompt_tokens}</td><td>${p.cached_tokens}</td><td>${p.ttft_ms.median}</td><td>${p.cached_ttft_ms.median}</td><td>${p.step_ms.median}</td></tr>`,
  );
  return `<h2>Known prompts</h2><table><tr><th>prompt</th><th>cached</th><th>first token ms, computed whole</th><th>with the prefix cached</th><th>a step ms</th></tr>${rows.join("")}</table>`;
}

function memory({ memory: m }: BenchReport): string {
  if (m === undefined) return "";
  const rows = (["weights", "kv", "scratch"] as const).map(
    (part) =>
      `<tr><th>${part}</th><td>${formatBytes(m.planned[part])}</td><td>${formatBytes(m.engine[part])}</td></tr>`,
  );
  return `<h2>Memory</h2><table><tr><th></th><th>planned</th><th>taken</th></tr>${rows.join("")}</table><p>Resident, the interpreter included: ${formatBytes(m.resident)}</p>`;
}
