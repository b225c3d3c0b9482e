// Turns GGUF's quantized blocks into MLX's affine form: value = code * scale + bias, codes packed as one
// little-endian bit stream a row, a scale and a bias for each 32 columns.
//
// Exact, scales in float16: Q4_0 (bias -8d), Q4_1, Q5_0 (bias -16d), Q5_1, Q8_0 (bias -128d).
// K-quants hold 6-bit multiples of a float16 (d*sc, dmin*m): 17 significant bits. In float32 these products are
// exact; in float16 they are rounded, which saves a bit a weight and moves a weight by at most a hundredth of a step.
// Q6_K has a scale for each 16 columns, which affine groups of 32 cannot say: see repack-q6k.ts.

import { halfTable, toHalf } from "./half.ts";
import { repackQ6K } from "./repack-q6k.ts";

export type ScaleType = "F16" | "F32";

/** Where a run of blocks goes; all arrays start at the run's first group. */
export interface AffineTarget {
  /** groups * 32 * bits / 8 bytes. */
  codes: Uint8Array;
  /** One a group: float16 bits in a Uint16Array, or float32. */
  scales: Uint16Array | Float32Array;
  biases: Uint16Array | Float32Array;
}

/** What rounding did, summed over all repacked weights of a tensor. */
export interface RepackLoss {
  /** Weights in groups that could not be kept exactly. */
  inexactWeights: number;
  /** Upper bound of |stored - original| over all weights. */
  maxError: number;
  /** Largest |scale * code| reach met, to set the error in relation. */
  maxMagnitude: number;
  /** Groups whose scale or bias is not finite. */
  badGroups: number;
}

export interface Repacker {
  bits: 4 | 5 | 8;
  /** Affine groups of 32 in one GGUF block. */
  groupsPerBlock: number;
  scaleType: ScaleType;
  /**
   * `src` holds whole blocks, 2-byte aligned in its buffer; `blocks` of them are converted.
   * Adds to `loss`.
   */
  repack(src: Uint8Array, blocks: number, to: AffineTarget, loss: RepackLoss): void;
}

export const GROUP_SIZE = 32;

export function noLoss(): RepackLoss {
  return { inexactWeights: 0, maxError: 0, maxMagnitude: 0, badGroups: 0 };
}

/** The repacker for a GGUF type, or undefined where there is none. `kScales` is for the K-quants only. */
export function repackerFor(typeName: string, kScales: ScaleType): Repacker | undefined {
  switch (typeName) {
    case "Q4_0":
      return { bits: 4, groupsPerBlock: 1, scaleType: "F16", repack: repackSmall(18, 4, -8) };
    case "Q4_1":
      return { bits: 4, groupsPerBlock: 1, scaleType: "F16", repack: repackSmall(20, 4, undefined) };
    case "Q5_0":
      return { bits: 5, groupsPerBlock: 1, scaleType: "F16", repack: repackSmall(22, 5, -16) };
    case "Q5_1":
      return { bits: 5, groupsPerBlock: 1, scaleType: "F16", repack: repackSmall(24, 5, undefined) };
    case "Q8_0":
      return { bits: 8, groupsPerBlock: 1, scaleType: "F16", repack: repackQ8 };
    case "Q4_K":
      return { bits: 4, groupsPerBlock: 8, scaleType: kScales, repack: repackK(144, 4) };
    case "Q5_K":
      return { bits: 5, groupsPerBlock: 8, scaleType: kScales, repack: repackK(176, 5) };
    case "Q6_K":
      return { bits: 8, groupsPerBlock: 8, scaleType: "F16", repack: repackQ6K };
    default:
      return undefined;
  }
}

/** A view of the blocks as 16-bit words; all block sizes are even. */
export function words(src: Uint8Array, blocks: number, blockBytes: number): Uint16Array {
  return new Uint16Array(src.buffer, src.byteOffset, (blocks * blockBytes) / 2);
}

/**
 * Blocks of 32: float16 d, float16 m where `offset` is undefined, 32 fifth bits for 5 bits, 16 bytes of nibbles
 * (low nibbles are columns 0..15, high ones 16..31). value = d * (code + offset), or d * code + m.
 */
function repackSmall(blockBytes: number, bits: 4 | 5, offset: number | undefined): Repacker["repack"] {
  const highAt = offset === undefined ? 4 : 2;
  const nibblesAt = highAt + (bits === 5 ? 4 : 0);
  const block = new Uint8Array(GROUP_SIZE);
  return (src, blocks, to, loss) => {
    const half = halfTable();
    const w = words(src, blocks, blockBytes);
    for (let b = 0; b < blocks; b++) {
      const at = b * blockBytes;
      const d = w[at >> 1] ?? 0;
      const bias = offset === undefined ? (w[(at >> 1) + 1] ?? 0) : toHalf((half[d] ?? 0) * offset);
      if ((d & 0x7c00) === 0x7c00 || (bias & 0x7c00) === 0x7c00) loss.badGroups++;
      to.scales[b] = d;
      to.biases[b] = bias;
      const q = at + nibblesAt;
      if (bits === 4) {
        packNibbleHalves(src, q, to.codes, b * 16);
        continue;
      }
      const high = at + highAt;
      for (let j = 0; j < 16; j++) {
        const byte = src[q + j] ?? 0;
        block[j] = (byte & 15) | ((((src[high + (j >> 3)] ?? 0) >> (j & 7)) & 1) << 4);
        block[j + 16] = (byte >> 4) | ((((src[high + 2 + (j >> 3)] ?? 0) >> (j & 7)) & 1) << 4);
      }
      pack5(block, to.codes, b * 20);
    }
  };
}

/** 16 bytes of which the low nibbles are codes 0..15 and the high ones 16..31, to codes in order. */
function packNibbleHalves(src: Uint8Array, from: number, out: Uint8Array, at: number): void {
  for (let j = 0; j < 8; j++) {
    const even = src[from + 2 * j] ?? 0;
    const odd = src[from + 2 * j + 1] ?? 0;
    out[at + j] = (even & 15) | ((odd & 15) << 4);
    out[at + 8 + j] = (even >> 4) | (odd & 0xf0);
  }
}

/** 32 codes of 5 bits to 20 bytes: 8 codes are 40 bits. */
function pack5(codes: Uint8Array, out: Uint8Array, at: number): void {
  for (let g = 0; g < 4; g++) {
    const c = g * 8;
    const c0 = codes[c] ?? 0;
    const c1 = codes[c + 1] ?? 0;
    const c2 = codes[c + 2] ?? 0;
    const c3 = codes[c + 3] ?? 0;
    const c4 = codes[c + 4] ?? 0;
    const c5 = codes[c + 5] ?? 0;
    const c6 = codes[c + 6] ?? 0;
    const c7 = codes[c + 7] ?? 0;
    const o = at + g * 5;
    out[o] = c0 | (c1 << 5);
    out[o + 1] = (c1 >> 3) | (c2 << 2) | (c3 << 7);
    out[o + 2] = (c3 >> 1) | (c4 << 4);
    out[o + 3] = (c4 >> 4) | (c5 << 1) | (c6 << 6);
    out[o + 4] = (c6 >> 2) | (c7 << 3);
  }
}

/** Blocks of 32: float16 d, 32 signed bytes. Codes are shifted by 128 to be unsigned. */
function repackQ8(src: Uint8Array, blocks: number, to: AffineTarget, loss: RepackLoss): void {
  const half = halfTable();
  const w = words(src, blocks, 34);
  for (let b = 0; b < blocks; b++) {
    const d = w[b * 17] ?? 0;
    const bias = toHalf((half[d] ?? 0) * -128);
    if ((bias & 0x7c00) === 0x7c00) loss.badGroups++;
    to.scales[b] = d;
    to.biases[b] = bias;
    const from = b * 34 + 2;
    const at = b * 32;
    for (let j = 0; j < 32; j++) to.codes[at + j] = (src[from + j] ?? 0) ^ 0x80;
  }
}

/**
 * Q4_K and Q5_K: 256 columns in 8 groups of 32: float16 d and dmin, 12 bytes with 8 scales and 8 minima of 6 bits,
 * for Q5_K 32 bytes with the fifth bits (bit g of byte l belongs to column l of group g), 128 bytes of nibbles
 * (32 bytes hold groups 2i in their low and 2i+1 in their high nibbles). value = d*sc * code - dmin*m.
 */
function repackK(blockBytes: number, bits: 4 | 5): Repacker["repack"] {
  const block = new Uint8Array(GROUP_SIZE);
  const groupBytes = bits * 4;
  return (src, blocks, to, loss) => {
    const half = halfTable();
    const w = words(src, blocks, blockBytes);
    const narrow = to.scales instanceof Uint16Array;
    for (let b = 0; b < blocks; b++) {
      const at = b * blockBytes;
      const d = half[w[at >> 1] ?? 0] ?? 0;
      const dmin = half[w[(at >> 1) + 1] ?? 0] ?? 0;
      for (let g = 0; g < 8; g++) {
        const group = b * 8 + g;
        const scale = d * sixBitScale(src, at + 4, g);
        const bias = -dmin * sixBitMin(src, at + 4, g);
        if (!Number.isFinite(scale) || !Number.isFinite(bias)) loss.badGroups++;
        if (narrow) storeRounded(to, group, scale, bias, (1 << bits) - 1, loss);
        else {
          to.scales[group] = scale;
          to.biases[group] = bias + 0; // no negative zero
        }
        const q = at + blockBytes - 128 + (g >> 1) * 32;
        const shift = (g & 1) * 4;
        for (let l = 0; l < 32; l++) block[l] = ((src[q + l] ?? 0) >> shift) & 15;
        if (bits === 5)
          for (let l = 0; l < 32; l++)
            block[l] = (block[l] ?? 0) | ((((src[at + 16 + l] ?? 0) >> g) & 1) << 4);
        if (bits === 5) pack5(block, to.codes, group * groupBytes);
        else pack4(block, to.codes, group * groupBytes);
      }
    }
  };
}

function pack4(codes: Uint8Array, out: Uint8Array, at: number): void {
  for (let j = 0; j < 16; j++) out[at + j] = (codes[2 * j] ?? 0) | ((codes[2 * j + 1] ?? 0) << 4);
}

function sixBitScale(s: Uint8Array, at: number, g: number): number {
  if (g < 4) return (s[at + g] ?? 0) & 63;
  return ((s[at + g + 4] ?? 0) & 15) | (((s[at + g - 4] ?? 0) >> 6) << 4);
}

function sixBitMin(s: Uint8Array, at: number, g: number): number {
  if (g < 4) return (s[at + g + 4] ?? 0) & 63;
  return ((s[at + g + 4] ?? 0) >> 4) | (((s[at + g] ?? 0) >> 6) << 4);
}

/** Rounds a group's scale and bias to float16 and records what that may move a weight by. */
function storeRounded(
  to: AffineTarget,
  group: number,
  scale: number,
  bias: number,
  maxCode: number,
  loss: RepackLoss,
): void {
  const half = halfTable();
  const scaleBits = toHalf(scale);
  const biasBits = toHalf(bias);
  const error = Math.abs((half[scaleBits] ?? 0) - scale) * maxCode + Math.abs((half[biasBits] ?? 0) - bias);
  if (error > 0) loss.inexactWeights += GROUP_SIZE;
  if (error > loss.maxError) loss.maxError = error;
  const reach = Math.max(Math.abs(bias), Math.abs(bias + scale * maxCode));
  if (reach > loss.maxMagnitude) loss.maxMagnitude = reach;
  to.scales[group] = scaleBits;
  to.biases[group] = biasBits;
}
