// An Engine whose arithmetic happens in a runner process. A runner that dies, is killed or hangs ends its streams with
// an error event and takes no connection with it; the next request starts it again, after a pause that grows with
// every failure in a row. A request that was sent to a runner which had just died, and has not accepted it, goes to the next one.

import { asCaravanError, CaravanError } from "../errors.ts";
import { ownCommand } from "./child-process.ts";
import { errorRecord } from "./error-record.ts";
import { EventStream } from "./event-stream.ts";
import type { LoadOptions } from "./load-options.ts";
import type { Engine, EngineStatus, GenerateEvent, GenerateRequest, RunnerMessage } from "./protocol.ts";
import { addressBytes, addressText } from "./rank-protocol.ts";
import { RunnerProcess } from "./runner-process.ts";

export interface RunnerClientOptions extends LoadOptions {
  onProgress?: (fraction: number, detail: string) => void;
  /** The runner's log; default: this process's stderr. */
  onLog?: (text: string) => void;
  /** Command line of the runner; default: this program's `runner` command. */
  command?: readonly string[];
  /** A runner that answers nothing for so long, while it has work, is killed. */
  hangLimitMs?: number;
  /** Rank 0's address, where the load options name an instance; `connect` follows once all addresses are known. Such a runner
   * is not started again: a new epoch needs new options. */
  onAddress?: (address: Uint8Array) => void;
  /** What the ranks of the instance chose to connect by. */
  onConnected?: (connection: { transport: string; note: string; round_trip_us: number }) => void;
}

const POLL_MS = 500;
const HANG_LIMIT_MS = 10_000;
/** Pause before the n-th start in a row that follows a failure: 0, 0.25, 0.5 … 8 s. */
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 8000;

interface Live {
  request: GenerateRequest;
  stream: EventStream;
  /** The runner has the request. */
  sent: boolean;
  /** It has said something of it. */
  heard: boolean;
  /** Runners that died without a word about it. */
  lost: number;
}

/** Then the request may be what they die of. */
const MOST_LOST = 1;

export class RunnerClient implements Engine {
  readonly model: string;
  readonly #options: RunnerClientOptions;
  readonly #live = new Map<string, Live>();
  #status: EngineStatus;
  readonly #rankPeaks = new Map<number, number>();
  #runner: RunnerProcess | undefined;
  #starting: Promise<void> | undefined;
  #settleStart: { resolve: () => void; reject: (error: CaravanError) => void } | undefined;
  #fatal: CaravanError | undefined;
  #failures = 0;
  #failedAtMs = 0;
  #poll: ReturnType<typeof setInterval> | undefined;
  #heardMs = 0;
  #closed = false;
  /** Why it takes no more requests, where somebody said so. */
  #over: CaravanError | undefined;

  constructor(options: RunnerClientOptions) {
    this.model = options.model;
    this.#options = options;
    this.#status = { model: options.model, state: "loading", progress: 0, running: 0, waiting: 0 };
  }

  status(): EngineStatus {
    const peaks = this.#status.rank_peak_resident_bytes;
    if (peaks === undefined || this.#rankPeaks.size === 0) return this.#status;
    const known = peaks.map((peak, rank) => peak ?? this.#rankPeaks.get(rank) ?? null);
    return { ...this.#status, rank_peak_resident_bytes: known };
  }

  /** What a rank on another machine says of its memory; the runner knows only of its own machine. */
  noteRankPeak(rank: number, bytes: number): void {
    this.#rankPeaks.set(rank, bytes);
  }

  outstanding(): number {
    return this.#live.size;
  }

  /** Process id of the running runner. */
  get pid(): number | undefined {
    return this.#runner?.pid;
  }

  /** Starts the runner if it is not running. */
  ready(): Promise<void> {
    if (this.#over !== undefined || this.#closed) return Promise.reject(this.#over ?? closedError());
    // It has said that it is ending: only its successor can answer, once its memory is free.
    if (this.#fatal !== undefined && this.#settleStart === undefined && this.#runner !== undefined)
      return this.#runner.ended.then(() => this.ready());
    this.#starting ??= this.#start();
    return this.#starting;
  }

  generate(request: GenerateRequest): AsyncIterable<GenerateEvent> {
    if (this.#live.has(request.id))
      throw new CaravanError("internal_error", `request ${request.id} is already running`);
    const stream = new EventStream(() => this.#abandon(request.id));
    const live = { request, stream, sent: false, heard: false, lost: 0 };
    this.#live.set(request.id, live);
    this.#sendWhenReady(live);
    return stream;
  }

  #sendWhenReady(live: Live): void {
    this.ready().then(
      () => this.#sendRequest(live),
      (thrown) => this.#end(live, { type: "error", id: live.request.id, error: errorRecord(thrown) }),
    );
  }

  cancel(id: string): void {
    const live = this.#live.get(id);
    if (live === undefined) return;
    if (live.sent) {
      this.#runner?.send({ type: "cancel", id });
      return;
    }
    this.#end(live, {
      type: "finish",
      id,
      reason: "cancelled",
      usage: { prompt_tokens: live.request.tokens.length, completion_tokens: 0, cached_tokens: 0 },
      timing: { queue_ms: 0, prefill_ms: 0, decode_ms: 0 },
    });
  }

  /** Connects rank 0 of an instance to the others, which do so at the same time, and lets it load. */
  connect(addresses: readonly Uint8Array[], timeoutMs: number): void {
    this.#runner?.send({ type: "connect", addresses: addresses.map(addressText), timeout_ms: timeoutMs });
  }

  /** A rank of the instance is gone: rank 0 ends with that as its reason. */
  lost(error: CaravanError): void {
    this.#runner?.send({ type: "lost", error: errorRecord(error) });
  }

  /** Ends the process now, even one that is stopped; `why` is what requests that run end with. */
  async kill(why: CaravanError): Promise<void> {
    const runner = this.#runner;
    runner?.kill(why);
    await runner?.ended;
  }

  /** Every request ends with `error`, those to come too: what follows is close(). */
  endRequests(error: CaravanError): void {
    this.#over ??= error;
    this.#endAll(error);
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#poll);
    this.#endAll(this.#over ?? closedError());
    await this.#runner?.close();
    this.#status = { ...this.#status, state: "closed", running: 0, waiting: 0 };
  }

  async #start(): Promise<void> {
    const pause =
      this.#failures < 2 ? 0 : Math.min(FIRST_PAUSE_MS * 2 ** (this.#failures - 2), LONGEST_PAUSE_MS);
    const wait = this.#failedAtMs + pause - performance.now();
    if (this.#failures > 0 && wait > 0) await Bun.sleep(wait);
    if (this.#closed) throw closedError();
    if (this.#options.instance !== undefined && this.#failures > 0) throw this.#fatal ?? goneError();
    const {
      onProgress: _,
      onLog,
      command,
      hangLimitMs: __,
      onAddress: ___,
      onConnected: ____,
      ...load
    } = this.#options;
    this.#status = { model: this.model, state: "loading", progress: 0, running: 0, waiting: 0 };
    this.#fatal = undefined;
    return new Promise((resolve, reject) => {
      this.#settleStart = { resolve, reject };
      try {
        this.#runner = new RunnerProcess({
          command: command ?? ownCommand("runner"),
          load,
          onMessage: (message) => this.#receive(message),
          onExit: (error) => this.#exited(error),
          onLog,
        });
      } catch (thrown) {
        this.#exited(asCaravanError(thrown));
      }
    });
  }

  #receive(message: RunnerMessage): void {
    this.#heardMs = performance.now();
    switch (message.type) {
      case "loading":
        this.#status = { ...this.#status, progress: message.progress };
        this.#options.onProgress?.(message.progress, message.detail);
        return;
      case "ready":
        this.#status = message.status;
        this.#settleStart?.resolve();
        this.#settleStart = undefined;
        return;
      case "status":
        this.#status = message.status;
        return;
      case "address":
        this.#options.onAddress?.(addressBytes(message.address));
        return;
      case "connected": {
        const { type: _, ...connection } = message;
        this.#options.onConnected?.(connection);
        return;
      }
      case "fatal":
        this.#fatal = CaravanError.fromJSON({ ...message.error });
        return;
      default: {
        const live = this.#live.get(message.id);
        if (live === undefined) return;
        live.heard = true;
        if (message.type === "finish") this.#failures = 0;
        if (message.type === "finish" || message.type === "error") this.#end(live, message);
        else live.stream.push(message);
      }
    }
  }

  /** The runner is gone, whatever the reason. */
  #exited(crash: CaravanError): void {
    this.#runner = undefined;
    this.#starting = undefined;
    if (this.#closed) {
      this.#settleStart?.reject(closedError());
      return;
    }
    const error = this.#fatal ?? crash;
    this.#failures++;
    this.#failedAtMs = performance.now();
    this.#status = { ...this.#status, state: "failed", running: 0, waiting: 0, error: errorRecord(error) };
    const settle = this.#settleStart;
    this.#settleStart = undefined;
    // Requests that wait for a start end through its rejection, or go to the next runner.
    if (settle !== undefined) {
      settle.reject(error);
      return;
    }
    const sent = [...this.#live.values()].filter((live) => live.sent);
    const again = sent.filter((live) => this.#mayGoToTheNext(live));
    this.#endAll(error, (live) => live.sent && !again.includes(live));
    for (const live of again) {
      live.sent = false;
      live.lost++;
      this.#sendWhenReady(live);
    }
  }

  #mayGoToTheNext(live: Live): boolean {
    return (
      !live.heard &&
      live.lost < MOST_LOST &&
      this.#fatal === undefined &&
      this.#options.instance === undefined
    );
  }

  #sendRequest(live: Live): void {
    if (live.stream.ended || this.#live.get(live.request.id) !== live) return;
    live.sent = true;
    this.#runner?.send({ type: "generate", request: live.request });
    if (this.#runner === undefined)
      this.#end(live, {
        type: "error",
        id: live.request.id,
        error: errorRecord(this.#fatal ?? goneError()),
      });
    else this.#watch();
  }

  #abandon(id: string): void {
    const live = this.#live.get(id);
    this.#live.delete(id);
    if (live?.sent === true) this.#runner?.send({ type: "cancel", id });
  }

  #end(live: Live, last: GenerateEvent): void {
    this.#live.delete(live.request.id);
    live.stream.push(last);
  }

  #endAll(error: CaravanError, which: (live: Live) => boolean = () => true): void {
    for (const live of [...this.#live.values()].filter(which))
      this.#end(live, { type: "error", id: live.request.id, error: errorRecord(error) });
  }

  /** While requests are running, asks for the runner's state now and then. Its event loop never waits for arithmetic,
   * so a runner that does not answer hangs. */
  #watch(): void {
    if (this.#poll !== undefined) return;
    const limit = this.#options.hangLimitMs ?? HANG_LIMIT_MS;
    this.#heardMs = performance.now();
    let last = performance.now();
    this.#poll = setInterval(() => {
      const now = performance.now();
      // This process was stopped itself (a laptop that slept): no time has passed for the runner.
      if (now - last > 4 * POLL_MS) this.#heardMs = now;
      last = now;
      if (this.#runner !== undefined && now - this.#heardMs > limit)
        this.#runner.kill(
          new CaravanError(
            "engine_failed",
            `the runner process answered nothing for ${Math.round(limit / 1000)} s`,
            {
              hint: "send the request again; the model is loaded again",
              retryAfterSeconds: 2,
            },
          ),
        );
      this.#runner?.send({ type: "status" });
      if (this.#live.size > 0 && this.#runner !== undefined) return;
      clearInterval(this.#poll);
      this.#poll = undefined;
    }, POLL_MS);
  }
}

function closedError(): CaravanError {
  return new CaravanError("shutting_down", "the model is being unloaded", { retryAfterSeconds: 5 });
}

function goneError(): CaravanError {
  return new CaravanError("engine_failed", "the runner process ended", { retryAfterSeconds: 2 });
}
