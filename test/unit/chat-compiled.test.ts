import { afterAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Tokenizer } from "../../src/chat/tokenizer.ts";
import { TINY_BYTES } from "./chat-folders.ts";

const root = join(import.meta.dir, "../..");
const out = mkdtempSync(join(tmpdir(), "caravan-compiled-"));
afterAll(() => rmSync(out, { recursive: true }));

test("the text worker starts inside an executable, far from its sources", async () => {
  const program = join(out, "program");
  const entries = ["test/fixtures/chat/compiled-main.ts", "src/chat/text-worker.ts"];
  const build = Bun.spawnSync(
    [process.execPath, "build", "--compile", "--root", "src", ...entries, "--outfile", program],
    { cwd: root },
  );
  expect({ code: build.exitCode, errors: build.exitCode === 0 ? "" : build.stderr.toString() }).toEqual({
    code: 0,
    errors: "",
  });
  const run = Bun.spawnSync([program, TINY_BYTES, "né <|end|>"], { cwd: out, timeout: 100_000 });
  expect(run.stderr.toString()).toBe("");
  const ids = (await Tokenizer.load(TINY_BYTES)).encodeWithSpecials("né <|end|>");
  expect(JSON.parse(run.stdout.toString())).toEqual({ ids, text: "né <|end|>" });
}, 120_000);
