// Rank processes seen from whoever starts them: what they are asked, what they answer, and that every way of failing ends
// with a reason that names the rank.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { RankProcess } from "../../src/engine/rank-process.ts";
import type { RankLoad } from "../../src/engine/rank-protocol.ts";
import { CaravanError } from "../../src/errors.ts";

const LOAD: RankLoad = {
  modelDir: "/m",
  shares: [
    { rank: 0, stage: 0, tensorRank: 0, layers: [0, 1], weight: 1 },
    { rank: 1, stage: 0, tensorRank: 1, layers: [0, 1], weight: 1 },
  ],
  sizes: {
    compute: "exact",
    pageTokens: 16,
    fullPages: 1,
    chunkPages: 0,
    kvType: "f32",
    maxRows: 1,
    maxTokens: 1,
    maxLogits: 1,
    slots: 1,
  },
  threads: 1,
};

const addresses = [new Uint8Array([1]), new Uint8Array([2, 3])];

function start(behaviour: string, onLoading?: (bytes: number) => void): RankProcess {
  return new RankProcess({
    group: {
      rank: 1,
      size: 2,
      transport: "auto",
      epoch: 1,
      key: "00".repeat(32),
      instance: "00".repeat(16),
    },
    command: [process.execPath, join(import.meta.dir, "fake-rank.ts"), behaviour],
    onLog: () => {},
    closeLimitMs: 200,
    ...(onLoading === undefined ? {} : { onLoading }),
  });
}

async function rejection(promise: Promise<unknown>): Promise<CaravanError> {
  try {
    await promise;
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown;
    throw thrown;
  }
  throw new Error("nothing was rejected");
}

describe("a rank process", () => {
  test("gives its address, connects to all, loads, and leaves when it is asked to", async () => {
    const bytes: number[] = [];
    const rank = start("", (done) => bytes.push(done));
    expect(new TextDecoder().decode(await rank.address)).toBe("rank 1");
    expect(await rank.connect(addresses, 1000)).toEqual({ transport: "tcp", note: "2", round_trip_us: 7 });
    expect(await rank.load(LOAD)).toEqual({
      memory: { weights_mapped: 1, weights_copied: 2, kv: 3, scratch: 4 },
      threads: 1,
      cpu: "/m",
    });
    expect(bytes).toEqual([5]);
    await rank.close();
    expect(await rank.ended).toBeUndefined();
  });

  test("that says why it fails is quoted by its number", async () => {
    const rank = start("refuse");
    await rank.address;
    const error = await rejection(rank.connect(addresses, 1000));
    expect(error).toMatchObject({
      code: "engine_failed",
      message: "rank 1: rank 0 refused the key",
      hint: "start again",
    });
    expect(await rank.ended).toBe(error);
  });

  test("that is killed says by which signal, to everybody who waits", async () => {
    const rank = start("die");
    await rank.address;
    await rank.connect(addresses, 1000);
    const error = await rejection(rank.load(LOAD));
    expect(error).toMatchObject({
      code: "cluster_degraded",
      message: "the process of rank 1 ended (signal SIGKILL)",
      retryAfterSeconds: 2,
    });
    expect(await rank.ended).toBe(error);
  });

  test("that leaves with exit code 0 has no more to do; whoever still waits for it hears that it ended", async () => {
    const rank = start("leave");
    await rank.load(LOAD);
    expect(await rank.ended).toBeUndefined();
    expect((await rejection(rank.connect(addresses, 1000))).message).toBe("the process of rank 1 ended");
  });

  test("that sends what cannot be read is ended", async () => {
    const rank = start("garbage");
    const error = await rejection(rank.address);
    expect(error.code).toBe("engine_failed");
    expect(error.message).toBe("the process of rank 1 sent something unreadable");
    await rank.ended;
  });

  test("that does not leave when it is asked to is ended", async () => {
    const rank = start("deaf");
    await rank.address;
    await rank.close();
    expect(await rank.ended).toBeUndefined();
    expect(() => process.kill(rank.pid, 0)).toThrow();
  });

  test("that cannot be started is an error that names the command", () => {
    const make = () =>
      new RankProcess({
        group: { rank: 3, size: 4, transport: "tcp", epoch: 1, key: "", instance: "" },
        command: ["/nonexistent/caravan"],
      });
    expect(make).toThrow(/process of rank 3 cannot be started/);
  });
});
