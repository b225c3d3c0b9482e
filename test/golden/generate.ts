// Requests on a loaded model with the real scheduler, all at once; what came back as plain data to compare.

import type { LoadedEngine } from "../../src/engine/load-model.ts";
import type { GenerateEvent, GenerateRequest } from "../../src/engine/protocol.ts";
import type { Drafter } from "../../src/scheduler/drafter.ts";
import { Scheduler } from "../../src/scheduler/scheduler.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";

export interface Generated {
  tokens: number[];
  /** By token, where log-probabilities were asked for. */
  logprobs: number[];
  cached: number;
}

export class Generator {
  readonly scheduler: Scheduler;
  readonly #loop: StepLoop;
  readonly #waiting = new Map<
    string,
    { made: Generated; resolve: (made: Generated) => void; reject: (error: Error) => void }
  >();
  #next = 0;

  constructor(model: LoadedEngine, options: { prefixCache?: boolean; drafter?: Drafter } = {}) {
    this.scheduler = new Scheduler({
      geometry: model.geometry,
      limits: model.limits,
      contextTokens: model.contextTokens,
      mode: "batched",
      maxWaiting: 1000,
      now: () => performance.now(),
      emit: (event) => this.#take(event),
      ...options,
    });
    const onFatal = (error: Error) => {
      for (const { reject } of this.#waiting.values()) reject(error);
    };
    this.#loop = new StepLoop({ scheduler: this.scheduler, engine: model.engine, depth: 2, onFatal });
  }

  /** Answers in order of the requests, whose ids are replaced. */
  all(requests: readonly GenerateRequest[]): Promise<Generated[]> {
    return Promise.all(requests.map((request) => this.one(request)));
  }

  one(request: GenerateRequest): Promise<Generated> {
    const id = String(this.#next++);
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { made: { tokens: [], logprobs: [], cached: 0 }, resolve, reject });
      this.#loop.add({ ...request, id });
    });
  }

  #take(event: GenerateEvent): void {
    const mine = this.#waiting.get(event.id);
    if (mine === undefined) return;
    if (event.type === "token") {
      mine.made.tokens.push(event.token);
      if (event.logprob !== undefined) mine.made.logprobs.push(event.logprob);
    }
    if (event.type !== "finish" && event.type !== "error") return;
    this.#waiting.delete(event.id);
    if (event.type === "error") mine.reject(new Error(JSON.stringify(event.error)));
    else mine.resolve({ ...mine.made, cached: event.usage.cached_tokens });
  }
}
