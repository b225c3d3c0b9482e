// The models of a node: loaded once however many ask, one at a time, unloaded when another needs their memory, and
// given up when the node stops. The models are scripted; only the files that name them are real.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { EngineStatus } from "../../src/engine/protocol.ts";
import { CaravanError } from "../../src/errors.ts";
import { createLogger } from "../../src/log.ts";
import { type InstalledModel, openStore } from "../../src/model/store.ts";
import { folderAlias } from "../../src/node/folder-alias.ts";
import { LoadedModels, type LoadedModelsOptions } from "../../src/node/loaded-models.ts";
import type { OpenModel, OpenOptions } from "../../src/node/open-model.ts";
import { sayScript, scriptedModels } from "../tools/scripted-models.ts";
import { safetensors } from "../tools/tiny-model.ts";
import { until } from "../tools/until.ts";

let root = "";
const log = createLogger({ level: "silent" });

beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), "caravan-loaded-"));
  for (const name of ["a", "b", "c"]) makeModel(join(root, "models", name));
});
afterEach(() => rmSync(root, { recursive: true }));

function makeModel(path: string): string {
  mkdirSync(path, { recursive: true });
  writeFileSync(join(path, "config.json"), "{}");
  writeFileSync(join(path, "tokenizer.json"), "{}");
  writeFileSync(join(path, "model.safetensors"), safetensors(64));
  return path;
}

/** A machine with room for `room` models. */
class Machine {
  readonly opened: string[] = [];
  readonly closed: string[] = [];
  readonly status = new Map<string, Partial<EngineStatus>>();
  restarts = 0;
  loading = 0;
  mostLoading = 0;
  hold: Promise<unknown> = Promise.resolve();
  fail: CaravanError | undefined;

  constructor(readonly room: number) {}

  readonly open = async (model: InstalledModel, { onProgress, signal }: OpenOptions): Promise<OpenModel> => {
    this.loading++;
    this.mostLoading = Math.max(this.mostLoading, this.loading);
    try {
      onProgress?.(0.42, "half-way");
      const stopped = new Promise<never>((_, reject) =>
        signal?.addEventListener("abort", () => reject(signal.reason)),
      );
      await Promise.race([this.hold, stopped]);
      if (this.fail !== undefined) throw this.fail;
      if (this.opened.length - this.closed.length >= this.room) {
        throw new CaravanError("out_of_memory", "the model does not fit");
      }
      this.opened.push(model.name);
      return this.#model(model.name);
    } finally {
      this.loading--;
    }
  };

  #model(name: string): OpenModel {
    const scripted = scriptedModels(sayScript("x")).model;
    const engine = Object.create(scripted.engine) as OpenModel["engine"];
    engine.status = () => ({
      model: name,
      state: "ready",
      progress: 1,
      running: 0,
      waiting: 0,
      ...this.status.get(name),
    });
    engine.ready = async () => {
      this.restarts++;
      this.status.delete(name);
    };
    const close = async () => {
      this.closed.push(name);
    };
    return { ...scripted, id: name, engine, endRequests: () => {}, close };
  }
}

function modelsOn(
  machine: Machine,
  loadWaitMs = 5000,
  more: Partial<LoadedModelsOptions> = {},
): LoadedModels {
  const store = () => openStore(join(root, "models"), { HOME: root });
  return new LoadedModels({ store, run: {}, log, open: machine.open, loadWaitMs, ...more });
}

function thrown(promise: Promise<unknown>): Promise<CaravanError> {
  return promise.then(
    () => {
      throw new Error("it was not refused");
    },
    (error) => error,
  );
}

describe("finding a model", () => {
  test("loads it once for all who ask at the same time", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    const [one, two] = await Promise.all([models.find("a"), models.find("a")]);
    expect(one).toBe(two);
    expect(await models.find("a")).toBe(one);
    expect(machine.opened).toEqual(["a"]);
  });

  test("loads different ones one after the other, so that each plans with the memory that is left", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    await Promise.all([models.find("a"), models.find("b"), models.find("c")]);
    expect(machine.mostLoading).toBe(1);
    expect(machine.opened.toSorted()).toEqual(["a", "b", "c"]);
  });

  test("that is not here is model_not_found", async () => {
    expect((await thrown(modelsOn(new Machine(9)).find("org/x"))).code).toBe("model_not_found");
  });

  test("that is loading for long says model_loading with how far it is, and loading goes on", async () => {
    const machine = new Machine(9);
    const held = Promise.withResolvers<void>();
    machine.hold = held.promise;
    const models = modelsOn(machine, 20);
    const error = await thrown(models.find("a"));
    expect(error).toMatchObject({ code: "model_loading", retryAfterSeconds: 5 });
    expect(error.message).toContain("42 %");
    expect(models.list().find(({ id }) => id === "a")).toMatchObject({ state: "loading", progress: 0.42 });
    held.resolve();
    await until(() => models.list().some(({ state }) => state === "ready"), "it is loaded");
    expect((await models.find("a")).id).toBe("a");
    expect(machine.opened).toEqual(["a"]);
  });

  test("is given up at once by a client that leaves", async () => {
    const machine = new Machine(9);
    machine.hold = new Promise(() => undefined);
    const leave = new AbortController();
    const waiting = thrown(modelsOn(machine, 60_000).find("a", { signal: leave.signal }));
    leave.abort(new CaravanError("cancelled", "gone"));
    expect(await waiting).toMatchObject({ code: "cancelled", message: "gone" });
  });

  test("that fails to load tells everybody why, shows it, and is tried again by the next request", async () => {
    const machine = new Machine(9);
    machine.fail = new CaravanError("bad_file", "is truncated", { where: "/x" });
    const models = modelsOn(machine);
    const errors = await Promise.all([thrown(models.find("a")), thrown(models.find("a"))]);
    for (const error of errors) expect(error).toBe(machine.fail);
    expect(models.list().find(({ id }) => id === "a")).toMatchObject({
      state: "failed",
      error: "is truncated",
    });
    machine.fail = undefined;
    expect((await models.find("a")).id).toBe("a");
    expect(models.list().find(({ id }) => id === "a")).toMatchObject({ state: "ready" });
  });

  test("whose runner crashed starts it again", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    await models.find("a");
    machine.status.set("a", { state: "failed" });
    expect(models.list().find(({ id }) => id === "a")?.state).toBe("available");
    await models.find("a");
    expect(machine.restarts).toBe(1);
    expect(machine.opened).toEqual(["a"]);
  });

  test("of a folder works by its name and by its alias, never by its path", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    const path = makeModel(join(root, "elsewhere"));
    const loaded = await models.load({ name: "elsewhere", path, source: "folder", bytes: 1, created: 1 });
    expect(await models.find("elsewhere")).toBe(loaded);
    expect(await models.find(folderAlias(path))).toBe(loaded);
    expect((await thrown(models.find(path))).code).toBe("model_not_found");
    expect(JSON.stringify(models.list())).not.toContain(root);
  });

  test("of a folder that was unloaded is still there, and loaded again", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    const path = makeModel(join(root, "elsewhere"));
    await models.load({ name: "elsewhere", path, source: "folder", bytes: 1, created: 1 });
    expect(await models.unload("elsewhere")).toBe(true);
    expect(models.list().find(({ id }) => id === "elsewhere")).toMatchObject({ state: "available" });
    expect(await models.unload("elsewhere")).toBe(false);
    expect((await models.find(folderAlias(path))).id).toBe("elsewhere");
    expect(machine.opened).toEqual(["elsewhere", "elsewhere"]);
  });
});

describe("when memory is short", () => {
  test("the idle model that was used longest ago is unloaded", async () => {
    const machine = new Machine(2);
    const models = modelsOn(machine);
    await models.find("a");
    await models.find("b");
    await models.find("a");
    await models.find("c");
    expect(machine.closed).toEqual(["b"]);
    expect(models.list().map(({ id, state }) => `${id} ${state}`)).toEqual([
      "a ready",
      "b available",
      "c ready",
    ]);
  });

  test("a busy model stays, and the request hears that memory is short", async () => {
    const machine = new Machine(1);
    const models = modelsOn(machine);
    await models.find("a");
    machine.status.set("a", { running: 1 });
    expect((await thrown(models.find("b"))).code).toBe("out_of_memory");
    expect(machine.closed).toEqual([]);
    expect((await models.find("a")).id).toBe("a");
  });

  test("a model that fits on no machine unloads the others once and then fails", async () => {
    const machine = new Machine(0);
    expect((await thrown(modelsOn(machine).find("a"))).code).toBe("out_of_memory");
  });
});

describe("unloading by hand", () => {
  test("closes a model once its requests are over; the next request loads it again", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    await models.find("a");
    machine.status.set("a", { running: 1 });
    const unloading = models.unload("a");
    await until(() => models.list().find(({ id }) => id === "a")?.state === "available", "it is given up");
    expect(machine.closed).toEqual([]);
    machine.status.delete("a");
    expect(await unloading).toBe(true);
    expect(machine.closed).toEqual(["a"]);
    expect((await models.find("a")).id).toBe("a");
    expect(machine.opened).toEqual(["a", "a"]);
  });

  test("of a model that is not loaded does nothing, and of an unknown name is model_not_found", async () => {
    const models = modelsOn(new Machine(9));
    expect(await models.unload("b")).toBe(false);
    expect((await thrown(models.unload("org/x"))).code).toBe("model_not_found");
  });
});

describe("a keep-alive time", () => {
  test("unloads what nobody uses, and nothing that is busy", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine, 5000, { keepAliveMs: 10 });
    await models.find("a");
    await models.find("b");
    machine.status.set("b", { running: 1 });
    await until(() => machine.closed.length > 0, "one is unloaded");
    expect(machine.closed).toEqual(["a"]);
    machine.status.delete("b");
    await until(() => machine.closed.length > 1, "the other is idle and unloaded");
    await models.close();
  });
});

test("tensors that nothing uses are told in the log when the model is ready", async () => {
  const machine = new Machine(9);
  machine.status.set("a", { unused_tensors: { count: 7, first: ["model.surprise.weight"] } });
  let lines = "";
  const models = modelsOn(machine, 5000, {
    log: createLogger({
      write: (line) => {
        lines += line;
      },
    }),
  });
  await models.find("a");
  await models.find("b");
  await until(() => lines.match(/model ready/g)?.length === 2, "both are ready");
  expect(lines.match(/does not use/g)).toHaveLength(1);
  expect(lines).toContain("model.surprise.weight");
  expect(lines).toContain("count=7");
});

describe("closing", () => {
  test("closes what is loaded, gives up what is loading, and loads nothing more", async () => {
    const machine = new Machine(9);
    const models = modelsOn(machine);
    await models.find("a");
    machine.hold = new Promise(() => undefined);
    const waiting = thrown(models.find("b"));
    await until(() => machine.loading === 1, "b is loading");
    await models.close();
    expect((await waiting).code).toBe("shutting_down");
    expect(machine.closed).toEqual(["a"]);
    expect((await thrown(models.find("c"))).code).toBe("shutting_down");
  });
});
