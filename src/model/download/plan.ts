// Which files of a repository a download takes, and under which hashes they will lie. Pure: no network, no disk.

import { CaravanError } from "../../errors.ts";
import { pathFault } from "../hub-cache.ts";

/** A file as the hub lists it. */
export interface RemoteEntry {
  path: string;
  /** In bytes. */
  size: number;
  /** Git blob id of the file, or of its LFS pointer. */
  gitId: string;
  /** LFS files: hash of the content. */
  sha256: string | undefined;
}

export interface PlannedFile {
  path: string;
  size: number;
  /** Name in blobs/: the content's sha256, or its git blob id (sha1) for files outside LFS. */
  hash: string;
  kind: "sha256" | "git";
}

const EXCLUDED_FOLDERS = new Set(["original", "onnx", "metal", "coreml", "openvino", "gguf"]);

/** Weights count at the top only (folders hold checkpoints and variants); text files anywhere but in those folders. */
function wanted(path: string): boolean {
  const parts = path.split("/");
  const name = parts.at(-1) ?? "";
  if (parts.slice(0, -1).some((folder) => EXCLUDED_FOLDERS.has(folder) || folder.startsWith(".")))
    return false;
  if (/\.(bin|pth|pt|gguf|onnx|h5|msgpack|ot)$/i.test(name)) return false;
  if (name.endsWith(".safetensors")) return parts.length === 1 && name.startsWith("model");
  return (
    /\.(json|jinja)$/.test(name) ||
    /^(tokenizer|LICENSE|USE_POLICY|NOTICE)/.test(name) ||
    name === "merges.txt"
  );
}

/**
 * The files to download, weights last. Throws download_failed for a list that must not be trusted (names that lead out
 * of the folder, malformed hashes) and unsupported_model for a repository that caravan could not run anyway.
 */
export function planDownload(id: string, entries: readonly RemoteEntry[]): PlannedFile[] {
  for (const { path } of entries) {
    const fault = pathFault(path);
    if (fault !== undefined) throw hostile(id, `the file name ${JSON.stringify(path)}: ${fault}`);
  }
  const files = entries.filter((entry) => wanted(entry.path)).map((entry) => planned(id, entry));
  refuseClashes(id, files);
  const has = (test: (path: string) => boolean): boolean => files.some((file) => test(file.path));
  const lacks = !has((path) => path.endsWith(".safetensors"))
    ? "weights in safetensors format"
    : !has((path) => path === "config.json")
      ? "config.json"
      : !has((path) => path === "tokenizer.json")
        ? "tokenizer.json"
        : undefined;
  if (lacks !== undefined) {
    throw new CaravanError("unsupported_model", `the repository has no ${lacks}`, {
      where: id,
      hint: entries.some((entry) => entry.path.endsWith(".gguf"))
        ? "it has GGUF files: download one and run caravan import FILE.gguf"
        : "look for a conversion of the model, for example in mlx-community",
    });
  }
  const weight = (file: PlannedFile): number => (file.path.endsWith(".safetensors") ? 1 : 0);
  return files.sort((a, b) => weight(a) - weight(b) || (a.path < b.path ? -1 : 1));
}

function planned(id: string, entry: RemoteEntry): PlannedFile {
  const { path, size, sha256, gitId } = entry;
  if (sha256 !== undefined) return { path, size, hash: sha256, kind: "sha256" };
  if (!/^[0-9a-f]{40}$/.test(gitId)) throw hostile(id, `${path} has no usable hash`);
  return { path, size, hash: gitId, kind: "git" };
}

/** Two names that some file systems take for one, or a file where another needs a folder. */
function refuseClashes(id: string, files: readonly PlannedFile[]): void {
  const seen = new Set(files.map((file) => file.path.toLowerCase()));
  if (seen.size !== files.length) throw hostile(id, "two file names differ in nothing but case");
  for (const { path } of files) {
    const parts = path.toLowerCase().split("/");
    for (let depth = 1; depth < parts.length; depth += 1) {
      const folder = parts.slice(0, depth).join("/");
      if (seen.has(folder)) throw hostile(id, `${folder} is both a file and a folder`);
    }
  }
}

function hostile(id: string, reason: string): CaravanError {
  return new CaravanError("download_failed", `the list of files is refused: ${reason}`, {
    where: id,
    hint: "do not use this repository",
  });
}
