// Which node owns a new instance: the plan's first one, wherever it was asked for.

import { expect, test } from "bun:test";
import { type ModelSource, ProfilePlacer } from "../../src/cluster/instance-placer.ts";
import type { Member } from "../../src/cluster/membership.ts";
import { chooseOwner } from "../../src/cluster/owner-choice.ts";
import type { NodeInfo } from "../../src/cluster/types.ts";
import { nodeInfo } from "../tools/membership-mesh.ts";
import { GIGABIT, llama4Profile, mesh } from "../tools/published-clusters.ts";

const profile = llama4Profile("scout", 4, 4);
const source: ModelSource = () => ({ kind: "known", terms: { profile, kvType: "bf16", threads: 4 } });
const placer = new ProfilePlacer(source);
const has = [{ model: "scout", bytes: 9, total: 9 }];

function members(nodes: Record<string, Partial<NodeInfo>>): Member[] {
  const ids = Object.keys(nodes).map((id) => ({ id }));
  return Object.entries(nodes).map(([id, info], i) => ({
    record: {
      info: nodeInfo(id, 1, { memory: { total: 64e9, available: 64e9 }, models: has, ...info }),
      links: mesh(ids, GIGABIT).filter(({ from }) => from === id),
      ...{ boot: id, version: 1 },
    },
    ...{ self: i === 0, direct: true, sinceMs: 60_000, ageMs: 0 },
  }));
}

const owner = (nodes: Record<string, Partial<NodeInfo>>) =>
  chooseOwner(placer, "scout", {}, members(nodes), "asked");

test("the fastest node owns the instance, not the one that was asked", () => {
  expect(owner({ asked: { bandwidth: 50e9 }, fast: { bandwidth: 400e9 }, slow: { bandwidth: 30e9 } })).toBe(
    "fast",
  );
  expect(owner({ asked: { bandwidth: 500e9 }, fast: { bandwidth: 400e9 } })).toBe("asked");
});

test("a fast node without the model is passed over for the next one that has it", () => {
  expect(
    owner({
      asked: { bandwidth: 50e9 },
      fast: { bandwidth: 400e9, models: [] },
      second: { bandwidth: 100e9 },
      half: { bandwidth: 300e9, models: [{ model: "scout", bytes: 4, total: 9 }] },
    }),
  ).toBe("second");
});

test("where the model fits on nobody, or only here, the asked node owns it", () => {
  const full = { memory: { total: 1e9, available: 1e6 } };
  expect(owner({ asked: full, fast: { bandwidth: 400e9, ...full } })).toBe("asked");
  expect(owner({ asked: { bandwidth: 50e9 }, fast: { bandwidth: 400e9, ...full } })).toBe("asked");
});

test("a node that cannot be talked to does not become the owner", () => {
  const all = members({ asked: { bandwidth: 50e9 }, fast: { bandwidth: 400e9 } });
  const apart = all.map((member) => ({ ...member, direct: member.self }));
  expect(chooseOwner(placer, "scout", {}, apart, "asked")).toBe("asked");
});
