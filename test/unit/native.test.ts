// Runs the C tests (native/test/test_*.c, built by `make native-tests`) and reports each of their cases' failures.

import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";

const root = join(import.meta.dir, "../..");
const sources = readdirSync(join(root, "native/test")).filter((name) => /^test_.*\.c$/.test(name));

describe("the C library", () => {
  for (const source of sources) {
    const program = join(root, "build/test", source.replace(/\.c$/, ""));
    test(`passes ${source}`, async () => {
      expect(existsSync(program), `${program} is not built: run \`make native-tests\``).toBe(true);
      const run = Bun.spawn([program], { stdout: "pipe", stderr: "pipe" });
      const [out, err, code] = await Promise.all([run.stdout.text(), run.stderr.text(), run.exited]);
      const failures = out.split("\n").filter((line) => line.startsWith("not ok"));
      expect({ failures, stderr: code === 0 ? "" : err, code }).toEqual({
        failures: [],
        stderr: "",
        code: 0,
      });
      expect(out).toMatch(/\d+ passed, 0 failed/);
    }, 300_000);
  }
});
