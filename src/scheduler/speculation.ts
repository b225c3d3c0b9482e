// Decides how many drafted tokens a decode row carries. A drafted token is worth its chance to be accepted times what a
// token costs in the present batch, and costs what one more row adds to a step; both are measured. So drafts grow where
// they are accepted, and stop by themselves where they are not, or where a full batch has no arithmetic to spare.

import type { Drafter } from "./drafter.ts";
import type { Sequence } from "./sequence.ts";

/** Most drafted tokens of a row. */
export const LONGEST_DRAFT = 8;
/** While nothing is known about cost. */
const FIRST_DRAFT = 3;
/** Weight of the newest outcome in a sequence's chance of acceptance, and the chance that a new one starts with. */
const NEWEST = 0.12;
const FIRST_CHANCE = 0.6;
/** While nothing is known about cost, drafting ends below this chance: a grammar may forbid every guess, so that none is measured. */
const LEAST_CHANCE = 0.3;
/** Drafting must promise so much more than it costs. */
const MARGIN = 1.15;
/** Tokens without drafts behind one that did not pay; doubled each time up to the most. */
const FIRST_PAUSE = 32;
const LONGEST_PAUSE = 1024;

export interface SpeculationStatistics {
  /** Rows that carried drafts, their drafted tokens, and those accepted. */
  rows: number;
  drafted: number;
  accepted: number;
}

interface State {
  chance: number;
  /** Tokens that are still to come without drafts, and how long the next pause is. */
  pause: number;
  nextPause: number;
}

export class Speculation {
  readonly #drafter: Drafter | undefined;
  readonly #states = new Map<string, State>();
  readonly #statistics: SpeculationStatistics = { rows: 0, drafted: 0, accepted: 0 };
  /** Smoothed milliseconds that a drafted token adds to a step; NaN until measured. */
  #tokenMs = Number.NaN;

  constructor(drafter: Drafter | undefined) {
    this.#drafter = drafter;
  }

  get enabled(): boolean {
    return this.#drafter !== undefined;
  }

  get statistics(): Readonly<SpeculationStatistics> {
    return this.#statistics;
  }

  /** Whether the sequence would carry drafts if its last token were known: it is worth waiting for. */
  wants(sequence: Sequence): boolean {
    if (this.#drafter === undefined || !mayDraft(sequence)) return false;
    if (this.#state(sequence).pause > 0) return false;
    return this.#drafter.draft(sequence.id, sequence.tokens(0, sequence.known), 1).length > 0;
  }

  /** Drafts for a decode row whose last token is known, `most` at most. `stepMs`: what the batch's step takes without
   * drafts, for `rows` rows; undefined = not measured yet, which comes first. */
  draft(sequence: Sequence, most: number, rows: number, stepMs: number | undefined): readonly number[] {
    if (this.#drafter === undefined || !mayDraft(sequence) || stepMs === undefined || most < 1) return [];
    const state = this.#state(sequence);
    if (state.pause > 0) return [];
    const length = Math.min(most, this.#length(state, stepMs / rows));
    if (length === 0) {
      state.pause = state.nextPause;
      state.nextPause = Math.min(2 * state.nextPause, LONGEST_PAUSE);
      // After the pause one short draft finds out whether the text has changed.
      const least = Number.isNaN(this.#tokenMs) ? LEAST_CHANCE : (this.#tokenMs * MARGIN * rows) / stepMs;
      state.chance = Math.min(1, least * 1.05);
      return [];
    }
    return this.#drafter.draft(sequence.id, sequence.tokens(0, sequence.known), length);
  }

  /** A token came without drafts. */
  passed(sequence: Sequence): void {
    const state = this.#states.get(sequence.id);
    if (state !== undefined && state.pause > 0) state.pause--;
  }

  /** Outcome of a row with drafts. */
  accepted(sequence: Sequence, drafted: number, accepted: number): void {
    this.#statistics.rows++;
    this.#statistics.drafted += drafted;
    this.#statistics.accepted += accepted;
    const state = this.#state(sequence);
    for (let i = 0; i < Math.min(drafted, accepted + 1); i++)
      state.chance += ((i < accepted ? 1 : 0) - state.chance) * NEWEST;
    if (accepted === drafted && drafted > 1) state.nextPause = FIRST_PAUSE;
  }

  /** A guess that the sequence's grammar forbids: as one that was wrong, but nothing was computed for it. */
  forbidden(sequence: Sequence): void {
    const state = this.#state(sequence);
    state.chance -= state.chance * NEWEST;
  }

  /** A step without prompts took so long with `drafted` tokens more than its rows, which alone take `stepMs`. */
  observe(drafted: number, ms: number, stepMs: number): void {
    const each = Math.max(0, ms - stepMs) / drafted;
    this.#tokenMs = Number.isNaN(this.#tokenMs) ? each : this.#tokenMs * 0.8 + each * 0.2;
  }

  end(sequence: Sequence): void {
    this.#states.delete(sequence.id);
    this.#drafter?.end(sequence.id);
  }

  /** Drafted tokens of which even the last one pays. `worthMs`: what a token costs without drafts. */
  #length(state: State, worthMs: number): number {
    if (Number.isNaN(this.#tokenMs)) return state.chance < LEAST_CHANCE ? 0 : FIRST_DRAFT;
    let length = 0;
    let chance = state.chance;
    while (length < LONGEST_DRAFT && chance * worthMs > this.#tokenMs * MARGIN) {
      length++;
      chance *= state.chance;
    }
    return length;
  }

  #state(sequence: Sequence): State {
    let state = this.#states.get(sequence.id);
    if (state === undefined) {
      state = { chance: FIRST_CHANCE, pause: 0, nextPause: FIRST_PAUSE };
      this.#states.set(sequence.id, state);
    }
    return state;
  }
}

/** Penalties and alternatives depend on tokens that are not accepted yet. */
function mayDraft(sequence: Sequence): boolean {
  return !sequence.needsLastToken && (sequence.request.logprobs ?? 0) === 0;
}
