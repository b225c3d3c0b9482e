// What doctor looks at for a cluster: the node's key, the cluster's file, its port, multicast, and every node that can be
// heard, with the reason where one does not belong here (the members themselves: doctor-nodes.ts). It changes nothing and joins nothing.

import { networkInterfaces } from "node:os";
import { type ClusterCredentials, loadCluster } from "../cluster/net/cluster-file.ts";
import { splitAddress } from "../cluster/net/dial.ts";
import { Discovery } from "../cluster/net/discovery.ts";
import { clusterFolder, type Identity, loadIdentity, newIdentity } from "../cluster/net/identity.ts";
import { listen } from "../cluster/net/listener.ts";
import { CARAVAN_PROTOCOL } from "../cluster/protocol-version.ts";
import { asCaravanError } from "../errors.ts";
import { createLogger } from "../log.ts";
import { runningNodes } from "../node/running-nodes.ts";
import { resolvePaths } from "../paths.ts";
import { loadSettings, type Settings } from "../settings.ts";
import { VERSION } from "../version.ts";
import { type CalledNode, nodeChecks } from "./doctor-nodes.ts";

export interface Check {
  name: string;
  ok: boolean;
  detail: string;
  fix?: string;
}

/** Beacons come every second. */
const LISTEN_MS = 2500;
const QUIET = createLogger({ level: "silent" });

/** Takes a few seconds where this machine is in a cluster; nothing otherwise. */
export async function clusterChecks(): Promise<Check[]> {
  const folder = clusterFolder(resolvePaths().data);
  let cluster: ClusterCredentials | undefined;
  let identity: Identity;
  try {
    cluster = loadCluster(folder);
    if (cluster === undefined) {
      return [{ name: "cluster", ok: true, detail: "none; `caravan cluster create` makes one" }];
    }
    identity = loadIdentity(folder);
  } catch (thrown) {
    const error = asCaravanError(thrown);
    return [
      {
        name: "cluster",
        ok: false,
        detail: `${error.where ?? ""}: ${error.message}`,
        ...(error.hint === undefined ? {} : { fix: error.hint }),
      },
    ];
  }
  const { settings } = loadSettings();
  const { id } = identity;
  const heard: CalledNode[] = [];
  const running = (await runningNodes()).length > 0;
  const checks: Check[] = [
    {
      name: "cluster",
      ok: true,
      detail: `${cluster.name}, protocol ${CARAVAN_PROTOCOL}, this node ${id.slice(0, 8)}, ${cluster.nodes.length} met before`,
    },
    running
      ? { name: "cluster port", ok: true, detail: "a node of this user runs here" }
      : await portCheck(settings),
    ...(settings.discovery_port === 0
      ? [{ name: "beacons", ok: true, detail: "turned off (discovery_port = 0)" }]
      : await beaconChecks(cluster, id, settings.discovery_port, heard)),
  ];
  const node = { name: "doctor", version: VERSION, incarnation: 0, port: 0 };
  return [...checks, ...(await nodeChecks(toCall(cluster, heard, settings), identity, cluster, node))];
}

/** Every node once: where it is heard now, else where it was met last; and the addresses that a person named. */
function toCall(
  { nodes }: ClusterCredentials,
  heard: readonly CalledNode[],
  { peers, cluster_port: port }: Settings,
): CalledNode[] {
  const met = nodes.flatMap(({ id, name, addresses: [address] }) =>
    address === undefined || heard.some((each) => each.id === id) ? [] : [{ id, name, address }],
  );
  const known = [...heard, ...met];
  const named = peers.filter(
    (address) => known.every((each) => each.address !== address) && !isOwn(address, port),
  );
  return [
    ...known,
    ...named.map((address) => ({ name: "the node named by --peer", address, id: undefined })),
  ];
}

/** A list of peers may name every node, this one too. */
function isOwn(address: string, ownPort: number): boolean {
  const { host, port } = splitAddress(address);
  const own = Object.values(networkInterfaces()).flatMap((each) => each ?? []);
  return port === ownPort && (host === "localhost" || own.some((each) => each.address === host));
}

async function portCheck(settings: Settings): Promise<Check> {
  const identity = newIdentity();
  try {
    const listener = await listen({
      identity,
      settings: () => ({
        cluster: undefined,
        node: { id: identity.id, name: "doctor", version: VERSION, incarnation: 0, port: 0 },
      }),
      host: settings.cluster_host === "" ? "0.0.0.0" : settings.cluster_host,
      port: settings.cluster_port,
      log: QUIET,
      onPeer: (channel) => channel.close(),
    });
    await listener.close();
    return { name: "cluster port", ok: true, detail: `TCP ${settings.cluster_port} is free` };
  } catch (thrown) {
    const { message, hint } = asCaravanError(thrown);
    return {
      name: "cluster port",
      ok: false,
      detail: message,
      fix: hint ?? "Set cluster_port to another one.",
    };
  }
}

/** Listens for everybody, and for a beacon of its own that nobody answers: it is signed with a random secret. */
async function beaconChecks(
  cluster: ClusterCredentials,
  id: string,
  port: number,
  members: CalledNode[],
): Promise<Check[]> {
  const probe = newIdentity().id;
  const strangers = new Map<string, string>();
  let echo = false;
  const sender = new Discovery({
    announce: () => ({
      beacon: { cluster: "", id: probe, name: "doctor", version: VERSION, port: 1, incarnation: 1 },
      secret: "",
    }),
    cluster: () => undefined,
    onHeard: () => undefined,
    log: QUIET,
    port,
  });
  const listener = new Discovery({
    announce: () => undefined,
    cluster: () => cluster,
    onHeard: (heard, address) => {
      if (heard.kind === "version")
        strangers.set(
          address,
          `a node at ${address} speaks protocol ${heard.protocol} (caravan ${heard.version}), this machine ${CARAVAN_PROTOCOL} (caravan ${VERSION})`,
        );
      else if (heard.beacon.id === probe) echo = true;
      else if (heard.kind === "member") {
        const { id: other, name } = heard.beacon;
        if (other !== id && members.every((each) => each.id !== other))
          members.push({ id: other, name, address });
      } else
        strangers.set(
          heard.beacon.id,
          heard.reason === "name"
            ? `${heard.beacon.name} at ${address} belongs to the cluster "${heard.beacon.cluster}"`
            : `${heard.beacon.name} at ${address} has another secret for a cluster of the same name`,
        );
    },
    log: QUIET,
    port,
  });
  await Promise.all([listener.start(), sender.start()]);
  await Bun.sleep(LISTEN_MS);
  const { networks, problems } = sender.status;
  sender.stop();
  listener.stop();
  const checks: Check[] = [
    {
      name: "multicast",
      ok: echo,
      detail: echo
        ? `works on ${networks.join(", ")}`
        : `a beacon does not come back${[...problems].map(([network, why]) => `; ${network}: ${why}`).join("")}`,
      ...(echo ? {} : { fix: `Open UDP ${port} in the firewall, or name nodes with \`--peer HOST:PORT\`.` }),
    },
    {
      name: "cluster nodes",
      ok: true,
      detail:
        members.length === 0
          ? "no other is heard"
          : members.map(({ name, address }) => `${name} at ${address}`).join("; "),
    },
  ];
  for (const reason of strangers.values())
    checks.push({
      name: "no member",
      ok: reason.includes("belongs to"),
      detail: reason,
      fix: reason.includes("secret")
        ? "There: `caravan cluster leave`, then `caravan join`."
        : "Install the same version of caravan on both.",
    });
  return checks;
}
