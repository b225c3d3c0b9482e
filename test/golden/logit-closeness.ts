// How close logits are to a reference's: top tokens and Kullback-Leibler divergence, position by position.

import { logSumExp } from "../../src/scheduler/prompt-logprobs.ts";

export interface Closeness {
  rows: number;
  /** Positions with the same top token. */
  agreed: number;
  /** Positions where the reference's first token leads its second by the margin, and how many of those agree. */
  clear: number;
  clearAgreed: number;
  /** KL(reference ‖ logits) in nats. */
  meanKl: number;
  worstKl: number;
}

/** logits, reference: float32 [rows, vocab]; margin in logits. */
export function closeness(
  logits: Float32Array,
  reference: Float32Array,
  vocab: number,
  margin: number,
): Closeness {
  if (logits.length !== reference.length || reference.length % vocab !== 0)
    throw new Error(`${logits.length} logits for ${reference.length} of a vocabulary of ${vocab}`);
  const rows = reference.length / vocab;
  const out: Closeness = { rows, agreed: 0, clear: 0, clearAgreed: 0, meanKl: 0, worstKl: 0 };
  for (let r = 0; r < rows; r++) {
    const mine = logits.subarray(r * vocab, (r + 1) * vocab);
    const theirs = reference.subarray(r * vocab, (r + 1) * vocab);
    const { top, lead } = topOf(theirs);
    const same = topOf(mine).top === top;
    out.agreed += Number(same);
    if (lead > margin) {
      out.clear++;
      out.clearAgreed += Number(same);
    }
    const kl = divergence(theirs, mine);
    out.meanKl += kl / rows;
    // NaN stays.
    if (!(kl <= out.worstKl)) out.worstKl = kl;
  }
  return out;
}

/** The first largest logit's index, and its lead over the next. */
export function topOf(row: Float32Array): { top: number; lead: number } {
  let top = 0;
  let second = Number.NEGATIVE_INFINITY;
  for (let i = 1; i < row.length; i++) {
    const value = row[i] ?? Number.NaN;
    const best = row[top] ?? Number.NaN;
    if (value > best) {
      second = best;
      top = i;
    } else if (value > second) second = value;
  }
  return { top, lead: (row[top] ?? Number.NaN) - second };
}

function divergence(p: Float32Array, q: Float32Array): number {
  const [lp, lq] = [logSumExp(p), logSumExp(q)];
  return p.reduce((sum, x, i) => {
    const log = x - lp;
    return sum + Math.exp(log) * (log - ((q[i] ?? Number.NaN) - lq));
  }, 0);
}
