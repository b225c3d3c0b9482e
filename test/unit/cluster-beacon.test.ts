// Beacons: what is believed, and that nothing on the network can break the reader.

import { expect, test } from "bun:test";
import { createSocket } from "node:dgram";
import fc from "fast-check";
import {
  type Beacon,
  type BeaconCluster,
  decodeBeacon,
  encodeBeacon,
  type Heard,
  MAX_BEACON_BYTES,
  ReplayFilter,
} from "../../src/cluster/net/beacon.ts";
import { newCluster } from "../../src/cluster/net/cluster-file.ts";
import { Discovery } from "../../src/cluster/net/discovery.ts";
import { CARAVAN_PROTOCOL } from "../../src/cluster/protocol-version.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

const HOME = newCluster("home");
const BEACON = {
  cluster: "home",
  id: "a".repeat(64),
  name: "Anna’s Mac Studio",
  version: "0.1.0",
  port: 11712,
  incarnation: 3,
  count: 7,
};

test("a member's beacon comes through unchanged", () => {
  expect(decodeBeacon(encodeBeacon(BEACON, HOME.secret), HOME)).toEqual({
    ...{ kind: "member", beacon: BEACON, earlier: false },
  });
});

test("a beacon of an earlier secret says so", () => {
  const now = { ...newCluster("home"), previous: [newCluster("home").secret, HOME.secret] };
  expect(decodeBeacon(encodeBeacon(BEACON, HOME.secret), now)).toMatchObject({
    kind: "member",
    earlier: true,
  });
  expect(decodeBeacon(encodeBeacon(BEACON, now.secret), now)).toMatchObject({
    kind: "member",
    earlier: false,
  });
});

/** What a listener hears of beacons that are sent to it one after the other; each has to be heard before the next is sent. */
async function listener(cluster: () => BeaconCluster): Promise<{
  send(beacon: Beacon, secret: string): Promise<Heard>;
  stop(): void;
}> {
  const sender = createSocket("udp4");
  await new Promise<void>((resolve) => sender.bind(0, "127.0.0.1", resolve));
  const probe = createSocket("udp4");
  await new Promise<void>((resolve) => probe.bind(0, resolve));
  const { port } = probe.address();
  await new Promise<void>((resolve) => probe.close(() => resolve()));
  const heard: Heard[] = [];
  const discovery = new Discovery({
    announce: () => undefined,
    cluster,
    onHeard: (each) => heard.push(each),
    log: createLogger({ level: "silent" }),
    port,
  });
  await discovery.start();
  return {
    async send(beacon, secret) {
      const before = heard.length;
      sender.send(encodeBeacon(beacon, secret), port, "127.0.0.1");
      await until(() => heard.length > before || discovery.status.dropped > 0, "the beacon arrives");
      const last = heard[before];
      if (last === undefined) throw new Error("the beacon was dropped");
      return last;
    },
    stop() {
      discovery.stop();
      sender.close();
    },
  };
}

test("counts under a secret that a removed node knows do not silence a member's beacons", async () => {
  const next = newCluster("home");
  let cluster: BeaconCluster = HOME;
  const { send, stop } = await listener(() => cluster);
  try {
    const most = { incarnation: Number.MAX_SAFE_INTEGER, count: Number.MAX_SAFE_INTEGER };
    // As a member of before, and then with the secret of before.
    expect(await send({ ...BEACON, ...most }, HOME.secret)).toMatchObject({ kind: "member" });
    cluster = { name: "home", secret: next.secret, previous: [HOME.secret] };
    expect(await send({ ...BEACON, ...most }, HOME.secret)).toMatchObject({ kind: "member" });
    expect(await send(BEACON, next.secret)).toMatchObject({ kind: "member", beacon: BEACON });
    // Nor those of a member that was away.
    expect(await send({ ...BEACON, count: 1 }, HOME.secret)).toMatchObject({ kind: "member" });
  } finally {
    stop();
  }
});

test("a beacon of another secret, another cluster or another version says so and is no member's", () => {
  const other = newCluster("home");
  expect(decodeBeacon(encodeBeacon(BEACON, other.secret), HOME)).toMatchObject({ reason: "secret" });
  const office = encodeBeacon({ ...BEACON, cluster: "office" }, HOME.secret);
  expect(decodeBeacon(office, HOME)).toMatchObject({ kind: "stranger", reason: "name" });
  expect(decodeBeacon(office, undefined)).toMatchObject({ kind: "stranger", beacon: { cluster: "office" } });
  const future = Buffer.from(JSON.stringify({ caravan: CARAVAN_PROTOCOL + 1, version: "9.0", new: [] }));
  expect(decodeBeacon(future, HOME)).toEqual({
    kind: "version",
    protocol: CARAVAN_PROTOCOL + 1,
    version: "9.0",
  });
});

test("changing any field of a beacon breaks its hash", () => {
  const plain = JSON.parse(encodeBeacon(BEACON, HOME.secret).toString());
  for (const [field, value] of Object.entries({
    id: "b".repeat(64),
    name: "x",
    version: "0.1.1",
    port: 1,
    incarnation: 4,
    count: 8,
    mac: "",
  })) {
    const changed = Buffer.from(JSON.stringify({ ...plain, [field]: value }));
    expect(decodeBeacon(changed, HOME), field).toMatchObject({ kind: "stranger", reason: "secret" });
  }
});

test("no datagram breaks the reader or passes for a member's", () => {
  const near = fc.tuple(fc.nat(MAX_BEACON_BYTES), fc.integer({ min: 0, max: 255 })).map(([at, value]) => {
    const bytes = encodeBeacon(BEACON, HOME.secret);
    bytes[at % bytes.length] = value;
    return bytes as Uint8Array;
  });
  const text = encodeBeacon(BEACON, HOME.secret).toString();
  fc.assert(
    fc.property(
      fc.oneof(
        fc.uint8Array({ maxLength: 1500 }),
        fc.json().map((json) => Buffer.from(json)),
        near,
      ),
      (bytes) => {
        const heard = decodeBeacon(bytes, HOME);
        if (heard.kind === "member") {
          // JSON may be spelled differently; the content may not.
          expect(heard.beacon).toEqual(BEACON);
          expect(JSON.parse(Buffer.from(bytes).toString())).toMatchObject(JSON.parse(text));
        }
      },
    ),
    { numRuns: 500 },
  );
});

test("a replayed beacon is dropped, the same shout over a second network is not", () => {
  const filter = new ReplayFilter();
  expect(filter.accept(BEACON, "10.0.0.1")).toBe(true);
  expect(filter.accept(BEACON, "10.0.0.1")).toBe(false);
  expect(filter.accept(BEACON, "fe80::1%eth0")).toBe(true);
  expect(filter.accept({ ...BEACON, count: 6 }, "10.0.0.9")).toBe(false);
  expect(filter.accept({ ...BEACON, count: 8 }, "10.0.0.1")).toBe(true);
  expect(filter.accept({ ...BEACON, incarnation: 4, count: 1 }, "10.0.0.1")).toBe(true);
  expect(filter.accept({ ...BEACON, count: 99 }, "10.0.0.1")).toBe(false);
});
