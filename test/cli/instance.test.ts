// Ranks that nodes start: whoever starts them carries addresses and loads, rank 0 in a runner, the others as rank processes.
// Two nodes on this machine, played by the test.

import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { evenShares } from "../../src/cluster/even-shares.ts";
import { instanceSizes } from "../../src/engine/instance-sizes.ts";
import { RankProcess } from "../../src/engine/rank-process.ts";
import type { GroupOptions } from "../../src/engine/rank-protocol.ts";
import { RunnerClient } from "../../src/engine/runner-client.ts";
import { CaravanError } from "../../src/errors.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { makeLoadPlan } from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { collect, tinyRequest as request, tokensOf } from "../tools/engine-requests.ts";
import { writeTinyLlama4 } from "../tools/tiny-llama4.ts";
import { until } from "../tools/until.ts";

const LIMIT_MS = 120_000;
let dir: string;
const open: { close(): Promise<void> }[] = [];

beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-instance-"));
  writeTinyLlama4(dir, 7, { contextTokens: 65_536 });
});
afterEach(async () => {
  await Promise.all(open.splice(0).map((each) => each.close()));
});
afterAll(() => rmSync(dir, { recursive: true }));

const load = { model: "tiny", context: 65_536, threads: 1, compute: "exact" as const, onLog: () => {} };

function alone(): RunnerClient {
  const runner = new RunnerClient({ ...load, modelDir: dir, streams: 3 });
  open.push(runner);
  return runner;
}

interface Placed {
  runner: RunnerClient;
  others: RankProcess[];
  /** Why a rank > 0 ended. */
  lost: (CaravanError | undefined)[];
}

/** What the nodes of an instance do between them. */
async function place(
  tensor: number,
  pipeline: number,
  { wrongKey = false, weights }: { wrongKey?: boolean; weights?: number[] } = {},
): Promise<Placed> {
  const plan = makeLoadPlan(readModelConfig(dir), await openCheckpoint(dir));
  const shares = evenShares(plan, tensor, pipeline).map((share) => ({
    ...share,
    weight: weights?.[share.tensorRank] ?? 1,
  }));
  const sizes = instanceSizes(plan, { context: load.context, streams: 3, compute: "exact", kvType: "f32" });
  const group = (rank: number): GroupOptions => ({
    rank,
    size: shares.length,
    transport: "tcp",
    epoch: 7,
    key: (wrongKey && rank > 0 ? "cd" : "ab").repeat(32),
    instance: "12".repeat(16),
    host: "127.0.0.1",
  });
  const first = Promise.withResolvers<Uint8Array>();
  const runner = new RunnerClient({
    ...load,
    modelDir: dir,
    instance: { group: group(0), shares, sizes },
    onAddress: first.resolve,
  });
  open.push(runner);
  const ready = runner.ready();
  ready.catch(first.reject);
  const others = shares.slice(1).map(({ rank }) => new RankProcess({ group: group(rank), onLog: () => {} }));
  open.push(...others);
  const lost: (CaravanError | undefined)[] = [];
  others.forEach(async (each) => {
    lost.push(await each.ended);
  });
  const addresses = await Promise.all([first.promise, ...others.map(({ address }) => address)]);
  const limitMs = wrongKey ? 3000 : 20_000;
  runner.connect(addresses, limitMs);
  await Promise.all(others.map((each) => each.connect(addresses, limitMs)));
  const loads = others.map((each) => each.load({ modelDir: dir, shares, sizes, threads: 1 }));
  await Promise.all([ready, ...loads]);
  return { runner, others, lost };
}

describe("ranks that nodes start", () => {
  test.each([
    [2, 1, [1, 1]],
    [2, 2, [1, 1]],
    [2, 1, [1, 3]],
    [3, 1, [0, 1, 0.01]],
  ] as [number, number, number[]][])(
    "%d × %d generate what one rank generates, with shares like %p",
    async (tensor, pipeline, weights) => {
      const requests = [request("a", 40, 20), request("b", 9, 20), request("c", 90, 20)];
      const all = async (runner: RunnerClient) =>
        (await Promise.all(requests.map((each) => collect(runner.generate(each))))).map(tokensOf);
      const { runner } = await place(tensor, pipeline, { weights });
      expect(runner.status()).toMatchObject({
        state: "ready",
        context: load.context,
        ranks: { tensor, pipeline, transport: "tcp" },
      });
      const got = await all(runner);
      expect(got).toEqual(await all(alone()));
      expect(got.flat().length).toBe(60);
    },
    LIMIT_MS,
  );

  test(
    "leave in peace when rank 0 closes",
    async () => {
      const { runner, others, lost } = await place(2, 1);
      const left = others.map((each) => each.ended);
      await runner.close();
      await Promise.all(left);
      expect(lost).toEqual([undefined]);
    },
    LIMIT_MS,
  );

  test(
    "end rank 0's requests when the node says that one is lost, and are not started again by themselves",
    async () => {
      const { runner } = await place(2, 1);
      const stream = collect(runner.generate(request("a", 30, 60_000)));
      await until(() => runner.status().running === 1, "the stream to run");
      runner.lost(new CaravanError("cluster_degraded", "node B is gone"));
      const last = (await stream).at(-1);
      expect(last).toMatchObject({ type: "error", error: { code: "cluster_degraded" } });
      await until(() => runner.status().state === "failed", "the runner to end");
      const next = (await collect(runner.generate(request("b", 5, 5)))).at(-1);
      expect(next).toMatchObject({ type: "error", error: { code: "cluster_degraded" } });
    },
    LIMIT_MS,
  );

  test(
    "of another key are refused",
    async () => {
      const refused = await place(2, 1, { wrongKey: true }).then(
        () => undefined,
        (thrown) => thrown,
      );
      expect(refused).toBeInstanceOf(CaravanError);
    },
    LIMIT_MS,
  );
});
