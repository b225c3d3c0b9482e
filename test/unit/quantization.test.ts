// MLX's rule for how a module is quantized: its own entry in config.json first, then the shapes.

import { describe, expect, test } from "bun:test";
import { CaravanError } from "../../src/errors.ts";
import { isQuantized, type QuantizedShapes, quantizationOf } from "../../src/model/quantization.ts";

const PATH = "language_model.model.layers.3.self_attn.q_proj";
const FILE = "/m/model.safetensors";

/** What a checkpoint has of a module of 256 inputs. */
function shapes(bits: number, group: number, scalesDtype = "BF16"): QuantizedShapes {
  return { path: PATH, cols: 256, words: (256 * bits) / 32, scales: 256 / group, scalesDtype };
}

const read = (entry: unknown, found: QuantizedShapes) =>
  quantizationOf(entry === undefined ? undefined : { [PATH]: entry }, found, FILE);

function refusal(run: () => unknown): CaravanError {
  try {
    run();
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was refused");
}

describe("without an entry", () => {
  test.each([2, 3, 4, 5, 6, 8].flatMap((bits) => [32, 64, 128].map((group) => ({ bits, group }))))(
    "shapes of $bits bits in groups of $group say so, whatever stands at the top",
    ({ bits, group }) => {
      const top = { group_size: 64, bits: 4, mode: "affine" };
      for (const config of [undefined, {}, top])
        expect(quantizationOf(config, shapes(bits, group), FILE)).toEqual({ mode: "affine", bits, group });
    },
  );

  test.each([
    { mode: "nvfp4" as const, bits: 4, group: 16 },
    { mode: "mxfp4" as const, bits: 4, group: 32 },
    { mode: "mxfp8" as const, bits: 8, group: 32 },
  ])("byte scales mean $mode", ({ mode, bits, group }) => {
    expect(read(undefined, shapes(bits, group, "U8"))).toEqual({ mode, bits, group });
  });

  test.each([
    { bits: 4, group: 64 },
    { bits: 8, group: 16 },
    { bits: 6, group: 32 },
  ])("byte scales for $bits bits in groups of $group mean nothing", ({ bits, group }) => {
    const error = refusal(() => read(undefined, shapes(bits, group, "U8")));
    expect(error).toMatchObject({ code: "unsupported_model", where: FILE });
    expect(error.message).toContain(`${PATH}: ${bits} bits with byte scales for groups of ${group}`);
  });

  test("a module is quantized if it has scales", () => {
    for (const hasScales of [true, false])
      for (const config of [undefined, {}, { group_size: 64, bits: 4 }])
        expect(isQuantized(config, PATH, hasScales, FILE)).toBe(hasScales);
  });
});

describe("an entry", () => {
  test("may leave out mode, bits and group: affine, and what the shapes say", () => {
    const wanted = { mode: "affine", bits: 6, group: 64 };
    for (const entry of [{}, { bits: 6 }, { group_size: 64 }, { bits: 6, group_size: 64, mode: "affine" }])
      expect(read(entry, shapes(6, 64))).toEqual(wanted as ReturnType<typeof read>);
  });

  test("is found with and without `language_model.` before its path; the exact path first", () => {
    const bare = PATH.replace("language_model.", "");
    expect(quantizationOf({ [bare]: { bits: 8, group_size: 32 } }, shapes(8, 32), FILE).bits).toBe(8);
    const both = { [bare]: { bits: 4, group_size: 32 }, [PATH]: { bits: 8, group_size: 32 } };
    expect(quantizationOf(both, shapes(8, 32), FILE).bits).toBe(8);
    expect(isQuantized({ [bare]: false }, PATH, false, FILE)).toBe(false);
  });

  test("that contradicts the shapes is refused with both", () => {
    const error = refusal(() => read({ bits: 4, group_size: 32 }, shapes(8, 32)));
    expect(error).toMatchObject({ code: "bad_file", where: FILE });
    expect(error.message).toBe(
      `${PATH}: 64 words and 8 BF16 scales a row do not hold 256 columns as affine with 4 bits in groups of 32`,
    );
    const modes: [unknown, QuantizedShapes][] = [
      [{ mode: "mxfp4" }, shapes(4, 32)],
      [{ mode: "mxfp4" }, shapes(8, 32, "U8")],
      [{ mode: "affine" }, shapes(8, 32, "U8")],
      [{ mode: "nvfp4" }, shapes(4, 32, "U8")],
    ];
    for (const [entry, found] of modes)
      expect(refusal(() => read(entry, found))).toMatchObject({ code: "bad_file" });
  });

  test.each([{ mode: "awq" }, { mode: 4 }, { bits: "4" }, { group_size: null, bits: [] }])(
    "of an unknown kind is refused by the module's name: %j",
    (entry) => {
      const error = refusal(() => read(entry, shapes(4, 64)));
      expect(error).toMatchObject({ code: "unsupported_model", where: FILE });
      expect(error.message).toContain(`quantization of ${PATH}`);
      expect(error.hint).toContain("mxfp4, mxfp8, nvfp4");
    },
  );

  test("and scales must agree", () => {
    const says = (entry: unknown, hasScales: boolean) =>
      refusal(() => isQuantized({ [PATH]: entry }, PATH, hasScales, FILE));
    expect(says({ bits: 4 }, false).message).toBe(`${PATH} is quantized by config.json, but has no scales`);
    expect(says(false, true).message).toBe(`${PATH} is left in float by config.json, but has scales`);
    expect(isQuantized({ [PATH]: { bits: 4 } }, PATH, true, FILE)).toBe(true);
    expect(isQuantized({ [PATH]: false }, PATH, false, FILE)).toBe(false);
  });
});
