// Pulling and deleting models over HTTP: who may, what is told meanwhile, and what stops it.

import { describe, expect, test } from "bun:test";
import { createApp } from "../../src/api/app.ts";
import type { ModelLibrary } from "../../src/api/ops/model-library.ts";
import { CaravanError } from "../../src/errors.ts";
import { MODEL, sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { until } from "../tools/until.ts";

class Library implements ModelLibrary {
  signal: AbortSignal | undefined;
  removed: string[] = [];
  hold: Promise<unknown> = Promise.resolve();
  fail: CaravanError | undefined;

  async pull(_name: string, { signal, onProgress }: Parameters<ModelLibrary["pull"]>[1]) {
    this.signal = signal;
    if (this.fail !== undefined) throw this.fail;
    onProgress({ doneBytes: 1, totalBytes: 9 });
    const stopped = new Promise<never>((_, reject) =>
      signal.addEventListener("abort", () => reject(signal.reason), { once: true }),
    );
    await Promise.race([this.hold, stopped]);
    onProgress({ doneBytes: 9, totalBytes: 9 });
    return { bytes: 9 };
  }

  check(name: string) {
    if (name !== MODEL) throw new CaravanError("model_not_found", "nothing of that name");
  }

  async remove(name: string) {
    this.removed.push(name);
    return 123;
  }
}

function setup() {
  const library = new Library();
  const models = scriptedModels(sayScript("x"));
  const settings = { apiKeys: ["user"], adminKeys: ["admin"] };
  const app = createApp({ models, library, settings });
  const post = (path: string, model: string, key = "admin") =>
    app.request(path, {
      method: "POST",
      headers: { authorization: `Bearer ${key}` },
      body: JSON.stringify({ model }),
    });
  return { library, models, post };
}

describe("a pull", () => {
  test("streams how far it is and ends with success", async () => {
    const { post } = setup();
    const reply = await post("/models/pull", "org/x");
    expect(reply.headers.get("content-type")).toBe("application/x-ndjson");
    const lines = (await reply.text())
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line));
    expect(lines[0]).toMatchObject({ status: "pulling", total_bytes: 9 });
    expect(lines.at(-1)).toEqual({ status: "success", total_bytes: 9 });
  });

  test("that fails at once has the failure's status; later it is the last line", async () => {
    const { library, post } = setup();
    library.fail = new CaravanError("model_not_found", "no such repository");
    expect((await post("/models/pull", "org/x")).status).toBe(404);
    library.fail = undefined;
    library.hold = Promise.resolve().then(() => {
      throw new CaravanError("download_failed", "the hub is gone");
    });
    library.hold.catch(() => undefined);
    const text = await (await post("/models/pull", "org/x")).text();
    expect(JSON.parse(text.trim().split("\n").at(-1) ?? "")).toMatchObject({
      status: "failed",
      error: { code: "download_failed" },
    });
  });

  test("stops when the client leaves", async () => {
    const { library, post } = setup();
    library.hold = new Promise(() => undefined);
    const reply = await post("/models/pull", "org/x");
    await reply.body?.cancel();
    await until(() => library.signal?.aborted === true, "the download is stopped");
  });
});

test("a delete unloads the model first and says what came free", async () => {
  const { library, models, post } = setup();
  const reply = await post("/models/delete", MODEL);
  expect(await reply.json()).toEqual({ model: MODEL, deleted: true, freed_bytes: 123 });
  expect(models.info.state).toBe("available");
  expect(library.removed).toEqual([MODEL]);
});

test("a delete that finds no files leaves what is loaded alone", async () => {
  const { library, models, post } = setup();
  library.check = () => {
    throw new CaravanError("model_not_found", "a folder elsewhere");
  };
  const before = models.info.state;
  expect(before).not.toBe("available");
  expect((await post("/models/delete", MODEL)).status).toBe(404);
  expect(models.info.state).toBe(before);
});

test("both take a key of administration", async () => {
  const { library, post } = setup();
  for (const path of ["/models/pull", "/models/delete"])
    expect((await post(path, MODEL, "user")).status).toBe(403);
  expect(library.signal).toBeUndefined();
  expect(library.removed).toEqual([]);
});
