// Tells whether a folder holds a whole model: config.json, tokenizer.json, and every shard of the weights at the length
// that its own header announces. Reads names, sizes and headers, never weights.

import { closeSync, openSync, readdirSync, readFileSync, readSync, type Stats, statSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { pathFault } from "./hub-cache.ts";
import { MAX_HEADER_BYTES } from "./safetensors-header.ts";

export interface FolderState {
  /** What keeps it from being used, as words for a person; empty: it is whole. */
  missing: string[];
  /** Of all files, links followed. */
  bytes: number;
}

export interface InspectOptions {
  /** A model without a tokenizer counts as whole (logits and tests need none). */
  withoutTokenizer?: boolean;
}

const INDEX = "model.safetensors.index.json";
const INDEX_SCHEMA = v.object({ weight_map: v.record(v.string(), v.string()) });

/** Looks through `folder`; one that is not there misses everything. Never throws. */
export function inspectFolder(folder: string, options: InspectOptions = {}): FolderState {
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch {
    return { missing: ["the folder"], bytes: 0 };
  }
  const missing: string[] = [];
  const needed = options.withoutTokenizer === true ? ["config.json"] : ["config.json", "tokenizer.json"];
  for (const name of needed) {
    const wrong = fault(join(folder, name), jsonFault);
    if (wrong !== undefined) missing.push(`${name} (${wrong})`);
  }
  for (const shard of shardsOf(folder, names, missing)) {
    const wrong = fault(join(folder, shard), shardFault);
    if (wrong !== undefined) missing.push(`${shard} (${wrong})`);
  }
  const bytes = names.reduce((sum, name) => sum + (fileBytes(join(folder, name)) ?? 0), 0);
  return { missing, bytes };
}

/** Names of the weight files; what is wrong with the list of them goes to `missing`. */
function shardsOf(folder: string, names: readonly string[], missing: string[]): readonly string[] {
  const present = names.filter((name) => name.endsWith(".safetensors") && name.startsWith("model"));
  if (!names.includes(INDEX)) {
    // Numbered shards mean nothing without the index that tells how many there are.
    if (present.some((name) => /-of-\d+/.test(name))) missing.push(`${INDEX} (not there)`);
    if (present.length === 0) missing.push("model.safetensors (not there)");
    return present;
  }
  const shards = indexes.of(join(folder, INDEX), indexedShards) ?? undefined;
  if (shards === undefined) {
    missing.push(`${INDEX} (not a safetensors index)`);
    return [];
  }
  if (shards.length === 0) missing.push(`${INDEX} (names no shard)`);
  const bad = shards.find((name) => pathFault(name) !== undefined);
  if (bad === undefined) return shards;
  missing.push(`${INDEX} (names a file outside the folder)`);
  return [];
}

function fileStat(path: string): Stats | undefined {
  try {
    const stat = statSync(path);
    return stat.isFile() ? stat : undefined;
  } catch {
    return undefined; // not there, or a link to nothing
  }
}

function fileBytes(path: string): number | undefined {
  return fileStat(path)?.size;
}

function parseJson(path: string): unknown {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch {
    return undefined;
  }
}

const MOST_REMEMBERED = 4096;

/** What was read out of files, by path, for as long as each stays as it was: a node lists its models often, and a
 * tokenizer of 30 MB, or the header of a large shard, takes longer to read than a token to compute. */
class FileMemory<T> {
  readonly #known = new Map<string, { mtimeMs: number; size: number; inode: number; value: T }>();

  /** `keep`: whether the value may be used again; what could not be read may be readable the next time. */
  constructor(private readonly keep: (value: T) => boolean) {}

  /** What `read` gives for the file; undefined when there is no file. */
  of(path: string, read: (path: string, size: number) => T): T | undefined {
    const stat = fileStat(path);
    if (stat === undefined) return undefined;
    const { mtimeMs, size, ino: inode } = stat;
    const known = this.#known.get(path);
    if (known?.mtimeMs === mtimeMs && known.size === size && known.inode === inode) return known.value;
    const value = read(path, size);
    if (this.#known.size >= MOST_REMEMBERED) this.#known.clear();
    if (this.keep(value)) this.#known.set(path, { mtimeMs, size, inode, value });
    return value;
  }
}

const UNREADABLE = "unreadable";
/** null: nothing is wrong with the file. */
const faults = new FileMemory<string | null>((fault) => fault !== UNREADABLE);
const indexes = new FileMemory<readonly string[] | null>((shards) => shards !== null);

function fault(path: string, judge: (path: string, size: number) => string | undefined): string | undefined {
  const found = faults.of(path, (file, size) => judge(file, size) ?? null);
  return found === undefined ? "not there" : (found ?? undefined);
}

/** Shards that an index names, each once and in order; null for what is no index. */
function indexedShards(path: string): string[] | null {
  const parsed = v.safeParse(INDEX_SCHEMA, parseJson(path));
  return parsed.success ? [...new Set(Object.values(parsed.output.weight_map))].sort() : null;
}

function jsonFault(path: string): string | undefined {
  const value = parseJson(path);
  return isObject(value) ? undefined : "not a JSON object";
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Compares a shard's length with what its header says. */
function shardFault(path: string, size: number): string | undefined {
  try {
    const file = openSync(path, "r");
    try {
      const prefix = Buffer.alloc(8);
      if (size < 8 || readSync(file, prefix, 0, 8, 0) !== 8) return "cut short";
      const headerBytes = Number(prefix.readBigUInt64LE());
      if (headerBytes > MAX_HEADER_BYTES) return "not a safetensors file";
      if (8 + headerBytes > size) return "cut short";
      const header = Buffer.alloc(headerBytes);
      if (readSync(file, header, 0, headerBytes, 8) !== headerBytes) return "cut short";
      const end = dataEnd(JSON.parse(header.toString("utf8")));
      if (end === undefined) return "not a safetensors file";
      return 8 + headerBytes + end > size ? "cut short" : undefined;
    } finally {
      closeSync(file);
    }
  } catch (error) {
    return error instanceof SyntaxError ? "not a safetensors file" : UNREADABLE;
  }
}

/** Where the last tensor ends, in bytes behind the header; undefined for what is no header. Hundreds of thousands of
 * entries must not take seconds: this looks at two numbers of each. */
function dataEnd(header: unknown): number | undefined {
  if (!isObject(header)) return undefined;
  let end = 0;
  for (const entry of Object.values(header)) {
    if (!isObject(entry)) return undefined;
    const offsets = entry.data_offsets;
    if (offsets === undefined) continue;
    if (!Array.isArray(offsets) || offsets.length !== 2) return undefined;
    const [from, to]: unknown[] = offsets;
    if (typeof from !== "number" || typeof to !== "number") return undefined;
    end = Math.max(end, to);
  }
  return end;
}
