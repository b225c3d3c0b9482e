// A file that appears under its name only when it is whole: written as NAME.partial, synced, renamed.
// Whatever goes wrong before that, NAME does not exist (or still holds what it held) and NAME.partial is gone.
// Two writers of one NAME: the later begins NAME.partial anew, the earlier fails when it would name the file.
// A NAME that is a device or a pipe (/dev/stdout, /dev/null) is written directly: renaming over it would replace it.

import { type FileHandle, open, rename, rm, stat } from "node:fs/promises";
import { dirname } from "node:path";
import { CaravanError } from "../errors.ts";

const NO_SPACE = new Set(["ENOSPC", "EDQUOT", "EFBIG"]);

export class AtomicFile {
  readonly path: string;
  /** Undefined for a device or a pipe. */
  readonly #partial: string | undefined;
  readonly #file: FileHandle;
  /** Tells our partial file from one that another writer has put in its place. */
  readonly #identity: string;
  #open = true;

  private constructor(path: string, partial: string | undefined, file: FileHandle, identity: string) {
    this.path = path;
    this.#partial = partial;
    this.#file = file;
    this.#identity = identity;
  }

  /** @throws CaravanError disk_full, or bad_file where the folder cannot be written */
  static async create(path: string): Promise<AtomicFile> {
    try {
      const partial = (await isSpecial(path)) ? undefined : partialPath(path);
      // A new file, never the one that an earlier writer may still write to.
      if (partial !== undefined) await rm(partial, { force: true });
      const file = await open(partial ?? path, partial === undefined ? "w" : "wx");
      return new AtomicFile(path, partial, file, identityOf(await file.stat()));
    } catch (cause) {
      throw writeError(path, cause);
    }
  }

  /** Writes all of `bytes` at `position` (a device or a pipe takes them as they come); on failure the partial file is removed before the error leaves. */
  async write(bytes: Uint8Array, position: number): Promise<void> {
    await this.#guarded(async () => {
      let done = 0;
      while (done < bytes.byteLength) {
        const { bytesWritten } = await this.#file.write(
          bytes,
          done,
          bytes.byteLength - done,
          this.#partial === undefined ? null : position + done,
        );
        if (bytesWritten === 0)
          throw new CaravanError("disk_full", "nothing more can be written", { where: this.path });
        done += bytesWritten;
      }
    });
  }

  /** Makes the file visible under its name, durably. */
  async commit(): Promise<void> {
    await this.#guarded(async () => {
      if (this.#partial === undefined) {
        this.#open = false;
        await this.#file.close();
        return;
      }
      await this.#file.sync();
      await this.#file.close();
      this.#open = false;
      if (!(await this.#isOurs(this.#partial))) {
        throw new CaravanError("bad_file", "another program replaced or removed the unfinished file", {
          where: this.path,
          hint: "Give each of them a file of its own.",
        });
      }
      await rename(this.#partial, this.path);
      await syncFolder(dirname(this.path));
    });
  }

  /** Drops what was written. Harmless after commit. */
  async abort(): Promise<void> {
    if (!this.#open) return;
    this.#open = false;
    await this.#file.close();
    await this.#drop();
  }

  async #drop(): Promise<void> {
    if (this.#partial !== undefined && (await this.#isOurs(this.#partial)))
      await rm(this.#partial, { force: true });
  }

  async #isOurs(partial: string): Promise<boolean> {
    const there = await stat(partial).catch(() => undefined);
    return there !== undefined && identityOf(there) === this.#identity;
  }

  async #guarded(action: () => Promise<void>): Promise<void> {
    try {
      await action();
    } catch (cause) {
      if (this.#open) await this.abort();
      else await this.#drop();
      throw writeError(this.path, cause);
    }
  }
}

function identityOf({ dev, ino }: { dev: number; ino: number }): string {
  return `${dev}:${ino}`;
}

/** There, and neither a file nor a folder. */
async function isSpecial(path: string): Promise<boolean> {
  try {
    const found = await stat(path);
    return !found.isFile() && !found.isDirectory();
  } catch {
    return false; // nothing there yet, or not readable: open() says why
  }
}

export function partialPath(path: string): string {
  return `${path}.partial`;
}

/** Makes a rename in `dir` survive a power cut. */
export async function syncFolder(dir: string): Promise<void> {
  const folder = await open(dir, "r");
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

/** Turns a failed write into the error a person can act on. */
export function writeError(path: string, cause: unknown): CaravanError {
  if (cause instanceof CaravanError) return cause;
  const code = String((cause as { code?: unknown } | undefined)?.code ?? "");
  if (NO_SPACE.has(code)) {
    return new CaravanError("disk_full", `no space left to write this file (${code})`, {
      where: path,
      hint: "Free some space, or choose a folder on a larger disk, and start again.",
      cause,
    });
  }
  return new CaravanError("bad_file", `cannot be written (${code || cause})`, {
    where: path,
    hint: "Check that the folder exists and that you may write to it.",
    cause,
  });
}
