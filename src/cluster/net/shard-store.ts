// Fetches the part of a model that a rank reads into caravan's own folder, and not a byte more: files as long as the originals with holes
// where nothing was needed, so that offsets and load plans are the same as on the node that has it all. What has arrived is written
// down (part-note.ts), so that an interrupted fetch goes on where it was, also after a restart.

import { createHash } from "node:crypto";
import { type FileHandle, mkdir, open, statfs } from "node:fs/promises";
import { basename, join } from "node:path";
import { asCaravanError, CaravanError } from "../../errors.ts";
import { writeError } from "../../model/atomic-file.ts";
import { readModelConfig } from "../../model/config.ts";
import { hashFile } from "../../model/download/part-file.ts";
import { makeLoadPlan } from "../../model/load-plan.ts";
import { openCheckpoint } from "../../model/safetensors.ts";
import { MAX_HEADER_BYTES } from "../../model/safetensors-header.ts";
import { makeFolder } from "../../paths.ts";
import { type Share, shardPlan } from "../shard.ts";
import { shardStrips } from "../shard-strips.ts";
import { addStrips, cutStrips, missingStrips, run, type Strips, stripBytes } from "../strips.ts";
import { MOST_WISH_BYTES, MOST_WISH_STRIPS, type ModelFile, type ModelSourceChannel } from "./model-files.ts";
import {
  diskBytes,
  isWhole,
  type PartFile,
  type PartNote,
  readPartNote,
  writePartNote,
} from "./part-note.ts";
import { writeStrips } from "./sparse-file.ts";

const WEIGHTS = /\.safetensors$/;
/** What has arrived is noted each time so much more has: as much comes again after a power cut. */
const NOTE_BYTES = 64 * 1024 * 1024;
/** A safetensors file begins with its header's length. */
const LENGTH_BYTES = 8;
/** Room that stays free on the disk. */
export const SPARE_BYTES = 1e9;
/** Largest file that is no weights. */
const MOST_SMALL_BYTES = 256 * 1024 * 1024;

export interface FetchOptions {
  source: ModelSourceChannel;
  model: string;
  shares: readonly Share[];
  rank: number;
  /** 0 to 1, the check at the end included. */
  onProgress: (fraction: number) => void;
  signal: AbortSignal;
  /** Makes at least so many bytes free if it can, before a fetch is refused for want of room. */
  makeRoom?: (bytes: number) => Promise<void>;
  spareBytes?: number;
}

/** `folder`: of all partial models. Resolves with the folder of this one once the rank can load from it. Rejects with
 * disk_full, download_failed or bad_file; what has arrived stays and is not fetched again. */
export async function fetchShard(folder: string, options: FetchOptions): Promise<string> {
  const { source, model } = options;
  const fetch = new ShardFetch(join(folder, folderName(model, source.files)), options);
  try {
    return await fetch.run();
  } catch (thrown) {
    await fetch.keep();
    throw thrown;
  } finally {
    await fetch.close();
  }
}

/** Bytes of each file that a rank reads, for a folder whose headers and small files are there. */
async function stripsOfRank(
  folder: string,
  shares: readonly Share[],
  rank: number,
): Promise<Map<string, Strips[]>> {
  const plan = makeLoadPlan(readModelConfig(folder), await openCheckpoint(folder));
  return new Map(
    [...shardStrips(shardPlan(plan, shares, rank))].map(([path, strips]) => [basename(path), strips]),
  );
}

/** Whether a rank can load from the folder without anything more. */
export async function hasShard(folder: string, shares: readonly Share[], rank: number): Promise<boolean> {
  const note = readPartNote(folder);
  if (note === undefined) return false;
  for (const [name, file] of Object.entries(note.files))
    if (!WEIGHTS.test(name) && !isWhole(file)) return false;
  try {
    const wanted = await stripsOfRank(folder, shares, rank);
    return [...wanted].every(
      ([name, strips]) => missingStrips(strips, note.files[name]?.held ?? []).length === 0,
    );
  } catch (thrown) {
    if (asCaravanError(thrown).code === "internal_error") throw thrown;
    return false; // headers are missing, or are not those of a model
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
  #note: PartNote | undefined;
  #sinceNote = 0;

  constructor(folder: string, options: FetchOptions) {
    this.#folder = folder;
    this.#options = options;
  }

  async run(): Promise<string> {
    const { source, model, shares, rank } = this.#options;
    makeFolder(this.#folder, "keep a part of a model");
    await mkdir(this.#folder, { recursive: true });
    this.#note = reconciled(readPartNote(this.#folder), model, source.files);
    // A folder says what it is before anything else is in it.
    await this.#save();
    await this.#fetchSmallParts();
    const wanted = await stripsOfRank(this.#folder, shares, rank);
    const all = bytesOf(wanted, stripBytes);
    const lacking = this.#missing(wanted);
    await this.#checkRoom(bytesOf(lacking, diskBytes));
    // Of files that the rank reads nothing of but the header, nobody needs to know more.
    const toCheck = source.files.filter(
      ({ name, hash }) => hash !== undefined && (wanted.has(name) || !WEIGHTS.test(name)),
    );
    const work = all + toCheck.reduce((sum, { size }) => sum + size, 0);
    let done = all - bytesOf(lacking, stripBytes);
    const onBytes = (more: number) => {
      done += more;
      this.#options.onProgress(work === 0 ? 1 : Math.min(1, done / work));
    };
    await this.#fetch(wanted, onBytes);
    for (const file of toCheck) await this.#check(file, onBytes);
    this.#options.onProgress(1);
    await this.#save();
    return this.#folder;
  }

  /** After a failure: notes what has arrived, if the disk takes it. The note before is true as well, of less. */
  async keep(): Promise<void> {
    if (this.#note === undefined) return;
    try {
      await this.#save();
    } catch (thrown) {
      if (asCaravanError(thrown).code === "internal_error") throw thrown;
    }
  }

  async close(): Promise<void> {
    for (const handle of this.#handles.values()) await handle.close();
    this.#handles.clear();
  }

  #of(name: string): PartFile {
    const file = this.#note?.files[name];
    if (file === undefined)
      throw new CaravanError("download_failed", "the other node lacks it", { where: name });
    return file;
  }

  /** Everything but weights whole, and the headers of those: then the plan says what else. */
  async #fetchSmallParts(): Promise<void> {
    const small = new Map<string, Strips[]>();
    const lengths = new Map<string, Strips[]>();
    for (const { name, size } of this.#options.source.files) {
      if (WEIGHTS.test(name)) {
        if (size < LENGTH_BYTES)
          throw new CaravanError("bad_file", "is too short for a safetensors file", { where: name });
        lengths.set(name, [run(0, LENGTH_BYTES)]);
      } else if (size > MOST_SMALL_BYTES)
        throw new CaravanError("download_failed", `${name} is too large for what it is`);
      else if (size > 0) small.set(name, [run(0, size)]);
    }
    const ignore = () => undefined;
    await this.#fetch(lengths, ignore);
    for (const name of lengths.keys()) small.set(name, [run(0, await this.#headerBytes(name))]);
    await this.#fetch(small, ignore);
  }

  #missing(wanted: ReadonlyMap<string, Strips[]>): Map<string, Strips[]> {
    return new Map([...wanted].map(([name, strips]) => [name, missingStrips(strips, this.#of(name).held)]));
  }

  /** Length of a safetensors file's header, its first 8 bytes, which are here, included. */
  async #headerBytes(name: string): Promise<number> {
    const { size } = this.#of(name);
    const handle = await this.#open(name, size);
    const prefix = new Uint8Array(LENGTH_BYTES);
    await handle.read(prefix, 0, LENGTH_BYTES, 0);
    const length = Number(new DataView(prefix.buffer).getBigUint64(0, true));
    if (length > MAX_HEADER_BYTES || LENGTH_BYTES + length > size) {
      this.#of(name).held = [];
      throw new CaravanError("bad_file", "has a header that does not fit", { where: name });
    }
    return LENGTH_BYTES + length;
  }

  async #fetch(wanted: ReadonlyMap<string, Strips[]>, onBytes: (more: number) => void): Promise<void> {
    const { source, signal } = this.#options;
    for (const [name, strips] of this.#missing(wanted)) {
      const file = this.#of(name);
      const handle = await this.#open(name, file.size);
      const limits = { mostBytes: MOST_WISH_BYTES, mostStrips: MOST_WISH_STRIPS };
      for (const wish of cutStrips(strips, limits)) {
        signal.throwIfAborted();
        const bytes = await source.read(name, wish);
        await writeStrips(handle, bytes, wish, join(this.#folder, name));
        file.held = addStrips(file.held, wish);
        if (isWhole(file)) file.held = file.size > 0 ? [run(0, file.size)] : [];
        delete file.checked;
        onBytes(bytes.length);
        this.#sinceNote += bytes.length;
        if (this.#sinceNote >= NOTE_BYTES) await this.#save();
      }
    }
  }

  /** Compares a file's content with what the hub states: here where all of it is here, else at the node that it comes from. */
  async #check({ name, size, hash }: ModelFile, onBytes: (more: number) => void): Promise<void> {
    const file = this.#of(name);
    if (hash === undefined) return;
    if (file.checked === "whole" || (file.checked === "source" && !isWhole(file))) {
      onBytes(size);
      return;
    }
    let seen = 0;
    const upTo = (read: number) => {
      onBytes(Math.max(0, Math.min(read, size) - seen));
      seen = Math.max(seen, read);
    };
    try {
      if (isWhole(file)) {
        const handle = await this.#open(name, size);
        const found = await hashFile(handle, size, hash.kind, this.#options.signal, (more) =>
          upTo(seen + more),
        );
        if (found !== hash.value)
          throw new CaravanError("bad_file", "its content is not what the hub states for it", {
            where: join(this.#folder, name),
            hint: "It is fetched again at the next try; if that ends the same way, the node that it comes from has an altered file.",
          });
        file.checked = "whole";
      } else {
        await this.#options.source.verify(name, upTo);
        file.checked = "source";
      }
    } catch (thrown) {
      // Nobody knows which of its bytes are wrong.
      if (asCaravanError(thrown).code === "bad_file") file.held = [];
      throw thrown;
    }
    upTo(size);
  }

  /** The file at its whole length, mostly a hole. */
  async #open(name: string, size: number): Promise<FileHandle> {
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
    const { model, makeRoom, spareBytes = SPARE_BYTES } = this.#options;
    const free = async () => {
      const { bavail, bsize } = await statfs(this.#folder);
      return bavail * bsize;
    };
    const lacking = bytes === 0 ? 0 : bytes + spareBytes - (await free());
    if (lacking <= 0) return;
    await makeRoom?.(lacking);
    const left = await free();
    if (left >= bytes + spareBytes) return;
    throw new CaravanError(
      "disk_full",
      `this part of ${model} needs ${gigabytes(bytes)} more and ${gigabytes(spareBytes)} to spare, ${gigabytes(left)} are free`,
      {
        where: this.#folder,
        hint: "Free some space (`caravan cluster clean` drops parts that no rank reads), or set CARAVAN_DATA_DIR to a larger disk.",
      },
    );
  }

  /** Data first, then the note that says it is there. */
  async #save(): Promise<void> {
    if (this.#note === undefined) return;
    this.#sinceNote = 0;
    for (const [name, handle] of this.#handles) {
      try {
        await handle.sync();
      } catch (cause) {
        throw writeError(join(this.#folder, name), cause);
      }
    }
    await writePartNote(this.#folder, this.#note);
  }
}

/** The note for the files as the other node has them now: what it says of other contents counts for nothing. */
function reconciled(note: PartNote | undefined, model: string, files: readonly ModelFile[]): PartNote {
  const fresh: PartNote = { model, idleHours: 0, files: {} };
  for (const { name, size, hash, stamp } of files) {
    const known = note?.files[name];
    // Files of other weights have the same names and sizes. Bytes without a hash are of no file that has one: the check at the
    // holder would say nothing of them.
    const same = known?.size === size && known.hash?.value === hash?.value && known.stamp === stamp;
    const stated = { ...(hash === undefined ? {} : { hash }), ...(stamp === undefined ? {} : { stamp }) };
    fresh.files[name] = same ? known : { size, held: [], ...stated };
  }
  return fresh;
}

function bytesOf(
  parts: ReadonlyMap<string, readonly Strips[]>,
  count: (strips: readonly Strips[]) => number,
): number {
  return [...parts.values()].reduce((sum, strips) => sum + count(strips), 0);
}

function gigabytes(bytes: number): string {
  return `${(bytes / 1e9).toFixed(1)} GB`;
}
