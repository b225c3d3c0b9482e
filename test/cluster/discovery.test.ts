// Discovery over real multicast on this machine's own networks.

import { afterEach, expect, setDefaultTimeout, test } from "bun:test";
import { createSocket } from "node:dgram";
import type { Beacon, Heard } from "../../src/cluster/net/beacon.ts";
import { type ClusterCredentials, newCluster } from "../../src/cluster/net/cluster-file.ts";
import { Discovery } from "../../src/cluster/net/discovery.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const LOG = createLogger({ level: "silent" });
const PORT = 20_000 + (process.pid % 20_000);
const HOME = newCluster("home");

const running: Discovery[] = [];
afterEach(() => {
  for (const discovery of running.splice(0)) discovery.stop();
});

type Met = { heard: Exclude<Heard, { kind: "garbage" }>; address: string };

async function shout(
  letter: string,
  cluster: ClusterCredentials | undefined,
  incarnation = 1,
): Promise<{ met: Met[]; discovery: Discovery }> {
  const met: Met[] = [];
  const beacon: Omit<Beacon, "count"> = {
    cluster: cluster?.name ?? "",
    id: letter.repeat(64),
    name: letter,
    version: "1",
    port: 1000,
    incarnation,
  };
  const discovery = new Discovery({
    announce: () => (cluster === undefined ? undefined : { beacon, secret: cluster.secret }),
    cluster: () => cluster,
    onHeard: (heard, address) => met.push({ heard, address }),
    log: LOG,
    port: PORT,
    pauseMs: 50,
  });
  running.push(discovery);
  await discovery.start();
  return { met, discovery };
}

function heardOf(met: Met[], letter: string): Met[] {
  return met.filter(({ heard }) => "beacon" in heard && heard.beacon.name === letter);
}

/** Sandboxes without any multicast exist. */
async function multicastWorks(): Promise<boolean> {
  const probe = await shout("e", HOME);
  const other = await shout("f", HOME);
  try {
    await until(() => heardOf(other.met, "e").length > 0, "a beacon", 10_000);
    return true;
  } catch {
    console.log(
      "skipped: multicast does not reach this machine itself:",
      JSON.stringify([...probe.discovery.status.problems]),
    );
    return false;
  } finally {
    probe.discovery.stop();
    other.discovery.stop();
  }
}
const works = await multicastWorks();

test.skipIf(!works)("two nodes of a cluster hear each other, with the address to call", async () => {
  const a = await shout("a", HOME);
  const b = await shout("b", HOME);
  await until(() => heardOf(a.met, "b").length > 0 && heardOf(b.met, "a").length > 0, "both are heard");
  const first = heardOf(a.met, "b")[0];
  expect(first?.heard.kind).toBe("member");
  expect(first?.address).toMatch(/:1000$/);
  expect(a.met.every(({ heard }) => "beacon" in heard && heard.beacon.name !== "a")).toBe(true);
});

test.skipIf(!works)(
  "another cluster's node is heard as a stranger, and a listener without a cluster hears all",
  async () => {
    const a = await shout("a", HOME);
    await shout("c", newCluster("home"));
    const d = await shout("d", undefined);
    await until(() => heardOf(a.met, "c").length > 0, "the stranger is heard");
    expect(heardOf(a.met, "c")[0]?.heard).toMatchObject({ kind: "stranger", reason: "secret" });
    await until(() => heardOf(d.met, "a").length > 0 && heardOf(d.met, "c").length > 0, "all are heard");
    expect(d.discovery.status.sent).toBe(0);
    expect(heardOf(a.met, "d")).toEqual([]);
  },
);

test.skipIf(!works)("garbage on the port is dropped and counted, and beacons go on", async () => {
  const a = await shout("a", HOME);
  const socket = createSocket("udp4");
  for (let i = 0; i < 20; i++) {
    await new Promise((resolve) => socket.send(Buffer.alloc(i * 70, i), PORT, "127.0.0.1", resolve));
  }
  socket.close();
  await shout("b", HOME);
  await until(() => heardOf(a.met, "b").length > 0, "b is heard");
  // The kernel gives a datagram to one of the sockets that share the port.
  const dropped = () => running.reduce((sum, { status }) => sum + status.dropped, 0);
  await until(() => dropped() > 0, "garbage is counted");
});
