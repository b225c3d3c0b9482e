// The membership's rules one by one; how they hold together under faults is the simulation's part.

import { describe, expect, test } from "bun:test";
import { GONE_MS } from "../../src/cluster/membership.ts";
import { MembershipMesh, nodeInfo } from "../tools/membership-mesh.ts";

describe("nodes of one cluster", () => {
  test("see each other, and each other's changes at once", () => {
    const mesh = new MembershipMesh();
    const [a] = [mesh.add("a"), mesh.add("b"), mesh.add("c")];
    for (const id of ["a", "b", "c"]) expect(mesh.view(id).sort()).toEqual(["a", "b", "c"]);
    a?.update({ chip: "M9" });
    const seen = mesh.nodes
      .get("c")
      ?.members()
      .find(({ record }) => record.info.id === "a");
    expect(seen?.record.info.chip).toBe("M9");
  });

  test("are gone from every view within 10 s when they die, and not before 5 s", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b", "c", "d"]) mesh.add(id);
    mesh.pass(3000);
    mesh.kill("d");
    mesh.pass(5000);
    expect(mesh.view("a")).toContain("d");
    mesh.pass(4500);
    for (const id of ["a", "b", "c"]) expect(mesh.view(id)).not.toContain("d");
  });

  test("are gone at once when they say goodbye, everywhere, and stay gone though others repeat them", () => {
    const mesh = new MembershipMesh();
    const [, , c] = [mesh.add("a"), mesh.add("b"), mesh.add("c")];
    mesh.pass(2000);
    mesh.lost.add("c b");
    c?.leave();
    mesh.kill("c");
    expect(mesh.view("a")).not.toContain("c");
    // b missed the goodbye and repeats what it knows.
    expect(mesh.view("b")).toContain("c");
    mesh.pass(2000);
    expect(mesh.view("a")).not.toContain("c");
    mesh.pass(GONE_MS);
    expect(mesh.view("b")).not.toContain("c");
  });

  test("live on in views that hear of them only through others", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b", "c"]) mesh.add(id);
    for (const pair of ["a c", "c a"]) mesh.lost.add(pair);
    mesh.nodes.get("a")?.peerDown("c", false);
    mesh.pass(30_000);
    const c = mesh.nodes
      .get("a")
      ?.members()
      .find(({ record }) => record.info.id === "c");
    expect(c?.direct).toBe(false);
    expect(c?.ageMs).toBeLessThan(3000);
  });

  test("that restart replace themselves: one entry, the newer one, and what the run before said is void", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b"]) mesh.add(id);
    mesh.nodes.get("b")?.update({ chip: "before" });
    mesh.kill("b");
    mesh.add("b", { incarnation: 2 });
    const seen =
      mesh.nodes
        .get("a")
        ?.members()
        .filter(({ record }) => record.info.id === "b") ?? [];
    expect(seen.map(({ record }) => [record.info.incarnation, record.info.chip])).toEqual([[2, "test"]]);
  });

  test("come back after their files were restored from an older copy", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b"]) mesh.add(id, { incarnation: 7 });
    mesh.pass(1000);
    mesh.kill("b");
    mesh.pass(10_000);
    mesh.add("b", { incarnation: 3 });
    mesh.pass(1000);
    expect(mesh.view("a")).toContain("b");
  });

  test("are not brought back by replayed messages", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b"]) mesh.add(id);
    mesh.pass(5000);
    const old = mesh.log.filter(({ from, to }) => from === "b" && to === "a").map(({ message }) => message);
    mesh.kill("b");
    mesh.pass(10_000);
    expect(mesh.view("a")).toEqual(["a"]);
    for (const message of old) mesh.nodes.get("a")?.receive("b", message);
    expect(mesh.view("a")).toEqual(["a"]);
  });
});

describe("a process that slept", () => {
  test("does not take everybody else for gone", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b"]) mesh.add(id);
    mesh.pass(2000);
    mesh.lost.add("b a");
    mesh.pass(20_000, "a");
    mesh.nodes.get("a")?.tick();
    expect(mesh.view("a")).toContain("b");
    mesh.lost.clear();
    mesh.pass(2000);
    expect(mesh.view("a")).toContain("b");
    expect(mesh.view("b")).toContain("a");
  });
});

describe("a process that wakes", () => {
  test("does not take for news what waited for it to wake, nor tells it to others", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b", "c"]) mesh.add(id);
    mesh.pass(2000);
    // The last beat of c reaches a's socket only, while a sleeps.
    mesh.lost.add("c b");
    mesh.lost.add("c a");
    mesh.pass(1000, "a");
    const waiting = mesh.log.filter(({ from, to }) => from === "c" && to === "a").at(-1);
    mesh.kill("c");
    mesh.pass(12_000, "a");
    expect(mesh.view("b")).not.toContain("c");
    const a = mesh.nodes.get("a");
    a?.tick();
    if (waiting !== undefined) a?.receive("c", waiting.message);
    mesh.pass(500);
    expect(mesh.view("b")).not.toContain("c");
    mesh.pass(GONE_MS + 1000);
    expect(mesh.view("a")).not.toContain("c");
  });
});

describe("who does not belong is refused, with the reason", () => {
  test("another cluster's name", () => {
    const mesh = new MembershipMesh();
    mesh.add("a");
    mesh.add("b", { cluster: "work" });
    mesh.pass(1000);
    expect(mesh.view("a")).toEqual(["a"]);
    expect(mesh.nodes.get("a")?.refusals).toEqual([
      { id: "b", reason: 'belongs to the cluster "work", this node to "home"' },
    ]);
  });

  test("another protocol, with both versions", () => {
    const mesh = new MembershipMesh();
    mesh.add("a");
    mesh.add("b", { protocol: 2 });
    expect(mesh.nodes.get("a")?.refusals[0]?.reason).toMatch(/protocol 2, this node 1/);
    expect(mesh.nodes.get("b")?.refusals[0]?.reason).toMatch(/protocol 1, this node 2/);
  });

  test("a message that speaks for another node than the connection's", () => {
    const mesh = new MembershipMesh();
    const [a, b] = [mesh.add("a"), mesh.add("b")];
    b?.update({ chip: "true" });
    const forged = mesh.log.findLast(({ from }) => from === "b")?.message;
    if (forged === undefined) throw new Error("nothing was sent");
    a?.receive("x", forged);
    expect(a?.refusals).toEqual([{ id: "x", reason: "speaks for node b" }]);
  });
});

describe("two running nodes with one identity", () => {
  test("the newer one stays; the older one stands aside and says why", () => {
    const mesh = new MembershipMesh();
    mesh.add("a");
    const old = mesh.add("b", { key: "b-old", incarnation: 4, boot: "x" });
    mesh.pass(2000);
    const copy = mesh.add("b", { key: "b-copy", incarnation: 5, boot: "y" });
    mesh.pass(3000);
    expect(old.conflict).toMatch(/identity \(b-copy, start 5; this one is start 4\).*key file was copied/);
    expect(copy.conflict).toBeUndefined();
    const seen = mesh.nodes
      .get("a")
      ?.members()
      .find(({ record }) => record.info.id === "b");
    expect(seen?.record.boot).toBe("y");
    expect(old.members().map(({ record }) => record.boot)).toEqual(["x"]);
    // The copy is shut down: the older one takes part again.
    mesh.kill("b-copy");
    mesh.nodes.get("a")?.peerUp("b");
    mesh.pass(15_000);
    expect(old.conflict).toBeUndefined();
    expect(mesh.view("a")).toContain("b");
  });

  test("what others still repeat of an earlier run is no second node", () => {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b", "c"]) mesh.add(id, { incarnation: 9 });
    mesh.pass(1000);
    mesh.kill("b");
    // Restored files: it counts lower than what the others remember.
    const back = mesh.add("b", { incarnation: 2 });
    mesh.pass(20_000);
    expect(back.conflict).toBeUndefined();
    expect(mesh.view("a")).toContain("b");
  });
});

test("no clock of the wall is read: it may jump as it likes", () => {
  const before = Date.now;
  Date.now = () => {
    throw new Error("the wall clock was read");
  };
  try {
    const mesh = new MembershipMesh();
    for (const id of ["a", "b"]) mesh.add(id);
    mesh.pass(20_000);
    expect(mesh.view("a")).toEqual(["a", "b"]);
  } finally {
    Date.now = before;
  }
});

test("an older record never takes the place of a newer one, however late it comes", () => {
  const mesh = new MembershipMesh();
  const [a, b] = [mesh.add("a"), mesh.add("b")];
  b?.update({ chip: "first" });
  b?.update({ chip: "second" });
  const late = mesh.log.find(({ message }) => message.records.some(({ info }) => info.chip === "first"));
  if (late === undefined) throw new Error("nothing was sent");
  a?.receive("b", late.message);
  expect(a?.members()[1]?.record.info.chip).toBe("second");
});

test("a record that cannot be is not taken: of nodes that nobody told to live", () => {
  const mesh = new MembershipMesh();
  const a = mesh.add("a");
  a.receive("b", {
    ...{ cluster: "home", protocol: 1, from: "b", boot: "z", digests: [], want: [], leaving: false },
    records: [{ info: nodeInfo("ghost"), links: [], boot: "z", version: 3 }],
  });
  expect(mesh.view("a")).toEqual(["a"]);
});
