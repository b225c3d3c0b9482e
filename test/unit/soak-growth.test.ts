// What the soaks judge memory by: a slope that single samples do not move, and the memory of a family of processes.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { growth, levelled, mean } from "../soak/growth.ts";
import { processMemory } from "../soak/process-memory.ts";
import { until } from "../tools/until.ts";

const samples = (bytes: number[]) => bytes.map((each, i) => ({ at: i * 0.1, bytes: each }));

describe("growth", () => {
  test("of a line is its slope, and of a level is nothing", () => {
    expect(growth(samples([5, 6, 7, 8, 9]))).toBeCloseTo(10);
    expect(growth(samples([7, 7, 7, 7]))).toBe(0);
    expect(growth(samples([9, 8, 7]))).toBeCloseTo(-10);
  });

  test("is not moved by two odd samples of ten, where least squares would be", () => {
    expect(growth(samples([100, 101, 100, 101, 100, 101, 100, 101, 190, 190]))).toBeLessThan(20);
    expect(Math.abs(growth(samples([190, 100, 101, 100, 101, 100, 101, 100, 101, 100])))).toBeLessThan(10);
  });

  test("sees a leak below a sawtooth of twice its size", () => {
    const leak = Array.from({ length: 20 }, (_, i) => 1000 + i * 2 + (i % 4) * 4);
    expect(growth(samples(leak))).toBeGreaterThan(15);
    expect(growth(samples(leak)) / mean(samples(leak))).toBeGreaterThan(0.01);
  });

  test("of fewer than two samples is unknown", () => {
    expect(growth(samples([5]))).toBeNaN();
    expect(growth([])).toBeNaN();
  });
});

describe("levelled", () => {
  test("is true once two in turn are no higher than before, and never of what only rises", () => {
    expect(levelled([100, 104, 107, 106, 107])).toBe(true);
    expect(levelled([100, 104, 107, 106, 108])).toBe(false);
    const rising = Array.from({ length: 40 }, (_, i) => 100 + i * 0.01);
    expect(rising.some((_, i) => levelled(rising.slice(0, i + 1)))).toBe(false);
  });

  test("is not known of three", () => {
    expect(levelled([100, 100, 100])).toBe(false);
    expect(levelled([100, 100, 100, 100])).toBe(true);
  });
});

const onLinux = process.platform === "linux";
if (!onLinux) console.log("skipped: the memory of processes is read from /proc");

describe.skipIf(!onLinux)("processMemory", () => {
  const folder = mkdtempSync(join(tmpdir(), "caravan-memory-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test("finds a process's descendants, and counts what they map below a folder apart", async () => {
    const mapped = join(folder, "weights");
    writeFileSync(mapped, new Uint8Array(8 << 20).fill(1));
    const script = `const bytes = Bun.mmap(${JSON.stringify(mapped)});
      let sum = 0; for (let i = 0; i < bytes.length; i += 4096) sum += bytes[i];
      console.log(sum); setInterval(() => bytes[0], 1000);`;
    const parent = Bun.spawn(["sh", "-c", `"${process.execPath}" -e '${script}'; true`], { stdout: "pipe" });
    let child: number | undefined;
    try {
      const { value } = await parent.stdout.getReader().read();
      expect(new TextDecoder().decode(value).trim()).toBe("2048");
      const family = processMemory(parent.pid, folder);
      child = family[1]?.pid;
      expect(family.map(({ apart }) => apart >> 20)).toEqual([0, 8]);
      expect(family[1]?.resident).toBeGreaterThan(20e6);
      expect(family[1]?.peak).toBeGreaterThanOrEqual(family[1]?.resident ?? Number.POSITIVE_INFINITY);
    } finally {
      if (child !== undefined) process.kill(child, "SIGKILL");
      await parent.exited;
    }
    await until(() => processMemory(parent.pid).length === 0, "the processes are gone");
  });
});
