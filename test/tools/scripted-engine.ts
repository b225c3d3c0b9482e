// An engine that plays a script: it answers with given tokens, fails where it is told to, and records what was asked
// of it. It stands in for a runner process in tests of the API.

import type {
  Engine,
  EngineStatus,
  ErrorRecord,
  GenerateEvent,
  GenerateRequest,
} from "../../src/engine/protocol.ts";

export interface Script {
  /** Answer tokens of a request; cut at max_tokens. */
  answer: (request: GenerateRequest) => Iterable<number>;
  /** Waited for before the event at this position (0 = the first); for tests that hold a stream open. */
  gate?: (position: number, request: GenerateRequest) => Promise<void> | undefined;
  /** Fail after this many tokens. */
  failAfter?: (request: GenerateRequest) => { tokens: number; error: ErrorRecord } | undefined;
  /** Report prefill progress in this many steps. */
  progressSteps?: number;
  cachedTokens?: number;
  /** Keeps the engine from answering a cancel. */
  ignoresCancel?: boolean;
}

/** -(id mod 7) - 0.5: a made-up log-probability that tests can compute. */
export function scriptedLogprob(id: number): number {
  return -(id % 7) - 0.5;
}

export class ScriptedEngine implements Engine {
  readonly model = "scripted";
  readonly requests: GenerateRequest[] = [];
  readonly cancelled: string[] = [];
  /** Tokens handed out over all requests. */
  produced = 0;
  running = 0;
  state: EngineStatus["state"] = "ready";
  progress = 1;
  error: ErrorRecord | undefined;
  readonly #wakeups = new Map<string, () => void>();

  constructor(public script: Script) {}

  status(): EngineStatus {
    return {
      model: this.model,
      state: this.state,
      progress: this.progress,
      running: this.running,
      waiting: 0,
      ...(this.error === undefined ? {} : { error: this.error }),
    };
  }

  outstanding(): number {
    return this.running;
  }

  async ready(): Promise<void> {}
  async close(): Promise<void> {
    this.state = "closed";
  }

  cancel(id: string): void {
    this.cancelled.push(id);
    if (!this.script.ignoresCancel) this.#wakeups.get(id)?.();
  }

  async *generate(request: GenerateRequest): AsyncGenerator<GenerateEvent, void, void> {
    const { id } = request;
    this.requests.push(request);
    this.running += 1;
    let isCancelled = false;
    const cancelled = new Promise<void>((resolve) => {
      this.#wakeups.set(id, () => {
        isCancelled = true;
        resolve();
      });
    });
    let position = 0;
    const passGate = async (): Promise<boolean> => {
      const gate = this.script.gate?.(position, request);
      position += 1;
      if (gate !== undefined) await Promise.race([gate, cancelled]);
      return isCancelled;
    };
    let completion = 0;
    const finish = (reason: "stop" | "length" | "cancelled"): GenerateEvent => ({
      type: "finish",
      id,
      reason,
      usage: {
        prompt_tokens: request.tokens.length,
        completion_tokens: completion,
        cached_tokens: this.script.cachedTokens ?? 0,
      },
      timing: { queue_ms: 0, prefill_ms: 1, decode_ms: completion },
    });
    try {
      const failure = this.script.failAfter?.(request);
      const total = request.tokens.length;
      const steps = this.script.progressSteps ?? 0;
      for (let step = 1; step <= steps; step += 1) {
        if (await passGate()) return yield finish("cancelled");
        yield { type: "progress", id, done: Math.floor((total * step) / steps), total };
      }
      if (request.prompt_logprobs) yield promptLogprobs(request);
      for (const token of this.script.answer(request)) {
        if (await passGate()) return yield finish("cancelled");
        if (failure !== undefined && completion >= failure.tokens) {
          return yield { type: "error", id, error: failure.error };
        }
        completion += 1;
        this.produced += 1;
        const end = request.stop_tokens.includes(token) && request.ban_stop_tokens !== true;
        yield { type: "token", id, token, ...(end ? { end } : {}), ...logprobsOf(token, request) };
        if (end) return yield finish("stop");
        if (completion === request.max_tokens) return yield finish("length");
      }
      if (failure !== undefined) return yield { type: "error", id, error: failure.error };
      if (await passGate()) return yield finish("cancelled");
      yield finish("length");
    } finally {
      this.running -= 1;
      this.#wakeups.delete(id);
    }
  }
}

function logprobsOf(token: number, request: GenerateRequest): { logprob?: number; top?: [number, number][] } {
  if (request.logprobs === undefined) return {};
  return { logprob: scriptedLogprob(token), top: topOf(token, request.logprobs) };
}

/** The token itself, then the ids before it. */
function topOf(token: number, count: number): [number, number][] {
  return Array.from({ length: count }, (_, rank) => [
    Math.max(0, token - rank),
    scriptedLogprob(token) - rank,
  ]);
}

function promptLogprobs(request: GenerateRequest): GenerateEvent {
  const rest = request.tokens.slice(1);
  return {
    type: "prompt_logprobs",
    id: request.id,
    logprobs: [null, ...rest.map(scriptedLogprob)],
    top: [null, ...rest.map((token) => topOf(token, request.logprobs ?? 0))],
  };
}
