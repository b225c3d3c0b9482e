// Nodes that keep a link to each other: found by address or beacon, one link a pair, dead and stopped peers noticed in time.

import { afterEach, expect, setDefaultTimeout, test } from "bun:test";
import type { Channel } from "../../src/cluster/net/channel.ts";
import { type ClusterCredentials, newCluster } from "../../src/cluster/net/cluster-file.ts";
import { type Identity, newIdentity } from "../../src/cluster/net/identity.ts";
import { Mesh, type MeshOptions } from "../../src/cluster/net/mesh.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { until } from "../tools/until.ts";
import { eventually } from "./cluster-lab.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const LOG = createLogger({ level: "silent" });
const HOME = newCluster("home");

interface Node {
  mesh: Mesh;
  identity: Identity;
  address: string;
  said: unknown[];
  events: string[];
  channels: Channel[];
}

const running: Mesh[] = [];
afterEach(async () => {
  await Promise.all(running.splice(0).map((mesh) => mesh.close()));
});

async function node(
  name: string,
  options: Partial<MeshOptions> & { cluster?: () => ClusterCredentials } = {},
): Promise<Node> {
  const identity = options.identity ?? newIdentity();
  const said: unknown[] = [];
  const events: string[] = [];
  const channels: Channel[] = [];
  const mesh = await Mesh.start({
    identity,
    incarnation: 1,
    name,
    cluster: () => HOME,
    onCredentials: () => undefined,
    host: "127.0.0.1",
    port: 0,
    peers: [],
    discovery: false,
    log: LOG,
    onUp: ({ peer }) => events.push(`up ${peer.name}`),
    onDown: ({ peer }, why, goodbye) =>
      events.push(`down ${peer.name}: ${goodbye ? "goodbye" : why.message}`),
    onSay: (_, body) => {
      if (body === "nonsense") throw new CaravanError("cluster_degraded", "nonsense");
      said.push(body);
    },
    onCall: async (_, method, params) => {
      if (method === "echo") return params;
      throw new CaravanError("model_not_found", `no ${method}`, { hint: "try echo" });
    },
    onChannel: (channel) => channels.push(channel),
    ...options,
  });
  running.push(mesh);
  return { mesh, identity, address: `127.0.0.1:${mesh.port}`, said, events, channels };
}

async function pair(options: Partial<MeshOptions> = {}): Promise<[Node, Node]> {
  const a = await node("a", options);
  const b = await node("b", { ...options, peers: [a.address] });
  await linked(a, b);
  return [a, b];
}

function linked(a: Node, b: Node): Promise<void> {
  return until(
    () => a.mesh.linkTo(b.identity.id) !== undefined && b.mesh.linkTo(a.identity.id) !== undefined,
    "a and b are linked",
  );
}

test("one address is enough: messages and calls go both ways, errors keep their code and hint", async () => {
  const [a, b] = await pair();
  a.mesh.say(b.identity.id, { n: 1 });
  b.mesh.say(a.identity.id, { n: 2 });
  await until(() => a.said.length === 1 && b.said.length === 1, "both are heard");
  expect([a.said, b.said]).toEqual([[{ n: 2 }], [{ n: 1 }]]);
  expect(await a.mesh.call(b.identity.id, "echo", [1, 2])).toEqual([1, 2]);
  const refused = a.mesh.call(b.identity.id, "fly", {});
  await expect(refused).rejects.toMatchObject({
    code: "model_not_found",
    message: "no fly",
    hint: "try echo",
  });
  await expect(a.mesh.call("f".repeat(64), "echo", 1)).rejects.toMatchObject({ code: "cluster_degraded" });
  await until(() => a.mesh.linkTo(b.identity.id)?.roundTripUs !== undefined, "a round trip is measured");
  const us = a.mesh.linkTo(b.identity.id)?.roundTripUs ?? 0;
  expect(us).toBeGreaterThan(0);
  expect(us).toBeLessThan(1_000_000);
});

test("two nodes that dial each other at the same time keep one link, the same on both sides", async () => {
  for (let round = 0; round < 5; round++) {
    const a = await node("a");
    const b = await node("b", { peers: [a.address] });
    // a learns b's address from b's call and from a person, and may dial it as well.
    const c = await node("c", { peers: [a.address, b.address] });
    const all = [a, b, c];
    for (const x of all) for (const y of all) if (x !== y) await linked(x, y);
    for (const x of all)
      for (const y of all) {
        if (x === y) continue;
        await until(() => {
          const [there, back] = [x.mesh.linkTo(y.identity.id), y.mesh.linkTo(x.identity.id)];
          return there !== undefined && back !== undefined && there.dialled !== back.dialled;
        }, "both ends are of one connection");
        expect(await x.mesh.call(y.identity.id, "echo", 7)).toBe(7);
      }
    await Promise.all(all.map(({ mesh }) => mesh.close()));
  }
});

test("a node that goes says goodbye, and its peer knows at once", async () => {
  const [a, b] = await pair();
  await b.mesh.close();
  await until(() => a.events.includes("down b: goodbye"), "the goodbye is heard");
  expect(a.mesh.links).toEqual([]);
});

test("a restarted node replaces itself, and calls of its old life end", async () => {
  const [a, b] = await pair();
  const identity = b.identity;
  const channel = await a.mesh.open(identity.id, "call");
  await until(() => b.channels.length === 1, "the call arrives");
  const again = await node("b", { identity, incarnation: 2, peers: [a.address] });
  await until(() => a.mesh.linkTo(identity.id)?.peer.incarnation === 2, "the new one is linked");
  await channel.closed;
  expect(a.events.filter((event) => event.startsWith("down"))).toEqual(["down b: b was restarted"]);
  await linked(again, a);
  expect(await again.mesh.call(a.identity.id, "echo", 1)).toBe(1);
});

test("of two nodes with one key the one that started last stays, and the other is told why", async () => {
  const [a, b] = await pair();
  const twin = await node("twin", { identity: b.identity, incarnation: 7, peers: [a.address] });
  await until(() => a.mesh.linkTo(b.identity.id)?.peer.name === "twin", "the newer one is linked");
  await until(() => b.mesh.conflict !== undefined, "the older one is told");
  expect(b.mesh.conflict).toContain("its key file was copied");
  expect(twin.mesh.conflict).toBeUndefined();
  expect(a.mesh.linkTo(b.identity.id)?.peer.name).toBe("twin");
  expect(await twin.mesh.call(a.identity.id, "echo", 1)).toBe(1);
});

test("a peer that falls silent is given up within its limit, with everything that hangs on it", async () => {
  await inTime(2000, async () => {
    const [a, b] = await pair({ silenceMs: 600 });
    const channel = await a.mesh.open(b.identity.id, "call");
    // b sends nothing any more, as if its cable was pulled.
    const silenced = b.mesh.linkTo(a.identity.id)?.channel;
    if (silenced === undefined) throw new Error("not linked");
    silenced.send = () => undefined;
    const said = "down b: b has said nothing";
    const ms = await msOf(() => until(() => a.events.some((event) => event.startsWith(said)), "noticed"));
    expect(channel.open).toBe(false);
    await until(() => a.mesh.linkTo(b.identity.id) !== undefined, "they link again by themselves");
    return ms;
  });
});

test("a message that makes no sense ends the link, and nothing else", async () => {
  const [a, b] = await pair();
  b.mesh.say(a.identity.id, "nonsense");
  await until(() => a.events.some((event) => event.startsWith("down b")), "the link ends");
  b.mesh.linkTo(a.identity.id)?.channel.send({ t: "unknown" });
  await linked(a, b);
  // Both call each other anew: a link may be replaced by the one that both keep, and ends what was asked on it.
  await eventually("the next link answers", 20_000, async () => {
    return (await a.mesh.call(b.identity.id, "echo", 3).catch(() => undefined)) === 3;
  });
});

test("an address that answers with another cluster's node is reported and not linked", async () => {
  const other = newCluster("home");
  const a = await node("a", { cluster: () => other });
  const b = await node("b", { peers: [a.address] });
  await until(() => b.mesh.problems.length === 1, "the problem is known");
  expect(b.mesh.problems[0]?.problem).toContain("the proof of the cluster's secret is wrong");
  expect(a.mesh.links).toEqual([]);
});

test("nodes with beacons find each other without any address", async () => {
  const port = 41_000 + (process.pid % 20_000);
  const a = await node("a", { discovery: port });
  const b = await node("b", { discovery: port });
  // The first beacons may have been sent before the other listened; they come every second.
  try {
    await until(
      () => (a.mesh.discovery?.heard ?? 0) > 0 || (b.mesh.discovery?.heard ?? 0) > 0,
      "a beacon",
      10_000,
    );
  } catch {
    console.log("skipped: multicast does not work here", a.mesh.discovery?.problems);
    return;
  }
  // Beacons name the addresses of networks; these nodes listen on loopback only, where IPv4 beacons also come from.
  const reachable = () => a.mesh.links.length + b.mesh.links.length > 0;
  const told = () => [...a.mesh.problems, ...b.mesh.problems].length > 0;
  await until(() => reachable() || told(), "the address of the beacon is dialled");
  expect(reachable() || told()).toBe(true);
});

test("a peer that is no address is refused at the start, and an own address among the peers is not dialled", async () => {
  await expect(node("a", { peers: ["mac"] })).rejects.toThrow("HOST:PORT");
  const a = await node("a");
  const { port } = a.mesh;
  await a.mesh.close();
  const b = await node("b", { port, peers: [`127.0.0.1:${port}`, `localhost:${port}`] });
  const c = await node("c", { peers: [b.address] });
  await linked(b, c);
  expect(b.mesh.problems).toEqual([]);
  expect(b.mesh.counters?.refused).toBe(0);
});

test("a port that is taken is said so, with what to do", async () => {
  const a = await node("a");
  const attempt = node("b", { port: a.mesh.port });
  await expect(attempt).rejects.toMatchObject({
    code: "invalid_argument",
    hint: expect.stringContaining("--cluster-port"),
  });
});
