// Whether memory grows: a slope that a few odd samples do not move.

/** `at`: requests or minutes, rising. */
export interface Sample {
  at: number;
  bytes: number;
}

/** Bytes for each unit of `at`: the median of the slopes between all pairs (Theil and Sen). NaN of fewer than two samples. */
export function growth(samples: readonly Sample[]): number {
  const slopes = samples
    .flatMap((a, i) => samples.slice(i + 1).map((b) => (b.bytes - a.bytes) / (b.at - a.at)))
    .filter(Number.isFinite)
    .sort((a, b) => a - b);
  const middle = slopes.length / 2;
  return ((slopes[Math.ceil(middle) - 1] ?? Number.NaN) + (slopes[Math.floor(middle)] ?? Number.NaN)) / 2;
}

export function mean(samples: readonly Sample[]): number {
  return samples.reduce((sum, { bytes }) => sum + bytes, 0) / samples.length;
}

/** Whether bytes, in order of time, have stopped to rise: neither of the last two is above all that were before. What only rises
 * never levels out, however slowly. */
export function levelled(bytes: readonly number[]): boolean {
  const before = bytes.slice(0, -2);
  return before.length >= 2 && Math.max(...bytes.slice(-2)) <= Math.max(...before);
}
