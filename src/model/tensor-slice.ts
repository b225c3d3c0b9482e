// Parts of a planned tensor as planned tensors: a run of its rows (outputs) or of its columns (inputs). Only offsets and
// counts change, strides stay, so a slice of a slice is right too. Pure.

import { CaravanError } from "../errors.ts";
import { elementBits, type PlannedTensor, SCALE_BYTES, type SourceView } from "./load-plan.ts";

/** Rows [first, end) of every expert; undefined where there are none. */
export function rowSlice(t: PlannedTensor, first: number, end: number): PlannedTensor | undefined {
  check(t, "rows", t.rows, first, end);
  if (first === end) return undefined;
  const rows = end - first;
  if (t.transposed) return { ...t, rows, weight: moved(t.weight, (first * elementBits(t)) / 8) };
  const down = (view: SourceView | undefined) => view && moved(view, first * view.rowStride);
  return {
    ...t,
    rows,
    weight: moved(t.weight, first * t.weight.rowStride),
    scales: down(t.scales),
    biases: down(t.biases),
  };
}

/** Columns [first, end) of every row; undefined where there are none. In quantized tensors both must be multiples of the
 * group, which begins on a whole 32-bit word in every format (a group of 16 codes of 4 bits has 8 bytes). */
export function columnSlice(t: PlannedTensor, first: number, end: number): PlannedTensor | undefined {
  check(t, "columns", t.cols, first, end);
  if (first === end) return undefined;
  const cols = end - first;
  if (t.transposed) return { ...t, cols, weight: moved(t.weight, first * t.weight.rowStride) };
  const weight = moved(t.weight, (first * elementBits(t)) / 8);
  if (t.group === 0) return { ...t, cols, weight };
  if (first % t.group !== 0 || cols % t.group !== 0)
    throw new CaravanError(
      "internal_error",
      `${t.name}: columns ${first} to ${end} do not begin and end with groups of ${t.group}`,
    );
  const scales = (first / t.group) * (t.scaleType === undefined ? 0 : SCALE_BYTES[t.scaleType]);
  const along = (view: SourceView | undefined) => view && moved(view, scales);
  return { ...t, cols, weight, scales: along(t.scales), biases: along(t.biases) };
}

function moved(view: SourceView, bytes: number): SourceView {
  return { ...view, offset: view.offset + bytes };
}

function check(t: PlannedTensor, what: string, count: number, first: number, end: number): void {
  if (Number.isInteger(first) && Number.isInteger(end) && first >= 0 && first <= end && end <= count) return;
  throw new CaravanError(
    "internal_error",
    `${t.name} has ${count} ${what}, ${first} to ${end} were asked for`,
  );
}
