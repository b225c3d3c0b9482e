// caravan join: makes this machine a node of a cluster. Finds a member, shows a code, and waits until somebody types the
// code at any member; the cluster's secret then comes over the connection that the code has proved.

import { hostname } from "node:os";
import { loadCluster, saveCluster, withKnownNode } from "../cluster/net/cluster-file.ts";
import { CLUSTER_PORT } from "../cluster/net/cluster-node.ts";
import { dial } from "../cluster/net/dial.ts";
import { DISCOVERY_PORT, Discovery } from "../cluster/net/discovery.ts";
import { REMOVED } from "../cluster/net/hello.ts";
import { clusterFolder, type Identity, loadIdentity, renewIdentity } from "../cluster/net/identity.ts";
import { askToJoin, JOIN_LIMIT_MS } from "../cluster/net/joining.ts";
import { CARAVAN_PROTOCOL } from "../cluster/protocol-version.ts";
import type { NodeId } from "../cluster/types.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import { createLogger } from "../log.ts";
import { runningNodes } from "../node/running-nodes.ts";
import { resolvePaths } from "../paths.ts";
import { VERSION } from "../version.ts";
import type { Command } from "./command.ts";

/** Beacons come every second. */
const LISTEN_MS = 3500;

interface Found {
  cluster: string;
  node: string;
  address: string;
}

/** Members of any cluster on the local networks; the first address of each node. Not this machine's own, which may still be about to
 * leave its cluster. */
async function listenForClusters(
  port: number,
  ownId: NodeId,
): Promise<{ found: Found[]; versions: Set<string> }> {
  const found = new Map<string, Found>();
  const versions = new Set<string>();
  const discovery = new Discovery({
    announce: () => undefined,
    cluster: () => undefined,
    onHeard: (heard, address) => {
      if (heard.kind === "version") versions.add(`protocol ${heard.protocol} (caravan ${heard.version})`);
      else if (heard.beacon.id !== ownId && !found.has(heard.beacon.id))
        found.set(heard.beacon.id, { cluster: heard.beacon.cluster, node: heard.beacon.name, address });
    },
    log: createLogger({ level: "silent" }),
    port,
  });
  await discovery.start();
  await Bun.sleep(LISTEN_MS);
  discovery.stop();
  return { found: [...found.values()], versions };
}

async function chooseMember(port: number, ownId: NodeId): Promise<string> {
  process.stderr.write("looking for a cluster on the local network …\n");
  const { found, versions } = await listenForClusters(port, ownId);
  const names = new Set(found.map(({ cluster }) => cluster));
  const [first] = found;
  if (first === undefined) {
    const other = [...versions].join(", ");
    throw new CaravanError(
      "cluster_degraded",
      other === ""
        ? "no cluster is to be heard on the local network"
        : `nodes here speak ${other}, this one protocol ${CARAVAN_PROTOCOL} (caravan ${VERSION})`,
      {
        hint:
          other === ""
            ? `Is \`caravan serve\` running on a member? If the network drops multicast: \`caravan join HOST:${CLUSTER_PORT}\`.`
            : "Install the same version of caravan on all machines.",
      },
    );
  }
  if (names.size > 1) {
    const list = found.map(({ cluster, node, address }) => `  ${cluster}: ${node}, ${address}`).join("\n");
    throw new CaravanError("invalid_argument", `there are several clusters:\n${list}`, {
      hint: "Choose with `caravan join HOST:PORT`.",
    });
  }
  return first.address;
}

/** A machine that was removed comes back as a new one: its key is refused for good. */
async function callMember(folder: string, address: string) {
  const call = async (identity: Identity) => {
    const { id } = identity;
    const node = { id, name: hostname() || "new node", version: VERSION, incarnation: 0, port: 0 };
    const settings = { cluster: undefined, node };
    return { identity, ...(await dial({ identity, settings, address, purpose: "join" })) };
  };
  try {
    return await call(loadIdentity(folder));
  } catch (thrown) {
    if (asCaravanError(thrown).message !== REMOVED) throw thrown;
    if ((await runningNodes()).length > 0)
      throw new CaravanError(
        "invalid_argument",
        `${REMOVED}; it needs a new one, which a running node would not use`,
        {
          hint: "Stop the node here first: `caravan stop`. Then `caravan join` again.",
        },
      );
    process.stderr.write("this machine's key was removed from the cluster; it asks to join with a new one\n");
    return await call(renewIdentity(folder));
  }
}

export const join: Command = {
  name: "join",
  summary: "make this machine a node of a cluster",
  positionals: "[HOST:PORT]",
  count: [0, 1],
  options: {
    "discovery-port": { value: "PORT", help: `UDP port of the beacons (default ${DISCOVERY_PORT})` },
  },
  details: `Shows a code. Somebody types it at a machine that is in the cluster: \`caravan cluster accept CODE\`.
HOST:PORT is a member, for networks that drop multicast.`,
  async run(args) {
    const folder = clusterFolder(resolvePaths().data);
    const existing = loadCluster(folder);
    if (existing !== undefined) {
      throw new CaravanError("invalid_argument", `this node is already in the cluster "${existing.name}"`, {
        hint: "Leave it first with `caravan cluster leave`.",
      });
    }
    const port = args.integer("discovery-port", 1, 65535) ?? DISCOVERY_PORT;
    const address = args.positionals[0] ?? (await chooseMember(port, loadIdentity(folder).id));
    const { identity, channel, peer } = await callMember(folder, address);
    const credentials = await askToJoin({
      channel,
      ownId: identity.id,
      member: peer,
      onCode: (code) =>
        process.stdout.write(
          `\n    ${code}\n\nOn ${peer.name}, or any other machine of the cluster, run\n\n    caravan cluster accept ${code}\n\n` +
            `(waiting for ${JOIN_LIMIT_MS / 60_000} minutes)\n`,
        ),
    });
    saveCluster(folder, withKnownNode(credentials, { id: peer.id, name: peer.name, addresses: [address] }));
    process.stdout.write(
      `This machine is in the cluster "${credentials.name}" now. \`caravan serve\` starts its node, if it does not run yet.\n`,
    );
    return 0;
  },
};
