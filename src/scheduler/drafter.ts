// Where drafts of speculative decoding come from: anything that guesses the next tokens of a sequence. A draft never changes
// what is generated: the model samples behind every drafted token in one step, and what differs from its own samples is
// dropped.

/** Guesses are asked for between steps and must be ready at once; a draft model would compute them ahead. */
export interface Drafter {
  /** Up to `most` tokens that may follow `known` (prompt and answer so far); none where there is nothing to go by. */
  draft(id: string, known: Uint32Array, most: number): readonly number[];
  /** The sequence has ended. Unknown ids are ignored. */
  end(id: string): void;
}
