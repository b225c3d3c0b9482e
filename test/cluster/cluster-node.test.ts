// A node's life in a cluster by its file: made, joined by a code, left; and what is remembered over restarts.

import { afterEach, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  forgetCluster,
  loadCluster,
  newCluster,
  saveCluster,
  withKnownNode,
} from "../../src/cluster/net/cluster-file.ts";
import { ClusterNode, type ClusterNodeOptions } from "../../src/cluster/net/cluster-node.ts";
import { dial } from "../../src/cluster/net/dial.ts";
import { newIdentity } from "../../src/cluster/net/identity.ts";
import { askToJoin } from "../../src/cluster/net/joining.ts";
import { stateJson } from "../../src/cluster/net/state-json.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "caravan-node-"));
  cleanups.push(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

async function start(path: string, options: Partial<ClusterNodeOptions> = {}): Promise<ClusterNode> {
  const node = await ClusterNode.start({
    folder: path,
    port: 0,
    host: "127.0.0.1",
    peers: [],
    discovery: false,
    name: "node",
    log: createLogger({ level: "silent" }),
    ...options,
  });
  cleanups.push(() => node.close());
  return node;
}

function addressOf(node: ClusterNode): string {
  return `127.0.0.1:${node.mesh?.port ?? 0}`;
}

test("a node without a cluster opens no port, and one that gets a cluster starts by itself", async () => {
  const path = folder();
  const node = await start(path);
  expect(node.mesh).toBeUndefined();
  expect(stateJson(node.view(), [])).toMatchObject({ cluster: null, nodes: [] });
  saveCluster(path, newCluster("home"));
  await until(() => node.mesh !== undefined, "the mesh starts");
  expect(node.view()).toMatchObject({ cluster: "home", self: { name: "node" } });
  forgetCluster(path);
  await until(() => node.mesh === undefined, "the mesh stops");
  expect(node.clusterName).toBeUndefined();
});

test("a new machine joins by its code at any member, and all members are linked afterwards", async () => {
  const [first, second, third] = [folder(), folder(), folder()];
  const home = newCluster("home");
  saveCluster(first, home);
  saveCluster(second, home);
  const a = await start(first, { name: "a" });
  const b = await start(second, { name: "b", peers: [addressOf(a)] });
  const linked = () => a.view().reachable.length === 1 && b.view().reachable.length === 1;
  await until(linked, "a and b are linked");

  // The new machine asks a; the person types the code at b.
  const identity = newIdentity();
  const { channel, peer } = await dial({
    identity,
    settings: {
      cluster: undefined,
      node: { id: identity.id, name: "c", version: "1", incarnation: 0, port: 0 },
    },
    address: addressOf(a),
    purpose: "join",
  });
  const shown = Promise.withResolvers<string>();
  const joined = askToJoin({ channel, ownId: identity.id, member: peer, onCode: shown.resolve });
  const code = await shown.promise;
  await until(() => a.view().joinRequests.length === 1, "the request waits");
  await expect(b.accept("00000-00000")).rejects.toThrow("no node waits with this code");
  expect(await b.accept(code)).toBe("c");
  const credentials = await joined;
  expect(credentials.secret).toBe(home.secret);
  expect(credentials.nodes.map(({ name }) => name).sort()).toEqual(["a", "b"]);

  saveCluster(third, withKnownNode(credentials, { id: peer.id, name: "a", addresses: [addressOf(a)] }));
  const c = await start(third, { name: "c" });
  await until(() => c.view().reachable.length === 2, "c knows both");
  await until(
    () => c.links().length === 2 && c.links().every(({ bandwidth }) => bandwidth > 0),
    "links are measured",
  );
  expect(c.links().every(({ latencyUs }) => latencyUs > 0)).toBe(true);
});

test("nodes that have met find each other after a restart without being told an address", async () => {
  const [first, second] = [folder(), folder()];
  const home = newCluster("home");
  saveCluster(first, home);
  saveCluster(second, home);
  const a = await start(first, { name: "a" });
  const b = await start(second, { name: "b", peers: [addressOf(a)] });
  await until(() => b.view().reachable.length === 1 && a.view().reachable.length === 1, "linked");
  await until(
    () => loadCluster(second)?.nodes[0]?.addresses[0] === addressOf(a),
    "the address is remembered",
  );
  await b.close();
  await until(() => a.view().reachable.length === 0, "b is gone");
  const again = await start(second, { name: "b" });
  await until(() => a.view().reachable.length === 1, "b is back");
  expect(again.incarnation).toBe(2);
  expect(again.identity.id).toBe(b.identity.id);
});
