// Turns the scheduler's decisions (which sequence advances by how many tokens) into the rows of a step.

import type { Sequence } from "./sequence.ts";
import { type RowLogits, type Step, type StepRow, TOKEN_LAST } from "./step.ts";

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
  /** Every position's logits come back, for the prompt's log-probabilities. */
  promptLogits: boolean;
}

/** A step with what is needed to make sense of its result. */
export interface PlannedStep {
  step: Step;
  rows: PlannedRow[];
  tokens: number;
  decodeRows: number;
}

/** Pages of all rows are held already. */
export function buildStep(rows: PlannedRow[]): PlannedStep {
  let tokens = 0;
  let decodeRows = 0;
  const built: StepRow[] = [];
  for (const row of rows) {
    tokens += row.count;
    if (row.sequence.remaining === 1) decodeRows++;
    built.push(buildRow(row));
  }
  return { step: { rows: built, copies: [] }, rows, tokens, decodeRows };
}

function buildRow({ sequence, first, count, sample, promptLogits }: PlannedRow): StepRow {
  const { full, chunked } = sequence.pages;
  const { request } = sequence;
  const unread = first >= sequence.known;
  const logits: RowLogits = promptLogits ? "all" : sample ? "last" : "none";
  return {
    slot: sequence.slot,
    firstPosition: first,
    tokens: unread ? LAST : sequence.tokens(first, first + count),
    fullPages: full?.view() ?? NO_PAGES,
    chunkPages: chunked?.view() ?? NO_PAGES,
    chunkBase: chunked?.base ?? 0,
    logits,
    sample,
    returnLogits: promptLogits,
    logprob: sample && request.logprobs !== undefined,
    topLogprobs: sample ? (request.logprobs ?? 0) : 0,
    sampling: request.sampling,
    bias: sequence.bias,
    history: sequence.history(),
    xtcKeep: sequence.xtcKeep,
  };
}
