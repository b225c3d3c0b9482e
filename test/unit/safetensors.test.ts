// Headers of safetensors files: what is read, what is refused, and that nothing in a file can crash the reader.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdtemp, open, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { findDuplicateKey } from "../../src/model/duplicate-keys.ts";
import { openCheckpoint, readSafetensorsHeader } from "../../src/model/safetensors.ts";
import { mutate, seededRandom } from "../tools/seeded-random.ts";

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), "caravan-safetensors-"));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

/** A file with this header text and so many bytes of data. */
function fileBytes(header: string, dataBytes: number): Uint8Array {
  const json = new TextEncoder().encode(header);
  const out = new Uint8Array(8 + json.length + dataBytes);
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length), true);
  out.set(json, 8);
  return out;
}

async function write(name: string, header: string | object, dataBytes: number): Promise<string> {
  const path = join(dir, name);
  await writeFile(path, fileBytes(typeof header === "string" ? header : JSON.stringify(header), dataBytes));
  return path;
}

async function errorOf(action: Promise<unknown>): Promise<CaravanError> {
  const error = await action.then(
    () => undefined,
    (e: unknown) => e,
  );
  if (!(error instanceof CaravanError)) throw new Error(`expected a CaravanError, got ${error}`);
  return error;
}

const U8x4 = { dtype: "U8", shape: [4], data_offsets: [0, 4] };

describe("a safetensors header", () => {
  test("gives offsets from the start of the file, shapes, types and metadata", async () => {
    const header = {
      __metadata__: { format: "mlx" },
      a: { dtype: "F32", shape: [2, 3], data_offsets: [0, 24] },
      b: { dtype: "BF16", shape: [], data_offsets: [24, 26] },
      empty: { dtype: "I64", shape: [0, 7], data_offsets: [26, 26] },
    };
    const path = await write("good.safetensors", header, 26);
    const read = await readSafetensorsHeader(path);
    const start = 8 + JSON.stringify(header).length;
    expect(read.dataStart).toBe(start);
    expect(read.sizeBytes).toBe(start + 26);
    expect(read.metadata.get("format")).toBe("mlx");
    expect(read.tensors.get("a")).toEqual({ dtype: "F32", shape: [2, 3], offset: start, sizeBytes: 24 });
    expect(read.tensors.get("b")).toEqual({ dtype: "BF16", shape: [], offset: start + 24, sizeBytes: 2 });
    expect(read.tensors.get("empty")?.sizeBytes).toBe(0);
  });

  test("of a sparse file of 226 GB, with a tensor of more than 2^32 elements, is exact", async () => {
    const elements = 2 ** 32 + 2 ** 31;
    const first = elements * 2;
    const total = 226 * 10 ** 9;
    const header = JSON.stringify({
      big: { dtype: "BF16", shape: [3, elements / 3], data_offsets: [0, first] },
      rest: { dtype: "U8", shape: [total - first], data_offsets: [first, total] },
    });
    const path = await write("sparse.safetensors", header, 0);
    const file = await open(path, "r+");
    try {
      await file.truncate(8 + header.length + total);
    } catch (error) {
      console.log(`skipped: the file system has no sparse files of this size (${error})`);
      return;
    } finally {
      await file.close();
    }
    const read = await readSafetensorsHeader(path);
    expect(read.tensors.get("big")?.sizeBytes).toBe(first);
    expect(read.tensors.get("rest")?.offset).toBe(8 + header.length + first);
    await rm(path);
  });

  const refused: [what: string, header: string | object, dataBytes: number, message: RegExp][] = [
    ["a truncated file", { a: U8x4 }, 3, /"a".*truncated/],
    ["an oversized file", { a: U8x4 }, 5, /tensors end at byte/],
    ["an unknown dtype", { a: { ...U8x4, dtype: "F12" } }, 4, /"a".*unknown dtype/],
    ["a dtype from the prototype", { a: { ...U8x4, dtype: "toString" } }, 4, /unknown dtype/],
    ["a shape that does not give the size", { a: { ...U8x4, shape: [5] } }, 4, /takes 5 bytes/],
    ["a shape whose product overflows", { a: { ...U8x4, shape: [2 ** 40, 2 ** 40] } }, 4, /overflows/],
    [
      "a shape that overflows to the right size",
      { a: { ...U8x4, shape: [2 ** 52, 2 ** 12 + 4] } },
      4,
      /overflows/,
    ],
    ["a negative dimension", { a: { ...U8x4, shape: [-4] } }, 4, /"a"/],
    ["a fractional dimension", { a: { ...U8x4, shape: [1.5] } }, 4, /"a"/],
    ["an end before the beginning", { a: { ...U8x4, data_offsets: [4, 0] } }, 4, /behind its end/],
    [
      "two tensors on the same bytes",
      { a: U8x4, b: { ...U8x4, data_offsets: [2, 6] } },
      6,
      /"b".*overlaps.*"a"/,
    ],
    ["a missing field", { a: { dtype: "U8", shape: [4] } }, 4, /"a"/],
    ["metadata that is not text", { __metadata__: { a: 1 }, a: U8x4 }, 4, /__metadata__/],
    [
      "a duplicate tensor",
      `{"a":${JSON.stringify(U8x4)},"a":${JSON.stringify(U8x4)}}`,
      4,
      /"a" occurs twice/,
    ],
    [
      "a duplicate under an escape",
      `{"a":${JSON.stringify(U8x4)},"\\u0061":${JSON.stringify(U8x4)}}`,
      4,
      /twice/,
    ],
    [
      "a duplicate field",
      '{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
      4,
      /"dtype" occurs twice/,
    ],
    ["broken JSON", '{"a":', 0, /not valid JSON/],
    ["a JSON array", "[1]", 0, /begin with/],
  ];
  for (const [what, header, dataBytes, message] of refused) {
    test(`is refused for ${what}, naming the file`, async () => {
      const path = await write("bad.safetensors", header, dataBytes);
      const error = await errorOf(readSafetensorsHeader(path));
      expect(error.code).toBe("bad_file");
      expect(error.where).toBe(path);
      expect(error.message).toMatch(message);
    });
  }

  test("is refused when its length runs over the file, over the limit, or the file is too short", async () => {
    const path = join(dir, "length.safetensors");
    for (const [length, message] of [
      [1000n, /does not fit/],
      [2n ** 63n, /over the limit/],
      [100_000_001n, /over the limit/],
    ] as const) {
      const bytes = new Uint8Array(64);
      new DataView(bytes.buffer).setBigUint64(0, length, true);
      await writeFile(path, bytes);
      expect((await errorOf(readSafetensorsHeader(path))).message).toMatch(message);
    }
    await writeFile(path, new Uint8Array(5));
    expect((await errorOf(readSafetensorsHeader(path))).message).toMatch(/too short/);
    expect((await errorOf(readSafetensorsHeader(dir))).message).toMatch(/not a regular file/);
    expect((await errorOf(readSafetensorsHeader(join(dir, "none")))).message).toMatch(/does not exist/);
  });

  test("that is damaged at random gives tensors inside the file, or one CaravanError", async () => {
    const good = fileBytes(
      JSON.stringify({
        __metadata__: { k: "v" },
        a: { dtype: "F16", shape: [2, 4], data_offsets: [0, 16] },
        b: { ...U8x4, data_offsets: [16, 20] },
      }),
      20,
    );
    const path = join(dir, "fuzz.safetensors");
    let refusedCount = 0;
    for (let seed = 0; seed < 1500; seed++) {
      const bytes = mutate(good, seededRandom(seed));
      await writeFile(path, bytes);
      try {
        const read = await readSafetensorsHeader(path);
        for (const t of read.tensors.values()) {
          if (t.offset < 8 || t.offset + t.sizeBytes > bytes.length)
            throw new Error(`seed ${seed}: outside the file`);
        }
      } catch (error) {
        if (!(error instanceof CaravanError) || error.code !== "bad_file")
          throw new Error(`seed ${seed}: ${error}`);
        refusedCount++;
      }
    }
    expect(refusedCount).toBeGreaterThan(1000);
  });
});

describe("findDuplicateKey", () => {
  test("tells keys from values and objects from each other", () => {
    expect(findDuplicateKey('{"a":"a","b":{"a":["a","a",{"a":1}]},"c":"\\"a\\":"}')).toBeUndefined();
    expect(findDuplicateKey('{"x":[{"k":1},{"k":1,"k":2}]}')).toBe("k");
    expect(findDuplicateKey('{"__proto__":1,"a":2,"__proto__":3}')).toBe("__proto__");
  });
});

describe("openCheckpoint", () => {
  const shard = (k: number) => `model-0000${k}-of-00002.safetensors`;
  async function folder(name: string, files: Record<string, string | Uint8Array>): Promise<string> {
    const path = join(dir, name);
    await rm(path, { recursive: true, force: true });
    for (const [file, content] of Object.entries(files)) await Bun.write(join(path, file), content);
    return path;
  }
  const one = fileBytes(JSON.stringify({ a: U8x4 }), 4);
  const two = fileBytes(JSON.stringify({ b: U8x4 }), 4);
  const index = (map: Record<string, string>) =>
    JSON.stringify({ metadata: { total_size: 8 }, weight_map: map });

  test("merges the shards of an index, or finds them by their names", async () => {
    const files = { [shard(1)]: one, [shard(2)]: two };
    const indexed = { ...files, "model.safetensors.index.json": index({ a: shard(1), b: shard(2) }) };
    for (const path of [await folder("indexed", indexed), await folder("named", files)]) {
      const checkpoint = await openCheckpoint(path);
      expect([...checkpoint.tensors.keys()]).toEqual(["a", "b"]);
      expect(checkpoint.tensors.get("b")?.file).toBe(join(path, shard(2)));
      expect(checkpoint.sizeBytes).toBe(8);
    }
  });

  test("names the shard that is missing, and the tensor that is not where the index says", async () => {
    const gone = await folder("gone", {
      [shard(1)]: one,
      "model.safetensors.index.json": index({ a: shard(1), b: shard(2) }),
    });
    expect((await errorOf(openCheckpoint(gone))).where).toBe(join(gone, shard(2)));
    const unindexed = await folder("unindexed", { [shard(1)]: one });
    expect((await errorOf(openCheckpoint(unindexed))).where).toBe(join(unindexed, shard(2)));
    const lying = await folder("lying", {
      [shard(1)]: one,
      "model.safetensors.index.json": index({ a: shard(1), b: shard(1) }),
    });
    const error = await errorOf(openCheckpoint(lying));
    expect(error.where).toBe(join(lying, shard(1)));
    expect(error.message).toMatch(/"b"/);
  });

  test("refuses an index that leaves the folder, is broken, or two shards with one tensor", async () => {
    const outside = await folder("outside", {
      "model.safetensors.index.json": index({ a: "../indexed/model.safetensors" }),
    });
    expect((await errorOf(openCheckpoint(outside))).message).toMatch(/plain file name/);
    const broken = await folder("broken", { "model.safetensors.index.json": "{" });
    expect((await errorOf(openCheckpoint(broken))).code).toBe("bad_file");
    const twice = await folder("twice", { [shard(1)]: one, [shard(2)]: one });
    expect((await errorOf(openCheckpoint(twice))).message).toMatch(/is also in/);
    const empty = await folder("empty", { "config.json": "{}" });
    expect((await errorOf(openCheckpoint(empty))).message).toMatch(/holds neither/);
  });

  test("opens every golden checkpoint", async () => {
    const golden = join(import.meta.dir, "../../../shared/golden");
    if (!existsSync(golden)) {
      console.log("skipped: ../shared/golden is not here");
      return;
    }
    let opened = 0;
    for (const entry of await readdir(golden, { withFileTypes: true })) {
      if (!entry.isDirectory()) continue;
      const checkpoint = await openCheckpoint(join(golden, entry.name));
      expect(checkpoint.tensors.size).toBeGreaterThan(10);
      opened++;
    }
    expect(opened).toBeGreaterThan(5);
  });
});
