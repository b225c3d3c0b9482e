// What cv_collect wrote (cv_result in caravan.h) as objects. Copies everything: the bytes belong to the next result.

import type { RowResult, StepResult } from "../scheduler/step.ts";
import { RESULT, RESULT_ROW, RESULT_TOP } from "./layout.ts";
import type { TopLogprobs } from "./protocol.ts";

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
    rows.push({
      token: view.getUint32(at + RESULT_ROW.token, true),
      logprob: view.getFloat32(at + RESULT_ROW.logprob, true),
      top,
      logits:
        positions === 0
          ? undefined
          : new Float32Array(bytes.buffer.slice(logitsAt, logitsAt + positions * vocab * 4)),
    });
  }
  return { rows, computeNs: u64(RESULT.compute_ns), queuedNs: u64(RESULT.queued_ns) };
}
