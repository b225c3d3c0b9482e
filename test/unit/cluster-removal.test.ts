// Removal and leaving where something goes wrong at that moment: a file that cannot be written, news that comes too late.

import { afterEach, expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { forgetCluster, loadCluster, newCluster, saveCluster } from "../../src/cluster/net/cluster-file.ts";
import { ClusterNode } from "../../src/cluster/net/cluster-node.ts";
import { loadIdentity } from "../../src/cluster/net/identity.ts";
import { withoutNode } from "../../src/cluster/net/rotation.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

// Of a busy machine; each waits for what it needs and no longer.
setDefaultTimeout(120_000);
const LIMIT_MS = 15_000;

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

interface Started {
  node: ClusterNode;
  path: string;
}

/** Nodes of one cluster, all linked; the first is called by the others. */
async function linked(...names: string[]): Promise<Started[]> {
  const home = newCluster("home");
  const started: Started[] = [];
  for (const name of names) {
    const path = mkdtempSync(join(tmpdir(), "caravan-removal-"));
    cleanups.push(() => rmSync(path, { recursive: true, force: true }));
    saveCluster(path, home);
    const node = await ClusterNode.start({
      ...{ folder: path, port: 0, host: "127.0.0.1", discovery: false, name },
      peers: started.map((each) => `127.0.0.1:${each.node.mesh?.port ?? 0}`),
      log: createLogger({ level: "silent" }),
    });
    cleanups.push(() => node.close());
    started.push({ node, path });
  }
  const all = () => started.every(({ node }) => node.view().reachable.length === names.length - 1);
  await until(all, "all are linked", LIMIT_MS);
  return started;
}

/** From now on nothing can be written to the cluster's file: a folder is where its new content would be put together. */
function blockWrites(path: string): void {
  mkdirSync(join(path, `cluster.json.${process.pid}.partial`));
}

function namesAt({ node }: Started): string[] {
  return node
    .view()
    .reachable.map(({ name }) => name)
    .sort();
}

test("a removal that cannot be written down is said to fail, but ends the node's links and reaches the others", async () => {
  const [a, b, c] = await linked("a", "b", "c");
  if (a === undefined || b === undefined || c === undefined) throw new Error("three");
  blockWrites(a.path);
  await expect(a.node.remove("c")).rejects.toThrow();
  expect(loadCluster(b.path)?.removed.map(({ name }) => name)).toEqual(["c"]);
  await until(() => namesAt(a).join() === "b" && namesAt(b).join() === "a", "c is out", LIMIT_MS);
});

test("a member that cannot write the new secret down takes it over all the same", async () => {
  const [a, b, c] = await linked("a", "b", "c");
  if (a === undefined || b === undefined || c === undefined) throw new Error("three");
  blockWrites(b.path);
  expect(await a.node.remove("c")).toEqual({ name: "c", told: ["b"], away: [] });
  await until(() => namesAt(a).join() === "b" && namesAt(b).join() === "a", "c is out", LIMIT_MS);
});

for (const what of ["left its cluster", "joined another one"])
  test(`a new secret that arrives while a node leaves does not write the cluster back: it has ${what}`, async () => {
    const [a, b] = await linked("a", "b");
    const [mesh, other] = [b?.node.mesh, a?.node.mesh];
    const home = a === undefined ? undefined : loadCluster(a.path);
    if (a === undefined || b === undefined || mesh === undefined || home === undefined)
      throw new Error("two");
    // Its leaving takes as long as this says.
    const gate = Promise.withResolvers<void>();
    const close = mesh.close.bind(mesh);
    mesh.close = async () => {
      await gate.promise;
      await close();
    };
    try {
      const office = newCluster("office");
      if (what === "left its cluster") forgetCluster(b.path);
      else saveCluster(b.path, office);
      await until(() => b.node.mesh === undefined, "b leaves", LIMIT_MS);
      const gone = { id: "9".repeat(64), name: "gone", addresses: [] };
      const told = { ...withoutNode(home, gone) };
      await expect(other?.call(b.node.identity.id, "cluster.secret", told)).rejects.toThrow(
        "this node is in no cluster",
      );
      expect(loadCluster(b.path)?.secret).toBe(what === "left its cluster" ? undefined : office.secret);
    } finally {
      gate.resolve();
    }
  });

for (const victims of [[], ["8".repeat(64)]])
  test(`a member that a removed node gave a secret meets the others under another one; ${victims.length} more were named as removed`, async () => {
    const home = newCluster("home");
    const paths = ["a", "b"].map((name) => {
      const path = mkdtempSync(join(tmpdir(), "caravan-removal-"));
      cleanups.push(() => rmSync(path, { recursive: true, force: true }));
      return { name, path, id: loadIdentity(path).id };
    });
    const [a, b] = paths;
    if (a === undefined || b === undefined) throw new Error("two");
    const [gone, second] = ["9", "7"].map((digit) => ({ id: digit.repeat(64), name: "gone", addresses: [] }));
    if (gone === undefined || second === undefined) throw new Error("two");
    const known = ({ id, name }: { id: string; name: string }) => ({ id, name, addresses: [] });
    const kept = withoutNode({ ...home, nodes: [known(b), gone] }, gone);
    const evil = newCluster("home").secret;
    saveCluster(a.path, kept);
    saveCluster(b.path, {
      ...{ name: "home", secret: evil, generation: 1000, previous: [home.secret] },
      removed: [gone.id, ...victims].map((id) => ({ id, name: "gone" })),
      nodes: [known(a), second],
    });
    const nodes: ClusterNode[] = [];
    for (const { name, path } of paths) {
      const node = await ClusterNode.start({
        ...{ folder: path, port: 0, host: "127.0.0.1", discovery: false, name },
        peers: nodes.map(({ mesh }) => `127.0.0.1:${mesh?.port ?? 0}`),
        log: createLogger({ level: "silent" }),
      });
      cleanups.push(() => node.close());
      nodes.push(node);
    }
    await until(() => nodes.every((node) => node.view().reachable.length === 1), "they are linked", LIMIT_MS);
    const [ofA, ofB] = [loadCluster(a.path), loadCluster(b.path)];
    expect(ofA?.secret).toBe(ofB?.secret ?? "");
    expect([home.secret, evil]).not.toContain(ofA?.secret);
    expect(ofB?.nodes.map(({ name }) => name)).toEqual(["a"]);
    expect(ofA?.removed.map(({ id }) => id)).toEqual([gone.id, ...victims]);
  });
