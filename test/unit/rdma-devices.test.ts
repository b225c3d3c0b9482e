// RDMA devices: listing them with a fake library, choosing among them, and finding which of one node reaches which of another.

import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { RdmaLinks } from "../../src/cluster/net/rdma-links.ts";
import type { TrialChannel } from "../../src/cluster/net/rdma-trial.ts";
import { devicePairs } from "../../src/cluster/rdma-candidates.ts";
import type { RdmaDevice, RdmaSurvey } from "../../src/cluster/types.ts";
import type { Neighbour } from "../../src/cluster/view-questions.ts";
import {
  chosenDevices,
  listRdmaDevices,
  parseDevices,
  usableDevices,
} from "../../src/engine/rdma-devices.ts";
import { createLogger } from "../../src/log.ts";
import { inTime, msOf } from "../tools/in-time.ts";

const ROOT = join(import.meta.dir, "../..");
const MAIN = join(ROOT, "src/main.ts");
const QUIET = createLogger({ level: "silent" });
const SLOW_MS = 120_000;

const device = (name: string, address: string): RdmaDevice => ({ name, active: true, address, problem: "" });

describe("listing", () => {
  const folder = mkdtempSync(join(tmpdir(), "fake-verbs-"));
  const built =
    process.platform === "linux" &&
    existsSync(join(ROOT, "build/libcaravan.so")) &&
    Bun.which("cc") !== null &&
    Bun.spawnSync([
      ...["cc", "-shared", "-fPIC", "-o", join(folder, "libibverbs.so.1")],
      join(ROOT, "test/tools/fake-verbs.c"),
    ]).success;
  afterAll(() => rmSync(folder, { recursive: true }));
  if (!built) console.log("skipped: a fake libibverbs (needs Linux, cc and build/libcaravan.so)");
  const command = (mode: string) => [
    ...["env", `LD_LIBRARY_PATH=${folder}`, `FAKE_VERBS=${mode}`, process.execPath, MAIN, "rdma"],
  ];

  test.skipIf(!built)(
    "gives every device with its port's state, its address or what is wrong with it",
    async () => {
      expect(await listRdmaDevices({ command: command("devices") })).toEqual({
        devices: [
          device("rdma_en3", "169.254.7.9"),
          {
            ...{ name: "rdma_en4", active: false, address: "" },
            problem: "rdma_en4 has no active port (is the cable in?)",
          },
          {
            ...{ name: "rdma_en5", active: false, address: "" },
            problem: expect.stringContaining("rdma_en5 cannot be opened: all its queue pairs are in use"),
          },
        ],
      });
    },
    SLOW_MS,
  );

  test.skipIf(!built)(
    "comes back within its limit where the library hangs",
    async () => {
      const hang = { command: command("hang"), limitMs: 1500 };
      await inTime(4000, () =>
        msOf(async () =>
          expect(await listRdmaDevices(hang)).toEqual({
            reason: expect.stringContaining("has not answered for 1.5 s"),
          }),
        ),
      );
    },
    SLOW_MS,
  );

  test("says why where the process gives no list", async () => {
    const answer = (command: string[]) => listRdmaDevices({ command });
    expect(await answer(["sh", "-c", "echo broken >&2"])).toEqual({
      reason: "looking for RDMA devices ended without an answer: broken",
    });
    expect(await answer(["echo", '{"devices":[1]}'])).toEqual({
      reason: "the list of RDMA devices makes no sense",
    });
    expect(await answer(["/nowhere/at/all"])).toEqual({
      reason: expect.stringContaining("RDMA devices cannot be listed"),
    });
  });

  test("reads lines, and only devices with a port, an address and no problem are of use", () => {
    const devices = parseDevices("a\t4\t10.0.0.1\t\nb\t1\t\tb has no active port\n");
    expect(devices).toEqual([
      device("a", "10.0.0.1"),
      { name: "b", active: false, address: "", problem: "b has no active port" },
    ]);
    expect(usableDevices({ devices }).map(({ name }) => name)).toEqual(["a"]);
  });

  test("a person's choice leaves other devices out and names those that are not there", () => {
    const survey = { devices: [device("a", "10.0.0.1"), device("b", "10.0.1.1")] };
    const chosen = chosenDevices(survey, ["b", "c"]);
    expect(usableDevices(chosen).map(({ name }) => name)).toEqual(["b"]);
    expect(chosen).toMatchObject({
      devices: [
        { problem: expect.stringContaining("--rdma") },
        {},
        { name: "c", problem: "there is no such device" },
      ],
    });
    expect(chosenDevices(survey, [])).toBe(survey);
  });
});

describe("pairs of devices", () => {
  test("with a subnet for each cable come in the right order at once", () => {
    const own = [device("x", "10.80.1.1"), device("y", "10.80.2.1")];
    const theirs = [device("v", "10.80.9.2"), device("w", "10.80.2.2")];
    expect(devicePairs(own, theirs, new Set())[0]).toEqual(["y", "w"]);
  });

  test("put devices that reach another node already last", () => {
    const own = [device("x", "169.254.1.1"), device("y", "169.254.2.1")];
    const pairs = devicePairs(own, [device("w", "169.254.1.2")], new Set(["x"]));
    expect(pairs).toEqual([
      ["y", "w"],
      ["x", "w"],
    ]);
  });

  test("are bounded, however many ports there are", () => {
    const many = (letter: string) => Array.from({ length: 16 }, (_, i) => device(`${letter}${i}`, ""));
    expect(devicePairs(many("a"), many("b"), new Set()).length).toBe(24);
  });
});

/** Two ends of a connection in memory. */
function channels(): [TrialChannel, TrialChannel] {
  const queues: { items: unknown[]; wake: (() => void)[]; over: boolean }[] = [
    { items: [], wake: [], over: false },
    { items: [], wake: [], over: false },
  ];
  const end = (mine: number): TrialChannel => {
    const [own, other] = mine === 0 ? queues : queues.toReversed();
    if (own === undefined || other === undefined) throw new Error("two queues");
    const close = () => {
      for (const queue of [own, other]) {
        queue.over = true;
        for (const wake of queue.wake.splice(0)) wake();
      }
    };
    return {
      socket: { localAddress: "127.0.0.1" },
      send: (value) => {
        other.items.push(JSON.parse(JSON.stringify(value)));
        for (const wake of other.wake.splice(0)) wake();
      },
      readJson: async () => {
        while (own.items.length === 0) {
          if (own.over) throw new Error("the connection is over");
          await new Promise<void>((resolve) => own.wake.push(resolve));
        }
        return own.items.shift();
      },
      // What was sent can still be read.
      finish: close,
      close,
    };
  };
  return [end(0), end(1)];
}

interface Plugged {
  id: string;
  devices: RdmaDevice[];
}

/** Nodes whose ranks are played by fake-rdma-rank.ts. */
function mesh(nodes: readonly Plugged[], cables: string, away: ReadonlySet<string> = new Set()) {
  const command = ["env", `CABLES=${cables}`, process.execPath, join(ROOT, "test/tools/fake-rdma-rank.ts")];
  const links = new Map<string, RdmaLinks>();
  for (const { id, devices } of nodes)
    links.set(
      id,
      new RdmaLinks({
        ...{ id, wanted: [], command, log: QUIET, onChange: () => undefined },
        list: () => Promise.resolve<RdmaSurvey>({ devices }),
        others: () =>
          nodes
            .filter((other) => other.id !== id && !away.has(other.id) && !away.has(id))
            .map((other): Neighbour => {
              const its = links.get(other.id);
              return {
                ...{ id: other.id, name: other.id.toUpperCase(), rdma: its?.survey ?? { reason: "" } },
                linked: its?.links().some(({ to }) => to === id) ?? false,
              };
            }),
        open: (to) => {
          const [here, there] = channels();
          links.get(to)?.answer(there, id);
          return Promise.resolve(here);
        },
      }),
    );
  const step = () => {
    for (const each of links.values()) each.step();
  };
  return { links, step };
}

describe("nodes with cables between them", () => {
  test(
    "find out which device reaches whom, and say so to their ranks",
    async () => {
      // As on Macs: self-assigned addresses that say nothing.
      const { links, step } = mesh(
        [
          { id: "a", devices: [device("a1", "169.254.9.1"), device("a2", "169.254.7.2")] },
          { id: "b", devices: [device("b1", "169.254.3.3"), device("b2", "169.254.2.4")] },
          { id: "c", devices: [device("c1", "169.254.5.5"), device("c2", "169.254.1.6")] },
        ],
        "a1:c2 a2:b1 b2:c1",
      );
      const until = performance.now() + 40_000;
      while ([...links.values()].some((each) => each.links().length < 2)) {
        if (performance.now() > until) throw new Error("not all links are found");
        step();
        await Bun.sleep(20);
      }
      expect(links.get("a")?.links()).toEqual([
        { ...{ from: "a", to: "b", kind: "rdma", devices: ["a2", "b1"] }, latencyUs: 9.5, bandwidth: 5e9 },
        { ...{ from: "a", to: "c", kind: "rdma", devices: ["a1", "c2"] }, latencyUs: 9.5, bandwidth: 5e9 },
      ]);
      expect(
        links
          .get("c")
          ?.links()
          .map(({ devices }) => devices?.join())
          .sort(),
      ).toEqual(["c1,b2", "c2,a1"]);
      expect(await links.get("b")?.groupOptions(["c", "b", "a"], 1)).toEqual({ rdmaDevice: "b2,,b1" });
    },
    SLOW_MS,
  );

  test(
    "without a cable say why, on both sides",
    async () => {
      const { links, step } = mesh(
        [
          { id: "a", devices: [device("a1", "10.0.0.1")] },
          { id: "b", devices: [device("b1", "10.0.0.2")] },
          { id: "c", devices: [] },
        ],
        "",
      );
      step();
      await Bun.sleep(0);
      step();
      const options = (id: string, nodes: string[], rank: number) => links.get(id)?.groupOptions(nodes, rank);
      expect(await options("a", ["a", "b"], 0)).toEqual({
        noRdma: expect.stringMatching(/^no RDMA device here reaches B: .*nothing arrives over a1/),
      });
      expect(await options("b", ["a", "b"], 1)).toEqual({
        noRdma: expect.stringMatching(/^no RDMA device here reaches A: /),
      });
      expect(await options("a", ["a", "c"], 0)).toEqual({ noRdma: "C: there is no RDMA device" });
      expect(await options("c", ["a", "c"], 1)).toEqual({ noRdma: "there is no RDMA device" });
      expect(links.get("a")?.links()).toEqual([]);
    },
    SLOW_MS,
  );

  test(
    "keep what they found while one is out of sight for a moment",
    async () => {
      const away = new Set<string>();
      const { links, step } = mesh(
        [
          { id: "a", devices: [device("a1", "169.254.9.1")] },
          { id: "b", devices: [device("b1", "169.254.3.3")] },
        ],
        "a1:b1",
        away,
      );
      const until = performance.now() + 40_000;
      while ([...links.values()].some((each) => each.links().length < 1)) {
        if (performance.now() > until) throw new Error("no link is found");
        step();
        await Bun.sleep(20);
      }
      away.add("b");
      step();
      away.delete("b");
      step();
      // Nothing is being tried: ranks that are placed now have their devices at once.
      expect(await links.get("a")?.groupOptions(["a", "b"], 0)).toEqual({ rdmaDevice: ",a1" });
      expect(await links.get("b")?.groupOptions(["a", "b"], 1)).toEqual({ rdmaDevice: "b1," });
    },
    SLOW_MS,
  );

  test("that may not use RDMA look for nothing", async () => {
    const off = new RdmaLinks({
      ...{ id: "a", wanted: "off", others: () => [], onChange: () => undefined, log: QUIET },
      list: () => Promise.reject(new Error("listed all the same")),
      open: () => Promise.reject(new Error("opened")),
    });
    off.step();
    expect(await off.groupOptions(["a", "b"], 0)).toEqual({ noRdma: "RDMA is turned off (--rdma off)" });
  });
});
