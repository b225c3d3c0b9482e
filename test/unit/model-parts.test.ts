// Parts of models that go while others come into use.

import { afterEach, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ModelParts, type ModelPartsOptions } from "../../src/cluster/net/model-parts.ts";
import { writePartNote } from "../../src/cluster/net/part-note.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

/** A part of each of the models, in a folder of its name. */
async function partsOf(models: readonly string[], more: Partial<ModelPartsOptions> = {}) {
  const folder = mkdtempSync(join(tmpdir(), "caravan-parts-"));
  cleanups.push(() => rmSync(folder, { recursive: true, force: true }));
  for (const model of models) {
    mkdirSync(join(folder, model));
    await writePartNote(join(folder, model), { model, idleHours: 1, files: {} });
  }
  const parts = new ModelParts({
    folder,
    holders: () => [],
    open: () => Promise.reject(new CaravanError("download_failed", "none")),
    nameOf: (node) => node,
    inUse: () => new Set(),
    log: createLogger({ level: "silent" }),
    ...more,
  });
  return { folder, parts };
}

describe("parts of models", () => {
  test("that come into use while others are dropped stay", async () => {
    const used = new Set<string>();
    const { folder, parts } = await partsOf(["a", "b", "c"], { inUse: () => used });
    const cleaning = parts.clean();
    // The first of them is on its way out.
    const left = parts.list().map(({ model }) => model);
    expect(left).toHaveLength(2);
    const last = left[1] ?? "";
    used.add(last);
    await cleaning;
    expect(readdirSync(folder)).toEqual([last]);
  });

  test("are fetched only when what was there of them before has gone", async () => {
    const there: boolean[] = [];
    const { folder, parts } = await partsOf(["a"], {
      holders: () => ["holder"],
      open: () => {
        there.push(existsSync(join(folder, "a")));
        return Promise.reject(new CaravanError("download_failed", "none"));
      },
    });
    // Their removal takes a while.
    for (let i = 0; i < 1000; i++) writeFileSync(join(folder, "a", `${i}`), "");
    const cleaning = parts.clean("a");
    const order = {
      ...{ model: "a", shares: [], rank: 0, onProgress: () => undefined },
      signal: new AbortController().signal,
    };
    await expect(
      parts.prepare(order, new CaravanError("model_not_found", "nobody has it")),
    ).rejects.toMatchObject({ code: "download_failed" });
    await cleaning;
    expect(there).toEqual([false]);
  });
});
