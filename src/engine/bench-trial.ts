// One measurement of `caravan bench`: streams that start together on the real scheduler and engine, and when each of
// their tokens came.
//
// Decoding is measured while all streams run: the window opens when the last of them has its first token and closes when
// every one has produced `generate` further tokens. Streams that began earlier go on until then and are cancelled, so
// each step of the window carries all of them, as in llama-batched-bench. Where streams run one after another
// (sequential policy) there is no such window, and each is measured by itself.

import { CaravanError } from "../errors.ts";
import { choosePolicy, type PolicyRequest } from "../scheduler/policy.ts";
import { Scheduler } from "../scheduler/scheduler.ts";
import { StepLoop } from "../scheduler/step-loop.ts";
import type { LoadedEngine } from "./load-model.ts";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "./protocol.ts";

/** Tokens that a stream may be ahead of the last one when the window opens. */
export const HEAD_START = 64;

export interface TrialOptions {
  scheduling: PolicyRequest;
  /** One prompt a stream, all of one length. */
  prompts: readonly number[][];
  generate: number;
}

export interface Trial {
  /** Milliseconds from the request to the first token, by stream. */
  firstTokenMs: number[];
  /** Milliseconds from the start until all streams had their first token. */
  allStartedMs: number;
  /** Milliseconds between neighbouring tokens of a stream, inside the window. */
  gapsMs: number[];
  /** Tokens of all streams in the window, over its time. 0 when no token came in it. */
  generationTps: number;
}

/** Throws engine errors. Nothing is in flight when it returns. */
export async function runTrial(model: LoadedEngine, options: TrialOptions): Promise<Trial> {
  const { cacheKinds, backend } = model;
  const { mode } = choosePolicy({ cacheKinds, backend, requested: options.scheduling });
  const together = mode === "batched";
  return trialOf(await record(model, options, together), together, options.generate);
}

/** What the tokens' times say. `together`: the streams ran at once. */
export function trialOf(times: readonly number[][], together: boolean, generate: number): Trial {
  const firstTokenMs = times.map((list) => list[0] ?? 0);
  const allStartedMs = Math.max(...firstTokenMs);
  const windows = together
    ? windowTogether(times, allStartedMs, generate)
    : times.map((list) => ({ list, start: list[0] ?? 0, end: list.at(-1) ?? 0 }));
  const gapsMs: number[] = [];
  let tokens = 0;
  for (const { list, start, end } of windows)
    for (let i = 1; i < list.length; i++) {
      const time = list[i] ?? 0;
      const before = list[i - 1] ?? 0;
      if (time <= start || time > end) continue;
      tokens++;
      if (before >= start) gapsMs.push(time - before);
    }
  const spans = windows.map(({ start, end }) => end - start);
  const windowMs = together ? (spans[0] ?? 0) : spans.reduce((sum, span) => sum + span, 0);
  return {
    firstTokenMs,
    allStartedMs,
    gapsMs,
    generationTps: windowMs > 0 ? (tokens * 1000) / windowMs : 0,
  };
}

/** From the last first token to the `generate`-th token behind it of the slowest stream, or to the first end of a stream. */
function windowTogether(
  times: readonly number[][],
  start: number,
  generate: number,
): { list: readonly number[]; start: number; end: number }[] {
  const wanted = times.map((list) => list.filter((time) => time > start)[generate - 1]);
  const reached = wanted.every((time) => time !== undefined);
  const end = reached
    ? Math.max(...wanted.map((time) => time ?? 0))
    : Math.min(...times.map((list) => list.at(-1) ?? 0));
  return times.map((list) => ({ list, start, end }));
}

/** When each token came, in milliseconds from the start, one list a stream. */
function record(model: LoadedEngine, options: TrialOptions, together: boolean): Promise<number[][]> {
  const { generate, prompts } = options;
  return new Promise((resolve, reject) => {
    const times = prompts.map((): number[] => []);
    /** Tokens of each stream behind the window's opening. */
    const behind = prompts.map(() => 0);
    const tokenIds = new Set<string>();
    let open = prompts.length;
    let waiting = prompts.length;
    let stopped = false;
    let ended = false;
    const started = performance.now();
    const onToken = (stream: number): void => {
      const list = times[stream];
      if (list === undefined) return;
      list.push(performance.now() - started);
      if (list.length === 1) waiting--;
      else if (waiting === 0) behind[stream] = (behind[stream] ?? 0) + 1;
    };
    const emit = (event: GenerateEvent): void => {
      if (event.type === "token") onToken(Number(event.id));
      if (event.type === "error") reject(CaravanError.fromJSON({ ...event.error }));
      if (event.type === "finish") {
        open--;
        // One that ended by itself: the others no longer decode together with it.
        ended ||= together;
      }
    };
    const scheduler = new Scheduler({
      geometry: model.geometry,
      limits: model.limits,
      contextTokens: model.contextTokens,
      mode: together ? "batched" : "sequential",
      maxWaiting: prompts.length,
      // The prompts are new ones; nothing may help.
      prefixCache: false,
      now: () => performance.now(),
      emit,
    });
    const loop = new StepLoop({
      scheduler,
      engine: model.engine,
      depth: 2,
      onFatal: reject,
      onTurn: () => {
        const complete = together && waiting === 0 && behind.every((count) => count >= generate);
        if ((complete || ended) && !stopped) {
          stopped = true;
          for (const id of tokenIds) loop.cancel(id);
        }
        // The steps in flight belong to this trial's time, not to the next one's.
        if (open === 0 && loop.inFlight === 0) resolve(times);
      },
    });
    for (const [i, tokens] of prompts.entries()) {
      const id = String(i);
      tokenIds.add(id);
      loop.add(streamRequest(id, tokens, together ? generate + 1 + HEAD_START : generate + 1, model));
    }
  });
}

function streamRequest(
  id: string,
  tokens: number[],
  max_tokens: number,
  model: LoadedEngine,
): GenerateRequest {
  return {
    id,
    tokens,
    max_tokens,
    stop_tokens: [...model.stopTokens],
    ban_stop_tokens: true,
    sampling: GREEDY,
  };
}
