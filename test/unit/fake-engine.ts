// A StepEngine with a toy model whose cache lives in real pages, so that every mistake in page tables, positions or
// order of steps changes the tokens that come out. The next token is a hash of what full attention sees (positions
// 0..t), of what chunked attention sees (the chunk up to t) and of the sampling inputs.

import type { Sampling } from "../../src/engine/protocol.ts";
import { CaravanError } from "../../src/errors.ts";
import type { CacheGeometry } from "../../src/scheduler/pages.ts";
import {
  type PageCopy,
  type RowResult,
  type Step,
  type StepEngine,
  type StepLimits,
  type StepResult,
  type StepRow,
  TOKEN_LAST,
} from "../../src/scheduler/step.ts";

export interface FakeModel {
  geometry: CacheGeometry;
  limits: StepLimits;
}

/** A step as the engine saw it, for assertions. */
export interface SeenStep {
  rows: { slot: number; first: number; count: number; last: boolean; sample: boolean }[];
}

interface Queued {
  /** Rows with their own copies of everything, as cv_submit makes them. */
  rows: StepRow[];
  copies: PageCopy[];
  /** Rows whose masks have not come. */
  missing: Set<number>;
  step: Step;
  resolve: (result: StepResult) => void;
  reject: (error: unknown) => void;
}

const MULTIPLIER = 0x9e3779b1;

function mix(hash: number, value: number): number {
  let h = Math.imul(hash ^ value, MULTIPLIER);
  h ^= h >>> 15;
  return Math.imul(h, 0x85ebca6b) >>> 0;
}

export class FakeEngine implements StepEngine {
  readonly seen: SeenStep[] = [];
  /** Nanoseconds that a step pretends to take, by its tokens. */
  computeNs: (tokens: number) => number = (tokens) => 1_000_000 + tokens * 10_000;
  /** Fails the step with this number (from 0) with this error. */
  failures = new Map<number, CaravanError>();
  /** Rows that fail alone, with this error; their slots have no token then. */
  failingRow: (row: StepRow) => CaravanError | undefined = () => undefined;
  /** A failing step also ends the engine. */
  dies = false;
  failed: CaravanError | undefined;
  mostInFlight = 0;
  /** Pages copied so far. */
  readonly copies = { full: 0, chunked: 0 };
  readonly #model: FakeModel;
  readonly #full: Int32Array;
  readonly #chunked: Int32Array;
  readonly #slots: Int32Array;
  /** Slots whose last row failed. */
  readonly #lost = new Set<number>();
  readonly #queue: Queued[] = [];
  #executed = 0;

  constructor(model: FakeModel) {
    const { geometry } = model;
    this.#model = model;
    this.#full = new Int32Array(geometry.fullPages * geometry.pageTokens).fill(-1);
    this.#chunked = new Int32Array(geometry.chunkPages * geometry.pageTokens).fill(-1);
    this.#slots = new Int32Array(model.limits.slots).fill(-1);
  }

  get queued(): number {
    return this.#queue.length;
  }

  submit(step: Step): Promise<StepResult> {
    const { limits } = this.#model;
    const tokens = step.rows.reduce((sum, row) => sum + row.tokens.length, 0);
    const logits = step.rows.reduce(
      (sum, row) => sum + (row.logits === "all" ? row.tokens.length : row.logits === "last" ? 1 : 0),
      0,
    );
    if (step.rows.length === 0 || step.rows.length > limits.maxRows)
      throw new Error(`${step.rows.length} rows`);
    if (tokens > limits.maxTokens) throw new Error(`${tokens} tokens in a step`);
    if (logits > limits.maxLogits) throw new Error(`${logits} logits in a step`);
    if (new Set(step.rows.map((row) => row.slot)).size !== step.rows.length) throw new Error("a slot twice");
    this.seen.push({
      rows: step.rows.map((row) => ({
        slot: row.slot,
        first: row.firstPosition,
        count: row.tokens.length,
        last: row.tokens[0] === TOKEN_LAST,
        sample: row.sample,
      })),
    });
    const rows = step.rows.map((row) => ({
      ...row,
      tokens: row.tokens.slice(),
      fullPages: row.fullPages.slice(),
      chunkPages: row.chunkPages.slice(),
      history: row.history.slice(),
    }));
    return new Promise((resolve, reject) => {
      const missing = new Set(rows.flatMap(({ maskLater }, i) => (maskLater === true ? [i] : [])));
      this.#queue.push({ rows, copies: step.copies, missing, step, resolve, reject });
      this.mostInFlight = Math.max(this.mostInFlight, this.#queue.length);
    });
  }

  giveMasks(step: Step, row: number): void {
    const queued = this.#queue.find((each) => each.step === step);
    if (queued !== undefined && !queued.missing.delete(row)) throw new Error(`row ${row} waits for no masks`);
  }

  /** Computes the oldest step; false when there is none, or when it waits for masks. */
  run(): boolean {
    if ((this.#queue[0]?.missing.size ?? 0) > 0) return false;
    const next = this.#queue.shift();
    if (next === undefined) return false;
    const failure = this.failures.get(this.#executed);
    this.#executed++;
    if (failure !== undefined) {
      if (this.dies) this.failed = failure;
      next.reject(failure);
      return true;
    }
    try {
      next.resolve(this.#compute(next));
    } catch (error) {
      next.reject(error);
    }
    return true;
  }

  /** Like the real engine: pages are copied, all rows store their new tokens, then all rows attend. */
  #compute({ rows, copies }: Queued): StepResult {
    const { pageTokens } = this.#model.geometry;
    for (const { pool, from, to } of copies) {
      this.copies[pool]++;
      const memory = pool === "full" ? this.#full : this.#chunked;
      memory.copyWithin(to * pageTokens, from * pageTokens, (from + 1) * pageTokens);
    }
    const written = new Set<string>();
    for (const row of rows) this.#store(row, written);
    let tokens = 0;
    const results: RowResult[] = [];
    for (const row of rows) {
      tokens += row.tokens.length;
      results.push(this.#fail(row) ?? this.#attend(row));
    }
    return { rows: results, computeNs: this.computeNs(tokens), queuedNs: 0 };
  }

  /** The result of a row that fails, or that needs the token of one that did. */
  #fail(row: StepRow): RowResult | undefined {
    const lost = row.tokens[0] === TOKEN_LAST && this.#lost.has(row.slot);
    const failure = lost ? new CaravanError("engine_failed", "the token is missing") : this.failingRow(row);
    if (failure === undefined) {
      if (row.sample) this.#lost.delete(row.slot);
      return undefined;
    }
    this.#lost.add(row.slot);
    return { failure, token: TOKEN_LAST, logprob: 0, top: [], logits: undefined };
  }

  #store(row: StepRow, written: Set<string>): void {
    const { pageTokens, chunk } = this.#model.geometry;
    if (this.#chunked.length > 0 && row.chunkBase !== row.firstPosition - (row.firstPosition % chunk))
      throw new Error(`chunk base ${row.chunkBase} for position ${row.firstPosition}`);
    for (let i = 0; i < row.tokens.length; i++) {
      const position = row.firstPosition + i;
      const given = row.tokens[i] ?? 0;
      const last = this.#lost.has(row.slot) ? 0 : (this.#slots[row.slot] ?? -1);
      const token = given === TOKEN_LAST ? last : given;
      if (token < 0) throw new Error("the slot has sampled nothing yet");
      const places: [string, Int32Array, Uint32Array, number][] = [];
      if (this.#full.length > 0) places.push(["full", this.#full, row.fullPages, position]);
      if (this.#chunked.length > 0)
        places.push(["chunked", this.#chunked, row.chunkPages, position - row.chunkBase]);
      for (const [kind, memory, pages, offset] of places) {
        const page = pages[Math.floor(offset / pageTokens)];
        if (page === undefined) throw new Error(`no ${kind} page for position ${position}`);
        const cell = page * pageTokens + (offset % pageTokens);
        if (written.has(`${kind}${cell}`)) throw new Error(`two rows write ${kind} page ${page}`);
        written.add(`${kind}${cell}`);
        memory[cell] = token;
      }
    }
  }

  #attend(row: StepRow): RowResult {
    const { vocab } = this.#model.limits;
    const end = row.firstPosition + row.tokens.length;
    const logits = row.returnLogits ? new Float32Array(row.tokens.length * vocab) : undefined;
    if (logits !== undefined)
      for (let i = 0; i < row.tokens.length; i++)
        logits.set(fakeLogits(this.#contextHash(row, row.firstPosition + i), vocab), i * vocab);
    if (!row.sample) return { token: TOKEN_LAST, logprob: 0, top: [], logits };
    const sampleBehind = (position: number): number =>
      sampleFake(this.#contextHash(row, position), row.sampling, position + 1, row.history, row.bias, vocab);
    const logprob = (token: number): number => (row.logprob ? -token / vocab : 0);
    const token = sampleBehind(end - 1);
    this.#slots[row.slot] = token;
    if (!row.sampleAll) return { token, logprob: logprob(token), top: [], logits };
    if (row.logits !== "all" || row.history.length > 0 || row.topLogprobs > 0) throw new Error("drafts");
    const samples = Array.from(row.tokens, (_, i) => sampleBehind(row.firstPosition + i));
    const top = samples.map((sample): [number, number] => [sample, logprob(sample)]);
    return { token, logprob: logprob(token), top, logits };
  }

  /** Reads everything that a query at `position` attends to, through the page tables. */
  #contextHash(row: StepRow, position: number): number {
    const { pageTokens, chunk } = this.#model.geometry;
    const read = (memory: Int32Array, pages: Uint32Array, offset: number): number =>
      memory[(pages[Math.floor(offset / pageTokens)] ?? 0) * pageTokens + (offset % pageTokens)] ?? -1;
    let hash = 1;
    if (this.#full.length > 0)
      for (let t = 0; t <= position; t++) hash = mix(hash, read(this.#full, row.fullPages, t));
    if (this.#chunked.length > 0)
      for (let t = position - (position % chunk); t <= position; t++)
        hash = mix(hash, read(this.#chunked, row.chunkPages, t - row.chunkBase));
    return hash;
  }
}

function fakeLogits(hash: number, vocab: number): Float32Array {
  return Float32Array.from({ length: vocab }, (_, token) => (mix(hash, token) % 1000) / 100);
}

function sampleFake(
  context: number,
  sampling: Sampling,
  position: number,
  history: Uint32Array,
  bias: readonly (readonly [number, number])[],
  vocab: number,
): number {
  let hash = context;
  if (sampling.temperature > 0) hash = mix(mix(hash, sampling.seed), position);
  for (const value of history) hash = mix(hash, value);
  const banned = new Set(
    bias.filter(([, value]) => value === Number.NEGATIVE_INFINITY).map(([token]) => token),
  );
  let token = hash % vocab;
  while (banned.has(token)) token = (token + 1) % vocab;
  return token;
}

/** What the toy model generates for a request when nothing else exists: no pages, no batches, no steps. */
export function generateAlone(
  model: FakeModel,
  request: {
    tokens: number[];
    max_tokens: number;
    stop_tokens: number[];
    ban_stop_tokens?: boolean;
    sampling: Sampling;
  },
  contextTokens: number,
): { tokens: number[]; reason: "stop" | "length" } {
  const { geometry, limits } = model;
  const tokens = [...request.tokens];
  const generated: number[] = [];
  const { sampling } = request;
  const penalties =
    sampling.repetition_penalty !== 1 || sampling.presence_penalty !== 0 || sampling.frequency_penalty !== 0;
  const bias: [number, number][] = request.ban_stop_tokens
    ? request.stop_tokens.map((token) => [token, Number.NEGATIVE_INFINITY])
    : [];
  for (;;) {
    let hash = 1;
    const position = tokens.length - 1;
    if (geometry.fullPages > 0) for (const token of tokens) hash = mix(hash, token);
    if (geometry.chunkPages > 0)
      for (const token of tokens.slice(position - (position % geometry.chunk))) hash = mix(hash, token);
    const history: number[] = [];
    if (penalties) {
      const counts = new Map<number, [number, number]>();
      const count = (token: number, output: number): void => {
        const entry = counts.get(token) ?? [0, 0];
        counts.set(token, [entry[0] + output, entry[1] + 1]);
      };
      if (sampling.repetition_penalty !== 1) for (const token of request.tokens) count(token, 0);
      for (const token of generated) count(token, 1);
      for (const [token, [inOutput, inContext]] of counts) history.push(token, inOutput, inContext);
    }
    const next = sampleFake(hash, sampling, tokens.length, Uint32Array.from(history), bias, limits.vocab);
    tokens.push(next);
    generated.push(next);
    if (request.ban_stop_tokens !== true && request.stop_tokens.includes(next))
      return { tokens: generated, reason: "stop" };
    if (generated.length >= request.max_tokens || tokens.length >= contextTokens)
      return { tokens: generated, reason: "length" };
  }
}

/** Log-probabilities of a prompt's tokens under the toy model. */
export function promptLogprobsAlone(model: FakeModel, prompt: number[]): (number | null)[] {
  const { geometry, limits } = model;
  return prompt.map((token, index) => {
    if (index === 0) return null;
    const seen = prompt.slice(0, index);
    let hash = 1;
    if (geometry.fullPages > 0) for (const t of seen) hash = mix(hash, t);
    const position = index - 1;
    if (geometry.chunkPages > 0)
      for (const t of seen.slice(position - (position % geometry.chunk))) hash = mix(hash, t);
    const logits = fakeLogits(hash, limits.vocab);
    const sum = logits.reduce((total, value) => total + Math.exp(value), 0);
    return (logits[token] ?? 0) - Math.log(sum);
  });
}

/** Lets everything that is already settled run. */
export function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
