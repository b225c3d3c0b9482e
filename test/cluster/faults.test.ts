// What happens when parts of a cluster die in the middle of an answer: every request ends with an error within three
// seconds, and the cluster heals by itself. Three nodes on loopback, real processes; the hosts of hosts.test.ts add networks.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { ClusterLab, eventually, libraryHere, loopbackHosts, signalProcess } from "./cluster-lab.ts";

/** The design's limit for an affected request. */
const LIMIT_MS = 3000;
/** Starting processes on a busy machine. */
const SLOW_MS = 90_000;

let lab: ClusterLab;
beforeAll(async () => {
  // As between machines: on one machine ranks would share memory (test/golden and test/cli have that).
  lab = new ClusterLab(
    (libraryHere ? loopbackHosts(3) : []).map((host) => ({ ...host, args: ["--transport", "tcp"] })),
  );
  await lab.start();
}, SLOW_MS);
afterAll(async () => {
  await lab.close();
}, SLOW_MS);

/** All nodes run, and a fresh instance does; who plays which part. */
async function parts() {
  await lab.revive();
  const [first] = lab.nodes;
  if (first === undefined) throw new Error("no nodes");
  await lab.removeAll();
  const instance = await lab.place(first, { tensor: 2, context: 262_144 });
  const owner = await lab.nodeOf(instance.ranks[0]?.node ?? "");
  const other = await lab.nodeOf(instance.ranks[1]?.node ?? "");
  const third = lab.nodes.find((node) => node !== owner && node !== other);
  if (third === undefined) throw new Error("no third node");
  const text = await owner.say("tiny");
  return { instance, owner, other, third, text };
}

const faults: [string, (p: Awaited<ReturnType<typeof parts>>) => void][] = [
  [
    "rank 0's process is killed",
    ({ owner }) => owner.children("runner").map((pid) => signalProcess(pid, "SIGKILL")),
  ],
  [
    "the other rank's process is killed",
    ({ other }) => other.children("rank").map((pid) => signalProcess(pid, "SIGKILL")),
  ],
  [
    "the other rank's process is stopped",
    ({ other }) => other.children("rank").map((pid) => signalProcess(pid, "SIGSTOP")),
  ],
  [
    "rank 0's process is stopped",
    ({ owner }) => owner.children("runner").map((pid) => signalProcess(pid, "SIGSTOP")),
  ],
  ["the other rank's node is killed", ({ other }) => other.kill("SIGKILL")],
  ["the owner's node is killed", ({ owner }) => owner.kill("SIGKILL")],
  [
    "the other rank's node and process are stopped",
    ({ other }) => {
      for (const pid of [...other.children(), other.pid]) signalProcess(pid, "SIGSTOP");
    },
  ],
];

describe.skipIf(!libraryHere)("in the middle of an answer", () => {
  for (const [what, break_] of faults) {
    test(
      `${what}: the request ends with a retryable error in time, and the cluster answers again`,
      async () => {
        const p = await parts();
        const { instance, third, text } = p;
        // The client is at a node that computes nothing.
        const stream = await third.longStream("tiny");
        expect(stream.over).toBe(false);
        const broken = performance.now();
        break_(p);
        const { atMs, error } = await stream.ended;
        console.log(`  ${what}: ended after ${Math.round(atMs - broken)} ms: ${error?.slice(0, 200)}`);
        expect(atMs - broken).toBeLessThan(LIMIT_MS);
        expect(error).toMatch(/cluster_degraded|engine_failed/);
        const healed = await lab.ready(third, instance.id, instance.epoch);
        console.log(`  healed after ${Math.round(performance.now() - broken)} ms, epoch ${healed.epoch}`);
        expect(await third.say("tiny")).toBe(text);
      },
      SLOW_MS,
    );
  }

  test(
    "other instances go on: a stream on a node that has no part in it does not notice",
    async () => {
      const { instance, owner, other, third } = await parts();
      const thirdId = await third.id();
      // One more of the same model, on the third node alone; requests go to the one with the least to do.
      const alone = await lab.place(third, { tensor: 1, pipeline: 1, nodes: [thirdId], context: 262_144 });
      expect(alone.ranks.map(({ node }) => node)).toEqual([thirdId]);
      const first = await owner.longStream("tiny");
      const second = await owner.longStream("tiny");
      const broken = performance.now();
      other.kill("SIGKILL");
      const ended = await Promise.race([first.ended, second.ended]);
      expect(ended.atMs - broken).toBeLessThan(LIMIT_MS);
      const [goesOn] = [first, second].filter(({ over }) => !over);
      if (goesOn === undefined) throw new Error("both streams ended");
      const before = goesOn.bytes;
      await lab.ready(third, instance.id, instance.epoch);
      await eventually("the other stream goes on", 5000, () => goesOn.bytes > before);
      expect(goesOn.over).toBe(false);
      goesOn.cancel();
    },
    SLOW_MS,
  );

  test(
    "while nothing runs, a killed rank is noticed within 2 s: the instance is not called ready any more",
    async () => {
      const { instance, other, third } = await parts();
      const [pid] = other.children("rank");
      if (pid === undefined) throw new Error("no rank");
      const broken = performance.now();
      signalProcess(pid, "SIGKILL");
      await eventually("the instance is not ready in its epoch", 2000, async () => {
        const now = (await third.state()).instances.find(({ id }) => id === instance.id);
        return now === undefined || now.phase !== "ready" || now.epoch > instance.epoch;
      });
      console.log(`  noticed idle after ${Math.round(performance.now() - broken)} ms`);
      await lab.ready(third, instance.id, instance.epoch);
    },
    SLOW_MS,
  );
});
