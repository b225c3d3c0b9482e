// Written safetensors files: aligned, atomic, and nothing left behind when the disk is full.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { CaravanError } from "../../src/errors.ts";
import {
  DTYPE_BYTES,
  type Dtype,
  isAligned,
  openCheckpoint,
  readSafetensorsHeader,
} from "../../src/model/safetensors.ts";
import {
  alignCheckpoint,
  alignedSizeBytes,
  alignMethod,
  alignSafetensors,
} from "../../src/model/safetensors-align.ts";
import { SafetensorsWriter, type TensorSpec } from "../../src/model/safetensors-writer.ts";

let dir: string;
beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), "caravan-writer-"));
});
afterAll(() => rm(dir, { recursive: true, force: true }));

const specs: TensorSpec[] = [
  { name: "bytes", dtype: "U8", shape: [3] },
  { name: "words", dtype: "U32", shape: [2, 2] },
  { name: "halves", dtype: "F16", shape: [5] },
];

/** A file as MLX writes it: header not padded, so the data starts anywhere. */
async function writeUnaligned(
  path: string,
  entries: [string, Dtype, number[], Uint8Array][],
  pad = 0,
): Promise<void> {
  let end = 0;
  const header: Record<string, unknown> = { __metadata__: { format: "mlx" } };
  for (const [name, dtype, shape, data] of entries) {
    header[name] = { dtype, shape, data_offsets: [end, end + data.length] };
    end += data.length;
  }
  const json = new TextEncoder().encode(`${JSON.stringify(header)}${" ".repeat(pad)}`);
  const prefix = new Uint8Array(8);
  new DataView(prefix.buffer).setBigUint64(0, BigInt(json.length), true);
  await writeFile(path, Buffer.concat([prefix, json, ...entries.map((e) => e[3])]));
}

async function tensorBytes(path: string, name: string): Promise<Uint8Array> {
  const header = await readSafetensorsHeader(path);
  const t = header.tensors.get(name);
  if (t === undefined) throw new Error(`no tensor ${name}`);
  return new Uint8Array(await readFile(path)).slice(t.offset, t.offset + t.sizeBytes);
}

const counting = (n: number) => Uint8Array.from({ length: n }, (_, i) => (i * 7 + 1) & 255);

describe("SafetensorsWriter", () => {
  test("puts every tensor on its alignment and the data on 64 bytes, whatever the order of pieces", async () => {
    const path = join(dir, "written.safetensors");
    const writer = await SafetensorsWriter.create(path, specs);
    await writer.write("halves", counting(4));
    await writer.write("bytes", counting(3));
    await writer.write("words", counting(16));
    await writer.write("halves", counting(6));
    expect(existsSync(path)).toBe(false);
    await writer.finish();
    const header = await readSafetensorsHeader(path);
    expect(header.dataStart % 64).toBe(0);
    expect([...header.tensors.values()].every(isAligned)).toBe(true);
    expect(header.sizeBytes).toBe(writer.layout.sizeBytes);
    expect(await tensorBytes(path, "halves")).toEqual(
      Buffer.concat([counting(4), counting(6)]) as Uint8Array,
    );
    expect(await tensorBytes(path, "words")).toEqual(counting(16));
    expect(existsSync(`${path}.partial`)).toBe(false);
  });

  test("aligns any mix of types and sizes", async () => {
    const dtypes = Object.keys(DTYPE_BYTES) as Dtype[];
    const path = join(dir, "any.safetensors");
    const shape = fc.array(fc.nat(5), { maxLength: 3 });
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(fc.constantFrom(...dtypes), shape), { maxLength: 8 }),
        async (list) => {
          const any = list.map(([dtype, s], i) => ({ name: `t${i}`, dtype, shape: s }));
          const writer = await SafetensorsWriter.create(path, any);
          for (const [name, t] of writer.layout.tensors) await writer.write(name, counting(t.sizeBytes));
          await writer.finish();
          const header = await readSafetensorsHeader(path);
          expect(header.dataStart % 64).toBe(0);
          for (const [name, t] of header.tensors) {
            expect(isAligned(t)).toBe(true);
            expect(await tensorBytes(path, name)).toEqual(counting(t.sizeBytes));
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  test("leaves nothing when a tensor is incomplete, too long, or the writer is dropped", async () => {
    const path = join(dir, "unfinished.safetensors");
    const incomplete = await SafetensorsWriter.create(path, specs);
    await incomplete.write("bytes", counting(3));
    await expect(incomplete.finish()).rejects.toThrow(/words has 0 of 16/);
    const long = await SafetensorsWriter.create(path, specs);
    await expect(long.write("bytes", counting(4))).rejects.toThrow(/too many/);
    const dropped = await SafetensorsWriter.create(path, specs);
    await dropped.abort();
    expect(existsSync(path)).toBe(false);
    expect(existsSync(`${path}.partial`)).toBe(false);
  });

  test("gives disk_full and no file when the file cannot grow", async () => {
    // A limit on the size of files is the one way to make writes fail that needs no special rights.
    const path = join(dir, "full.safetensors");
    const script = `
      import { SafetensorsWriter } from ${JSON.stringify(join(import.meta.dir, "../../src/model/safetensors-writer.ts"))};
      const writer = await SafetensorsWriter.create(${JSON.stringify(path)}, [{ name: "t", dtype: "U8", shape: [1 << 20] }]);
      try { await writer.write("t", new Uint8Array(1 << 20)); await writer.finish(); console.log("written"); }
      catch (error) { console.log(JSON.stringify(error)); }`;
    const child = Bun.spawn(
      ["sh", "-c", `ulimit -f 64; trap '' XFSZ; exec "$0" -e "$1"`, process.execPath, script],
      {
        stdout: "pipe",
        stderr: "pipe",
      },
    );
    const [out, err] = [await new Response(child.stdout).text(), await new Response(child.stderr).text()];
    if (!out.startsWith("{")) throw new Error(`unexpected: ${out}${err}`);
    const error = CaravanError.fromJSON(JSON.parse(out) as Record<string, unknown>);
    expect(error.code).toBe("disk_full");
    expect(error.where).toBe(path);
    expect((await readdir(dir)).filter((n) => n.startsWith("full"))).toEqual([]);
  });
});

describe("alignSafetensors", () => {
  test("pads the header where that is enough, and moves no byte of the data", async () => {
    const [src, dst] = [join(dir, "mlx.safetensors"), join(dir, "mlx-aligned.safetensors")];
    for (let pad = 0; pad < 8; pad++) {
      await writeUnaligned(
        src,
        [
          ["w", "U32", [3], counting(12)],
          ["s", "F16", [2], counting(4)],
        ],
        pad,
      );
      const before = await readSafetensorsHeader(src);
      const method = await alignSafetensors(src, dst);
      expect(method).toBe(before.dataStart % 4 === 0 ? "already-aligned" : "header-padded");
      const after = await readSafetensorsHeader(dst);
      expect([...after.tensors.values()].every(isAligned)).toBe(true);
      expect(after.sizeBytes).toBe(alignedSizeBytes(before));
      const data = async (h: typeof before) => (await readFile(h.path)).subarray(h.dataStart);
      expect(await data(after)).toEqual(await data(before));
    }
  });

  test("reorders tensors that are unaligned among themselves", async () => {
    const [src, dst] = [join(dir, "odd.safetensors"), join(dir, "odd-aligned.safetensors")];
    await writeUnaligned(src, [
      ["b", "U8", [1], counting(1)],
      ["w", "U32", [3], counting(12)],
      ["c", "U8", [1], counting(1)],
      ["x", "U32", [1], counting(4)],
    ]);
    const before = await readSafetensorsHeader(src);
    expect(alignMethod(before)).toBe("reordered");
    expect(await alignSafetensors(src, dst)).toBe("reordered");
    const after = await readSafetensorsHeader(dst);
    expect([...after.tensors.values()].every(isAligned)).toBe(true);
    expect(after.sizeBytes).toBe(alignedSizeBytes(before));
    expect(await tensorBytes(dst, "w")).toEqual(counting(12));
    expect(after.metadata.get("format")).toBe("mlx");
  });

  test("copies a golden checkpoint with its other files, aligned and unchanged", async () => {
    const golden = join(import.meta.dir, "../../../shared/golden/scout-4bit");
    if (!existsSync(golden)) {
      console.log("skipped: ../shared/golden is not here");
      return;
    }
    const out = join(dir, "scout-4bit");
    let last = [0, 1];
    await alignCheckpoint(golden, out, { onProgress: (done, total) => (last = [done, total]) });
    expect(last[0]).toBe(last[1] ?? -1);
    expect((await readdir(out)).sort()).toEqual((await readdir(golden)).sort());
    const [before, after] = [await openCheckpoint(golden), await openCheckpoint(out)];
    expect([...before.tensors.values()].every(isAligned)).toBe(false);
    for (const [name, tensor] of after.tensors) {
      expect(isAligned(tensor)).toBe(true);
      const original = before.tensors.get(name);
      expect(await tensorBytes(tensor.file, name)).toEqual(await tensorBytes(original?.file ?? "", name));
    }
    await expect(alignCheckpoint(golden, out)).rejects.toThrow(/already exists/);
  }, 120_000);
});
