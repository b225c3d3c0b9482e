// Which bytes of a checkpoint's files a rank reads: from its load plan to strips of each file, just those. A slice of rows is a run of
// bytes; a slice of columns is a strip of each row. Pure.

import {
  elementBits,
  type LoadPlan,
  type PlannedTensor,
  SCALE_BYTES,
  type SourceView,
} from "../model/load-plan.ts";
import { joinedStrips, missingStrips, run, type Strips, stripsOf } from "./strips.ts";

/** float32 */
const GLOBAL_SCALE_BYTES = 4;

/** By path of the file, sorted; nothing twice. Files of which nothing is needed are missing. */
export function shardStrips(plan: LoadPlan): Map<string, Strips[]> {
  const all = new Map<string, Strips[]>();
  for (const tensor of plan.tensors)
    for (const { file, strips } of tensorStrips(tensor)) {
      const path = plan.files[file]?.path;
      if (path === undefined) continue;
      const known = all.get(path) ?? [];
      known.push(...strips);
      all.set(path, known);
    }
  // A tied head is a part of the embedding.
  return new Map([...all].map(([path, strips]) => [path, joinedStrips(missingStrips(strips, []))]));
}

function tensorStrips(t: PlannedTensor): { file: number; strips: Strips[] }[] {
  const bits = elementBits(t);
  const perScale =
    t.group === 0 || t.scaleType === undefined ? 0 : (t.cols / t.group) * SCALE_BYTES[t.scaleType];
  // Transposed: a stored row is a column of the matrix.
  const weight = t.transposed
    ? { rows: t.cols, bytes: (t.rows * bits) / 8 }
    : { rows: t.rows, bytes: (t.cols * bits) / 8 };
  const parts: { view: SourceView | undefined; rows: number; bytes: number }[] = [
    { view: t.weight, ...weight },
    { view: t.scales, rows: t.rows, bytes: perScale },
    { view: t.biases, rows: t.rows, bytes: perScale },
  ];
  const strips = parts.flatMap(({ view, rows, bytes }) =>
    view === undefined ? [] : [{ file: view.file, strips: viewStrips(view, t.experts, rows, bytes) }],
  );
  const { globalScale } = t;
  if (globalScale === undefined) return strips;
  const { file, offset } = globalScale;
  return [...strips, { file, strips: [run(offset, offset + t.experts * GLOBAL_SCALE_BYTES)] }];
}

/** bytes: of a row; where they end inside a byte, all of that byte. */
function viewStrips(view: SourceView, experts: number, rows: number, bytes: number): Strips[] {
  const { offset, rowStride, outerStride } = view;
  const start = Math.floor(offset);
  const length = Math.ceil(offset + bytes) - start;
  // Experts without gaps between them are more rows; rows without gaps are one long one for each expert.
  if (experts === 1 || outerStride === rows * rowStride)
    return stripsOf(start, length, rowStride, experts * rows);
  if (rows === 1 || length === rowStride) return stripsOf(start, length * rows, outerStride, experts);
  return Array.from({ length: experts }, (_, e) =>
    stripsOf(start + e * outerStride, length, rowStride, rows),
  ).flat();
}
