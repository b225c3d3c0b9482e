// What a node shouts on the local network so that others find it: one small JSON datagram with a keyed hash of the
// cluster's secret. A beacon is only a hint where to call: who answers there proves itself by TLS and hello. So a copied
// beacon can cost a call, and the count in it, which must rise, bounds how many.

import { createHmac } from "node:crypto";
import * as v from "valibot";
import { CARAVAN_PROTOCOL } from "../protocol-version.ts";
import type { NodeId } from "../types.ts";
import { NameSchema, NodeIdSchema, purposeKey } from "./cluster-file.ts";
import { sameMac } from "./same-mac.ts";

export const MAX_BEACON_BYTES = 1024;

export interface Beacon {
  cluster: string;
  id: NodeId;
  name: string;
  version: string;
  /** TCP port of the control plane, at the address that the beacon comes from. */
  port: number;
  incarnation: number;
  /** Rises with every beacon of one incarnation. */
  count: number;
}

const count = v.pipe(v.number(), v.safeInteger(), v.minValue(0));

const AnyVersion = v.object({ caravan: count, version: v.pipe(v.string(), v.maxLength(40)) });

const Schema = v.object({
  cluster: v.pipe(v.string(), v.maxLength(64)),
  id: NodeIdSchema,
  name: NameSchema,
  version: v.pipe(v.string(), v.maxLength(40)),
  port: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(65535)),
  incarnation: count,
  count,
  mac: v.pipe(v.string(), v.maxLength(64)),
});

/** What a datagram turned out to be. "stranger": of another cluster, or made without our secret. `earlier`: made with a secret of
 * before, which nodes that were removed know too, so that its id may be anybody's. */
export type Heard =
  | { kind: "member"; beacon: Beacon; earlier: boolean }
  | { kind: "stranger"; beacon: Beacon; reason: "name" | "secret" }
  | { kind: "version"; protocol: number; version: string }
  | { kind: "garbage" };

function mac(secret: string, beacon: Beacon): string {
  const { cluster, id, name, version, port, incarnation, count } = beacon;
  const text = JSON.stringify([CARAVAN_PROTOCOL, cluster, id, name, version, port, incarnation, count]);
  return createHmac("sha256", purposeKey(secret, "beacon")).update(text).digest("hex");
}

export function encodeBeacon(beacon: Beacon, secret: string): Buffer {
  const bytes = Buffer.from(
    JSON.stringify({ caravan: CARAVAN_PROTOCOL, ...beacon, mac: mac(secret, beacon) }),
  );
  if (bytes.length > MAX_BEACON_BYTES) throw new RangeError(`a beacon of ${bytes.length} bytes is too large`);
  return bytes;
}

/** Whose beacons count. Earlier secrets too: a node that missed a change is called, and told. */
export interface BeaconCluster {
  name: string;
  secret: string;
  previous?: readonly string[];
}

/** Never throws. `ours`: undefined for a node that only looks which clusters there are; all are strangers then. */
export function decodeBeacon(datagram: Uint8Array, ours: BeaconCluster | undefined): Heard {
  if (datagram.length > MAX_BEACON_BYTES) return { kind: "garbage" };
  let value: unknown;
  try {
    value = JSON.parse(Buffer.from(datagram).toString("utf8"));
  } catch {
    return { kind: "garbage" };
  }
  const any = v.safeParse(AnyVersion, value);
  if (!any.success) return { kind: "garbage" };
  if (any.output.caravan !== CARAVAN_PROTOCOL)
    return { kind: "version", protocol: any.output.caravan, version: any.output.version };
  const parsed = v.safeParse(Schema, value);
  if (!parsed.success) return { kind: "garbage" };
  const { mac: given, ...beacon } = parsed.output;
  if (ours === undefined || beacon.cluster !== ours.name) return { kind: "stranger", beacon, reason: "name" };
  const { secret, previous = [] } = ours;
  if (sameMac(given, mac(secret, beacon))) return { kind: "member", beacon, earlier: false };
  if (previous.some((each) => sameMac(given, mac(each, beacon))))
    return { kind: "member", beacon, earlier: true };
  return { kind: "stranger", beacon, reason: "secret" };
}

/** Lets a beacon pass only when it is newer than the last of its node. Bounded; one a network. */
export class ReplayFilter {
  readonly #last = new Map<NodeId, { incarnation: number; count: number; address: string }>();

  /** Whether the beacon is new: one of an address that has already passed on this count is, on another address, too. */
  accept({ id, incarnation, count }: Beacon, address: string): boolean {
    const last = this.#last.get(id);
    const newer =
      last === undefined ||
      incarnation > last.incarnation ||
      (incarnation === last.incarnation && count > last.count);
    // The same shout arrives once for each network that both nodes are on.
    const sameShout = last !== undefined && incarnation === last.incarnation && count === last.count;
    if (!newer && !(sameShout && address !== last.address)) return false;
    this.#last.delete(id);
    this.#last.set(id, { incarnation, count, address });
    if (this.#last.size > 1024) {
      const oldest = this.#last.keys().next().value;
      if (oldest !== undefined) this.#last.delete(oldest);
    }
    return true;
  }
}
