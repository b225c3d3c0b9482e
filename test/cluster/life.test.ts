// A cluster in daily life: clients that leave, nodes that are told to stop, clusters side by side. Real processes on loopback.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { loadCluster, newCluster, saveCluster } from "../../src/cluster/net/cluster-file.ts";
import { clusterFolder } from "../../src/cluster/net/identity.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { ClusterLab, eventually, type LabNode, libraryHere, loopbackHosts } from "./cluster-lab.ts";

const SLOW_MS = 180_000;

let lab: ClusterLab;
beforeAll(async () => {
  // A node that is told to stop waits for answers, which take long on a busy machine.
  const hosts = libraryHere ? loopbackHosts(3) : [];
  lab = new ClusterLab(
    hosts.map((host) => ({ ...host, env: { ...host.env, CARAVAN_DRAIN_SECONDS: "120" } })),
  );
  await lab.start();
}, SLOW_MS);
afterAll(async () => {
  await lab.close();
}, SLOW_MS);

/** Requests that a node's engine works on. */
async function generations(node: LabNode): Promise<number> {
  const text = await (await node.fetch("/metrics")).text();
  return Number(/^caravan_generations_running(?:\{[^}]*\})? (\d+)/m.exec(text)?.[1] ?? Number.NaN);
}

/** A fresh instance of two ranks; its owner, and the node that computes nothing. */
async function placed() {
  await lab.revive();
  await lab.removeAll();
  const [first] = lab.nodes;
  if (first === undefined) throw new Error("no nodes");
  const instance = await lab.place(first, { tensor: 2, pipeline: 1, context: 262_144 });
  const owner = await lab.nodeOf(instance.ranks[0]?.node ?? "");
  const ids = await Promise.all(lab.nodes.map((node) => node.id()));
  const idle = lab.nodes.find((_, i) => instance.ranks.every(({ node }) => node !== ids[i]));
  if (idle === undefined) throw new Error("no idle node");
  return { instance, owner, idle };
}

describe.skipIf(!libraryHere)("in a cluster", () => {
  test(
    "a client that leaves at another node ends its request at the owner at once",
    async () => {
      const { owner, idle } = await placed();
      await inTime(2000, async () => {
        const stream = await idle.longStream("tiny");
        const running = () => generations(owner);
        expect(await running()).toBe(1);
        stream.cancel();
        const ms = await msOf(() =>
          eventually("the owner runs nothing", 20_000, async () => (await running()) === 0),
        );
        console.log(`  ended after ${Math.round(ms)} ms`);
        return ms;
      });
    },
    SLOW_MS,
  );

  test(
    "the memory of every rank is known, whatever machine it is on and whom one asks",
    async () => {
      const { owner, idle } = await placed();
      const ask = { model: "tiny", messages: [{ role: "user", content: "Hi" }], max_tokens: 4 };
      for (const node of [owner, idle])
        await eventually("both ranks have said it", 20_000, async () => {
          const reply = (await (await node.post("/bench/chat/completions", ask)).json()) as {
            generation_stats: { rank_peak_memory_bytes: (number | null)[] };
          };
          const { rank_peak_memory_bytes: peaks } = reply.generation_stats;
          return peaks.length === 2 && peaks.every((each) => each !== null && each > 1e6);
        });
    },
    SLOW_MS,
  );

  test(
    "an owner that is told to stop finishes what it computes for others, and the instance goes on elsewhere",
    async () => {
      const { instance, owner, idle } = await placed();
      const before = await idle.say("tiny", 30);
      const answer = idle.say("tiny", 4000);
      await eventually("the request runs", 20_000, async () => (await generations(owner)) > 0);
      owner.kill("SIGTERM");
      expect((await answer).length).toBeGreaterThan(0);
      await eventually("the owner has ended", 130_000, () => !owner.running);
      expect(owner.exitCode).toBe(0);
      await lab.ready(idle, instance.id, instance.epoch);
      expect(await idle.say("tiny", 30)).toBe(before);
    },
    SLOW_MS,
  );

  test(
    "nodes of another cluster on the same network are never joined, and the reason is shown",
    async () => {
      await lab.revive();
      const [first, second, third] = lab.nodes;
      if (first === undefined || second === undefined || third === undefined) throw new Error("three nodes");
      // The same name with another secret: the running node follows its file.
      const folder = clusterFolder(`${lab.folder}/${third.name}`);
      const home = loadCluster(folder);
      if (home === undefined) throw new Error("its file is there");
      saveCluster(folder, newCluster("lab"));
      await eventually("the third is alone", 30_000, async () => {
        const { nodes } = await third.state();
        return nodes.filter(({ reachable }) => reachable).length === 1;
      });
      await eventually("the others go on without it", 30_000, async () => {
        const { nodes } = await first.state();
        return nodes.filter(({ reachable }) => reachable).length === 2;
      });
      await eventually("the reason is shown", 30_000, async () => {
        const { problems = [] } = (await first.state()) as { problems?: { problem: string }[] };
        return problems.some(({ problem }) => problem.includes("proof of the cluster's secret is wrong"));
      });
      saveCluster(folder, home);
      await lab.meet(lab.nodes, 40_000);
    },
    SLOW_MS,
  );
});
