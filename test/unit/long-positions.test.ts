// Decoding ten million tokens into a sequence, with real weights. When every token of a sequence is the same one, every
// layer's values are the same at all positions, so attention gives back that value whatever the scores: the logits at
// any position are those at position 0, up to rounding. A key taken from a wrong page, weights that do not add up to 1, or
// a sum that loses precision over ten million keys would show.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { encodePlan } from "../../src/engine/plan-encoder.ts";
import { NativeStepEngine } from "../../src/engine/step-engine.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { makeLoadPlan } from "../../src/model/load-plan.ts";
import { planMemory } from "../../src/model/memory-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import type { StepRow } from "../../src/scheduler/step.ts";
import { largestDifference } from "../golden/read-golden.ts";
import { zeroPageRow } from "../tools/make-sparse-model.ts";
import { TINY_VOCAB, writeTinyLlama4 } from "../tools/tiny-llama4.ts";

const TOKEN = 17;
const OTHER = 23;
/** The last position of Scout's context, and one in the middle of a page and a chunk. */
const FAR = [10_485_759, 9_999_990];
/** 41,000 blocks of keys are added up one after the other in float32; equal addends round the same way each time. */
const TOLERANCE = 1e-3;
const TIME_LIMIT_MS = 60_000;

let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-far-"));
  writeTinyLlama4(dir, 11, { contextTokens: 10_485_760 });
});
afterAll(() => {
  rmSync(dir, { recursive: true });
});

interface Opened {
  engine: NativeStepEngine;
  pageTokens: number;
  chunk: number;
}

async function openTiny(threads: number, compute: "exact" | "fast"): Promise<Opened> {
  const plan = makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
  const sizes = {
    kvType: compute === "exact" ? "f32" : "bf16",
    threads,
    maxTokens: 64,
    maxLogits: 1,
  } as const;
  const memory = planMemory(plan, { ...sizes, context: 64, streams: 2, available: 2 ** 32 });
  const options = { ...sizes, ...memory, compute, maxRows: 1, slots: 1 };
  const engine = await NativeStepEngine.load(encodePlan(plan, options), TINY_VOCAB);
  return { engine, pageTokens: memory.pageTokens, chunk: plan.config.chunk };
}

async function logitsAt({ engine, pageTokens, chunk }: Opened, change: Partial<StepRow>, position: number) {
  const row = { ...zeroPageRow(position, pageTokens, chunk, TOKEN), ...change };
  const { rows } = await engine.submit({ rows: [row], copies: [] });
  const [result] = rows;
  if (result?.logits === undefined) throw new Error("no logits");
  return result.logits;
}

/** Fills page 0 with the same token, and page 1 with another that no table may lead to. */
async function fillPages(opened: Opened): Promise<void> {
  const { pageTokens } = opened;
  const one = (page: number) => ({ fullPages: Uint32Array.of(page), chunkPages: Uint32Array.of(page) });
  await logitsAt(opened, { ...one(1), tokens: new Uint32Array(pageTokens).fill(OTHER) }, 0);
  await logitsAt(opened, { ...one(0), tokens: new Uint32Array(pageTokens).fill(TOKEN) }, 0);
}

test.each([
  { compute: "exact" as const, threads: 1 },
  { compute: "exact" as const, threads: 2 },
  { compute: "fast" as const, threads: 2 },
])(
  "a token after ten million of its kind has the logits of the first ($compute, $threads threads)",
  async ({ compute, threads }) => {
    const opened = await openTiny(threads, compute);
    try {
      const first = await logitsAt(opened, {}, 0);
      await fillPages(opened);
      for (const position of FAR)
        expect(largestDifference(await logitsAt(opened, {}, position), first)).toBeLessThan(TOLERANCE);
      // The other page's keys do change them, so a table that led there would have shown.
      const wrong = zeroPageRow(FAR[1] ?? 0, opened.pageTokens, opened.chunk, TOKEN);
      wrong.fullPages.fill(1, 1000, 80_000);
      expect(largestDifference(await logitsAt(opened, wrong, FAR[1] ?? 0), first)).toBeGreaterThan(0.1);
    } finally {
      await opened.engine.close();
    }
  },
  TIME_LIMIT_MS,
);

test("tables that end a page too early are refused by their numbers", async () => {
  const opened = await openTiny(1, "exact");
  try {
    const whole = zeroPageRow(9_999_990, opened.pageTokens, opened.chunk, TOKEN);
    const short = { ...whole, fullPages: whole.fullPages.subarray(1) };
    await expect(opened.engine.submit({ rows: [short], copies: [] })).rejects.toThrow(/9999990/);
    const unchunked = { ...whole, chunkBase: whole.chunkBase + opened.pageTokens };
    await expect(opened.engine.submit({ rows: [unchunked], copies: [] })).rejects.toThrow(/chunk table/);
  } finally {
    await opened.engine.close();
  }
});
