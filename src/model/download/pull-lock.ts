// One download of a repository at a time, also between processes: a lock file that names its owner and is touched while
// the owner lives. A lock whose owner is gone is taken over.

import { open, readFile, rename, rm, stat, utimes } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { makeFolder } from "../../paths.ts";

const OWNER_SCHEMA = v.object({ pid: v.number(), host: v.string() });
const TOUCH_EVERY_MS = 5_000;
/** Untouched for this long, a lock is dead even if a process of that number lives, or its machine is another one. */
const DEAD_AFTER_MS = 60_000;

/** Locks that this process holds. A restarted container often has the process number of the one before it, so a lock
 * with our own number that is not in here is a dead one. */
const held = new Set<string>();

export interface PullLock {
  release(): Promise<void>;
}

/** Takes the lock of `<hub>/<repoName>`, or throws download_failed that names the owner. */
export async function takeLock(hub: string, repoName: string): Promise<PullLock> {
  const folder = join(hub, ".locks", repoName);
  makeFolder(folder, "download models");
  const path = join(folder, "caravan.lock");
  for (let attempt = 0; attempt < 5; attempt += 1) {
    if (await create(path)) return hold(path);
    const owner = await liveOwner(path);
    if (owner !== undefined) {
      throw new CaravanError("download_failed", `process ${owner} is downloading this model already`, {
        where: path,
        hint: "wait for it, or stop it; what it has downloaded is kept",
      });
    }
    // Two processes may find the same dead lock: rename lets only one of them have it.
    const taken = `${path}.${process.pid}.${attempt}`;
    await rename(path, taken).catch(ignoreAbsent);
    await rm(taken, { force: true });
  }
  throw new CaravanError("download_failed", "the lock of this download cannot be taken", { where: path });
}

async function create(path: string): Promise<boolean> {
  try {
    const file = await open(path, "wx");
    try {
      await file.writeFile(JSON.stringify({ pid: process.pid, host: hostname() }));
    } finally {
      await file.close();
    }
    return true;
  } catch (error) {
    if (codeOf(error) === "EEXIST") return false;
    const full = codeOf(error) === "ENOSPC" || codeOf(error) === "EDQUOT";
    throw new CaravanError(
      full ? "disk_full" : "permission_denied",
      `cannot lock the download: ${codeOf(error)}`,
      {
        where: path,
        hint: full ? "free some space and run the command again" : "check who owns the folder",
        cause: error,
      },
    );
  }
}

function hold(path: string): PullLock {
  held.add(path);
  const timer = setInterval(() => {
    const now = new Date();
    utimes(path, now, now).catch(() => undefined); // gone or not ours to touch: then it counts as dead, which is safe
  }, TOUCH_EVERY_MS);
  timer.unref();
  return {
    async release() {
      clearInterval(timer);
      held.delete(path);
      await rm(path, { force: true });
    },
  };
}

/** "123" or "123 on otherhost", or undefined when the lock's owner is gone. */
async function liveOwner(path: string): Promise<string | undefined> {
  let age: number;
  let owner: v.InferOutput<typeof OWNER_SCHEMA> | undefined;
  try {
    age = Date.now() - (await stat(path)).mtimeMs;
    const parsed = v.safeParse(OWNER_SCHEMA, JSON.parse(await readFile(path, "utf8")));
    owner = parsed.success ? parsed.output : undefined;
  } catch (error) {
    if (codeOf(error) === "ENOENT") return undefined;
    age = await stat(path).then(
      (found) => Date.now() - found.mtimeMs,
      () => Number.POSITIVE_INFINITY,
    );
  }
  if (age > DEAD_AFTER_MS) return undefined;
  // A lock that is being written holds nothing for a moment.
  if (owner === undefined) return age < 2_000 ? "unknown" : undefined;
  if (owner.host !== hostname()) return `${owner.pid} on ${owner.host}`;
  if (owner.pid === process.pid) return held.has(path) ? String(owner.pid) : undefined;
  return alive(owner.pid) ? String(owner.pid) : undefined;
}

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return codeOf(error) === "EPERM";
  }
}

function ignoreAbsent(error: unknown): void {
  if (codeOf(error) !== "ENOENT") throw error;
}

function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}
