// The memory that an engine takes is the memory that was planned: weights, cache and scratch, counted by the engine where
// it reserves them.

import { describe, expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { loadModel } from "../../src/engine/load-model.ts";

const DATA = join(import.meta.dir, "data");
/** Of the planned bytes. */
const LEAST = 0.97;
const MOST = 1.03;

describe.each(readdirSync(DATA).filter((name) => !name.includes("edge")))("%s", (name) => {
  test.each([
    { compute: "exact", streams: 1, context: 256 },
    { compute: "fast", streams: 4, context: 4096 },
  ] as const)("takes the memory that was planned ($compute, $streams streams)", async (options) => {
    const dir = join(DATA, name);
    const model = await loadModel({ model: name, modelDir: dir, threads: 2, device: "cpu", ...options });
    try {
      const { memory, memoryPlan: plan } = model;
      const planned = plan.weightsMapped + plan.weightsCopied + plan.kvBytes + plan.scratchBytes;
      const taken = memory.weights_mapped + memory.weights_copied + memory.kv + memory.scratch;
      expect(memory.kv).toBe(plan.kvBytes);
      expect(taken / planned).toBeGreaterThan(LEAST);
      expect(taken / planned).toBeLessThan(MOST);
    } finally {
      await model.close();
    }
  });
});
