// A file on its way: its bytes with holes, and beside it a map of which bytes are there, so that a download goes on
// after any end of the program. The map may lag behind the bytes (they are then fetched again), never run ahead of a
// write; what a power cut does to either is found by the hash of the whole file.

import { type FileHandle, open, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { writeError } from "../atomic-file.ts";

const MAP_SCHEMA = v.object({
  version: v.literal(1),
  size: v.number(),
  chunk_bytes: v.pipe(v.number(), v.safeInteger(), v.minValue(1)),
  /** Bytes that are there from the start of each chunk. */
  done: v.array(v.pipe(v.number(), v.safeInteger(), v.minValue(0))),
});

/** The map is written at most this often while bytes come in, and at the end of every chunk. */
const SAVE_EVERY_MS = 500;
const HASH_BLOCK_BYTES = 4 * 1024 * 1024;

export class PartFile {
  readonly path: string;
  readonly size: number;
  readonly chunkBytes: number;
  readonly #file: FileHandle;
  #done: number[];
  #savedAt = 0;
  #saving: Promise<void> = Promise.resolve();

  private constructor(path: string, size: number, chunkBytes: number, file: FileHandle, done: number[]) {
    this.path = path;
    this.size = size;
    this.chunkBytes = chunkBytes;
    this.#file = file;
    this.#done = done;
  }

  /** Opens or begins the part file at `path`. A map that does not fit the file means beginning anew; a map with other
   * chunks than `chunkBytes` is kept as it is. Throws disk_full or bad_file. */
  static async open(path: string, size: number, chunkBytes: number): Promise<PartFile> {
    try {
      const known = await readMap(path, size);
      const file = await open(path, known === undefined ? "w+" : "r+");
      const chunk = known?.chunkBytes ?? chunkBytes;
      const done = known?.done ?? new Array<number>(chunkCount(size, chunk)).fill(0);
      return new PartFile(path, size, chunk, file, done);
    } catch (cause) {
      throw diskFault(path, cause);
    }
  }

  /** Bytes that an earlier download left at `path`, without opening it for writing. */
  static async bytesThere(path: string, size: number): Promise<number> {
    const known = await readMap(path, size);
    return known?.done.reduce((sum, bytes) => sum + bytes, 0) ?? 0;
  }

  get chunks(): number {
    return this.#done.length;
  }

  get doneBytes(): number {
    return this.#done.reduce((sum, bytes) => sum + bytes, 0);
  }

  /** Bytes that a chunk still lacks: from `start` to before `end`. Equal when it is whole. */
  rest(chunk: number): { start: number; end: number } {
    const begin = chunk * this.chunkBytes;
    return { start: begin + (this.#done[chunk] ?? 0), end: Math.min(this.size, begin + this.chunkBytes) };
  }

  /** Appends to a chunk; `bytes` must not be longer than its rest. Throws disk_full or bad_file; what was there stays. */
  async append(chunk: number, bytes: Uint8Array): Promise<void> {
    const { start } = this.rest(chunk);
    let written = 0;
    try {
      while (written < bytes.byteLength) {
        const result = await this.#file.write(bytes, written, bytes.byteLength - written, start + written);
        if (result.bytesWritten === 0) throw Object.assign(new Error("nothing written"), { code: "ENOSPC" });
        written += result.bytesWritten;
      }
    } catch (cause) {
      throw diskFault(this.path, cause);
    } finally {
      this.#done[chunk] = (this.#done[chunk] ?? 0) + written;
    }
    const whole = this.rest(chunk);
    if (whole.start === whole.end || Date.now() - this.#savedAt >= SAVE_EVERY_MS) await this.save();
  }

  /** Forgets everything that was downloaded. */
  async reset(): Promise<void> {
    this.#done = this.#done.map(() => 0);
    try {
      await this.#file.truncate(0);
    } catch (cause) {
      throw diskFault(this.path, cause);
    }
    await this.save();
  }

  /** Writes the map, after any writing of it that is under way. */
  save(): Promise<void> {
    this.#savedAt = Date.now();
    const run = async (): Promise<void> => {
      const map = { version: 1, size: this.size, chunk_bytes: this.chunkBytes, done: this.#done };
      try {
        await writeFile(`${mapFile(this.path)}.new`, JSON.stringify(map));
        await rename(`${mapFile(this.path)}.new`, mapFile(this.path));
      } catch (cause) {
        throw diskFault(this.path, cause);
      }
    };
    const next = this.#saving.then(run, run);
    this.#saving = next.catch(() => undefined); // the caller of this save hears of it; the next one tries again
    return next;
  }

  /** Hash of the content: sha256, or the id that git gives a blob. Reads the whole file. */
  async hash(kind: "sha256" | "git", signal: AbortSignal): Promise<string> {
    return hashFile(this.#file, this.size, kind, signal);
  }

  /** Closes the file, makes it durable under `path` and drops the map. */
  async finish(path: string): Promise<void> {
    try {
      await this.#file.datasync();
      await this.#file.close();
      await rename(this.path, path);
      await rm(mapFile(this.path), { force: true });
    } catch (cause) {
      throw diskFault(path, cause);
    }
  }

  /** Closes the file and keeps what is there. The map is saved if the disk allows it. */
  async close(): Promise<void> {
    try {
      await this.save();
    } catch (error) {
      // On a full disk the map of a moment ago stays: its bytes are there, a few newer ones will come again.
      if (!(error instanceof CaravanError && error.code === "disk_full")) throw error;
    } finally {
      await this.#file.close();
    }
  }
}

/** Hash of an open file of `size` bytes. `onBytes`: of each piece that was read. */
export async function hashFile(
  file: FileHandle,
  size: number,
  kind: "sha256" | "git",
  signal: AbortSignal,
  onBytes: (bytes: number) => void = () => undefined,
): Promise<string> {
  const hasher = new Bun.CryptoHasher(kind === "git" ? "sha1" : "sha256");
  if (kind === "git") hasher.update(`blob ${size}\0`);
  const block = new Uint8Array(Math.min(HASH_BLOCK_BYTES, Math.max(1, size)));
  for (let at = 0; at < size; ) {
    signal.throwIfAborted();
    const { bytesRead } = await file.read(block, 0, Math.min(block.byteLength, size - at), at);
    if (bytesRead === 0) break; // shorter than it should be: the hash will differ
    hasher.update(block.subarray(0, bytesRead));
    at += bytesRead;
    onBytes(bytesRead);
  }
  return hasher.digest("hex");
}

function mapFile(path: string): string {
  return `${path}.json`;
}

function chunkCount(size: number, chunkBytes: number): number {
  return Math.max(1, Math.ceil(size / chunkBytes));
}

/** The map beside `path`, if it is one, fits `size`, and the file is as long as the map says. */
async function readMap(
  path: string,
  size: number,
): Promise<{ chunkBytes: number; done: number[] } | undefined> {
  let value: unknown;
  let length: number;
  try {
    value = JSON.parse(await readFile(mapFile(path), "utf8"));
    length = (await stat(path)).size;
  } catch {
    return undefined; // no map, half a map, or no file: there is nothing to go on from
  }
  const parsed = v.safeParse(MAP_SCHEMA, value);
  if (!parsed.success || parsed.output.size !== size) return undefined;
  const { chunk_bytes: chunkBytes, done } = parsed.output;
  if (done.length !== chunkCount(size, chunkBytes)) return undefined;
  for (const [chunk, bytes] of done.entries()) {
    const begin = chunk * chunkBytes;
    if (bytes > Math.min(chunkBytes, size - begin)) return undefined;
    if (bytes > 0 && begin + bytes > length) return undefined;
  }
  return { chunkBytes, done };
}

function diskFault(path: string, cause: unknown): CaravanError {
  const error = writeError(path, cause);
  if (error.code !== "disk_full") return error;
  return new CaravanError("disk_full", error.message, {
    where: path,
    hint: "free some space and run the command again; what was downloaded is kept",
    cause,
  });
}
