// Models of which this node has only what its rank reads, in caravan's own folder: files as long as the originals with
// holes where nothing was needed, so that offsets and load plans are the same as on the node that has it all. What has arrived is
// written down after it is on the disk, so that an interrupted fetch goes on where it was.

import { createHash } from "node:crypto";
import { type FileHandle, mkdir, open, statfs } from "node:fs/promises";
import { basename, join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { AtomicFile, writeError } from "../../model/atomic-file.ts";
import { readModelConfig } from "../../model/config.ts";
import { makeLoadPlan } from "../../model/load-plan.ts";
import { openCheckpoint } from "../../model/safetensors.ts";
import { MAX_HEADER_BYTES } from "../../model/safetensors-header.ts";
import { makeFolder } from "../../paths.ts";
import { type Share, shardPlan } from "../shard.ts";
import { type ByteRange, mergeRanges, missingRanges, shardRanges, totalBytes } from "../shard-ranges.ts";
import { MOST_RANGE_BYTES, type ModelFile, type ModelSourceChannel } from "./model-files.ts";

const WEIGHTS = /\.safetensors$/;
/** What has arrived is noted each time so much more has. */
const NOTE_BYTES = 256 * 1024 * 1024;
/** Room that stays free on the disk. */
const SPARE_BYTES = 1e9;
/** Largest file that is no weights. */
const MOST_SMALL_BYTES = 256 * 1024 * 1024;

const range = v.strictTuple([v.pipe(v.number(), v.safeInteger()), v.pipe(v.number(), v.safeInteger())]);
const Held = v.record(v.string(), v.array(range));

export interface FetchOptions {
  source: ModelSourceChannel;
  model: string;
  shares: readonly Share[];
  rank: number;
  /** 0 to 1. */
  onProgress: (fraction: number) => void;
  signal: AbortSignal;
}

/** `folder`: of all partial models. Resolves with the folder of this one once the rank can load from it. Rejects with
 * disk_full, download_failed or bad_file. */
export async function fetchShard(folder: string, options: FetchOptions): Promise<string> {
  const { source, model } = options;
  const fetch = new ShardFetch(join(folder, folderName(model, source.files)), options);
  try {
    return await fetch.run();
  } finally {
    await fetch.close();
  }
}

/** Another checkpoint under the same name is another folder. */
function folderName(model: string, files: readonly ModelFile[]): string {
  const plain = model.replaceAll(/[^A-Za-z0-9._-]/g, "_").slice(0, 80);
  const hash = createHash("sha256").update(
    JSON.stringify([model, files.map(({ name, size }) => [name, size])]),
  );
  return `${plain}-${hash.digest("hex").slice(0, 16)}`;
}

class ShardFetch {
  readonly #folder: string;
  readonly #options: FetchOptions;
  readonly #handles = new Map<string, FileHandle>();
  #held: Record<string, ByteRange[]> = {};
  #sinceNote = 0;

  constructor(folder: string, options: FetchOptions) {
    this.#folder = folder;
    this.#options = options;
  }

  async run(): Promise<string> {
    const { files } = this.#options.source;
    makeFolder(this.#folder, "keep a part of a model");
    await mkdir(this.#folder, { recursive: true });
    this.#held = await this.#readNote();
    // Everything but weights whole, and the headers of those: then the plan says what else.
    const small = new Map<string, ByteRange[]>();
    for (const { name, size } of files) {
      if (WEIGHTS.test(name)) small.set(name, [[0, await this.#headerBytes(name, size)]]);
      else if (size > MOST_SMALL_BYTES)
        throw new CaravanError("download_failed", `${name} is too large for what it is`);
      else if (size > 0) small.set(name, [[0, size]]);
    }
    await this.#fetch(small, () => undefined);
    const plan = makeLoadPlan(readModelConfig(this.#folder), await openCheckpoint(this.#folder));
    const { shares, rank, onProgress } = this.#options;
    const wanted = new Map(
      [...shardRanges(shardPlan(plan, shares, rank))].map(([path, ranges]) => [basename(path), ranges]),
    );
    const all = [...wanted.values()].reduce((sum, ranges) => sum + totalBytes(ranges), 0);
    const missing = this.#missing(wanted);
    const bytes = [...missing.values()].reduce((sum, ranges) => sum + totalBytes(ranges), 0);
    await this.#checkRoom(bytes);
    let done = all - bytes;
    await this.#fetch(wanted, (more) => {
      done += more;
      onProgress(all === 0 ? 1 : done / all);
    });
    await this.#note();
    return this.#folder;
  }

  async close(): Promise<void> {
    for (const handle of this.#handles.values()) await handle.close();
    this.#handles.clear();
  }

  #missing(wanted: ReadonlyMap<string, ByteRange[]>): Map<string, ByteRange[]> {
    return new Map(
      [...wanted].map(([name, ranges]) => [name, missingRanges(ranges, this.#held[name] ?? [])]),
    );
  }

  /** Length of a safetensors file's header, its 8 bytes included. */
  async #headerBytes(name: string, size: number): Promise<number> {
    if (size < 8) throw new CaravanError("bad_file", "is too short for a safetensors file", { where: name });
    const prefix = await this.#options.source.read(name, 0, 8);
    const length = Number(new DataView(prefix.buffer, prefix.byteOffset, 8).getBigUint64(0, true));
    if (length > MAX_HEADER_BYTES || 8 + length > size)
      throw new CaravanError("bad_file", "has a header that does not fit", { where: name });
    return 8 + length;
  }

  async #fetch(wanted: ReadonlyMap<string, ByteRange[]>, onBytes: (more: number) => void): Promise<void> {
    const { source, signal } = this.#options;
    for (const [name, ranges] of this.#missing(wanted)) {
      const file = source.files.find((each) => each.name === name);
      if (file === undefined)
        throw new CaravanError("download_failed", "the other node lacks it", { where: name });
      const handle = await this.#open(file);
      for (const [first, end] of ranges)
        for (let start = first; start < end; start += MOST_RANGE_BYTES) {
          signal.throwIfAborted();
          const stop = Math.min(end, start + MOST_RANGE_BYTES);
          const bytes = await source.read(name, start, stop);
          try {
            await handle.write(bytes, 0, bytes.length, start);
          } catch (cause) {
            throw writeError(join(this.#folder, name), cause);
          }
          this.#held[name] = mergeRanges([...(this.#held[name] ?? []), [start, stop]]);
          onBytes(bytes.length);
          this.#sinceNote += bytes.length;
          if (this.#sinceNote >= NOTE_BYTES) await this.#note();
        }
    }
  }

  /** The file at its whole length, mostly a hole. */
  async #open({ name, size }: ModelFile): Promise<FileHandle> {
    const known = this.#handles.get(name);
    if (known !== undefined) return known;
    const path = join(this.#folder, name);
    try {
      const handle = await open(path, "r+").catch(() => open(path, "w+"));
      await handle.truncate(size);
      this.#handles.set(name, handle);
      return handle;
    } catch (cause) {
      throw writeError(path, cause);
    }
  }

  async #checkRoom(bytes: number): Promise<void> {
    const { bavail, bsize } = await statfs(this.#folder);
    if (bavail * bsize < bytes + SPARE_BYTES) {
      throw new CaravanError(
        "disk_full",
        `this part of ${this.#options.model} needs ${(bytes / 1e9).toFixed(1)} GB, ${((bavail * bsize) / 1e9).toFixed(1)} GB are free`,
        { where: this.#folder, hint: "Free some space, or set CARAVAN_DATA_DIR to a larger disk." },
      );
    }
  }

  get #notePath(): string {
    return join(this.#folder, "held.ranges");
  }

  async #readNote(): Promise<Record<string, ByteRange[]>> {
    const note = Bun.file(this.#notePath);
    if (!(await note.exists())) return {};
    const parsed = v.safeParse(Held, await note.json().catch(() => undefined));
    // A damaged note costs a new fetch, not a wrong model.
    return parsed.success ? parsed.output : {};
  }

  /** Data first, then the note that says it is there. */
  async #note(): Promise<void> {
    this.#sinceNote = 0;
    for (const handle of this.#handles.values()) await handle.sync();
    const file = await AtomicFile.create(this.#notePath);
    await file.write(Buffer.from(JSON.stringify(this.#held)), 0);
    await file.commit();
  }
}
