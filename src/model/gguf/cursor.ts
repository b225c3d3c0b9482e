// Reads a GGUF header front to back through a small window. Every read is checked against the end of the file
// before anything is allocated, so a header that lies about a length costs an error, not memory.

import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { CaravanError } from "../../errors.ts";
import { unreadable } from "../safetensors-header.ts";

const WINDOW_BYTES = 1 << 20;

export class Cursor {
  readonly path: string;
  readonly fileBytes: number;
  readonly #fd: number;
  #window = new Uint8Array(0);
  #view = new DataView(this.#window.buffer);
  /** File position of the window's first byte, and of the next read. */
  #windowStart = 0;
  #position = 0;
  readonly #decoder = new TextDecoder("utf-8");

  /** Opens the file; call `close` when done. @throws CaravanError bad_file */
  constructor(path: string) {
    this.path = path;
    try {
      this.#fd = openSync(path, "r");
    } catch (cause) {
      throw unreadable(path, cause);
    }
    const stat = fstatSync(this.#fd);
    if (!stat.isFile()) {
      closeSync(this.#fd);
      throw new CaravanError("bad_file", "is not a regular file", { where: path });
    }
    this.fileBytes = stat.size;
  }

  close(): void {
    closeSync(this.#fd);
  }

  get position(): number {
    return this.#position;
  }

  get remaining(): number {
    return this.fileBytes - this.#position;
  }

  fail(message: string): CaravanError {
    return new CaravanError("bad_file", message, {
      where: this.path,
      hint: "The GGUF file is damaged or incomplete: fetch it again.",
    });
  }

  // The window may be replaced by #take, so the place is asked for first and the view afterwards.

  u8(what: string): number {
    const at = this.#take(1, what);
    return this.#view.getUint8(at);
  }

  i8(what: string): number {
    const at = this.#take(1, what);
    return this.#view.getInt8(at);
  }

  u16(what: string): number {
    const at = this.#take(2, what);
    return this.#view.getUint16(at, true);
  }

  i16(what: string): number {
    const at = this.#take(2, what);
    return this.#view.getInt16(at, true);
  }

  u32(what: string): number {
    const at = this.#take(4, what);
    return this.#view.getUint32(at, true);
  }

  i32(what: string): number {
    const at = this.#take(4, what);
    return this.#view.getInt32(at, true);
  }

  f32(what: string): number {
    const at = this.#take(4, what);
    return this.#view.getFloat32(at, true);
  }

  f64(what: string): number {
    const at = this.#take(8, what);
    return this.#view.getFloat64(at, true);
  }

  u64(what: string): bigint {
    const at = this.#take(8, what);
    return this.#view.getBigUint64(at, true);
  }

  i64(what: string): bigint {
    const at = this.#take(8, what);
    return this.#view.getBigInt64(at, true);
  }

  /** A 64-bit count or size that must be at most `limit` (itself a safe integer). */
  count(what: string, limit: number): number {
    const n = this.u64(what);
    if (n > BigInt(limit)) throw this.fail(`${what} is ${n}, but at most ${limit} fit`);
    return Number(n);
  }

  /** A length-prefixed UTF-8 string of at most `limit` bytes; bytes that are not UTF-8 become U+FFFD. */
  text(what: string, limit: number): string {
    const length = this.count(`length of ${what}`, Math.min(limit, Math.max(0, this.remaining - 8)));
    const at = this.#take(length, what);
    return this.#decoder.decode(this.#window.subarray(at, at + length));
  }

  /** Makes `length` bytes readable and returns their place in the window. */
  #take(length: number, what: string): number {
    if (length > this.remaining) throw this.fail(`ends inside ${what}, at byte ${this.fileBytes}`);
    const at = this.#position - this.#windowStart;
    if (at + length > this.#window.byteLength) return this.#refill(length, what);
    this.#position += length;
    return at;
  }

  #refill(length: number, what: string): number {
    const size = Math.min(Math.max(length, WINDOW_BYTES), this.remaining);
    const window = new Uint8Array(size);
    let done = 0;
    while (done < size) {
      const got = readSync(this.#fd, window, done, size - done, this.#position + done);
      if (got === 0) throw this.fail(`ends inside ${what}`);
      done += got;
    }
    this.#window = window;
    this.#view = new DataView(window.buffer);
    this.#windowStart = this.#position;
    this.#position += length;
    return 0;
  }
}
