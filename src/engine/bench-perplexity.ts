// What an 8-bit cache costs in quality: the perplexity of a text with the cache in the model's own type and in 8 bits, all
// else the same. The text is sampled from the model itself, with the cache in its own type: that needs no data, and is what
// the model will be used on. So the difference shows how far 8 bits move the distribution.

import { CaravanError } from "../errors.ts";
import { logSumExp } from "../scheduler/prompt-logprobs.ts";
import { Scheduler } from "../scheduler/scheduler.ts";
import { StepLoop } from "../scheduler/step-loop.ts";
import { round } from "./bench-statistics.ts";
import { type LoadedEngine, loadModel } from "./load-model.ts";
import { runLogits } from "./logits.ts";
import { GREEDY } from "./protocol.ts";
import type { RandomTokens } from "./random-tokens.ts";

export interface CachePerplexity {
  /** Length of the text. */
  tokens: number;
  /** e to the mean negative log-probability of a token. */
  kv16: number;
  kv8: number;
  /** kv8 over kv16, in percent above it. */
  change_percent: number;
}

/** Random tokens in front of the text, which are not judged. */
const START = 8;
const TEXT_TOKENS = 384;

/** Loads the model three times, one after the other. Throws what that throws. */
export async function measurePerplexity(
  options: { modelDir: string; threads?: number; cpu?: string },
  contextLength: number,
  random: RandomTokens,
): Promise<CachePerplexity> {
  const length = Math.min(TEXT_TOKENS, contextLength - START);
  const start = random.tokens(START);
  const context = START + length;
  const model = await loadModel({ model: options.modelDir, ...options, context, streams: 1, kvBits: 16 });
  const tokens = [...start];
  try {
    tokens.push(...(await sampleText(model, start, length)));
  } finally {
    await model.close();
  }
  const judge = (kvBits: 8 | 16): Promise<number> => perplexity(tokens, { ...options, kvBits });
  const kv16 = await judge(16);
  const kv8 = await judge(8);
  return {
    tokens: length,
    kv16: round(kv16, 4),
    kv8: round(kv8, 4),
    change_percent: round((kv8 / kv16 - 1) * 100, 3),
  };
}

/** Of tokens behind the start, each by the logits of the position before it, through the cache. */
async function perplexity(
  tokens: readonly number[],
  options: { modelDir: string; threads?: number; cpu?: string; kvBits: 8 | 16 },
): Promise<number> {
  let position = 0;
  let sum = 0;
  await runLogits({
    ...options,
    tokens,
    onLogits: (rows, vocab) => {
      for (let at = 0; at < rows.length; at += vocab, position++) {
        const next = tokens[position + 1];
        if (next === undefined || position + 1 < START) continue;
        const row = rows.subarray(at, at + vocab);
        sum += logSumExp(row) - (row[next] ?? 0);
      }
    },
  });
  return Math.exp(sum / (tokens.length - START));
}

function sampleText(model: LoadedEngine, start: number[], length: number): Promise<number[]> {
  return new Promise((resolve, reject) => {
    const out: number[] = [];
    const scheduler = new Scheduler({
      geometry: model.geometry,
      limits: model.limits,
      contextTokens: model.contextTokens,
      ...{ mode: "sequential", maxWaiting: 1, prefixCache: false },
      now: () => performance.now(),
      emit: (event) => {
        if (event.type === "token") out.push(event.token);
        if (event.type === "error") reject(CaravanError.fromJSON({ ...event.error }));
        if (event.type === "finish") resolve(out);
      },
    });
    const loop = new StepLoop({ scheduler, engine: model.engine, depth: 2, onFatal: reject });
    loop.add({
      ...{ id: "text", tokens: start, max_tokens: length, stop_tokens: [...model.stopTokens] },
      ...{ ban_stop_tokens: true, sampling: { ...GREEDY, temperature: 0.8, seed: 1 } },
    });
  });
}
