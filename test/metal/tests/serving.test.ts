// Serving on the Metal backend over the fake runtime: the runner process, batches, known prefixes, the choice of the device,
// and `caravan run` with real weights.

import { afterAll, afterEach, beforeAll, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { TextService } from "../../../src/chat/text-service.ts";
import { runLogits } from "../../../src/engine/logits.ts";
import { chooseDevice } from "../../../src/engine/metal-device.ts";
import {
  type EngineStatus,
  type GenerateEvent,
  type GenerateRequest,
  GREEDY,
} from "../../../src/engine/protocol.ts";
import { RunnerClient, type RunnerClientOptions } from "../../../src/engine/runner-client.ts";
import { readModelConfig } from "../../../src/model/config.ts";
import { TINY_VOCAB, writeTinyLlama4 } from "../../tools/tiny-llama4.ts";

const ROOT = join(import.meta.dir, "../../..");
const ready = (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && (process.env.MSLC ?? "") !== "";
if (!ready) console.log("skipped: serving on Metal needs the fake runtime: bash test/metal/run.sh");
const withFake = test.skipIf(!ready);

let dir: string;
const clients: RunnerClient[] = [];
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-metal-serving-"));
  writeTinyLlama4(dir);
});
afterEach(async () => {
  await Promise.all(clients.splice(0).map((client) => client.close()));
});
afterAll(() => rmSync(dir, { recursive: true }));

function client(more: Partial<RunnerClientOptions> = {}): RunnerClient {
  const made = new RunnerClient({
    ...{ model: "tiny", modelDir: dir, threads: 1, context: 512, streams: 4, device: "metal" },
    onLog: () => {},
    ...more,
  });
  clients.push(made);
  return made;
}

function request(id: string, tokens: number[], max_tokens: number): GenerateRequest {
  return { id, tokens, max_tokens, stop_tokens: [], sampling: GREEDY };
}

const prompt = (length: number) => Array.from({ length }, (_, i) => (i * 13 + length) % TINY_VOCAB);

async function answer(engine: RunnerClient, asked: GenerateRequest) {
  const events: GenerateEvent[] = [];
  for await (const event of engine.generate(asked)) events.push(event);
  const end = events.at(-1);
  if (end?.type !== "finish") throw new Error(JSON.stringify(end));
  return {
    tokens: events.flatMap((event) => (event.type === "token" ? [event.token] : [])),
    cached: end.usage.cached_tokens,
  };
}

/** The status once the model is loaded. */
async function statusOf(options: Partial<RunnerClientOptions>): Promise<EngineStatus> {
  const engine = client(options);
  await engine.ready();
  return engine.status();
}

withFake(
  "streams answer together as they do alone, and as the CPU does, and a known prefix changes nothing",
  async () => {
    const engine = client({ compute: "exact" });
    await engine.ready();
    expect(engine.status()).toMatchObject({ device: "metal", policy: { mode: "batched" } });
    const lengths = [3, 40, 90];
    const alone: number[][] = [];
    for (const length of lengths) {
      const { tokens, cached } = await answer(engine, request(`alone${length}`, prompt(length), 12));
      expect(cached).toBe(0);
      alone.push(tokens);
    }
    const together = await Promise.all(
      lengths.map((length) => answer(engine, request(`with${length}`, prompt(length), 12))),
    );
    expect(together.map(({ tokens }) => tokens)).toEqual(alone);
    expect(together.at(-1)?.cached).toBeGreaterThan(0);
    const cpu = client({ compute: "exact", device: "cpu", prefixCache: false });
    for (const [i, length] of lengths.entries())
      expect((await answer(cpu, request(`cpu${length}`, prompt(length), 12))).tokens).toEqual(alone[i] ?? []);
  },
  120_000,
);

withFake(
  "auto takes the GPU, and the CPU with a sentence where the kernels lack something",
  async () => {
    const gpu = await statusOf({ device: "auto" });
    expect(gpu.device).toBe("metal");
    expect(gpu.device_reason).toMatch(/^Fake Metal on a CPU, whose GPU may use [\d.]+ GB$/);
    const config = { ...readModelConfig(join(ROOT, "test/golden/data/scout-4bit")), headDim: 48 };
    const wanted = { config, kvType: () => "bf16" as const };
    const cpu = chooseDevice("auto", wanted);
    expect(cpu.device).toBe("cpu");
    expect(cpu.reason).toBe("the CPU, because the Metal kernels have no heads of 48 elements");
    expect(() => chooseDevice("metal", wanted)).toThrow("the Metal kernels have no heads of 48 elements");
  },
  60_000,
);

/** In a process of its own: the fake runtime reads its environment once. */
async function caravan(args: string[], env: Record<string, string> = {}) {
  const child = Bun.spawn([process.execPath, join(ROOT, "src/main.ts"), ...args], {
    ...{ stdout: "pipe", stderr: "pipe", cwd: dir },
    env: { ...process.env, CARAVAN_PORT: "1", CARAVAN_DATA_DIR: join(dir, "data"), ...env },
  });
  const [out, err, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  return { out, err, code };
}

for (const [name, folder, count] of [
  ["SmolLM2", join(ROOT, ".models/smollm2"), 4],
  ["smol-scout (the shape of Llama 4)", join(ROOT, "build/smol-scout"), 2],
] as const) {
  const here = existsSync(join(folder, "tokenizer.json"));
  if (!here) console.log(`skipped: an answer of ${name} on Metal (${folder} is not there)`);
  test.skipIf(!ready || !here)(
    `caravan run --device metal: ${name} answers with the greedy tokens of its logits`,
    async () => {
      const text = await TextService.start(folder);
      const { ids } = await text.renderChat({
        messages: [{ role: "user", content: "Hi" }],
        add_generation_prompt: true,
      });
      const engine = client({ model: name, modelDir: folder, speculate: false });
      const { tokens } = await answer(engine, request("greedy", ids, count));
      await engine.close();
      const all = [...ids, ...tokens];
      const { data, vocab } = await runLogits({
        ...{ modelDir: folder, tokens: all.slice(0, -1), prefill: ids.length, device: "metal" },
      });
      for (const [i, token] of tokens.entries()) {
        const at = (ids.length - 1 + i) * vocab;
        const row = data.subarray(at, at + vocab);
        expect(row.indexOf(row.reduce((a, b) => Math.max(a, b)))).toBe(token);
      }
      text.close();
      if (name !== "SmolLM2") return; // the command takes the same way with any model, for half a minute more
      const run = await caravan(
        ["run", folder, "Hi", "--here", "--device", "metal", "-t", "0", "-n", `${count}`, "--quiet"],
        { CARAVAN_CONFIG_DIR: dir },
      );
      expect(run).toMatchObject({ code: 0, err: "" });
      expect(run.out.trim().length).toBeGreaterThan(0);
    },
    180_000,
  );
}
