// Verdicts on files and notes of parts: what is written down for later never decides what is true now.

import { afterEach, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { FileVerdicts } from "../../src/cluster/net/file-verdicts.ts";
import { type PartNote, readPartNote, writePartNote } from "../../src/cluster/net/part-note.ts";

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "caravan-verdicts-"));
  cleanups.push(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

function fileOf(dir: string, name: string) {
  const path = join(dir, name);
  writeFileSync(path, name);
  const hash = { kind: "sha256", value: createHash("sha256").update(name).digest("hex") } as const;
  return { path, hash };
}

describe("a verdict on a file", () => {
  test("stands when several end at the same moment, and all of them are remembered", async () => {
    const dir = folder();
    const memo = join(folder(), "checked.json");
    const verdicts = new FileVerdicts(memo);
    const files = Array.from({ length: 16 }, (_, i) => fileOf(dir, `file ${i}`));
    const results = await Promise.allSettled(
      files.map(({ path, hash }) => verdicts.check(path, hash).result),
    );
    expect(results.map(({ status }) => status)).toEqual(files.map(() => "fulfilled"));
    const later = new FileVerdicts(memo);
    for (const { path, hash } of files) {
      const check = later.check(path, hash);
      await check.result;
      expect(check.done).toBe(0);
    }
  });

  test("stands when it cannot be written down", async () => {
    const dir = folder();
    const { path, hash } = fileOf(dir, "file");
    const verdicts = new FileVerdicts(join(path, "no folder", "checked.json"));
    await verdicts.check(path, hash).result;
    const again = verdicts.check(path, hash);
    await again.result;
    expect(again.done).toBe(0);
    const wrong = { kind: "sha256", value: "0".repeat(64) } as const;
    await expect(verdicts.check(path, wrong).result).rejects.toMatchObject({ code: "bad_file" });
  });
});

describe("the note of a part", () => {
  test("takes several writers at one moment; the last one's stays", async () => {
    const dir = folder();
    const notes = Array.from({ length: 8 }, (_, i): PartNote => ({ model: "m", idleHours: i, files: {} }));
    const results = await Promise.allSettled(notes.map((note) => writePartNote(dir, note)));
    expect(results.map(({ status }) => status)).toEqual(notes.map(() => "fulfilled"));
    expect(readPartNote(dir)?.idleHours).toBe(7);
    expect(readdirSync(dir)).toEqual(["part.json"]);
  });

  test("that could not be written does not stop the next", async () => {
    const dir = join(folder(), "part");
    const note: PartNote = { model: "m", idleHours: 1, files: {} };
    await expect(writePartNote(dir, note)).rejects.toMatchObject({ code: "bad_file" });
    mkdirSync(dir);
    await writePartNote(dir, note);
    expect(readPartNote(dir)).toEqual(note);
  });
});
