// Opens a GGUF model of one or several files. Split models are named NAME-00001-of-0000N.gguf; the first file
// carries the metadata, each carries split.no and split.count.

import { CaravanError } from "../../errors.ts";
import { type GgufFile, type GgufTensor, type GgufValue, parseGguf } from "./parse.ts";

export interface GgufModel {
  /** The files, first split first. */
  paths: string[];
  metadata: ReadonlyMap<string, GgufValue>;
  tensors: ReadonlyMap<string, GgufTensor & { path: string }>;
}

const SPLIT_NAME = /^(.*)-(\d{5})-of-(\d{5})\.gguf$/i;
const MAX_SPLITS = 1000;

/**
 * Opens the file, and its companions where it is one of a split model; any of them may be named.
 * @throws CaravanError bad_file that names the file at fault
 */
export function openGguf(path: string): GgufModel {
  const named = parseGguf(path);
  const count = splitNumber(named, "split.count") ?? 1;
  const files = count > 1 ? openSplits(path, count) : [named];
  const [first] = files;
  if (first === undefined) throw new CaravanError("bad_file", "has no files", { where: path });
  const tensors = mergeTensors(files);
  const promised = splitNumber(first, "split.tensors.count");
  if (count > 1 && promised !== undefined && promised !== tensors.size) {
    throw new CaravanError(
      "bad_file",
      `promises ${promised} tensors, the ${count} files hold ${tensors.size}`,
      {
        where: first.path,
      },
    );
  }
  return { paths: files.map((f) => f.path), metadata: first.metadata, tensors };
}

function openSplits(path: string, count: number): GgufFile[] {
  const match = SPLIT_NAME.exec(path);
  if (match === null || Number(match[3]) !== count || count > MAX_SPLITS) {
    throw new CaravanError(
      "bad_file",
      `is one of ${count} split files, but is not named -00001-of-${five(count)}.gguf`,
      {
        where: path,
        hint: "Give the files of a split model the names they were published with.",
      },
    );
  }
  const files: GgufFile[] = [];
  for (let k = 1; k <= count; k++) {
    const file = parseGguf(`${match[1]}-${five(k)}-of-${five(count)}.gguf`);
    if (splitNumber(file, "split.no") !== k - 1 || splitNumber(file, "split.count") !== count) {
      throw new CaravanError("bad_file", `is not split ${k} of ${count} by its own metadata`, {
        where: file.path,
      });
    }
    files.push(file);
  }
  return files;
}

function mergeTensors(files: GgufFile[]): Map<string, GgufTensor & { path: string }> {
  const tensors = new Map<string, GgufTensor & { path: string }>();
  for (const file of files) {
    for (const [name, tensor] of file.tensors) {
      const other = tensors.get(name);
      if (other !== undefined) {
        throw new CaravanError("bad_file", `tensor ${JSON.stringify(name)} is also in ${other.path}`, {
          where: file.path,
        });
      }
      tensors.set(name, { ...tensor, path: file.path });
    }
  }
  return tensors;
}

function splitNumber(file: GgufFile, key: string): number | undefined {
  const value = file.metadata.get(key);
  if (value === undefined) return undefined;
  if (typeof value === "number" && Number.isInteger(value) && value >= 0) return value;
  throw new CaravanError("bad_file", `${key} is not a count`, { where: file.path });
}

function five(n: number): string {
  return String(n).padStart(5, "0");
}
