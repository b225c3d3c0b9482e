// Ranks of one machine as an operator meets them: `caravan logits` and `bench` with --tensor and --pipeline, what happens when
// a rank's process is killed while it computes or idles, and that nothing is left behind.

import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { RunnerClient } from "../../src/engine/runner-client.ts";
import { largestDifference } from "../golden/read-golden.ts";
import { collect, tinyRequest as request } from "../tools/engine-requests.ts";
import { inTime, msOf } from "../tools/in-time.ts";
import { TINY_VOCAB, writeTinyLlama4 } from "../tools/tiny-llama4.ts";
import { until } from "../tools/until.ts";

const LIMIT_MS = 120_000;
/** Tokens of an answer that is not over before the test does something to it, however slow the test is. */
const LONG = 60_000;
const MAIN = join(import.meta.dir, "../../src/main.ts");
let dir: string;
const clients: RunnerClient[] = [];

beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), "caravan-ranks-"));
  writeTinyLlama4(dir, 7, { contextTokens: 65_536 });
});
afterEach(async () => {
  await Promise.all(clients.splice(0).map((client) => client.close()));
});
afterAll(() => rmSync(dir, { recursive: true }));

function client(more: { tensor?: number; pipeline?: number; transport?: "shm" | "tcp" }): RunnerClient {
  const made = new RunnerClient({
    ...{ model: "tiny", modelDir: dir, threads: 1, context: 65_536, streams: 4, onLog: () => {} },
    ...more,
  });
  clients.push(made);
  return made;
}

/** Process ids of a process's children. */
function childrenOf(pid: number): number[] {
  const { stdout } = Bun.spawnSync(["pgrep", "-P", String(pid)]);
  return stdout
    .toString()
    .split("\n")
    .filter((line) => line !== "")
    .map(Number);
}

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

const hasPgrep = Bun.which("pgrep") !== null;
if (!hasPgrep) console.log("skipped: killing ranks, since there is no pgrep to find them with");

function caravan(args: string[]) {
  const { stdout, stderr, exitCode } = Bun.spawnSync([process.execPath, MAIN, ...args], {
    env: { ...process.env, NO_COLOR: "1" },
  });
  return { out: stdout.toString(), err: stderr.toString(), code: exitCode };
}

describe("caravan", () => {
  test(
    "logits --tensor 2 --pipeline 2 writes the logits of one rank, over each transport",
    () => {
      const tokens = join(dir, "tokens.json");
      writeFileSync(tokens, JSON.stringify({ tokens: request("", 60, 1).tokens }));
      const run = (out: string, ...more: string[]): Float32Array | undefined => {
        const path = join(dir, out);
        const common = ["--compute", "exact", "--prefill", "40", "--piece", "11", "--threads", "1"];
        const ended = caravan(["logits", dir, "--tokens-file", tokens, "--out", path, ...common, ...more]);
        if (ended.err.includes("this build has none")) return undefined;
        expect(ended).toMatchObject({ code: 0, out: "" });
        const bytes = readFileSync(path);
        return new Float32Array(bytes.buffer.slice(bytes.byteLength - 60 * TINY_VOCAB * 4));
      };
      const alone = run("one.npy");
      for (const transport of ["shm", "tcp"]) {
        const split = run(
          `${transport}.npy`,
          ...["--tensor", "2", "--pipeline", "2", "--transport", transport],
        );
        if (split === undefined) {
          console.log(`skipped: this build has no transport ${transport}`);
          continue;
        }
        expect(largestDifference(split, alone ?? new Float32Array(0))).toBeLessThan(2e-4);
      }
    },
    LIMIT_MS,
  );

  test(
    "bench --tensor 2 says what the ranks cost each other",
    () => {
      const settings = ["--prompt-tokens", "16", "--generate", "8", "--streams", "1,2", "--repeat", "1"];
      const ended = caravan(["bench", dir, "--json", "--tensor", "2", "--threads", "1", ...settings]);
      expect(ended).toMatchObject({ code: 0, err: "" });
      const { ranks, results } = JSON.parse(ended.out);
      expect(results.length).toBe(2);
      expect(ranks).toMatchObject({ tensor: 2, pipeline: 1 });
      expect(["shm", "tcp", "rdma"]).toContain(ranks.transport);
      expect(ranks.exchange.length).toBe(2);
      for (const { reduces, reduce_us, reduce_share, exchange_share } of ranks.exchange) {
        expect(reduces).toBeGreaterThan(0);
        expect(reduce_us).toBeGreaterThan(0);
        expect(reduce_share).toBeGreaterThan(0);
        expect(exchange_share.length).toBe(2);
        for (const share of exchange_share) expect(share).toBeGreaterThan(0);
      }
    },
    LIMIT_MS,
  );

  test.each([
    ["tcp", "MACs"],
    ["shm", "checksums"],
  ])(
    "bench over %s says what the %s cost",
    (transport, what) => {
      const settings = ["--prompt-tokens", "16", "--generate", "8", "--streams", "1", "--repeat", "1"];
      const args = ["bench", dir, "--tensor", "2", "--transport", transport, "--threads", "1", ...settings];
      const [{ mac_ms, mac_share }] = JSON.parse(caravan([...args, "--json"]).out).ranks.exchange;
      expect(mac_ms).toBeGreaterThan(0);
      expect(mac_share).toBeGreaterThan(0);
      expect(mac_share).toBeLessThan(1);
      expect(caravan(args).out).toMatch(
        new RegExp(`over ${transport},[\\s\\S]*; ${what} of rank 0: [\\d.]+ ms, [\\d.]+ %`),
      );
    },
    LIMIT_MS,
  );

  test("refuses more stages than layers, and a transport that this machine has not", () => {
    const many = caravan(["bench", dir, "--pipeline", "60"]);
    expect(many.err).toContain("cannot be split into 60 stages");
    expect(many.code).toBe(2);
  });
});

describe.skipIf(!hasPgrep)("a rank that is killed", () => {
  test.each([{ tensor: 2 }, { pipeline: 2 }, { tensor: 2, pipeline: 2, transport: "tcp" as const }])(
    "while %j compute ends every request within 3 s, naming the rank; the next request is answered",
    (ranks) =>
      inTime(3000, async () => {
        const engine = client(ranks);
        await engine.ready();
        const before = childrenOf(engine.pid ?? 0);
        expect(before.length).toBe((ranks.tensor ?? 1) * (ranks.pipeline ?? 1) - 1);
        const streams = ["a", "b"].map((id) => collect(engine.generate(request(id, 30, LONG))));
        await until(() => engine.status().running === 2, "both streams to run");
        const peaks = engine.status().rank_peak_resident_bytes ?? [];
        expect(peaks).toHaveLength(before.length + 1);
        for (const peak of peaks) expect(peak).toBeGreaterThan(1e6);
        process.kill(before.at(-1) ?? 0, "SIGKILL");
        const ms = await msOf(() => Promise.all(streams));
        for (const stream of streams) {
          const last = (await stream).at(-1);
          expect(last).toMatchObject({
            type: "error",
            error: { code: "cluster_degraded", retry_after_seconds: 2 },
          });
          expect(last?.type === "error" ? last.error.message : "").toContain(`rank ${before.length}`);
        }
        // At once, while the old runner may still be ending.
        const answered = await collect(engine.generate(request("c", 30, 4)));
        expect(answered.at(-1)).toMatchObject({ type: "finish", reason: "length" });
        await until(() => before.every((pid) => !alive(pid)), "the other ranks to end");
        return ms;
      }),
    LIMIT_MS,
  );

  test(
    "while nothing runs is noticed within 2 s, and the next request starts the ranks again",
    async () => {
      await inTime(2000, async () => {
        const engine = client({ tensor: 2 });
        await engine.ready();
        const [rank] = childrenOf(engine.pid ?? 0);
        process.kill(rank ?? 0, "SIGKILL");
        const ms = await msOf(() =>
          until(() => engine.status().state === "failed", "the loss to be noticed"),
        );
        expect(engine.status().error?.message).toContain("rank 1");
        const answered = await collect(engine.generate(request("c", 30, 4)));
        expect(answered.at(-1)).toMatchObject({ type: "finish" });
        return ms;
      });
    },
    LIMIT_MS,
  );

  test(
    "or stopped while it computes is noticed within 2 s, named and ended",
    async () => {
      await inTime(2000, async () => {
        const engine = client({ tensor: 2, transport: "tcp" });
        await engine.ready();
        const stream = collect(engine.generate(request("a", 30, LONG)));
        await until(() => engine.status().running === 1, "the stream to run");
        const [busy] = childrenOf(engine.pid ?? 0);
        process.kill(busy ?? 0, "SIGSTOP");
        const ms = await msOf(() => stream);
        const last = (await stream).at(-1);
        expect(last).toMatchObject({ type: "error", error: { code: "cluster_degraded" } });
        expect(last?.type === "error" ? last.error.message : "").toContain("rank 1 has been silent");
        const answered = await collect(engine.generate(request("b", 30, 4)));
        expect(answered.at(-1)).toMatchObject({ type: "finish" });
        await until(() => !alive(busy ?? 0), "the stopped rank to end");
        return ms;
      });
    },
    LIMIT_MS,
  );

  test(
    "or stopped while nothing runs is noticed within 2 s and ended",
    async () => {
      // Silence is looked for ten times a second.
      await inTime(2100, async () => {
        const engine = client({ tensor: 2, transport: "tcp" });
        await engine.ready();
        const [idle] = childrenOf(engine.pid ?? 0);
        process.kill(idle ?? 0, "SIGSTOP");
        const ms = await msOf(() =>
          until(() => engine.status().state === "failed", "the silence to be noticed"),
        );
        await until(() => !alive(idle ?? 0), "the stopped rank to end");
        return ms;
      });
    },
    LIMIT_MS,
  );

  test(
    "goes with its rank 0: no rank outlives the runner",
    async () => {
      const engine = client({ tensor: 2, pipeline: 2 });
      await engine.ready();
      const ranks = childrenOf(engine.pid ?? 0);
      expect(ranks.length).toBe(3);
      process.kill(engine.pid ?? 0, "SIGKILL");
      await until(() => ranks.every((pid) => !alive(pid)), "the ranks to end");
    },
    LIMIT_MS,
  );

  test(
    "leaves with the runner when the model is closed",
    async () => {
      const engine = client({ tensor: 2 });
      await engine.ready();
      const ranks = childrenOf(engine.pid ?? 0);
      await engine.close();
      await until(() => ranks.every((pid) => !alive(pid)), "the rank to end");
    },
    LIMIT_MS,
  );
});
