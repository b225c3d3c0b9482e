// Grammars for a model's answers: compiled once each in a worker, kept, and handed out as matchers, which work on this
// thread. A worker that takes too long or dies takes with it the one grammar that it was compiling; a few may work side
// by side, so that a schema that takes long does not hold up the next.

import { CaravanError } from "../errors.ts";
import type { FromGrammarWorker, ToGrammarWorker, Vocabulary } from "./grammar-protocol.ts";
import { Automata, type InsideTokens } from "./inside-tokens.ts";
import { COMPILE_LIMIT_MS, COMPILE_PATIENCE } from "./limits.ts";
import { GrammarMatcher } from "./matcher.ts";
import type { GrammarSpec } from "./spec.ts";

/** Workers at a time, grammars that may wait for one, and grammars that are kept. */
const MOST_WORKERS = 3;
const MOST_WAITING = 64;
const MOST_KEPT = 64;
const LOAD_LIMIT_MS = 60_000;
/** Tokens of the answer that is followed when nobody has asked for one yet. */
const PREPARED_TOKENS = 100;
/** Has states that most text fits. */
const PREPARED_PATTERN: GrammarSpec = {
  type: "json_schema",
  schema: { type: "string", pattern: "^[A-Z][a-z ]*$" },
  param: "",
};
/** A worker without work for so long ends. */
const IDLE_MS = 30_000;

export interface GrammarServiceOptions {
  /** Model folder with tokenizer.json. */
  dir: string;
  /** Tokens of the engine's vocabulary. */
  vocab: number;
  compileLimitMs?: number;
  /** Worker file, for tests. */
  workerUrl?: URL;
}

interface Job {
  readonly id: number;
  readonly spec: GrammarSpec;
  readonly resolve: (automata: Automata) => void;
  readonly reject: (error: CaravanError) => void;
}

interface Hand {
  readonly worker: Worker;
  job: Job | undefined;
  timer: ReturnType<typeof setTimeout> | undefined;
  /** It has not got the vocabulary yet. */
  starting: boolean;
}

export class GrammarService {
  readonly #options: GrammarServiceOptions;
  readonly #kept = new Map<string, Promise<Automata>>();
  readonly #byId = new Map<number, Automata>();
  readonly #hands = new Set<Hand>();
  readonly #waiting: Job[] = [];
  #vocabulary: Promise<Vocabulary> | undefined;
  #strings = new Map<number, InsideTokens>();
  #nextId = 1;
  #closed = false;

  constructor(options: GrammarServiceOptions) {
    this.#options = options;
  }

  /** Process-wide count of live workers, for tests. */
  get workers(): number {
    return this.#hands.size;
  }

  /** A matcher at the start of an answer. Rejects with unsupported_parameter for what cannot be enforced (or takes too
   * long to compile), queue_full, or engine_failed. */
  async matcher(spec: GrammarSpec): Promise<GrammarMatcher> {
    const key = JSON.stringify(spec);
    const hash = `${Bun.hash(key)} ${key.length}`;
    let automata = this.#kept.get(hash);
    if (automata === undefined) {
      automata = this.#compile(spec);
      automata.catch(() => this.#kept.delete(hash));
    }
    // Behind the others: the first of the map was not used for longest.
    this.#kept.delete(hash);
    this.#kept.set(hash, automata);
    if (this.#kept.size > MOST_KEPT)
      for (const oldest of [...this.#kept.keys()].slice(0, 1)) this.#kept.delete(oldest);
    const [compiled, { table }] = await Promise.all([automata, this.#loaded()]);
    return new GrammarMatcher(compiled, table);
  }

  close(): void {
    this.#closed = true;
    for (const hand of [...this.#hands]) this.#drop(hand, shutDown());
    for (const job of this.#waiting.splice(0)) job.reject(shutDown());
  }

  async #compile(spec: GrammarSpec): Promise<Automata> {
    if (this.#waiting.length >= MOST_WAITING)
      throw new CaravanError("queue_full", `${this.#waiting.length} schemas are waiting to be compiled`, {
        retryAfterSeconds: 1,
      });
    await this.#loaded();
    if (this.#closed) throw shutDown();
    return new Promise<Automata>((resolve, reject) => {
      this.#waiting.push({ id: this.#nextId++, spec, resolve, reject });
      this.#dispatch();
    });
  }

  /** What the first request would wait for: reads the vocabulary, then follows an answer, a token a turn of the event loop, so
   * that this thread's code is compiled. A failure is told to the requests that need it. */
  async prepare(): Promise<Vocabulary> {
    const vocabulary = await this.#loaded();
    const turn = () => new Promise((resolve) => setImmediate(resolve));
    const spec: GrammarSpec = { type: "json_object", param: "" };
    let matcher = await this.matcher(spec);
    for (let i = 0; i < PREPARED_TOKENS && !this.#closed; i++) {
      await turn();
      if (!matcher.accept(anyToken(matcher.mask([]), i))) matcher = await this.matcher(spec);
    }
    const { grammar, trie } = await this.#compile(PREPARED_PATTERN);
    // Without what the worker has found.
    const automata = new Automata(grammar, trie, new Map(), 0);
    for (let state = 0; state < grammar.labels.length && !this.#closed; state++) {
      await turn();
      automata.inside(state);
    }
    return vocabulary;
  }

  /** Reads the vocabulary once; a failure is tried again by the next request. */
  #loaded(): Promise<Vocabulary> {
    this.#vocabulary ??= this.#load().catch((error: unknown) => {
      this.#vocabulary = undefined;
      throw error;
    });
    return this.#vocabulary;
  }

  #load(): Promise<Vocabulary> {
    const { promise, resolve, reject } = Promise.withResolvers<Vocabulary>();
    const hand = this.#start((message) => {
      if (message.kind === "vocabulary") {
        this.#strings = message.strings;
        this.#rest(hand);
        resolve(message.vocabulary);
      } else if (message.kind === "failed") {
        this.#drop(hand);
        reject(CaravanError.fromJSON({ ...message.error }));
      }
    });
    // Nothing else is asked of it until it is done.
    hand.job = { id: 0, spec: { type: "json_object", param: "" }, resolve: () => undefined, reject };
    this.#limit(hand, LOAD_LIMIT_MS, "reading the vocabulary took too long", "engine_failed");
    this.#post(hand, { kind: "load", dir: this.#options.dir, size: this.#options.vocab });
    return promise;
  }

  #dispatch(): void {
    while (this.#waiting.length > 0) {
      const hand = [...this.#hands].find(({ job, starting }) => job === undefined && !starting);
      if (hand === undefined) {
        const starting = [...this.#hands].filter((each) => each.starting).length;
        if (this.#hands.size < MOST_WORKERS && starting < this.#waiting.length) this.#begin();
        return;
      }
      const job = this.#waiting.shift();
      if (job === undefined) return;
      hand.job = job;
      // The worker keeps the limit where it can look at the time, and where it cannot is ended.
      const limitMs = this.#options.compileLimitMs ?? COMPILE_LIMIT_MS;
      this.#limit(
        hand,
        COMPILE_PATIENCE * limitMs,
        `the schema takes longer than ${limitMs} ms to compile`,
        "unsupported_parameter",
      );
      this.#post(hand, { kind: "compile", id: job.id, spec: job.spec, limitMs });
    }
  }

  /** Starts a worker for a vocabulary that is there; the time that it takes is not the next schema's. */
  #begin(): void {
    const hand = this.#start();
    hand.starting = true;
    this.#limit(hand, LOAD_LIMIT_MS, "the grammar worker did not start", "engine_failed");
    this.#loaded().then(
      (vocabulary) => this.#post(hand, { kind: "vocabulary", vocabulary }),
      (error: CaravanError) => this.#drop(hand, error),
    );
  }

  #start(onLoading?: (message: FromGrammarWorker) => void): Hand {
    const worker = new Worker(this.#options.workerUrl ?? workerUrl());
    const hand: Hand = { worker, job: undefined, timer: undefined, starting: false };
    this.#hands.add(hand);
    const died = (what: string): void => {
      const error = new CaravanError("engine_failed", `the grammar worker stopped: ${what}`, {
        hint: "Send the request again.",
      });
      if (this.#hands.has(hand)) this.#drop(hand, error);
      this.#dispatch();
    };
    worker.onerror = (event) => died(event.message);
    worker.addEventListener("close", () => died("it ended"));
    worker.onmessage = (event: MessageEvent<FromGrammarWorker>) => {
      const message = event.data;
      if (hand.job?.id === 0) onLoading?.(message);
      else this.#receive(hand, message);
    };
    return hand;
  }

  #receive(hand: Hand, message: FromGrammarWorker): void {
    if (message.kind === "warm") {
      this.#byId.get(message.id)?.keep(message.state, message.tokens);
      return;
    }
    if (message.kind === "ready") {
      hand.starting = false;
      this.#rest(hand);
      this.#dispatch();
      return;
    }
    if (message.kind !== "compiled" && message.kind !== "failed") return;
    const { job } = hand;
    if (job === undefined || job.id !== message.id) return;
    this.#rest(hand);
    if (message.kind === "failed") job.reject(CaravanError.fromJSON({ ...message.error }));
    else
      this.#loaded().then(
        ({ trie, stringStates }) => {
          const automata = new Automata(message.grammar, trie, this.#strings, stringStates);
          for (const { state, tokens } of message.ahead) automata.keep(state, tokens);
          this.#byId.set(job.id, automata);
          if (this.#byId.size > MOST_WORKERS)
            for (const oldest of [...this.#byId.keys()].slice(0, 1)) this.#byId.delete(oldest);
          job.resolve(automata);
        },
        (error: CaravanError) => job.reject(error),
      );
    this.#dispatch();
  }

  /** The worker has done its work; it ends if none comes. */
  #rest(hand: Hand): void {
    clearTimeout(hand.timer);
    hand.job = undefined;
    hand.timer = setTimeout(() => this.#drop(hand), IDLE_MS);
    hand.timer.unref();
  }

  #limit(hand: Hand, ms: number, message: string, code: "engine_failed" | "unsupported_parameter"): void {
    clearTimeout(hand.timer);
    hand.timer = setTimeout(() => {
      const spec = hand.job?.spec;
      const param = spec === undefined ? undefined : paramOf(spec);
      const named = param === undefined || param === "" ? message : `${param}: ${message}`;
      this.#drop(hand, new CaravanError(code, named, param === undefined || param === "" ? {} : { param }));
      this.#dispatch();
    }, ms);
  }

  #drop(hand: Hand, error?: CaravanError): void {
    clearTimeout(hand.timer);
    this.#hands.delete(hand);
    // A worker that cannot start fails the request that it was started for: the next one may have more luck.
    const job = hand.job ?? (hand.starting && error !== undefined ? this.#waiting.shift() : undefined);
    hand.job = undefined;
    hand.worker.terminate();
    if (job !== undefined && error !== undefined) job.reject(error);
  }

  #post(hand: Hand, message: ToGrammarWorker): void {
    if (this.#hands.has(hand)) hand.worker.postMessage(message);
  }
}

/** A set bit that depends on `turn`. */
function anyToken(mask: Uint32Array, turn: number): number {
  const start = Math.imul(turn, 0x9e3779b1) >>> 0;
  for (let i = 0; i < mask.length; i++) {
    const at = (start + i) % mask.length;
    const word = mask[at] as number;
    if (word !== 0) return 32 * at + (31 - Math.clz32(word & -word));
  }
  return 0;
}

function paramOf(spec: GrammarSpec): string {
  return spec.type === "tool_calls" ? "tools" : spec.param;
}

function shutDown(): CaravanError {
  return new CaravanError("shutting_down", "the model is being unloaded", { retryAfterSeconds: 5 });
}

/** As the text worker's (text-service.ts). */
function workerUrl(): URL {
  const compiled = import.meta.url.includes("/$bunfs/");
  return new URL(compiled ? "./grammar/grammar-worker.js" : "./grammar-worker.ts", import.meta.url);
}
