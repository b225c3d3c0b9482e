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
  const values = new Int32Array(GROUP);
  for (let b = 0; b < blocks; b++) {
    const at = b * BLOCK_BYTES;
    const d = half[w[(at + 208) >> 1] ?? 0] ?? 0;
    for (let g = 0; g < 8; g++) {
      // group g of 32 columns: which half of 128, and which of its four runs
      const run = g & 3;
      const low = at + (g >> 2) * 64 + (run & 1) * 32;
      const high = at + 128 + (g >> 2) * 32;
      const lowShift = (run >> 1) * 4;
      const s0 = signed[at + 192 + g * 2] ?? 0;
      const s1 = signed[at + 192 + g * 2 + 1] ?? 0;
      for (let l = 0; l < GROUP; l++) {
        const q = (((src[low + l] ?? 0) >> lowShift) & 15) | ((((src[high + l] ?? 0) >> (run * 2)) & 3) << 4);
        values[l] = (l < 16 ? s0 : s1) * (q - 32);
      }
      storeGroup(values, d, divisor(s0, s1), b * 8 + g, to, loss);
    }
  }
}

/** Greatest common divisor of the magnitudes; 1 for two zeros. */
function divisor(a: number, b: number): number {
  let x = Math.abs(a);
  let y = Math.abs(b);
  while (y !== 0) [x, y] = [y, x % y];
  return x === 0 ? 1 : x;
}

/** `values` times `d` as one affine group; `step` divides every value. */
function storeGroup(
  values: Int32Array,
  d: number,
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
    if (x > max) max = x;
  }
  // d may be negative: then the least value of the group is d * max
  const least = d < 0 ? d * max : d * min;
  const span = Math.abs(d) * (max - min);
  const exact = (max - min) / step <= 255;
  const half = halfTable();
  let scaleBits = toHalf(exact ? Math.abs(d) * step : span / 255);
  // rounded up, so that 255 steps still reach the greatest value
  if (!exact && (half[scaleBits] ?? 0) * 255 < span) scaleBits++;
  const biasBits = toHalf(least);
  const scale = half[scaleBits] ?? 0;
  const bias = half[biasBits] ?? 0;
  if (!Number.isFinite(scale) || !Number.isFinite(bias)) loss.badGroups++;
  to.scales[group] = scaleBits;
  to.biases[group] = biasBits;
  const at = group * GROUP;
  let worst = 0;
  for (let l = 0; l < GROUP; l++) {
    const x = d * (values[l] ?? 0);
    const code = scale === 0 ? 0 : Math.min(255, Math.max(0, Math.round((x - bias) / scale)));
    to.codes[at + l] = code;
    const error = Math.abs(code * scale + bias - x);
    if (error > worst) worst = error;
  }
  if (worst > 0) loss.inexactWeights += GROUP;
  if (worst > loss.maxError) loss.maxError = worst;
  const reach = Math.max(Math.abs(least), Math.abs(least + span));
  if (reach > loss.maxMagnitude) loss.maxMagnitude = reach;
}
