// Which kernel set is used: CARAVAN_CPU limits it, a wrong name is refused, and the tile kernel that was built consists of the
// instructions that its software model stands for in test_amx.c.

import { describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { bestCpu, cpuLevel, cpuName, cpuNames } from "../../src/engine/binding.ts";

const root = join(import.meta.dir, "../..");
const AMX_OBJECT = join(root, "build/obj/backend/cpu/x86/amx_tile.o");
const X86_SETS = ["scalar", "avx2", "avx512", "avx512-vnni", "amx-int8"];

/** What bestCpu says, or the error's text, in a process with CARAVAN_CPU set. */
async function bestWith(limit: string): Promise<string> {
  const script = `import { bestCpu } from ${JSON.stringify(join(root, "src/engine/binding.ts"))};
try { console.log(JSON.stringify(bestCpu())); } catch (error) { console.log(error.toText() + " / " + error.hint); }`;
  const run = Bun.spawn([process.execPath, "-e", script], {
    env: { ...process.env, CARAVAN_CPU: limit },
    stdout: "pipe",
    stderr: "inherit",
  });
  const [out, code] = await Promise.all([run.stdout.text(), run.exited]);
  expect(code).toBe(0);
  return out.trim();
}

describe("kernel sets", () => {
  test("have names that lead back to their numbers", () => {
    for (const name of cpuNames()) expect(cpuName(cpuLevel(name) ?? -1)).toBe(name);
    expect(cpuNames()).toContain(bestCpu().name);
    expect(cpuLevel("unknown")).toBeUndefined();
  });

  test("above the one that CARAVAN_CPU names are not used, and a note says why", async () => {
    const best = bestCpu();
    const limited = process.arch === "x64" ? X86_SETS : ["scalar"];
    for (const name of limited) {
      const level = Math.min(cpuLevel(name) ?? 0, best.level);
      expect(JSON.parse(await bestWith(name)), name).toEqual({
        level,
        name: cpuName(level),
        note: "CARAVAN_CPU allows no faster set",
      });
    }
    expect(JSON.parse(await bestWith(""))).toEqual(best);
  });

  test("are listed when CARAVAN_CPU names none of them", async () => {
    const text = await bestWith("avx1024");
    expect(text).toContain('there is no kernel set "avx1024"');
    expect(text).toContain("avx512-vnni, amx-int8, neon");
  });
});

describe("the tile kernel as it was built", () => {
  test("loads, multiplies and stores tiles, configures them once a product and gives them back", () => {
    const objdump = Bun.which("objdump");
    const missing =
      process.arch !== "x64"
        ? "AMX is x86-64's"
        : objdump === null
          ? "objdump is not here"
          : existsSync(AMX_OBJECT)
            ? undefined
            : `${AMX_OBJECT} is not built`;
    if (missing !== undefined || objdump === null) {
      console.log(`skipped: the tile kernel's instructions: ${missing}`);
      return;
    }
    const run = Bun.spawnSync([objdump, "-d", "--no-show-raw-insn", AMX_OBJECT]);
    expect(run.exitCode).toBe(0);
    const used = new Map<string, number>();
    for (const [, name = ""] of run.stdout
      .toString()
      .matchAll(/^\s*[0-9a-f]+:\s+(ldtilecfg|sttilecfg|tile\w+|tdp\w+)\b/gm))
      used.set(name, (used.get(name) ?? 0) + 1);
    expect([...used.keys()].sort()).toEqual([
      "ldtilecfg",
      "tdpbsud",
      "tileloadd",
      "tilerelease",
      "tilestored",
      "tilezero",
    ]);
    // Four ways through multiply(): 16 or 32 activation rows by 16 or 32 weight rows.
    expect(used.get("tdpbsud")).toBeGreaterThanOrEqual(1 + 2 + 2 + 4);
    expect(used.get("tilezero")).toBeGreaterThanOrEqual(1 + 2 + 2 + 4);
    expect(used.get("tilestored")).toBeGreaterThanOrEqual(1 + 2 + 2 + 4);
  });
});
