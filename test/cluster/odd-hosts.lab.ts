// Hosts of a network with something odd about one of them: a cable that carries one way only, a clock that is wrong and jumps, a
// copied data folder, another version, a full disk, a process that is slow but alive. Like hosts.test.ts the file runs itself again
// inside the lab's switch. Not among the tests of `make test`, for its length: make verify (test/cluster/run.sh).

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { cpSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { clusterFolder, loadIdentity } from "../../src/cluster/net/identity.ts";
import { CARAVAN_PROTOCOL } from "../../src/cluster/protocol-version.ts";
import {
  ClusterLab,
  eventually,
  type LabHost,
  type LabNode,
  libraryHere,
  signalProcess,
} from "./cluster-lab.ts";

const HOSTS = 4;
const SLOW_MS = 240_000;
const LIMIT_MS = 3000;
const ROOT = join(import.meta.dir, "../..");
const NETLAB = join(import.meta.dir, "netlab.sh");
const inside = process.env.CARAVAN_NETLAB;

function run(command: string[], env?: Record<string, string>): { code: number; text: string } {
  const [program = "", ...args] = command;
  const { status, stdout, stderr, error } = spawnSync(program, args, {
    encoding: "utf8",
    ...(env === undefined ? {} : { env }),
  });
  return { code: status ?? 1, text: `${stdout ?? ""}${stderr ?? ""}${error?.message ?? ""}` };
}

describe.skipIf(inside !== undefined || !libraryHere)("odd hosts", () => {
  const prefix = `co${process.pid % 10_000}x`;
  afterAll(() => run(["bash", NETLAB, "down", prefix]));

  test("on a network of their own pass the tests below", async () => {
    const up = run(["bash", NETLAB, "up", prefix, String(HOSTS)]);
    if (up.text !== "") {
      console.log(`skipped: network namespaces are not permitted here: ${up.text.trim()}`);
      return;
    }
    const child = Bun.spawn(
      ["ip", "netns", "exec", `${prefix}sw`, process.execPath, "test", import.meta.path],
      { env: { ...process.env, CARAVAN_NETLAB: prefix }, stdout: "inherit", stderr: "inherit" },
    );
    expect(await child.exited).toBe(0);
  }, 900_000);
});

describe.skipIf(inside === undefined)("in the lab", () => {
  const prefix = inside ?? "";
  let lab: ClusterLab;
  const at = (i: number): LabNode => {
    const node = lab.nodes[i];
    if (node === undefined) throw new Error(`no host ${i}`);
    return node;
  };
  const idOf = (i: number) => loadIdentity(clusterFolder(join(lab.folder, at(i).name))).id;
  const hosts = (): LabHost[] =>
    Array.from({ length: HOSTS }, (_, i) => ({
      prefix: ["ip", "netns", "exec", `${prefix}${i}`],
      api: { host: `10.79.0.${i + 1}`, port: 11711 },
      args: ["--transport", "tcp"],
      env: {},
    }));

  beforeAll(async () => {
    lab = new ClusterLab(hosts());
    await lab.start(60_000);
  }, SLOW_MS);
  const cleanups: (() => unknown)[] = [];
  afterAll(async () => {
    for (const cleanup of cleanups) cleanup();
    await lab.close();
  }, SLOW_MS);

  const placeOn = (...nodes: number[]) =>
    lab.place(at(nodes[0] ?? 0), {
      tensor: nodes.length,
      pipeline: 1,
      nodes: nodes.map(idOf),
      context: 262_144,
    });

  const addressOf = (i: number) =>
    /link\/ether (\S+)/.exec(run(["ip", "-n", `${prefix}${i}`, "link", "show", "eth0"]).text)?.[1] ?? "";
  const oneWay: [string, () => string][] = [
    ["towards everybody", () => ""],
    ["towards one host", () => `ether daddr ${addressOf(0)}`],
  ];
  for (const [what, match] of oneWay)
    test(
      `a cable that carries nothing from a host ${what}: requests end in time, the instance goes on elsewhere, and all is one again`,
      async () => {
        await lab.removeAll();
        const instance = await placeOn(0, 1);
        const text = await at(2).say("tiny");
        const stream = await at(2).longStream("tiny");
        const cut = performance.now();
        const drop = run([
          "nft",
          `add table netdev odd; add chain netdev odd out { type filter hook ingress device p1 priority 0; }; add rule netdev odd out ${match()} drop`,
        ]);
        if (drop.code !== 0) {
          console.log(`skipped: nothing here drops packets: ${drop.text.trim()}`);
          stream.cancel();
          return;
        }
        try {
          const { atMs, error } = await stream.ended;
          console.log(`  ended after ${Math.round(atMs - cut)} ms: ${error?.slice(0, 140)}`);
          expect(atMs - cut).toBeLessThan(LIMIT_MS);
          await lab.ready(at(2), instance.id, instance.epoch);
          console.log(`  placed again after ${Math.round(performance.now() - cut)} ms`);
          expect(await at(2).say("tiny")).toBe(text);
          // Ten seconds of the same: nothing moves to and fro.
          const { epoch } = await lab.ready(at(2), instance.id, instance.epoch);
          await new Promise((resolve) => setTimeout(resolve, 10_000));
          expect((await lab.ready(at(2), instance.id)).epoch).toBe(epoch);
        } finally {
          run(["nft", "delete table netdev odd"]);
        }
        await lab.meet(lab.nodes, 60_000);
        await eventually("one instance is left and ready everywhere", 40_000, async () => {
          const states = await Promise.all(lab.nodes.map((node) => node.state()));
          return states.every(({ instances }) => {
            const live = instances.filter(({ phase }) => phase !== "gone");
            return live.length === 1 && live[0]?.phase === "ready";
          });
        });
        expect(await at(1).say("tiny")).toBe(text);
      },
      SLOW_MS,
    );

  test(
    "a rank that gets a quarter of its processor is slow, and raises no alarm",
    async () => {
      await lab.removeAll();
      const instance = await placeOn(0, 1);
      const text = await at(2).say("tiny", 60);
      const owner = await lab.nodeOf(instance.owner);
      const other = owner === at(0) ? at(1) : at(0);
      const [pid] = other.children("rank");
      if (pid === undefined) throw new Error("no rank");
      let over = false;
      const throttle = (async () => {
        while (!over) {
          signalProcess(pid, "SIGSTOP");
          await new Promise((resolve) => setTimeout(resolve, 150));
          signalProcess(pid, "SIGCONT");
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
      })();
      const began = performance.now();
      try {
        expect(await at(2).say("tiny", 60)).toBe(text);
        console.log(`  60 tokens in ${Math.round(performance.now() - began)} ms`);
      } finally {
        over = true;
        await throttle;
      }
      expect((await lab.ready(at(2), instance.id)).epoch).toBe(instance.epoch);
    },
    SLOW_MS,
  );

  test(
    "a host whose clock is a day ahead and jumps back two while it computes changes nothing, and is told of",
    async () => {
      await lab.removeAll();
      const shift = join(lab.folder, "shift");
      const library = join(lab.folder, "shift.so");
      writeFileSync(shift, "86400");
      writeFileSync(`${library}.c`, SHIFTED_CLOCK);
      const built = run(["cc", "-shared", "-fPIC", "-O1", "-o", library, `${library}.c`, "-ldl"]);
      if (built.code !== 0) {
        console.log(`skipped: no C compiler: ${built.text.trim()}`);
        return;
      }
      const host = at(1);
      await host.stop();
      Object.assign(host.env, { LD_PRELOAD: library, SHIFT_FILE: shift });
      try {
        await host.start();
        await lab.meet(lab.nodes, 60_000);
        expect(host.log).toContain(new Date(Date.now() + 86_400_000).toISOString().slice(0, 10));
        const instance = await placeOn(0, 1);
        const text = await at(2).say("tiny");
        const stream = await at(2).longStream("tiny");
        writeFileSync(shift, "-86400");
        const before = stream.bytes;
        await eventually("the stream goes on", 10_000, () => stream.bytes > before + 20_000 || stream.over);
        expect(stream.over).toBe(false);
        stream.cancel();
        expect(await host.say("tiny")).toBe(text);
        expect((await lab.ready(at(2), instance.id)).epoch).toBe(instance.epoch);
        for (const node of lab.nodes)
          expect((await node.state()).nodes.filter(({ reachable }) => reachable).length).toBe(HOSTS);
        const command = [...at(0).host.prefix, process.execPath, join(ROOT, "src/main.ts"), "doctor"];
        let said = "";
        await eventually("doctor tells of it", 40_000, () => {
          said = run(command, lab.environment(at(0))).text;
          return /^FAIL {2}clock +the clock of b is \d+ s behind this machine's/m.test(said);
        });
        console.log(`  ${/^FAIL {2}clock.*$/m.exec(said)?.[0]}`);
      } finally {
        delete host.env.LD_PRELOAD;
        await host.stop();
        await host.start();
        await lab.meet(lab.nodes, 60_000);
      }
    },
    SLOW_MS,
  );

  test(
    "a copy of a host's data folder on another host: the one that started last stays, the other is told, nobody sees two",
    async () => {
      await lab.removeAll();
      const data = (i: number) => join(lab.folder, at(i).name);
      await at(3).stop();
      cpSync(clusterFolder(data(3)), join(lab.folder, "own"), { recursive: true });
      rmSync(clusterFolder(data(3)), { recursive: true });
      cpSync(clusterFolder(data(2)), clusterFolder(data(3)), { recursive: true });
      await at(3).start();
      await eventually("one of the two says what is wrong", 30_000, async () => {
        const conflicts = await Promise.all([2, 3].map(async (i) => (await at(i).state()).conflict ?? ""));
        return conflicts.some((text) => text.includes("copied"));
      });
      const conflicts = await Promise.all([2, 3].map(async (i) => (await at(i).state()).conflict));
      console.log(`  ${conflicts.map((text, i) => `${"cd"[i]}: ${text ?? "well"}`).join(" | ")}`);
      await eventually("the first two see three nodes", 15_000, async () => {
        const states = await Promise.all([0, 1].map((i) => at(i).state()));
        return states.every(({ nodes }) => nodes.length === 3);
      });
      await placeOn(0, 1);
      expect((await at(0).say("tiny")).length).toBeGreaterThan(0);
      // Its own key back: it is itself again.
      await at(3).stop();
      rmSync(clusterFolder(data(3)), { recursive: true });
      cpSync(join(lab.folder, "own"), clusterFolder(data(3)), { recursive: true });
      await at(2).stop();
      await Promise.all([at(2).start(), at(3).start()]);
      await lab.meet(lab.nodes, 60_000);
    },
    SLOW_MS,
  );

  test(
    "a host with another version is never joined; both versions are named on both sides, by status, join and doctor",
    async () => {
      await lab.removeAll();
      await at(3).stop();
      const other = join(lab.folder, "other");
      mkdirSync(other);
      for (const part of ["src", "cards", "package.json", "tsconfig.json", "NOTICE.txt", "LICENSE"])
        cpSync(join(ROOT, part), join(other, part), { recursive: true, force: true });
      symlinkSync(join(ROOT, "node_modules"), join(other, "node_modules"));
      symlinkSync(join(ROOT, "build"), join(other, "build"));
      const path = join(other, "src/cluster/protocol-version.ts");
      const theirs = CARAVAN_PROTOCOL + 1;
      writeFileSync(
        path,
        readFileSync(path, "utf8").replace(/CARAVAN_PROTOCOL = \d+/, `CARAVAN_PROTOCOL = ${theirs}`),
      );
      const main = join(other, "src/main.ts");
      const host = at(3);
      const env = { ...lab.environment(host), CARAVAN_NODE_NAME: "d" };
      const args = ["serve", "--host", host.host.api.host, "--port", String(host.host.api.port)];
      const child = Bun.spawn([...host.host.prefix, process.execPath, main, ...args], {
        ...{ env, stdout: "ignore", stderr: "pipe" },
      });
      const prefixed = (i: number, file: string, ...rest: string[]) =>
        run([...at(i).host.prefix, process.execPath, file, ...rest], lab.environment(at(i)));
      try {
        const both = new RegExp(
          `protocol ${theirs} .*protocol ${CARAVAN_PROTOCOL} |protocol ${CARAVAN_PROTOCOL} .*protocol ${theirs} `,
        );
        await eventually("a host of the cluster shows it", 60_000, () =>
          both.test(prefixed(0, join(ROOT, "src/main.ts"), "cluster", "status").text),
        );
        console.log(
          `  ${prefixed(0, join(ROOT, "src/main.ts"), "cluster", "status")
            .text.match(/^.*protocol.*$/m)?.[0]
            .trim()}`,
        );
        await eventually("it shows them", 60_000, () =>
          both.test(prefixed(3, main, "cluster", "status").text),
        );
        expect((await at(0).state()).nodes.filter(({ reachable }) => reachable).length).toBe(3);
        // It listens for a few beacons' time, which a busy machine may miss.
        await eventually("doctor says it, and what to do", 60_000, () => {
          const { text } = prefixed(0, join(ROOT, "src/main.ts"), "doctor");
          return both.test(text) && text.includes("Install the same version of caravan on both.");
        });
        expect(prefixed(3, main, "cluster", "leave").code).toBe(0);
        const joined = prefixed(3, main, "join");
        expect(joined.code).not.toBe(0);
        expect(joined.text).toMatch(both);
        console.log(`  ${joined.text.trim().split("\n").at(-1)}`);
      } finally {
        child.kill("SIGKILL");
        await child.exited;
      }
      // The same host with the right version is let in by a code.
      const join_ = Bun.spawn([...host.host.prefix, process.execPath, join(ROOT, "src/main.ts"), "join"], {
        ...{ env: lab.environment(host), stdout: "pipe", stderr: "pipe" },
      });
      let shown = "";
      const decoder = new TextDecoder();
      cleanups.push(() => join_.kill("SIGKILL"));
      for await (const chunk of join_.stdout) {
        shown += decoder.decode(chunk);
        const code = /\b[0-9A-Z]{5}-[0-9A-Z]{5}\b/.exec(shown)?.[0];
        if (code === undefined) continue;
        expect(prefixed(1, join(ROOT, "src/main.ts"), "cluster", "accept", code).text).toContain(
          "has joined",
        );
        break;
      }
      expect(await join_.exited, await join_.stderr.text()).toBe(0);
      await host.start();
      await lab.meet(lab.nodes, 60_000);
    },
    SLOW_MS,
  );

  test(
    "a host whose disk is full says so with what is needed and free, and computes its rank when there is room",
    async () => {
      await lab.removeAll();
      const host = at(3);
      await host.stop();
      const disk = join(lab.folder, "disk");
      mkdirSync(disk);
      // A part is refused below 1 GB to spare.
      expect(run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]).text).toBe("");
      try {
        cpSync(join(lab.folder, "d"), join(disk, "d"), { recursive: true });
        const { env } = host;
        const before = { ...env };
        Object.assign(env, { CARAVAN_DATA_DIR: join(disk, "d"), CARAVAN_MODELS_DIR: join(disk, "none") });
        await host.start();
        await lab.meet(lab.nodes, 60_000);
        const asked = { model: "tiny", tensor: 2, pipeline: 1, nodes: [idOf(0), idOf(3)] };
        const { id } = (await (await at(0).post("/cluster/instances", asked)).json()) as { id: string };
        let reason = "";
        await eventually("the reason is shown", 20_000, async () => {
          reason = (await at(1).state()).instances.find((each) => each.id === id)?.reason ?? "";
          return reason.includes("GB to spare");
        });
        console.log(`  ${reason}`);
        expect(reason).toMatch(
          /^.*d: .*this part of tiny needs .* more and 1\.0 GB to spare, 0\.1 GB are free/,
        );
        expect((await at(1).fetch("/health")).ok).toBe(true);
        expect(run(["mount", "-o", "remount,size=2g", disk]).text).toBe("");
        await lab.ready(at(1), id, 0, 60_000);
        expect((await at(3).say("tiny")).length).toBeGreaterThan(0);
        await lab.removeAll();
        await host.stop();
        for (const key of Object.keys(env)) delete env[key];
        Object.assign(env, before);
      } finally {
        await host.stop();
        run(["umount", disk]);
      }
    },
    SLOW_MS,
  );
});

/** Shifts the wall clock, and no other one, by the seconds in a file, which is read again a thousand times a second at most. */
const SHIFTED_CLOCK = `
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) {
    static __thread int calls;
    static __thread long seconds;
    if (calls++ % 64) return seconds;
    const char *path = getenv("SHIFT_FILE");
    FILE *f = path ? fopen(path, "r") : NULL;
    if (f) { if (fscanf(f, "%ld", &seconds) != 1) seconds = 0; fclose(f); }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += shift();
    return code;
}
int gettimeofday(struct timeval *restrict t, void *restrict z) {
    struct timespec now;
    (void)z;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
`;
