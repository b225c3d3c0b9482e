// Private files on a disk that takes only a part of what is written.

import { afterEach, beforeEach, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { readPrivateFile, writePrivateFile } from "../../src/cluster/net/private-file.ts";

let folder = "";
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "caravan-private-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

test("a file of which only a part can be written keeps what it held, and says that the disk is full", async () => {
  const path = join(folder, "cluster.json");
  writePrivateFile(path, "before", "test");
  // A limit on the size of files: the write that crosses it is cut short, as on a disk with little room.
  const program = `
    const { writePrivateFile } = await import(${JSON.stringify(resolve(import.meta.dir, "../../src/cluster/net/private-file.ts"))});
    try {
      writePrivateFile(${JSON.stringify(path)}, "x".repeat(20_000), "test");
      console.log("written");
    } catch (thrown) {
      console.log(thrown.code);
    }`;
  const child = Bun.spawn(
    ["sh", "-c", `trap '' XFSZ; ulimit -f 8; exec "$0" -e "$1"`, process.execPath, program],
    { stdout: "pipe", stderr: "pipe" },
  );
  const [said, wrong] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  expect({ said: said.trim(), wrong }).toEqual({ said: "disk_full", wrong: "" });
  expect(readPrivateFile(path)).toBe("before");
  expect(readdirSync(folder)).toEqual(["cluster.json"]);
});

test("a text of many bytes a letter comes back whole", () => {
  const path = join(folder, "text");
  const text = "Größe 🐪 ".repeat(10_000);
  writePrivateFile(path, text, "test");
  expect(readPrivateFile(path)).toBe(text);
});
