// An open engine whose steps are promises. The event loop never waits for arithmetic: cv_submit only queues, and the
// engine writes a byte to a pipe for each step that ended, which the event loop polls like a socket.
//
// How the pipe is read was chosen by measurement (Bun 1.4.5, Linux, steps of 1 ms, time from the write to our code):
// Bun.file(fd).stream() 43 µs at the median and 100 µs at the 99th percentile; a threadsafe JSCallback 29-40 µs, but it
// may fire into a library that is being closed; fs.createReadStream 40 µs, but it fails on a non-blocking descriptor;
// net.Socket({fd}) delivers nothing for a pipe; fs.read 36 µs, and holds a thread of Bun's pool for ever. Nearly all
// of it is the wake-up of a sleeping core, and a second step in flight hides it, so the sturdiest way was taken.

import type { ReadableStreamDefaultReader } from "node:stream/web";
import { asCaravanError, CaravanError } from "../errors.ts";
import { EngineHandle, type GroupPointer, type NativeStats } from "./binding.ts";

interface Waiting {
  ticket: number;
  /** Turns the result's bytes into a value before the next result overwrites them, and settles the promise. */
  settle: (result: Uint8Array) => void;
  reject: (error: CaravanError) => void;
}

export class NativeEngine {
  readonly #handle: EngineHandle;
  readonly #events: ReadableStreamDefaultReader<Uint8Array<ArrayBuffer>>;
  readonly #reading: Promise<void>;
  /** In order of submission, which is the order in which steps end. */
  readonly #waiting: Waiting[] = [];
  #failed: CaravanError | undefined;
  #closed = false;

  private constructor(handle: EngineHandle) {
    this.#handle = handle;
    this.#events = Bun.file(handle.eventDescriptor()).stream().getReader();
    this.#reading = this.#read();
  }

  /** Opens an engine from a load plan's bytes. Blocks while weights are mapped or read. Throws what cv_open said. */
  static open(plan: Uint8Array): NativeEngine {
    return new NativeEngine(EngineHandle.open(plan));
  }

  /** The same without blocking. `onBytes` hears how many bytes of weights are in place. group: the connected ranks of which
   * this is rank 0; it must outlive the engine. */
  static async load(
    plan: Uint8Array,
    onBytes?: (done: number) => void,
    signal?: AbortSignal,
    group: GroupPointer | null = null,
  ): Promise<NativeEngine> {
    return new NativeEngine(await EngineHandle.load(plan, onBytes, signal, group));
  }

  /** Why the engine takes no further steps; undefined while it lives. */
  get failed(): CaravanError | undefined {
    return this.#failed;
  }

  /** Queues a step (bytes are copied before this returns). The promise gives what `decode` makes of the result's bytes,
   * which are valid only inside the call. Rejects with the step's own error. `queued` hears its ticket at once. */
  submit<T>(
    step: Uint8Array,
    decode: (result: Uint8Array) => T,
    queued?: (ticket: number) => void,
  ): Promise<T> {
    return new Promise((resolve, reject) => {
      if (this.#failed !== undefined) throw this.#failed;
      const ticket = this.#queue(step);
      this.#waiting.push({ ticket, settle: (result) => resolve(decode(result)), reject });
      queued?.(ticket);
    });
  }

  /** A lost rank may be found before any step in flight tells of it: the engine is over then, not only this step. */
  #queue(step: Uint8Array): number {
    try {
      return this.#handle.submit(step);
    } catch (thrown) {
      const error = asCaravanError(thrown);
      if (error.code === "cluster_degraded") this.#failed ??= error;
      throw error;
    }
  }

  /** Masks for a row of a step in flight that waits for them (copied); undefined: its sample does not matter any more. */
  giveMasks(ticket: number, row: number, masks: Uint32Array | undefined): void {
    // The row of a step that has just ended waits for nothing, and its ticket may be gone.
    if (this.#closed || !this.#waiting.some((waiting) => waiting.ticket === ticket)) return;
    this.#handle.giveMasks(ticket, row, masks ?? null);
  }

  stats(): NativeStats {
    return this.#handle.stats();
  }

  /** Ends running and queued steps with an error; the engine takes no more, because of `why`. */
  abort(why?: CaravanError): void {
    this.#failed ??= why ?? new CaravanError("engine_failed", "the engine was stopped");
    this.#handle.abort();
  }

  /** Aborts, waits for the compute thread and frees everything; steps in flight are rejected. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.abort();
    // Bun stops polling the descriptor first: closing the engine closes it, and its number may be used again.
    await this.#events.cancel();
    await this.#reading;
    this.#handle.close();
    this.#rejectAll();
  }

  async #read(): Promise<void> {
    try {
      for (;;) {
        const { done, value } = await this.#events.read();
        if (done) break;
        for (let ended = value.length; ended > 0; ended--) this.#collectOldest();
      }
      if (!this.#closed) this.#fail(new CaravanError("engine_failed", "the engine's event pipe was closed"));
    } catch (thrown) {
      this.#fail(asCaravanError(thrown));
    }
  }

  #collectOldest(): void {
    const oldest = this.#waiting.shift();
    if (oldest === undefined)
      throw new CaravanError("engine_failed", "the engine ended a step that nobody submitted");
    const outcome = this.#handle.collect(oldest.ticket);
    if (outcome.state === "done") {
      try {
        oldest.settle(outcome.result);
      } catch (thrown) {
        oldest.reject(asCaravanError(thrown));
      }
      return;
    }
    if (outcome.state === "running") {
      const error = new CaravanError("engine_failed", "the engine ended its steps out of order");
      oldest.reject(error);
      throw error;
    }
    if (outcome.over) this.#failed ??= outcome.error;
    oldest.reject(outcome.error);
  }

  /** The engine cannot be trusted any more. */
  #fail(error: CaravanError): void {
    this.#failed ??= error;
    this.#handle.abort();
    this.#rejectAll();
  }

  #rejectAll(): void {
    const error = this.#failed ?? new CaravanError("engine_failed", "the engine was closed");
    for (const { reject } of this.#waiting.splice(0)) reject(error);
  }
}
