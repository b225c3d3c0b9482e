// Scout or Maverick at 4 bits as files that are all hole: real headers, real sizes, no weights. For opening, planning and
// stepping through models of 61 and 226 GB on any machine: reading a hole gives zeros.
//
//   bun test/tools/make-sparse-model.ts scout|maverick OUT_DIR [--layers 48] [--step [--position 0]]
//
// --layers takes fewer layers, each of full size. --step also opens the engine on it and runs one decode step at the
// position, whose logits must all be 0; all positions before it share one page.

import { mkdirSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { encodePlan } from "../../src/engine/plan-encoder.ts";
import { GREEDY } from "../../src/engine/protocol.ts";
import { NativeStepEngine } from "../../src/engine/step-engine.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { makeLoadPlan } from "../../src/model/load-plan.ts";
import { planMemory } from "../../src/model/memory-plan.ts";
import { INDEX_FILE, openCheckpoint } from "../../src/model/safetensors.ts";
import type { StepRow } from "../../src/scheduler/step.ts";
import { type Llama4Name, llama4Config, llama4Shards, llama4Tensors, tensorBytes } from "./llama4-shapes.ts";

/** Writes config.json, the index and the sparse shards into `dir`, which is made. Returns the bytes of all tensors.
 * text: keys of text_config that are to be others. */
export function writeSparseModel(
  dir: string,
  name: Llama4Name,
  layers: number,
  text: Record<string, unknown> = {},
): number {
  mkdirSync(dir, { recursive: true });
  const shards = llama4Shards(llama4Tensors(name, layers));
  const weightMap: Record<string, string> = {};
  for (const { name: file, layout } of shards) {
    const path = join(dir, file);
    writeFileSync(path, layout.head);
    truncateSync(path, layout.sizeBytes);
    for (const tensor of layout.tensors.keys()) weightMap[tensor] = file;
  }
  const total = tensorBytes(shards);
  const index = { metadata: { total_size: total }, weight_map: weightMap };
  writeFileSync(join(dir, INDEX_FILE), JSON.stringify(index));
  writeFileSync(join(dir, "config.json"), JSON.stringify(llama4Config(name, layers, text), null, 1));
  return total;
}

export interface SparseStep {
  /** Milliseconds. */
  load: number;
  step: number;
  /** Bytes, as the engine counts them. */
  weightsMapped: number;
  weightsCopied: number;
  logits: Float32Array;
}

/** Opens the engine on `dir`, as if memory for it were there (mapped holes need none), and decodes one token at
 * `position`. */
export async function stepOnce(
  dir: string,
  { position = 0, compute = "fast" }: { position?: number; compute?: "exact" | "fast" } = {},
): Promise<SparseStep> {
  const plan = makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
  const sizes = { kvType: "bf16", threads: 2, maxTokens: 1, maxLogits: 1 } as const;
  const memory = planMemory(plan, { ...sizes, context: 64, streams: 1, available: 2 ** 50 });
  const start = performance.now();
  const engine = await NativeStepEngine.load(
    encodePlan(plan, { ...sizes, ...memory, compute, maxRows: 1, slots: 1 }),
    plan.config.vocabSize,
  );
  try {
    const loaded = performance.now();
    const row = zeroPageRow(position, memory.pageTokens, plan.config.chunk);
    const { rows } = await engine.submit({ rows: [row], copies: [] });
    const end = performance.now();
    const { weightsMapped, weightsCopied } = engine.stats();
    const logits = rows[0]?.logits ?? new Float32Array(0);
    return { load: loaded - start, step: end - loaded, weightsMapped, weightsCopied, logits };
  } finally {
    await engine.close();
  }
}

/** One token at `position`, with page 0 in every entry of both tables. chunk: 0 where no layer is chunked. */
export function zeroPageRow(position: number, pageTokens: number, chunk: number, token = 1): StepRow {
  const none = new Uint32Array(0);
  const base = chunk === 0 ? 0 : Math.floor(position / chunk) * chunk;
  return {
    slot: 0,
    firstPosition: position,
    tokens: Uint32Array.of(token),
    fullPages: new Uint32Array(Math.floor(position / pageTokens) + 1),
    chunkPages: chunk === 0 ? none : new Uint32Array(Math.floor((position - base) / pageTokens) + 1),
    chunkBase: base,
    logits: "last",
    sample: true,
    returnLogits: true,
    logprob: false,
    topLogprobs: 0,
    sampling: GREEDY,
    bias: [],
    history: none,
    xtcKeep: none,
  };
}

function diskBytes(dir: string, files: readonly { path: string }[]): number {
  return files.reduce((sum, { path }) => sum + statSync(path).blocks * 512, 0) + statSync(dir).blocks * 512;
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      layers: { type: "string", default: "48" },
      step: { type: "boolean", default: false },
      position: { type: "string", default: "0" },
    },
  });
  const [name, dir] = positionals;
  const layers = Number(values.layers);
  const position = Number(values.position);
  if ((name !== "scout" && name !== "maverick") || dir === undefined || !(layers >= 1) || !(position >= 0)) {
    console.error("usage: make-sparse-model.ts scout|maverick OUT_DIR [--layers 48] [--step [--position 0]]");
    process.exit(2);
  }
  const total = writeSparseModel(dir, name, layers);
  const checkpoint = await openCheckpoint(dir);
  console.log(
    `${name}, ${layers} layers: ${total} bytes of tensors in ${checkpoint.files.length} files, ${diskBytes(dir, checkpoint.files)} on disk`,
  );
  if (!values.step) return;
  const { load, step, logits } = await stepOnce(dir, { position });
  const wrong = logits.findIndex((value) => value !== 0);
  console.log(
    `opened in ${Math.round(load)} ms; one decode step in ${Math.round(step)} ms gave ${logits.length} logits`,
  );
  if (logits.length === 0 || wrong >= 0) {
    console.error(`logit ${wrong} is ${logits[wrong]}, not 0`);
    process.exit(1);
  }
}

if (import.meta.main) await main();
