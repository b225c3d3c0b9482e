// GGUF headers: what is read, what is refused, split files, and that no file can crash the parser.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { parseGguf } from "../../src/model/gguf/parse.ts";
import { openGguf } from "../../src/model/gguf/split.ts";
import { buildGguf, floats, type Kv, type TensorInput, tinyModel } from "../tools/gguf-writer.ts";
import { mutate, seededRandom } from "../tools/seeded-random.ts";

let dir: string;
let path: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-gguf-"));
  path = join(dir, "a.gguf");
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

function errorOf(action: () => unknown): CaravanError {
  try {
    action();
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error("expected a CaravanError");
}

function parseBytes(bytes: Uint8Array) {
  writeFileSync(path, bytes);
  return parseGguf(path);
}

const tensor = (name: string, rest: Partial<TensorInput> = {}): TensorInput => ({
  name,
  type: "F32",
  shape: [2, 32],
  data: floats([2, 32], (i) => i),
  ...rest,
});

describe("parseGguf", () => {
  test("reads metadata of all kinds and the places of tensors", () => {
    const metadata: Record<string, Kv> = {
      "a.u32": { type: "u32", value: 7 },
      "a.f32": { type: "f32", value: 0.5 },
      "a.bool": { type: "bool", value: true },
      "a.text": { type: "string", value: "grüß" },
      "a.list": { type: "strings", value: ["x", "", "y z"] },
      "a.numbers": { type: "i32s", value: [-1, 2] },
      "a.big": { type: "u64", value: 2 ** 52 },
    };
    const file = parseBytes(
      buildGguf(metadata, [
        tensor("t"),
        tensor("q", { type: "Q4_K", shape: [3, 512], data: new Uint8Array(864) }),
      ]),
    );
    expect(Object.fromEntries(file.metadata)).toEqual({
      "a.u32": 7,
      "a.f32": 0.5,
      "a.bool": true,
      "a.text": "grüß",
      "a.list": ["x", "", "y z"],
      "a.numbers": [-1, 2],
      "a.big": 2 ** 52,
    });
    expect(file.tensors.get("q")).toMatchObject({ shape: [3, 512], sizeBytes: 864, type: { name: "Q4_K" } });
    expect((file.tensors.get("q")?.offset ?? 0) - (file.tensors.get("t")?.offset ?? 0)).toBe(256);
    expect(file.fileBytes - (file.tensors.get("q")?.offset ?? 0)).toBe(864);
  });

  const u32 = (value: number): Kv => ({ type: "u32", value });
  const refused: [string, Uint8Array, RegExp][] = [
    ["another format", new Uint8Array(64), /not a GGUF file/],
    ["a short file", new Uint8Array(10), /too short/],
    ["alignment 0", buildGguf({ "general.alignment": u32(0) }, [tensor("t")]), /not a power of two/],
    ["alignment 48", buildGguf({ "general.alignment": u32(48) }, [tensor("t")], 48), /not a power of two/],
    ["an unknown type", buildGguf({}, [tensor("t", { type: "none" })]), /"t" has unknown type/],
    ["five dimensions", buildGguf({}, [tensor("t", { shape: [1, 1, 1, 2, 32] })]), /5 dimensions/],
    ["no dimensions", buildGguf({}, [tensor("t", { shape: [] })]), /0 dimensions/],
    ["an overflowing product", buildGguf({}, [tensor("t", { shape: [2 ** 40, 2 ** 40] })]), /overflows/],
    ["an empty tensor", buildGguf({}, [tensor("t", { shape: [0, 32] })]), /is empty/],
    [
      "a row that is no whole block",
      buildGguf({}, [tensor("t", { type: "Q4_0", shape: [4, 20] })]),
      /multiple of Q4_0/,
    ],
    ["data beyond the end", buildGguf({}, [tensor("t", { shape: [3, 32] })]), /"t" ends at byte .*truncated/],
    [
      "overlapping tensors",
      buildGguf({}, [tensor("t", { data: new Uint8Array(32) }), tensor("u")]),
      /"u" overlaps tensor "t"/,
    ],
    ["one name twice", buildGguf({}, [tensor("t"), tensor("t")]), /listed twice/],
  ];
  for (const [what, bytes, message] of refused) {
    test(`refuses ${what}, naming the file`, () => {
      const error = errorOf(() => parseBytes(bytes));
      expect(error.code).toBe("bad_file");
      expect(error.where).toBe(path);
      expect(error.message).toMatch(message);
    });
  }

  test("refuses lying counts and lengths before it allocates for them", () => {
    const good = buildGguf({ "a.list": { type: "strings", value: ["x"] } }, [tensor("t")]);
    const places: [name: string, offset: number][] = [
      ["tensor count", 8],
      ["metadata count", 16],
      ["length of key", 24],
      ["length of array", 24 + 8 + 6 + 4 + 4],
    ];
    for (const [name, offset] of places) {
      for (const lie of [2n ** 64n - 1n, 2n ** 62n, 2n ** 33n, 2n ** 24n]) {
        const bytes = good.slice();
        new DataView(bytes.buffer).setBigUint64(offset, lie, true);
        const before = process.memoryUsage().rss;
        expect(errorOf(() => parseBytes(bytes)).message).toMatch(name);
        expect(process.memoryUsage().rss - before).toBeLessThan(100e6);
      }
    }
  });

  test("refuses arrays of arrays, big-endian files and versions it does not know", () => {
    const nested = buildGguf({ "a.list": { type: "strings", value: ["x"] } }, [tensor("t")]);
    new DataView(nested.buffer).setUint32(24 + 8 + 6 + 4, 9, true);
    expect(errorOf(() => parseBytes(nested)).message).toMatch(/array of arrays/);
    for (const [version, message] of [
      [1, /version 1/],
      [4, /version 4/],
      [0x03000000, /big-endian/],
    ] as const) {
      const bytes = buildGguf({}, [tensor("t")]);
      new DataView(bytes.buffer).setUint32(4, version, true);
      expect(errorOf(() => parseBytes(bytes)).message).toMatch(message);
    }
    expect(errorOf(() => parseGguf(join(dir, "none"))).message).toMatch(/does not exist/);
    expect(errorOf(() => parseGguf(dir)).message).toMatch(/not a regular file/);
  });

  test("of randomly damaged files gives tensors inside the file, or one CaravanError", () => {
    const { metadata, tensors } = tinyModel("llama");
    const small = tensors.slice(0, 3).map((t) => ({ ...t, shape: [2, 32], data: t.data.slice(0, 256) }));
    const good = buildGguf(metadata, small);
    const header = good.length - 3 * 256;
    let refusedCount = 0;
    for (let seed = 0; seed < 2000; seed++) {
      // damage the header, keep the data behind it
      const bytes = Uint8Array.from([
        ...mutate(good.subarray(0, header), seededRandom(seed)),
        ...good.subarray(header),
      ]);
      try {
        const file = parseBytes(bytes);
        for (const t of file.tensors.values()) {
          if (t.offset + t.sizeBytes > bytes.length) throw new Error(`seed ${seed}: outside the file`);
        }
      } catch (error) {
        if (!(error instanceof CaravanError) || error.code !== "bad_file")
          throw new Error(`seed ${seed}: ${error}`);
        refusedCount++;
      }
    }
    expect(refusedCount).toBeGreaterThan(500);
  });
});

describe("openGguf", () => {
  const split = (k: number, count: number, tensors: TensorInput[], total = 2) =>
    buildGguf(
      {
        ...(k === 0 ? { "general.architecture": { type: "string", value: "llama" } as Kv } : {}),
        "split.no": { type: "u32", value: k },
        "split.count": { type: "u32", value: count },
        "split.tensors.count": { type: "i32", value: total },
      },
      tensors,
    );
  const name = (k: number) => join(dir, `m-0000${k}-of-00002.gguf`);

  test("joins split files, whichever of them is named", () => {
    writeFileSync(name(1), split(0, 2, [tensor("a")]));
    writeFileSync(name(2), split(1, 2, [tensor("b")]));
    for (const named of [name(1), name(2)]) {
      const model = openGguf(named);
      expect(model.paths).toEqual([name(1), name(2)]);
      expect(model.metadata.get("general.architecture")).toBe("llama");
      expect(model.tensors.get("b")?.path).toBe(name(2));
    }
  });

  test("refuses missing, exchanged and renamed splits, and splits with too few tensors", () => {
    rmSync(name(2));
    expect(errorOf(() => openGguf(name(1))).where).toBe(name(2));
    writeFileSync(name(2), split(0, 2, [tensor("b")]));
    expect(errorOf(() => openGguf(name(1))).message).toMatch(/not split 2 of 2/);
    writeFileSync(name(2), split(1, 2, [tensor("a")]));
    expect(errorOf(() => openGguf(name(1))).message).toMatch(/is also in/);
    writeFileSync(name(1), split(0, 2, [tensor("a")], 3));
    writeFileSync(name(2), split(1, 2, [tensor("b")]));
    expect(errorOf(() => openGguf(name(1))).message).toMatch(/promises 3 tensors/);
    writeFileSync(path, split(0, 2, [tensor("a")]));
    expect(errorOf(() => openGguf(path)).message).toMatch(/not named/);
  });
});
