// Tells whether a folder holds a whole model: config.json, tokenizer.json, and every shard of the weights at the length
// that its own header announces. Reads names, sizes and headers, never weights.

import { closeSync, openSync, readdirSync, readFileSync, readSync, type Stats, statSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { pathFault } from "./hub-cache.ts";

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
const HEADER_SCHEMA = v.record(
  v.string(),
  v.looseObject({ data_offsets: v.optional(v.tuple([v.number(), v.number()])) }),
);
const MAX_HEADER_BYTES = 100 * 1024 * 1024;

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
    const fault = jsonFault(join(folder, name));
    if (fault !== undefined) missing.push(`${name} (${fault})`);
  }
  for (const shard of shardsOf(folder, names, missing)) {
    const fault = shardFault(join(folder, shard));
    if (fault !== undefined) missing.push(`${shard} (${fault})`);
  }
  const bytes = names.reduce((sum, name) => sum + (fileBytes(join(folder, name)) ?? 0), 0);
  return { missing, bytes };
}

/** Names of the weight files; what is wrong with the list of them goes to `missing`. */
function shardsOf(folder: string, names: readonly string[], missing: string[]): string[] {
  const present = names.filter((name) => name.endsWith(".safetensors") && name.startsWith("model"));
  if (!names.includes(INDEX)) {
    // Numbered shards mean nothing without the index that tells how many there are.
    if (present.some((name) => /-of-\d+/.test(name))) missing.push(`${INDEX} (not there)`);
    if (present.length === 0) missing.push("model.safetensors (not there)");
    return present;
  }
  const index = parseJson(join(folder, INDEX));
  const parsed = v.safeParse(INDEX_SCHEMA, index);
  if (!parsed.success) {
    missing.push(`${INDEX} (not a safetensors index)`);
    return [];
  }
  const shards = [...new Set(Object.values(parsed.output.weight_map))].sort();
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

/** Verdicts on JSON files by path, for as long as the file stays as it was: a node lists its models often, and a
 * tokenizer of 30 MB takes longer to read than a token to compute. */
const jsonVerdicts = new Map<string, { mtimeMs: number; size: number; fault: string | undefined }>();
const MOST_VERDICTS = 1000;

function jsonFault(path: string): string | undefined {
  const stat = fileStat(path);
  if (stat === undefined) return "not there";
  const { mtimeMs, size } = stat;
  const known = jsonVerdicts.get(path);
  if (known !== undefined && known.mtimeMs === mtimeMs && known.size === size) return known.fault;
  const value = parseJson(path);
  const object = typeof value === "object" && value !== null && !Array.isArray(value);
  const fault = object ? undefined : "not a JSON object";
  if (jsonVerdicts.size >= MOST_VERDICTS) jsonVerdicts.clear();
  jsonVerdicts.set(path, { mtimeMs, size, fault });
  return fault;
}

/** Compares a shard's length with what its header says. */
function shardFault(path: string): string | undefined {
  const size = fileBytes(path);
  if (size === undefined) return "not there";
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
      const parsed = v.safeParse(HEADER_SCHEMA, JSON.parse(header.toString("utf8")));
      if (!parsed.success) return "not a safetensors file";
      let end = 0;
      for (const entry of Object.values(parsed.output)) end = Math.max(end, entry.data_offsets?.[1] ?? 0);
      return 8 + headerBytes + end > size ? "cut short" : undefined;
    } finally {
      closeSync(file);
    }
  } catch (error) {
    return error instanceof SyntaxError ? "not a safetensors file" : "unreadable";
  }
}
