// Entry of the text worker: the thread that holds a model's tokenizer and chat template.
//
// Jobs are generators that pause every millisecond or so. The worker runs one for a short slice, then looks at its
// messages and asks the queue whose turn it is: so a small text is encoded within milliseconds while megabytes are at
// work. A template cannot be paused: one that needs longer than FAST_RENDER_MS is given up here, and rendered by another
// thread of this file, which slow-renderer.ts starts and may kill.
//
// How it is found (Bun 1.4.5): text-service.ts starts it by a path that holds both from source and in an executable
// that was built with this file as a second entry point; see the comment there.
import { asCaravanError, CaravanError } from "../errors.ts";
import { Detokenizer } from "./detokenizer.ts";
import { DEFAULT_LIMITS } from "./jinja-sandbox.ts";
import { JobQueue } from "./job-queue.ts";
import { type ChatInput, type GuardedText, isTimeLimit, PromptRenderer } from "./prompt-renderer.ts";
import { ChatTemplate } from "./template.ts";
import { BEAT, type FromWorker, type Job, type JobResult, RUNNING, type ToWorker } from "./text-protocol.ts";
import { Tokenizer } from "./tokenizer.ts";
import { readTokenizerFiles } from "./tokenizer-files.ts";

declare const self: Worker;

/** Time a job runs before the worker looks for others. */
const SLICE_MS = 4;
/** A conversation of a hundred messages takes a tenth of it. */
const FAST_RENDER_MS = 40;
/** Working time of one job; 1 MB takes half a second at worst. */
const MAX_JOB_MS = 60_000;
/** A job that worked longer than this leaves enough garbage to collect it as soon as there is nothing else to do. */
const LARGE_JOB_MS = 50;
/** Tokens decoded between two pauses. */
const DECODE_STEP = 4096;

interface Running {
  readonly id: number;
  readonly steps: Generator<void, JobResult>;
  spentMs: number;
}

const NO_IDS = new Uint32Array(0);

class TextWorker {
  readonly #tokenizer: Tokenizer;
  readonly #template: ChatTemplate;
  readonly #shared: Int32Array;
  readonly #queue = new JobQueue<Running>();
  #active = false;
  #hasGarbage = false;

  constructor(tokenizer: Tokenizer, template: ChatTemplate, shared: Int32Array) {
    this.#tokenizer = tokenizer;
    this.#template = template;
    this.#shared = shared;
  }

  add(id: number, job: Job): void {
    this.#queue.add({ id, steps: this.#begin(job), spentMs: 0 }, sizeOf(job), performance.now());
    if (this.#active) return;
    this.#active = true;
    setImmediate(() => this.#turn());
  }

  cancel(id: number): void {
    this.#queue.remove((running) => running.id === id);
  }

  /** One slice of one job; then messages get their chance before the next. */
  #turn(): void {
    const running = this.#queue.next(performance.now());
    if (running === undefined) {
      this.#active = false;
      if (this.#hasGarbage) Bun.gc(true);
      this.#hasGarbage = false;
      return;
    }
    Atomics.store(this.#shared, RUNNING, running.id);
    Atomics.add(this.#shared, BEAT, 1);
    this.#slice(running);
    Atomics.store(this.#shared, RUNNING, 0);
    setImmediate(() => this.#turn());
  }

  #slice(running: Running): void {
    const { id, steps } = running;
    const start = performance.now();
    try {
      for (;;) {
        const step = steps.next();
        if (step.done) {
          const { ids } = step.value;
          const transfer = ids.length === 0 ? [] : [ids.buffer as ArrayBuffer];
          send({ kind: "done", id, result: step.value }, transfer);
          return;
        }
        const ran = performance.now() - start;
        if (running.spentMs + ran > MAX_JOB_MS) {
          throw new CaravanError(
            "deadline_exceeded",
            `the text took more than ${MAX_JOB_MS / 1000} s to process`,
          );
        }
        if (ran < SLICE_MS) continue;
        running.spentMs += ran;
        this.#hasGarbage ||= running.spentMs > LARGE_JOB_MS;
        this.#queue.putBack(running, performance.now());
        return;
      }
    } catch (thrown) {
      if (thrown instanceof SlowTemplate) send({ kind: "slow", id, files: this.#template.renderer.files });
      else send({ kind: "failed", id, error: asCaravanError(thrown).toJSON() });
    }
  }

  *#begin(job: Job): Generator<void, JobResult> {
    switch (job.op) {
      case "render": {
        const { text, ids } = yield* this.#template.encodeSteps(
          renderFast(this.#template.renderer, job.input),
        );
        return { text, ids: new Uint32Array(ids) };
      }
      case "encode-prompt": {
        const { text, ids } = yield* this.#template.encodeSteps(job.prompt);
        return { text, ids: new Uint32Array(ids) };
      }
      case "encode": {
        const { text, specials } = job;
        const ids = specials
          ? yield* this.#tokenizer.encodeWithSpecialsSteps(text)
          : yield* this.#tokenizer.encodeTextSteps(text);
        return { text: "", ids: new Uint32Array(ids) };
      }
      case "decode": {
        const detokenizer = new Detokenizer(this.#tokenizer.table);
        const pieces: string[] = [];
        for (let i = 0; i < job.ids.length; i++) {
          pieces.push(detokenizer.push(job.ids[i] ?? 0));
          if (i % DECODE_STEP === DECODE_STEP - 1) yield;
        }
        pieces.push(detokenizer.flush());
        return { text: pieces.join(""), ids: NO_IDS };
      }
    }
  }
}

class SlowTemplate extends Error {}

/** Throws SlowTemplate when it takes too long. */
function renderFast(renderer: PromptRenderer, input: ChatInput): GuardedText {
  try {
    return renderer.render(input, { ...DEFAULT_LIMITS, maxTimeMs: FAST_RENDER_MS });
  } catch (thrown) {
    if (isTimeLimit(thrown)) throw new SlowTemplate();
    throw thrown;
  }
}

/** Rough size of a job's text: enough to tell a question from a book. */
function sizeOf(job: Job): number {
  if (job.op === "encode") return job.text.length;
  if (job.op === "decode") return job.ids.length;
  if (job.op === "encode-prompt") return job.prompt.text.length;
  let size = 0;
  // Content parts lie five levels down; what is deeper is refused later (or is a circle).
  const count = (value: unknown, depth: number): void => {
    if (typeof value === "string") size += value.length;
    if (typeof value !== "object" || value === null || depth === 0) return;
    for (const part of Object.values(value)) count(part, depth - 1);
  };
  count(job.input, 5);
  return size;
}

function send(message: FromWorker, transfer: ArrayBuffer[] = []): void {
  self.postMessage(message, transfer);
}

let worker: TextWorker | null = null;

async function load(dir: string, shared: Int32Array): Promise<void> {
  try {
    const files = await readTokenizerFiles(dir);
    const tokenizer = new Tokenizer(files);
    const template = new ChatTemplate(files, tokenizer);
    worker = new TextWorker(tokenizer, template, shared);
    const { table, vocabSize, bosId, eosIds, beginIds } = tokenizer;
    send({
      kind: "loaded",
      info: { table, vocabSize, bosId, eosIds, beginIds, hasChatTemplate: template.exists },
    });
  } catch (thrown) {
    send({ kind: "refused", error: asCaravanError(thrown).toJSON() });
    return;
  }
  // The parsed tokenizer.json (100 MB for Llama 4) is garbage now: give it back at once.
  setTimeout(() => Bun.gc(true), 0);
}

function render({ id, files, input }: Extract<ToWorker, { kind: "render" }>): void {
  try {
    send({ kind: "rendered", id, prompt: new PromptRenderer(files).render(input) });
  } catch (thrown) {
    send({ kind: "failed", id, error: asCaravanError(thrown).toJSON() });
  }
}

self.onmessage = (event: MessageEvent<ToWorker>): void => {
  const message = event.data;
  if (message.kind === "render") render(message);
  else if (message.kind === "load") void load(message.dir, message.shared);
  else if (message.kind === "cancel") worker?.cancel(message.id);
  else if (worker !== null) worker.add(message.id, message.job);
};
