// The models that this node has loaded, by name: loads one when a request names it, hands out the same one to
// everybody, starts its runner again after a crash, and unloads idle ones when another needs their memory.

import type { FindOptions, LoadedModel, ModelDirectory, ModelInfo } from "../api/model-directory.ts";
import type { EngineStatus } from "../engine/protocol.ts";
import { asCaravanError, CaravanError } from "../errors.ts";
import type { Logger } from "../log.ts";
import { type InstalledModel, listModels, type ModelStore, resolveModel } from "../model/store.ts";
import { folderAlias } from "./folder-alias.ts";
import { type OpenModel, type OpenOptions, openModel, type RunOptions } from "./open-model.ts";

/** How long a request waits for its model to load before it is told to come back. */
const LOAD_WAIT_MS = 30_000;
const RETRY_AFTER_SECONDS = 5;

/** A model that a request got less than this ago is not idle: the request may not have reached its engine yet. */
const GRACE_MS = 1000;
/** Between two looks at how long models have been idle. */
const MOST_KEEP_ALIVE_PAUSE_MS = 5000;
/** Running requests of a model that is being unloaded get so long. */
const UNLOAD_LIMIT_MS = 60_000;
const UNLOAD_POLL_MS = 20;

export interface LoadedModelsOptions {
  store: () => ModelStore;
  run: RunOptions;
  log: Logger;
  /** Replaced in tests. */
  open?: (model: InstalledModel, options: OpenOptions) => Promise<OpenModel>;
  loadWaitMs?: number;
  /** A model that nobody has used for so long is unloaded; absent = none is. */
  keepAliveMs?: number;
}

interface Entry {
  readonly model: InstalledModel;
  /** Other names that requests may use. */
  readonly aliases: readonly string[];
  readonly opening: Promise<OpenModel>;
  open: OpenModel | undefined;
  progress: number;
  lastUsed: number;
}

export class LoadedModels implements ModelDirectory {
  /** By folder. */
  readonly #entries = new Map<string, Entry>();
  /** Folders of the command line, by path: they are loaded again like others, though no list of models has them. */
  readonly #named = new Map<string, InstalledModel>();
  /** Last load error of a folder's model, until it is tried again. */
  readonly #failed = new Map<string, string>();
  readonly #options: LoadedModelsOptions;
  readonly #stop = new AbortController();
  /** One model loads at a time: each plans with the memory that the others left. */
  #turn: Promise<unknown> = Promise.resolve();

  readonly #keepAlive: ReturnType<typeof setInterval> | undefined;

  constructor(options: LoadedModelsOptions) {
    this.#options = options;
    const { keepAliveMs } = options;
    if (keepAliveMs === undefined) return;
    const pause = Math.min(MOST_KEEP_ALIVE_PAUSE_MS, keepAliveMs / 4);
    this.#keepAlive = setInterval(() => this.#unloadUnused(keepAliveMs), pause);
  }

  list(): ModelInfo[] {
    const infos = new Map<string, ModelInfo>();
    for (const model of listModels(this.#options.store())) infos.set(model.name, this.#describe(model));
    for (const model of this.#named.values()) infos.set(model.name, this.#describe(model));
    for (const { model } of this.#entries.values()) infos.set(model.name, this.#describe(model));
    return [...infos.values()];
  }

  statuses(): EngineStatus[] {
    return [...this.#entries.values()].flatMap(({ open }) =>
      open === undefined ? [] : [{ ...open.engine.status(), model: open.id }],
    );
  }

  #describe(model: InstalledModel): ModelInfo {
    const entry = this.#entries.get(model.path);
    const failure = this.#failed.get(model.path);
    const status = entry?.open?.engine.status();
    const { state, progress } = stateOf(entry, failure);
    const aliases = aliasesOf(model);
    return {
      id: model.name,
      ...(aliases.length === 0 ? {} : { aliases }),
      created: model.created,
      ownedBy: model.hubId?.split("/")[0] ?? "local",
      state,
      ...(status?.context === undefined ? {} : { contextLength: status.context }),
      ...(status?.policy === undefined ? {} : { policy: status.policy }),
      ...(progress === undefined ? {} : { progress }),
      ...(failure === undefined ? {} : { error: failure }),
    };
  }

  async find(name: string, options: FindOptions = {}): Promise<LoadedModel> {
    const entry = this.#known(name) ?? this.#open(this.#resolve(name));
    entry.lastUsed = performance.now();
    return await this.#whenReady(entry, options.signal);
  }

  /** Loads a model of the command line (any folder) and waits for as long as it takes. */
  async load(model: InstalledModel): Promise<LoadedModel> {
    if (model.source === "folder") this.#named.set(model.path, model);
    return await this.#open(model).opening;
  }

  /** Throws model_not_found. */
  #resolve(name: string): InstalledModel {
    const named = [...this.#named.values()].find(
      (model) => model.name === name || aliasesOf(model).includes(name),
    );
    return named ?? resolveModel(this.#options.store(), name);
  }

  #open(model: InstalledModel): Entry {
    if (this.#stop.signal.aborted) throw shuttingDown();
    const known = this.#entries.get(model.path);
    if (known !== undefined) return known;
    const { log } = this.#options;
    this.#failed.delete(model.path);
    log.info("loading model", { model: model.name, path: model.path });
    const started = performance.now();
    const entry: Entry = {
      model,
      aliases: aliasesOf(model),
      opening: this.#inTurn(() =>
        this.#openOrMakeRoom(model, (fraction) => {
          entry.progress = fraction;
        }),
      ),
      open: undefined,
      progress: 0,
      lastUsed: started,
    };
    this.#entries.set(model.path, entry);
    entry.opening.then(
      (open) => {
        entry.open = open;
        logReady(log, model, open, performance.now() - started);
      },
      (thrown) => {
        this.#entries.delete(model.path);
        if (this.#stop.signal.aborted) return;
        const error = asCaravanError(thrown);
        this.#failed.set(model.path, error.message);
        log.error("model failed to load", { model: model.name, ...error.toJSON() });
      },
    );
    return entry;
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(work);
    this.#turn = result.catch(() => undefined);
    return result;
  }

  async #openOrMakeRoom(model: InstalledModel, onProgress: (fraction: number) => void): Promise<OpenModel> {
    const { open = openModel, run } = this.#options;
    for (;;) {
      try {
        this.#stop.signal.throwIfAborted();
        return await open(model, { ...run, onProgress, signal: this.#stop.signal });
      } catch (thrown) {
        const error = asCaravanError(thrown);
        if (error.code !== "out_of_memory" || !(await this.#unloadOneIdle())) throw error;
      }
    }
  }

  /** Unloads the idle model that was used longest ago; false when there is none. */
  async #unloadOneIdle(): Promise<boolean> {
    for (;;) {
      const idle = [...this.#entries.values()].filter(isIdle).sort((a, b) => a.lastUsed - b.lastUsed)[0];
      if (idle?.open === undefined) return false;
      const rest = idle.lastUsed + GRACE_MS - performance.now();
      if (rest > 0) {
        await Bun.sleep(rest);
        continue; // it may be busy by now
      }
      this.#options.log.info("unloading model to make room", { model: idle.model.name });
      this.#entries.delete(idle.model.path);
      await idle.open.close();
      return true;
    }
  }

  /**
   * Takes the model out of memory: the next request loads it again. Requests that run may finish, up to a limit.
   * False when it was not loaded. Throws model_not_found for a name that means nothing here.
   */
  async unload(name: string): Promise<boolean> {
    const entry = this.#known(name);
    if (entry === undefined) {
      this.#resolve(name);
      return false;
    }
    const open = await entry.opening;
    const deadline = performance.now() + UNLOAD_LIMIT_MS;
    if (this.#entries.get(entry.model.path) !== entry) return false;
    this.#entries.delete(entry.model.path);
    this.#options.log.info("unloading model", { model: entry.model.name });
    // A request that has the model may not have reached its engine yet.
    await Bun.sleep(Math.max(0, entry.lastUsed + GRACE_MS - performance.now()));
    while (!isIdle({ open }) && performance.now() < deadline) await Bun.sleep(UNLOAD_POLL_MS);
    await open.close();
    return true;
  }

  #known(name: string): Entry | undefined {
    return [...this.#entries.values()].find(
      (entry) => entry.model.name === name || entry.aliases.includes(name),
    );
  }

  #unloadUnused(keepAliveMs: number): void {
    const now = performance.now();
    for (const entry of [...this.#entries.values()]) {
      if (!isIdle(entry)) entry.lastUsed = now;
      else if (now - entry.lastUsed >= Math.max(keepAliveMs, GRACE_MS)) {
        const seconds = Math.round((now - entry.lastUsed) / 1000);
        this.#options.log.info("unloading model that nobody uses", { model: entry.model.name, seconds });
        this.#entries.delete(entry.model.path);
        void entry.open?.close();
      }
    }
  }

  /** The entry's model with a runner that runs: loaded, or started again after a crash. */
  async #whenReady(entry: Entry, signal: AbortSignal | undefined): Promise<OpenModel> {
    const { open } = entry;
    if (open?.engine.status().state === "ready") return open;
    const ready = open === undefined ? entry.opening : this.#startAgain(entry.model, open);
    const late = Promise.withResolvers<never>();
    const timer = setTimeout(() => {
      const percent = Math.floor((stateOf(entry, undefined).progress ?? 0) * 100);
      late.reject(
        new CaravanError("model_loading", `${entry.model.name} is loading: ${percent} % done.`, {
          hint: "Send the request again in a few seconds.",
          retryAfterSeconds: RETRY_AFTER_SECONDS,
        }),
      );
    }, this.#options.loadWaitMs ?? LOAD_WAIT_MS);
    const leave = () => late.reject(signal?.reason);
    signal?.addEventListener("abort", leave, { once: true });
    if (signal?.aborted) leave();
    try {
      return await Promise.race([ready, late.promise]);
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", leave);
    }
  }

  async #startAgain(model: InstalledModel, open: OpenModel): Promise<OpenModel> {
    const { state, error } = open.engine.status();
    if (state === "failed") {
      this.#options.log.warn("starting the model's runner again", {
        model: model.name,
        after: error?.message,
      });
    }
    await open.engine.ready();
    return open;
  }

  /** Closes every model, those that are loading too. */
  async close(): Promise<void> {
    clearInterval(this.#keepAlive);
    this.#stop.abort(shuttingDown());
    const entries = [...this.#entries.values()];
    this.#entries.clear();
    await Promise.allSettled(entries.map(async ({ opening }) => (await opening).close()));
  }
}

function shuttingDown(): CaravanError {
  return new CaravanError("shutting_down", "This node is shutting down.", {
    retryAfterSeconds: RETRY_AFTER_SECONDS,
  });
}

/** Names besides its own. */
function aliasesOf(model: InstalledModel): string[] {
  if (model.source === "folder") return [folderAlias(model.path)];
  return model.hubId === undefined || model.hubId === model.name ? [] : [model.hubId];
}

function stateOf(
  entry: Entry | undefined,
  failure: string | undefined,
): { state: ModelInfo["state"]; progress?: number } {
  if (entry === undefined) return { state: failure === undefined ? "available" : "failed" };
  if (entry.open === undefined) return { state: "loading", progress: entry.progress };
  const { state, progress } = entry.open.engine.status();
  if (state === "ready") return { state };
  // A runner that crashed is started by the next request.
  return state === "loading" ? { state, progress } : { state: "available" };
}

function isIdle({ open }: Pick<Entry, "open">): boolean {
  if (open === undefined) return false;
  const { running, waiting, state } = open.engine.status();
  return running === 0 && waiting === 0 && state !== "loading";
}

function logReady(log: Logger, model: InstalledModel, open: OpenModel, ms: number): void {
  const {
    context,
    policy,
    device,
    device_reason,
    cpu,
    threads,
    ranks,
    unused_tensors: unused,
  } = open.engine.status();
  log.info("model ready", {
    model: model.name,
    seconds: Number((ms / 1000).toFixed(2)),
    context,
    device,
    device_reason,
    cpu,
    threads,
    ...(ranks === undefined ? {} : { ranks: `${ranks.tensor} × ${ranks.pipeline} over ${ranks.transport}` }),
    ...(ranks === undefined || ranks.note === "" ? {} : { transport_note: ranks.note }),
    scheduling: policy?.mode,
    reason: policy?.reason,
  });
  if (unused === undefined) return;
  log.warn(
    "the checkpoint has tensors that caravan does not use: the model may not be what its config says",
    {
      model: model.name,
      count: unused.count,
      first: unused.first,
    },
  );
}
