// What a long prompt does to streams that are running, and they to it: the time between their tokens before it comes and
// while it is computed, and its first token alone and beside them.

import { CaravanError } from "../errors.ts";
import { Scheduler } from "../scheduler/scheduler.ts";
import { StepLoop } from "../scheduler/step-loop.ts";
import { quantile, round } from "./bench-statistics.ts";
import type { LoadedEngine } from "./load-model.ts";
import { type GenerateEvent, GREEDY } from "./protocol.ts";
import type { RandomTokens } from "./random-tokens.ts";

export interface BesideResult {
  streams: number;
  /** Length of the long prompt, and of the streams' own. */
  prompt_tokens: number;
  stream_prompt_tokens: number;
  /** Between two tokens of a stream, milliseconds: without and with the long prompt. */
  itl_ms: { p50: number; p95: number };
  itl_beside_ms: { p50: number; p95: number };
  /** From the long prompt's request to its first token, milliseconds. */
  ttft_alone_ms: number;
  ttft_beside_ms: number;
}

/** Tokens of each stream before the long prompt comes, and again behind its end: the machine may have changed. */
const QUIET_TOKENS = 64;

export interface BesideOptions {
  streams: number;
  streamPromptTokens: number;
  promptTokens: number;
}

/** Tokens that a sequence may reach, for the load's context; `most` is the model's limit. */
export function besideContext({ promptTokens, streamPromptTokens }: BesideOptions, most: number): number {
  return Math.max(promptTokens + 2, Math.min(most, streamPromptTokens + QUIET_TOKENS + STREAM_TOKENS));
}
/** Enough to decode for as long as the long prompt takes, even in the smallest pieces that are worth measuring. */
const STREAM_TOKENS = 4096;

/** Throws engine errors. */
export async function measureBeside(
  model: LoadedEngine,
  options: BesideOptions,
  random: RandomTokens,
): Promise<BesideResult> {
  const long = random.tokens(options.promptTokens);
  const alone = await run(model, [], long);
  const prompts = Array.from({ length: options.streams }, () => random.tokens(options.streamPromptTokens));
  const beside = await run(model, prompts, long);
  return {
    streams: options.streams,
    prompt_tokens: options.promptTokens,
    stream_prompt_tokens: options.streamPromptTokens,
    itl_ms: quantiles(beside.quiet),
    itl_beside_ms: quantiles(beside.disturbed),
    ttft_alone_ms: round(alone.ttft, 1),
    ttft_beside_ms: round(beside.ttft, 1),
  };
}

function quantiles(gaps: number[]): { p50: number; p95: number } {
  gaps.sort((a, b) => a - b);
  return { p50: round(quantile(gaps, 0.5), 2), p95: round(quantile(gaps, 0.95), 2) };
}

interface Run {
  /** Gaps between tokens of the streams without and with the long prompt. */
  quiet: number[];
  disturbed: number[];
  ttft: number;
}

/** Starts the streams, lets them decode together for a while before the long prompt and for a while behind it. */
function run(model: LoadedEngine, prompts: readonly number[][], long: number[]): Promise<Run> {
  return new Promise((resolve, reject) => {
    const out: Run = { quiet: [], disturbed: [], ttft: 0 };
    const last = prompts.map(() => Number.NaN);
    const counts = prompts.map(() => 0);
    let asked = Number.NaN;
    let answered = false;
    let ended = prompts.length === 0;
    let finished = false;
    let cancelled = false;
    const emit = (event: GenerateEvent): void => {
      if (event.type === "error") reject(CaravanError.fromJSON({ ...event.error }));
      // A stream that reached the end of its context: there is nothing more to compare with.
      if (event.type === "finish" && event.id !== "long") finished = true;
      if (event.type !== "token") return;
      const now = performance.now();
      if (event.id === "long") {
        out.ttft = now - asked;
        answered = true;
        counts.fill(1);
        ended ||= finished;
        return;
      }
      const stream = Number(event.id);
      const before = last[stream] ?? Number.NaN;
      last[stream] = now;
      const together = counts.every((count) => count > 0);
      counts[stream] = (counts[stream] ?? 0) + 1;
      ended = answered && (finished || counts.every((count) => count > QUIET_TOKENS));
      if (!together) return;
      (Number.isNaN(asked) || answered ? out.quiet : out.disturbed).push(now - before);
    };
    const scheduler = new Scheduler({
      geometry: model.geometry,
      limits: model.limits,
      contextTokens: model.contextTokens,
      ...{ mode: "batched", maxWaiting: prompts.length + 1, prefixCache: false },
      now: () => performance.now(),
      emit,
    });
    const loop = new StepLoop({
      ...{ scheduler, engine: model.engine, depth: 2, onFatal: reject },
      onTurn: () => {
        if (Number.isNaN(asked) && counts.every((count) => count >= QUIET_TOKENS)) {
          asked = performance.now();
          ask("long", long, 1);
        }
        if (answered && ended && !cancelled) {
          cancelled = true;
          for (const stream of prompts.keys()) loop.cancel(String(stream));
        }
        if (answered && ended && loop.inFlight === 0) resolve(out);
      },
    });
    const ask = (id: string, tokens: number[], max_tokens: number): void =>
      loop.add({
        ...{ id, tokens, max_tokens, stop_tokens: [...model.stopTokens], ban_stop_tokens: true },
        sampling: GREEDY,
      });
    for (const [i, tokens] of prompts.entries()) ask(String(i), tokens, QUIET_TOKENS + STREAM_TOKENS);
    if (prompts.length === 0) {
      asked = performance.now();
      ask("long", long, 1);
    }
  });
}
