// Where the checks of kernels find clang 22: in the ziglang package, wherever this tree has put it.

import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "../../..");
/** Of `make fixtures` and `make dist`, of the arm64 tests, of test/metal/run.sh. */
const FOLDERS = [".tools/release/zig", ".tools/arm64/zig"];
const VENV = join(ROOT, "build/metal/venv/lib");

/** The driver's command as words: MSL_CLANG, else what is found; undefined where there is none. */
export function findClang(): string[] | undefined {
  const named = process.env.MSL_CLANG;
  if (named !== undefined && named !== "") return named.split(" ");
  const venvs = existsSync(VENV) ? readdirSync(VENV).map((name) => join(VENV, name, "site-packages")) : [];
  const zig = [...FOLDERS.map((folder) => join(ROOT, folder)), ...venvs]
    .map((folder) => join(folder, "ziglang/zig"))
    .find((path) => existsSync(path));
  return zig === undefined ? undefined : [zig, "clang"];
}

/** Why tests that need it are skipped. */
export const NO_CLANG = "skipped: Metal's verification tools need clang 22 (`make fixtures`, or MSL_CLANG)";
