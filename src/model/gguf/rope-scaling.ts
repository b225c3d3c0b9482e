// Recovers the parameters of Llama 3's RoPE scaling from the table of frequency factors that GGUF stores instead.
// The factors are 1 for wavelengths below L/high, `factor` above L/low, and a smooth mix between (llama4.md 1.2).

import type { CaravanError } from "../../errors.ts";

export interface Llama3RopeScaling {
  rope_type: "llama3";
  factor: number;
  low_freq_factor: number;
  high_freq_factor: number;
  original_max_position_embeddings: number;
}

/** The table was computed in float32, through a difference of nearly equal numbers. */
const TOLERANCE = 1e-4;
/** What Meta's models use; the first that reproduces the table wins, since several can where it has no mixed band. */
const KNOWN: readonly [low: number, high: number, original: number][] = [
  [1, 4, 8192],
  [1, 1, 8192],
];

/** One factor for each pair of dimensions: the divisor of its frequency. */
export function llama3Factors(scaling: Llama3RopeScaling, theta: number, headDim: number): number[] {
  const {
    factor,
    low_freq_factor: low,
    high_freq_factor: high,
    original_max_position_embeddings: original,
  } = scaling;
  return wavelengths(theta, headDim).map((wavelength) => {
    if (wavelength < original / high) return 1;
    if (wavelength > original / low || high === low) return factor;
    const smooth = (original / wavelength - low) / (high - low);
    return 1 / ((1 - smooth) / factor + smooth);
  });
}

/**
 * @returns undefined where the factors are all 1
 * @throws what `fail` makes, where no parameters give this table
 */
export function fitRopeScaling(
  factors: ArrayLike<number>,
  options: { theta: number; headDim: number; originalContext: number | undefined },
  fail: (message: string) => CaravanError,
): Llama3RopeScaling | undefined {
  const table = Array.from(factors);
  if (table.length !== options.headDim / 2) {
    throw fail(`rope_freqs.weight has ${table.length} factors for ${options.headDim / 2} pairs`);
  }
  if (!table.every((f) => Number.isFinite(f) && f > 0))
    throw fail("rope_freqs.weight has factors that are not positive");
  const factor = Math.max(...table);
  if (factor === 1 && Math.min(...table) === 1) return undefined;
  for (const [low, high, original] of candidates(table, factor, options)) {
    const scaling: Llama3RopeScaling = {
      rope_type: "llama3",
      factor,
      low_freq_factor: low,
      high_freq_factor: high,
      original_max_position_embeddings: original,
    };
    const computed = llama3Factors(scaling, options.theta, options.headDim);
    if (computed.every((f, i) => Math.abs(f - (table[i] ?? 0)) <= TOLERANCE * f)) return scaling;
  }
  throw fail("rope_freqs.weight is not a Llama 3 scaling table: its factors fit no parameters");
}

function* candidates(
  table: number[],
  factor: number,
  options: { theta: number; headDim: number; originalContext: number | undefined },
): Generator<[low: number, high: number, original: number]> {
  if (options.originalContext !== undefined) {
    yield [1, 4, options.originalContext];
    yield [1, 1, options.originalContext];
  }
  yield* KNOWN;
  const fitted = fitBand(table, factor, options);
  if (fitted !== undefined) {
    const [low, high, original] = fitted;
    yield [low, Math.round(high * 100) / 100, Math.round(original)];
    yield fitted;
  } else {
    yield [1, 1, emptyBandOriginal(table, options)];
  }
}

/**
 * In the mixed band s = (original / wavelength - low) / (high - low) is linear in 1 / wavelength. Only the ratios of
 * original, low and high show in the factors; low is taken as 1.
 */
function fitBand(
  table: number[],
  factor: number,
  { theta, headDim }: { theta: number; headDim: number },
): [low: number, high: number, original: number] | undefined {
  const lambda = wavelengths(theta, headDim);
  const points: { x: number; s: number }[] = [];
  table.forEach((f, i) => {
    const wavelength = lambda[i] ?? 0;
    if (f > 1 && f < factor) points.push({ x: 1 / wavelength, s: (1 / f - 1 / factor) / (1 - 1 / factor) });
  });
  const first = points[0];
  const last = points[points.length - 1];
  if (first === undefined || last === undefined || first === last) return undefined;
  const slope = (last.s - first.s) / (last.x - first.x);
  const intercept = first.s - slope * first.x;
  const band = -1 / intercept; // high - low, with low = 1
  return [1, 1 + band, slope * band];
}

/** Without a mixed band, any length between the last unscaled wavelength and the first scaled one is right. */
function emptyBandOriginal(table: number[], { theta, headDim }: { theta: number; headDim: number }): number {
  const lambda = wavelengths(theta, headDim);
  const first = table.findIndex((f) => f > 1);
  const above = lambda[first] ?? 0;
  const below = lambda[first - 1] ?? 0;
  const power = 2 ** Math.floor(Math.log2(above));
  return power > below ? power : Math.floor((above + below) / 2);
}

function wavelengths(theta: number, headDim: number): number[] {
  return Array.from({ length: headDim / 2 }, (_, j) => 2 * Math.PI * theta ** ((2 * j) / headDim));
}
