// The layout of the Hugging Face hub's cache, which other tools read and write too:
//
//   models--org--name/blobs/<hash>                 a file's content, by git blob id or LFS sha256
//                     snapshots/<commit>/<path>    links into blobs
//                     refs/<revision>              the commit that a branch or tag stood for
//
// This file knows names and reads links; it writes nothing.

import { readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { CaravanError } from "../errors.ts";
import { HUB_ID } from "./card.ts";

export const COMMIT = /^[0-9a-f]{40}$/;
const PREFIX = "models--";

/** Ending of files in blobs/ whose download is under way. Other tools use `.incomplete` and mean by its length that
 * all before it is there; ours may have holes (download/part-file.ts), so it must not have their name. */
export const PART_SUFFIX = ".caravan-part";

/** Throws invalid_argument unless `id` can name a repository of the hub. */
export function checkHubId(id: string): void {
  if (id.length > 200 || !HUB_ID.test(id)) {
    throw new CaravanError("invalid_argument", `${JSON.stringify(id)} is not a model of the hub`, {
      hint: "hub models are written org/name, for example mlx-community/Llama-3.2-1B-Instruct-4bit",
    });
  }
}

/** Throws invalid_argument unless `revision` can name a branch, tag, pull request or commit. */
export function checkRevision(revision: string): void {
  const parts = revision.split("/");
  const good = /^[\w./+-]{1,200}$/.test(revision) && parts.every((p) => p !== "" && p !== "." && p !== "..");
  if (!good) {
    throw new CaravanError("invalid_argument", `${JSON.stringify(revision)} is not a revision`, {
      hint: "a revision is a branch, a tag or a commit, for example main",
    });
  }
}

/** Splits `org/name@revision`. `id` is undefined when it is no hub name at all. Throws
 * invalid_argument for a malformed revision. */
export function hubName(name: string): { id: string | undefined; revision: string | undefined } {
  const at = name.indexOf("@");
  const id = at < 0 ? name : name.slice(0, at);
  if (!HUB_ID.test(id)) return { id: undefined, revision: undefined };
  if (at < 0) return { id, revision: undefined };
  checkRevision(name.slice(at + 1));
  return { id, revision: name.slice(at + 1) };
}

/** Why a file name from the hub must not be used as a path below a folder; undefined when it may. */
export function pathFault(path: string): string | undefined {
  if (path === "" || path.length > 1024) return "it is empty or too long";
  if (path.startsWith("/") || /^[A-Za-z]:/.test(path)) return "it is absolute";
  if (/[\\\p{Cc}]/u.test(path)) return "it holds a backslash or a control character";
  for (const part of path.split("/")) {
    if (part === "" || part === "." || part === "..") return "it holds an empty part, . or ..";
    if (Buffer.byteLength(part) > 255) return "a part of it is too long";
  }
  return undefined;
}

/** `<hub>/models--org--name`. */
export function repoFolder(hub: string, id: string): string {
  checkHubId(id);
  return join(hub, `${PREFIX}${id.replace("/", "--")}`);
}

export function blobFile(repo: string, hash: string): string {
  return join(repo, "blobs", hash);
}

export function snapshotFolder(repo: string, commit: string): string {
  return join(repo, "snapshots", commit);
}

export function refFile(repo: string, revision: string): string {
  return join(repo, "refs", revision);
}

/** The repositories of a cache, as hub ids, sorted. A cache that is not there has none. */
export function cachedIds(hub: string): string[] {
  return list(hub)
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => name.slice(PREFIX.length).replace("--", "/"))
    .filter((id) => HUB_ID.test(id))
    .sort();
}

/** The commit that `refs/<revision>` holds, or `revision` itself when it is a commit. */
export function cachedCommit(repo: string, revision: string): string | undefined {
  if (COMMIT.test(revision)) return revision;
  try {
    const commit = readFileSync(refFile(repo, revision), "utf8").trim();
    return COMMIT.test(commit) ? commit : undefined;
  } catch {
    return undefined; // no such reference, or unreadable: as good as not there
  }
}

/** Commits with a snapshot, the most recently changed first. */
export function cachedSnapshots(repo: string): string[] {
  return list(join(repo, "snapshots"))
    .filter((name) => COMMIT.test(name))
    .map((commit) => ({ commit, time: modified(snapshotFolder(repo, commit)) }))
    .sort((a, b) => b.time - a.time)
    .map(({ commit }) => commit);
}

function list(folder: string): string[] {
  try {
    return readdirSync(folder);
  } catch {
    return []; // absent or unreadable: nothing in it can be used
  }
}

function modified(path: string): number {
  try {
    return statSync(path).mtimeMs;
  } catch {
    return 0;
  }
}
