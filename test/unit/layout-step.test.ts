// Steps as bytes and results from bytes: what StepEncoder writes is read back by a decoder of the test's own, over random
// steps that share one growing buffer; decodeResult reads what the test writes.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import {
  RESULT,
  RESULT_ROW,
  RESULT_TOP,
  STEP,
  STEP_BIAS,
  STEP_COPY,
  STEP_HISTORY,
  STEP_ROW,
} from "../../src/engine/layout.ts";
import { GREEDY, type Sampling } from "../../src/engine/protocol.ts";
import { decodeResult } from "../../src/engine/result-decoder.ts";
import { StepEncoder } from "../../src/engine/step-encoder.ts";
import type { Step, StepRow } from "../../src/scheduler/step.ts";
import { headerConstant } from "../tools/native-header.ts";

const u32 = fc.integer({ min: 0, max: 0xffffffff });
const words = (max: number) => fc.array(u32, { maxLength: max }).map((list) => Uint32Array.from(list));
const f32 = fc.float({ noNaN: true });
const size = fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER });

const sampling: fc.Arbitrary<Sampling> = fc.record({
  temperature: f32,
  top_p: f32,
  top_k: u32,
  min_p: f32,
  repetition_penalty: f32,
  presence_penalty: f32,
  frequency_penalty: f32,
  xtc_probability: f32,
  xtc_threshold: f32,
  logit_bias: fc.constant<Sampling["logit_bias"]>([]),
  seed: size,
});

const row: fc.Arbitrary<StepRow> = fc.record({
  slot: u32,
  firstPosition: size,
  tokens: words(700),
  fullPages: words(40),
  chunkPages: words(40),
  chunkBase: size,
  logits: fc.constantFrom("none", "last", "all"),
  sample: fc.boolean(),
  sampleAll: fc.boolean(),
  returnLogits: fc.boolean(),
  logprob: fc.boolean(),
  topLogprobs: fc.integer({ min: 0, max: 64 }),
  sampling,
  bias: fc.array(fc.tuple(u32, fc.float({ noNaN: true })), { maxLength: 8 }),
  history: fc.array(fc.tuple(u32, u32, u32), { maxLength: 8 }).map((list) => Uint32Array.from(list.flat())),
  xtcKeep: words(4),
});

const step: fc.Arbitrary<Step> = fc.record({
  rows: fc.array(row, { maxLength: 12 }),
  copies: fc.array(fc.record({ pool: fc.constantFrom("full", "chunked"), from: u32, to: u32 }), {
    maxLength: 4,
  }),
});

function decode(bytes: Uint8Array): Step {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const word = (at: number) => view.getUint32(at, true);
  const float = (at: number) => view.getFloat32(at, true);
  const long = (at: number) => Number(view.getBigUint64(at, true));
  const table = (at: number, count: number) =>
    Uint32Array.from({ length: count }, (_, i) => word(at + i * 4));
  expect([word(STEP.magic), word(STEP.version)]).toEqual([
    headerConstant("CV_STEP_MAGIC"),
    headerConstant("CV_ABI_VERSION"),
  ]);
  expect(long(STEP.total_size)).toBe(bytes.length);
  const logits = ["none", "last", "all"] as const;
  const rows = Array.from({ length: word(STEP.n_rows) }, (_, i): StepRow => {
    const at = long(STEP.rows_offset) + i * STEP_ROW.size;
    const flags = word(at + STEP_ROW.flags);
    const biases = long(at + STEP_ROW.bias_offset);
    expect(long(at + STEP_ROW.mask_offset)).toBe(0);
    return {
      slot: word(at + STEP_ROW.slot),
      firstPosition: long(at + STEP_ROW.first_position),
      tokens: table(long(at + STEP_ROW.tokens_offset), word(at + STEP_ROW.n_tokens)),
      fullPages: table(long(at + STEP_ROW.full_pages_offset), word(at + STEP_ROW.n_full_pages)),
      chunkPages: table(long(at + STEP_ROW.chunk_pages_offset), word(at + STEP_ROW.n_chunk_pages)),
      chunkBase: long(at + STEP_ROW.chunk_base),
      logits: logits[word(at + STEP_ROW.logits)] ?? "none",
      sample: (flags & headerConstant("CV_ROW_SAMPLE")) !== 0,
      sampleAll: (flags & headerConstant("CV_ROW_SAMPLE_ALL")) !== 0,
      returnLogits: (flags & headerConstant("CV_ROW_RETURN_LOGITS")) !== 0,
      logprob: (flags & headerConstant("CV_ROW_LOGPROB")) !== 0,
      topLogprobs: word(at + STEP_ROW.n_top_logprobs),
      sampling: {
        temperature: float(at + STEP_ROW.temperature),
        top_p: float(at + STEP_ROW.top_p),
        top_k: word(at + STEP_ROW.top_k),
        min_p: float(at + STEP_ROW.min_p),
        repetition_penalty: float(at + STEP_ROW.repetition_penalty),
        presence_penalty: float(at + STEP_ROW.presence_penalty),
        frequency_penalty: float(at + STEP_ROW.frequency_penalty),
        xtc_probability: float(at + STEP_ROW.xtc_probability),
        xtc_threshold: float(at + STEP_ROW.xtc_threshold),
        logit_bias: [],
        seed: long(at + STEP_ROW.seed),
      },
      bias: Array.from({ length: word(at + STEP_ROW.n_bias) }, (_, k): [number, number] => [
        word(biases + k * STEP_BIAS.size + STEP_BIAS.token),
        float(biases + k * STEP_BIAS.size + STEP_BIAS.bias),
      ]),
      history: table(
        long(at + STEP_ROW.history_offset),
        (word(at + STEP_ROW.n_history) * STEP_HISTORY.size) / 4,
      ),
      xtcKeep: table(long(at + STEP_ROW.xtc_keep_offset), word(at + STEP_ROW.n_xtc_keep)),
    };
  });
  const copies = Array.from({ length: word(STEP.n_copies) }, (_, i) => {
    const at = long(STEP.copies_offset) + i * STEP_COPY.size;
    return {
      pool: word(at + STEP_COPY.pool) === 0 ? ("full" as const) : ("chunked" as const),
      from: word(at + STEP_COPY.from),
      to: word(at + STEP_COPY.to),
    };
  });
  return { rows, copies };
}

describe("a step", () => {
  test("has no repetition penalty of 0, which the engine refuses, however small the request's is", () => {
    for (const penalty of [Number.MIN_VALUE, 1e-60, 1e-46]) {
      const one: StepRow = {
        slot: 0,
        firstPosition: 0,
        tokens: Uint32Array.of(1),
        fullPages: Uint32Array.of(0),
        chunkPages: new Uint32Array(),
        chunkBase: 0,
        logits: "last",
        sample: true,
        returnLogits: false,
        logprob: false,
        topLogprobs: 0,
        sampling: { ...GREEDY, repetition_penalty: penalty },
        bias: [],
        history: new Uint32Array(),
        xtcKeep: new Uint32Array(),
      };
      const written = decode(new StepEncoder().encode({ rows: [one], copies: [] }));
      expect(written.rows[0]?.sampling.repetition_penalty).toBeGreaterThan(0);
    }
  });

  test("is read back as it was, whatever the buffer held before", () => {
    const encoder = new StepEncoder();
    fc.assert(
      fc.property(step, (wanted) => {
        expect(decode(encoder.encode(wanted))).toEqual(wanted);
      }),
      { numRuns: 150 },
    );
  });

  test("costs no new buffer once the buffer is large enough", () => {
    const encoder = new StepEncoder();
    const small: Step = { rows: [], copies: [] };
    const large: Step = { rows: fc.sample(row, { numRuns: 30, seed: 3 }), copies: [] };
    const buffer = encoder.encode(large).buffer;
    for (const each of [small, large, small, large]) expect(encoder.encode(each).buffer).toBe(buffer);
  });

  test("with a position or seed that 64 bits of JavaScript cannot hold is refused", () => {
    const [any] = fc.sample(row, { numRuns: 1, seed: 5 });
    if (any === undefined) throw new Error("no row");
    for (const firstPosition of [-1, 0.5, 2 ** 53])
      expect(() => new StepEncoder().encode({ rows: [{ ...any, firstPosition }], copies: [] })).toThrow();
    const seeded = { ...any, sampling: { ...GREEDY, seed: -1 } };
    expect(() => new StepEncoder().encode({ rows: [seeded], copies: [] })).toThrow();
  });
});

interface WantedRow {
  token: number;
  logprob: number;
  top: [number, number][];
  logits: Float32Array | undefined;
}

/** The bytes that the library would give for `rows`. */
function resultBytes(rows: WantedRow[], vocab: number, computeNs: number, queuedNs: number): Uint8Array {
  const bytes = new Uint8Array(
    RESULT.size +
      rows.reduce(
        (sum, each) =>
          sum + RESULT_ROW.size + each.top.length * RESULT_TOP.size + (each.logits?.byteLength ?? 0),
        0,
      ),
  );
  const view = new DataView(bytes.buffer);
  let end = RESULT.size + rows.length * RESULT_ROW.size;
  view.setBigUint64(RESULT.total_size, BigInt(bytes.length), true);
  view.setUint32(RESULT.n_rows, rows.length, true);
  view.setBigUint64(RESULT.rows_offset, BigInt(RESULT.size), true);
  view.setBigUint64(RESULT.compute_ns, BigInt(computeNs), true);
  view.setBigUint64(RESULT.queued_ns, BigInt(queuedNs), true);
  view.setBigUint64(RESULT.mask_ns, 5n, true);
  rows.forEach((each, i) => {
    const at = RESULT.size + i * RESULT_ROW.size;
    view.setUint32(at + RESULT_ROW.token, each.token, true);
    view.setFloat32(at + RESULT_ROW.logprob, each.logprob, true);
    view.setUint32(at + RESULT_ROW.n_top, each.top.length, true);
    view.setBigUint64(at + RESULT_ROW.top_offset, BigInt(end), true);
    for (const [token, logprob] of each.top) {
      view.setUint32(end + RESULT_TOP.token, token, true);
      view.setFloat32(end + RESULT_TOP.logprob, logprob, true);
      end += RESULT_TOP.size;
    }
    view.setUint32(at + RESULT_ROW.n_logits, (each.logits?.length ?? 0) / vocab, true);
    view.setBigUint64(at + RESULT_ROW.logits_offset, BigInt(end), true);
    each.logits?.forEach((value) => {
      view.setFloat32(end, value, true);
      end += 4;
    });
  });
  return bytes;
}

describe("a result", () => {
  const vocab = 5;
  const logits = fc
    .array(f32, { minLength: 1, maxLength: 4 })
    .map((list) => Float32Array.from({ length: list.length * vocab }, (_, i) => list[i % list.length] ?? 0));
  const wantedRow = fc.record({
    token: u32,
    logprob: f32,
    top: fc.array(fc.tuple(u32, f32), { maxLength: 6 }),
    logits: fc.option(logits, { nil: undefined }),
  });

  test("is decoded whole, wherever its bytes lie in their buffer", () => {
    fc.assert(
      fc.property(
        fc.array(wantedRow, { maxLength: 6 }),
        size,
        fc.integer({ min: 0, max: 40 }),
        (rows, ns, shift) => {
          const bytes = resultBytes(rows, vocab, ns, 17);
          const moved = new Uint8Array(shift + bytes.length + 8);
          moved.set(bytes, shift);
          const result = decodeResult(moved.subarray(shift, shift + bytes.length), vocab);
          expect(result).toEqual({ rows, computeNs: ns, queuedNs: 17, maskNs: 5 });
        },
      ),
      { numRuns: 200 },
    );
  });

  test("has a failure for each row whose status says so, and none for the others", () => {
    const row = { token: 1, logprob: 0, top: [], logits: undefined };
    const bytes = resultBytes([row, row, row, row], vocab, 1, 1);
    const view = new DataView(bytes.buffer);
    for (const i of [1, 2, 3]) view.setUint32(RESULT.size + i * RESULT_ROW.size + RESULT_ROW.status, i, true);
    const codes = decodeResult(bytes, vocab).rows.map(({ failure }) => failure?.code);
    expect(codes).toEqual([undefined, "engine_failed", "invalid_argument", "engine_failed"]);
  });

  test("keeps its logits when the bytes are used again", () => {
    const bytes = resultBytes(
      [{ token: 1, logprob: 0, top: [], logits: new Float32Array(5).fill(2) }],
      5,
      1,
      1,
    );
    const { rows } = decodeResult(bytes, vocab);
    bytes.fill(0xff);
    expect(rows[0]?.logits).toEqual(new Float32Array(5).fill(2));
  });
});
