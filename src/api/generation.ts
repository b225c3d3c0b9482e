// From prompt ids to text: drives the engine for one sequence, turns ids into text, finds stop strings, and says how
// it ended. Every API family and the terminal chat generate through here; nothing of HTTP is known.

import type { GenerateEvent, Sampling, Timing, TopLogprobs, Usage } from "../engine/protocol.ts";
import { CaravanError } from "../errors.ts";
import type { GrammarSpec } from "../grammar/spec.ts";
import type { LoadedModel } from "./model-directory.ts";

export interface GenerationOptions {
  sampling: Sampling;
  /** At least one; prompt and answer together must fit the context (resolveMaxTokens). */
  maxTokens: number;
  /** Strings that end the answer; they are not part of it. */
  stop?: readonly string[];
  /** Tokens that end the answer; absent = the model's own. */
  stopTokens?: readonly number[];
  /** End tokens are never sampled, so that the answer has maxTokens tokens. */
  ignoreEos?: boolean;
  /** Alternatives a token, 0 to 20; absent = no log-probabilities. */
  logprobs?: number;
  /** Log-probabilities of the prompt too, as one event before the first text. */
  promptLogprobs?: boolean;
  /** Control tokens appear in the text by name. */
  showSpecials?: boolean;
  /** Control tokens that appear by name although the others do not. */
  keepSpecials?: readonly string[];
  /** The answer goes on where the prompt ended (raw prompts): a space at its beginning belongs to it. */
  continues?: boolean;
  deadlineMs?: number;
  /** What the answer has to follow. */
  grammar?: GrammarSpec;
  /** Called for each token that the engine gives, an end token included, before its text. */
  onToken?: () => void;
  /** Cancels the engine's request at once; the iteration then throws the signal's reason. */
  signal?: AbortSignal;
}

/** A token of the answer with its log-probabilities. */
export interface TokenInfo {
  id: number;
  logprob: number;
  top: TopLogprobs;
  /** Where its text begins, in UTF-16 units from the start of the answer. */
  offset: number;
}

export type GenerationEvent =
  | { type: "progress"; done: number; total: number }
  | { type: "prompt_logprobs"; logprobs: (number | null)[]; top: (TopLogprobs | null)[] }
  /** `tokens`: those whose text begins in the text sent so far; empty without `logprobs`. Either may be empty. */
  | { type: "text"; text: string; tokens: TokenInfo[] }
  | {
      type: "finish";
      /** "stop": an end token or a stop string; "length": maxTokens. */
      reason: "stop" | "length";
      /** The stop string, when one ended it. */
      stop?: string;
      usage: Usage;
      timing: Timing | undefined;
    };

/** How long a stop string waits for the engine to confirm the cancel (for its timing and cached tokens). */
const CANCEL_CONFIRM_MS = 1000;

const NO_TOKENS: TokenInfo[] = [];

let nextRequest = 0;

function newRequestId(): string {
  nextRequest += 1;
  return `gen-${process.pid.toString(36)}-${nextRequest.toString(36)}`;
}

/** next() of an iterator that can be made to reject while it is pending, whatever the iterator does. */
class InterruptibleReader<T> {
  #reject: ((reason: unknown) => void) | undefined;
  #interrupted: { reason: unknown } | undefined;

  constructor(readonly source: AsyncIterator<T>) {}

  next(): Promise<IteratorResult<T>> {
    if (this.#interrupted) return Promise.reject(this.#interrupted.reason);
    return new Promise((resolve, reject) => {
      this.#reject = reject;
      this.source.next().then(resolve, reject);
    });
  }

  interrupt(reason: unknown): void {
    this.#interrupted ??= { reason };
    this.#reject?.(reason);
  }
}

/** Hands out token infos together with the text that they begin, and drops those that a stop string cut off. */
class TokenQueue {
  #waiting: TokenInfo[] = [];
  /** UTF-16 units that the detokenizer gave, and that were passed on. */
  #seen = 0;
  #sent = 0;

  add(id: number, logprob: number, top: TopLogprobs, text: string): void {
    this.#waiting.push({ id, logprob, top, offset: this.#seen });
    this.#seen += text.length;
  }

  /** `text` is passed on now: the tokens that begin in what has been sent. */
  release(text: string): TokenInfo[] {
    this.#sent += text.length;
    if (text.length === 0) return NO_TOKENS;
    const kept = this.#waiting.findIndex((token) => token.offset >= this.#sent);
    return this.#waiting.splice(0, kept < 0 ? this.#waiting.length : kept);
  }

  /** The answer ended without a stop string: all the rest. */
  releaseAll(): TokenInfo[] {
    return this.#waiting.splice(0);
  }
}

/**
 * Generates one sequence. Ends after exactly one finish event, or throws a CaravanError. Leaving the iteration early,
 * or aborting the signal, cancels the engine's request.
 */
export async function* generate(
  model: LoadedModel,
  promptIds: number[],
  options: GenerationOptions,
): AsyncGenerator<GenerationEvent, void, void> {
  const { signal } = options;
  signal?.throwIfAborted();
  const id = newRequestId();
  const detokenizer = model.newDetokenizer({
    skipSpecials: !options.showSpecials,
    ...(options.keepSpecials === undefined ? {} : { keep: options.keepSpecials }),
    ...(options.continues === undefined ? {} : { continues: options.continues }),
  });
  const stops = options.stop ?? [];
  const matcher = stops.length > 0 ? model.newStopMatcher(stops) : undefined;
  const tokens = options.logprobs === undefined ? undefined : new TokenQueue();

  const stream = model.engine.generate({
    id,
    tokens: promptIds,
    max_tokens: options.maxTokens,
    stop_tokens: [...(options.stopTokens ?? model.eosIds)],
    sampling: options.sampling,
    ...(options.ignoreEos ? { ban_stop_tokens: true } : {}),
    ...(options.logprobs === undefined ? {} : { logprobs: options.logprobs }),
    ...(options.promptLogprobs ? { prompt_logprobs: true } : {}),
    ...(options.grammar === undefined ? {} : { grammar: options.grammar }),
    ...(options.deadlineMs === undefined ? {} : { deadline_ms: options.deadlineMs }),
  });
  const reader = new InterruptibleReader(stream[Symbol.asyncIterator]());
  let ended = false;
  const onAbort = () => {
    ended = true;
    model.engine.cancel(id);
    reader.interrupt(signal?.reason);
  };
  signal?.addEventListener("abort", onAbort, { once: true });

  let generated = 0;
  try {
    for (;;) {
      const { value: event, done } = await reader.next();
      if (done)
        throw new CaravanError("engine_failed", "The engine ended the stream without a finish event.");
      switch (event.type) {
        case "progress":
          yield { type: "progress", done: event.done, total: event.total };
          break;
        case "prompt_logprobs":
          yield { type: "prompt_logprobs", logprobs: event.logprobs, top: event.top };
          break;
        case "token": {
          generated += 1;
          options.onToken?.();
          if (event.end) break;
          const piece = detokenizer.push(event.token);
          tokens?.add(event.token, event.logprob ?? 0, event.top ?? [], piece);
          if (piece.length === 0) break;
          const match = matcher?.push(piece);
          const text = match === undefined ? piece : match.text;
          if (text.length > 0) yield { type: "text", text, tokens: tokens?.release(text) ?? NO_TOKENS };
          if (match?.stopped) {
            model.engine.cancel(id);
            const last = await confirmCancel(reader);
            ended = last !== undefined;
            yield stopFinish(match.matched, promptIds.length, generated, last);
            return;
          }
          break;
        }
        case "finish": {
          ended = true;
          if (event.reason === "cancelled") {
            signal?.throwIfAborted();
            throw new CaravanError("engine_failed", "The engine ended the request before it was complete.", {
              hint: "The model was probably unloaded; send the request again.",
            });
          }
          const rest = detokenizer.flush();
          const match = matcher?.push(rest);
          const text =
            match === undefined ? rest : match.text + (match.stopped ? "" : (matcher?.flush() ?? ""));
          const released = tokens?.release(text) ?? NO_TOKENS;
          const infos = match?.stopped || !tokens ? released : [...released, ...tokens.releaseAll()];
          if (text.length > 0 || infos.length > 0) yield { type: "text", text, tokens: infos };
          if (match?.stopped) yield stopFinish(match.matched, promptIds.length, generated, event);
          else yield { type: "finish", reason: event.reason, usage: event.usage, timing: event.timing };
          return;
        }
        case "error":
          ended = true;
          throw CaravanError.fromJSON({ ...event.error });
      }
    }
  } finally {
    signal?.removeEventListener("abort", onAbort);
    if (!ended) model.engine.cancel(id);
    // Not awaited: a pending next() keeps return() waiting, and nobody is left to hear of its failure.
    reader.source.return?.().catch(() => undefined);
  }
}

type FinishEvent = Extract<GenerateEvent, { type: "finish" }>;

/** The text ended at a stop string: tokens that the engine made after it are not counted. */
function stopFinish(
  stop: string | undefined,
  promptTokens: number,
  generated: number,
  last: FinishEvent | undefined,
): GenerationEvent {
  return {
    type: "finish",
    reason: "stop",
    ...(stop === undefined ? {} : { stop }),
    usage: {
      prompt_tokens: promptTokens,
      completion_tokens: generated,
      cached_tokens: last?.usage.cached_tokens ?? 0,
    },
    timing: last?.timing,
  };
}

/** Reads on to the finish event that answers a cancel; undefined if none comes in time. */
async function confirmCancel(reader: InterruptibleReader<GenerateEvent>): Promise<FinishEvent | undefined> {
  const late = Symbol("late");
  const timer = setTimeout(() => reader.interrupt(late), CANCEL_CONFIRM_MS);
  try {
    for (;;) {
      const { value: event, done } = await reader.next();
      if (done || event.type === "error") return undefined;
      if (event.type === "finish") return event;
    }
  } catch (thrown) {
    if (thrown === late) return undefined;
    throw thrown;
  } finally {
    clearTimeout(timer);
  }
}
