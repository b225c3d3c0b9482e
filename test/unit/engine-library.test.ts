// The temporary copy from which an executable loads its C library.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { copyFolders, loadCopy, withLibrary } from "../../src/engine/library.ts";
import { CaravanError } from "../../src/errors.ts";

const BYTES = Uint8Array.from({ length: 100_000 }, (_, i) => i * 31);
let folder: string;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "caravan-test-"));
});
afterAll(() => rmSync(folder, { recursive: true }));

describe("the library's copy", () => {
  test("is whole and private while it is loaded, and gone afterwards", () => {
    const seen = loadCopy(BYTES, [folder], (path) => {
      expect(statSync(path).mode & 0o777).toBe(0o600);
      return readFileSync(path);
    });
    expect(Buffer.compare(seen, BYTES)).toBe(0);
    expect(readdirSync(folder)).toEqual([]);
  });

  test("goes to the next folder when one is missing, a file, or does not allow loading", () => {
    const file = join(folder, "a-file");
    writeFileSync(file, "");
    const noexec = join(folder, "noexec");
    const good = join(folder, "good");
    const path = loadCopy(BYTES, [file, "/proc/none", noexec, good], (candidate) => {
      if (candidate.startsWith(noexec)) throw new Error("failed to map segment from shared object");
      return candidate;
    });
    expect(path.startsWith(good)).toBe(true);
    expect(readdirSync(noexec)).toEqual([]);
    expect(readdirSync(good)).toEqual([]);
  });

  test("gives every folder's reason when none works", () => {
    const load = (): never => {
      throw new Error("operation not permitted");
    };
    try {
      loadCopy(BYTES, [folder, "/proc/none"], load);
      throw new Error("loaded");
    } catch (thrown) {
      expect(thrown).toBeInstanceOf(CaravanError);
      expect(thrown).toMatchObject({ code: "engine_failed" });
      expect(String(thrown)).toContain(`${folder}: operation not permitted`);
      expect(String(thrown)).toContain("/proc/none: ");
    }
  });

  test("is not tried elsewhere when the library loads but is the wrong one", () => {
    let calls = 0;
    const load = (): never => {
      calls++;
      throw new CaravanError("engine_failed", "the C library has interface version 0, not 1");
    };
    expect(() => loadCopy(BYTES, [folder, folder], load)).toThrow("interface version 0");
    expect(calls).toBe(1);
  });

  test("has folders to go to without HOME and other variables", () => {
    const folders = copyFolders({});
    expect(folders.length).toBeGreaterThan(1);
    for (const each of folders) expect(each.startsWith("/")).toBe(true);
    expect(copyFolders({ XDG_CACHE_HOME: "/x/cache" }).includes("/x/cache/caravan")).toBe(
      process.platform !== "darwin",
    );
  });

  test("is not needed when CARAVAN_LIBRARY names a file, which must exist", () => {
    const before = process.env.CARAVAN_LIBRARY;
    process.env.CARAVAN_LIBRARY = join(folder, "missing.so");
    try {
      expect(() => withLibrary((path) => path)).toThrow("not there");
      process.env.CARAVAN_LIBRARY = folder;
      expect(withLibrary((path) => path)).toBe(folder);
    } finally {
      if (before === undefined) delete process.env.CARAVAN_LIBRARY;
      else process.env.CARAVAN_LIBRARY = before;
    }
  });
});
