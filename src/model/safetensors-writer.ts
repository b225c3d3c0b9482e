// Writes safetensors files whose tensors can be read through a pointer: the data starts on a multiple of 64 bytes
// and every tensor on a multiple of its element size. The format allows no holes, so tensors are laid out by
// falling element size and the header is padded with spaces.

import { CaravanError } from "../errors.ts";
import { AtomicFile } from "./atomic-file.ts";
import { byteSize, DTYPE_BYTES, type Dtype, isDtype, type TensorInfo } from "./safetensors-header.ts";

/** The data of every file we write starts on a multiple of this. */
export const DATA_ALIGNMENT = 64;

export interface TensorSpec {
  name: string;
  dtype: Dtype;
  /** Outermost first. */
  shape: readonly number[];
}

export interface SafetensorsLayout {
  /** Length prefix, JSON and padding: everything in front of the data. */
  head: Uint8Array;
  tensors: ReadonlyMap<string, TensorInfo>;
  /** Of the whole file. */
  sizeBytes: number;
}

/**
 * Decides where each tensor goes. Pure; sizes are exact before anything is written.
 * @throws CaravanError invalid_argument for a name that occurs twice or a shape that overflows
 */
export function layoutSafetensors(
  specs: readonly TensorSpec[],
  metadata: Record<string, string>,
): SafetensorsLayout {
  const order = [...specs].sort((a, b) => DTYPE_BYTES[b.dtype] - DTYPE_BYTES[a.dtype]);
  const entries: [string, unknown][] = [["__metadata__", metadata]];
  const placed: { name: string; dtype: Dtype; shape: number[]; begin: number; sizeBytes: number }[] = [];
  let end = 0;
  for (const { name, dtype, shape } of order) {
    const sizeBytes = isDtype(dtype) ? byteSize(shape, dtype) : undefined;
    if (sizeBytes === undefined || !Number.isSafeInteger(end + sizeBytes)) {
      throw new CaravanError("invalid_argument", `tensor ${name}: ${dtype} [${shape}] cannot be stored`);
    }
    entries.push([name, { dtype, shape, data_offsets: [end, end + sizeBytes] }]);
    placed.push({ name, dtype, shape: [...shape], begin: end, sizeBytes });
    end += sizeBytes;
  }
  const json = `{${entries.map(([k, value]) => `${JSON.stringify(k)}:${JSON.stringify(value)}`).join(",")}}`;
  const head = padHead(new TextEncoder().encode(json));
  const tensors = new Map<string, TensorInfo>();
  for (const { name, dtype, shape, begin, sizeBytes } of placed) {
    if (tensors.has(name) || name === "__metadata__") {
      throw new CaravanError("invalid_argument", `tensor ${name} is listed twice`);
    }
    tensors.set(name, { dtype, shape, offset: head.byteLength + begin, sizeBytes });
  }
  return { head, tensors, sizeBytes: head.byteLength + end };
}

/** The header's JSON with its length in front and spaces behind, so that the data starts on DATA_ALIGNMENT. */
export function padHead(json: Uint8Array): Uint8Array {
  const total = Math.ceil((8 + json.byteLength) / DATA_ALIGNMENT) * DATA_ALIGNMENT;
  const head = new Uint8Array(total).fill(0x20);
  new DataView(head.buffer).setBigUint64(0, BigInt(total - 8), true);
  head.set(json, 8);
  return head;
}

/**
 * Streams tensor data into one file. Pieces of one tensor are appended in order; different tensors may be written
 * in any order. The file gets its name only in `finish`, and only if every byte of every tensor is there.
 */
export class SafetensorsWriter {
  readonly layout: SafetensorsLayout;
  readonly #file: AtomicFile;
  readonly #written = new Map<string, number>();

  private constructor(layout: SafetensorsLayout, file: AtomicFile) {
    this.layout = layout;
    this.#file = file;
  }

  /** @throws CaravanError disk_full, bad_file, invalid_argument */
  static async create(
    path: string,
    specs: readonly TensorSpec[],
    metadata: Record<string, string> = { format: "mlx" },
  ): Promise<SafetensorsWriter> {
    const layout = layoutSafetensors(specs, metadata);
    const file = await AtomicFile.create(path);
    const writer = new SafetensorsWriter(layout, file);
    await file.write(layout.head, 0);
    return writer;
  }

  /** Appends `bytes` to the tensor. After an error the file is gone and the writer is of no more use. */
  async write(name: string, bytes: Uint8Array): Promise<void> {
    const tensor = this.layout.tensors.get(name);
    const done = this.#written.get(name) ?? 0;
    if (tensor === undefined || done + bytes.byteLength > tensor.sizeBytes) {
      await this.abort();
      throw new CaravanError("internal_error", `${bytes.byteLength} bytes too many for tensor ${name}`, {
        where: this.#file.path,
      });
    }
    this.#written.set(name, done + bytes.byteLength);
    await this.#file.write(bytes, tensor.offset + done);
  }

  /** Syncs and names the file. @throws CaravanError internal_error where a tensor is incomplete */
  async finish(): Promise<void> {
    for (const [name, tensor] of this.layout.tensors) {
      const done = this.#written.get(name) ?? 0;
      if (done !== tensor.sizeBytes) {
        await this.abort();
        throw new CaravanError("internal_error", `tensor ${name} has ${done} of ${tensor.sizeBytes} bytes`, {
          where: this.#file.path,
        });
      }
    }
    await this.#file.commit();
  }

  async abort(): Promise<void> {
    await this.#file.abort();
  }
}
