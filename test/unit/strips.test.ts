// Strips are sets of bytes: everything that is done with them is compared with plain sets.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import {
  cutStrips,
  endOf,
  joinedStrips,
  missingStrips,
  run,
  type Strips,
  stripBytes,
  stripsOf,
  withoutStrips,
} from "../../src/cluster/strips.ts";

function bytesOf(list: readonly Strips[]): number[] {
  return list.flatMap(([start, length, stride, rows]) =>
    Array.from({ length: rows }, (_, i) =>
      Array.from({ length }, (_byte, b) => start + i * stride + b),
    ).flat(),
  );
}

const sorted = (bytes: Iterable<number>) => [...new Set(bytes)].sort((a, b) => a - b);

/** Of one file whose matrices have rows of 7 or 10 bytes. */
const strips = (strides: readonly number[]) =>
  fc
    .record({
      start: fc.nat(90),
      stride: fc.constantFrom(...strides),
      length: fc.integer({ min: 1, max: 12 }),
      rows: fc.integer({ min: 1, max: 9 }),
    })
    .map(({ start, stride, length, rows }) =>
      length > stride ? run(start, start + length * rows) : stripsOf(start, length, stride, rows)[0],
    )
    .map((each) => each ?? run(0, 1));

const proper = ([start, length, stride, rows]: Strips) =>
  start >= 0 && length >= 1 && rows >= 1 && (rows === 1 ? stride === length : stride > length);

describe("strips", () => {
  test("that touch are a run, and none are none", () => {
    expect(stripsOf(5, 4, 4, 3)).toEqual([run(5, 17)]);
    expect(stripsOf(5, 0, 4, 3)).toEqual([]);
    expect(stripsOf(5, 4, 9, 0)).toEqual([]);
    expect(endOf([5, 4, 9, 3])).toBe(27);
  });

  test("of one matrix less others of it are exactly the difference", () => {
    const one = strips([7]);
    fc.assert(
      fc.property(one, one, (wanted, held) => {
        const left = withoutStrips(wanted, held);
        expect(left.every(proper)).toBe(true);
        const taken = new Set(bytesOf([held]));
        const bytes = bytesOf(left);
        expect(bytes.length).toBe(new Set(bytes).size);
        expect(sorted(bytes)).toEqual(sorted(bytesOf([wanted]).filter((byte) => !taken.has(byte))));
      }),
      { numRuns: 3000 },
    );
  });

  test("of several matrices: nothing that is not wanted, everything that is not held", () => {
    const some = fc.array(strips([7, 10]), { maxLength: 5 });
    fc.assert(
      fc.property(some, some, (wanted, held) => {
        const missing = missingStrips(wanted, held);
        expect(missing.every(proper)).toBe(true);
        const got = sorted(bytesOf(missing));
        const [all, have] = [new Set(bytesOf(wanted)), new Set(bytesOf(held))];
        expect(got.every((byte) => all.has(byte))).toBe(true);
        const set = new Set(got);
        for (const byte of all) if (!have.has(byte)) expect(set.has(byte)).toBe(true);
        // Few strips are told apart also where their strides differ.
        expect(got.filter((byte) => have.has(byte))).toEqual([]);
        // Once that is there too, nothing is missing.
        expect(stripBytes(missingStrips(wanted, [...held, ...missing]))).toBe(0);
      }),
      { numRuns: 1000 },
    );
  });

  test("of many rows at two distances are fetched again rather than left out", () => {
    const [wanted, held]: Strips[] = [
      [0, 3, 7, 100],
      [3, 6, 10, 100],
    ];
    if (wanted === undefined || held === undefined) throw new Error("two");
    expect(withoutStrips(wanted, held)).toEqual([wanted]);
  });

  test("that are wanted twice at one distance are missing once", () => {
    const some = fc.array(strips([7]), { maxLength: 5 });
    fc.assert(
      fc.property(some, some, (wanted, held) => {
        const have = new Set(bytesOf(held));
        const bytes = bytesOf(missingStrips(wanted, held));
        expect(bytes.length).toBe(new Set(bytes).size);
        expect(sorted(bytes)).toEqual(sorted(bytesOf(wanted).filter((byte) => !have.has(byte))));
      }),
      { numRuns: 1000 },
    );
  });

  test("joined are the same bytes", () => {
    fc.assert(
      fc.property(fc.array(strips([7, 10]), { maxLength: 8 }), (list) => {
        const joined = joinedStrips(list);
        expect(joined.every(proper)).toBe(true);
        expect(joined.length).toBeLessThanOrEqual(list.length);
        expect(sorted(bytesOf(joined))).toEqual(sorted(bytesOf(list)));
      }),
      { numRuns: 1000 },
    );
  });

  test("in pieces have the same bytes in the same order, no piece above the limits, and joined are what they were", () => {
    fc.assert(
      fc.property(
        fc.array(strips([7, 10]), { maxLength: 6 }),
        fc.integer({ min: 1, max: 40 }),
        fc.integer({ min: 1, max: 4 }),
        (list, mostBytes, mostStrips) => {
          const pieces = cutStrips(list, { mostBytes, mostStrips });
          expect(bytesOf(pieces.flat())).toEqual(bytesOf(list));
          for (const piece of pieces) {
            expect(piece.every(proper)).toBe(true);
            expect(piece.length).toBeGreaterThan(0);
            expect(piece.length).toBeLessThanOrEqual(mostStrips);
            expect(stripBytes(piece)).toBeLessThanOrEqual(mostBytes);
          }
        },
      ),
      { numRuns: 1000 },
    );
    const half: Strips = [100, 2048, 4096, 5120];
    const pieces = cutStrips([half], { mostBytes: 100_000, mostStrips: 8 }).flat();
    expect(pieces.length).toBeGreaterThan(50);
    expect(joinedStrips(pieces)).toEqual([half]);
    // Both halves of a matrix's columns are the matrix.
    expect(joinedStrips([[2148, 2048, 4096, 5120], half])).toEqual([run(100, 100 + 4096 * 5120)]);
  });
});
