// Renders chat templates that take long, one after another, in a thread of their own: a template is a program by a stranger
// and cannot be paused, so the thread is killed when it takes longer than it may. Nothing else waits for it.
import { CaravanError } from "../errors.ts";
import { DEFAULT_LIMITS } from "./jinja-sandbox.ts";
import type { ChatInput, GuardedText, TemplateFiles } from "./prompt-renderer.ts";
import type { FromWorker, ToWorker } from "./text-protocol.ts";

/** The template's own limit, in processor time, ends it in an orderly way; one step of it may take longer than that. The
 * machine may be busy with other work. */
const KILL_MS = 3 * DEFAULT_LIMITS.maxTimeMs + 2000;
/** The thread ends when nothing came for so long. */
const IDLE_MS = 10_000;

export interface RenderJob {
  readonly files: TemplateFiles;
  readonly input: ChatInput;
  readonly resolve: (prompt: GuardedText) => void;
  readonly reject: (error: CaravanError) => void;
  /** Nobody waits for it any more. */
  readonly dropped: () => boolean;
}

export class SlowRenderer {
  readonly #url: URL;
  readonly #waiting: RenderJob[] = [];
  #worker: Worker | null = null;
  #running: RenderJob | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #nextId = 1;

  /** `url`: the text worker's file. */
  constructor(
    url: URL,
    private readonly killMs = KILL_MS,
  ) {
    this.#url = url;
  }

  add(job: RenderJob): void {
    this.#waiting.push(job);
    this.#next();
  }

  /** Ends the thread; jobs that were not finished are forgotten. */
  close(): void {
    this.#waiting.length = 0;
    this.#running = null;
    this.#end();
  }

  #next(): void {
    if (this.#running !== null) return;
    clearTimeout(this.#timer);
    let job = this.#waiting.shift();
    while (job?.dropped()) job = this.#waiting.shift();
    if (job === undefined) {
      if (this.#worker !== null) this.#timer = setTimeout(() => this.#end(), IDLE_MS);
      return;
    }
    this.#running = job;
    this.#worker ??= this.#start();
    this.#timer = setTimeout(() => this.#fail("deadline_exceeded", "took too long"), this.killMs);
    const message: ToWorker = { kind: "render", id: this.#nextId++, files: job.files, input: job.input };
    this.#worker.postMessage(message);
  }

  #start(): Worker {
    const worker = new Worker(this.#url);
    const died = () => {
      if (this.#worker === worker) this.#fail("engine_failed", "ended the thread that rendered it");
    };
    worker.onerror = died;
    worker.addEventListener("close", died);
    worker.onmessage = (event: MessageEvent<FromWorker>) => {
      const message = event.data;
      const job = this.#running;
      if (this.#worker !== worker || job === null) return;
      this.#running = null;
      if (message.kind === "rendered") job.resolve(message.prompt);
      else if (message.kind === "failed") job.reject(CaravanError.fromJSON(message.error));
      this.#next();
    };
    return worker;
  }

  #fail(code: "deadline_exceeded" | "engine_failed", what: string): void {
    const job = this.#running;
    this.#running = null;
    this.#end();
    job?.reject(
      new CaravanError(code, `the chat template ${what}`, {
        where: job.files.where,
        hint: "The chat template of this model may be broken.",
      }),
    );
    this.#next();
  }

  #end(): void {
    clearTimeout(this.#timer);
    const worker = this.#worker;
    this.#worker = null;
    worker?.terminate();
  }
}
