// Medians, spreads and quantiles of measured values, rounded as reports show them.

export interface Spread {
  median: number;
  min: number;
  max: number;
}

/** Rounded to `digits` decimals. All 0 for an empty list. */
export function spread(values: readonly number[], digits: number): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  return {
    median: round(quantile(sorted, 0.5), digits),
    min: round(sorted[0] ?? 0, digits),
    max: round(sorted.at(-1) ?? 0, digits),
  };
}

/** Linear between neighbours; 0 for an empty list (one generated token has no gaps). */
export function quantile(sorted: readonly number[], fraction: number): number {
  const place = fraction * (sorted.length - 1);
  const low = sorted[Math.floor(place)];
  const high = sorted[Math.ceil(place)];
  if (low === undefined || high === undefined) return 0;
  return low + (high - low) * (place - Math.floor(place));
}

export function round(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}
