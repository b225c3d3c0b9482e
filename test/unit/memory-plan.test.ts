// The memory plan: what it says before loading is what the engine then counts; the context that it chooses is the largest
// that fits; what does not fit is refused with numbers.

import { describe, expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { evenShares } from "../../src/cluster/even-shares.ts";
import { shardPlan } from "../../src/cluster/shard.ts";
import { loadModel } from "../../src/engine/load-model.ts";
import { CaravanError } from "../../src/errors.ts";
import { type ModelConfig, parseModelConfig, readModelConfig } from "../../src/model/config.ts";
import { type LoadPlan, makeLoadPlan } from "../../src/model/load-plan.ts";
import { availableMemory } from "../../src/model/machine-memory.ts";
import {
  type MemoryPlan,
  type MemoryRequest,
  MOST_STREAMS,
  pageBytes,
  pageTokensOf,
  planMemory,
} from "../../src/model/memory-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import {
  type Llama4Name,
  llama4Checkpoint,
  llama4Config,
  llama4Shards,
  llama4Tensors,
} from "../tools/llama4-shapes.ts";

const DATA = join(import.meta.dir, "../golden/data");

function real(name: Llama4Name, layers = 48): LoadPlan {
  const config = parseModelConfig(llama4Config(name, layers), "/m/config.json");
  return makeLoadPlan(config, llama4Checkpoint(llama4Shards(llama4Tensors(name, layers)), "/m"));
}

const ROOMY: MemoryRequest = {
  kvType: "bf16",
  threads: 8,
  maxTokens: 512,
  maxLogits: 32,
  available: 1e15,
};

/** Bytes of everything that a plan has decided on. */
const total = (plan: MemoryPlan) =>
  plan.weightsMapped + plan.weightsCopied + plan.kvBytes + plan.scratchBytes;

function refusal(run: () => unknown): CaravanError {
  try {
    run();
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was refused");
}

describe("what is planned is what the engine counts", () => {
  test.each(readdirSync(DATA))("%s", async (name) => {
    const dir = join(DATA, name);
    const plan = makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
    const planned = planMemory(plan, {
      ...ROOMY,
      context: 300,
      streams: 3,
      threads: 2,
      maxTokens: 64,
      maxLogits: 64,
    });
    const loaded = await loadModel({
      model: name,
      modelDir: dir,
      context: 300,
      streams: 3,
      threads: 2,
      compute: "fast",
      piece: () => 64,
    });
    try {
      expect({ mapped: planned.weightsMapped, copied: planned.weightsCopied, kv: planned.kvBytes }).toEqual({
        mapped: loaded.memory.weights_mapped,
        copied: loaded.memory.weights_copied,
        kv: loaded.memory.kv,
      });
      expect(planned.scratchBytes).toBeGreaterThanOrEqual(loaded.memory.scratch);
      expect(loaded.contextTokens).toBe(300);
    } finally {
      await loaded.close();
    }
  });
});

test.each([
  ["scout-4bit", 2, 1],
  ["llama-4bit", 4, 1],
  ["maverick-4bit", 2, 2],
])("%s on %d × %d ranks of this machine, to the byte", async (name, tensor, pipeline) => {
  const loaded = await loadModel({
    ...{ model: name, modelDir: join(DATA, name), context: 300, streams: 3, threads: 1, tensor, pipeline },
    piece: () => 64,
  });
  try {
    const { memory, memoryPlan } = loaded;
    expect({ mapped: memory.weights_mapped, copied: memory.weights_copied, kv: memory.kv }).toEqual({
      mapped: memoryPlan.weightsMapped,
      copied: memoryPlan.weightsCopied,
      kv: memoryPlan.kvBytes,
    });
    expect(memoryPlan.weightsCopied).toBeGreaterThan(0);
    expect(memoryPlan.scratchBytes).toBeGreaterThanOrEqual(memory.scratch);
  } finally {
    await loaded.close();
  }
});

describe("pages", () => {
  test("have 64 tokens, or the largest power of two from 16 on that divides the chunk", () => {
    expect([8192, 64, 16, 32, 48, 96, 160].map(pageTokensOf)).toEqual([64, 64, 16, 32, 16, 32, 32]);
    expect(() => pageTokensOf(24)).toThrow(/24 is not a multiple of 16/);
  });

  test("of Scout cost 4 KiB a token and layer in bf16", () => {
    const { full, chunked } = pageBytes(real("scout").config, "bf16", 64);
    expect([full / 64, chunked / 64]).toEqual([12 * 4096, 36 * 4096]);
  });

  test("of chunked layers stop at a chunk and a page: 131,072 tokens of Scout take 7.7 GB, not 25.8", () => {
    const planned = planMemory(real("scout"), { ...ROOMY, context: 131072, streams: 1 });
    expect(planned.chunkPages).toBe(8192 / 64 + 1);
    expect(planned.fullPages).toBe(131072 / 64);
    expect(planned.kvBytes).toBe(12 * 4096 * 131072 + 36 * 4096 * (8192 + 64));
    expect(planned.kvBytes / 1e9).toBeCloseTo(7.66, 2);
  });

  test("of a short context do not reserve a whole chunk, and a model without chunks has none", () => {
    expect(planMemory(real("scout"), { ...ROOMY, context: 1000, streams: 1 })).toMatchObject({
      fullPages: 16,
      chunkPages: 16,
    });
    const config = readModelConfig(join(DATA, "llama-4bit"));
    const planned = planMemory(
      { config, files: [], tensors: [], unused: [] },
      { ...ROOMY, context: 100, streams: 2 },
    );
    expect(planned).toMatchObject({ pageTokens: 64, fullPages: 4, chunkPages: 0 });
  });
});

describe("the context", () => {
  test("is the model's limit where memory is plenty", () => {
    const planned = planMemory(real("scout"), ROOMY);
    expect(planned).toMatchObject({ context: 10485760, streams: MOST_STREAMS });
    expect(planMemory(real("maverick"), ROOMY).context).toBe(1048576);
  });

  test("is otherwise the largest that fits, in whole pages", () => {
    const scout = real("scout");
    const base = total(planMemory(scout, { ...ROOMY, context: 64, streams: 1 }));
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 400 }), (gigabytes) => {
        const available = (base + gigabytes * 1e9) / 0.9;
        const planned = planMemory(scout, { ...ROOMY, available });
        expect(total(planned)).toBeLessThanOrEqual(available * 0.9);
        if (planned.context === scout.config.contextLength) return;
        const more = { ...ROOMY, available, context: planned.context + 64, streams: 1 };
        expect(refusal(() => planMemory(scout, more)).code).toBe("out_of_memory");
      }),
      { numRuns: 60 },
    );
  });

  test("leaves room for as many streams as were asked for", () => {
    const scout = real("scout");
    const available = (total(planMemory(scout, { ...ROOMY, context: 64, streams: 1 })) + 30e9) / 0.9;
    const one = planMemory(scout, { ...ROOMY, available, streams: 1 });
    const four = planMemory(scout, { ...ROOMY, available, streams: 4 });
    expect(four.streams).toBe(4);
    expect(four.context).toBeLessThan(one.context / 2);
    expect(four.context).toBeGreaterThan(8192);
    expect(total(four)).toBeLessThanOrEqual(available * 0.9);
    expect(four.fullPages).toBe(4 * Math.ceil(four.context / 64));
  });

  test("beyond the model's limit is refused", () => {
    const error = refusal(() => planMemory(real("maverick"), { ...ROOMY, context: 1048577 }));
    expect(error).toMatchObject({ code: "invalid_argument", param: "context" });
    expect(error.message).toContain("1048576");
  });
});

describe("what does not fit is refused with numbers", () => {
  test("weights: the model is too large", () => {
    const error = refusal(() => planMemory(real("maverick"), { ...ROOMY, available: 64e9 }));
    expect(error.code).toBe("out_of_memory");
    expect(error.message).toMatch(/weights 225\.40 GB.*57\.60 GB can be used: 1\d\d\.\d\d GB too much/);
    expect(error.hint).toContain("smaller or more strongly quantized");
  });

  test("cache: the context is too long, by so much", () => {
    const scout = real("scout");
    const error = refusal(() =>
      planMemory(scout, { ...ROOMY, context: 4_000_000, streams: 1, available: 128e9 }),
    );
    expect(error.message).toMatch(/cache 197\.83 GB/);
    expect(error.hint).toContain("--context");
    const [, excess = "0"] = /([\d.]+) GB too much/.exec(error.message) ?? [];
    const enough = 128e9 + (Number(excess) + 0.01) * (1e9 / 0.9);
    const planned = planMemory(scout, { ...ROOMY, context: 4_000_000, streams: 1, available: enough });
    expect(planned.context).toBe(4_000_000);
  });
});

describe("ranks", () => {
  const cut = (plan: LoadPlan, tensor: number, pipeline: number) => {
    const shares = evenShares(plan, tensor, pipeline);
    return shares.map((_, rank) => shardPlan(plan, shares, rank));
  };
  const asked: MemoryRequest = { ...ROOMY, context: 131072, streams: 1 };

  test("share the cache: together they have one model's, with the same pages on each", () => {
    const scout = real("scout");
    const whole = planMemory(scout, asked);
    for (const [tensor, pipeline] of [
      [2, 1],
      [4, 1],
      [1, 3],
      [2, 2],
    ] as const) {
      const ranks = cut(scout, tensor, pipeline).map((plan) => planMemory(plan, asked));
      expect(ranks.reduce((sum, { kvBytes }) => sum + kvBytes, 0)).toBe(whole.kvBytes);
      for (const { fullPages, chunkPages } of ranks)
        expect([fullPages, chunkPages]).toEqual([whole.fullPages, whole.chunkPages]);
    }
  });

  test("on one machine are planned together", () => {
    const plans = cut(real("maverick"), 2, 2);
    const each = plans.map((plan) => planMemory(plan, asked));
    const together = planMemory(plans, asked);
    expect(total(together)).toBe(each.reduce((sum, plan) => sum + total(plan), 0));
    expect(refusal(() => planMemory(plans, { ...asked, available: 200e9 })).message).toMatch(
      /weights 22\d\.\d\d GB/,
    );
  });

  test("of four have a quarter of the weights each, and room where the whole model has none", () => {
    const scout = real("scout");
    const available = 32e9;
    expect(refusal(() => planMemory(scout, { ...ROOMY, available })).code).toBe("out_of_memory");
    const [first] = cut(scout, 4, 1);
    if (first === undefined) throw new Error("no rank");
    const plan = planMemory(first, { ...ROOMY, available });
    expect(plan.weightsMapped + plan.weightsCopied).toBeLessThan(0.26 * 60.6e9);
    expect(plan.context).toBeGreaterThan(100_000);
  });
});

test("scratch grows with threads, tokens and logits", () => {
  const scratch = (change: Partial<MemoryRequest>) =>
    planMemory(real("scout", 4), { ...ROOMY, context: 64, streams: 1, ...change }).scratchBytes;
  const base = scratch({});
  expect(scratch({ threads: 16 })).toBeGreaterThan(base);
  expect(scratch({ maxTokens: 1024 })).toBeGreaterThan(base);
  expect(scratch({ maxLogits: 64 }) - base).toBe(32 * 202048 * 4);
});

test("this machine's memory is known: some of it is available, never more than all", () => {
  const { total: all, available } = availableMemory();
  expect(available).toBeGreaterThan(64e6);
  expect(available).toBeLessThanOrEqual(all);
});

test("Maverick's config has what the plan counts on", () => {
  const config: ModelConfig = real("maverick").config;
  expect(config.layers.filter(({ moe }) => moe).length).toBe(24);
  expect(config.layers.filter(({ chunked }) => chunked).length).toBe(36);
  expect(config.layers.some(({ qkNorm }) => qkNorm)).toBe(false);
});
