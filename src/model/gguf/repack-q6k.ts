// Q6_K to 8-bit affine groups of 32. Q6_K's value is d * sc * (q - 32) with a signed 8-bit sc for each 16 columns,
// so a group of 32 holds integers v = sc * (q - 32) on two grids. Where both grids fit into 256 steps of their
// common divisor the codes are exact (the scale is still rounded to float16); elsewhere the values are rounded to
// 255 steps between their least and greatest, about a quarter of the coarser grid's step.

import { halfTable, toHalf } from "./half.ts";
import type { AffineTarget, RepackLoss } from "./repack.ts";

const BLOCK_BYTES = 210;
const GROUP = 32;

/** Layout of a block: 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales, float16 d. */
export function repackQ6K(src: Uint8Array, blocks: number, to: AffineTarget, loss: RepackLoss): void {
  const half = halfTable();
  const w = new Uint16Array(src.buffer, src.byteOffset, (blocks * BLOCK_BYTES) / 2);
  const signed = new Int8Array(src.buffer, src.byteOffset, blocks * BLOCK_BYTES);
  const values = new Float64Array(GROUP);
  for (let b = 0; b < blocks; b++) {
    const at = b * BLOCK_BYTES;
    const d = half[w[(at + 208) >> 1] ?? 0] ?? 0;
    for (let g = 0; g < 8; g++) {
      const s0 = signed[at + 192 + g * 2] ?? 0;
      const s1 = signed[at + 192 + g * 2 + 1] ?? 0;
      decodeGroup(src, at, g, d * s0, d * s1, values);
      storeGroup(values, Math.abs(d) * divisor(s0, s1), b * 8 + g, to, loss);
    }
  }
}

/** The 32 values of group g; the products are exact in float64. */
function decodeGroup(
  src: Uint8Array,
  at: number,
  g: number,
  first: number,
  second: number,
  out: Float64Array,
): void {
  const run = g & 3; // which of the four runs of 32 in a half of 128
  const low = at + (g >> 2) * 64 + (run & 1) * 32;
  const high = at + 128 + (g >> 2) * 32;
  const lowShift = (run >> 1) * 4;
  const highShift = run * 2;
  for (let l = 0; l < 16; l++) {
    const q = (((src[low + l] ?? 0) >> lowShift) & 15) | ((((src[high + l] ?? 0) >> highShift) & 3) << 4);
    out[l] = first * (q - 32);
  }
  for (let l = 16; l < GROUP; l++) {
    const q = (((src[low + l] ?? 0) >> lowShift) & 15) | ((((src[high + l] ?? 0) >> highShift) & 3) << 4);
    out[l] = second * (q - 32);
  }
}

/** Greatest common divisor of the magnitudes; 1 for two zeros. */
function divisor(a: number, b: number): number {
  let x = Math.abs(a);
  let y = Math.abs(b);
  while (y !== 0) {
    const rest = x % y;
    x = y;
    y = rest;
  }
  return x === 0 ? 1 : x;
}

/** Stores 32 values as one affine group; every value is a multiple of `step`. */
function storeGroup(
  values: Float64Array,
  step: number,
  group: number,
  to: AffineTarget,
  loss: RepackLoss,
): void {
  let min = values[0] ?? 0;
  let max = min;
  for (let l = 1; l < GROUP; l++) {
    const x = values[l] ?? 0;
    if (x < min) min = x;
    else if (x > max) max = x;
  }
  const span = max - min;
  const exact = span <= 255 * step;
  const half = halfTable();
  let scaleBits = toHalf(exact ? step : span / 255);
  // rounded up, so that 255 steps still reach the greatest value
  if (!exact && (half[scaleBits] ?? 0) * 255 < span) scaleBits++;
  const biasBits = toHalf(min);
  const scale = half[scaleBits] ?? 0;
  const bias = half[biasBits] ?? 0;
  if (!Number.isFinite(scale) || !Number.isFinite(bias)) loss.badGroups++;
  to.scales[group] = scaleBits;
  to.biases[group] = biasBits;
  const worst = storeCodes(values, scale, bias, to.codes, group * GROUP);
  if (worst > 0) loss.inexactWeights += GROUP;
  if (worst > loss.maxError) loss.maxError = worst;
  const reach = Math.max(max, -min);
  if (reach > loss.maxMagnitude) loss.maxMagnitude = reach;
}

/** Writes the nearest codes and returns the largest error. */
function storeCodes(
  values: Float64Array,
  scale: number,
  bias: number,
  codes: Uint8Array,
  at: number,
): number {
  const inverse = scale === 0 ? 0 : 1 / scale;
  let worst = 0;
  for (let l = 0; l < GROUP; l++) {
    const x = values[l] ?? 0;
    let code = ((x - bias) * inverse + 0.5) | 0;
    if (code > 255) code = 255;
    else if (code < 0) code = 0;
    codes[at + l] = code;
    const error = code * scale + bias - x;
    if (error > worst) worst = error;
    else if (-error > worst) worst = -error;
  }
  return worst;
}
