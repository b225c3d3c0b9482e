// How much sooner a prompt's first token comes when the cache has its prefix: the same prompt twice on one scheduler.

import { CaravanError } from "../errors.ts";
import { Scheduler } from "../scheduler/scheduler.ts";
import { StepLoop } from "../scheduler/step-loop.ts";
import { type Spread, spread } from "./bench-statistics.ts";
import type { LoadedEngine } from "./load-model.ts";
import { type GenerateEvent, GREEDY } from "./protocol.ts";
import type { RandomTokens } from "./random-tokens.ts";

export interface PrefixResult {
  prompt_tokens: number;
  /** Prompt tokens that need not be computed the second time. */
  cached_tokens: number;
  /** From the request to the first token, milliseconds: computed whole, and with the prefix in the cache. */
  ttft_ms: Spread;
  cached_ttft_ms: Spread;
  /** Between two tokens behind it: what a step takes. */
  step_ms: Spread;
}

/** Tokens generated behind the prompt, for the time of a step. */
const STEPS = 8;

/** Throws engine errors. The engine is idle before and after. */
export async function measurePrefix(
  model: LoadedEngine,
  promptTokens: number,
  repeat: number,
  random: RandomTokens,
): Promise<PrefixResult> {
  const whole: number[] = [];
  const cached: number[] = [];
  const steps: number[] = [];
  let cachedTokens = 0;
  for (let i = 0; i < repeat; i++) {
    const ask = asker(model);
    const tokens = random.tokens(promptTokens);
    const first = await ask(tokens);
    const second = await ask(tokens);
    whole.push(first.times[0] ?? 0);
    cached.push(second.times[0] ?? 0);
    steps.push(...second.times.slice(1).map((time, k) => time - (second.times[k] ?? 0)));
    cachedTokens = second.cached;
  }
  return {
    prompt_tokens: promptTokens,
    cached_tokens: cachedTokens,
    ttft_ms: spread(whole, 2),
    cached_ttft_ms: spread(cached, 2),
    step_ms: spread(steps, 2),
  };
}

/** Asks one request after the other of one scheduler with a prefix cache of its own. */
function asker(model: LoadedEngine): (tokens: number[]) => Promise<{ times: number[]; cached: number }> {
  let onEvent: (event: GenerateEvent) => void = () => {};
  let onFatal: (error: CaravanError) => void = () => {};
  const scheduler = new Scheduler({
    geometry: model.geometry,
    limits: model.limits,
    contextTokens: model.contextTokens,
    mode: "sequential",
    maxWaiting: 1,
    now: () => performance.now(),
    emit: (event) => onEvent(event),
  });
  const loop = new StepLoop({
    ...{ scheduler, engine: model.engine, depth: 2 },
    onFatal: (error) => onFatal(error),
  });
  return (tokens) =>
    new Promise((resolve, reject) => {
      const times: number[] = [];
      const started = performance.now();
      onFatal = reject;
      onEvent = (event) => {
        if (event.type === "token") times.push(performance.now() - started);
        if (event.type === "error") reject(CaravanError.fromJSON({ ...event.error }));
        if (event.type === "finish") resolve({ times, cached: event.usage.cached_tokens });
      };
      loop.add({
        ...{ id: "prefix", tokens, max_tokens: STEPS, stop_tokens: [...model.stopTokens] },
        ...{ ban_stop_tokens: true, sampling: GREEDY },
      });
    });
}
