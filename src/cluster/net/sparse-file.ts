// Strips of a file (../strips.ts) packed into one run of bytes, and put back to their places in a file that is mostly a hole. A matrix's
// columns are thousands of strips of a few KB: they are read and written by the megabyte, not one by one.

import type { FileHandle } from "node:fs/promises";
import { CaravanError } from "../../errors.ts";
import { writeError } from "../../model/atomic-file.ts";
import { endOf, type Strips, stripsOf } from "../strips.ts";

export const DISK_BLOCK_BYTES = 4096;
/** Strips that are so close are written with what lies between them: a block is written as a whole anyway. */
const CLOSE_BYTES = 2 * DISK_BLOCK_BYTES;
/** Reading more than is needed costs less than asking for each strip. */
const CLOSE_READ_BYTES = 32 * 1024;
const WINDOW_BYTES = 1024 * 1024;
/** Strips further apart are written one by one, so many at a time. */
const AT_ONCE = 32;

/** Whether the bytes between two strips are filled when these are written. */
export function isClose(gap: number): boolean {
  return gap < CLOSE_BYTES;
}

/** The strips' bytes in their order, in pieces of at most a megabyte; each is the caller's. Rejects with bad_file where the file is shorter. */
export async function* packStrips(
  handle: FileHandle,
  strips: readonly Strips[],
  name: string,
): AsyncGenerator<Uint8Array> {
  for (const each of strips)
    for (const window of windows(each, CLOSE_READ_BYTES)) {
      const [first, length, stride, rows] = window;
      if (rows === 1) {
        for (let at = first; at < first + length; at += WINDOW_BYTES)
          yield await readAll(handle, at, Math.min(first + length, at + WINDOW_BYTES), name);
        continue;
      }
      const bytes = await readAll(handle, first, endOf(window), name);
      const packed = new Uint8Array(length * rows);
      for (let row = 0; row < rows; row++)
        packed.set(bytes.subarray(row * stride, row * stride + length), row * length);
      yield packed;
    }
}

/**
 * The other way. Bytes between close strips stay as they are in the file, and holes there become zeros; no two may write to one file at a time
 * then (see SparseWriter). Rejects with disk_full and others, naming the path.
 */
async function placeStrips(
  handle: FileHandle,
  bytes: Uint8Array,
  strips: readonly Strips[],
  path: string,
): Promise<void> {
  let done = 0;
  for (const each of strips) {
    const waiting: Promise<void>[] = [];
    for (const window of windows(each, CLOSE_BYTES)) {
      const [first, length, stride, rows] = window;
      const packed = bytes.subarray(done, done + length * rows);
      done += packed.length;
      if (rows === 1) {
        waiting.push(writeAll(handle, packed, first, path));
        if (waiting.length >= AT_ONCE) await Promise.all(waiting.splice(0));
        continue;
      }
      const merged = new Uint8Array(endOf(window) - first);
      await readSome(handle, merged, first, path);
      for (let row = 0; row < rows; row++)
        merged.set(packed.subarray(row * length, (row + 1) * length), row * stride);
      await writeAll(handle, merged, first, path);
    }
    await Promise.all(waiting);
  }
}

/** Strips less than `close` apart a window at a time; others one by one. */
function* windows(strips: Strips, close: number): Generator<Strips> {
  const [start, length, stride, rows] = strips;
  if (rows === 1) {
    yield strips;
    return;
  }
  const many = stride - length < close ? Math.max(1, Math.floor(WINDOW_BYTES / stride)) : 1;
  for (let row = 0; row < rows; row += many)
    yield* stripsOf(start + row * stride, length, stride, Math.min(many, rows - row));
}

/** The latest writing of each path: what lies between strips is read and written back, and two ranks of one model may fetch at one time. */
const writing = new Map<string, Promise<void>>();

/** Puts packed strips to their places in the file at `path`, one caller after the other. */
export async function writeStrips(
  handle: FileHandle,
  bytes: Uint8Array,
  strips: readonly Strips[],
  path: string,
): Promise<void> {
  const before = writing.get(path) ?? Promise.resolve();
  const mine = before.catch(() => undefined).then(() => placeStrips(handle, bytes, strips, path));
  writing.set(path, mine);
  try {
    await mine;
  } finally {
    if (writing.get(path) === mine) writing.delete(path);
  }
}

async function readAll(handle: FileHandle, start: number, end: number, name: string): Promise<Uint8Array> {
  const bytes = new Uint8Array(end - start);
  if ((await readInto(handle, bytes, start)) < bytes.length)
    throw new CaravanError("bad_file", "the file has become shorter", { where: name });
  return bytes;
}

async function readInto(handle: FileHandle, bytes: Uint8Array, start: number): Promise<number> {
  let done = 0;
  while (done < bytes.length) {
    const { bytesRead } = await handle.read(bytes, done, bytes.length - done, start + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return done;
}

async function readSome(handle: FileHandle, bytes: Uint8Array, start: number, path: string): Promise<void> {
  try {
    await readInto(handle, bytes, start);
  } catch (cause) {
    throw writeError(path, cause);
  }
}

/** A disk that fills up takes a piece without an error first. */
async function writeAll(handle: FileHandle, bytes: Uint8Array, at: number, path: string): Promise<void> {
  try {
    for (let done = 0; done < bytes.length; ) {
      const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, at + done);
      if (bytesWritten === 0)
        throw new CaravanError("disk_full", "nothing more can be written", { where: path });
      done += bytesWritten;
    }
  } catch (cause) {
    throw writeError(path, cause);
  }
}
