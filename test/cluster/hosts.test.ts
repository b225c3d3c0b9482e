// Four hosts on a network of their own (namespaces, netlab.sh): discovery by multicast, generation by tensor and pipeline over
// TCP, cables pulled and put back, slow and lossy links. The test runs itself again inside the lab's switch, from where
// all hosts can be reached and cables pulled.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { inTime } from "../tools/in-time.ts";
import { ClusterLab, eventually, KEY, type LabHost, type LabNode, libraryHere } from "./cluster-lab.ts";

const LIMIT_MS = 3000;
const SLOW_MS = 300_000;
const HOSTS = 4;
const NETLAB = join(import.meta.dir, "netlab.sh");
const inside = process.env.CARAVAN_NETLAB;
const browserProgram = ["/usr/bin/chromium", "/usr/bin/chromium-browser"].find((path) => existsSync(path));
if (inside !== undefined && browserProgram === undefined)
  console.log("skipped: the page of a host (no Chromium: apt-get install chromium)");

function run(command: string[]): { code: number; text: string } {
  const [program = "", ...args] = command;
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: "utf8" });
  return { code: status ?? 1, text: `${stdout ?? ""}${stderr ?? ""}${error?.message ?? ""}` };
}

/** Why there can be no lab here; undefined: there can. */
function obstacle(): string | undefined {
  if (process.platform !== "linux") return "network namespaces exist on Linux only";
  const name = `cvprobe${process.pid}`;
  const made = run(["ip", "netns", "add", name]);
  if (made.code !== 0) return `network namespaces are not permitted here: ${made.text.trim()}`;
  const veth = run(["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
  run(["ip", "netns", "del", name]);
  return veth.code === 0 ? undefined : `virtual cables are not permitted here: ${veth.text.trim()}`;
}

const why = inside === undefined ? obstacle() : undefined;
if (why !== undefined) console.log(`skipped: ${why}`);

describe.skipIf(inside !== undefined || why !== undefined || !libraryHere)("four hosts", () => {
  const prefix = `cv${process.pid % 10_000}x`;
  afterAll(() => run(["bash", NETLAB, "down", prefix]));

  test("on a network of their own pass the tests below", async () => {
    const up = run(["bash", NETLAB, "up", prefix, String(HOSTS)]);
    expect(up.text).toBe("");
    const child = Bun.spawn(
      ["ip", "netns", "exec", `${prefix}sw`, process.execPath, "test", import.meta.path],
      { env: { ...process.env, CARAVAN_NETLAB: prefix }, stdout: "inherit", stderr: "inherit" },
    );
    expect(await child.exited).toBe(0);
  }, 900_000);
});

describe.skipIf(inside === undefined)("hosts in the lab", () => {
  const prefix = inside ?? "";
  let lab: ClusterLab;

  test.skipIf(browserProgram === undefined)(
    "are shown by the page of one of them, which places a model, chats, stops, and ends it",
    async () => {
      const browser = await chromium.launch({
        executablePath: browserProgram ?? "",
        args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
      });
      try {
        const page = await browser.newPage();
        page.setDefaultTimeout(90_000);
        await page.goto(first().url);
        await page.click("#settings-toggle");
        await page.fill("#key", KEY);
        // With the long context below: an answer that is not over before it is stopped.
        await page.fill("#temperature", "0");
        await page.keyboard.press("Tab");
        await page.waitForSelector("#key[placeholder=accepted]");
        await page.click("#settings-toggle");
        await page.click("#to-cluster");
        await page.waitForSelector(`#nodes tbody tr:nth-of-type(${HOSTS})`);
        expect(await page.locator("#picture circle.node").count()).toBe(HOSTS);
        await page.fill("#place-context", "262144");
        await page.click("#place button[type=submit]");
        await page.waitForSelector("#placements tbody tr");
        await page.click("#placements tbody button[aria-label$='tensor 2']");
        await page.waitForSelector("#instances li:has-text('ready')", { timeout: 90_000 });
        const { instances } = await first().state();
        expect(instances.map(({ ranks }) => ranks.length)).toEqual([2]);
        mkdirSync(join(import.meta.dir, "../../build/screenshots"), { recursive: true });
        await page.screenshot({ path: join(import.meta.dir, "../../build/screenshots/hosts.png") });
        await page.click("#to-chat");
        await page.waitForSelector("#send:not([disabled])");
        await page.fill("#prompt", "Hi");
        await page.keyboard.press("Enter");
        await page.waitForSelector(".turn.assistant .text:not(:empty)");
        await page.click("#stop");
        await page.waitForSelector(".turn.assistant .stats:text-is('stopped')");
        await page.click("#to-cluster");
        await page.click("#instances button");
        await page.waitForSelector("#instances:has-text('None.')");
      } finally {
        await browser.close();
      }
    },
    SLOW_MS,
  );

  const cable = (i: number, state: "up" | "down") => {
    const { text } = run(["ip", "link", "set", `p${i}`, state]);
    expect(text).toBe("");
  };
  const indexOf = (node: LabNode) => lab.nodes.indexOf(node);

  beforeAll(async () => {
    const hosts = Array.from(
      { length: HOSTS },
      (_, i): LabHost => ({
        prefix: ["ip", "netns", "exec", `${prefix}${i}`],
        api: { host: `10.79.0.${i + 1}`, port: 11711 },
        // Namespaces of one machine share its memory, and ranks would find that out.
        args: ["--transport", "tcp"],
        env: {},
      }),
    );
    lab = new ClusterLab(hosts);
    await lab.start(60_000);
  }, SLOW_MS);
  afterAll(async () => {
    await lab.close();
  }, SLOW_MS);

  const first = (): LabNode => {
    const [node] = lab.nodes;
    if (node === undefined) throw new Error("no nodes");
    return node;
  };
  test(
    "have found each other by multicast alone, and measured their links",
    async () => {
      const states = await Promise.all(lab.nodes.map((node) => node.state()));
      for (const { nodes } of states)
        expect(nodes.map(({ name }) => name).sort()).toEqual(["a", "b", "c", "d"]);
      await eventually("all links are measured", 60_000, async () => {
        const { nodes, self } = await first().state();
        return nodes.every(
          ({ id, bandwidth, round_trip_us }) => id === self.id || (bandwidth && round_trip_us),
        );
      });
    },
    SLOW_MS,
  );

  test(
    "give the same text by tensor, by pipeline, by both, and alone; every host answers for all",
    async () => {
      const texts = new Map<string, string>();
      for (const asked of [
        { tensor: 1, pipeline: 1 },
        { tensor: 2, pipeline: 1 },
        { tensor: 1, pipeline: 3 },
        { tensor: 2, pipeline: 2 },
      ]) {
        const instance = await lab.place(first(), asked);
        expect(instance.ranks.length).toBe(asked.tensor * asked.pipeline);
        if (instance.ranks.length > 1) {
          const owner = await lab.nodeOf(instance.owner);
          expect(owner.log).toMatch(/ranks connected .*transport=tcp/);
        }
        const answers = await Promise.all(lab.nodes.map((node) => node.say("tiny", 40)));
        expect(new Set(answers).size).toBe(1);
        texts.set(JSON.stringify(asked), answers[0] ?? "");
        await lab.removeAll();
      }
      expect(new Set(texts.values()).size, JSON.stringify([...texts])).toBe(1);
    },
    SLOW_MS,
  );

  const pulls: [string, 0 | 1][] = [
    ["the owner's cable", 0],
    ["another rank's cable", 1],
  ];
  for (const [what, rank] of pulls) {
    test(
      `${what} is pulled: requests end in time, the rest goes on without it, and it comes back`,
      () =>
        inTime(
          LIMIT_MS,
          async () => {
            await lab.removeAll();
            const instance = await lab.place(first(), { tensor: 2, pipeline: 1, context: 262_144 });
            const victim = await lab.nodeOf(instance.ranks[rank]?.node ?? "");
            const nodes = instance.ranks.map(({ node }) => node);
            const ids = await Promise.all(lab.nodes.map((node) => node.id()));
            const client = lab.nodes.find((_, i) => !nodes.includes(ids[i] ?? ""));
            if (client === undefined) throw new Error("no host is free");
            const text = await client.say("tiny");
            const stream = await client.longStream("tiny");
            const pulled = performance.now();
            let endedMs = 0;
            cable(indexOf(victim), "down");
            try {
              const { atMs, error } = await stream.ended;
              endedMs = atMs - pulled;
              console.log(`  ${what}: ended after ${Math.round(endedMs)} ms: ${error?.slice(0, 200)}`);
              expect(error).toMatch(/cluster_degraded|engine_failed/);
              await lab.ready(client, instance.id, instance.epoch);
              console.log(`  placed again after ${Math.round(performance.now() - pulled)} ms`);
              expect(await client.say("tiny")).toBe(text);
              await eventually("the lost host is gone from the view", 30_000, async () =>
                (await client.state()).nodes.every(
                  ({ name, reachable }) => name !== victim.name || !reachable,
                ),
              );
            } finally {
              cable(indexOf(victim), "up");
            }
            await lab.meet(lab.nodes, 40_000);
            // After a partition two hosts may have owned the instance; one is left.
            await eventually("one instance is left and ready everywhere", 60_000, async () => {
              const states = await Promise.all(lab.nodes.map((node) => node.state()));
              return states.every(({ instances }) => {
                const live = instances.filter(({ phase }) => phase !== "gone");
                return live.length === 1 && live[0]?.phase === "ready";
              });
            });
            expect(await victim.say("tiny")).toBe(text);
            await lab.removeAll();
            return endedMs;
          },
          3,
        ),
      SLOW_MS,
    );
  }

  test(
    "a link of 100 Mbit/s changes the speed and nothing else",
    async () => {
      await lab.place(first(), { tensor: 2, pipeline: 1 });
      const text = await first().say("tiny", 40);
      const shaped = run([
        "tc",
        "qdisc",
        "add",
        "dev",
        "p1",
        "root",
        "tbf",
        ..."rate 100mbit burst 64kb latency 50ms".split(" "),
      ]);
      if (shaped.code !== 0) console.log(`skipped: no rate limit here: ${shaped.text.trim()}`);
      else {
        expect(await first().say("tiny", 40)).toBe(text);
        run(["tc", "qdisc", "del", "dev", "p1", "root"]);
      }
      await lab.removeAll();
    },
    SLOW_MS,
  );

  test(
    "a link that loses one packet in a hundred changes the speed and nothing else",
    async () => {
      await lab.place(first(), { tensor: 2, pipeline: 1 });
      const text = await first().say("tiny", 40);
      const rules =
        "add table netdev lab; add chain netdev lab drops { type filter hook ingress device p1 priority 0; }; add rule netdev lab drops numgen random mod 100 < 1 drop";
      const lossy = run(["nft", rules]);
      if (lossy.code !== 0) console.log(`skipped: nothing here drops packets: ${lossy.text.trim()}`);
      else {
        expect(await first().say("tiny", 40)).toBe(text);
        run(["nft", "delete table netdev lab"]);
      }
      await lab.removeAll();
    },
    SLOW_MS,
  );
});
