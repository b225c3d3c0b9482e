// Beacons: what is believed, and that nothing on the network can break the reader.

import { expect, test } from "bun:test";
import fc from "fast-check";
import { decodeBeacon, encodeBeacon, MAX_BEACON_BYTES, ReplayFilter } from "../../src/cluster/net/beacon.ts";
import { newCluster } from "../../src/cluster/net/cluster-file.ts";
import { CARAVAN_PROTOCOL } from "../../src/cluster/protocol-version.ts";

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
  expect(decodeBeacon(encodeBeacon(BEACON, HOME.secret), HOME)).toEqual({ kind: "member", beacon: BEACON });
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
