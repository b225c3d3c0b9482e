// A checkpoint folder as one table of tensors: a single model.safetensors, or shards with their index.
// Every tensor of the index must be in the file it names; every file is opened and checked.

import { readdir, readFile } from "node:fs/promises";
import { basename, join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { findDuplicateKey } from "./duplicate-keys.ts";
import {
  readSafetensorsHeader,
  type SafetensorsHeader,
  type TensorInfo,
  unreadable,
} from "./safetensors-header.ts";

export {
  byteSize,
  DTYPE_BYTES,
  type Dtype,
  isAligned,
  isDtype,
  MAX_HEADER_BYTES,
  parseSafetensorsHeader,
  readSafetensorsHeader,
  type SafetensorsHeader,
  type TensorInfo,
} from "./safetensors-header.ts";

export interface CheckpointTensor extends TensorInfo {
  /** Path of the file that holds it. */
  file: string;
}

export interface Checkpoint {
  dir: string;
  /** In the order of their names. */
  files: SafetensorsHeader[];
  tensors: ReadonlyMap<string, CheckpointTensor>;
  /** Of all tensors together, without headers. */
  sizeBytes: number;
}

export const INDEX_FILE = "model.safetensors.index.json";
export const SINGLE_FILE = "model.safetensors";
const SHARD = /^model-(\d{5})-of-(\d{5})\.safetensors$/;

const Index = v.object({
  weight_map: v.record(
    v.string(),
    v.pipe(v.string(), v.regex(/^[^/\\\0]+\.safetensors$/, "not a plain file name")),
  ),
});

/**
 * Opens every file of the checkpoint in `dir` and merges their tensor tables.
 * @throws CaravanError bad_file that names the file at fault
 */
export async function openCheckpoint(dir: string): Promise<Checkpoint> {
  let names: string[];
  try {
    names = await readdir(dir);
  } catch (cause) {
    throw unreadable(dir, cause);
  }
  if (names.includes(INDEX_FILE)) return openIndexed(dir, join(dir, INDEX_FILE));
  if (names.includes(SINGLE_FILE))
    return mergeHeaders(dir, [await readSafetensorsHeader(join(dir, SINGLE_FILE))]);
  return openShards(dir, names);
}

async function openIndexed(dir: string, indexPath: string): Promise<Checkpoint> {
  const weightMap = await readIndex(indexPath);
  const fileNames = [...new Set(Object.values(weightMap))].sort();
  if (fileNames.length === 0) throw new CaravanError("bad_file", "names no files", { where: indexPath });
  const headers: SafetensorsHeader[] = [];
  for (const name of fileNames) headers.push(await readSafetensorsHeader(join(dir, name)));
  const byName = new Map(headers.map((h) => [basename(h.path), h]));
  for (const [tensor, file] of Object.entries(weightMap)) {
    if (byName.get(file)?.tensors.has(tensor) !== true) {
      throw new CaravanError(
        "bad_file",
        `${indexPath} promises tensor ${JSON.stringify(tensor)} here, but it is not`,
        {
          where: join(dir, file),
          hint: "The index and the shards are not of one download: fetch the model again.",
        },
      );
    }
  }
  return mergeHeaders(dir, headers);
}

async function readIndex(path: string): Promise<Record<string, string>> {
  let text: string;
  try {
    text = await readFile(path, "utf8");
  } catch (cause) {
    throw unreadable(path, cause);
  }
  return parseIndex(text, path);
}

/** File of each tensor. Throws bad_file. path: for messages. */
export function parseIndex(text: string, path: string): Record<string, string> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new CaravanError("bad_file", "is not valid JSON", { where: path, cause });
  }
  const twice = findDuplicateKey(text);
  if (twice !== undefined) {
    throw new CaravanError("bad_file", `key ${JSON.stringify(twice)} occurs twice`, { where: path });
  }
  const parsed = v.safeParse(Index, json);
  if (!parsed.success) {
    const issue = parsed.issues[0];
    throw new CaravanError("bad_file", `${v.getDotPath(issue) ?? "index"}: ${issue.message}`, {
      where: path,
    });
  }
  return parsed.output.weight_map;
}

/** Shards without an index: all of `model-0000k-of-0000n` must be there. */
async function openShards(dir: string, names: string[]): Promise<Checkpoint> {
  const shards = names.filter((n) => SHARD.test(n)).sort();
  const count = Number(SHARD.exec(shards[0] ?? "")?.[2] ?? 0);
  if (count === 0) {
    throw new CaravanError("bad_file", `holds neither ${SINGLE_FILE} nor ${INDEX_FILE}`, {
      where: dir,
      hint: "Point to a folder with a checkpoint in safetensors format, or fetch one with `caravan pull`.",
    });
  }
  const headers: SafetensorsHeader[] = [];
  for (let k = 1; k <= count; k++) {
    const five = (n: number) => String(n).padStart(5, "0");
    headers.push(await readSafetensorsHeader(join(dir, `model-${five(k)}-of-${five(count)}.safetensors`)));
  }
  return mergeHeaders(dir, headers);
}

/** One table of the tensors of all files. Throws bad_file where a tensor is in two. */
export function mergeHeaders(dir: string, files: SafetensorsHeader[]): Checkpoint {
  const tensors = new Map<string, CheckpointTensor>();
  let sizeBytes = 0;
  for (const header of files) {
    for (const [name, tensor] of header.tensors) {
      const other = tensors.get(name);
      if (other !== undefined) {
        throw new CaravanError("bad_file", `tensor ${JSON.stringify(name)} is also in ${other.file}`, {
          where: header.path,
        });
      }
      tensors.set(name, { ...tensor, file: header.path });
      sizeBytes += tensor.sizeBytes;
    }
  }
  return { dir, files, tensors, sizeBytes };
}
