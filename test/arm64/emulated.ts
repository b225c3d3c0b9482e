// The arm64 executable, under the emulator, beside this machine's own: the same bits, the same answers. Run by run.sh, which
// names the executable in CARAVAN_TEST_ARM64 (not by `bun test`, which takes files that end in .test.ts).

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Place, PROGRAM } from "../tools/built-caravan.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";
import { until } from "../tools/until.ts";

const ARM64 = process.env.CARAVAN_TEST_ARM64 ?? "";
const GOLDEN = join(import.meta.dir, "../golden/data");
const place = new Place();

beforeAll(() => {
  if (ARM64 === "") throw new Error("CARAVAN_TEST_ARM64 names no executable: run test/arm64/run.sh");
  // Any tokens will do; the golden tests say which logits are right.
  const tokens = Array.from({ length: 70 }, (_, i) => (i * 197 + 11) % 512);
  writeFileSync(place.path("tokens.json"), JSON.stringify({ tokens }));
  writeTinyChatModel(join(place.models, "tiny"), 1);
});
afterAll(() => place.remove());

/** What a command that must succeed writes to stdout. */
async function run(program: string, args: readonly string[], env: Record<string, string>): Promise<string> {
  const child = Bun.spawn([program, ...args], {
    cwd: place.cwd,
    env: { ...place.env, ...env },
    stdout: "pipe",
    stderr: "pipe",
  });
  const [out, err, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  expect({ code, err: code === 0 ? "" : err }).toEqual({ code: 0, err: "" });
  return out;
}

test("says the version of this machine's executable", async () => {
  const own = await run(PROGRAM, ["--version"], {});
  expect(own).toMatch(/\d+\.\d+\.\d+/);
  expect(await run(ARM64, ["--version"], {})).toBe(own);
});

interface Variant {
  compute: "exact" | "fast";
  /** Kernel set to force. */
  set?: string;
  /** The processor that is emulated, by qemu's name. */
  processor?: string;
}

async function logits(program: string, model: string, variant: Variant): Promise<Uint8Array> {
  const { compute, set, processor } = variant;
  const options = ["--compute", compute, ...(set === undefined ? [] : ["--cpu", set])];
  const out = place.path("logits.npy");
  const tokens = ["--tokens-file", place.path("tokens.json"), "--out", out];
  await run(
    program,
    ["logits", join(GOLDEN, model), ...tokens, "--prefill", "40", "--piece", "7", ...options],
    processor === undefined ? {} : { QEMU_CPU: processor },
  );
  return readFileSync(out);
}

/** Where two files of logits differ first, or undefined. */
function difference(a: Uint8Array, b: Uint8Array): string | undefined {
  if (a.length !== b.length) return `${a.length} and ${b.length} bytes`;
  const at = a.findIndex((byte, i) => byte !== b[i]);
  return at < 0 ? undefined : `byte ${at} of ${a.length}`;
}

describe("logits have the bits of this machine's executable", () => {
  async function compare(model: string, variant: Variant): Promise<void> {
    const own = await logits(PROGRAM, model, { compute: variant.compute });
    expect(own.length).toBeGreaterThan(70 * 512 * 4);
    expect(difference(own, await logits(ARM64, model, variant))).toBeUndefined();
  }
  for (const model of ["scout-4bit", "scout-mixed", "maverick-4bit", "llama-4bit", "llama4text-bf16"]) {
    test(`${model}, fast`, () => compare(model, { compute: "fast" }));
  }
  for (const model of ["scout-mixed", "maverick-4bit", "llama4text-bf16"]) {
    test(`${model}, exact`, () => compare(model, { compute: "exact" }));
  }
  test("scout-mixed, fast, the dot-product kernels", () =>
    compare("scout-mixed", { compute: "fast", set: "neon-dotprod" }));
  test("scout-mixed, fast, on a processor with plain NEON alone", () =>
    compare("scout-mixed", { compute: "fast", processor: "cortex-a53" }));
});

/** What a node of `program` answers to one chat request. */
async function answer(program: string): Promise<unknown> {
  const log = Bun.file(place.path("node.log"));
  const child = Bun.spawn([program, "serve", "tiny", "--context", "256", "--port", "0"], {
    cwd: place.cwd,
    env: place.env,
    stdout: "pipe",
    stderr: log,
  });
  let text = "";
  const reading = (async () => {
    const decoder = new TextDecoder();
    for await (const bytes of child.stdout) text += decoder.decode(bytes, { stream: true });
  })();
  try {
    const url = () => /caravan listens at (\S+)/.exec(text)?.[1];
    await until(() => url() !== undefined || child.exitCode !== null, "the node listens", 30_000);
    if (url() === undefined) throw new Error(`the node did not start: ${await log.text()}`);
    const reply = await fetch(`${url()}/v1/chat/completions`, {
      method: "POST",
      body: JSON.stringify({
        model: "tiny",
        messages: [{ role: "user", content: "Hi" }],
        max_completion_tokens: 16,
        ignore_eos: true,
        temperature: 0,
      }),
    });
    if (!reply.ok) throw new Error(`${reply.status} ${await reply.text()}; the log: ${await log.text()}`);
    const { choices, usage } = (await reply.json()) as { choices: unknown; usage: unknown };
    return { choices, usage };
  } finally {
    child.kill("SIGTERM");
    await child.exited;
    await reading;
  }
}

test("a node answers a chat request with the text of this machine's executable", async () => {
  const own = await answer(PROGRAM);
  expect(own).toMatchObject({ usage: { completion_tokens: 16 } });
  expect(await answer(ARM64)).toEqual(own);
});
