// caravan bench: how fast a model runs on this machine.

import { cpus } from "node:os";
import { type BenchReport, runBench } from "../engine/bench-run.ts";
import type { Spread } from "../engine/bench-statistics.ts";
import { CaravanError } from "../errors.ts";
import { type Arguments, type Command, usage } from "./command.ts";
import { findWeights } from "./model-argument.ts";
import { formatBytes, ProgressLine } from "./progress.ts";

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
  const spread = ({ median, min, max }: Spread) => `${median} (${min}–${max})`;
  const lines = [
    `${report.model} on ${report.device}: ${cpus()[0]?.model.trim() ?? "unknown processor"}, ${report.threads} threads, loaded in ${report.load_s} s`,
    "",
    "prompt  answer  streams  prompt tokens/s         answer tokens/s         first token ms          between tokens ms p50/p95/p99",
  ];
  for (const r of report.results) {
    lines.push(
      [
        String(r.prompt_tokens).padEnd(6),
        String(r.generate).padEnd(6),
        String(r.streams).padEnd(7),
        spread(r.prompt_tps).padEnd(22),
        spread(r.generation_tps).padEnd(22),
        spread(r.ttft_ms).padEnd(22),
        `${r.itl_ms.p50} / ${r.itl_ms.p95} / ${r.itl_ms.p99}`,
      ].join("  "),
    );
  }
  const peak = Math.max(...report.results.map((r) => r.peak_memory_bytes));
  return `${lines.join("\n")}\n\npeak memory ${formatBytes(peak)}\n`;
}

export const bench: Command = {
  name: "bench",
  summary: "measure a model's speed on this machine",
  positionals: "MODEL",
  count: [1, 1],
  options: {
    json: { help: "print one JSON object" },
    "prompt-tokens": { value: "N,…", help: "lengths of the prompt (default 512)" },
    generate: { value: "N,…", help: "tokens to generate (default 128)" },
    streams: { value: "N,…", help: "requests at once (default 1,8)" },
    threads: { value: "T", help: "compute threads (default: the machine's)" },
    repeat: { value: "R", help: "trials of each setting after a warm-up (default 3)" },
    cpu: { value: "SET", help: "kernel set: scalar, avx2, avx512, avx512-vnni, neon, … (default: the best)" },
    scheduling: { value: "MODE", help: "sequential or batched (default: by the model's cache)" },
    device: { value: "DEVICE", help: "auto, cpu or metal (default auto)" },
  },
  details: "Prompts are random and different for each stream; the end of sequence is banned.",
  async run(args) {
    if (args.choice("device", ["auto", "cpu", "metal"]) === "metal") {
      throw new CaravanError("not_built_yet", "--device metal is not built yet");
    }
    const promptTokens = numbers(args, "prompt-tokens", [512]);
    const generate = numbers(args, "generate", [128]);
    const streams = numbers(args, "streams", [1, 8]);
    const repeat = args.integer("repeat", 1, 1000) ?? 3;
    const threads = args.integer("threads", 1, 256);
    const cpu = args.text("cpu");
    const scheduling = args.choice("scheduling", ["sequential", "batched"]);
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
        ...(scheduling === undefined ? {} : { scheduling }),
        onProgress: (done, total, detail) => progress.show("bench", done / total, detail),
      });
      progress.clear();
      process.stdout.write(args.flag("json") ? `${JSON.stringify(report)}\n` : show(report));
    } finally {
      progress.clear();
    }
    return 0;
  },
};
