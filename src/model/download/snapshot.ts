// The last step of a download: links in snapshots/<commit>, then refs/<revision>. Only whole, checked files are linked,
// config.json comes last of them, and the reference last of all, so that no end of the program leaves a model that
// looks whole and is not.

import { copyFile, lstat, mkdir, readlink, rename, rm, symlink, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { CaravanError } from "../../errors.ts";
import { blobFile, COMMIT, pathFault, refFile, snapshotFolder } from "../hub-cache.ts";
import type { PlannedFile } from "./plan.ts";

/** File systems without links (exFAT, some network shares) answer with one of these. */
const NO_LINKS = new Set(["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"]);

/** Makes the snapshot of `commit` and points `revision` at it. Every file must lie in blobs/. Returns the folder. */
export async function writeSnapshot(
  repo: string,
  commit: string,
  revision: string,
  files: readonly PlannedFile[],
): Promise<string> {
  const folder = snapshotFolder(repo, commit);
  const last = (file: PlannedFile): number => (file.path === "config.json" ? 1 : 0);
  try {
    await mkdir(folder, { recursive: true });
    for (const file of [...files].sort((a, b) => last(a) - last(b))) await link(repo, folder, file);
    if (!COMMIT.test(revision)) await replace(refFile(repo, revision), (path) => writeFile(path, commit));
  } catch (cause) {
    const code = codeOf(cause);
    const full = code === "ENOSPC" || code === "EDQUOT";
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError(full ? "disk_full" : "bad_file", `cannot finish the download: ${reason}`, {
      where: folder,
      hint: full
        ? "free some space and run the command again; nothing is fetched twice"
        : "check who owns the folder",
      cause,
    });
  }
  return folder;
}

async function link(repo: string, folder: string, file: PlannedFile): Promise<void> {
  const fault = pathFault(file.path);
  if (fault !== undefined) throw new Error(`${JSON.stringify(file.path)} is refused: ${fault}`);
  const path = join(folder, file.path);
  const up = "../".repeat(file.path.split("/").length + 1);
  const target = `${up}blobs/${file.hash}`;
  if ((await readlink(path).catch(() => undefined)) === target) return;
  await replace(path, async (temporary) => {
    try {
      await symlink(target, temporary);
    } catch (cause) {
      if (!NO_LINKS.has(codeOf(cause))) throw cause;
      await copyFile(blobFile(repo, file.hash), temporary);
    }
  });
}

/** Makes a file beside `path` and renames it over whatever is there. */
async function replace(path: string, make: (temporary: string) => Promise<void>): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const temporary = `${path}.caravan-${process.pid}`;
  await rm(temporary, { force: true });
  await make(temporary);
  await rename(temporary, path);
}

/** Whether the blob is there at its full size. One of another size is removed: nothing whole has another size. */
export async function blobIsWhole(repo: string, file: PlannedFile): Promise<boolean> {
  const path = blobFile(repo, file.hash);
  const found = await lstat(path).catch(() => undefined);
  if (found === undefined) return false;
  if (found.isFile() && found.size === file.size) return true;
  await rm(path, { recursive: true });
  return false;
}

function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}
