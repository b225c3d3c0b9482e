// Small files that only this user may read, such as keys: written whole or not at all, with mode 0600 from the first
// byte; one that others can read is refused.

import {
  closeSync,
  fsyncSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { dirname } from "node:path";
import { CaravanError } from "../../errors.ts";
import { writeError } from "../../model/atomic-file.ts";
import { makeFolder } from "../../paths.ts";

/** The file's text; undefined when there is none. Throws permission_denied or bad_file. */
export function readPrivateFile(path: string): string | undefined {
  try {
    const { mode } = statSync(path);
    if ((mode & 0o077) !== 0) {
      throw new CaravanError("permission_denied", "other users of this machine can read this secret", {
        where: path,
        hint: `chmod 600 '${path}'`,
      });
    }
    return readFileSync(path, "utf8");
  } catch (cause) {
    if (cause instanceof CaravanError) throw cause;
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT") return undefined;
    throw new CaravanError("bad_file", `cannot be read (${code ?? cause})`, { where: path, cause });
  }
}

/** Replaces the file's content. `purpose` completes "cannot …". */
export function writePrivateFile(path: string, text: string, purpose: string): void {
  makeFolder(dirname(path), purpose);
  const partial = `${path}.${process.pid}.partial`;
  try {
    rmSync(partial, { force: true });
    const file = openSync(partial, "wx", 0o600);
    try {
      writeAll(file, Buffer.from(text), path);
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(partial, path);
  } catch (cause) {
    rmSync(partial, { force: true });
    throw writeError(path, cause);
  }
}

/** A disk that is nearly full takes a part and says no error: that part alone must not replace the file. */
function writeAll(file: number, bytes: Buffer, path: string): void {
  let done = 0;
  while (done < bytes.length) {
    const written = writeSync(file, bytes, done, bytes.length - done);
    if (written === 0)
      throw new CaravanError("disk_full", "nothing more can be written", {
        where: path,
        hint: "Free some space, and start again.",
      });
    done += written;
  }
}
