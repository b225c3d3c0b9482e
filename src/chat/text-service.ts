// A model's text work, off the main thread: one worker for each model folder holds the tokenizer and the template.
// The main thread keeps only the shared token table, from which it detokenizes streams itself.
//
// A worker that dies or hangs is replaced. The job that was at work then fails; the others are sent again, once each.
import { CaravanError } from "../errors.ts";
import { Detokenizer, type DetokenizerOptions } from "./detokenizer.ts";
import type { ChatInput, TemplateFiles } from "./prompt-renderer.ts";
import { SlowRenderer } from "./slow-renderer.ts";
import {
  BEAT,
  type FromWorker,
  type Job,
  type JobResult,
  RUNNING,
  SHARED_LENGTH,
  type TextInfo,
  type ToWorker,
} from "./text-protocol.ts";
import type { TokenTable } from "./token-table.ts";

export interface TextServiceOptions {
  /** Longest time without a sign of life while there is work (default 10 s). */
  readonly hangLimitMs?: number;
  /** Longest time for reading the tokenizer (default 60 s). */
  readonly loadLimitMs?: number;
}

export interface TextRequestOptions {
  /** Aborting drops the job and rejects its promise with `cancelled`. */
  readonly signal?: AbortSignal;
}

export interface Prompt {
  readonly text: string;
  readonly ids: number[];
}

interface Pending {
  job: Job;
  readonly resolve: (result: JobResult) => void;
  readonly reject: (error: CaravanError) => void;
  sentAgain: boolean;
}

interface Live {
  readonly worker: Worker;
  readonly shared: Int32Array;
}

const WATCH_EVERY_MS = 250;

export class TextService {
  /** The folder that holds tokenizer.json. */
  readonly dir: string;
  #info: TextInfo | null = null;
  readonly #hangLimitMs: number;
  readonly #loadLimitMs: number;
  #live: Live | null = null;
  #starting: Promise<Live> | null = null;
  readonly #pending = new Map<number, Pending>();
  /** Jobs that the text worker does not have, because their template is being rendered elsewhere. */
  readonly #elsewhere = new Set<number>();
  readonly #slow = new SlowRenderer(workerUrl());
  #nextId = 1;
  #closed = false;
  #closedFor = new CaravanError("shutting_down", "the model's text worker is closed");
  #watch: ReturnType<typeof setInterval> | null = null;

  private constructor(dir: string, options: TextServiceOptions) {
    this.dir = dir;
    this.#hangLimitMs = options.hangLimitMs ?? 10_000;
    this.#loadLimitMs = options.loadLimitMs ?? 60_000;
  }

  /**
   * Starts the worker and waits until it has read the tokenizer. Keep one service for each model folder and close it:
   * it keeps the process alive. Errors: bad_file, unsupported_model, engine_failed.
   */
  static async start(dir: string, options: TextServiceOptions = {}): Promise<TextService> {
    const service = new TextService(dir, options);
    await service.#ensure();
    return service;
  }

  get info(): TextInfo {
    if (this.#info === null) throw new CaravanError("internal_error", "the text worker has not started");
    return this.#info;
  }

  /** Bytes and flags of every token, in memory shared with the worker. */
  get table(): TokenTable {
    return this.info.table;
  }

  /** A detokenizer for one stream; works on this thread. */
  detokenizer(options: DetokenizerOptions = {}): Detokenizer {
    return new Detokenizer(this.table, options);
  }

  /** Prompt of a conversation. Errors as ChatTemplate.renderChat. */
  async renderChat(input: ChatInput, options: TextRequestOptions = {}): Promise<Prompt> {
    const { text, ids } = await this.#request({ op: "render", input }, options);
    return { text, ids: toArray(ids) };
  }

  /** Ids of a text. `specials`: the text of special tokens becomes them (raw completions), else it stays text. */
  async encode(
    text: string,
    options: { readonly specials: boolean } & TextRequestOptions,
  ): Promise<number[]> {
    const { ids } = await this.#request({ op: "encode", text, specials: options.specials }, options);
    return toArray(ids);
  }

  /** Text of ids, special tokens included. */
  async decode(ids: readonly number[], options: TextRequestOptions = {}): Promise<string> {
    return (await this.#request({ op: "decode", ids: new Uint32Array(ids) }, options)).text;
  }

  /** Stops the worker; unfinished and later requests fail with `reason`. */
  close(reason: CaravanError = this.#closedFor): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#closedFor = reason;
    this.#drop();
    this.#slow.close();
    this.#rejectAll(reason);
  }

  async #request(job: Job, options: TextRequestOptions): Promise<JobResult> {
    if (this.#closed) throw this.#closedFor;
    const { signal } = options;
    if (signal?.aborted) throw new CaravanError("cancelled", "the request was cancelled");
    const id = this.#nextId++;
    const result = new Promise<JobResult>((resolve, reject) => {
      this.#pending.set(id, { job, resolve, reject, sentAgain: false });
    });
    const abort = (): void => {
      this.#post({ kind: "cancel", id });
      this.#settle(id)?.reject(new CaravanError("cancelled", "the request was cancelled"));
    };
    signal?.addEventListener("abort", abort, { once: true });
    try {
      if (this.#live !== null) this.#sendJob(this.#live, id);
      // A worker that is just starting is sent everything that waits as soon as it has loaded.
      else this.#ensure().catch((error: CaravanError) => this.#settle(id)?.reject(error));
      return await result;
    } finally {
      signal?.removeEventListener("abort", abort);
    }
  }

  #sendJob(live: Live, id: number): void {
    const pending = this.#pending.get(id);
    if (pending === undefined || this.#elsewhere.has(id)) return;
    if (this.#watch === null) this.#watch = this.#watchdog(live);
    try {
      const message: ToWorker = { kind: "job", id, job: pending.job };
      live.worker.postMessage(message);
    } catch (cause) {
      // A value that cannot be copied to another thread (a function in the input, say).
      const message = cause instanceof Error ? cause.message : String(cause);
      this.#settle(id)?.reject(
        new CaravanError("invalid_argument", `the input is not JSON: ${message}`, { cause }),
      );
    }
  }

  /** The prompt comes back to the text worker as soon as it is rendered; meanwhile that one is not waited for. */
  #renderElsewhere(id: number, files: TemplateFiles): void {
    const pending = this.#pending.get(id);
    if (pending === undefined || pending.job.op !== "render") return;
    this.#elsewhere.add(id);
    this.#watchOnlyWork();
    this.#slow.add({
      files,
      input: pending.job.input,
      dropped: () => !this.#pending.has(id),
      resolve: (prompt) => {
        this.#elsewhere.delete(id);
        pending.job = { op: "encode-prompt", prompt };
        if (this.#live !== null) this.#sendJob(this.#live, id);
        else this.#ensure().catch((error: CaravanError) => this.#settle(id)?.reject(error));
      },
      reject: (error) => this.#settle(id)?.reject(error),
    });
  }

  #post(message: ToWorker): void {
    this.#live?.worker.postMessage(message);
  }

  /** Takes a request off the books. */
  #settle(id: number): Pending | undefined {
    const pending = this.#pending.get(id);
    this.#pending.delete(id);
    this.#elsewhere.delete(id);
    this.#watchOnlyWork();
    return pending;
  }

  #watchOnlyWork(): void {
    if (this.#pending.size === this.#elsewhere.size) this.#stopWatch();
  }

  #rejectAll(error: CaravanError): void {
    for (const id of [...this.#pending.keys()]) this.#settle(id)?.reject(error);
  }

  /** The worker, started if there is none. A start that failed is not repeated until the next request asks for it. */
  #ensure(): Promise<Live> {
    if (this.#live !== null) return Promise.resolve(this.#live);
    this.#starting ??= this.#start().finally(() => {
      this.#starting = null;
    });
    return this.#starting;
  }

  async #start(): Promise<Live> {
    const worker = new Worker(workerUrl());
    const shared = new Int32Array(new SharedArrayBuffer(4 * SHARED_LENGTH));
    const live: Live = { worker, shared };
    const { promise, resolve, reject } = Promise.withResolvers<TextInfo>();
    const limit = setTimeout(() => {
      reject(new CaravanError("engine_failed", "reading the tokenizer took too long", { where: this.dir }));
    }, this.#loadLimitMs);
    const died = (what: string): void => {
      const error = new CaravanError("engine_failed", `the text worker stopped: ${what}`, {
        where: this.dir,
      });
      reject(error);
      if (this.#live === live) this.#replace(error);
    };
    worker.onerror = (event) => died(event.message);
    worker.addEventListener("close", () => died("it ended"));
    worker.onmessage = (event: MessageEvent<FromWorker>) => {
      const message = event.data;
      if (message.kind === "loaded") resolve(message.info);
      else if (message.kind === "refused") reject(CaravanError.fromJSON(message.error));
      else if (message.kind === "slow") this.#renderElsewhere(message.id, message.files);
      else if (message.kind === "rendered") return;
      else if (message.kind === "done") this.#settle(message.id)?.resolve(message.result);
      else this.#settle(message.id)?.reject(CaravanError.fromJSON(message.error));
    };
    const load: ToWorker = { kind: "load", dir: this.dir, shared };
    worker.postMessage(load);
    try {
      // The first table stays: detokenizers point at it, and a replacement worker builds an equal one.
      const info = await promise;
      this.#info ??= info;
    } catch (error) {
      worker.terminate();
      throw error;
    } finally {
      clearTimeout(limit);
    }
    if (this.#closed) {
      worker.terminate();
      throw this.#closedFor;
    }
    this.#live = live;
    for (const id of this.#pending.keys()) this.#sendJob(live, id);
    return live;
  }

  /** After the worker's death: the job at work is to blame, the others get one more chance on a new worker. */
  #replace(error: CaravanError): void {
    const guilty = this.#live === null ? 0 : Atomics.load(this.#live.shared, RUNNING);
    this.#drop();
    for (const [id, pending] of [...this.#pending]) {
      if (this.#elsewhere.has(id)) continue;
      if (id === guilty || pending.sentAgain) this.#settle(id)?.reject(error);
      else pending.sentAgain = true;
    }
    if (this.#pending.size === this.#elsewhere.size) return;
    this.#ensure().catch((failure: CaravanError) => this.#rejectAll(failure));
  }

  #drop(): void {
    this.#stopWatch();
    const live = this.#live;
    this.#live = null;
    live?.worker.terminate();
  }

  #stopWatch(): void {
    if (this.#watch !== null) clearInterval(this.#watch);
    this.#watch = null;
  }

  /** Replaces a worker whose beat stands still while there is work. */
  #watchdog(live: Live): ReturnType<typeof setInterval> {
    let beat = Atomics.load(live.shared, BEAT);
    let since = performance.now();
    let looked = since;
    return setInterval(() => {
      const now = performance.now();
      // This process itself stood still, and its worker with it.
      if (now - looked > 2 * WATCH_EVERY_MS) since += now - looked;
      looked = now;
      const beats = Atomics.load(live.shared, BEAT);
      if (beats !== beat) {
        beat = beats;
        since = now;
      } else if (now - since > this.#hangLimitMs && this.#live === live) {
        this.#replace(
          new CaravanError(
            "deadline_exceeded",
            `text processing made no progress for ${this.#hangLimitMs} ms`,
            {
              where: this.dir,
              hint: "The chat template of this model may be broken.",
            },
          ),
        );
      }
    }, WATCH_EVERY_MS);
  }
}

/** A plain array of ids. Array.from takes ten times as long, 40 ms for a million ids, and would hold up every stream. */
function toArray(ids: Uint32Array): number[] {
  const array = new Array<number>(ids.length);
  for (let i = 0; i < ids.length; i++) array[i] = ids[i] ?? 0;
  return array;
}

/**
 * The worker's file. From source it lies beside this one. In an executable all modules of an entry point are one file at
 * the root, and further entry points keep their path below the common root, which is src/ (Bun 1.4.5). So the build is
 *   bun build --compile --root src src/main.ts src/chat/text-worker.ts --outfile …
 */
export function workerUrl(): URL {
  const compiled = import.meta.url.includes("/$bunfs/");
  return new URL(compiled ? "./chat/text-worker.js" : "./text-worker.ts", import.meta.url);
}
