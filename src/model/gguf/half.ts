// float16 to float32 and back. A table for the way in and bit arithmetic for the way out: several times faster
// under Bun than Float16Array, and the importer converts a scale for every 32 weights.

let table: Float32Array | undefined;
const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);

/** All 65,536 float16 values as float32, indexed by their bits. Built at first use (256 KiB). */
export function halfTable(): Float32Array {
  if (table !== undefined) return table;
  const values = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const sign = bits & 0x8000 ? -1 : 1;
    if (exponent === 31) values[bits] = fraction === 0 ? sign * Infinity : Number.NaN;
    else if (exponent === 0) values[bits] = sign * fraction * 2 ** -24;
    else values[bits] = sign * (1024 + fraction) * 2 ** (exponent - 25);
  }
  table = values;
  return values;
}

/** Bits of the float16 nearest to `x` (rounded to float32 first), ties to even; too large becomes infinity. */
export function toHalf(x: number): number {
  f32[0] = x;
  const bits = u32[0] ?? 0;
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00; // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // rounds to 65536 or more
  if (magnitude >= 0x38800000) {
    // normal: drop 13 bits, round to even, rebias the exponent from 127 to 15
    const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1);
    return sign | ((rounded >>> 13) - (112 << 10));
  }
  if (magnitude < 0x33000000) return sign; // below half of the least subnormal
  const shift = 126 - (magnitude >>> 23); // 14..24 bits to drop from the 24-bit significand
  const significand = (magnitude & 0x7fffff) | 0x800000;
  const half = 1 << (shift - 1);
  const rest = significand & ((1 << shift) - 1);
  let result = significand >>> shift;
  if (rest > half || (rest === half && (result & 1) === 1)) result++;
  return sign | result;
}
