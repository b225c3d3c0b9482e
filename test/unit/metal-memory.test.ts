// What a Mac's GPU may use, and what a model takes of it: Scout and Maverick in real sizes, with the limit that macOS sets.

import { describe, expect, test } from "bun:test";
import { evenShares } from "../../src/cluster/even-shares.ts";
import { shardPlan } from "../../src/cluster/shard.ts";
import { CaravanError } from "../../src/errors.ts";
import { parseModelConfig } from "../../src/model/config.ts";
import { type LoadPlan, makeLoadPlan } from "../../src/model/load-plan.ts";
import { type MemoryPlan, type MemoryRequest, planMemory } from "../../src/model/memory-plan.ts";
import { metalScratchBytes, raiseLimitCommand, usableOfWorkingSet } from "../../src/model/metal-memory.ts";
import { llama4Checkpoint, llama4Config, llama4Shards, llama4Tensors } from "../tools/llama4-shapes.ts";

function real(name: "scout" | "maverick"): LoadPlan {
  const config = parseModelConfig(llama4Config(name, 48), "/m/config.json");
  return makeLoadPlan(config, llama4Checkpoint(llama4Shards(llama4Tensors(name, 48)), "/m"));
}

const GIB = 2 ** 30;
/** macOS lets the GPU use about three quarters of a large memory. */
function mac(gigabytes: number): MemoryRequest {
  return {
    ...{ kvType: "bf16", threads: 12, maxTokens: 512, maxLogits: 32, available: gigabytes * 0.3 * GIB },
    gpu: { workingSet: gigabytes * 0.75 * GIB, total: gigabytes * GIB, alone: true },
  };
}

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

describe("a model on a Mac's GPU", () => {
  const scout = real("scout");

  test("may take more than 60 % of the machine's memory: the GPU's limit counts, not the free memory", () => {
    const plan = planMemory(scout, mac(96));
    expect(total(plan) / (96 * GIB)).toBeGreaterThan(0.6);
    expect(total(plan)).toBeLessThanOrEqual(usableOfWorkingSet(72 * GIB));
    expect(plan.context).toBeGreaterThanOrEqual(8192);
  });

  test("is refused with numbers where it does not fit, with the command that raises the limit where that would do", () => {
    const small = refusal(() => planMemory(scout, { ...mac(72), context: 8192, streams: 1 }));
    expect(small.code).toBe("out_of_memory");
    expect(small.message).toMatch(/the GPU's working set is 57\.98 GB\): [\d.]+ GB too much$/);
    const command = /sudo sysctl iogpu\.wired_limit_mb=(\d+)/.exec(small.hint ?? "")?.[1];
    expect(command).toBeDefined();
    // With that limit it fits.
    const raised = mac(72);
    if (raised.gpu !== undefined) raised.gpu.workingSet = Number(command) * 2 ** 20;
    expect(planMemory(scout, { ...raised, context: 8192, streams: 1 }).context).toBe(8192);
    // No limit makes 48 GB enough.
    expect(refusal(() => planMemory(scout, mac(48))).hint).not.toContain("iogpu");
  });

  test("split over ranks of one Mac, the ranks' sum counts against the one working set", () => {
    const shares = evenShares(scout, 2, 1);
    const ranks = [0, 1].map((rank) => shardPlan(scout, shares, rank));
    const sizes = { context: 8192, streams: 1 };
    const [one, both] = [
      planMemory(scout, { ...mac(96), ...sizes }),
      planMemory(ranks, { ...mac(96), ...sizes }),
    ];
    const alone = ranks.map((rank) => total(planMemory(rank, { ...mac(96), ...sizes })));
    const sum = alone.reduce((a, b) => a + b, 0);
    expect(total(both)).toBe(sum);
    // What both hold (embedding, norms, router) and each one's scratch come on top of the model's own size.
    expect(total(both)).toBeGreaterThan(total(one));
    expect(total(both)).toBeLessThan(1.1 * total(one));
    // A working set that holds each rank, but not both, is refused with their sum.
    const tight = mac(96);
    if (tight.gpu !== undefined) tight.gpu.workingSet = sum * 0.9;
    for (const rank of ranks) expect(planMemory(rank, { ...tight, ...sizes }).context).toBe(8192);
    const refused = refusal(() => planMemory(ranks, { ...tight, ...sizes }));
    expect(refused.code).toBe("out_of_memory");
    expect(refused.message).toContain(`${(sum / 1e9).toFixed(2)} GB`);
  });

  test("on a system that is no Mac the machine's free memory limits it too", () => {
    const request = mac(512);
    if (request.gpu !== undefined) request.gpu.alone = false;
    request.available = 40e9;
    expect(refusal(() => planMemory(scout, request)).code).toBe("out_of_memory");
  });

  test("needs scratch that grows with the step, not with the context", () => {
    const sizes = { kvType: "bf16", maxLogits: 32 } as const;
    const short = metalScratchBytes(scout, { ...sizes, maxTokens: 16 });
    const long = metalScratchBytes(scout, { ...sizes, maxTokens: 512 });
    expect(long).toBeGreaterThan(short);
    expect(long).toBeLessThan(0.25e9);
  });
});

test("raising the limit keeps memory for the system", () => {
  expect(raiseLimitCommand(60 * GIB, 64 * GIB)).toBeUndefined();
  expect(raiseLimitCommand(50 * GIB, 64 * GIB)).toMatch(/^sudo sysctl iogpu\.wired_limit_mb=5\d{4}$/);
});
