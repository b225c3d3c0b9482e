// Drives the scheduler with an engine: keeps up to `depth` steps in flight and hands results back in order.
// There is no loop that waits: arrivals and ended steps each try to fill the pipeline.

import type { GenerateRequest } from "../engine/protocol.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import type { GrammarMatcher } from "../grammar/matcher.ts";
import type { PlannedStep } from "./batch-builder.ts";
import type { Scheduler } from "./scheduler.ts";
import type { StepEngine, StepResult } from "./step.ts";

/** A step with more tokens than this is not overlapped with the next one, unless the engine is a pipeline: the gap that
 * overlapping hides (about 0.1 ms) does not matter beside it, while requests that arrive meanwhile would wait for two steps. */
const OVERLAP_TOKENS = 64;

/** Ticks of the timer that ends requests past their deadline while no step ends. */
const DEADLINE_TICK_MS = 50;

export interface StepLoopOptions {
  scheduler: Scheduler;
  engine: StepEngine;
  /** Steps in flight, at least 1; 2 hides the time between two decode steps. A pipeline has as many as stages, and one that is queued
   * for the sequences of the oldest: with others, its streams would fall into more and smaller steps than stages can use, each of which reads
   * the weights. */
  depth: number;
  /** The engine takes no more steps; every request has got its error. Called once. */
  onFatal: (error: CaravanError) => void;
  /** Called behind everything that one turn has done, so that its events can be sent together. */
  onTurn?: () => void;
  /** Called when a step's events are out and before the next step is planned, as long as the engine has another one to compute: what is
   * sent now does not wait for the plan. */
  onEvents?: () => void;
}

export class StepLoop {
  readonly #options: StepLoopOptions;
  readonly #inFlight: PlannedStep[] = [];
  #pumpQueued = false;
  #dead: CaravanError | undefined;
  #deadlineTimer: ReturnType<typeof setInterval> | undefined;

  constructor(options: StepLoopOptions) {
    this.#options = options;
  }

  /** Steps in flight. */
  get inFlight(): number {
    return this.#inFlight.length;
  }

  /** Takes a request. Requests of the same turn of the event loop join the same step. */
  add(request: GenerateRequest, grammar?: GrammarMatcher): void {
    this.#options.scheduler.add(request, grammar);
    if (this.#dead !== undefined) this.#options.scheduler.failAll(this.#dead);
    this.#watchDeadlines();
    this.#queuePump();
  }

  cancel(id: string): void {
    this.#options.scheduler.cancel(id);
    this.#queuePump();
  }

  /** Ends everything with `error`; nothing is computed afterwards. */
  stop(error: CaravanError): void {
    this.#dead ??= error;
    if (this.#deadlineTimer !== undefined) clearInterval(this.#deadlineTimer);
    this.#deadlineTimer = undefined;
    this.#options.scheduler.failAll(error);
    this.#options.onTurn?.();
  }

  #queuePump(): void {
    if (this.#pumpQueued) return;
    this.#pumpQueued = true;
    queueMicrotask(() => {
      this.#pumpQueued = false;
      try {
        this.#pump();
      } catch (thrown) {
        this.#fatal(asCaravanError(thrown));
        return;
      }
      this.#options.onTurn?.();
    });
  }

  #pump(): void {
    const { scheduler, engine, depth } = this.#options;
    const { stages } = scheduler;
    const most = stages > 1 ? stages + 1 : depth;
    while (this.#dead === undefined && this.#inFlight.length < most) {
      const before = this.#inFlight.at(-1);
      if (before !== undefined && stages === 1 && before.tokens > OVERLAP_TOKENS) return;
      const oldest = stages > 1 && this.#inFlight.length >= stages ? this.#inFlight[0] : undefined;
      const planned = scheduler.plan(before !== undefined, oldest);
      if (planned === undefined) return;
      this.#inFlight.push(planned);
      engine.submit(planned.step).then(
        (result) => this.#ended(planned, result),
        (thrown) => this.#failed(planned, asCaravanError(thrown)),
      );
      if (before === undefined) this.#giveMasks();
    }
  }

  /** To the step that the engine computes now: what was sampled in front of it is known. */
  #giveMasks(): void {
    const { scheduler, engine } = this.#options;
    const running = this.#inFlight[0];
    if (running === undefined) return;
    scheduler.giveMasks(running, (row, masks) => engine.giveMasks(running.step, row, masks));
  }

  #ended(planned: PlannedStep, result: StepResult): void {
    if (this.#dead !== undefined) return;
    if (this.#inFlight.shift() !== planned) {
      this.#fatal(new CaravanError("internal_error", "the engine answered steps out of order"));
      return;
    }
    try {
      this.#options.scheduler.complete(planned, result);
      this.#giveMasks();
      if (this.#inFlight.length > 0) this.#options.onEvents?.();
      this.#pump();
    } catch (thrown) {
      this.#fatal(asCaravanError(thrown));
      return;
    }
    this.#options.onTurn?.();
  }

  #failed(planned: PlannedStep, error: CaravanError): void {
    if (this.#dead !== undefined) return;
    const gone = this.#options.engine.failed;
    if (gone !== undefined || this.#inFlight.shift() !== planned) {
      this.#fatal(gone ?? error);
      return;
    }
    this.#options.scheduler.fail(planned, error);
    try {
      this.#giveMasks();
    } catch (thrown) {
      this.#fatal(asCaravanError(thrown));
      return;
    }
    this.#queuePump();
  }

  #fatal(error: CaravanError): void {
    this.stop(error);
    this.#options.onFatal(error);
  }

  #watchDeadlines(): void {
    if (this.#deadlineTimer !== undefined || !this.#options.scheduler.hasDeadlines) return;
    this.#deadlineTimer = setInterval(() => {
      this.#options.scheduler.expire();
      this.#options.onTurn?.();
      if (this.#options.scheduler.hasDeadlines) return;
      clearInterval(this.#deadlineTimer);
      this.#deadlineTimer = undefined;
    }, DEADLINE_TICK_MS);
  }
}
