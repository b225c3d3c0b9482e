// The choice between sequential and batched, and the reason that people read.

import { describe, expect, test } from "bun:test";
import { choosePolicy } from "../../src/scheduler/policy.ts";

const cpu = { name: "cpu", batchedKinds: ["full", "chunked"] as const };

describe("the policy", () => {
  test("batches full and chunked paged caches", () => {
    const policy = choosePolicy({ cacheKinds: ["full", "chunked", "full"], backend: cpu, requested: "auto" });
    expect(policy).toEqual({
      mode: "batched",
      reason:
        "batched: full and chunked caches are paged and the cpu backend computes many sequences in one pass",
    });
  });

  test("falls back to sequential for a cache that the backend cannot batch, and names it", () => {
    const policy = choosePolicy({ cacheKinds: ["full", "quantized"], backend: cpu, requested: "auto" });
    expect(policy.mode).toBe("sequential");
    expect(policy.reason).toBe("sequential: the cpu backend has no batched kernel for quantized caches");
  });

  test("says so when batching was asked for and cannot be had", () => {
    const policy = choosePolicy({ cacheKinds: ["sliding", "quantized"], backend: cpu, requested: "batched" });
    expect(policy.mode).toBe("sequential");
    expect(policy.reason).toContain("although batching was asked for");
    expect(policy.reason).toContain("sliding and quantized caches");
  });

  test("obeys an operator who asks for sequential", () => {
    const policy = choosePolicy({ cacheKinds: ["full"], backend: cpu, requested: "sequential" });
    expect(policy).toEqual({ mode: "sequential", reason: "sequential, as configured" });
  });
});
