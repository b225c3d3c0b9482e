// `caravan doctor --selftest` over the fake runtime: correct kernels pass, one with a fault is named, no GPU is said.

import { expect, test } from "bun:test";
import { join } from "node:path";
import type { Selftest } from "../../../src/engine/selftest.ts";

const MAIN = join(import.meta.dir, "../../../src/main.ts");
const ready = (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && (process.env.MSLC ?? "") !== "";
if (!ready) console.log("skipped: the GPU's self-test needs the fake runtime: bash test/metal/run.sh");
const withFake = test.skipIf(!ready);

async function selftest(args: string[], env: Record<string, string> = {}) {
  const run = Bun.spawn([process.execPath, MAIN, "doctor", "--selftest", ...args], {
    ...{ stdout: "pipe", stderr: "pipe" },
    env: { ...process.env, ...env },
  });
  const [out, err, code] = await Promise.all([run.stdout.text(), run.stderr.text(), run.exited]);
  return { out, err, code };
}

withFake(
  "all of a sample of cases pass, and the page says on what",
  async () => {
    const { out, code } = await selftest(["--quick"], { FAKEMETAL_MACOS: "14.2" });
    expect(out).toMatch(/^caravan \d+\.\d+\.\d+ GPU self-test\nFake Metal on a CPU, macOS 14\.2 \(24B83\)/);
    expect(out).toContain("residency sets: no (macOS 15 has them); bfloat16: yes");
    expect(out).toMatch(/^(\d+) of \1 cases equal the CPU's arithmetic within rounding/m);
    expect(out).toMatch(/^from GPU to processor and back.*: wait [\d.]+ µs.*, spin not possible/m);
    expect(out).toMatch(/^4 bits, groups of 64, 1 token +[\d.]+ +\d+ % +[\d.]+$/m);
    expect(code).toBe(0);
    expect(out.split("\n").length).toBeLessThan(25);
  },
  120_000,
);

withFake(
  "a kernel that computes something else is named, with its operation; what macOS 13 lacks is skipped",
  async () => {
    const { out, code } = await selftest(["--quick", "--json"], {
      FAKEMETAL_MACOS: "13.1",
      FAKEMETAL_EDIT:
        "sums[r][b] = fma(bias[r], total, sums[r][b])=>sums[r][b] = fma(bias[r], xv[0], sums[r][b])",
    });
    expect(code).toBe(1);
    const { cases } = JSON.parse(out) as Selftest;
    const wrong = cases.filter(({ ok, skipped }) => !ok && !skipped);
    expect(wrong.length).toBeGreaterThan(0);
    for (const { name, where, worst } of wrong) {
      expect(name).toMatch(/^weights of \d bits/);
      expect(where).not.toBe("");
      expect(worst).toBeGreaterThan(1);
    }
    expect(cases.filter(({ skipped }) => skipped).every(({ name }) => name.includes("bfloat16"))).toBe(true);
    // Weights without biases and attention are computed as before.
    expect(cases.some(({ ok, name }) => ok && name.startsWith("attention"))).toBe(true);
  },
  180_000,
);

withFake("where there is no GPU it says so", async () => {
  const { err, code } = await selftest(["--quick"], { CARAVAN_METAL_LIBRARY: "" });
  expect(code).toBe(1);
  expect(err).toContain("no Metal device: Metal is not available on this system");
});
