// Which bytes of a checkpoint's files a rank reads: from its load plan to ranges of each file. A slice of rows is a run of
// bytes; a slice of columns is thousands of short strips, so the whole run that holds them is taken. Pure.

import {
  elementBits,
  type LoadPlan,
  type PlannedTensor,
  SCALE_BYTES,
  type SourceView,
} from "../model/load-plan.ts";

/** [start, end) in bytes. */
export type ByteRange = [start: number, end: number];

/** Gaps up to this size are fetched along: a request costs more than they do. */
const CLOSE_BYTES = 64 * 1024;

/** By path of the file, sorted and without overlaps. Files of which nothing is needed are missing. */
export function shardRanges(plan: LoadPlan): Map<string, ByteRange[]> {
  const all = new Map<string, ByteRange[]>();
  for (const tensor of plan.tensors)
    for (const { file, range } of tensorRanges(tensor)) {
      const path = plan.files[file]?.path;
      if (path === undefined) continue;
      const ranges = all.get(path) ?? [];
      ranges.push(range);
      all.set(path, ranges);
    }
  return new Map([...all].map(([path, ranges]) => [path, mergeRanges(ranges, CLOSE_BYTES)]));
}

function tensorRanges(t: PlannedTensor): { file: number; range: ByteRange }[] {
  const bits = elementBits(t);
  const perScale =
    t.group === 0 || t.scaleType === undefined ? 0 : (t.cols / t.group) * SCALE_BYTES[t.scaleType];
  // Transposed: a stored row is a column of the matrix.
  const weight = t.transposed
    ? { rows: t.cols, bytes: (t.rows * bits) / 8 }
    : { rows: t.rows, bytes: (t.cols * bits) / 8 };
  const parts: [SourceView | undefined, { rows: number; bytes: number }][] = [
    [t.weight, weight],
    [t.scales, { rows: t.rows, bytes: perScale }],
    [t.biases, { rows: t.rows, bytes: perScale }],
  ];
  return parts.flatMap(([view, { rows, bytes }]) => {
    if (view === undefined) return [];
    return Array.from({ length: t.experts }, (_, expert) => {
      const start = view.offset + expert * view.outerStride;
      const end = Math.ceil(start + (rows - 1) * view.rowStride + bytes);
      return { file: view.file, range: [Math.floor(start), end] as ByteRange };
    });
  });
}

/** Sorted, without overlaps; ranges that are at most `gap` bytes apart become one. */
export function mergeRanges(ranges: readonly ByteRange[], gap = 0): ByteRange[] {
  const merged: ByteRange[] = [];
  for (const [start, end] of ranges.toSorted((a, b) => a[0] - b[0])) {
    const last = merged.at(-1);
    if (last !== undefined && start <= last[1] + gap) last[1] = Math.max(last[1], end);
    else if (end > start) merged.push([start, end]);
  }
  return merged;
}

/** What of `wanted` is not in `held`; both sorted and without overlaps. */
export function missingRanges(wanted: readonly ByteRange[], held: readonly ByteRange[]): ByteRange[] {
  const missing: ByteRange[] = [];
  for (const [first, end] of wanted) {
    let start = first;
    for (const [heldStart, heldEnd] of held) {
      if (heldEnd <= start || heldStart >= end) continue;
      if (heldStart > start) missing.push([start, heldStart]);
      start = Math.max(start, heldEnd);
    }
    if (start < end) missing.push([start, end]);
  }
  return missing;
}

export function totalBytes(ranges: Iterable<ByteRange>): number {
  let sum = 0;
  for (const [start, end] of ranges) sum += end - start;
  return sum;
}
