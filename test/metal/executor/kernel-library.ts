// A compiled kernel library from TypeScript: dispatches with typed arrays as buffers, reports with source lines.

import { CString, dlopen, FFIType, type Pointer, ptr } from "bun:ffi";

/** Layout of msl_dispatch (executor.h). */
const DISPATCH = {
  groups: 0,
  threads: 12,
  grid: 24,
  buffers: 40,
  threadgroupLengths: 536,
  flags: 784,
  seed: 788,
  bytesRead: 792,
  size: 1784,
};
const BUFFERS = 31;
const REPORT_BYTES = 1 << 16;

export type Dimensions = readonly [number, number, number];
export type BufferContent =
  | Uint8Array
  | Uint16Array
  | Int32Array
  | Uint32Array
  | Float32Array
  | BigUint64Array;

export interface Dispatch {
  /** By index; undefined: not bound. */
  buffers: readonly (BufferContent | undefined)[];
  groups: Dimensions;
  threads: Dimensions;
  /** Exact number of threads, instead of groups * threads. */
  grid?: Dimensions;
  /** Bytes by index. */
  threadgroupLengths?: readonly number[];
  /** The library is an instrumented one: report races, bounds and so on. */
  check?: boolean;
  /** Threads run in an order drawn from this. */
  shuffle?: number;
}

export interface DispatchReport {
  /** What went wrong; empty when all is well. */
  lines: string[];
  /** By buffer: bytes loaded by all threads, repeats counted. Checked libraries only. */
  bytesRead: number[];
}

export class KernelLibrary {
  readonly #path: string;
  readonly #library;

  constructor(path: string) {
    this.#path = path;
    this.#library = dlopen(path, {
      msl_run: { args: [FFIType.ptr, FFIType.ptr, FFIType.ptr, FFIType.u64], returns: FFIType.i32 },
      msl_kernel_name: { args: [FFIType.i32, FFIType.ptr], returns: FFIType.ptr },
      msl_set_constant: { args: [FFIType.i32, FFIType.ptr, FFIType.u64], returns: FFIType.i32 },
      msl_clear_constants: { args: [], returns: FFIType.void },
    });
  }

  kernels(): string[] {
    const names: string[] = [];
    for (let i = 0; ; i++) {
      const name = this.#library.symbols.msl_kernel_name(i, null) as Pointer | null;
      if (name === null) return names;
      names.push(new CString(name).toString());
    }
  }

  /** Function constants by index: booleans, or unsigned integers. Those that the library lacks are an error. */
  setConstants(values: ReadonlyMap<number, number | boolean>): void {
    this.#library.symbols.msl_clear_constants();
    for (const [index, value] of values) {
      const bytes =
        typeof value === "boolean"
          ? new Uint8Array([value ? 1 : 0])
          : new Uint8Array(new Uint32Array([value]).buffer);
      const set = this.#library.symbols.msl_set_constant(index, ptr(bytes), BigInt(bytes.length));
      if (set !== 1)
        throw new Error(`function constant ${index}: ${set < 0 ? "another size" : "not in the library"}`);
    }
  }

  run(kernel: string, dispatch: Dispatch): DispatchReport {
    const bytes = new Uint8Array(DISPATCH.size);
    const view = new DataView(bytes.buffer);
    for (let k = 0; k < 3; k++) {
      view.setUint32(DISPATCH.groups + 4 * k, dispatch.groups[k] ?? 1, true);
      view.setUint32(DISPATCH.threads + 4 * k, dispatch.threads[k] ?? 1, true);
      view.setUint32(DISPATCH.grid + 4 * k, dispatch.grid?.[k] ?? 0, true);
    }
    dispatch.buffers.forEach((buffer, index) => {
      if (buffer === undefined) return;
      view.setBigUint64(DISPATCH.buffers + 16 * index, BigInt(ptr(buffer)), true);
      view.setBigUint64(DISPATCH.buffers + 16 * index + 8, BigInt(buffer.byteLength), true);
    });
    dispatch.threadgroupLengths?.forEach((length, index) => {
      view.setBigUint64(DISPATCH.threadgroupLengths + 8 * index, BigInt(length), true);
    });
    view.setUint32(DISPATCH.flags, (dispatch.check ? 1 : 0) | (dispatch.shuffle === undefined ? 0 : 2), true);
    view.setUint32(DISPATCH.seed, dispatch.shuffle ?? 1, true);
    const report = new Uint8Array(REPORT_BYTES);
    const name = new TextEncoder().encode(`${kernel}\0`);
    this.#library.symbols.msl_run(ptr(name), ptr(bytes), ptr(report), BigInt(REPORT_BYTES));
    const text = new TextDecoder().decode(report.subarray(0, report.indexOf(0)));
    const bytesRead = Array.from({ length: BUFFERS }, (_, i) =>
      Number(view.getBigUint64(DISPATCH.bytesRead + 8 * i, true)),
    );
    return {
      lines: text
        .split("\n")
        .filter((line) => line !== "")
        .map((line) => this.#withSourceLine(line)),
      bytesRead,
    };
  }

  close(): void {
    this.#library.close();
  }

  #withSourceLine(line: string): string {
    const found = /@pc 0x([0-9a-f]+)/.exec(line);
    if (!found?.[1]) return line;
    const address = `0x${(Number.parseInt(found[1], 16) - 1).toString(16)}`;
    const where = Bun.spawnSync(["addr2line", "-e", this.#path, address]).stdout.toString().trim();
    return line.replace(found[0], `at ${where}`);
  }
}
