// What doctor finds out of every other node of the cluster that it knows or hears: whether it can be called, speaks the same protocol, has
// the same secret, and has its clock set. One short connection to each, as a member; nothing is changed.

import type { ClusterCredentials } from "../cluster/net/cluster-file.ts";
import { dial } from "../cluster/net/dial.ts";
import type { HelloSettings } from "../cluster/net/hello.ts";
import type { Identity } from "../cluster/net/identity.ts";
import { asCaravanError, type CaravanError } from "../errors.ts";
import type { Check } from "./doctor-cluster.ts";

/** Nothing of caravan depends on equal clocks; logs of several machines cannot be compared beyond this. */
const CLOCK_MS = 30_000;
const CALL_LIMIT_MS = 3000;
const MOST_NODES = 64;

export interface CalledNode {
  name: string;
  /** host:port. */
  address: string;
  /** undefined: whoever answers there (--peer). */
  id: string | undefined;
}

export async function nodeChecks(
  nodes: readonly CalledNode[],
  identity: Identity,
  cluster: ClusterCredentials,
  node: Omit<HelloSettings["node"], "id">,
): Promise<Check[]> {
  return await Promise.all(
    nodes.slice(0, MOST_NODES).map(async ({ name, address, id }): Promise<Check> => {
      try {
        const { channel, peer } = await dial({
          ...{ identity, address, purpose: "probe", limitMs: CALL_LIMIT_MS },
          settings: { cluster, node: { ...node, id: identity.id } },
          ...(id === undefined ? {} : { expected: id }),
        });
        channel.finish();
        const clock = clockCheck(peer.name, peer.clockAheadMs);
        if (clock !== undefined) return clock;
        const secret = peer.secretsDiffer ? ", secrets differ and are compared when it meets this node" : "";
        const detail = `${peer.name} at ${address} answers, caravan ${peer.version}${secret}`;
        return { name: "node", ok: true, detail };
      } catch (thrown) {
        const error = asCaravanError(thrown);
        return {
          name: "node",
          ok: false,
          detail: `${name} at ${address}: ${error.message}`,
          fix: fixOf(error, address),
        };
      }
    }),
  );
}

/** undefined: near enough. */
export function clockCheck(name: string, aheadMs: number): Check | undefined {
  if (Math.abs(aheadMs) <= CLOCK_MS) return undefined;
  const seconds = Math.round(Math.abs(aheadMs) / 1000);
  return {
    name: "clock",
    ok: false,
    detail: `the clock of ${name} is ${seconds} s ${aheadMs > 0 ? "ahead of" : "behind"} this machine's: their logs do not fit together`,
    fix: setClockCommand(process.platform),
  };
}

/** Whether this machine's clock can be right: not before the program was made. */
export function ownClockCheck(nowMs: number, madeMs: number): Check {
  const day = (ms: number) => new Date(ms).toISOString().slice(0, 10);
  if (nowMs >= madeMs - 24 * 3_600_000)
    return { name: "clock", ok: true, detail: `${new Date(nowMs).toISOString().slice(0, 19)}Z` };
  return {
    name: "clock",
    ok: false,
    detail: `it is ${day(nowMs)} here, before this program was made (${day(madeMs)}): downloads fail, as certificates are not valid yet`,
    fix: setClockCommand(process.platform),
  };
}

function setClockCommand(platform: string): string {
  return platform === "darwin"
    ? "sudo sntp -sS time.apple.com   (and System Settings, General, Date & Time: set automatically)"
    : "sudo timedatectl set-ntp true";
}

function fixOf({ message, hint }: CaravanError, address: string): string {
  if (hint !== undefined) return hint;
  if (message.includes("protocol ")) return "Install the same version of caravan on both.";
  if (/secret is wrong|does not know this cluster's secret|cluster of another name/.test(message))
    return "There: `caravan cluster leave`, then `caravan join`.";
  if (message.includes("in no cluster")) return "There: `caravan join`.";
  if (message.includes("was removed")) return "There: `caravan cluster leave`, then `caravan join`.";
  if (message.includes("another node than expected"))
    return "If the address was given to another machine, nothing: nodes find each other by beacons. Else name it with `--peer HOST:PORT`.";
  const port = address.replace(/^.*:/, "");
  return `Is \`caravan serve\` running there? Then let TCP ${port} through its firewall.`;
}
