// NumPy's .npy files (format version 1.0): float32 arrays, written as they come and read whole.
// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

import { readFile } from "node:fs/promises";
import { CaravanError } from "../errors.ts";
import { AtomicFile } from "./atomic-file.ts";

const MAGIC = "\x93NUMPY\x01\x00";

function header(shape: readonly number[]): Uint8Array {
  const tuple = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${tuple}), }`;
  const length = Math.ceil((MAGIC.length + 2 + text.length + 1) / 64) * 64 - MAGIC.length - 2;
  const bytes = new Uint8Array(MAGIC.length + 2 + length).fill(0x20);
  for (let i = 0; i < MAGIC.length; i++) bytes[i] = MAGIC.charCodeAt(i);
  new DataView(bytes.buffer).setUint16(MAGIC.length, length, true);
  for (let i = 0; i < text.length; i++) bytes[MAGIC.length + 2 + i] = text.charCodeAt(i);
  bytes[bytes.length - 1] = 0x0a;
  return bytes;
}

/** Writes an array of a known shape in pieces. The file appears under its name only when it is whole. */
export class NpyWriter {
  #written = 0;
  #position: number;

  private constructor(
    private readonly file: AtomicFile,
    private readonly shape: readonly number[],
    headerBytes: number,
  ) {
    this.#position = headerBytes;
  }

  /** @throws CaravanError disk_full, or bad_file where the folder cannot be written */
  static async open(path: string, shape: readonly number[]): Promise<NpyWriter> {
    const file = await AtomicFile.create(path);
    const first = header(shape);
    await file.write(first, 0);
    return new NpyWriter(file, shape, first.byteLength);
  }

  async write(values: Float32Array): Promise<void> {
    await this.file.write(
      new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
      this.#position,
    );
    this.#position += values.byteLength;
    this.#written += values.length;
  }

  /** Throws internal_error when values are missing. */
  async close(): Promise<void> {
    const expected = this.shape.reduce((product, size) => product * size, 1);
    if (this.#written !== expected) {
      await this.file.abort();
      throw new CaravanError("internal_error", `${this.#written} of ${expected} values were written`, {
        where: this.file.path,
      });
    }
    await this.file.commit();
  }

  /** Drops what was written; harmless after a failure and after close. */
  async abandon(): Promise<void> {
    await this.file.abort();
  }
}

export interface NpyArray {
  shape: number[];
  data: Float32Array;
}

export async function readNpy(path: string): Promise<NpyArray> {
  const bytes = await readFile(path);
  const bad = (why: string) =>
    new CaravanError("bad_file", `is not a float32 .npy file: ${why}`, { where: path });
  if (bytes.length < 10 || bytes.toString("latin1", 0, 8) !== MAGIC) throw bad("wrong magic");
  const start = 10 + bytes.readUInt16LE(8);
  const text = bytes.toString("latin1", 10, start);
  const shape = /'shape': \(([\d, ]*)\)/
    .exec(text)?.[1]
    ?.split(",")
    .filter((size) => size.trim() !== "")
    .map(Number);
  if (shape === undefined || !text.includes("'<f4'") || text.includes("'fortran_order': True"))
    throw bad(text.trim());
  const count = shape.reduce((product, size) => product * size, 1);
  if (bytes.length !== start + count * 4) throw bad(`${bytes.length} bytes for ${count} values`);
  return {
    shape,
    data: new Float32Array(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + bytes.length)),
  };
}
