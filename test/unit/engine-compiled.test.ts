// A compiled executable carries the C library and loads it on a machine that offers nothing: no HOME, no usable TMPDIR,
// an empty working directory.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { bestCpu, nativeLayout } from "../../src/engine/binding.ts";

const ROOT = join(import.meta.dir, "../..");
const LIBRARY = join(ROOT, "build", `libcaravan.${process.platform === "darwin" ? "dylib" : "so"}`);
let folder: string;
let program: string;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "caravan-compiled-"));
  program = join(folder, "program");
  const main = join(ROOT, "test/fixtures/engine/compiled-main.ts");
  const built = Bun.spawnSync([process.execPath, "build", "--compile", main, LIBRARY, "--outfile", program], {
    cwd: ROOT,
  });
  if (built.exitCode !== 0) throw new Error(built.stderr.toString());
}, 120_000);
afterAll(() => rmSync(folder, { recursive: true }));

function run(env: Record<string, string>): { output: string; error: string; left: string[] } {
  const cwd = mkdtempSync(join(folder, "empty-"));
  const { stdout, stderr } = Bun.spawnSync([program], { cwd, env });
  return { output: stdout.toString(), error: stderr.toString(), left: readdirSync(cwd) };
}

const expected = (): string =>
  `${JSON.stringify({ cpu: bestCpu().name, records: nativeLayout().split("\n").length })}\n`;

test("a compiled executable loads its library without any environment", () => {
  expect(run({})).toEqual({ output: expected(), error: "", left: [] });
});

test("a compiled executable finds another folder when TMPDIR is missing, and leaves nothing behind", () => {
  const cache = join(folder, "cache");
  mkdirSync(cache);
  expect(run({ TMPDIR: join("/dev/null", "none"), XDG_CACHE_HOME: cache, HOME: "" }).output).toBe(expected());
  expect(readdirSync(join(cache, "caravan"))).toEqual([]);
});
