// Which devices of two nodes may be the two ends of one cable, the likeliest first. Nothing says it for sure: Apple's ports all have self-assigned
// addresses, so only a try tells (net/rdma-links.ts). Pure.

import type { RdmaDevice } from "./types.ts";

/** Own device and theirs. */
export type DevicePair = readonly [own: string, theirs: string];

/** More are not tried: with eight ports on each side the likely ones stand in front. */
const MOST_TRIES = 24;

/**
 * Devices that reach another node already come last: a cable has two ends, but behind a switch one device reaches all. Then those
 * whose addresses agree in the most leading bits, which is right where each cable has a subnet of its own.
 */
export function devicePairs(
  own: readonly RdmaDevice[],
  theirs: readonly RdmaDevice[],
  taken: ReadonlySet<string>,
): DevicePair[] {
  return own
    .flatMap((a) =>
      theirs.map((b) => ({
        pair: [a.name, b.name] as const,
        free: taken.has(a.name) ? 0 : 1,
        bits: equalBits(a.address, b.address),
      })),
    )
    .sort((x, y) => y.free - x.free || y.bits - x.bits || compare(x.pair, y.pair))
    .slice(0, MOST_TRIES)
    .map(({ pair }) => pair);
}

function compare(a: DevicePair, b: DevicePair): number {
  if (a[0] !== b[0]) return a[0] < b[0] ? -1 : 1;
  return a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0;
}

/** Leading bits in which two IPv4 addresses agree; 0 where one is none. */
function equalBits(a: string, b: string): number {
  const [x, y] = [addressNumber(a), addressNumber(b)];
  if (x === undefined || y === undefined) return 0;
  return Math.clz32((x ^ y) >>> 0);
}

function addressNumber(address: string): number | undefined {
  const parts = address.split(".").map(Number);
  if (parts.length !== 4 || parts.some((part) => !(part >= 0 && part <= 255))) return undefined;
  return parts.reduce((sum, part) => sum * 256 + part, 0);
}
