// caravan bench: how fast a model runs on this machine.

import type { RanksResult } from "../engine/bench-ranks.ts";
import { type BenchReport, runBench } from "../engine/bench-run.ts";
import type { Spread } from "../engine/bench-statistics.ts";
import { CaravanError } from "../errors.ts";
import { AtomicFile } from "../model/atomic-file.ts";
import { compareReports, EarlierReportSchema, showComparison } from "./bench-compare.ts";
import { percent, reportHtml } from "./bench-report.ts";
import { type Arguments, type Command, usage } from "./command.ts";
import { readJsonFile } from "./json-file.ts";
import { findWeights } from "./model-argument.ts";
import { formatBytes, ProgressLine } from "./progress.ts";
import { RANK_OPTIONS, rankOptions } from "./rank-options.ts";

/** A list of whole numbers, `1,8,16`. */
function numbers(args: Arguments, name: string, fallback: number[]): number[] {
  const text = args.text(name);
  if (text === undefined) return fallback;
  const list = text.split(",").map(Number);
  if (!list.every((n) => Number.isInteger(n) && n >= 1 && n <= 1 << 24)) {
    throw usage(`--${name} takes whole numbers separated by commas, not "${text}"`);
  }
  return list;
}

function show(report: BenchReport): string {
  const { machine, memory } = report;
  const spread = ({ median, min, max }: Spread, limit?: number) =>
    `${median} (${min}–${max})${limit === undefined ? "" : ` ${percent(median, limit)}`}`;
  const lines = [
    `${report.model} on ${report.device}: ${machine?.processor ?? "unknown processor"}, ${report.threads} threads${report.ranks === undefined ? "" : " a rank"}, loaded in ${report.load_s} s`,
  ];
  if (machine !== undefined) {
    const int8 = machine.int8_multiply_adds;
    lines.push(
      `ceilings: reads ${(machine.read_bandwidth / 1e9).toFixed(1)} GB/s${int8 === undefined ? "" : `, ${(int8 / 1e9).toFixed(0)} G int8 multiply-adds/s with ${machine.kernels}`}${machine.kernels_note === undefined ? "" : ` (${machine.kernels_note})`}; % = share of what they allow for the weights`,
    );
  }
  lines.push(
    "",
    "prompt  answer  streams  prompt tokens/s              answer tokens/s              first token ms          between tokens ms p50/p95/p99",
  );
  report.results.forEach((r, i) => {
    const limits = machine?.limits[i];
    lines.push(
      [
        String(r.prompt_tokens).padEnd(6),
        String(r.generate).padEnd(6),
        String(r.streams).padEnd(7),
        spread(r.prompt_tps, limits?.prompt_tps).padEnd(27),
        spread(r.generation_tps, limits?.generation_tps).padEnd(27),
        spread(r.ttft_ms).padEnd(22),
        `${r.itl_ms.p50} / ${r.itl_ms.p95} / ${r.itl_ms.p99}`,
      ].join("  "),
    );
  });
  lines.push("");
  if (report.ranks !== undefined) lines.push(...showRanks(report.ranks));
  for (const p of report.prefix ?? [])
    lines.push(
      `known prompt of ${p.prompt_tokens} tokens (${p.cached_tokens} cached): first token after ${spread(p.cached_ttft_ms)} ms instead of ${spread(p.ttft_ms)}; a step takes ${p.step_ms.median} ms`,
    );
  const b = report.beside;
  if (b !== undefined) {
    const times = (after: number, before: number): string => `${after} ms (${(after / before).toFixed(2)} ×)`;
    lines.push(
      `a prompt of ${b.prompt_tokens} tokens beside ${b.streams} streams: between their tokens p50 ${times(b.itl_beside_ms.p50, b.itl_ms.p50)}, p95 ${times(b.itl_beside_ms.p95, b.itl_ms.p95)}; its first token after ${times(b.ttft_beside_ms, b.ttft_alone_ms)}`,
    );
  }
  if (report.cache !== undefined) {
    const { kv16, kv8, change_percent, tokens } = report.cache.perplexity;
    lines.push(
      report.cache.policy,
      `perplexity of ${tokens} tokens of its own: ${kv16} with a 16-bit cache, ${kv8} with 8 bits (${change_percent} %)`,
    );
  }
  if (memory !== undefined) {
    const { planned, engine } = memory;
    const pair = (part: keyof typeof planned): string =>
      `${part} ${formatBytes(engine[part])} of ${formatBytes(planned[part])}`;
    lines.push(`memory, taken of planned: ${pair("weights")}, ${pair("kv")}, ${pair("scratch")}`);
  }
  const peak = Math.max(...report.results.map((r) => r.peak_memory_bytes));
  return `${lines.join("\n")}\npeak memory${report.ranks === undefined ? "" : " of rank 0"} ${formatBytes(peak)}\n`;
}

function showRanks({ tensor, pipeline, transport, round_trip_us, note, exchange }: RanksResult): string[] {
  const share = (value: number) => `${(100 * value).toFixed(1)} %`;
  return [
    `${tensor * pipeline} ranks (${tensor} tensor × ${pipeline} pipeline) over ${transport}, round trip ${round_trip_us} µs${note === "" ? "" : `; ${note}`}`,
    ...exchange.map(
      (e, i) =>
        `  setting ${i + 1}: ${e.reduces} all-reduces of ${e.reduce_us} µs, ${share(e.reduce_share)} of the steps' time; exchanging and waiting, by rank: ${e.exchange_share.map(share).join(", ")}; ${transport === "tcp" ? "MACs" : "checksums"} of rank 0: ${e.mac_ms} ms, ${share(e.mac_share)}`,
    ),
  ];
}

/** The fixed form that other programs read, unless more was asked for. */
function printed(report: BenchReport, full: boolean): BenchReport {
  if (full) return report;
  const { machine: _, memory: __, prefix: ___, beside: ____, cache: _____, ...fixed } = report;
  return fixed;
}

async function writePage(path: string, report: BenchReport): Promise<void> {
  const file = await AtomicFile.create(path);
  await file.write(new TextEncoder().encode(reportHtml(report, new Date())), 0);
  await file.commit();
}

export const bench: Command = {
  name: "bench",
  summary: "measure a model's speed on this machine",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    json: { help: "print one JSON object" },
    full: { help: "with --json: also the machine's ceilings and memory against the plan" },
    "prefix-cache": { value: "on|off", help: "off: do not measure prompts with a known prefix" },
    beside: { value: "N", help: "also a prompt of N tokens that comes while the most streams run" },
    "kv-bits": { value: "8|16", help: "bits of the cache; with 8 also its effect on perplexity" },
    compare: {
      value: "FILE",
      help: "an earlier --json output: exit code 1 where a figure is worse beyond the spreads",
    },
    report: { value: "FILE.html", help: "write a page with tables and plots" },
    "prompt-tokens": { value: "N,…", help: "lengths of the prompt (default 512)" },
    generate: { value: "N,…", help: "tokens to generate (default 128)" },
    streams: { value: "N,…", help: "requests at once (default 1,8)" },
    threads: { value: "T", help: "compute threads (default: the machine's)" },
    repeat: { value: "R", help: "trials of each setting after a warm-up (default 3)" },
    cpu: {
      value: "SET",
      help: "kernel set: scalar, avx2, avx512-vnni, amx-int8, neon, … (default: the best)",
    },
    scheduling: { value: "MODE", help: "sequential or batched (default: by the model's cache)" },
    device: { value: "DEVICE", help: "auto, cpu or metal (default auto)" },
    ...RANK_OPTIONS,
  },
  details: `Prompts are random and different for each stream; the end of sequence is banned. Answer tokens/s counts the tokens
of all streams while all of them decode. Lists of lengths sweep: --prompt-tokens 128,4096,16384 shows reading by prompt
length and answering by context.`,
  async run(args) {
    const device = args.choice("device", ["auto", "cpu", "metal"]);
    const promptTokens = numbers(args, "prompt-tokens", [512]);
    const generate = numbers(args, "generate", [128]);
    const streams = numbers(args, "streams", [1, 8]);
    const repeat = args.integer("repeat", 1, 1000) ?? 3;
    const threads = args.integer("threads", 1, 256);
    const cpu = args.text("cpu");
    const scheduling = args.choice("scheduling", ["sequential", "batched"]);
    const compare = args.text("compare");
    const earlier = compare === undefined ? undefined : readJsonFile(compare, EarlierReportSchema);
    const prefixes = args.choice("prefix-cache", ["on", "off"]);
    const beside = args.integer("beside", 1, 1 << 24);
    const kvBits = args.choice("kv-bits", ["8", "16"]);
    const page = args.text("report");
    const ranks = rankOptions(args);
    const json = args.flag("json");
    const more = !json || args.flag("full") || page !== undefined;
    const model = findWeights(args.positional(0));
    const progress = new ProgressLine();
    try {
      const report = await runBench({
        model: model.name,
        modelDir: model.path,
        promptTokens,
        generate,
        streams,
        repeat,
        ...(threads === undefined ? {} : { threads }),
        ...(cpu === undefined ? {} : { cpu }),
        ...(device === undefined ? {} : { device }),
        ...(scheduling === undefined ? {} : { scheduling }),
        ranks,
        ceiling: more,
        memory: more,
        ...(kvBits === undefined ? {} : { kvBits: kvBits === "8" ? 8 : 16 }),
        ...(beside === undefined ? {} : { beside }),
        prefix: more && prefixes !== "off",
        onProgress: (done, total, detail) => progress.show("bench", done / total, detail),
      });
      progress.clear();
      process.stdout.write(json ? `${JSON.stringify(printed(report, args.flag("full")))}\n` : show(report));
      if (page !== undefined) await writePage(page, report);
      if (earlier === undefined) return 0;
      const compared = compareReports(earlier, report);
      if (compared.length === 0) {
        throw new CaravanError("invalid_argument", "has no result of the same lengths and streams", {
          where: compare ?? "",
        });
      }
      process.stderr.write(showComparison(compared));
      return compared.some(({ verdict }) => verdict === "worse") ? 1 : 0;
    } finally {
      progress.clear();
    }
  },
};
