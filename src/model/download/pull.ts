// `caravan pull`: brings a model of the hub into the hub's cache. Asks for the commit and its files, checks the disk,
// fetches what is missing over several connections, and makes the snapshot when every hash is right.

import { open, readdir, rm, statfs } from "node:fs/promises";
import { basename, join } from "node:path";
import { asCaravanError, CaravanError } from "../../errors.ts";
import { type Environment, makeFolder, resolvePaths } from "../../paths.ts";
import { type Card, loadCards } from "../card.ts";
import {
  blobFile,
  cachedCommit,
  checkHubId,
  checkRevision,
  hubName,
  repoFolder,
  snapshotFolder,
} from "../hub-cache.ts";
import { type HubLicence, type Licence, licenceOf } from "../licence.ts";
import { inspectFolder } from "../model-folder.ts";
import { isAligned, readSafetensorsHeader } from "../safetensors.ts";
import { FileDownload, type FileDownloadOptions } from "./file-download.ts";
import { fetchCommit, fetchTree, type HubApiOptions } from "./hub-api.ts";
import { checkEndpoint, checkToken, hubEnvironment } from "./hub-environment.ts";
import { hashFile, PartFile } from "./part-file.ts";
import { type PlannedFile, planDownload } from "./plan.ts";
import { ProgressMeter, type PullProgress } from "./progress.ts";
import { takeLock } from "./pull-lock.ts";
import { RETRY_LIMITS, type RetryLimits } from "./retry.ts";
import { blobIsWhole, writeSnapshot } from "./snapshot.ts";

export type { PullProgress } from "./progress.ts";

export interface PullOptions {
  /** Branch, tag or commit; default main. */
  revision?: string;
  onProgress?: (progress: PullProgress) => void;
  /** Hears of failures that are tried again, for the log. */
  onRetry?: (message: string) => void;
  /** Stops the download; what is there is kept. */
  signal?: AbortSignal;
  /** Default: HF_ENDPOINT, or huggingface.co. */
  endpoint?: string;
  /** Default: HF_TOKEN, or the token file. */
  token?: string;
  /** The hub cache; default as HF_HUB_CACHE and HF_HOME say. */
  hub?: string;
  /** Hashes files that are there already instead of trusting their size; damaged ones are fetched again. */
  verify?: boolean;
  env?: Environment;
  /** Connections at one time. */
  connections?: number;
  chunkBytes?: number;
  /** Time without a byte after which a connection counts as dead. */
  stallMs?: number;
  retry?: Partial<RetryLimits>;
}

export interface PullResult {
  /** Folder of the model. */
  path: string;
  id: string;
  commit: string;
  /** Of all files. */
  totalBytes: number;
  /** Of what came over the network this time. */
  downloadedBytes: number;
  /** Weight files with tensors that do not start on a multiple of their element's size. They are loaded into memory
   * instead of mapped; the shared cache is left as the hub has it. */
  misaligned: string[];
  /** As far as it is known. */
  licence?: Licence;
}

const CONNECTIONS = 4;
const CHUNK_BYTES = 32 * 1024 * 1024;
const STALL_MS = 30_000;
/** Kept free on the disk for maps, links and everybody else. */
const SPARE_BYTES = 1024 * 1024;

/**
 * Downloads a model, given as a card, a card's short name or a hub id. Throws CaravanError: model_not_found,
 * permission_denied, unsupported_model, disk_full, download_failed, cancelled, invalid_argument.
 */
export async function pullModel(model: string | Card, options: PullOptions = {}): Promise<PullResult> {
  const env = options.env ?? process.env;
  const { id, named } = hubIdOf(model, env);
  const revision = options.revision ?? named ?? "main";
  checkRevision(revision);
  const hub = options.hub ?? resolvePaths(env).hub;
  const around = hubEnvironment(env);
  const baseModel = loadCards(resolvePaths(env).cards).cards.find((card) => card.model_id === id)?.base_model;
  if (around.offline) return offlineResult(hub, id, revision, baseModel);

  const stop = new AbortController();
  const signal = options.signal === undefined ? stop.signal : AbortSignal.any([options.signal, stop.signal]);
  const api: HubApiOptions = {
    endpoint: options.endpoint === undefined ? around.endpoint : checkEndpoint(options.endpoint),
    token: options.token === undefined ? around.token : checkToken(options.token),
    stallMs: options.stallMs ?? STALL_MS,
    signal,
    retry: { ...RETRY_LIMITS, ...options.retry },
    ...(options.onRetry === undefined ? {} : { onRetry: options.onRetry }),
  };
  try {
    signal.throwIfAborted();
    const { licence, ...result } = await pull(hub, id, revision, api, stop, options);
    return { ...result, ...knownLicence(result.path, licence, baseModel) };
  } catch (error) {
    stop.abort();
    if (options.signal?.aborted === true) {
      throw new CaravanError("cancelled", "the download was stopped", {
        where: id,
        hint: "run the command again to go on; what was downloaded is kept",
        cause: error,
      });
    }
    throw asCaravanError(error);
  }
}

/** The repository that a card, its name or a hub id names. Throws model_not_found or unsupported_model. */
export function hubIdOf(model: string | Card, env: Environment): { id: string; named: string | undefined } {
  if (typeof model === "string") {
    const { id, revision } = hubName(model);
    if (id !== undefined) {
      checkHubId(id);
      return { id, named: revision };
    }
  }
  const card = typeof model === "string" ? loadCards(resolvePaths(env).cards).find(model) : model;
  if (card === undefined) {
    throw new CaravanError("model_not_found", `there is no card ${JSON.stringify(model)}`, {
      hint: "name a model of the hub as org/name, or one of caravan's cards (caravan models lists them)",
    });
  }
  if (!card.tasks.includes("TextGeneration")) {
    throw new CaravanError("unsupported_model", "the card is of a model that makes no text", {
      where: card.file,
    });
  }
  return { id: card.model_id, named: undefined };
}

async function offlineResult(
  hub: string,
  id: string,
  revision: string,
  baseModel: string | undefined,
): Promise<PullResult> {
  const commit = cachedCommit(repoFolder(hub, id), revision);
  const path = commit === undefined ? undefined : snapshotFolder(repoFolder(hub, id), commit);
  const state = path === undefined ? undefined : inspectFolder(path);
  if (commit !== undefined && path !== undefined && state?.missing.length === 0) {
    const misaligned = await misalignedFiles(path);
    const base = { path, id, commit, totalBytes: state.bytes, downloadedBytes: 0, misaligned };
    return { ...base, ...knownLicence(path, undefined, baseModel) };
  }
  throw new CaravanError("download_failed", "HF_HUB_OFFLINE is set and the model is not here", {
    where: id,
    hint: `unset HF_HUB_OFFLINE and run: caravan pull ${id}`,
  });
}

async function pull(
  hub: string,
  id: string,
  revision: string,
  api: HubApiOptions,
  stop: AbortController,
  options: PullOptions,
): Promise<Omit<PullResult, "licence"> & { licence: HubLicence }> {
  const { commit, licence } = await fetchCommit(id, revision, api);
  const files = planDownload(id, await fetchTree(id, commit, api));
  const repo = repoFolder(hub, id);
  makeFolder(join(repo, "blobs"), "download models");
  const lock = await takeLock(hub, basename(repo));
  try {
    const downloadedBytes = await fetchMissing(repo, id, commit, files, api, stop, options);
    const path = await writeSnapshot(repo, commit, revision, files);
    const totalBytes = files.reduce((sum, file) => sum + file.size, 0);
    const misaligned = await misalignedFiles(path);
    return { path, id, commit, totalBytes, downloadedBytes, misaligned, licence };
  } finally {
    await lock.release();
  }
}

function knownLicence(
  path: string,
  hub: HubLicence | undefined,
  baseModel: string | undefined,
): { licence?: Licence } {
  const licence = licenceOf(path, hub, baseModel);
  return licence === undefined ? {} : { licence };
}

/** Fetches what is not in blobs/ yet; returns the bytes received. */
async function fetchMissing(
  repo: string,
  id: string,
  commit: string,
  files: readonly PlannedFile[],
  api: HubApiOptions,
  stop: AbortController,
  options: PullOptions,
): Promise<number> {
  const missing: PlannedFile[] = [];
  const seen = new Set<string>();
  for (const file of files) {
    // Two paths with one content are one blob, fetched once.
    if (seen.has(file.hash)) continue;
    seen.add(file.hash);
    if (!(await isThere(repo, file, api.signal, options.verify === true))) missing.push(file);
  }
  const totalBytes = files.reduce((sum, file) => sum + file.size, 0);
  const started = new Map<PlannedFile, number>();
  for (const file of missing) {
    started.set(file, await PartFile.bytesThere(FileDownload.partPath(repo, file), file.size));
  }
  const needed = missing.reduce((sum, file) => sum + file.size - (started.get(file) ?? 0), 0);
  await checkSpace(repo, id, needed);

  const meter = new ProgressMeter(totalBytes, totalBytes - needed, options.onProgress ?? (() => undefined));
  for (const [file, bytes] of started) meter.had(file, bytes);
  const fileOptions: FileDownloadOptions = {
    ...api,
    chunkBytes: options.chunkBytes ?? CHUNK_BYTES,
    onBytes: (file, bytes) => meter.add(file, bytes),
  };
  const downloads = missing.map((file) => {
    const path = file.path.split("/").map(encodeURIComponent).join("/");
    const url = `${api.endpoint}/${id}/resolve/${commit}/${path}`;
    return new FileDownload(repo, commit, url, file, fileOptions);
  });
  await runAll(downloads, options.connections ?? CONNECTIONS, api.signal, stop);
  const last = files.at(-1);
  if (last !== undefined) meter.emit(last);
  return meter.received;
}

/** Runs the downloads over `connections` workers. The first failure stops the others; all have ended on return. */
async function runAll(
  downloads: readonly FileDownload[],
  connections: number,
  signal: AbortSignal,
  stop: AbortController,
): Promise<void> {
  let failure: { error: unknown } | undefined;
  const worker = async (): Promise<void> => {
    while (failure === undefined) {
      signal.throwIfAborted();
      let work: (() => Promise<void>) | undefined;
      for (const download of downloads) {
        work = download.take();
        if (work !== undefined) break;
      }
      if (work === undefined) return;
      await work();
    }
  };
  const guarded = async (): Promise<void> => {
    try {
      await worker();
    } catch (error) {
      failure ??= { error };
      stop.abort(error);
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, connections) }, guarded));
  const closed = await Promise.allSettled(downloads.map((download) => download.close()));
  if (failure !== undefined) throw failure.error;
  const broken = closed.find((result) => result.status === "rejected");
  if (broken !== undefined) throw broken.reason;
  const left = downloads.find((download) => !download.finished);
  if (left !== undefined) {
    throw new CaravanError("internal_error", "the download ended without this file", {
      where: left.file.path,
    });
  }
}

async function isThere(
  repo: string,
  file: PlannedFile,
  signal: AbortSignal,
  verify: boolean,
): Promise<boolean> {
  if (!(await blobIsWhole(repo, file))) return false;
  if (!verify) return true;
  const path = blobFile(repo, file.hash);
  const handle = await open(path, "r");
  let hash: string;
  try {
    hash = await hashFile(handle, file.size, file.kind, signal);
  } finally {
    await handle.close();
  }
  if (hash === file.hash) return true;
  await rm(path);
  return false;
}

async function checkSpace(repo: string, id: string, needed: number): Promise<void> {
  if (needed === 0) return;
  const { bavail, bsize } = await statfs(repo);
  const free = bavail * bsize;
  if (free >= needed + SPARE_BYTES) return;
  throw new CaravanError(
    "disk_full",
    `${id} needs ${gigabytes(needed)} more on this disk, which has ${gigabytes(free)}`,
    {
      where: repo,
      hint: "free some space (caravan models lists what is here), or set HF_HUB_CACHE to a folder on a larger disk",
    },
  );
}

function gigabytes(bytes: number): string {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Names of the weight files in `path` that hold a tensor which cannot be mapped where it lies. */
async function misalignedFiles(path: string): Promise<string[]> {
  const names: string[] = [];
  for (const name of (await readdir(path)).sort()) {
    if (!name.endsWith(".safetensors")) continue;
    const header = await readSafetensorsHeader(join(path, name));
    if (![...header.tensors.values()].every(isAligned)) names.push(name);
  }
  return names;
}
