// A step as the bytes that cv_submit reads (cv_step in caravan.h), into one buffer that is used again for every step.

import { CaravanError } from "../errors.ts";
import type { RowLogits, Step, StepRow } from "../scheduler/step.ts";
import { ABI_VERSION, STEP, STEP_BIAS, STEP_COPY, STEP_HISTORY, STEP_MAGIC, STEP_ROW } from "./layout.ts";

const LOGITS: Record<RowLogits, number> = { none: 0, last: 1, all: 2 };
const FLAG_SAMPLE = 1;
const FLAG_RETURN_LOGITS = 2;
const FLAG_LOGPROB = 4;
const FLAG_SAMPLE_ALL = 8;
const FLAG_MASK_LATER = 16;
const POOL = { full: 0, chunked: 1 } as const;
const FIRST_CAPACITY = 1 << 14;
/** The engine refuses a repetition penalty of 0, and with it the steps of everybody: what float32 would round to 0. */
const SMALLEST_PENALTY = 2 ** -126;

export class StepEncoder {
  #bytes = new Uint8Array(FIRST_CAPACITY);
  #view = new DataView(this.#bytes.buffer);
  #words = new Uint32Array(this.#bytes.buffer);

  /** The bytes are valid until the next call. */
  encode(step: Step): Uint8Array {
    const rows = STEP.size;
    let at = rows + step.rows.length * STEP_ROW.size;
    this.#reserve(
      at + step.rows.reduce((sum, row) => sum + bytesOf(row), 0) + step.copies.length * STEP_COPY.size,
    );
    this.#bytes.fill(0, 0, at);
    step.rows.forEach((row, i) => {
      at = this.#row(rows + i * STEP_ROW.size, row, at);
    });
    const copies = at;
    for (const copy of step.copies) {
      this.#u32(at + STEP_COPY.pool, POOL[copy.pool]);
      this.#u32(at + STEP_COPY.from, copy.from);
      this.#u32(at + STEP_COPY.to, copy.to);
      at += STEP_COPY.size;
    }
    const size = Math.ceil(at / 8) * 8;
    this.#u32(STEP.magic, STEP_MAGIC);
    this.#u32(STEP.version, ABI_VERSION);
    this.#u64(STEP.total_size, size);
    this.#u32(STEP.n_rows, step.rows.length);
    this.#u32(STEP.n_copies, step.copies.length);
    this.#u64(STEP.rows_offset, rows);
    this.#u64(STEP.copies_offset, copies);
    return this.#bytes.subarray(0, size);
  }

  /** Writes a row and its tables from `table` on; returns where they end. */
  #row(at: number, row: StepRow, table: number): number {
    const { sampling } = row;
    let end = table;
    const put = (words: Uint32Array): number => {
      const offset = end;
      this.#words.set(words, offset / 4);
      end += words.length * 4;
      return offset;
    };
    this.#u64(at + STEP_ROW.first_position, row.firstPosition);
    this.#u32(at + STEP_ROW.n_tokens, row.tokens.length);
    this.#u32(at + STEP_ROW.slot, row.slot);
    this.#u64(at + STEP_ROW.tokens_offset, put(row.tokens));
    this.#u64(at + STEP_ROW.full_pages_offset, put(row.fullPages));
    this.#u64(at + STEP_ROW.chunk_pages_offset, put(row.chunkPages));
    this.#u64(at + STEP_ROW.chunk_base, row.chunkBase);
    this.#u32(at + STEP_ROW.n_full_pages, row.fullPages.length);
    this.#u32(at + STEP_ROW.n_chunk_pages, row.chunkPages.length);
    this.#u32(at + STEP_ROW.logits, LOGITS[row.logits]);
    const flags =
      (row.sample ? FLAG_SAMPLE : 0) |
      (row.returnLogits ? FLAG_RETURN_LOGITS : 0) |
      (row.logprob ? FLAG_LOGPROB : 0) |
      (row.sampleAll ? FLAG_SAMPLE_ALL : 0) |
      (row.maskLater ? FLAG_MASK_LATER : 0);
    this.#u32(at + STEP_ROW.flags, flags);
    this.#u64(at + STEP_ROW.seed, sampling.seed);
    this.#f32(at + STEP_ROW.temperature, sampling.temperature);
    this.#f32(at + STEP_ROW.top_p, sampling.top_p);
    this.#f32(at + STEP_ROW.min_p, sampling.min_p);
    this.#f32(at + STEP_ROW.xtc_probability, sampling.xtc_probability);
    this.#f32(at + STEP_ROW.xtc_threshold, sampling.xtc_threshold);
    const { repetition_penalty: penalty } = sampling;
    const vanishes = penalty > 0 && Math.fround(penalty) === 0;
    this.#f32(at + STEP_ROW.repetition_penalty, vanishes ? SMALLEST_PENALTY : penalty);
    this.#f32(at + STEP_ROW.presence_penalty, sampling.presence_penalty);
    this.#f32(at + STEP_ROW.frequency_penalty, sampling.frequency_penalty);
    this.#u32(at + STEP_ROW.top_k, sampling.top_k);
    this.#u32(at + STEP_ROW.n_top_logprobs, row.topLogprobs);
    this.#u64(at + STEP_ROW.bias_offset, end);
    this.#u32(at + STEP_ROW.n_bias, row.bias.length);
    for (const [token, bias] of row.bias) {
      this.#u32(end + STEP_BIAS.token, token);
      this.#f32(end + STEP_BIAS.bias, bias);
      end += STEP_BIAS.size;
    }
    this.#u32(at + STEP_ROW.n_history, (row.history.length * 4) / STEP_HISTORY.size);
    this.#u64(at + STEP_ROW.history_offset, put(row.history));
    this.#u32(at + STEP_ROW.n_xtc_keep, row.xtcKeep.length);
    this.#u64(at + STEP_ROW.xtc_keep_offset, put(row.xtcKeep));
    if (row.mask !== undefined) this.#u64(at + STEP_ROW.mask_offset, put(row.mask));
    return end;
  }

  #reserve(size: number): void {
    if (size + 8 <= this.#bytes.length) return;
    let capacity = this.#bytes.length;
    while (capacity < size + 8) capacity *= 2;
    this.#bytes = new Uint8Array(capacity);
    this.#view = new DataView(this.#bytes.buffer);
    this.#words = new Uint32Array(this.#bytes.buffer);
  }

  #u32(at: number, value: number): void {
    this.#view.setUint32(at, value, true);
  }

  #f32(at: number, value: number): void {
    this.#view.setFloat32(at, value, true);
  }

  #u64(at: number, value: number): void {
    if (!Number.isSafeInteger(value) || value < 0)
      throw new CaravanError("internal_error", `${value} in a step`);
    this.#view.setUint32(at, value % 2 ** 32, true);
    this.#view.setUint32(at + 4, Math.floor(value / 2 ** 32), true);
  }
}

function bytesOf(row: StepRow): number {
  const words =
    row.tokens.length +
    row.fullPages.length +
    row.chunkPages.length +
    row.history.length +
    row.xtcKeep.length +
    (row.mask?.length ?? 0);
  return words * 4 + row.bias.length * STEP_BIAS.size;
}
