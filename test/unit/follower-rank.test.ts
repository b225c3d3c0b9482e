// A rank of another node's instance: however it ends, its process is told to go first, so that it can take down what only it can, and is killed
// only when it does not.

import { afterEach, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Frame } from "../../src/cluster/net/channel.ts";
import { FollowerRank, type OwnerChannel } from "../../src/cluster/net/follower-rank.ts";
import type { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { until } from "../tools/until.ts";

const folder = mkdtempSync(join(tmpdir(), "caravan-follower-"));
afterEach(() => rmSync(join(folder, "told"), { force: true }));
process.on("exit", () => rmSync(folder, { recursive: true, force: true }));

const BEGIN = {
  type: "begin",
  group: {
    ...{ rank: 1, size: 2, transport: "auto", epoch: 1 },
    ...{ key: "00".repeat(32), instance: "00".repeat(16) },
  },
  shares: [0, 1].map((rank) => ({ rank, stage: 0, tensorRank: rank, layers: [0, 1], weight: 1 })),
  sizes: {
    ...{ compute: "exact", pageTokens: 16, fullPages: 1, chunkPages: 0, kvType: "f32" },
    ...{ maxRows: 1, maxTokens: 1, maxLogits: 1, slots: 1 },
  },
};

/** An owner that begins the rank; `leave` ends its connection. */
function owner() {
  const said: { type?: string }[] = [];
  const left = Promise.withResolvers<Frame | undefined>();
  let first = true;
  const channel: OwnerChannel = {
    open: true,
    socket: { localAddress: "127.0.0.1" },
    send: (value) => void said.push(value as { type?: string }),
    readJson: async () => BEGIN,
    read: async () => {
      if (!first) return await left.promise;
      first = false;
      const addresses = ["AA==", "AQ=="];
      return { kind: "json", value: { type: "connect", addresses, timeout_ms: 1000 } };
    },
    finish: () => undefined,
  };
  return { channel, said, leave: () => left.resolve(undefined) };
}

function follow(behaviour: string, channel: OwnerChannel) {
  const over = Promise.withResolvers<CaravanError | undefined>();
  let ready = false;
  const rank = new FollowerRank({
    ask: { instance: crypto.randomUUID(), epoch: 1, rank: 1 },
    open: async () => channel,
    prepare: async () => "/m",
    compute: () => ({ threads: 1 }),
    rdma: async () => ({}),
    bytes: 5,
    reports: {
      fetching: () => undefined,
      loading: () => undefined,
      ready: () => {
        ready = true;
      },
      over: over.resolve,
    },
    log: createLogger({ level: "silent" }),
    command: [process.execPath, join(import.meta.dir, "fake-rank.ts"), behaviour],
  });
  return { rank, over: over.promise, isReady: () => ready };
}

describe("a rank of another node's instance", () => {
  for (const how of ["it is stopped", "its owner's connection ends"])
    test(`is told to leave when ${how}`, async () => {
      const { channel, leave } = owner();
      const { rank, over, isReady } = follow(`tell ${join(folder, "told")}`, channel);
      await until(isReady, "the rank is ready", 20_000);
      if (how === "it is stopped") rank.stop();
      else leave();
      expect(await over).toBeUndefined();
      expect(existsSync(join(folder, "told"))).toBe(true);
    }, 30_000);

  test("is killed soon when it does not leave", async () => {
    const { channel } = owner();
    const { rank, over, isReady } = follow("deaf", channel);
    await until(isReady, "the rank is ready", 20_000);
    const pid = rank.pid ?? 0;
    rank.stop();
    expect(await over).toBeUndefined();
    expect(() => process.kill(pid, 0)).toThrow();
  }, 30_000);

  test("that ends by itself tells its owner why", async () => {
    const { channel, said } = owner();
    const { over } = follow("die", channel);
    expect((await over)?.code).toBe("cluster_degraded");
    expect(said.at(-1)?.type).toBe("ended");
  }, 30_000);
});
