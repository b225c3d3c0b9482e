// Continuous batching, as a state machine without I/O: requests come in through `add` and `cancel`, `plan` decides the
// next step, `complete` and `fail` take its outcome, events go out through `emit`. Time is a function. step-loop.ts
// drives it with an engine.
//
// A step holds a decode row for every running sequence that has one, and prompt pieces within a token budget. The
// sequential policy is the same machine with one running sequence. A step may be planned while the one before it is
// in flight: a decode row then names "the token last sampled for this slot". If that token turns out to end the
// sequence, the row's result is dropped. Freed pages may be reused by later steps at once, because steps are computed
// in order (pages.ts).
//
// An engine that is a pipeline of n stages is kept busy by n steps that do not need each other's tokens: decode rows are
// spread over as many steps, each sequence waiting for its own token only, and prompts go through in pieces that follow
// each other. Behind n steps the next one of the oldest's sequences is queued already, so that its first stage
// begins as soon as the last one has sampled.

import { errorRecord } from "../engine/error-record.ts";
import type { GenerateEvent, GenerateRequest } from "../engine/protocol.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import type { GrammarMatcher } from "../grammar/matcher.ts";
import { buildStep, type PlannedRow, type PlannedStep } from "./batch-builder.ts";
import type { Drafter } from "./drafter.ts";
import { type CacheGeometry, PagePools } from "./pages.ts";
import { PrefixCache } from "./prefix-cache.ts";
import { WaitingQueue } from "./queue.ts";
import { checkRequest } from "./request-check.ts";
import { RetryEstimate } from "./retry-estimate.ts";
import { Sequence } from "./sequence.ts";
import { Speculation } from "./speculation.ts";
import type { RowResult, StepLimits, StepResult } from "./step.ts";
import { shareFairly, TokenBudget } from "./token-budget.ts";

export interface SchedulerOptions {
  geometry: CacheGeometry;
  limits: StepLimits;
  /** Longest sequence of the model, prompt and output together; the page pools may lower it. */
  contextTokens: number;
  mode: "sequential" | "batched";
  /** Requests that may wait beside those that run; more are refused with queue_full. */
  maxWaiting: number;
  /** How much longer a step with prompts may take than the running streams alone; default 1.95. */
  slowdown?: number;
  /** Whether sequences resume behind prefixes that are still in the pages; default true. */
  prefixCache?: boolean;
  /** Guesses tokens that are then checked several at a time (speculative decoding); default none. */
  drafter?: Drafter;
  /** Milliseconds, monotonic. */
  now: () => number;
  emit: (event: GenerateEvent) => void;
}

/** Prompt positions a step whose logits come back for prompt_logprobs: each costs a vocabulary of floats in JavaScript. */
export const PROMPT_LOGITS_A_STEP = 8;

/** Pieces of a prompt that a stage of a pipeline computes while another one computes the piece before it. */
const PIECES_A_STAGE = 2;
const SMALLEST_PIECE = 32;

export class Scheduler {
  readonly contextTokens: number;
  /** Stages of the engine's pipeline. */
  readonly stages: number;
  readonly pools: PagePools;
  readonly prefixes: PrefixCache;
  readonly speculation: Speculation;
  readonly #options: SchedulerOptions;
  readonly #maxRunning: number;
  readonly #budget: TokenBudget;
  readonly #retry: RetryEstimate;
  readonly #live = new Map<string, Sequence>();
  readonly #waiting = new WaitingQueue();
  /** Ordered by age. */
  readonly #running: Sequence[] = [];
  #nextOrder = 0;
  #withDeadline = 0;
  #preemptions = 0;

  constructor(options: SchedulerOptions) {
    const { limits } = options;
    this.#options = options;
    this.stages = limits.stages ?? 1;
    this.pools = new PagePools(options.geometry);
    this.prefixes = new PrefixCache(this.pools, options.prefixCache ?? true);
    this.contextTokens = Math.min(options.contextTokens, this.pools.longestSequence);
    this.speculation = new Speculation(options.drafter);
    this.#maxRunning =
      options.mode === "sequential" ? 1 : Math.min(limits.slots, limits.maxRows, limits.maxTokens);
    this.#budget = new TokenBudget({
      maxTokens: limits.maxTokens,
      slowdown: options.slowdown ?? 1.95,
      firstTargetMs: 200,
      minTokens: 2,
    });
    this.#retry = new RetryEstimate(this.#maxRunning);
  }

  get running(): number {
    return this.#running.length;
  }

  get waiting(): number {
    return this.#waiting.length;
  }

  /** Sequences put back for want of pages since the start. */
  get preemptions(): number {
    return this.#preemptions;
  }

  /** Takes a request; its refusal is an error event like every other outcome. The id must not be live (throws).
   * `grammar`: what its answer has to follow; the sequence owns it. */
  add(request: GenerateRequest, grammar?: GrammarMatcher): void {
    if (this.#live.has(request.id))
      throw new CaravanError("internal_error", `request ${request.id} is already running`);
    const refusal = this.#refusal(request);
    if (refusal !== undefined) {
      this.#options.emit({ type: "error", id: request.id, error: errorRecord(refusal) });
      return;
    }
    const sequence = new Sequence(
      request,
      this.#nextOrder,
      this.#options.now(),
      this.pools,
      this.#options.limits.vocab,
      grammar,
    );
    this.#nextOrder++;
    this.#live.set(request.id, sequence);
    if (sequence.deadlineMs !== Number.POSITIVE_INFINITY) this.#withDeadline++;
    this.#waiting.add(sequence);
    // Tells at once that the request was not refused: a reply can begin before the first token.
    this.#options.emit({ type: "progress", id: request.id, done: 0, total: sequence.promptTokens });
  }

  /** Ends a request with finish "cancelled"; unknown ids are ignored (it may just have ended). */
  cancel(id: string): void {
    const sequence = this.#live.get(id);
    if (sequence !== undefined) this.#finish(sequence, "cancelled");
  }

  /** Ends everything that lives with an error. */
  failAll(error: CaravanError): void {
    for (const sequence of [...this.#live.values()]) this.#failOne(sequence, error);
  }

  /** Ends requests whose deadline has passed; called by plan, and by a timer for when no step ends. */
  expire(): void {
    if (this.#withDeadline === 0) return;
    const now = this.#options.now();
    for (const sequence of [...this.#live.values()]) {
      if (now < sequence.deadlineMs) continue;
      const limit = sequence.request.deadline_ms ?? 0;
      const where = sequence.state === "running" ? "while it was computed" : "while it was waiting";
      this.#failOne(
        sequence,
        new CaravanError("deadline_exceeded", `the request took longer than ${limit} ms, ${where}`, {
          hint: "allow more time, or send fewer requests at once",
          retryAfterSeconds: this.#retry.seconds(this.#live.size),
        }),
      );
    }
  }

  /** Whether any live request has a deadline. */
  get hasDeadlines(): boolean {
    return this.#withDeadline > 0;
  }

  /** The next step, or undefined when there is nothing to compute. `ahead`: another step is in flight, whose sampled
   * tokens are not known; a sequence that needs them makes everybody wait for that step, so that it keeps its pace.
   * `oldest`: the oldest step in flight of a pipeline whose stages all have one; its sequences go on, or nothing is planned. */
  plan(ahead: boolean, oldest?: PlannedStep): PlannedStep | undefined {
    this.expire();
    const waits = (s: Sequence) => s.pending > 0 && this.#continues(s) && this.#waitsForToken(s);
    if (ahead && this.stages === 1 && this.#running.some(waits)) return undefined;
    this.#admit();
    if (oldest !== undefined && !this.#goOn(oldest)) return undefined;
    for (const sequence of this.#running)
      sequence.pages.dropFinishedChunks(
        sequence.computed - sequence.drafting,
        this.prefixes.keepFrom(sequence),
      );
    const rows: PlannedRow[] = [];
    this.#planDecode(rows, oldest);
    this.#planPrompts(rows);
    this.#maskRows(rows);
    if (rows.length === 0) return undefined;
    const planned = buildStep(rows);
    const now = this.#options.now();
    for (const { sequence, first, count, sample, drafts } of rows) {
      if (Number.isNaN(sequence.startedMs)) {
        sequence.startedMs = now;
        sequence.cachedTokens = first;
        this.prefixes.started(sequence);
      }
      sequence.computed += count;
      sequence.drafting = drafts.length;
      if (sample) sequence.pending++;
    }
    return planned;
  }

  /** Gives the masks that rows of a step wait for; every earlier step has been completed. A grammar that fails ends its own
   * sequence; what a sequence that has ended samples does not matter. */
  giveMasks(planned: PlannedStep, give: (row: number, masks: Uint32Array | undefined) => void): void {
    for (const [i, { sequence, drafts, maskLater }] of planned.rows.entries()) {
      if (!maskLater) continue;
      let masks: Uint32Array | undefined;
      try {
        if (sequence.state !== "done") masks = sequence.grammar?.masks(sequence.stopTokens, drafts);
      } catch (thrown) {
        this.#failOne(sequence, asCaravanError(thrown));
      }
      give(i, masks);
    }
  }

  /** Takes the result of the oldest planned step that has not been completed. */
  complete(planned: PlannedStep, result: StepResult): void {
    if (result.rows.length !== planned.rows.length)
      throw new CaravanError(
        "engine_failed",
        `a step of ${planned.rows.length} rows gave ${result.rows.length} results`,
      );
    this.#observe(planned, result.computeNs);
    for (let i = 0; i < planned.rows.length; i++) {
      const row = planned.rows[i];
      const outcome = result.rows[i];
      if (row === undefined || outcome === undefined || row.sequence.state === "done") continue;
      if (outcome.failure === undefined) this.#accept(row, outcome);
      else this.#failOne(row.sequence, outcome.failure);
    }
  }

  #observe({ tokens, decodeRows, draftTokens }: PlannedStep, computeNs: number): void {
    if (draftTokens === 0) {
      this.#budget.observe(decodeRows, tokens - decodeRows, computeNs);
      return;
    }
    this.#budget.skipped();
    const streamsMs = this.#budget.streamsMs(decodeRows);
    if (streamsMs !== undefined) this.speculation.observe(draftTokens, computeNs / 1e6, streamsMs);
  }

  /** A step that gave nothing: its sequences end with the error. */
  fail(planned: PlannedStep, error: CaravanError): void {
    for (const { sequence } of planned.rows) if (sequence.state !== "done") this.#failOne(sequence, error);
  }

  #refusal(request: GenerateRequest): CaravanError | undefined {
    const wrong = checkRequest(request, {
      vocab: this.#options.limits.vocab,
      contextTokens: this.contextTokens,
    });
    if (wrong !== undefined) return wrong;
    const room = this.#options.maxWaiting + this.#maxRunning - this.#running.length;
    if (this.#waiting.length < room) return undefined;
    return new CaravanError("queue_full", `${this.#waiting.length} requests are waiting already`, {
      hint: "try again later",
      retryAfterSeconds: this.#retry.seconds(this.#waiting.length),
    });
  }

  /** Moves waiting sequences, oldest first, into free slots while their prompts' pages can be promised. */
  #admit(): void {
    while (this.#running.length < this.#maxRunning) {
      const next = this.#waiting.first();
      // A sequence that was put back waits for the token that is still in flight.
      if (next === undefined || next.pending > 0) return;
      this.prefixes.attach(next);
      if (!this.#roomFor(next)) {
        this.prefixes.detach(next);
        return;
      }
      this.#waiting.remove(next);
      next.leader = this.#leaderOf(next);
      next.state = "running";
      next.slot = this.#freeSlot();
      let place = this.#running.length;
      while (place > 0 && (this.#running[place - 1]?.order ?? -1) > next.order) place--;
      this.#running.splice(place, 0, next);
    }
  }

  /** The running sequence that is computing the longest beginning of `next` that has not been found, by whole pages. */
  #leaderOf(next: Sequence): Sequence["leader"] {
    if (!this.prefixes.enabled || next.promptLogprobs?.complete === false) return undefined;
    const { pageTokens } = this.#options.geometry;
    let best: Sequence["leader"];
    for (const sequence of this.#running) {
      if (sequence === next || sequence.leader !== undefined || sequence.remaining <= 1) continue;
      const common = commonTokens(sequence, next, next.known - 1);
      const until = common - (common % pageTokens);
      if (until <= Math.max(next.computed, sequence.settled, best?.until ?? 0)) continue;
      best = { sequence, epoch: sequence.epoch, until };
    }
    return best;
  }

  /** Whether a sequence waits for another one's pages; takes them over when they are there. */
  #follows(sequence: Sequence): boolean {
    const { leader } = sequence;
    if (leader === undefined) return false;
    const working = leader.sequence.state === "running" && leader.sequence.epoch === leader.epoch;
    if (working && leader.sequence.settled < leader.until) return true;
    sequence.leader = undefined;
    this.prefixes.attach(sequence);
    return false;
  }

  /** Whether the pools hold what the running sequences' prompts still need, a page of growth for each that will grow,
   * and `next`. */
  #roomFor(next: Sequence): boolean {
    if (this.#running.length === 0) return true;
    let full = this.pools.full.available;
    let chunked = this.pools.chunked.available;
    const { pageTokens } = this.#options.geometry;
    for (const sequence of [...this.#running, next]) {
      const growth = sequence === next ? 0 : pageTokens;
      const demand = this.pools.demand(Math.min(sequence.total + 1 + growth, this.#finalLength(sequence)));
      full -= Math.max(0, demand.full - (sequence.pages.full?.count ?? 0));
      chunked -= Math.max(0, demand.chunked - (sequence.pages.chunked?.count ?? 0));
    }
    return full >= 0 && chunked >= 0;
  }

  /** Most tokens that a sequence can have at its end. */
  #finalLength(sequence: Sequence): number {
    return Math.min(sequence.promptTokens + sequence.request.max_tokens, this.contextTokens);
  }

  #freeSlot(): number {
    let slot = 0;
    while (this.#running.some((sequence) => sequence.slot === slot)) slot++;
    return slot;
  }

  /** Whether another token may be sampled behind the ones known and in flight. */
  #continues(sequence: Sequence): boolean {
    return sequence.total < this.#finalLength(sequence);
  }

  /** Whether a sequence's next row needs the token that is in flight. */
  #waitsForToken(sequence: Sequence): boolean {
    return sequence.needsLastToken || this.speculation.wants(sequence);
  }

  /** Whether the sequences of a pipeline's step in flight can be queued again before it ends. Prompts and sequences that wait for its tokens
   * are planned when it has ended, so that they find their place in as many steps as stages. */
  #goOn({ rows }: PlannedStep): boolean {
    if (this.#running.some((sequence) => sequence.remaining > 1)) return false;
    const going = rows.filter(
      ({ sequence, sample }) => sample && sequence.state === "running" && this.#continues(sequence),
    );
    return (
      going.length > 0 &&
      going.every(({ sequence }) => sequence.grammar === undefined && !this.#waitsForToken(sequence))
    );
  }

  /** One row for each running sequence that is one token short of sampling, with drafts where they pay. */
  #planDecode(rows: PlannedRow[], oldest: PlannedStep | undefined): void {
    const open = this.#openStreams(oldest);
    let spare = this.#spareForDrafts();
    for (const [i, sequence] of open.entries()) {
      if (sequence.state !== "running" || !this.#secure(sequence, 1, rows)) continue;
      const drafts = this.#draft(sequence, open.length, Math.ceil(spare / (open.length - i)));
      spare -= drafts.length;
      rows.push(planRow(sequence, 1 + drafts.length, true, false, drafts));
    }
  }

  /** Sequences that get a decode row. In a pipeline: of those whose token is known, or will be when the oldest step in flight
   * has ended, so many that the others suffice for the steps of the other stages. */
  #openStreams(oldest: PlannedStep | undefined): Sequence[] {
    const streams = this.#running.filter((s) => s.remaining === 1 && this.#continues(s));
    if (this.stages === 1) return streams;
    const next = streams.filter((s) => s.pending === 0);
    for (const { sequence, sample } of oldest?.rows ?? [])
      if (sample && sequence.pending === 1 && streams.includes(sequence)) next.push(sequence);
    return next.slice(0, Math.ceil(streams.length / this.stages));
  }

  /** What the grammars of rows that sample allow: made while the step is computed, but for a pipeline, whose last stage is
   * elsewhere. A grammar that fails ends its own sequence. */
  #maskRows(rows: PlannedRow[]): void {
    for (const row of [...rows]) {
      const { grammar, stopTokens } = row.sequence;
      if (grammar === undefined || !row.sample) continue;
      row.maskLater = this.stages === 1;
      if (row.maskLater) continue;
      try {
        row.mask = grammar.masks(stopTokens, row.drafts);
      } catch (thrown) {
        rows.splice(rows.indexOf(row), 1);
        this.#failOne(row.sequence, asCaravanError(thrown));
      }
    }
  }

  /** Tokens with logits that a step may carry beside a decode row of each running sequence. None beside prompts: those
   * need the arithmetic more, and the streams should not be slowed twice. */
  #spareForDrafts(): number {
    const { maxLogits, maxTokens } = this.#options.limits;
    if (!this.speculation.enabled || this.#running.some((sequence) => sequence.remaining > 1)) return 0;
    return Math.max(0, Math.min(maxLogits, maxTokens) - this.#running.length);
  }

  /** Guesses behind a decode row whose page is held, and pages for them as far as there are some. */
  #draft(sequence: Sequence, rows: number, most: number): readonly number[] {
    if (most < 1 || sequence.pending > 0) return [];
    const room = this.#finalLength(sequence) - sequence.total - 1;
    const stepMs = this.#budget.streamsMs(rows);
    const guesses = this.speculation.draft(sequence, Math.min(most, room), rows, stepMs);
    const drafts = fittingDrafts(sequence, guesses);
    if (drafts.length < guesses.length) this.speculation.forbidden(sequence);
    if (drafts.length === 0) return drafts;
    const count = sequence.pages.fitting(sequence.computed, 1 + drafts.length);
    sequence.pages.extend(sequence.computed + count);
    return drafts.slice(0, count - 1);
  }

  /** Pieces of prompts, the budget shared fairly, the oldest first to take pages. */
  #planPrompts(rows: PlannedRow[]): void {
    const open = this.#running.filter((sequence) => sequence.remaining > 1 && !this.#follows(sequence));
    if (open.length === 0) return;
    let logitsLeft = Math.min(
      PROMPT_LOGITS_A_STEP,
      this.#options.limits.maxLogits - this.#running.length + 1,
    );
    const decoding = rows.length;
    const wants = open.map((sequence) => sequence.remaining);
    const shares = shareFairly(wants, Math.min(this.#budget.promptTokens(decoding), this.#largestPiece()));
    for (let i = 0; i < open.length; i++) {
      const sequence = open[i];
      if (sequence === undefined || sequence.state !== "running") continue;
      const first = sequence.computed;
      let count = shares[i] ?? 0;
      const promptLogits = wantsPromptLogits(sequence);
      if (promptLogits) count = Math.min(count, logitsLeft);
      else if (sequence.promptLogprobs?.complete === false)
        count = Math.min(count, sequence.promptLogprobs.known - 1 - first);
      if (count === 0 || !this.#secure(sequence, 1, rows)) continue;
      count = sequence.pages.fitting(first, count);
      sequence.pages.extend(first + count);
      if (promptLogits) logitsLeft -= count;
      rows.push(planRow(sequence, count, count === sequence.remaining, promptLogits));
    }
  }

  /** Most prompt tokens of a step, all sequences together. */
  #largestPiece(): number {
    const { maxTokens } = this.#options.limits;
    if (this.stages === 1) return maxTokens;
    return Math.max(SMALLEST_PIECE, Math.floor(maxTokens / (PIECES_A_STAGE * this.stages)));
  }

  /** Holds pages for the next `count` positions. When the pools are empty, the youngest sequence is put back, but none
   * older than the one that asks: so the oldest always advances. False = it has to wait. */
  #secure(sequence: Sequence, count: number, rows: PlannedRow[]): boolean {
    while (sequence.pages.fitting(sequence.computed, count) < count) {
      // Pages that the step in flight is done with come back when it ends.
      if (this.#running.some((s) => s.pages.retired > 0)) return false;
      const victim = this.#running.findLast((s) => s.order > sequence.order && holdsPages(s));
      if (victim === undefined) return false;
      this.#putBack(victim);
      const place = rows.findIndex((row) => row.sequence === victim);
      if (place >= 0) rows.splice(place, 1);
    }
    sequence.pages.extend(sequence.computed + count);
    return true;
  }

  /** Back to the queue; everything known is computed again later. */
  #putBack(sequence: Sequence): void {
    this.#leave(sequence);
    sequence.state = "waiting";
    this.#preemptions++;
    this.#waiting.add(sequence);
  }

  #accept(row: PlannedRow, outcome: RowResult): void {
    const { sequence, first, count, sample, promptLogits } = row;
    if (promptLogits && outcome.logits !== undefined && sequence.promptLogprobs !== undefined) {
      const prompt = sequence.tokens(0, sequence.promptTokens);
      sequence.promptLogprobs.accept(prompt, first, outcome.logits, this.#options.limits.vocab);
    }
    const done = Math.min(first + count, sequence.promptTokens);
    if (sequence.reported < done) {
      sequence.reported = done;
      this.#options.emit({ type: "progress", id: sequence.id, done, total: sequence.promptTokens });
    }
    if (row.drafts.length > 0) {
      this.#acceptDrafts(row, outcome);
      return;
    }
    if (row.epoch === sequence.epoch) {
      sequence.settled = first + count;
      this.prefixes.publish(sequence);
    }
    if (!sample) return;
    sequence.pending--;
    this.speculation.passed(sequence);
    this.#acceptToken(sequence, outcome);
  }

  /** Takes samples as long as the drafts in front of them were right: what would have been sampled one by one. */
  #acceptDrafts({ sequence, epoch, first, drafts }: PlannedRow, { top: samples }: RowResult): void {
    let right = 0;
    while (right < drafts.length && samples[right]?.[0] === drafts[right]) right++;
    this.speculation.accepted(sequence, drafts.length, right);
    sequence.pending--;
    const same = (): boolean => sequence.state === "running" && epoch === sequence.epoch;
    if (same()) {
      // Positions of wrong drafts are written again.
      sequence.computed = first + 1 + right;
      sequence.drafting = 0;
    }
    for (const [token, logprob] of samples.slice(0, right + 1)) {
      this.#acceptToken(sequence, { token, logprob, top: [], logits: undefined });
      if (sequence.state === "done") return;
    }
    if (!same()) return;
    sequence.settled = first + 1 + right;
    this.prefixes.publish(sequence);
  }

  #acceptToken(sequence: Sequence, outcome: RowResult): void {
    const { emit, now } = this.#options;
    const { request } = sequence;
    if (sequence.promptLogprobs?.complete === true && !sequence.promptLogprobsSent) {
      const { logprobs, top } = sequence.promptLogprobs;
      sequence.promptLogprobsSent = true;
      emit({ type: "prompt_logprobs", id: sequence.id, logprobs, top });
    }
    const { token } = outcome;
    sequence.append(token);
    sequence.lastTokenMs = now();
    if (Number.isNaN(sequence.firstTokenMs)) sequence.firstTokenMs = sequence.lastTokenMs;
    const end = sequence.stopTokens.has(token);
    const event: GenerateEvent = { type: "token", id: sequence.id, token };
    if (end) event.end = true;
    if (request.logprobs !== undefined) {
      event.logprob = outcome.logprob;
      event.top = outcome.top;
    }
    emit(event);
    const misfit = end ? undefined : followGrammar(sequence, token);
    if (misfit !== undefined) this.#failOne(sequence, misfit);
    else if (end || sequence.grammar?.complete === true) this.#finish(sequence, "stop");
    else if (sequence.generated >= request.max_tokens || sequence.known >= this.contextTokens)
      this.#finish(sequence, "length");
  }

  #finish(sequence: Sequence, reason: "stop" | "length" | "cancelled"): void {
    if (sequence.state === "running") this.prefixes.ended(sequence);
    this.#end(sequence);
    const now = this.#options.now();
    const started = Number.isNaN(sequence.startedMs) ? now : sequence.startedMs;
    const firstToken = Number.isNaN(sequence.firstTokenMs) ? now : sequence.firstTokenMs;
    const lastToken = Number.isNaN(sequence.lastTokenMs) ? firstToken : sequence.lastTokenMs;
    if (reason !== "cancelled") this.#retry.observe(now - started);
    this.#options.emit({
      type: "finish",
      id: sequence.id,
      reason,
      usage: {
        prompt_tokens: sequence.promptTokens,
        completion_tokens: sequence.generated,
        cached_tokens: sequence.cachedTokens,
      },
      timing: {
        queue_ms: started - sequence.arrivedMs,
        prefill_ms: firstToken - started,
        decode_ms: lastToken - firstToken,
      },
    });
  }

  #failOne(sequence: Sequence, error: CaravanError): void {
    this.#end(sequence);
    this.#options.emit({ type: "error", id: sequence.id, error: errorRecord(error) });
  }

  /** Out of every list, pages given back. Rows still in flight are dropped when their result arrives. */
  #end(sequence: Sequence): void {
    if (sequence.state === "running") this.#leave(sequence);
    else this.#waiting.remove(sequence);
    sequence.state = "done";
    this.#live.delete(sequence.id);
    this.speculation.end(sequence);
    if (sequence.deadlineMs !== Number.POSITIVE_INFINITY) this.#withDeadline--;
  }

  #leave(sequence: Sequence): void {
    this.#running.splice(this.#running.indexOf(sequence), 1);
    this.prefixes.detach(sequence);
    sequence.leader = undefined;
    sequence.slot = -1;
  }
}

/** The position that comes next predicts a prompt token whose log-probability is asked for and missing. */
function wantsPromptLogits(sequence: Sequence): boolean {
  const { promptLogprobs } = sequence;
  return (
    promptLogprobs !== undefined && !promptLogprobs.complete && sequence.computed + 1 >= promptLogprobs.known
  );
}

/** Tells the sequence's grammar of its new token; the error when that has no place for it. */
function followGrammar({ grammar }: Sequence, token: number): CaravanError | undefined {
  if (grammar === undefined) return undefined;
  try {
    if (grammar.accept(token)) return undefined;
    return new CaravanError("internal_error", `token ${token} was sampled although the grammar forbids it`);
  } catch (thrown) {
    return asCaravanError(thrown);
  }
}

function planRow(
  sequence: Sequence,
  count: number,
  sample: boolean,
  promptLogits: boolean,
  drafts: readonly number[] = [],
): PlannedRow {
  const { epoch, computed: first } = sequence;
  return { sequence, epoch, first, count, sample, drafts, promptLogits, maskLater: false };
}

/** Length of the common beginning of two sequences' known tokens, up to `most`. */
function commonTokens(a: Sequence, b: Sequence, most: number): number {
  const end = Math.min(a.known, b.known, most);
  const one = a.tokens(0, end);
  const other = b.tokens(0, end);
  let count = 0;
  while (count < end && one[count] === other[count]) count++;
  return count;
}

function holdsPages(sequence: Sequence): boolean {
  return (sequence.pages.full?.count ?? 0) + (sequence.pages.chunked?.count ?? 0) > 0;
}

/** Looking ahead fails nobody: what the grammar cannot judge is not drafted. */
function fittingDrafts({ grammar }: Sequence, guesses: readonly number[]): readonly number[] {
  if (grammar === undefined || guesses.length === 0) return guesses;
  try {
    return grammar.fitting(guesses);
  } catch {
    return [];
  }
}
