// Reading what a model of the hub is made of by ranges, against a hub on loopback that sometimes misbehaves.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { profileModel } from "../../src/cluster/model-profile.ts";
import { readModelConfig } from "../../src/model/config.ts";
import { readHubModel } from "../../src/model/download/hub-headers.ts";
import { makeLoadPlan } from "../../src/model/load-plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { type HubFile, MisbehavingHub } from "../tools/misbehaving-hub.ts";
import { writeTinyChatModel } from "../tools/tiny-chat-model.ts";

const dir = mkdtempSync(join(tmpdir(), "caravan-headers-"));
const model = writeTinyChatModel(join(dir, "tiny"));
const hubs: MisbehavingHub[] = [];
afterAll(() => {
  rmSync(dir, { recursive: true });
  for (const hub of hubs) hub.stop();
});

const files = (): HubFile[] =>
  readdirSync(model).map((path) => ({ path, content: readFileSync(join(model, path)) }));

async function hubOf(content: HubFile[] = files()): Promise<MisbehavingHub> {
  const hub = await MisbehavingHub.start("org/tiny", content);
  hubs.push(hub);
  return hub;
}

const env = (hub: MisbehavingHub) => ({ HF_ENDPOINT: hub.url, HOME: dir });
const quick = { retry: { firstWaitMs: 1, failures: 3 } };

describe("a model of the hub", () => {
  test("gives the same plan as on disk, from a part of its bytes", async () => {
    const hub = await hubOf();
    const found = await readHubModel("org/tiny", { env: env(hub) });
    const here = makeLoadPlan(readModelConfig(model), await openCheckpoint(model));
    const there = makeLoadPlan(found.config, found.checkpoint);
    expect(profileModel(there).layers).toEqual(profileModel(here).layers);
    expect(found.totalBytes).toBe(readFileSync(join(model, "model.safetensors")).length);
    expect(found.readBytes).toBeLessThan(found.totalBytes / 4);
    const weights = hub.requests.filter(({ path }) => path.endsWith(".safetensors"));
    expect(weights.length).toBeGreaterThan(0);
    for (const { range } of weights) expect(range).toMatch(/^bytes=\d+-\d+$/);
  });

  test("is read from its beginning where the server knows no ranges", async () => {
    const hub = await hubOf();
    hub.behave = () => ({ do: "ignore-range" });
    const found = await readHubModel("org/tiny", { env: env(hub) });
    expect(found.checkpoint.tensors.size).toBe((await openCheckpoint(model)).tensors.size);
  });

  test("is read in spite of connections that drop", async () => {
    const hub = await hubOf();
    hub.behave = ({ earlier }) => (earlier === 0 ? { do: "drop", afterBytes: 100 } : undefined);
    expect(
      (await readHubModel("org/tiny", { env: env(hub), ...quick })).config.layers.length,
    ).toBeGreaterThan(0);
  });

  test("that is damaged, unknown or out of reach is refused with its name", async () => {
    const broken = files().map((file) =>
      file.path === "model.safetensors"
        ? { ...file, content: Buffer.concat([Buffer.alloc(8, 0xff), file.content.subarray(8)]) }
        : file,
    );
    const hub = await hubOf(broken);
    expect(readHubModel("org/tiny", { env: env(hub) })).rejects.toMatchObject({
      code: "bad_file",
      where: "org/tiny/model.safetensors",
    });
    expect(readHubModel("org/other", { env: env(hub), ...quick })).rejects.toMatchObject({
      code: "model_not_found",
    });
    expect(readHubModel("org/tiny", { env: { ...env(hub), HF_HUB_OFFLINE: "1" } })).rejects.toMatchObject({
      code: "download_failed",
    });
  });
});
