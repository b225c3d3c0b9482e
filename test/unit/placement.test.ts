// Placements over described clusters: the published table of four Mac Studios, warnings where splitting loses, refusals
// with numbers, unequal nodes, and time for 16 nodes.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { profileModel, rankWorks } from "../../src/cluster/model-profile.ts";
import {
  type PlacementNode,
  type PlacementTerms,
  placementSpeed,
  planPlacements,
} from "../../src/cluster/placement.ts";
import { shardPlan } from "../../src/cluster/shard.ts";
import type { Link } from "../../src/cluster/types.ts";
import { CaravanError } from "../../src/errors.ts";
import { tensorMemory } from "../../src/model/load-plan.ts";
import { PLANNED_SHARE, planMemory } from "../../src/model/memory-plan.ts";
import type { Llama4Name } from "../tools/llama4-shapes.ts";
import { mixedModels, mixedPlan } from "../tools/mixed-shapes.ts";
import { GIGABIT, llama4Plan, llama4Profile, macs, mesh, THUNDERBOLT } from "../tools/published-clusters.ts";

const terms = (asked: PlacementTerms["asked"] = {}): PlacementTerms => ({
  asked,
  kvType: "bf16",
  threads: 8,
});

/** Clusters of which all ordered subsets are tried; a few of six nodes, which have thousands. */
const RUNS_FIVE = Number(process.env.CARAVAN_PLACEMENT_RUNS ?? 20);
const RUNS_SIX = Math.ceil(RUNS_FIVE / 8);

/** exo with MLX, 4 × M3 Ultra, Thunderbolt 5, 63 tokens in, 512 out: generated tokens/s. */
const PUBLISHED: [Llama4Name, number, Record<string, number>][] = [
  ["scout", 4, { "1x1": 46.7, "2x1": 58.2, "4x1": 69.7, "1x4": 36.8 }],
  ["scout", 8, { "1x1": 30.3, "2x1": 44.0, "4x1": 57.7, "1x4": 26.0 }],
  ["maverick", 4, { "1x1": 53.1, "2x1": 67.5, "4x1": 76.1, "1x4": 41.6 }],
  ["maverick", 6, { "2x1": 56.3, "4x1": 69.9, "1x4": 33.0 }],
];

describe("the published table of four M3 Ultra", () => {
  // One set of figures for all rows: bandwidth by the data sheet, costs of a step and of two kinds of layers, a cable.
  const nodes = macs(4);
  const links = mesh(nodes, THUNDERBOLT);
  test.each(PUBLISHED)(
    "%s at %d bits: rows of one node and tensor parallel within 15 %, pipelines within 5 %",
    (name, bits, rows) => {
      const { placements } = planPlacements(llama4Profile(name, bits), nodes, links, terms());
      for (const [shape, published] of Object.entries(rows)) {
        const found = placements.find(({ tensor, pipeline }) => `${tensor}x${pipeline}` === shape);
        const off = (found?.predicted.decode ?? 0) / published - 1;
        expect(Math.abs(off)).toBeLessThan(shape === "1x4" ? 0.05 : 0.15);
      }
    },
  );

  test("tensor 4 is recommended, and why is said with both speeds", () => {
    const plan = planPlacements(llama4Profile("scout", 4), nodes, links, terms());
    expect(plan.placements[0]).toMatchObject({ tensor: 4, pipeline: 1 });
    expect(plan.reason).toMatch(/^tensor 4 gives 6\d\.\d tokens\/s, 1\.\d+ times mac-1 alone \(4\d\.\d/);
    expect(plan.assumptions).toEqual([]);
  });

  test("a pipeline for one stream is warned of, for four streams it is not", () => {
    const find = (streams: number) =>
      planPlacements(llama4Profile("scout", 4), nodes, links, terms({ streams })).placements.find(
        ({ tensor, pipeline }) => tensor === 1 && pipeline === 4,
      );
    expect(find(1)?.warnings.join()).toMatch(/one stream keeps only 1 of 4 stages busy/);
    const four = find(4);
    expect(four?.warnings.join()).not.toMatch(/stages busy/);
    expect(four?.predicted.decodeAll ?? 0).toBeGreaterThan(2.5 * (four?.predicted.decode ?? 0));
  });
});

describe("a group of ranks has one transport", () => {
  const nodes = macs(3);
  const ethernet = mesh(nodes, { kind: "tcp", latencyUs: 150, bandwidth: 1.2e9 });
  const cables = mesh(nodes, THUNDERBOLT);
  const tensor3 = (links: readonly Link[]) =>
    planPlacements(llama4Profile("scout", 4), nodes, links, terms({ tensor: 3 })).placements.find(
      ({ ranks }) => ranks.length === 3,
    )?.predicted.exchangeMs ?? Number.NaN;

  test("one pair without RDMA puts all pairs on TCP, and so does the prediction", () => {
    const missing = cables.filter(({ from, to }) => ![from, to].every((id) => /mac-0[12]/.test(id)));
    expect(tensor3([...ethernet, ...missing])).toBe(tensor3(ethernet));
    expect(tensor3([...ethernet, ...cables])).toBe(tensor3(cables));
    expect(tensor3(cables)).toBeLessThan(tensor3(ethernet) / 3);
  });

  test("where TCP was not measured the cable's own figures stand for it", () => {
    const missing = cables.filter(({ from, to }) => ![from, to].every((id) => /mac-0[12]/.test(id)));
    const pair = ethernet.filter(({ from, to }) => [from, to].every((id) => /mac-0[12]/.test(id)));
    expect(tensor3([...missing, ...pair])).toBeLessThanOrEqual(tensor3(ethernet));
  });
});

describe("where splitting does not pay", () => {
  test("over gigabit Ethernet one node is recommended and tensor parallel is warned of", () => {
    const nodes = macs(4);
    const plan = planPlacements(llama4Profile("scout", 4), nodes, mesh(nodes, GIGABIT), terms());
    expect(plan.placements[0]).toMatchObject({ tensor: 1, pipeline: 1 });
    expect(plan.reason).toMatch(/alone gives/);
    const split = plan.placements.find(({ tensor }) => tensor === 4);
    expect(split?.warnings[0]).toMatch(
      /^splitting loses: \d+\.\d+ tokens\/s on 4 nodes, 4\d\.\d tokens\/s with mac-1 alone; \d+\.\d ms/,
    );
  });

  test("a slow hand-over between GPU and network loses even with fast cables", () => {
    const speed = { multiplyAdds: 0, stepUs: 0, denseLayerUs: 50, moeLayerUs: 50, handoverUs: 180 };
    const nodes = macs(2, { speed });
    const plan = planPlacements(llama4Profile("scout", 4), nodes, mesh(nodes, THUNDERBOLT), terms());
    expect(plan.placements[0]?.ranks.length).toBe(1);
  });

  test("unmeasured figures are named", () => {
    const plan = planPlacements(llama4Profile("scout", 4), macs(2, { speed: null }), [], terms());
    expect(plan.assumptions.join("\n")).toMatch(/180 µs is assumed/);
    expect(plan.assumptions.join("\n")).toMatch(/1 link was not measured/);
  });
});

describe("what does not fit", () => {
  test("one node too small is refused with needed, usable and missing bytes", () => {
    const nodes = macs(1, { memory: { total: 64e9, available: 48e9 } });
    const failed = (): unknown => planPlacements(llama4Profile("scout", 4), nodes, [], terms());
    expect(failed).toThrow(/mac-1 alone comes closest with 6\d\.\d GB in all, 43\.2 GB can be used/);
    expect(failed).toThrow(/mac-1 needs 6\d\.\d GB and has 43\.2 GB: \d+\.\d GB missing/);
    try {
      failed();
    } catch (error) {
      expect((error as CaravanError).code).toBe("out_of_memory");
    }
  });

  test("a model for which no node alone has room is split, and each node stays within its memory", () => {
    const nodes = macs(4, { memory: { total: 96e9, available: 84e9 } });
    const plan = planPlacements(llama4Profile("maverick", 4), nodes, mesh(nodes, THUNDERBOLT), terms());
    expect(plan.placements.every(({ ranks }) => ranks.length >= 4)).toBe(true);
    expect(plan.refused.find(({ tensor, pipeline }) => tensor * pipeline === 2)?.reason).toMatch(/missing/);
    expect(plan.reason).toMatch(/no node alone has room/);
  });

  test("a longer context takes more, and the longest one that fits is told", () => {
    const nodes = macs(1, { memory: { total: 96e9, available: 84e9 } });
    const [placement] = planPlacements(llama4Profile("scout", 4), nodes, [], terms()).placements;
    const longest = placement?.longestContext ?? 0;
    const most = planPlacements(llama4Profile("scout", 4), nodes, [], terms({ context: longest }));
    expect(most.placements[0]?.bytes[0]?.total ?? 0).toBeLessThanOrEqual(84e9 * PLANNED_SHARE);
    expect(() =>
      planPlacements(llama4Profile("scout", 4), nodes, [], terms({ context: longest + 64 })),
    ).toThrow(/Ask for a shorter context|does not fit/);
  });

  const impossible: [string, PlacementTerms["asked"], RegExp][] = [
    ["more ranks than nodes", { tensor: 4 }, /needs 4 nodes, there are 2/],
    ["nodes that are not here", { nodes: ["x"] }, /none of the nodes/],
    ["a context beyond the model's", { context: 2 ** 30 }, /the model's limit is 10485760/],
  ];
  test.each(impossible)("%s: invalid", (_, asked, message) => {
    expect(() => planPlacements(llama4Profile("scout", 4), macs(2), [], terms(asked))).toThrow(message);
  });
});

describe("unequal nodes", () => {
  test("take shares by speed, and by memory where speed would not fit", () => {
    const big = macs(1)[0] as PlacementNode;
    const small: PlacementNode = {
      ...big,
      id: "small",
      name: "small",
      memory: { total: 32e9, available: 24e9 },
      bandwidth: 546e9,
    };
    const nodes = [big, small];
    const plan = planPlacements(
      llama4Profile("scout", 4),
      nodes,
      mesh(nodes, THUNDERBOLT),
      terms({ tensor: 2 }),
    );
    const [placement] = plan.placements;
    expect(placement?.bytes.every(({ total, usable }) => total <= usable)).toBe(true);
    const shares = Object.fromEntries(placement?.ranks.map(({ node, weight }) => [node, weight]) ?? []);
    expect(shares[big.id]).toBe(1);
    expect(shares.small).toBeLessThan(0.546 / 0.819);
    expect(shares.small).toBeGreaterThan(0.2);
  });

  test("stages hold layers by memory", () => {
    const nodes = macs(2, { memory: { total: 64e9, available: 56e9 } });
    (nodes[1] as PlacementNode).memory = { total: 32e9, available: 22e9 };
    const plan = planPlacements(
      llama4Profile("scout", 4),
      nodes,
      mesh(nodes, GIGABIT),
      terms({ pipeline: 2 }),
    );
    const [placement] = plan.placements;
    const layers = placement?.ranks.map(({ layers: [first, end] }) => end - first) ?? [];
    expect(layers.reduce((sum, n) => sum + n, 0)).toBe(48);
    expect(layers[0]).toBeGreaterThan(2 * (layers[1] ?? 48));
    expect(placement?.bytes.every(({ total, usable }) => total <= usable)).toBe(true);
  });
});

const clusters = fc.array(
  fc.record({
    bandwidth: fc.constantFrom(0, 1e9, 5e9, 20e9),
    available: fc.integer({ min: 2_000_000, max: 60_000_000 }),
  }),
  { minLength: 1, maxLength: 6 },
);

describe("for any nodes and any model", () => {
  test("no placement is above a node's memory, its bytes are those of loading, and everything asked for is kept", () => {
    fc.assert(
      fc.property(mixedModels, clusters, fc.integer({ min: 1, max: 3 }), (model, specs, streams) => {
        const nodes = specs.map(
          ({ bandwidth, available }, i): PlacementNode => ({
            id: `n${i}`,
            name: `n${i}`,
            device: "cpu",
            memory: { total: 64e6, available },
            bandwidth,
            speed: null,
          }),
        );
        const whole = mixedPlan(model);
        const asked = { context: 128, streams };
        let plan: ReturnType<typeof planPlacements>;
        try {
          plan = planPlacements(profileModel(whole), nodes, [], { ...terms(asked), threads: 1 });
        } catch (error) {
          expect(error).toBeInstanceOf(CaravanError);
          expect((error as CaravanError).message).toMatch(/missing|does not fit/);
          return;
        }
        for (const { ranks, bytes, context } of plan.placements) {
          expect(context).toBe(128);
          expect(new Set(ranks.map(({ node }) => node)).size).toBe(ranks.length);
          ranks.forEach(({ node }, rank) => {
            const entry = bytes[rank];
            const available = nodes.find(({ id }) => id === node)?.memory.available ?? 0;
            expect(entry?.total ?? 0).toBeLessThanOrEqual(available * PLANNED_SHARE);
            const planned = planMemory(shardPlan(whole, ranks, rank), {
              ...{ ...asked, kvType: "bf16", threads: 1, maxTokens: 512, maxLogits: streams + 8, available },
            });
            expect(entry?.total).toBe(
              planned.weightsMapped + planned.weightsCopied + planned.kvBytes + planned.scratchBytes,
            );
          });
        }
      }),
      { numRuns: 60 },
    );
  });
});

test("Scout's tensor 4 has the bytes of four load plans, replicated parts on every rank", () => {
  const whole = llama4Plan("scout", 4, 8);
  const nodes = macs(4);
  const plan = planPlacements(profileModel(whole), nodes, mesh(nodes, THUNDERBOLT), terms({ tensor: 4 }));
  const ranks = plan.placements[0]?.ranks ?? [];
  ranks.forEach((_, rank) => {
    const bytes = shardPlan(whole, ranks, rank).tensors.reduce((sum, t) => {
      const { mapped, copied } = tensorMemory(t);
      return sum + mapped + copied;
    }, 0);
    expect(plan.placements[0]?.bytes[rank]?.weights).toBe(bytes);
  });
  expect(rankWorks(profileModel(whole), ranks).map(({ place }) => place.kvHeads)).toEqual([2, 2, 2, 2]);
});

describe("the fastest placement that is found", () => {
  const profile = llama4Profile("scout", 4);

  /** Nodes and links of all kinds; some nodes are too small for the model. */
  const clusterOf = (least: number, most: number) =>
    fc
      .integer({ min: least, max: most })
      .chain((count) =>
        fc.record({
          nodes: fc.array(
            fc.record({
              bandwidth: fc.constantFrom(60e9, 120e9, 273e9, 546e9, 819e9),
              available: fc.constantFrom(12e9, 24e9, 48e9, 96e9, 192e9),
            }),
            { minLength: count, maxLength: count },
          ),
          cables: fc.array(
            fc.record({
              latencyUs: fc.constantFrom(10, 16, 60, 300),
              bandwidth: fc.constantFrom(1.2e8, 1e9, 6e9),
            }),
            { minLength: (count * (count - 1)) / 2, maxLength: (count * (count - 1)) / 2 },
          ),
          streams: fc.constantFrom(1, 4),
        }),
      )
      .map(({ nodes, cables, streams }) => {
        const made = macs(nodes.length).map((mac, i) => {
          const { bandwidth = 0, available = 0 } = nodes[i] ?? {};
          return { ...mac, bandwidth, memory: { total: available, available } };
        });
        let next = 0;
        const links = made.flatMap((a, i) =>
          made.slice(i + 1).flatMap((b): Link[] => {
            const { latencyUs = 0, bandwidth = 1 } = cables[next++] ?? {};
            const kind = latencyUs < 50 ? "rdma" : "tcp";
            return [
              { from: a.id, to: b.id, kind, latencyUs, bandwidth },
              { from: b.id, to: a.id, kind, latencyUs, bandwidth },
            ];
          }),
        );
        return { nodes: made, links, streams };
      });

  /** Of all grids on all ordered subsets of the nodes. */
  function fastest(nodes: PlacementNode[], links: Link[], asked: PlacementTerms): number {
    let best = 0;
    const extend = (group: PlacementNode[]): void => {
      for (let pipeline = 1; pipeline <= group.length; pipeline++)
        if (group.length % pipeline === 0) {
          const grid: [number, number] = [group.length / pipeline, pipeline];
          best = Math.max(best, placementSpeed(profile, group, links, asked, grid) ?? 0);
        }
      for (const node of nodes) if (!group.includes(node)) extend([...group, node]);
    };
    for (const node of nodes) extend([node]);
    return best;
  }

  const found = (nodes: PlacementNode[], links: Link[], asked: PlacementTerms): number => {
    try {
      const speeds = planPlacements(profile, nodes, links, asked).placements.map(
        ({ predicted }) => predicted.decodeAll ?? 0,
      );
      return Math.max(0, ...speeds);
    } catch (thrown) {
      if (thrown instanceof CaravanError && thrown.code === "out_of_memory") return 0;
      throw thrown;
    }
  };

  test("of up to five nodes is the fastest of all, whatever order they are in", () => {
    let worst = 1;
    fc.assert(
      fc.property(clusterOf(2, 5), ({ nodes, links, streams }) => {
        const best = fastest(nodes, links, terms({ streams }));
        const here = found(nodes, links, terms({ streams }));
        if (best > 0) worst = Math.min(worst, here / best);
        expect(here).toBeGreaterThanOrEqual(best * 0.9998);
      }),
      { numRuns: RUNS_FIVE, interruptAfterTimeLimit: 40_000 },
    );
    console.log(`up to 5 nodes: at worst ${((1 - worst) * 100).toFixed(2)} % below the fastest`);
  }, 120_000);

  test("of six nodes is hardly slower than the fastest of all", () => {
    let worst = 1;
    fc.assert(
      fc.property(clusterOf(6, 6), ({ nodes, links, streams }) => {
        const best = fastest(nodes, links, terms({ streams }));
        const here = found(nodes, links, terms({ streams }));
        if (best > 0) worst = Math.min(worst, here / best);
        expect(here).toBeGreaterThanOrEqual(best * 0.98);
      }),
      { numRuns: RUNS_SIX, interruptAfterTimeLimit: 40_000 },
    );
    console.log(`6 nodes: at worst ${((1 - worst) * 100).toFixed(2)} % below the fastest`);
  }, 120_000);
});

test("16 nodes of four kinds with 240 links are placed in well under a second", () => {
  const nodes = macs(16).map((node, i) => ({
    ...node,
    bandwidth: [819e9, 546e9, 273e9, 120e9][i % 4] ?? 0,
    memory: { total: 0, available: [480e9, 100e9, 50e9, 20e9][i % 4] ?? 0 },
  }));
  const links: Link[] = mesh(nodes, THUNDERBOLT).map((link, i) => ({ ...link, latencyUs: 12 + (i % 17) }));
  const profile = llama4Profile("maverick", 6);
  // The best of several: other work on the machine only ever makes it slower.
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0; i < 6; i++) {
    const start = performance.now();
    const plan = planPlacements(profile, nodes, links, terms({ streams: 4 }));
    best = Math.min(best, performance.now() - start);
    expect(plan.placements.length).toBeGreaterThan(20);
  }
  console.log(`16 nodes: placed in ${best.toFixed(0)} ms`);
  expect(best).toBeLessThan(700);
}, 120_000);
