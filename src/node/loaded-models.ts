// The models that this node has loaded, by name: loads one when a request names it, hands out the same one to
// everybody, and unloads idle ones when another needs their memory.

import type { LoadedModel, ModelDirectory, ModelInfo } from "../api/model-directory.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import type { Logger } from "../log.ts";
import { type InstalledModel, listModels, type ModelStore, resolveModel } from "../model/store.ts";
import { type OpenModel, openModel, type RunOptions } from "./open-model.ts";

/** How long a request waits for its model to load before it is told to come back. */
const LOAD_WAIT_MS = 30_000;
const RETRY_AFTER_SECONDS = 5;

interface Entry {
  readonly model: InstalledModel;
  readonly opening: Promise<OpenModel>;
  open: OpenModel | undefined;
  progress: number;
  lastUsed: number;
}

export class LoadedModels implements ModelDirectory {
  readonly #entries = new Map<string, Entry>();
  /** Last load error of a model, until it loads or is asked for again. */
  readonly #failed = new Map<string, string>();

  constructor(
    private readonly store: () => ModelStore,
    private readonly options: RunOptions,
    private readonly log: Logger,
  ) {}

  list(): ModelInfo[] {
    const infos = new Map<string, ModelInfo>();
    for (const model of listModels(this.store())) infos.set(model.name, this.#describe(model));
    for (const { model } of this.#entries.values()) infos.set(model.name, this.#describe(model));
    return [...infos.values()];
  }

  #describe(model: InstalledModel): ModelInfo {
    const entry = this.#entries.get(model.path);
    const failure = this.#failed.get(model.path);
    const status = entry?.open?.engine.status();
    return {
      id: model.name,
      ...(model.hubId === undefined ? {} : { aliases: [model.hubId] }),
      created: model.created,
      ownedBy: model.hubId?.split("/")[0] ?? "local",
      state:
        entry === undefined
          ? failure === undefined
            ? "available"
            : "failed"
          : entry.open === undefined
            ? "loading"
            : "ready",
      ...(status?.context === undefined ? {} : { contextLength: status.context }),
      ...(status?.policy === undefined ? {} : { policy: status.policy }),
      ...(entry !== undefined && entry.open === undefined ? { progress: entry.progress } : {}),
      ...(failure === undefined ? {} : { error: failure }),
    };
  }

  async find(name: string): Promise<LoadedModel> {
    const known = [...this.#entries.values()].find((entry) => entry.model.name === name);
    const entry = known ?? this.#open(resolveModel(this.store(), name));
    entry.lastUsed = performance.now();
    return await this.#whenOpen(entry);
  }

  /** Loads a model from a path of the command line (any folder). */
  async load(model: InstalledModel): Promise<LoadedModel> {
    return await this.#open(model).opening;
  }

  #open(model: InstalledModel): Entry {
    const known = this.#entries.get(model.path);
    if (known !== undefined) return known;
    this.#failed.delete(model.path);
    this.log.info("loading model", { model: model.name, path: model.path });
    const started = performance.now();
    const entry: Entry = {
      model,
      opening: this.#openOrMakeRoom(model, (fraction) => {
        entry.progress = fraction;
      }),
      open: undefined,
      progress: 0,
      lastUsed: started,
    };
    this.#entries.set(model.path, entry);
    entry.opening.then(
      (open) => {
        entry.open = open;
        const { context, policy, device, cpu, threads } = open.engine.status();
        const seconds = Number(((performance.now() - started) / 1000).toFixed(2));
        this.log.info("model ready", {
          model: model.name,
          seconds,
          context,
          device,
          cpu,
          threads,
          scheduling: policy?.mode,
          reason: policy?.reason,
        });
      },
      (thrown) => {
        this.#entries.delete(model.path);
        const error = asCaravanError(thrown);
        this.#failed.set(model.path, error.message);
        this.log.error("model failed to load", { model: model.name, ...error.toJSON() });
      },
    );
    return entry;
  }

  async #openOrMakeRoom(model: InstalledModel, onProgress: (fraction: number) => void): Promise<OpenModel> {
    for (;;) {
      try {
        return await openModel(model, this.options, onProgress);
      } catch (thrown) {
        const error = asCaravanError(thrown);
        if (error.code !== "out_of_memory" || !(await this.#unloadOneIdle())) throw error;
      }
    }
  }

  /** Unloads the idle model that was used longest ago. */
  async #unloadOneIdle(): Promise<boolean> {
    const idle = [...this.#entries.values()]
      .filter(({ open }) => {
        const status = open?.engine.status();
        return status !== undefined && status.running === 0 && status.waiting === 0;
      })
      .sort((a, b) => a.lastUsed - b.lastUsed)[0];
    if (idle?.open === undefined) return false;
    this.log.info("unloading model to make room", { model: idle.model.name });
    this.#entries.delete(idle.model.path);
    await idle.open.close();
    return true;
  }

  async #whenOpen(entry: Entry): Promise<OpenModel> {
    if (entry.open !== undefined) return entry.open;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => {
        const percent = Math.floor(entry.progress * 100);
        reject(
          new CaravanError("model_loading", `${entry.model.name} is loading (${percent} %).`, {
            hint: "Send the request again in a few seconds.",
            retryAfterSeconds: RETRY_AFTER_SECONDS,
          }),
        );
      }, LOAD_WAIT_MS);
    });
    try {
      return await Promise.race([entry.opening, late]);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Closes every model. */
  async close(): Promise<void> {
    const entries = [...this.#entries.values()];
    this.#entries.clear();
    await Promise.allSettled(entries.map(async ({ opening }) => (await opening).close()));
  }
}
