// Promises of a node's memory: never more than planned, and what would have to go for another model.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { MemoryLedger } from "../../src/cluster/memory-ledger.ts";
import { PLANNED_SHARE } from "../../src/model/memory-plan.ts";

const entry = (key: string, bytes: number, busy = false, usedAt = 0) => ({
  key,
  label: key,
  bytes,
  busy,
  usedAt,
});

describe("the ledger", () => {
  test("refuses with what is needed, free, missing and loaded", () => {
    const ledger = new MemoryLedger(100e9);
    expect(ledger.reserve(entry("scout", 60e9))).toBeUndefined();
    expect(ledger.reserve(entry("maverick", 40e9))).toBe(
      "maverick needs 40.0 GB, 30.0 GB of 90.0 GB are free: 10.0 GB missing (loaded: scout 60.0 GB)",
    );
    expect(ledger.reserved).toBe(60e9);
    ledger.release("scout");
    expect(ledger.reserve(entry("maverick", 40e9))).toBeUndefined();
  });

  test("promises nothing twice", () => {
    const ledger = new MemoryLedger(100e9);
    ledger.reserve(entry("a", 1e9));
    expect(ledger.reserve(entry("a", 1e9))).toMatch(/loaded here already/);
    expect(ledger.reserved).toBe(1e9);
  });

  test("keeps promises when memory shrinks, and makes no new ones", () => {
    const ledger = new MemoryLedger(100e9);
    ledger.reserve(entry("a", 80e9));
    ledger.setCapacity(50e9);
    expect([ledger.reserved, ledger.free, ledger.available]).toEqual([80e9, 0, 0]);
    expect(ledger.reserve(entry("b", 1))).toMatch(/missing/);
  });

  test("tells placements what they may plan: PLANNED_SHARE of it is free", () => {
    const ledger = new MemoryLedger(100e9);
    ledger.reserve(entry("a", 45e9));
    expect(ledger.available * PLANNED_SHARE).toBeCloseTo(ledger.free, -1);
    expect(ledger.available * PLANNED_SHARE).toBeLessThanOrEqual(ledger.free);
  });

  test("would unload idle models, the one used longest ago first, and none that runs", () => {
    const ledger = new MemoryLedger(100e9);
    ledger.reserve(entry("old", 20e9, false, 1));
    ledger.reserve(entry("busy", 30e9, true, 0));
    ledger.reserve(entry("new", 30e9, false, 5));
    expect(ledger.wouldUnload(5e9)).toEqual([]);
    expect(ledger.wouldUnload(25e9)?.map(({ key }) => key)).toEqual(["old"]);
    expect(ledger.wouldUnload(55e9)?.map(({ key }) => key)).toEqual(["old", "new"]);
    expect(ledger.wouldUnload(70e9)).toBeUndefined();
  });

  test("never unloads more than is needed, and always enough", () => {
    const entries = fc.array(
      fc.record({
        bytes: fc.integer({ min: 1, max: 30 }),
        busy: fc.boolean(),
        usedAt: fc.integer({ min: 0, max: 9 }),
      }),
      { maxLength: 8 },
    );
    fc.assert(
      fc.property(entries, fc.integer({ min: 1, max: 150 }), (list, bytes) => {
        const ledger = new MemoryLedger(100 / PLANNED_SHARE + 1);
        for (const [i, each] of list.entries()) ledger.reserve({ ...each, key: `${i}`, label: `${i}` });
        expect(ledger.reserved).toBeLessThanOrEqual(ledger.planned);
        const out = ledger.wouldUnload(bytes);
        const idle = ledger.entries().filter(({ busy }) => !busy);
        const most = ledger.free + idle.reduce((sum, each) => sum + each.bytes, 0);
        if (out === undefined) {
          expect(most).toBeLessThan(bytes);
          return;
        }
        const freed = out.reduce((sum, each) => sum + each.bytes, 0);
        expect(ledger.free + freed).toBeGreaterThanOrEqual(bytes);
        for (const each of out) expect(ledger.free + freed - each.bytes).toBeLessThan(bytes);
        expect(out.some(({ busy }) => busy)).toBe(false);
      }),
    );
  });
});
