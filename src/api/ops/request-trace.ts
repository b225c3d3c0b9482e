// What happened to each generation request and when: its phases, tokens and end. A bounded number of them is kept, for
// /requests/{id}; the metrics are fed from the same moments. No text of prompts or answers is kept.

import type { Timing, Usage } from "../../engine/protocol.ts";
import type { CaravanError } from "../../errors.ts";
import type { History } from "./history.ts";
import type { ServingMetrics } from "./metrics.ts";
import type { HistogramSeries } from "./prometheus.ts";

/** Requests that are remembered after their end. */
const KEPT = 1000;

/** The end of each phase, in order. A phase that did not take place has no entry. */
export const PHASES = ["body", "model", "prompt", "first_token", "generation", "reply"] as const;
export type Phase = (typeof PHASES)[number];

interface Choice {
  lastTokenMs: number;
  tokens: number;
  finish?: { reason: string; usage: Usage; timing: Timing | undefined };
}

export class RequestTrace {
  readonly receivedAt = new Date();
  readonly #startedMs: number;
  /** Milliseconds from the start at which each phase ended. */
  readonly #ends = new Map<Phase, number>();
  readonly #choices: Choice[] = [];
  readonly #metrics: ServingMetrics;
  readonly #history: History;
  #nextTokens: HistogramSeries | undefined;
  #model: string | undefined;
  #plan: { n: number; promptTokens: number; maxTokens: number } | undefined;
  #end: { state: "complete" | "failed" | "cancelled"; error?: CaravanError } | undefined;
  /** Milliseconds between tokens of a choice; kept only for requests that are measured. */
  intervals: number[] | undefined;

  constructor(
    readonly about: { id: string; path: string; stream: boolean; startedMs: number },
    metrics: ServingMetrics,
    history: History,
  ) {
    this.#startedMs = about.startedMs;
    this.#metrics = metrics;
    this.#history = history;
    history.begun();
  }

  /** The model's own name, once it is found: what clients call it is not a label to count by. */
  found(model: string): void {
    this.#model = model;
    this.mark("model");
  }

  prepared(plans: readonly { promptIds: readonly number[]; maxTokens: number }[]): void {
    this.mark("prompt");
    this.#plan = {
      n: plans.length,
      promptTokens: plans.reduce((sum, { promptIds }) => sum + promptIds.length, 0),
      maxTokens: plans.reduce((most, { maxTokens }) => Math.max(most, maxTokens), 0),
    };
  }

  mark(phase: Phase): void {
    if (!this.#ends.has(phase)) this.#ends.set(phase, performance.now() - this.#startedMs);
  }

  /** The engine gave a token of the choice at `index`. */
  token(index: number): void {
    const now = performance.now();
    let choice = this.#choices[index];
    if (choice === undefined) {
      choice = { lastTokenMs: now, tokens: 0 };
      this.#choices[index] = choice;
      this.mark("first_token");
      this.#metrics.firstToken(this.#model ?? "", now - this.#startedMs);
      this.#history.firstToken(now - this.#startedMs);
    } else {
      const waitedMs = now - choice.lastTokenMs;
      this.intervals?.push(waitedMs);
      this.#nextTokens ??= this.#metrics.nextTokens(this.#model ?? "");
      this.#nextTokens.observe(waitedMs / 1000);
      this.#history.nextToken(waitedMs);
    }
    choice.lastTokenMs = now;
    choice.tokens += 1;
  }

  finish(index: number, end: { reason: string; usage: Usage; timing: Timing | undefined }): void {
    const choice = this.#choices[index] ?? { lastTokenMs: performance.now(), tokens: 0 };
    choice.finish = end;
    this.#choices[index] = choice;
    this.mark("generation");
    this.#metrics.finished(this.#model ?? "", end);
  }

  /** The reply is complete or given up; called once. */
  close(error: CaravanError | undefined): void {
    this.mark("reply");
    if (error === undefined) this.#end = { state: "complete" };
    else this.#end = { state: error.code === "cancelled" ? "cancelled" : "failed", error };
    this.#history.ended(this.#plan?.promptTokens ?? 0, this.#end.state === "failed");
    if (this.#model !== undefined && this.#plan !== undefined)
      this.#metrics.closed(this.#model, this.#plan, this.#ends.get("reply") ?? 0, error);
  }

  get model(): string | undefined {
    return this.#model;
  }

  /** Over all choices. `cached` counts the prompt's cache once for each choice, as the engine does. */
  get usage(): { prompt: number; cached: number; completion: number } {
    const sum = { prompt: this.#plan?.promptTokens ?? 0, cached: 0, completion: 0 };
    for (const choice of this.#choices) {
      sum.cached += choice?.finish?.usage.cached_tokens ?? 0;
      sum.completion += choice?.finish?.usage.completion_tokens ?? choice?.tokens ?? 0;
    }
    return sum;
  }

  /** The engine's own times of every choice that ended. */
  get timings(): Timing[] {
    return this.#choices.flatMap((choice) =>
      choice?.finish?.timing === undefined ? [] : [choice.finish.timing],
    );
  }

  /** Milliseconds from the request's arrival to the end of the phase. */
  endOf(phase: Phase): number | undefined {
    return this.#ends.get(phase);
  }

  toJSON(): object {
    let before = 0;
    const phases = PHASES.flatMap((name) => {
      const end = this.#ends.get(name);
      if (end === undefined) return [];
      const start = before;
      before = end;
      return [{ name, start_ms: rounded(start), ms: rounded(end - start) }];
    });
    const { prompt, cached, completion } = this.usage;
    return {
      id: this.about.id,
      path: this.about.path,
      stream: this.about.stream,
      received_at: this.receivedAt.toISOString(),
      state: this.#end?.state ?? "running",
      ...(this.#model === undefined ? {} : { model: this.#model }),
      phases,
      usage: { prompt_tokens: prompt, cached_tokens: cached, completion_tokens: completion },
      choices: this.#choices.map((choice, index) => ({
        index,
        tokens: choice?.tokens ?? 0,
        finish_reason: choice?.finish?.reason ?? null,
        ...(choice?.finish?.timing === undefined ? {} : { engine: choice.finish.timing }),
      })),
      ...(this.#end?.error === undefined ? {} : { error: this.#end.error.toJSON() }),
    };
  }
}

function rounded(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}

/** The last requests by id. Running ones are always there: their number has a limit of its own. Ended ones are kept as JSON
 * text, a few hundred bytes each, except those that are measured. */
export class TraceLog {
  readonly #running = new Map<string, RequestTrace>();
  readonly #ended = new Map<string, RequestTrace | string>();

  constructor(
    private readonly metrics: ServingMetrics,
    private readonly history: History,
    private readonly kept = KEPT,
  ) {}

  /** A client may use an id twice; the later request then has it. */
  begin(about: RequestTrace["about"]): RequestTrace {
    const trace = new RequestTrace(about, this.metrics, this.history);
    this.#running.set(about.id, trace);
    return trace;
  }

  end(trace: RequestTrace, error: CaravanError | undefined): void {
    trace.close(error);
    const { id } = trace.about;
    if (this.#running.get(id) === trace) this.#running.delete(id);
    this.#ended.delete(id);
    this.#ended.set(id, trace.intervals === undefined ? JSON.stringify(trace) : trace);
    if (this.#ended.size <= this.kept) return;
    const oldest = this.#ended.keys().next().value;
    if (oldest !== undefined) this.#ended.delete(oldest);
  }

  /** What is known of a request, as /requests/{id} says it. */
  get(id: string): object | undefined {
    const trace = this.#running.get(id) ?? this.#ended.get(id);
    return trace === undefined ? undefined : asObject(trace);
  }

  /** A running or measured request. */
  measured(id: string): RequestTrace | undefined {
    const trace = this.#running.get(id) ?? this.#ended.get(id);
    return trace instanceof RequestTrace ? trace : undefined;
  }

  /** Newest first, running ones before those that ended. */
  list(most: number): object[] {
    const all = [...[...this.#running.values()].reverse(), ...[...this.#ended.values()].reverse()];
    return all.slice(0, most).map(asObject);
  }
}

function asObject(trace: RequestTrace | string): object {
  return typeof trace === "string" ? (JSON.parse(trace) as object) : trace.toJSON();
}
