// GGUF blocks against the values that python's gguf gives for them (fixtures/gguf-blocks.safetensors: 4 rows as
// llama.cpp quantized them, 4 rows of arbitrary bits, for each type).

import { describe, expect, test } from "bun:test";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import { halfTable, toHalf } from "../../src/model/gguf/half.ts";
import { type AffineTarget, noLoss, repackerFor, type ScaleType } from "../../src/model/gguf/repack.ts";
import { readSafetensorsHeader } from "../../src/model/safetensors.ts";

const FIXTURE = join(import.meta.dir, "../fixtures/gguf-blocks.safetensors");
const ROWS = 8;
const COLUMNS = 256;

async function fixture(name: string): Promise<Uint8Array<ArrayBuffer>> {
  const tensor = (await readSafetensorsHeader(FIXTURE)).tensors.get(name);
  if (tensor === undefined) throw new Error(`no ${name}`);
  return new Uint8Array(await readFile(FIXTURE)).slice(tensor.offset, tensor.offset + tensor.sizeBytes);
}

/** Affine values as MLX defines them (llama4.md 3.1): codes are a little-endian bit stream. */
function decode(to: AffineTarget, bits: number): Float32Array {
  const half = halfTable();
  const asFloat = (a: Uint16Array | Float32Array, i: number) =>
    a instanceof Uint16Array ? (half[a[i] ?? 0] ?? 0) : (a[i] ?? 0);
  const values = new Float32Array((to.codes.length * 8) / bits);
  for (let i = 0; i < values.length; i++) {
    let code = 0;
    for (let k = 0; k < bits; k++) {
      const bit = i * bits + k;
      code |= (((to.codes[bit >> 3] ?? 0) >> (bit & 7)) & 1) << k;
    }
    const group = i >> 5;
    values[i] = Math.fround(Math.fround(code * asFloat(to.scales, group)) + asFloat(to.biases, group));
  }
  return values;
}

async function repacked(type: string, scales: ScaleType) {
  const raw = await fixture(`${type}.raw`);
  const expected = new Float32Array((await fixture(`${type}.values`)).buffer);
  const repacker = repackerFor(type, scales);
  if (repacker === undefined) throw new Error(`no repacker for ${type}`);
  const groups = (ROWS * COLUMNS) / 32;
  const array = () => (repacker.scaleType === "F32" ? new Float32Array(groups) : new Uint16Array(groups));
  const to = { codes: new Uint8Array(groups * 4 * repacker.bits), scales: array(), biases: array() };
  const loss = noLoss();
  repacker.repack(raw, groups / repacker.groupsPerBlock, to, loss);
  const got = decode(to, repacker.bits);
  let worst = 0;
  got.forEach((x, i) => {
    worst = Math.max(worst, Math.abs(x - (expected[i] ?? Number.NaN)));
  });
  return { got, expected, loss, worst };
}

describe("repacking", () => {
  for (const type of ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"]) {
    test(`${type} keeps every weight to the last bit`, async () => {
      const { got, expected, loss } = await repacked(type, "F32");
      expect(got).toEqual(expected);
      expect(loss).toMatchObject({ inexactWeights: 0, maxError: 0, badGroups: 0 });
    });
  }

  for (const type of ["Q4_K", "Q5_K"]) {
    test(`${type} with float16 scales is off by less than 0.1 % of the largest weight, and says so`, async () => {
      const { worst, loss } = await repacked(type, "F16");
      expect(worst).toBeGreaterThan(0);
      expect(worst).toBeLessThanOrEqual(loss.maxError * 1.001);
      expect(loss.maxError).toBeLessThan(loss.maxMagnitude * 1e-3);
      expect(loss.inexactWeights).toBeGreaterThan(0);
    });
  }

  test("Q6_K is off by at most half a step of 255, and says by how much", async () => {
    const { got, expected, worst, loss } = await repacked("Q6_K", "F32");
    expect(worst).toBeGreaterThan(0);
    expect(worst).toBeLessThanOrEqual(loss.maxError * 1.001);
    for (let g = 0; g < expected.length; g += 32) {
      const group = expected.subarray(g, g + 32);
      const span = Math.max(...group) - Math.min(...group);
      const reach = Math.max(...group.map(Math.abs));
      const bound = span / 510 + reach * 2 ** -11 + 2 ** -24;
      group.forEach((x, i) => {
        expect(Math.abs((got[g + i] ?? 0) - x)).toBeLessThanOrEqual(bound);
      });
    }
  });

  test("Q6_K is exact where both scales of a group agree and their products are short", () => {
    const block = new Uint8Array(210);
    for (let i = 0; i < 192; i++) block[i] = (i * 37) & 255;
    block.fill(4, 192, 208);
    new DataView(block.buffer).setUint16(208, toHalf(0.125), true);
    const to = { codes: new Uint8Array(256), scales: new Uint16Array(8), biases: new Uint16Array(8) };
    const loss = noLoss();
    repackerFor("Q6_K", "F32")?.repack(block, 1, to, loss);
    expect(loss.inexactWeights).toBe(0);
    expect([...to.scales].every((s) => s === toHalf(0.5))).toBe(true);
  });

  test("counts scales that are not finite", () => {
    const block = new Uint8Array(18);
    block[1] = 0x7c; // infinity
    const to = { codes: new Uint8Array(16), scales: new Uint16Array(1), biases: new Uint16Array(1) };
    const loss = noLoss();
    repackerFor("Q4_0", "F32")?.repack(block, 1, to, loss);
    expect(loss.badGroups).toBe(1);
  });
});

describe("float16", () => {
  test("survives the way to float32 and back for all 65,536 values", () => {
    const table = halfTable();
    for (let bits = 0; bits < 65536; bits++) {
      const x = table[bits] ?? 0;
      if (Number.isNaN(x)) expect(toHalf(x) & 0x7fff).toBe(0x7e00);
      else expect(toHalf(x)).toBe(bits);
    }
  });

  test("rounds as Math.f16round does", () => {
    fc.assert(
      fc.property(fc.float({ noNaN: true }), (x) => {
        expect(halfTable()[toHalf(x)]).toBe(Math.f16round(x));
      }),
      { numRuns: 5000 },
    );
    for (const x of [2 ** -25, 2 ** -24, 3 * 2 ** -25, 65519.99, 65520, 1 + 2 ** -11, 1 + 3 * 2 ** -11]) {
      expect(halfTable()[toHalf(x)]).toBe(Math.f16round(Math.fround(x)));
    }
  });
});
