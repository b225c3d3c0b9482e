// The parts of models that this node keeps in DATA/parts: fetches them for ranks, finds them again after a restart, says how
// large they are, and drops those that no rank has read for a while, or when room is needed. A part is what a rank read of a
// model that another node has; it can always be fetched again.

import { readdirSync, rmSync } from "node:fs";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { asCaravanError, type CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import type { InstalledModel } from "../../model/store.ts";
import type { Share } from "../shard.ts";
import type { NodeId } from "../types.ts";
import type { Channel } from "./channel.ts";
import { ModelSourceChannel } from "./model-files.ts";
import { type PartNote, partBytes, readPartNote, writePartNote } from "./part-note.ts";
import { fetchShard, hasShard } from "./shard-store.ts";

/** A part that no rank has read in so many hours of the node's running is dropped. */
export const GRACE_HOURS = 7 * 24;
const HOUR_MS = 3_600_000;

export interface PartView {
  model: string;
  /** On the disk. */
  bytes: number;
  inUse: boolean;
  idleHours: number;
}

export interface ModelPartsOptions {
  /** Of all parts. */
  folder: string;
  /** Nodes that have all of the model, the nearest first. */
  holders: (model: string) => NodeId[];
  /** A connection of purpose "file". */
  open: (node: NodeId, signal: AbortSignal) => Promise<Channel>;
  nameOf: (node: NodeId) => string;
  /** Models of instances with a rank on this node. */
  inUse: () => ReadonlySet<string>;
  log: Logger;
}

export interface PartOrder {
  model: string;
  shares: readonly Share[];
  rank: number;
  /** 0 to 1. */
  onProgress: (fraction: number) => void;
  signal: AbortSignal;
}

interface Part {
  path: string;
  note: PartNote;
}

export class ModelParts {
  readonly #options: ModelPartsOptions;
  /** By folder; undefined: not looked at yet. */
  #parts: Map<string, Part> | undefined;
  /** Models that are being fetched. */
  readonly #fetching = new Map<string, number>();
  /** Folders that are being removed. */
  readonly #dropping = new Set<Promise<void>>();
  #agedAt: number | undefined;
  #aging = false;

  constructor(options: ModelPartsOptions) {
    this.#options = options;
  }

  /** Fetched for a rank, now or before a restart; its weights may have holes. undefined: there is none. */
  find(model: string): InstalledModel | undefined {
    const part = this.#of(model)[0];
    return part === undefined ? undefined : installed(part);
  }

  /** Has what the rank reads of the model in a folder. Rejects with `missing` where no other node has the model, otherwise with what
   * went wrong at the last one. */
  async prepare(order: PartOrder, missing: CaravanError): Promise<InstalledModel> {
    const { model, signal, ...rest } = order;
    const { holders, open, nameOf, folder, log } = this.#options;
    this.#fetching.set(model, (this.#fetching.get(model) ?? 0) + 1);
    let last: unknown = missing;
    try {
      // The model's own folder may be on its way out.
      await Promise.allSettled(this.#dropping);
      for (const holder of holders(model)) {
        try {
          const source = await ModelSourceChannel.ask(await open(holder, signal), model);
          log.info("fetching a part of a model", { model, from: nameOf(holder) });
          const makeRoom = (bytes: number) => this.#makeRoom(bytes);
          const path = await fetchShard(folder, { source, model, signal, makeRoom, ...rest }).finally(() =>
            source.close(),
          );
          return installed({ path, note: readPartNote(path) ?? noteOf(model) });
        } catch (failed) {
          signal.throwIfAborted();
          const error = asCaravanError(failed);
          log.warn("a part of a model was not fetched", { model, from: nameOf(holder), ...error.toJSON() });
          last = error;
        }
      }
      return installed(await this.#complete(order, last));
    } finally {
      this.#parts = undefined;
      const left = (this.#fetching.get(model) ?? 1) - 1;
      if (left === 0) this.#fetching.delete(model);
      else this.#fetching.set(model, left);
    }
  }

  list(): PartView[] {
    const used = this.#used();
    return [...this.#all().values()].map(({ note }) => ({
      model: note.model,
      bytes: partBytes(note),
      inUse: used.has(note.model),
      idleHours: note.idleHours,
    }));
  }

  /** Drops parts that no rank reads, of one model or of all; the bytes that come free. */
  async clean(model?: string): Promise<number> {
    let bytes = 0;
    for (const part of [...this.#all().values()]) {
      // Asked anew each time: while one goes, another may come into use.
      if (this.#used().has(part.note.model) || (model !== undefined && part.note.model !== model)) continue;
      bytes += await this.#drop(part, "it was asked for");
    }
    return bytes;
  }

  /** To be called now and then. nowMs: monotonic. */
  async age(nowMs: number): Promise<void> {
    this.#agedAt ??= nowMs;
    const hours = Math.floor((nowMs - this.#agedAt) / HOUR_MS);
    if (hours < 1 || this.#aging) return;
    this.#agedAt += hours * HOUR_MS;
    this.#aging = true;
    try {
      for (const part of [...this.#all().values()]) await this.#ageOne(part, hours);
    } finally {
      this.#aging = false;
    }
  }

  async #ageOne(part: Part, hours: number): Promise<void> {
    const { model, idleHours } = part.note;
    if (this.#fetching.has(model)) return;
    const idle = this.#used().has(model) ? 0 : idleHours + hours;
    if (idle >= GRACE_HOURS) await this.#drop(part, `no rank has read it for ${idle} hours`);
    else if (idle !== idleHours) {
      part.note.idleHours = idle;
      await writePartNote(part.path, part.note);
    }
  }

  /** Without a holder that answers: what an earlier fetch left may be enough. */
  async #complete({ model, shares, rank }: PartOrder, why: unknown): Promise<Part> {
    // What the holder says of the content itself stands: an altered file, a full disk.
    if (["bad_file", "disk_full"].includes(asCaravanError(why).code)) throw why;
    for (const part of this.#of(model))
      if (await hasShard(part.path, shares, rank)) {
        this.#options.log.info("a part of a model is here from before", { model });
        return part;
      }
    throw why;
  }

  /** Unused parts go, those first that have been so for longest. */
  async #makeRoom(bytes: number): Promise<void> {
    const idle = [...this.#all().values()].sort((a, b) => b.note.idleHours - a.note.idleHours);
    for (let freed = 0; freed < bytes; ) {
      const part = idle.shift();
      if (part === undefined) return;
      if (this.#used().has(part.note.model)) continue;
      freed += await this.#drop(part, "its room is needed");
    }
  }

  async #drop({ path, note }: Part, reason: string): Promise<number> {
    this.#parts?.delete(path);
    const removal = rm(path, { recursive: true, force: true });
    this.#dropping.add(removal);
    try {
      await removal;
    } finally {
      this.#dropping.delete(removal);
    }
    const bytes = partBytes(note);
    this.#options.log.info("dropped a part of a model", { model: note.model, bytes, reason });
    return bytes;
  }

  #used(): ReadonlySet<string> {
    return new Set([...this.#options.inUse(), ...this.#fetching.keys()]);
  }

  /** Of one model, the latest used first: another checkpoint under the same name is another part. */
  #of(model: string): Part[] {
    return [...this.#all().values()]
      .filter(({ note }) => note.model === model)
      .sort((a, b) => a.note.idleHours - b.note.idleHours);
  }

  #all(): Map<string, Part> {
    this.#parts ??= new Map(listParts(this.#options.folder).map((part) => [part.path, part]));
    return this.#parts;
  }
}

function noteOf(model: string): PartNote {
  return { model, idleHours: 0, files: {} };
}

/** Folders without a readable note count too, under their own name: nothing can be fetched on top of them. */
function listParts(folder: string): Part[] {
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch {
    return []; // nothing was ever fetched
  }
  return names.map((name) => {
    const path = join(folder, name);
    return { path, note: readPartNote(path) ?? { ...noteOf(name), idleHours: GRACE_HOURS } };
  });
}

function installed({ path, note }: Part): InstalledModel {
  return { name: note.model, path, source: "folder", bytes: partBytes(note), created: 0 };
}

/** Where no node runs: what is there, and its removal. */
export function partsOnDisk(folder: string): { model: string; bytes: number; idleHours: number }[] {
  return listParts(folder).map(({ note }) => ({
    model: note.model,
    bytes: partBytes(note),
    idleHours: note.idleHours,
  }));
}

/** Drops parts of one model, or all; the bytes that come free. Only while no node of this user runs. */
export function removeParts(folder: string, model?: string): number {
  let bytes = 0;
  for (const { path, note } of listParts(folder)) {
    if (model !== undefined && note.model !== model) continue;
    rmSync(path, { recursive: true, force: true });
    bytes += partBytes(note);
  }
  return bytes;
}
