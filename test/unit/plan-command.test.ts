// caravan plan as a person and a script see it, over a tiny model on disk and clusters described in files.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as v from "valibot";
import { NodeListSchema, nodesOf } from "../../src/cluster/node-list.ts";
import { planPlacements } from "../../src/cluster/placement.ts";
import { planReport, planText } from "../../src/cluster/plan-report.ts";
import { llama4Profile } from "../tools/published-clusters.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";

const dir = mkdtempSync(join(tmpdir(), "caravan-plan-"));
afterAll(() => rmSync(dir, { recursive: true }));
const model = writeTinyChatModel(join(dir, "tiny"));

function file(name: string, value: unknown): string {
  const path = join(dir, name);
  writeFileSync(path, JSON.stringify(value));
  return path;
}

async function plan(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const child = Bun.spawn([process.execPath, join(import.meta.dir, "../../src/main.ts"), "plan", ...args], {
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, CARAVAN_DATA_DIR: join(dir, "data"), CARAVAN_CONFIG_DIR: join(dir, "config") },
  });
  const [out, err] = await Promise.all([child.stdout.text(), child.stderr.text()]);
  return { code: await child.exited, out, err };
}

const two = {
  nodes: [
    { name: "left", memory_gb: 8, bandwidth_gb: 20, step_us: 10, dense_layer_us: 5 },
    { name: "right", memory_gb: 8, bandwidth_gb: 20, step_us: 10, dense_layer_us: 5 },
  ],
  link: { kind: "tcp", latency_us: 200, bandwidth_gb: 0.117 },
};

describe("caravan plan", () => {
  test("for this machine names bytes, speed and the longest context", async () => {
    const { code, out, err } = await plan(model, "--context", "64");
    expect({ code, err }).toEqual({ code: 0, err: "" });
    expect(out).toMatch(/^tiny: one node on \S+, context 64, 1 stream\n/);
    expect(out).toMatch(/the longest context that fits: \d+ tokens/);
    expect(out).toMatch(/one node +1 +\d+(\.\d+)? /);
  });

  test("for a described cluster prints JSON that adds up", async () => {
    const { code, out } = await plan(model, "--nodes", file("two.json", two), "--context", "64", "--json");
    expect(code).toBe(0);
    const report = JSON.parse(out);
    expect(report.model).toBe("tiny");
    expect(report.placements[0].recommended).toBe(true);
    expect(
      report.placements.map((p: { tensor: number; pipeline: number }) => [p.tensor, p.pipeline]),
    ).toContainEqual([2, 1]);
    for (const { ranks } of report.placements)
      for (const { bytes } of ranks) expect(bytes.weights + bytes.kv + bytes.scratch).toBe(bytes.total);
    expect(report.placements.flatMap((p: { warnings: string[] }) => p.warnings).join()).toMatch(
      /splitting loses/,
    );
  });

  test("refuses what does not fit, with numbers and exit code 1", async () => {
    const small = { nodes: [{ name: "tiny-node", memory_gb: 0.0005, bandwidth_gb: 1 }] };
    const { code, err, out } = await plan(model, "--nodes", file("small.json", small), "--context", "64");
    expect({ code, out }).toEqual({ code: 1, out: "" });
    expect(err).toMatch(/tiny-node needs \d\.\d+ GB and has 0\.000 GB: \d\.\d+ GB missing/);
  });

  const wrong: [string, unknown, RegExp][] = [
    ["twice the same name", { nodes: [two.nodes[0], two.nodes[0]] }, /two nodes are called "left"/],
    [
      "no bandwidth",
      { nodes: [{ name: "a", chip: "486", memory_gb: 1 }] },
      /memory bandwidth of "a" is not known/,
    ],
    ["a link to nowhere", { ...two, links: [{ from: "left", to: "x", ...two.link }] }, /names "x"/],
    ["a field that is not one", { nodes: [{ ...two.nodes[0], colour: "red" }] }, /colour/],
    ["no nodes", { nodes: [] }, /nodes/],
  ];
  test.each(wrong)("a file with %s is refused and named", async (name, value, message) => {
    const path = file(`wrong-${name.replaceAll(" ", "-")}.json`, value);
    const { code, err } = await plan(model, "--nodes", path);
    expect(code).toBe(2);
    expect(err).toContain(path);
    expect(err).toMatch(message);
  });
});

test("the table for four Macs by chip names every node's bytes, the reason and what is assumed", () => {
  const list = v.parse(NodeListSchema, {
    nodes: ["a", "b", "c", "d"].map((name) => ({ name, chip: "Apple M3 Ultra", memory_gb: 512 })),
    link: { kind: "rdma", latency_us: 16, bandwidth_gb: 6 },
  });
  const { nodes, links } = nodesOf(list, "file");
  expect(nodes[0]).toMatchObject({ device: "metal", bandwidth: 819e9, memory: { available: 384e9 } });
  const found = planPlacements(llama4Profile("scout", 4), nodes, links, {
    asked: {},
    kvType: "bf16",
    threads: 8,
  });
  const text = planText(planReport("scout", "", found, nodes));
  expect(text).toMatch(/note: hand-over between GPU and network was not measured on a, b, c, d/);
  expect(text).toMatch(/a +0 +0–48 +100 % +60\.\d GB/);
});
