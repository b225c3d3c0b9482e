// The executables of `make dist` (dist/caravan-*): those for Macs as macOS reads them, page by page, those for Linux for what
// they import, and that what is inside is this version. Skipped where they are not built.

import { describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { readMachO } from "./mach-o.ts";

const ROOT = join(import.meta.dir, "../..");
const DIST = join(ROOT, "dist");
const BUILT = join(ROOT, "build/release");
const built = existsSync(join(DIST, "SHA256SUMS"));
if (!built) console.log("skipped: the executables of a release are not built (make dist)");

const read = (...path: string[]) => readFileSync(join(...path));
/** Compiled by zig with this name; the executable carries it whole. */
const dylib = () => read(BUILT, "darwin-arm64/libcaravan.dylib");
const mac = () => read(DIST, "caravan-darwin-arm64");

describe.skipIf(!built)("a release", () => {
  test("has the checksums that it says", () => {
    const lines = read(DIST, "SHA256SUMS").toString().trim().split("\n");
    expect(lines.length).toBe(3);
    for (const line of lines) {
      const [sum, name = ""] = line.split(/\s+/);
      expect(createHash("sha256").update(read(DIST, name)).digest("hex")).toBe(sum ?? "");
    }
  });

  test.each([
    ["caravan-darwin-arm64", "darwin-arm64/libcaravan.dylib"],
    ["caravan-linux-x64", "linux-x64/libcaravan.so"],
    ["caravan-linux-arm64", "linux-arm64/libcaravan.so"],
  ])("carries its C library, the model cards and the page: %s", (name, library) => {
    const executable = read(DIST, name);
    expect(executable.indexOf(read(BUILT, library))).toBeGreaterThan(0);
    for (const card of readdirSync(join(ROOT, "cards"))) {
      const id = /^model_id = "([^"]+)"/m.exec(read(ROOT, "cards", card).toString())?.[1];
      expect([card, executable.includes(id ?? card)]).toEqual([card, true]);
    }
    expect(executable.includes("<!doctype html>") || executable.includes("<!DOCTYPE html>")).toBe(true);
  });

  test("has no path of the machine that built it", () => {
    for (const name of [
      "darwin-arm64/libcaravan.dylib",
      "linux-x64/libcaravan.so",
      "linux-arm64/libcaravan.so",
    ])
      expect([name, read(BUILT, name).includes(ROOT)]).toEqual([name, false]);
  });
});

describe.skipIf(!built)("the executable for Macs", () => {
  test("is one that macOS 13 on arm64 has no reason to refuse", () => {
    const { faults, ...file } = readMachO(mac());
    expect(faults).toEqual([]);
    expect(file).toMatchObject({ kind: "executable", oldest: "13.0", searched: [] });
    expect(file.signature).toMatchObject({ adHoc: true });
    expect(file.signature?.pages).toBeGreaterThan(1000);
  });

  test("imports only what every Mac has", () => {
    for (const library of readMachO(mac()).libraries)
      expect(library).toMatch(
        /^\/usr\/lib\/(libSystem\.B|libc\+\+\.1|libicucore\.A|libresolv\.9|libobjc\.A)\.dylib$/,
      );
  });

  test("may compile JavaScript at run time and load its own C library: it is not hardened, so needs no entitlements", () => {
    expect(readMachO(mac()).signature).toMatchObject({ hardened: false, entitlements: "" });
  });

  test("has a C library that can be loaded from anywhere and imports only the system's", () => {
    const { faults, ...file } = readMachO(dylib());
    expect(faults).toEqual([]);
    expect(file).toMatchObject({
      kind: "library",
      oldest: "13.0",
      libraries: ["/usr/lib/libSystem.B.dylib"],
    });
  });
});

describe.skipIf(!built)("the check reports", () => {
  const faultsOf = (change: (bytes: Uint8Array) => Uint8Array): string =>
    readMachO(change(new Uint8Array(dylib()))).faults.join("; ");
  const set =
    (at: number, ...values: number[]) =>
    (bytes: Uint8Array) => {
      bytes.set(values, at);
      return bytes;
    };

  test("a changed byte, by its page", () => {
    expect(faultsOf(set(5 * 16384 + 7, 0xaa, 0xbb))).toMatch(/^the hash of page \d+ differs \(1 in all\)$/);
  });
  test("a file that was cut off", () => {
    expect(faultsOf((bytes) => bytes.subarray(0, -100))).toContain("beyond the end of the file");
  });
  test("bytes behind the end", () => {
    expect(faultsOf((bytes) => Buffer.concat([bytes, Buffer.alloc(16)]))).toContain("does not end");
  });
  test("another processor", () => {
    expect(faultsOf(set(4, 7))).toContain("not for arm64");
  });
  test("a file that is no Mach-O", () => {
    expect(() => readMachO(new Uint8Array(64))).toThrow("not a Mach-O file");
  });
});

describe.skipIf(!built)("the executables for Linux", () => {
  test.each(["caravan-linux-x64", "caravan-linux-arm64"])("%s runs with glibc 2.28", (name) => {
    const versions = read(DIST, name)
      .toString("latin1")
      .matchAll(/GLIBC_2\.(\d+)/g);
    const newest = Math.max(...[...versions].map(([, minor]) => Number(minor)));
    expect(newest).toBeGreaterThan(0);
    expect(newest).toBeLessThanOrEqual(28);
  });
});
