// Whether a file of this node has the content that the hub states for it. A file is read once for that; size, time and inode are
// remembered on the disk, so a file that was changed since is read again.

import { readFileSync, statSync } from "node:fs";
import { open } from "node:fs/promises";
import { dirname } from "node:path";
import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import { AtomicFile } from "../../model/atomic-file.ts";
import { hashFile } from "../../model/download/part-file.ts";
import { makeFolder } from "../../paths.ts";
import type { FileHash } from "./part-note.ts";

const MOST_REMEMBERED = 4096;

const Remembered = v.record(v.string(), v.object({ stamp: v.string(), hash: v.string() }));

interface Check {
  result: Promise<void>;
  /** Bytes read so far. */
  done: number;
}

export class FileVerdicts {
  readonly #path: string;
  readonly #running = new Map<string, Check>();
  #remembered: v.InferOutput<typeof Remembered> | undefined;
  /** One at a time: two writers of one file are in each other's way. */
  #writing: Promise<void> = Promise.resolve();

  /** path: of the file that remembers. */
  constructor(path: string) {
    this.#path = path;
  }

  /** Reads the file unless its verdict is known; several that ask at one time share one reading. `result` rejects with bad_file,
   * which names the path, where the content is another one. */
  check(path: string, hash: FileHash): Readonly<Check> {
    const key = `${path} ${hash.value}`;
    const running = this.#running.get(key);
    if (running !== undefined) return running;
    const check: Check = { result: Promise.resolve(), done: 0 };
    check.result = this.#check(path, hash, check).finally(() => this.#running.delete(key));
    check.result.catch(() => undefined); // whoever asked hears of it
    this.#running.set(key, check);
    return check;
  }

  async #check(path: string, hash: FileHash, progress: Check): Promise<void> {
    const stamp = stampOf(path);
    const known = this.#known()[path];
    if (known?.stamp === stamp && known.hash === hash.value) return;
    const handle = await open(path);
    try {
      const { size } = await handle.stat();
      const found = await hashFile(handle, size, hash.kind, new AbortController().signal, (bytes) => {
        progress.done += bytes;
      });
      if (found !== hash.value || stampOf(path) !== stamp)
        throw new CaravanError("bad_file", "its content is not what the hub states for it", {
          where: path,
          hint: "Remove the model there and pull it again: the file was altered or the disk has a fault.",
        });
    } finally {
      await handle.close();
    }
    await this.#remember(path, stamp, hash.value);
  }

  #known(): v.InferOutput<typeof Remembered> {
    if (this.#remembered !== undefined) return this.#remembered;
    let value: unknown;
    try {
      value = JSON.parse(readFileSync(this.#path, "utf8"));
    } catch {
      value = {}; // none yet, or damaged: files are read again
    }
    const parsed = v.safeParse(Remembered, value);
    this.#remembered = parsed.success ? parsed.output : {};
    return this.#remembered;
  }

  async #remember(path: string, stamp: string, hash: string): Promise<void> {
    const all = Object.entries(this.#known()).filter(([name]) => name !== path);
    this.#remembered = Object.fromEntries([...all.slice(-(MOST_REMEMBERED - 1)), [path, { stamp, hash }]]);
    this.#writing = this.#writing.catch(() => undefined).then(() => this.#write());
    try {
      await this.#writing;
    } catch (thrown) {
      // The verdict stands all the same; after a restart it costs another reading.
      if (asCaravanError(thrown).code === "internal_error") throw thrown;
    }
  }

  async #write(): Promise<void> {
    makeFolder(dirname(this.#path), "remember which files were checked");
    const file = await AtomicFile.create(this.#path);
    await file.write(Buffer.from(JSON.stringify(this.#remembered)), 0);
    await file.commit();
  }
}

function stampOf(path: string): string {
  const { size, mtimeMs, ino, dev } = statSync(path);
  return `${size} ${mtimeMs} ${dev}:${ino}`;
}
