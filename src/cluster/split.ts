// How counted things are divided: units among tensor ranks by their weights, layers among stages by their cost. Pure.

import { CaravanError } from "../errors.ts";

/** Bounds of consecutive shares of `count` things in indivisible runs of `unit` (the last one may be shorter): share r is
 * [bounds[r], bounds[r + 1]). Shares are as close to their weights as whole units allow; one may be nothing.
 * weights: not negative, at least one above 0. */
export function shareBounds(count: number, unit: number, weights: readonly number[]): number[] {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  if (!(total > 0) || !Number.isFinite(total) || weights.some((weight) => !(weight >= 0)))
    throw new CaravanError("internal_error", `${weights.join(", ")} are not weights of shares`);
  const units = Math.ceil(count / unit);
  const last = weights.findLastIndex((weight) => weight > 0);
  let sum = 0;
  const bounds = [0];
  weights.forEach((weight, r) => {
    sum += weight;
    // The sum of all weights may miss the total by a rounding; nothing may be left over.
    const upTo = r >= last ? units : nearest((units * sum) / total);
    bounds.push(Math.min(count, upTo * unit));
  });
  return bounds;
}

/** Nearest whole number, halves upwards so that of two equal ranks the first has the odd unit. */
function nearest(x: number): number {
  return Math.floor(x + 0.5 + 1e-9);
}

/** Bounds of `stages` runs of consecutive layers whose dearest run is as cheap as can be. costs: by layer, not negative;
 * lastExtra: what the last stage has on top (the head). Every run has at least one layer.
 * Throws invalid_argument for more stages than layers. */
export function layerBounds(costs: readonly number[], stages: number, lastExtra: number): number[] {
  const n = costs.length;
  if (stages > n)
    throw new CaravanError("invalid_argument", `${n} layers cannot be split into ${stages} stages`, {
      param: "pipeline",
    });
  const before = [0];
  for (const cost of costs) before.push((before.at(-1) ?? 0) + cost);
  const costOf = (first: number, end: number, stage: number) =>
    (before[end] ?? 0) - (before[first] ?? 0) + (stage === stages - 1 ? lastExtra : 0);
  // best[end]: dearest run where the stages so far take the layers below `end`; from[stage][end]: where the last of them begins.
  let best = Array.from({ length: n + 1 }, (_, end) => (end === 0 ? 0 : Number.POSITIVE_INFINITY));
  const from: number[][] = [];
  for (let stage = 0; stage < stages; stage++) {
    const next = new Array<number>(n + 1).fill(Number.POSITIVE_INFINITY);
    const begins = new Array<number>(n + 1).fill(0);
    for (let end = stage + 1; end <= n - (stages - 1 - stage); end++)
      for (let first = stage; first < end; first++) {
        const dearest = Math.max(best[first] ?? 0, costOf(first, end, stage));
        if (dearest < (next[end] ?? 0)) {
          next[end] = dearest;
          begins[end] = first;
        }
      }
    best = next;
    from.push(begins);
  }
  const bounds = [n];
  for (let stage = stages - 1; stage >= 0; stage--) bounds.unshift(from[stage]?.[bounds[0] ?? 0] ?? 0);
  return bounds;
}

/** Least common multiple. */
export function commonMultiple(a: number, b: number): number {
  let [x, y] = [a, b];
  while (y !== 0) [x, y] = [y, x % y];
  return (a / x) * b;
}
