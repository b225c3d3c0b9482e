// What cv_collect wrote (cv_result in caravan.h) as objects. Copies everything: the bytes belong to the next result.

import { CaravanError } from "../errors.ts";
import type { RowResult, StepResult } from "../scheduler/step.ts";
import { RESULT, RESULT_ROW, RESULT_TOP } from "./layout.ts";
import type { TopLogprobs } from "./protocol.ts";

const NOT_A_NUMBER = 1;
const NO_CHOICE = 2;
const NO_TOKEN = 3;

/** CV_ROW_* of a row that failed alone. */
function rowFailure(status: number): CaravanError {
  switch (status) {
    case NOT_A_NUMBER:
      return new CaravanError("engine_failed", "the model's output for this request is not a number", {
        hint: "its weights are damaged, or overflow with this prompt; other requests go on",
      });
    case NO_CHOICE:
      return new CaravanError("invalid_argument", "no token may be chosen: all are masked or banned", {
        hint: "ban fewer tokens with logit_bias",
      });
    case NO_TOKEN:
      return new CaravanError("engine_failed", "the token before this one is missing, since its step failed");
    default:
      return new CaravanError("engine_failed", `a row ended with the unknown status ${status}`);
  }
}

/** vocab: length of a row of logits. */
export function decodeResult(bytes: Uint8Array, vocab: number): StepResult {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const u64 = (at: number): number => view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
  const first = u64(RESULT.rows_offset);
  const rows: RowResult[] = [];
  for (let i = 0; i < view.getUint32(RESULT.n_rows, true); i++) {
    const at = first + i * RESULT_ROW.size;
    const top: TopLogprobs = [];
    const topAt = u64(at + RESULT_ROW.top_offset);
    for (let k = 0; k < view.getUint32(at + RESULT_ROW.n_top, true); k++) {
      const entry = topAt + k * RESULT_TOP.size;
      top.push([
        view.getUint32(entry + RESULT_TOP.token, true),
        view.getFloat32(entry + RESULT_TOP.logprob, true),
      ]);
    }
    const positions = view.getUint32(at + RESULT_ROW.n_logits, true);
    const logitsAt = bytes.byteOffset + u64(at + RESULT_ROW.logits_offset);
    const status = view.getUint32(at + RESULT_ROW.status, true);
    rows.push({
      ...(status === 0 ? {} : { failure: rowFailure(status) }),
      token: view.getUint32(at + RESULT_ROW.token, true),
      logprob: view.getFloat32(at + RESULT_ROW.logprob, true),
      top,
      logits:
        positions === 0
          ? undefined
          : new Float32Array(bytes.buffer.slice(logitsAt, logitsAt + positions * vocab * 4)),
    });
  }
  return {
    rows,
    computeNs: u64(RESULT.compute_ns),
    queuedNs: u64(RESULT.queued_ns),
    maskNs: u64(RESULT.mask_ns),
  };
}
