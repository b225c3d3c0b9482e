// .npy files: what is written is read back, in NumPy's form; a file appears only whole; damaged ones are refused.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { NpyWriter, readNpy } from "../../src/model/npy.ts";

let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-npy-"));
});
afterAll(() => {
  rmSync(dir, { recursive: true });
});

const VALUES = Float32Array.from([0, -0, 1.5, -3e38, 1e-45, Number.POSITIVE_INFINITY]);

async function write(path: string, shape: number[], pieces: Float32Array[]): Promise<void> {
  const writer = await NpyWriter.open(path, shape);
  for (const piece of pieces) await writer.write(piece);
  await writer.close();
}

describe("an array", () => {
  test.each([[[6]], [[2, 3]], [[3, 1, 2]]])(
    "of shape %j is read back as it was, bit for bit",
    async (shape) => {
      const path = join(dir, `${shape.join("x")}.npy`);
      await write(path, shape, [VALUES.subarray(0, 1), VALUES.subarray(1, 4), VALUES.subarray(4)]);
      const { shape: found, data } = await readNpy(path);
      expect(found).toEqual(shape);
      expect([...new Uint32Array(data.buffer)]).toEqual([...new Uint32Array(VALUES.slice().buffer)]);
    },
  );

  test("has NumPy's header: version 1.0, data on a multiple of 64, a newline before it", async () => {
    const path = join(dir, "header.npy");
    await write(path, [6], [VALUES]);
    const bytes = readFileSync(path);
    const start = bytes.length - VALUES.byteLength;
    expect(bytes.toString("latin1", 0, 8)).toBe("\x93NUMPY\x01\x00");
    expect(start % 64).toBe(0);
    expect(10 + bytes.readUInt16LE(8)).toBe(start);
    expect(bytes[start - 1]).toBe(0x0a);
    expect(bytes.toString("latin1", 10, start).trim()).toBe(
      "{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }",
    );
  });

  test("that is not written to its end leaves no file", async () => {
    const path = join(dir, "short.npy");
    await expect(write(path, [2, 3], [VALUES.subarray(0, 5)])).rejects.toMatchObject({
      code: "internal_error",
      where: path,
    });
    const writer = await NpyWriter.open(path, [6]);
    await writer.write(VALUES);
    await writer.abandon();
    expect(existsSync(path)).toBe(false);
    expect(readdirSync(dir).filter((name) => name.startsWith("short"))).toEqual([]);
  });

  test("that another writer began anew is given up: the file is never a mix of the two", async () => {
    const path = join(dir, "shared.npy");
    const first = await NpyWriter.open(path, [6]);
    await first.write(VALUES.subarray(0, 3));
    const second = await NpyWriter.open(path, [2]);
    await second.write(Float32Array.of(7, 8));
    await first.write(VALUES.subarray(3));
    await expect(first.close()).rejects.toThrow("another");
    await first.abandon();
    expect(existsSync(path)).toBe(false);
    await second.close();
    expect(await readNpy(path)).toEqual({ shape: [2], data: Float32Array.of(7, 8) });
    expect(readdirSync(dir).filter((name) => name.endsWith(".partial"))).toEqual([]);
  });

  test("cannot be written where there is no folder", async () => {
    await expect(NpyWriter.open(join(dir, "no/such/out.npy"), [1])).rejects.toMatchObject({
      name: "CaravanError",
    });
  });
});

describe("what is no float32 .npy file is refused", () => {
  const good = async (): Promise<Uint8Array> => {
    const path = join(dir, "good.npy");
    await write(path, [2, 3], [VALUES]);
    return new Uint8Array(readFileSync(path));
  };
  const replaced = (bytes: Uint8Array, from: string, to: string): Uint8Array =>
    new Uint8Array(Buffer.from(Buffer.from(bytes).toString("latin1").replace(from, to), "latin1"));
  const damages: [string, (bytes: Uint8Array) => Uint8Array][] = [
    ["nothing in it", () => new Uint8Array(0)],
    ["another magic", (bytes) => replaced(bytes, "NUMPY", "NUMPI")],
    ["doubles", (bytes) => replaced(bytes, "<f4", "<f8")],
    ["Fortran's order", (bytes) => replaced(bytes, "False", "True ")],
    ["no shape", (bytes) => replaced(bytes, "shape", "shapo")],
    ["a value missing", (bytes) => bytes.subarray(0, bytes.length - 4)],
    ["a byte too many", (bytes) => Uint8Array.from([...bytes, 0])],
    ["only half a header", (bytes) => bytes.subarray(0, 40)],
  ];
  test.each(damages)("%s", async (name, damage) => {
    const path = join(dir, "bad.npy");
    writeFileSync(path, damage(await good()));
    const read = readNpy(path);
    await expect(read, name).rejects.toMatchObject({ code: "bad_file", where: path });
  });
});
