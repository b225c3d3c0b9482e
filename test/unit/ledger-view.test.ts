// What each node's memory holds and what would go for a further model, told from records.

import { describe, expect, test } from "bun:test";
import { ledgerLines } from "../../src/cli/ledger-text.ts";
import type { ModelTerms } from "../../src/cluster/instance-placer.ts";
import { ledgersOf } from "../../src/cluster/ledger-view.ts";
import type { Member } from "../../src/cluster/membership.ts";
import { contextFor, modelNeed, neededBytes } from "../../src/cluster/model-need.ts";
import { rankWorks } from "../../src/cluster/model-profile.ts";
import { longestContext, rankMemory } from "../../src/cluster/rank-memory.ts";
import type { InstanceState, NodeInfo } from "../../src/cluster/types.ts";
import { sharesOf } from "../../src/cluster/uneven-shares.ts";
import { PLANNED_SHARE } from "../../src/model/memory-plan.ts";
import { nodeInfo } from "../tools/membership-mesh.ts";
import { llama4Profile } from "../tools/published-clusters.ts";

const scout: ModelTerms = { profile: llama4Profile("scout", 4), kvType: "bf16", threads: 4 };
const models = new Map([["scout", modelNeed(scout)]]);

function instance(id: string, node: string, bytes: number, more: Partial<InstanceState> = {}): InstanceState {
  return {
    spec: {
      ...{ id, model: `model-${id}`, asked: {}, tensor: 1, pipeline: 1, context: 8192, streams: 1 },
      ranks: [{ node, rank: 0, stage: 0, tensorRank: 0, layers: [0, 48], weight: 1 }],
      ...{ bytes: [bytes], transport: "auto" },
    },
    ...{ phase: "ready", epoch: 1, progress: 1, reason: "", outstandingTokens: 0 },
    ...{ lost: [], unload: [], usedAt: 0 },
    ...more,
  };
}

/** A node with `free` bytes left that computes these instances alone. */
function member(id: string, free: number, instances: InstanceState[] = []): Member {
  const ranks: NodeInfo["ranks"] = instances.map(({ spec, epoch }) => ({
    ...{ instance: spec.id, epoch, owner: id, rank: 0, phase: "ready", progress: 1, reason: "" },
    ...{ cause: "none", bytes: spec.bytes[0] ?? 0 },
  }));
  const memory = { total: 512e9, available: free / PLANNED_SHARE };
  return {
    record: {
      info: nodeInfo(id, 1, { memory, instances, ranks }),
      ...{ links: [], boot: id, version: 1 },
    },
    ...{ self: false, direct: true, ageMs: 0, sinceMs: 1000 },
  };
}

const only = (each: Member) => {
  const ledger = ledgersOf([each], models).get(each.record.info.id);
  if (ledger === undefined) throw new Error("no ledger");
  return ledger;
};

describe("what a model needs", () => {
  for (const kvType of ["bf16", "q8"] as const)
    test(`is told in a few numbers that say what its headers say: ${kvType}`, () => {
      const terms = { ...scout, kvType };
      const need = modelNeed(terms);
      const { profile } = terms;
      const works = rankWorks(profile, sharesOf([0, profile.layers.length], [[1]]));
      for (const context of [1, 64, 8191, 8192, 8193, 100_000, 10_485_760]) {
        const [work] = works;
        if (work === undefined) throw new Error("no rank");
        const asked = { context, streams: 1, kvType, threads: 4, maxTokens: 512, maxLogits: 1 };
        const { weights, kv, scratch } = rankMemory(profile, work, asked);
        expect(neededBytes(need, context)).toBe(weights + kv + scratch);
      }
      for (const room of [0, 1e6, 1e9, 30e9, 1e13])
        expect(contextFor(need, need.fixed + room)).toBe(
          longestContext(profile, works, [room], { kvType, streams: 1 }),
        );
      expect(contextFor(need, need.fixed - 1)).toBe(0);
    });
});

describe("a node's ledger", () => {
  test("says what is loaded, left, and how long a context fits there", () => {
    const ledger = only(member("a", 100e9, [instance("x", "a", 20e9, { outstandingTokens: 5 })]));
    expect(ledger.loaded).toEqual([{ instance: "x", model: "model-x", rank: 0, bytes: 20e9, busy: true }]);
    expect(ledger.reserved).toBe(20e9);
    expect(Math.abs(ledger.planned - 120e9)).toBeLessThan(10);
    const [next] = ledger.next;
    expect(next).toMatchObject({ model: "scout", default_context: 8192, unload: [], missing: 0 });
    expect(next?.bytes).toBeGreaterThan(60e9);
    expect(next?.context_that_fits).toBeGreaterThan(100_000);
    // More room, longer context; and what is told just fits.
    const less = only(member("a", 70e9)).next[0]?.context_that_fits ?? 0;
    expect(less).toBeGreaterThan(8192);
    expect(less).toBeLessThan(next?.context_that_fits ?? 0);
  });

  test("names idle instances that would go, those used longest ago first and no more than needed", () => {
    const instances = [
      instance("new", "a", 30e9, { usedAt: 30 }),
      instance("old", "a", 30e9, { usedAt: 10 }),
      instance("older", "a", 30e9, { usedAt: 5, outstandingTokens: 1 }),
    ];
    expect(only(member("a", 40e9, instances)).next[0]).toMatchObject({ unload: ["old"], missing: 0 });
    expect(only(member("a", 10e9, instances)).next[0]).toMatchObject({ unload: ["old", "new"], missing: 0 });
    const none = only(member("a", 0, instances)).next[0];
    expect(none).toMatchObject({ unload: [], context_that_fits: 0 });
    expect(none?.missing).toBeCloseTo((none?.bytes ?? 0) - 60e9, -2);
  });

  test("of every node is told from the records, also of ranks that another node owns", () => {
    const shared = instance("x", "b", 9e9);
    const owner = member("a", 50e9);
    owner.record.info.instances = [shared];
    const worker = member("b", 50e9);
    worker.record.info.ranks = member("b", 0, [shared]).record.info.ranks;
    const ledgers = ledgersOf([owner, worker], new Map());
    expect(ledgers.get("a")?.loaded).toEqual([]);
    expect(ledgers.get("b")?.loaded).toMatchObject([{ model: "model-x", busy: false }]);
  });

  test("reads as lines for a person", () => {
    const lines = (free: number, instances: InstanceState[]) =>
      ledgerLines(only(member("a", free, instances)));
    expect(lines(100e9, [])).toEqual([
      expect.stringMatching(/^memory for models: .* of .* left$/),
      expect.stringMatching(/^next: scout, context up to \d+$/),
    ]);
    expect(lines(40e9, [instance("x", "a", 60e9)]).slice(1)).toEqual([
      expect.stringMatching(/^loaded: model-x, rank 0, .*, idle$/),
      "next: scout with a context of 8192 after unloading model-x",
    ]);
    expect(lines(10e9, [])[1]).toMatch(/^next: scout needs .* with a context of 8192: .* missing$/);
  });
});
