// What a node lists and answers where other nodes have models and instances too.

import { expect, test } from "bun:test";
import type { ModelInfo } from "../../src/api/model-directory.ts";
import type { Member } from "../../src/cluster/membership.ts";
import type { OpenInstance } from "../../src/cluster/net/cluster-driver.ts";
import type { InstancePhase, InstanceState, NodeInfo } from "../../src/cluster/types.ts";
import { ClusterModels } from "../../src/node/cluster-models.ts";
import { sayScript, scriptedModels } from "../tools/scripted-models.ts";

function instance(model: string, phase: InstancePhase, changes: Partial<InstanceState> = {}): InstanceState {
  return {
    spec: {
      ...{ id: crypto.randomUUID(), model, asked: {}, tensor: 2, pipeline: 1, ranks: [], bytes: [] },
      ...{ context: 4096, streams: 1, transport: "auto" },
    },
    ...{
      phase,
      epoch: 1,
      progress: 0.5,
      reason: "why",
      outstandingTokens: 0,
      lost: [],
      unload: [],
      usedAt: 0,
    },
    ...changes,
  };
}

function member(info: Partial<NodeInfo>): Member {
  const whole: NodeInfo = {
    ...{
      id: "a".repeat(64),
      name: "a",
      protocol: 1,
      version: "1",
      incarnation: 1,
      addresses: [],
      os: "",
      chip: "",
    },
    ...{ device: "cpu", memory: { total: 0, available: 0 }, bandwidth: 0, speed: null, rdma: { reason: "" } },
    ...{ models: [], instances: [], ranks: [], orphans: [], ended: [] },
    ...info,
  };
  return {
    record: { info: whole, links: [], boot: "", version: 1 },
    ...{ self: false, direct: true, ageMs: 0, sinceMs: 0 },
  };
}

function models(members: Member[], open: OpenInstance[] = []): ClusterModels {
  return new ClusterModels(scriptedModels(sayScript("here")), { members: () => members, open: () => open });
}

function listed(members: Member[], id: string): ModelInfo | undefined {
  return models(members)
    .list()
    .find((info) => info.id === id);
}

test("models that only other nodes have are listed as available", () => {
  const members = [member({ models: [{ model: "far", bytes: 1, total: 1 }] })];
  expect(listed(members, "far")).toMatchObject({ state: "available" });
  expect(listed(members, "test/scripted")).toMatchObject({ state: "ready" });
});

test("an instance's phase is the model's state, and the best of several counts", () => {
  const states = (...phases: InstancePhase[]) =>
    listed([member({ instances: phases.map((phase) => instance("far", phase)) })], "far");
  expect(states("loading")).toMatchObject({ state: "loading", progress: 0.5, contextLength: 4096 });
  expect(states("placing")).toMatchObject({ state: "loading" });
  expect(states("failed")).toMatchObject({ state: "failed", error: "why" });
  expect(states("failed", "ready")).toMatchObject({ state: "ready" });
  expect(states("ready", "failed")).toMatchObject({ state: "ready" });
  expect(states("loading", "failed")).toMatchObject({ state: "loading" });
  expect(states("gone")).toBeUndefined();
});

test("a request goes to this node's least busy instance that answers, else to what the node loads by itself", async () => {
  const opened = async (running: number, state: "ready" | "failed") => {
    const model = await scriptedModels(sayScript("instance")).find("test/scripted");
    const status = { ...model.engine.status(), running, state };
    const engine = Object.create(model.engine, { status: { value: () => status } });
    return {
      order: { spec: instance("test/scripted", "ready").spec, epoch: 1, owner: "", rank: 0 },
      model: { ...model, engine, close: async () => undefined },
    } as OpenInstance;
  };
  const [busy, idle, dead] = [await opened(3, "ready"), await opened(1, "ready"), await opened(0, "failed")];
  expect(await models([], [busy, idle, dead]).find("test/scripted")).toBe(idle.model);
  expect(await models([], [dead]).find("test/scripted")).not.toBe(dead.model);
  await expect(models([], [idle]).find("other")).rejects.toMatchObject({ code: "model_not_found" });
  expect(models([], [busy]).statuses()[0]?.running).toBe(3);
});
