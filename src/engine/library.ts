// Finds libcaravan. From source it is build/libcaravan.{so,dylib}. A compiled executable carries it inside (the build
// names the library as a further entry point: `bun build --compile src/main.ts build/libcaravan.so`), and since the
// system's loader wants a real file, it is written to a private one that is gone again as soon as it is loaded.

import { randomBytes } from "node:crypto";
import {
  accessSync,
  closeSync,
  constants,
  mkdirSync,
  openSync,
  readFileSync,
  unlinkSync,
  writeSync,
} from "node:fs";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import { CaravanError } from "../errors.ts";

const EXTENSION = process.platform === "darwin" ? "dylib" : "so";

/** Environment variable that names another library file (a build with sanitizers, say). */
const OVERRIDE = "CARAVAN_LIBRARY";

/** True inside a compiled executable. */
export function isCompiled(): boolean {
  return import.meta.dir.startsWith("/$bunfs/");
}

/** Calls `load` (a dlopen) with the path of libcaravan. A temporary copy is tried in several folders, because /tmp may
 * be full, read-only or mounted noexec; `load` is called again for each. Throws engine_failed with every reason. */
export function withLibrary<T>(load: (path: string) => T): T {
  const override = process.env[OVERRIDE];
  if (override !== undefined && override !== "") return loadFile(override, load);
  if (!isCompiled()) return loadFile(join(import.meta.dir, "../../build", `libcaravan.${EXTENSION}`), load);
  return loadCopy(embeddedLibrary(), copyFolders(), load);
}

function loadFile<T>(path: string, load: (path: string) => T): T {
  try {
    accessSync(path, constants.R_OK);
  } catch (cause) {
    throw new CaravanError("engine_failed", "the C library is not there", {
      where: path,
      hint: process.env[OVERRIDE] === undefined ? "build it with `make lib`" : `check ${OVERRIDE}`,
      cause,
    });
  }
  try {
    return load(path);
  } catch (cause) {
    if (cause instanceof CaravanError) throw cause;
    throw new CaravanError("engine_failed", `the C library cannot be loaded: ${reason(cause)}`, {
      where: path,
      cause,
    });
  }
}

function embeddedLibrary(): Uint8Array {
  // Bun's declarations leave out the name that every embedded file has.
  const names = Bun.embeddedFiles.flatMap((file) => ("name" in file ? [String(file.name)] : []));
  const name = names.find((each) => each.startsWith("libcaravan") && each.endsWith(`.${EXTENSION}`));
  if (name === undefined)
    throw new CaravanError("engine_failed", `this executable was built without libcaravan.${EXTENSION}`, {
      hint: "name the library as an entry point of `bun build --compile`",
    });
  return readFileSync(join("/$bunfs/root", name));
}

/** Folders for the temporary copy, in order of preference. */
export function copyFolders(environment: NodeJS.ProcessEnv = process.env): string[] {
  const home = environment.HOME !== undefined && environment.HOME !== "" ? environment.HOME : homedir();
  const cache =
    process.platform === "darwin"
      ? join(home, "Library/Caches/caravan")
      : join(environment.XDG_CACHE_HOME || join(home, ".cache"), "caravan");
  const more = process.platform === "darwin" ? [] : [environment.XDG_RUNTIME_DIR ?? "", "/dev/shm"];
  return [...new Set([tmpdir(), cache, ...more, "/var/tmp"].filter((folder) => folder.startsWith("/")))];
}

/** Writes `bytes` to a new file that only this user can read, in the first of `folders` from which it loads. */
export function loadCopy<T>(bytes: Uint8Array, folders: readonly string[], load: (path: string) => T): T {
  const reasons: string[] = [];
  for (const folder of folders) {
    const path = join(folder, `caravan-${process.pid}-${randomBytes(8).toString("hex")}.${EXTENSION}`);
    try {
      mkdirSync(folder, { recursive: true });
      const file = openSync(path, "wx", 0o600);
      try {
        writeAndClose(file, bytes);
        return load(path);
      } finally {
        unlinkSync(path);
      }
    } catch (thrown) {
      // A library that loads but is the wrong one would be wrong everywhere.
      if (thrown instanceof CaravanError) throw thrown;
      reasons.push(`${folder}: ${reason(thrown)}`);
    }
  }
  throw new CaravanError(
    "engine_failed",
    `the C library cannot be loaded from any folder (${reasons.join("; ")})`,
    {
      hint: "set TMPDIR to a folder that is writable and not mounted noexec",
    },
  );
}

function writeAndClose(file: number, bytes: Uint8Array): void {
  try {
    for (let written = 0; written < bytes.length; ) written += writeSync(file, bytes, written);
  } finally {
    closeSync(file);
  }
}

function reason(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}
