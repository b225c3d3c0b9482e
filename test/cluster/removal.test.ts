// A node is taken out of a cluster: nobody talks to it any more, with its key or with another one and the secret that it knows;
// what it computed goes on elsewhere; who was away learns of it; by a new code it comes back.

import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type ClusterCredentials, loadCluster, newCluster } from "../../src/cluster/net/cluster-file.ts";
import { dial } from "../../src/cluster/net/dial.ts";
import { clusterFolder, type Identity, loadIdentity, newIdentity } from "../../src/cluster/net/identity.ts";
import { listen } from "../../src/cluster/net/listener.ts";
import { withoutNode } from "../../src/cluster/net/rotation.ts";
import { createLogger } from "../../src/log.ts";
import { ClusterLab, eventually, type LabNode, libraryHere, loopbackHosts } from "./cluster-lab.ts";

setDefaultTimeout(300_000);

const LOG = createLogger({ level: "silent" });
const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

describe("at the port of a member that has removed a node", () => {
  const settingsOf = ({ id }: Identity, cluster: ClusterCredentials) => ({
    cluster,
    node: { id, name: "n", version: "1", incarnation: 1, port: 0 },
  });
  const knowing = (cluster: ClusterCredentials, ...nodes: Identity[]) => ({
    ...cluster,
    nodes: nodes.map(({ id }) => ({ id, name: "n", addresses: [] })),
  });

  async function setting() {
    const [member, removed, away, stranger] = [newIdentity(), newIdentity(), newIdentity(), newIdentity()];
    const before = knowing(newCluster("home"), member, removed, away);
    const now = withoutNode(knowing(before, removed, away), { id: removed.id, name: "n" });
    const met: { secretsDiffer: boolean }[] = [];
    const listener = await listen({
      identity: member,
      settings: () => settingsOf(member, now),
      host: "127.0.0.1",
      port: 0,
      log: LOG,
      onPeer: (_, peer) => met.push(peer),
    });
    cleanups.push(() => listener.close());
    const call = (identity: Identity, cluster: ClusterCredentials, purpose: "control" | "join" | "rank") =>
      dial({
        ...{ identity, settings: settingsOf(identity, cluster), purpose },
        address: `127.0.0.1:${listener.port}`,
      }).then((connection) => {
        cleanups.push(() => connection.channel.close());
        return connection;
      });
    return { removed, away, stranger, before, now, met, call };
  }

  test("its key is refused, whatever secret it proves, and for joining too", async () => {
    const { removed, before, now, call, met } = await setting();
    for (const cluster of [before, { ...now, removed: [] }])
      for (const purpose of ["control", "rank", "join"] as const)
        await expect(call(removed, cluster, purpose)).rejects.toThrow("this node's key was removed");
    expect(met).toEqual([]);
  });

  test("another key with the secret of before is refused, and a forged name of the new secret is worth nothing", async () => {
    const { stranger, before, call, met } = await setting();
    await expect(call(stranger, before, "control")).rejects.toThrow(
      "not known here proves an earlier secret",
    );
    const forged = { ...before, secret: newCluster("home").secret, previous: [before.secret] };
    await expect(call(stranger, forged, "control")).rejects.toThrow("not known here");
    expect(met).toEqual([]);
  });

  test("a member that was away is let in by the secret of before, to learn the new one", async () => {
    const { away, before, call, met } = await setting();
    const { peer } = await call(away, before, "control");
    expect(peer.secretsDiffer).toBe(true);
    await eventually("the member sees it", 20_000, () => met.length === 1);
    expect(met[0]?.secretsDiffer).toBe(true);
  });
});

/** Runs a command of caravan as the user of a node; what it printed. */
function command(lab: ClusterLab, node: LabNode, ...args: string[]) {
  const child = Bun.spawn([process.execPath, join(import.meta.dir, "../../src/main.ts"), ...args], {
    env: { ...lab.environment(node) },
    stdout: "pipe",
    stderr: "pipe",
  });
  return child;
}

test.skipIf(!libraryHere)(
  "a node that is removed loses its links and its ranks everywhere, also with members that were away; a new code lets it in",
  async () => {
    const lab = new ClusterLab(loopbackHosts(4).map((host) => ({ ...host, args: ["--transport", "tcp"] })));
    cleanups.push(() => lab.close());
    await lab.start();
    const instance = await lab.place(lab.nodes[0] as LabNode, { tensor: 2, pipeline: 1, context: 262_144 });
    const owner = await lab.nodeOf(instance.ranks[0]?.node ?? "");
    const victim = await lab.nodeOf(instance.ranks[1]?.node ?? "");
    const [away, idle] = lab.nodes.filter((node) => node !== owner && node !== victim);
    if (away === undefined || idle === undefined) throw new Error("four nodes");
    const victimId = await victim.id();
    const text = await owner.say("tiny");
    await away.stop();
    await eventually("one is away", 30_000, async () => (await idle.state()).nodes.length === 3);

    const mistyped = command(lab, idle, "cluster", "remove", "nobody");
    expect(await mistyped.stderr.text()).toContain('no node is called "nobody"');
    expect(await mistyped.exited).toBe(2);
    const itself = command(lab, idle, "cluster", "remove", idle.name);
    expect(await itself.stderr.text()).toContain("a node does not remove itself");
    const stream = await idle.longStream("tiny");
    const logged = idle.log.length;
    const began = performance.now();
    const cli = command(lab, idle, "cluster", "remove", victim.name);
    const [printed, problem] = await Promise.all([cli.stdout.text(), cli.stderr.text()]);
    expect(await cli.exited, problem).toBe(0);
    expect(printed).toContain(`${victim.name} is removed`);
    expect(printed).toContain(`Not reachable now, told at the next contact: ${away.name}.`);
    const { atMs, error } = await stream.ended;
    console.log(`  its request ended after ${Math.round(atMs - began)} ms: ${error?.slice(0, 120)}`);
    // Each of them says that it may be tried again.
    expect(error).toMatch(/cluster_degraded|engine_failed|shutting_down/);
    await eventually("the members do not see it any more", 20_000, async () => {
      const states = await Promise.all([owner, idle].map((node) => node.state()));
      return states.every(({ nodes }) => nodes.every(({ id }) => id !== victimId));
    });
    console.log(`  gone from the members' views after ${Math.round(performance.now() - began)} ms`);
    const healed = await lab.ready(idle, instance.id, instance.epoch);
    console.log(`  placed again after ${Math.round(performance.now() - began)} ms`);
    expect(healed.ranks.map(({ node }) => node)).not.toContain(victimId);
    expect(await idle.say("tiny")).toBe(text);
    await eventually("its ranks have ended", 20_000, () => victim.children("rank").length === 0);

    // The new secret cost the members nothing: their links are the ones of before. (A machine that is too busy may part them.)
    expect(idle.log.slice(logged)).not.toMatch(
      new RegExp(`left the cluster|node is gone node=${owner.name}(?!.*has said nothing)`),
    );

    // The one that was away comes back and learns of it; the removed one is alone and says why.
    await away.start();
    await lab.meet([owner, idle, away], 40_000);
    const files = [owner, idle, away].map((node) => loadCluster(clusterFolder(join(lab.folder, node.name))));
    expect(new Set(files.map((file) => file?.secret)).size).toBe(1);
    expect(files.map((file) => file?.generation)).toEqual([2, 2, 2]);
    await victim.stop();
    await victim.start();
    await eventually("the removed node says what it is", 40_000, async () => {
      return ((await victim.state()).conflict ?? "").includes("was removed from the cluster");
    });
    expect((await victim.state()).nodes.filter(({ reachable }) => reachable).length).toBe(1);

    // With a new key and the secret that it knows it is nobody either.
    const folder = clusterFolder(join(lab.folder, victim.name));
    const known = loadCluster(folder);
    if (known === undefined) throw new Error("its file is there");
    await victim.stop();
    expect(known.generation).toBe(1);
    const address = lab.addressOf(owner);
    const identity = newIdentity();
    const node = { id: identity.id, name: "x", version: "1", incarnation: 1, port: 0 };
    await expect(
      dial({ identity, settings: { cluster: known, node }, address, purpose: "control" }),
    ).rejects.toThrow("not known here");

    // It leaves, and a new code lets it in, as another node.
    expect(await command(lab, victim, "cluster", "leave").exited).toBe(0);
    const joining = command(lab, victim, "join", address);
    let shown = "";
    const reader = joining.stdout.getReader();
    const decoder = new TextDecoder();
    while (!/[0-9A-Z]{5}-[0-9A-Z]{5}/.test(shown)) {
      const { value, done } = await reader.read();
      if (done) throw new Error(`no code: ${shown} ${await joining.stderr.text()}`);
      shown += decoder.decode(value);
    }
    reader.releaseLock();
    const [code = ""] = /[0-9A-Z]{5}-[0-9A-Z]{5}/.exec(shown) ?? [];
    const accepted = command(lab, away, "cluster", "accept", code);
    expect(await accepted.exited, await accepted.stderr.text()).toBe(0);
    expect(await joining.exited).toBe(0);
    expect(loadIdentity(folder).id).not.toBe(victimId);
    await victim.start();
    await lab.meet(lab.nodes, 40_000);
    expect(await victim.say("tiny")).toBe(text);
    expect(readFileSync(join(folder, "cluster.json"), "utf8")).not.toContain(known.secret);
  },
);
