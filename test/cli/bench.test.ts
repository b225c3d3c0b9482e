// `caravan bench` of the built executable: its JSON has a fixed form that other programs read.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { built, Place } from "../tools/built-caravan.ts";
import { writeTinyLlama4 } from "../tools/tiny-llama4.ts";

const place = new Place();
const good = place.path("good");
mkdirSync(good);
writeTinyLlama4(good);
afterAll(() => place.remove());

const NUMBER = expect.any(Number);
const SPREAD = { median: NUMBER, min: NUMBER, max: NUMBER };

describe.skipIf(!built)("bench", () => {
  test("prints one JSON object of the fixed form", async () => {
    const ended = await place.run([
      ...["bench", good, "--json", "--prompt-tokens", "32,64", "--generate", "8", "--streams", "1,2"],
      ...["--threads", "1", "--repeat", "2"],
    ]);
    expect(ended).toMatchObject({ code: 0, err: "" });
    const report = JSON.parse(ended.out);
    expect(report).toEqual({
      model: "good",
      device: "cpu",
      threads: 1,
      load_s: NUMBER,
      results: [32, 64].flatMap((prompt_tokens) =>
        [1, 2].map((streams) => ({
          prompt_tokens,
          generate: 8,
          streams,
          prompt_tps: SPREAD,
          generation_tps: SPREAD,
          ttft_ms: SPREAD,
          itl_ms: { p50: NUMBER, p95: NUMBER, p99: NUMBER },
          peak_memory_bytes: NUMBER,
        })),
      ),
    });
    for (const { generation_tps: tps, ttft_ms, peak_memory_bytes } of report.results) {
      expect(tps.min).toBeGreaterThan(0);
      expect(tps.median).toBeGreaterThanOrEqual(tps.min);
      expect(tps.max).toBeGreaterThanOrEqual(tps.median);
      expect(ttft_ms.min).toBeGreaterThan(0);
      expect(peak_memory_bytes).toBeGreaterThan(1e6);
    }
  });

  test("shows a table to people, and says when the context is too short", async () => {
    const shown = await place.run([
      "bench",
      good,
      "--prompt-tokens",
      "16",
      "--generate",
      "4",
      "--streams",
      "1",
      "--repeat",
      "1",
    ]);
    expect(shown.out).toMatch(/^16 +4 +1 /m);
    const long = await place.run([
      "bench",
      good,
      "--prompt-tokens",
      "5000",
      "--generate",
      "4",
      "--streams",
      "1",
    ]);
    expect(long.out).toBe("");
    expect(long.err).toContain("4096");
    expect([1, 2]).toContain(long.code);
  });

  test("compares with an earlier run, writes a page, and fails where a figure became worse", async () => {
    const settings = ["--prompt-tokens", "16", "--generate", "4", "--streams", "1", "--repeat", "1"];
    const page = place.path("report.html");
    const first = await place.run(["bench", good, "--json", ...settings, "--report", page]);
    expect(first).toMatchObject({ code: 0, err: "" });
    expect(readFileSync(page, "utf8")).toContain("</svg>");
    const report = JSON.parse(first.out);
    const file = place.path("earlier.json");
    const compare = async (factor: number) => {
      const scaled = { median: report.results[0].generation_tps.median * factor };
      const results = [
        { ...report.results[0], generation_tps: { ...scaled, min: scaled.median, max: scaled.median } },
      ];
      writeFileSync(file, JSON.stringify({ ...report, results }));
      return place.run(["bench", good, "--json", ...settings, "--compare", file]);
    };
    const worse = await compare(1000);
    expect(worse.code).toBe(1);
    expect(worse.err).toMatch(/generation_tps .* worse/);
    const better = await compare(0.001);
    expect(better.err).toMatch(/generation_tps .* better/);
    const other = await place.run(["bench", good, ...settings, "--compare", place.path("none.json")]);
    expect(other.code).not.toBe(0);
    expect(other.err).toContain("none.json");
  });
});
