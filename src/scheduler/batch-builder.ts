// Turns the scheduler's decisions (which sequence advances by how many tokens) into the rows of a step.

import type { Sequence } from "./sequence.ts";
import { type PageCopy, type RowLogits, type Step, type StepRow, TOKEN_LAST } from "./step.ts";

const LAST = Uint32Array.of(TOKEN_LAST);
const NO_PAGES = new Uint32Array(0);

/** One sequence's part of a step, as decided. */
export interface PlannedRow {
  sequence: Sequence;
  /** The sequence's own when the row was planned. */
  epoch: number;
  /** First position, and tokens from there on. */
  first: number;
  count: number;
  /** The row reaches the end of what is known, so the next token is sampled. */
  sample: boolean;
  /** Guesses of the tokens behind the first one, counted in `count`: every position is sampled to check them. */
  drafts: readonly number[];
  /** Every position's logits come back, for the prompt's log-probabilities. */
  promptLogits: boolean;
  /** Tokens that the sequence's grammar allows: next, and behind each draft. */
  mask?: Uint32Array;
  /** These are given to the engine while it computes the step. */
  maskLater: boolean;
}

/** A step with what is needed to make sense of its result. */
export interface PlannedStep {
  step: Step;
  rows: PlannedRow[];
  tokens: number;
  decodeRows: number;
  /** Of the tokens, those that are drafts. */
  draftTokens: number;
}

/** Pages of all rows are held already; copies that they wait for go with the step. */
export function buildStep(rows: PlannedRow[]): PlannedStep {
  let tokens = 0;
  let decodeRows = 0;
  let draftTokens = 0;
  const built: StepRow[] = [];
  const copies: PageCopy[] = [];
  for (const row of rows) {
    tokens += row.count;
    draftTokens += row.drafts.length;
    if (row.sequence.remaining === 1) decodeRows++;
    built.push(buildRow(row));
    copies.push(...row.sequence.pages.takeCopies());
  }
  return { step: { rows: built, copies }, rows, tokens, decodeRows, draftTokens };
}

function buildRow({
  sequence,
  first,
  count,
  sample,
  drafts,
  promptLogits,
  mask,
  maskLater,
}: PlannedRow): StepRow {
  const { full, chunked } = sequence.pages;
  const { request } = sequence;
  const unread = first >= sequence.known;
  const logits: RowLogits = promptLogits || drafts.length > 0 ? "all" : sample ? "last" : "none";
  return {
    slot: sequence.slot,
    firstPosition: first,
    tokens: unread ? LAST : tokensOf(sequence, first, count, drafts),
    fullPages: full?.view() ?? NO_PAGES,
    chunkPages: chunked?.view() ?? NO_PAGES,
    chunkBase: chunked?.base ?? 0,
    logits,
    sample,
    ...(drafts.length > 0 ? { sampleAll: true } : {}),
    returnLogits: promptLogits,
    logprob: sample && request.logprobs !== undefined,
    topLogprobs: sample ? (request.logprobs ?? 0) : 0,
    sampling: request.sampling,
    bias: sequence.bias,
    history: sequence.history(),
    xtcKeep: sequence.xtcKeep,
    ...(mask === undefined ? {} : { mask }),
    ...(maskLater ? { maskLater } : {}),
  };
}

function tokensOf(sequence: Sequence, first: number, count: number, drafts: readonly number[]): Uint32Array {
  const known = sequence.tokens(first, first + count - drafts.length);
  return drafts.length === 0 ? known : Uint32Array.of(...known, ...drafts);
}
