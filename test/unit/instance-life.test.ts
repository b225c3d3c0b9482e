// The life of an instance, step by step, on nodes that do exactly what the test says.

import { describe, expect, test } from "bun:test";
import {
  DRAIN_MS,
  MOST_ATTEMPTS,
  MOST_OWNED,
  REGROUP_MS,
  RETURN_MS,
  START_MS,
} from "../../src/cluster/instance-limits.ts";
import { MemoryLedger } from "../../src/cluster/memory-ledger.ts";
import { Orphans, SETTLE_MS } from "../../src/cluster/orphans.ts";
import { RankHost, type RankOrder } from "../../src/cluster/rank-host.ts";
import { SILENT_MS } from "../../src/cluster/requests.ts";
import type { CaravanError } from "../../src/errors.ts";
import { placer } from "../simulation/models.ts";
import { SmallCluster } from "../tools/small-cluster.ts";

/** "small" needs 6.1 MB alone, about 3.8 MB on each of two nodes. */
function cluster(...capacities: number[]): SmallCluster {
  const made = new SmallCluster(placer);
  capacities.forEach((capacity, i) => {
    made.add(String.fromCharCode(97 + i), capacity);
  });
  made.pass(1000);
  return made;
}

const ROOMY = 30e6;
const two = { tensor: 2, context: 128 };

describe("from request to ready", () => {
  test("goes through fetching and loading with its progress, and is ready when all ranks are", () => {
    const c = cluster(ROOMY, ROOMY);
    c.automatic = false;
    const { logic } = c.node("a");
    logic.instances.create("i", "small", two);
    logic.turn();
    expect(c.state("i")).toMatchObject({ phase: "fetching", epoch: 1, progress: 0 });
    const [a, b] = ["a", "b"].map((id) => c.node(id).started.splice(0)[0]);
    expect([a?.rank, b?.rank]).toEqual([0, 1]);
    for (const id of ["a", "b"]) c.node(id).logic.ranks.progress("i", 1, "loading", 0.5);
    c.pass(500);
    expect(c.state("i")).toMatchObject({ phase: "loading", progress: 0.75 });
    c.node("a").logic.ranks.ready("i", 1);
    c.pass(500);
    expect(c.state("i")?.phase).toBe("loading");
    c.node("b").logic.ranks.ready("i", 1);
    c.pass(500);
    expect(c.state("i")).toMatchObject({ phase: "ready", progress: 1 });
    // Every node's view says the same.
    const seen = c.node("b").logic.members.flatMap(({ record }) => record.info.instances);
    expect(seen.map(({ phase }) => phase)).toEqual(["ready"]);
  });

  test("reserves exactly the planned bytes on every node", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", two);
    c.pass(1000);
    const bytes = c.state("i")?.spec.bytes ?? [];
    expect(["a", "b"].map((id) => c.node(id).ledger.reserved)).toEqual(bytes);
  });

  test("fails with what is missing where it does not fit, and loads when memory comes free", () => {
    const c = cluster(3e6);
    c.node("a").logic.instances.create("i", "small", { context: 128 });
    c.pass(1000);
    expect(c.state("i")?.phase).toBe("failed");
    expect(c.state("i")?.reason).toMatch(/a needs 0\.006 GB and has 0\.003 GB: 0\.00\d GB missing/);
    c.node("a").ledger.setCapacity(ROOMY);
    c.pass(6000);
    expect(c.state("i")?.phase).toBe("ready");
  });

  test("is given up after a bounded number of failures, and tried again when the cluster changes", () => {
    const c = cluster(ROOMY);
    c.automatic = false;
    const { logic, started } = c.node("a");
    logic.instances.create("i", "small", { context: 128 });
    let loads = 0;
    for (let s = 0; s < 600; s++) {
      c.pass(1000);
      for (const { spec, epoch } of started.splice(0)) {
        loads++;
        logic.ranks.failed(spec.id, epoch, "files", "model.safetensors ends at byte 17");
        logic.turn();
      }
    }
    expect(loads).toBe(MOST_ATTEMPTS);
    expect(c.state("i")?.reason).toBe(
      `given up after ${MOST_ATTEMPTS} attempts: a: model.safetensors ends at byte 17`,
    );
    c.automatic = true;
    c.add("b", ROOMY);
    c.pass(3000);
    expect(c.state("i")?.phase).toBe("ready");
  });

  test("ranks that cannot reach each other rest for a minute after a few attempts, and are then tried again", () => {
    const c = cluster(ROOMY, ROOMY);
    c.automatic = false;
    const { logic } = c.node("a");
    logic.instances.create("i", "small", two);
    const attempts: number[] = [];
    for (let s = 0; s < 400; s++) {
      c.pass(1000);
      for (const { logic: each, started, stopped } of c.nodes.values()) {
        for (const [instance, epoch] of stopped.splice(0)) each.ranks.stopped(instance, epoch);
        for (const { spec, epoch, rank } of started.splice(0)) {
          each.ranks.failed(spec.id, epoch, "group", `rank ${1 - rank} does not answer`);
          if (rank === 0) attempts.push(s);
        }
        each.turn();
      }
    }
    expect(c.state("i")?.reason).toMatch(
      /^waits for a minute after \d+ attempts: [ab]: rank \d does not answer/,
    );
    const pauses = attempts.slice(MOST_ATTEMPTS).map((at, i) => at - (attempts[MOST_ATTEMPTS + i - 1] ?? 0));
    expect(pauses.length).toBeGreaterThan(2);
    expect(Math.min(...pauses)).toBeGreaterThanOrEqual(REGROUP_MS / 1000 - 1);
    c.automatic = true;
    c.pass(REGROUP_MS + 5000);
    expect(c.state("i")?.phase).toBe("ready");
  });

  test("what it says of itself never grows beyond what other nodes accept", () => {
    const c = cluster(ROOMY);
    c.automatic = false;
    const { logic } = c.node("a");
    for (let i = 0; i < MOST_OWNED; i++) logic.instances.create(`${i}`, "small", { context: 128 });
    expect(() => logic.instances.create("more", "small", {})).toThrow(/owns 64 instances already/);
    logic.turn();
    logic.ranks.failed("0", 1, "files", "long ".repeat(10_000));
    logic.turn();
    const { instances, ranks } = logic.membership.own.info;
    for (const { reason } of [...instances, ...ranks]) expect(reason.length).toBeLessThanOrEqual(1000);
    expect(instances.some(({ reason }) => reason.includes("long long"))).toBe(true);
  });

  test("a node that does not begin is named", () => {
    const c = cluster(ROOMY, ROOMY);
    c.automatic = false;
    c.node("a").logic.instances.create("i", "small", two);
    // b hears of it but does nothing.
    c.node("b").logic.ranks.step = () => false;
    c.pass(START_MS + 2000);
    expect(c.state("i")?.reason).toMatch(/^b did not begin within 10 s/);
  });
});

describe("when a node is lost", () => {
  test("the instance is placed again on who is left as soon as the memory of the earlier ranks is free", () => {
    const c = cluster(5e6, 5e6, 5e6);
    c.node("a").logic.instances.create("i", "small", { context: 128, tensor: 3 });
    c.pass(1000);
    expect(c.state("i")).toMatchObject({ phase: "ready", spec: { tensor: 3 } });
    c.kill("c");
    c.pass(4000);
    expect(c.state("i")).toMatchObject({ phase: "ready", lost: ["c"] });
    expect(
      c
        .state("i")
        ?.spec.ranks.map(({ node }) => node)
        .sort(),
    ).toEqual(["a", "b"]);
  });

  test("its requests end at once with an error that can be tried again", () => {
    const c = cluster(ROOMY, ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", two);
    c.pass(1000);
    const gateway = c.node("c").logic;
    gateway.requests.start("r", "small", 10, gateway.members);
    const [, second] = c.state("i")?.spec.ranks ?? [];
    c.kill(second?.node ?? "");
    c.pass(500);
    const [failed] = c.node("c")?.failedRequests ?? [];
    expect(failed?.[0].id).toBe("r");
    expect(failed?.[1]).toMatchObject({ code: "cluster_degraded", retryAfterSeconds: 2 });
    expect(c.node("a").endedEpochs[0]?.slice(0, 2)).toEqual(["i", 1]);
  });

  test("an instance of a node that is gone is taken over by its next rank", () => {
    const c = cluster(ROOMY, ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", two);
    c.pass(1000);
    const [owner, second] = c.state("i")?.spec.ranks ?? [];
    expect(owner?.node).toBe("a");
    c.kill("a");
    c.pass(12_000);
    const owners = [...c.nodes.values()].filter(({ logic }) => logic.instances.states().length > 0);
    expect(owners.map(({ id }) => id)).toEqual([second?.node ?? ""]);
    expect(c.state("i")?.phase).toBe("ready");
    expect(c.state("i")?.epoch).toBeGreaterThan(1);
  });

  test("an epoch that the owner before had reached unseen counts for nothing once it is known", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", two);
    c.pass(1000);
    const state = c.state("i");
    if (state === undefined) throw new Error("there is no instance");
    c.node("b").logic.membership.update({ orphans: [{ ...state, epoch: 5 }] });
    c.pass(6000);
    expect(c.state("i")).toMatchObject({ phase: "ready", epoch: 6 });
    expect(c.node("a").endedEpochs[0]?.slice(0, 2)).toEqual(["i", 1]);
  });

  test("the owner's heir among nodes without a rank of it is one that has the model", () => {
    const c = cluster(ROOMY, ROOMY, ROOMY);
    const models = [{ model: "small", bytes: 7, total: 7 }];
    c.node("b").logic.membership.update({ models: [{ model: "small", bytes: 3, total: 7 }] });
    c.node("c").logic.membership.update({ models });
    c.node("a").logic.instances.create("i", "small", { context: 128, nodes: ["a"] });
    c.pass(1000);
    c.kill("a");
    c.pass(12_000);
    expect(
      c
        .node("c")
        .logic.instances.states()
        .map(({ phase }) => phase),
    ).toEqual(["ready"]);
  });

  test("without room on the survivors its state says what is missing, and the returned node makes it ready again", () => {
    const c = cluster(5e6, 5e6);
    c.node("a").logic.instances.create("i", "small", { context: 128 });
    c.pass(1000);
    expect(c.state("i")?.spec.ranks.length).toBe(2);
    c.kill("b");
    c.pass(10_000);
    expect(c.state("i")?.phase).toBe("failed");
    expect(c.state("i")?.reason).toMatch(/missing/);
    c.add("b", 5e6, 2);
    c.pass(8000);
    expect(c.state("i")?.phase).toBe("ready");
    expect(c.state("i")?.lost).toEqual([]);
  });

  test("it moves to a faster placement only after the node is back for a while and requests have ended", () => {
    const c = cluster(ROOMY, ROOMY);
    const speeds = { one: 100, two: 150 };
    const { logic } = c.node("a");
    // What pays is the placer's business: here two nodes do.
    c.placer.speed = (spec) => (spec.ranks.length === 2 ? speeds.two : speeds.one);
    const place = c.placer.place.bind(c.placer);
    c.placer.place = (model, asked, members, limits) => {
      const tensor = members.length >= 2 ? { tensor: 2 } : {};
      const result = place(model, { ...asked, ...tensor }, members, limits);
      if (result.kind !== "placed") return result;
      return { ...result, speed: result.placement.ranks.length === 2 ? speeds.two : speeds.one };
    };
    try {
      logic.instances.create("i", "small", { context: 128 });
      c.pass(1000);
      c.kill("b");
      c.pass(4000);
      expect(c.state("i")?.spec.ranks.length).toBe(1);
      c.add("b", ROOMY, 2);
      c.pass(RETURN_MS - 2000);
      expect(c.state("i")).toMatchObject({ phase: "ready", spec: { tensor: 1 } });
      logic.instances.load("i", 50, 0);
      c.pass(8000);
      expect(c.state("i")).toMatchObject({ phase: "stopping", reason: "moves to a node that is back" });
      logic.instances.load("i", 0, 0);
      c.pass(2000);
      expect(c.state("i")).toMatchObject({ phase: "ready", spec: { tensor: 2 } });
    } finally {
      Reflect.deleteProperty(c.placer, "speed");
      Reflect.deleteProperty(c.placer, "place");
    }
  });
});

test("a move goes where it was promised to be faster, also where another look at the free memory would come to the old place", () => {
  const c = cluster(ROOMY, ROOMY, ROOMY);
  const { logic } = c.node("a");
  const place = c.placer.place.bind(c.placer);
  c.placer.speed = () => 100;
  c.placer.place = (model, asked, members, limits) => {
    // With what it holds itself counted as free, the returned node looks better than once it is.
    const other = limits.freed === undefined ? "b" : "c";
    const nodes = members.filter(({ record }) => ["a", other].includes(record.info.id));
    const result = place(model, asked, nodes, limits);
    return result.kind === "placed" ? { ...result, speed: other === "c" ? 200 : 100 } : result;
  };
  const where = () => c.state("i")?.spec.ranks.map(({ node }) => node);
  try {
    logic.instances.create("i", "small", { ...two });
    c.pass(1000);
    expect(where()).toEqual(["a", "b"]);
    // It had run on c before.
    const state = c.state("i");
    if (state === undefined) throw new Error("it is there");
    state.lost.push("c");
    c.pass(RETURN_MS + 10_000);
    expect(where()).toEqual(["a", "c"]);
    const { epoch } = c.state("i") ?? {};
    c.pass(60_000);
    expect(c.state("i")).toMatchObject({ phase: "ready", epoch });
  } finally {
    Reflect.deleteProperty(c.placer, "speed");
    Reflect.deleteProperty(c.placer, "place");
  }
});

describe("an orphan", () => {
  test("of which two owners told alike late has one heir in every view, in whatever order they are heard", () => {
    const c = cluster(ROOMY, ROOMY, ROOMY, ROOMY);
    c.node("d").logic.instances.create("i", "small", { ...two });
    c.pass(1000);
    const state = c.state("i");
    if (state === undefined) throw new Error("it is there");
    const members = c.node("a").logic.members.map((member) => ({
      ...member,
      record: { ...member.record, info: { ...member.record.info, instances: [], orphans: [] } },
    }));
    const [share] = state.spec.ranks;
    if (share === undefined) throw new Error("it has ranks");
    const tales = ["b", "c"].map((node) => ({
      ...state,
      spec: { ...state.spec, ranks: [{ ...share, node }] },
    }));
    const heirs = [tales, tales.toReversed()].map((order) => {
      let now = 0;
      const views = ["a", "b", "c"].map((id) => ({ id, orphans: new Orphans(id, () => now) }));
      for (const tale of order) for (const { orphans } of views) orphans.handOver(tale);
      now += SETTLE_MS;
      return views.filter(({ orphans }) => orphans.step(members).length > 0).map(({ id }) => id);
    });
    expect(heirs).toEqual([["c"], ["c"]]);
  });
});

describe("ranks", () => {
  test("of two owners' epochs of one number only the first ones begin on a node", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", { ...two });
    c.pass(1000);
    const { members } = c.node("b").logic;
    const started: RankOrder[] = [];
    const runner = { start: (order: RankOrder) => void started.push(order), stop: () => undefined };
    const host = new RankHost({ id: "b", ledger: new MemoryLedger(ROOMY), runner, now: () => 0 });
    host.step(members);
    expect(started.map(({ epoch, owner }) => [epoch, owner])).toEqual([[1, "a"]]);
    // The halves of a split network meet: the other owner has the same instance in the same epoch.
    const other = members.map((member) => {
      const { info } = member.record;
      return info.id === "a"
        ? { ...member, record: { ...member.record, boot: "z1", info: { ...info, id: "z" } } }
        : member;
    });
    host.step(other);
    host.stopped("i", 1);
    host.step(other);
    expect(started.length).toBe(1);
    // Late news of the first one's process say nothing of the second one's.
    host.ready("i", 1);
    expect(host.states()).toMatchObject([{ owner: "z", phase: "failed", cause: "group" }]);
  });

  test("of a group that broke start again in a new epoch; news of the old one counts no more", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", two);
    c.pass(1000);
    c.automatic = false;
    c.node("a").logic.instances.engineFailed("i", 1, "rank 1 does not answer");
    c.node("a").logic.turn();
    expect(c.state("i")).toMatchObject({ phase: "placing", reason: "rank 1 does not answer" });
    expect(c.node("b").stopped).toEqual([["i", 1]]);
    // The old process was quicker to say that it is ready than to die.
    c.node("b").logic.ranks.ready("i", 1);
    c.automatic = true;
    c.pass(5000);
    expect(c.state("i")).toMatchObject({ phase: "ready", epoch: 2 });
  });

  test("that a node cannot hold after all are refused with numbers and never started", () => {
    const c = cluster(ROOMY);
    c.node("a").logic.instances.create("i", "small", { context: 128 });
    c.pass(1000);
    // Another program took the memory between plan and load.
    const ledger = new MemoryLedger(1e6);
    const started: RankOrder[] = [];
    const runner = { start: (order: RankOrder) => void started.push(order), stop: () => undefined };
    const host = new RankHost({ id: "a", ledger, runner, now: () => 0 });
    host.step(c.node("a").logic.members);
    expect(host.states()).toMatchObject([{ phase: "failed", cause: "memory", bytes: 0 }]);
    expect(host.states()[0]?.reason).toMatch(
      /^small needs 0\.006 GB, 0\.001 GB of 0\.001 GB are free: 0\.005 GB missing/,
    );
    expect(started).toEqual([]);
    expect(ledger.reserved).toBe(0);
  });
});

describe("stopping", () => {
  test("lets running requests end, then frees everything, and nobody revives it", () => {
    const c = cluster(ROOMY, ROOMY, ROOMY);
    const { logic } = c.node("a");
    logic.instances.create("i", "small", two);
    c.pass(1000);
    logic.instances.load("i", 20, 0);
    expect(logic.instances.stop("i")).toBe(true);
    c.pass(5000);
    expect(c.state("i")?.phase).toBe("stopping");
    expect(c.node("b").ledger.reserved + c.node("c").ledger.reserved).toBeGreaterThan(0);
    logic.instances.load("i", 0, 0);
    c.pass(1000);
    expect(["a", "b", "c"].map((id) => c.node(id).ledger.reserved)).toEqual([0, 0, 0]);
    c.kill("a");
    c.pass(20_000);
    expect(c.state("i")).toBeUndefined();
  });

  test("ends what does not end by itself", () => {
    const c = cluster(ROOMY);
    const { logic, endedEpochs } = c.node("a");
    logic.instances.create("i", "small", { context: 128 });
    c.pass(1000);
    logic.instances.load("i", 20, 0);
    logic.instances.stop("i");
    c.pass(DRAIN_MS + 1000);
    expect(c.state("i")?.phase).toBe("gone");
    expect(endedEpochs.at(-1)?.[2].message).toMatch(/the model was stopped/);
  });
});

describe("a further model", () => {
  test("makes the one that was used longest ago go when it is idle, and asks for no more than it needs", () => {
    const c = cluster(16e6);
    const { logic } = c.node("a");
    logic.instances.create("old", "small", { context: 128 });
    logic.instances.create("new", "small", { context: 128 });
    c.pass(1000);
    logic.instances.load("old", 0, 1);
    logic.instances.load("new", 0, 2);
    logic.instances.create("third", "small", { context: 128 });
    c.pass(3000);
    expect(["old", "new", "third"].map((id) => c.state(id)?.phase)).toEqual(["gone", "ready", "ready"]);
  });

  test("waits for none that runs requests: it fails and says what is missing", () => {
    const c = cluster(9e6);
    const { logic } = c.node("a");
    logic.instances.create("busy", "small", { context: 128 });
    c.pass(1000);
    logic.instances.load("busy", 5, 1);
    logic.instances.create("next", "small", { context: 128 });
    c.pass(3000);
    expect(c.state("busy")?.phase).toBe("ready");
    expect(c.state("next")).toMatchObject({ phase: "failed" });
    expect(c.state("next")?.reason).toMatch(/missing/);
  });
});

describe("requests", () => {
  test("go to the ready instance with the fewest outstanding tokens, and never to one that is not ready", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", { context: 128, nodes: ["a"] });
    c.node("b").logic.instances.create("j", "small", { context: 128, nodes: ["b"] });
    c.pass(1000);
    const { requests } = c.node("a").logic;
    const start = (id: string, tokens: number) =>
      requests.start(id, "small", tokens, c.node("a").logic.members).instance;
    expect([start("1", 30), start("2", 10), start("3", 10), start("4", 5)]).toEqual(["i", "j", "j", "j"]);
    requests.finish("1");
    expect(start("5", 1)).toBe("i");
    c.automatic = false;
    c.node("a").logic.instances.engineFailed("i", 1, "gone");
    c.node("a").logic.turn();
    for (let n = 6; n < 12; n++) expect(start(`${n}`, 100)).toBe("j");
  });

  test("count at this node's own instance before its record tells of them", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", { context: 128, nodes: ["a"] });
    c.node("b").logic.instances.create("j", "small", { context: 128, nodes: ["b"] });
    c.pass(1000);
    c.automatic = false;
    const { instances, requests } = c.node("a").logic;
    const next = (id: string) => requests.start(id, "small", 0, c.node("a").logic.members).instance;
    expect(next("1")).toBe("i");
    instances.load("i", 512, 1);
    expect(next("2")).toBe("j");
    instances.load("i", 0, 2);
    expect(next("3")).toBe("i");
  });

  test("for a model that loads are told so with its progress, for one that failed why, for an unknown one what to do", () => {
    const c = cluster(ROOMY);
    c.automatic = false;
    const { logic } = c.node("a");
    const refused = (model: string): CaravanError => {
      try {
        logic.requests.start("r", model, 1, logic.members);
      } catch (error) {
        return error as CaravanError;
      }
      throw new Error("the request was taken");
    };
    expect(refused("small")).toMatchObject({
      code: "model_not_found",
      hint: expect.stringContaining("caravan plan small"),
    });
    logic.instances.create("i", "small", { context: 128 });
    logic.turn();
    logic.ranks.progress("i", 1, "loading", 0.4);
    logic.turn();
    expect(refused("small")).toMatchObject({
      code: "model_loading",
      message: "small is loading: 70 % done",
      retryAfterSeconds: 5,
    });
    logic.instances.create("k", "large", { context: 128, streams: 4000 });
    logic.turn();
    expect(refused("large")).toMatchObject({
      code: "cluster_degraded",
      message: expect.stringContaining("missing"),
    });
  });

  test("of a silent owner end within 3 s although its links are up", () => {
    const c = cluster(ROOMY, ROOMY);
    c.node("a").logic.instances.create("i", "small", { context: 128, nodes: ["a"] });
    c.pass(1000);
    const { logic, failedRequests } = c.node("b");
    logic.requests.start("r", "small", 10, logic.members);
    c.pass(SILENT_MS - 500);
    logic.requests.heard("r");
    c.pass(SILENT_MS);
    expect(failedRequests).toEqual([]);
    c.pass(1000);
    expect(failedRequests[0]?.[1].message).toMatch(/silent/);
    expect(logic.requests.heard("r")).toBe(false);
    expect(logic.requests.finish("r")).toBe(false);
  });
});
