// The models on this machine: finds the folder that a name means, lists what is here, removes what is not wanted.
// A name is an imported model, a card's short name, a hub repository (org/name, org/name@revision), or, where the
// caller allows it, a folder. Only whole models are ever handed out.

import { lstatSync, readdirSync, rmSync, statSync, unlinkSync } from "node:fs";
import { homedir } from "node:os";
import { join, resolve } from "node:path";
import { CaravanError } from "../errors.ts";
import { resolvePaths } from "../paths.ts";
import { type Card, type CardSet, loadCards, SHORT_NAME } from "./card.ts";
import {
  cachedCommit,
  cachedIds,
  cachedSnapshots,
  hubName,
  PART_SUFFIX,
  repoFolder,
  snapshotFolder,
} from "./hub-cache.ts";
import { type FolderState, type InspectOptions, inspectFolder } from "./model-folder.ts";

export interface ModelStore {
  /** Hub cache, shared with other tools. */
  hub: string;
  /** Imported models, a folder each. */
  models: string;
  cards: CardSet;
}

export type ModelSource = "imported" | "hub" | "folder";

export interface InstalledModel {
  /** What people call it: the imported model's name, the card's short name, else the hub id, else the folder. */
  name: string;
  /** Folder with config.json, tokenizer.json and the weights. */
  path: string;
  source: ModelSource;
  /** Of all its files. */
  bytes: number;
  /** Seconds since 1970 at which the folder last changed. */
  created: number;
  hubId?: string;
  commit?: string;
  card?: Card;
}

/** Something that began to be a model and is not one yet. */
export interface PartialModel {
  name: string;
  path: string;
  source: "imported" | "hub";
  bytes: number;
  missing: string[];
  /** The command that completes it. */
  hint: string;
}

export interface ResolveOptions extends InspectOptions {
  /** The name may be a folder. For the command line only: a name that came over the network must not open any folder
   * of the machine. */
  allowFolder?: boolean;
}

/** The store of this machine. `models` is the setting models_dir. */
export function openStore(models?: string, env = process.env): ModelStore {
  const paths = resolvePaths(env);
  return { hub: paths.hub, models: models ?? paths.models, cards: loadCards(paths.cards) };
}

/** The folder that `name` means. Throws model_not_found whose hint is the command that brings the model here. */
export function resolveModel(store: ModelStore, name: string, options: ResolveOptions = {}): InstalledModel {
  if (options.allowFolder === true && looksLikeFolder(name)) return folderModel(store, name, options);
  const card = store.cards.find(name);
  const incomplete: { path: string; state: FolderState }[] = [];

  // Who writes a repository's whole name means its files, not an import under the card's name.
  for (const short of name.includes("/") ? [] : new Set([name, ...(card === undefined ? [] : [card.name])])) {
    if (!SHORT_NAME.test(short)) continue;
    const path = join(store.models, short);
    const state = inspectFolder(path, options);
    if (state.missing.length === 0) return imported(short, path, state, card);
    if (isFolder(path)) incomplete.push({ path, state });
  }

  const { id, revision } = hubName(card?.model_id ?? name);
  if (id !== undefined) {
    const found = hubModel(store, id, revision, options);
    if ("model" in found) return found.model;
    if (found.partial !== undefined) incomplete.push(found.partial);
  }
  throw notFound(name, store, card, id, incomplete[0]);
}

function looksLikeFolder(name: string): boolean {
  if (/^(?:\.{1,2}|~)?\//.test(name) || name === "." || name === "..") return true;
  return name.includes("/") && isFile(join(name, "config.json"));
}

function folderModel(store: ModelStore, name: string, options: InspectOptions): InstalledModel {
  const path = resolve(name.startsWith("~/") ? join(homedir(), name.slice(2)) : name);
  const state = inspectFolder(path, options);
  if (state.missing.length > 0) {
    throw new CaravanError(
      "model_not_found",
      `this is not a whole model: missing ${state.missing.join(", ")}`,
      {
        where: path,
        hint: isFile(path)
          ? path.endsWith(".gguf")
            ? `caravan import ${path}`
            : "name the folder that holds config.json, not a file in it"
          : "a model's folder holds config.json, tokenizer.json and model.safetensors (or its shards and their index)",
      },
    );
  }
  const known = listModels(store).find((model) => resolve(model.path) === path);
  return known ?? { name: path, path, source: "folder", bytes: state.bytes, created: changed(path) };
}

function imported(name: string, path: string, state: FolderState, card: Card | undefined): InstalledModel {
  return {
    name,
    path,
    source: "imported",
    bytes: state.bytes,
    created: changed(path),
    ...(card === undefined ? {} : { card }),
  };
}

type HubResult = { model: InstalledModel } | { partial: { path: string; state: FolderState } | undefined };

/**
 * The snapshot of a hub repository: that of the revision asked for; without one, what refs/main names, or the newest
 * whole snapshot (other tools move refs/main before they download).
 */
function hubModel(
  store: ModelStore,
  id: string,
  revision: string | undefined,
  options: InspectOptions,
): HubResult {
  const repo = repoFolder(store.hub, id);
  const named = cachedCommit(repo, revision ?? "main");
  const commits = new Set([
    ...(named === undefined ? [] : [named]),
    ...(revision === undefined ? cachedSnapshots(repo) : []),
  ]);
  let partial: { path: string; state: FolderState } | undefined;
  for (const commit of commits) {
    const path = snapshotFolder(repo, commit);
    const state = inspectFolder(path, options);
    if (state.missing.length > 0) {
      if (isFolder(path)) partial ??= { path, state };
      continue;
    }
    const card = store.cards.cards.find((each) => each.model_id === id);
    const name = revision === undefined ? (card?.name ?? id) : `${id}@${revision}`;
    const common = { name, path, source: "hub" as const, bytes: state.bytes, created: changed(path) };
    return { model: { ...common, hubId: id, commit, ...(card === undefined ? {} : { card }) } };
  }
  return { partial };
}

function notFound(
  name: string,
  store: ModelStore,
  card: Card | undefined,
  id: string | undefined,
  partial: { path: string; state: FolderState } | undefined,
): CaravanError {
  const shown = name.length > 200 ? `${name.slice(0, 200)}…` : name;
  const pull =
    card !== undefined ? `caravan pull ${card.name}` : id !== undefined ? `caravan pull ${name}` : undefined;
  if (partial !== undefined) {
    const what = partial.state.missing.slice(0, 3).join(", ");
    return new CaravanError("model_not_found", `model ${shown} is not whole: missing ${what}`, {
      where: partial.path,
      hint: pull ?? `caravan import FILE.gguf --name ${shown}`,
    });
  }
  if (pull !== undefined) {
    return new CaravanError("model_not_found", `model ${shown} is not on this machine`, { hint: pull });
  }
  const near = closest(shown, store);
  return new CaravanError("model_not_found", `there is no model ${JSON.stringify(shown)}`, {
    hint:
      near === undefined
        ? "caravan models lists what is here; caravan pull org/name fetches a model of the hub; caravan import FILE.gguf takes a file"
        : `did you mean ${near}? caravan models lists what is here; caravan pull ${near} fetches it`,
  });
}

/** A card whose name has a part in common with what was asked for. */
function closest(name: string, store: ModelStore): string | undefined {
  const wanted = name.toLowerCase().replace(/[^a-z0-9]/g, "");
  if (wanted.length < 4) return undefined;
  return store.cards.cards.find((card) => {
    const have = card.name.replace(/[^a-z0-9]/g, "");
    return have.startsWith(wanted) || wanted.startsWith(have);
  })?.name;
}

/** Every whole model, imported ones first, then by name. An imported model hides the pulled one of its name. */
export function listModels(store: ModelStore): InstalledModel[] {
  return scanStore(store).models;
}

/** All that is here: whole models, and what is not one (yet). Repositories of other kinds (no config.json and nothing of
 * ours under way) are left out of both. */
export function scanStore(store: ModelStore): { models: InstalledModel[]; partial: PartialModel[] } {
  const models = new Map<string, InstalledModel>();
  const partial: PartialModel[] = [];
  for (const name of folderNames(store.models)) {
    if (!SHORT_NAME.test(name)) continue;
    const path = join(store.models, name);
    const state = inspectFolder(path);
    const card = store.cards.cards.find((each) => each.name === name);
    if (state.missing.length === 0) models.set(name, imported(name, path, state, card));
    else {
      const hint = `caravan import FILE.gguf --name ${name}`;
      partial.push({ name, path, source: "imported", bytes: state.bytes, missing: state.missing, hint });
    }
  }
  for (const id of cachedIds(store.hub)) {
    const found = hubModel(store, id, undefined, {});
    if ("model" in found) {
      const { model } = found;
      const name = models.has(model.name) ? id : model.name;
      models.set(name, { ...model, name });
      continue;
    }
    const repo = repoFolder(store.hub, id);
    const parts = partFiles(repo);
    const started = parts.reduce((sum, path) => sum + diskBytes(path), 0);
    const state = found.partial?.state;
    const ours =
      parts.length > 0 || (state !== undefined && isFile(join(found.partial?.path ?? "", "config.json")));
    if (!ours) continue;
    partial.push({
      name: id,
      path: repo,
      source: "hub",
      bytes: (state?.bytes ?? 0) + started,
      missing: state?.missing ?? ["files that are still to be downloaded"],
      hint: `caravan pull ${id}`,
    });
  }
  const order = (a: InstalledModel, b: InstalledModel): number =>
    a.source === b.source ? (a.name < b.name ? -1 : 1) : a.source === "imported" ? -1 : 1;
  return { models: [...models.values()].sort(order), partial };
}

/** Downloads that are under way. Their bytes on disk may still be 0: file systems allocate late. */
function partFiles(repo: string): string[] {
  const blobs = join(repo, "blobs");
  return folderNames(blobs)
    .filter((name) => name.endsWith(PART_SUFFIX))
    .map((name) => join(blobs, name));
}

export interface RemovedModel {
  path: string;
  /** Disk space that came free. */
  bytes: number;
}

/**
 * Deletes an imported model, or a hub repository with all its revisions and unfinished downloads, whole or not.
 * Throws model_not_found when there is nothing of that name. Folders elsewhere are never touched.
 */
export function removeModel(store: ModelStore, name: string): RemovedModel {
  const { path, locks } = removable(store, name);
  const removed = removeTree(path);
  if (locks !== undefined) rmSync(locks, { recursive: true, force: true });
  return removed;
}

/** What removeModel would delete. Throws as it does. */
export function removable(store: ModelStore, name: string): { path: string; locks?: string } {
  const card = store.cards.cards.find((each) => each.name === name || each.model_id === name);
  for (const short of new Set([name, ...(card === undefined ? [] : [card.name])])) {
    // A full hub id asks for the pulled files, not for an import under the card's name.
    if (!SHORT_NAME.test(short) || name.includes("/")) continue;
    const path = join(store.models, short);
    if (exists(path)) return { path };
  }
  const { id } = hubName(card?.model_id ?? name);
  if (id !== undefined) {
    const path = repoFolder(store.hub, id);
    if (exists(path)) return { path, locks: join(store.hub, ".locks", `models--${id.replace("/", "--")}`) };
  }
  throw new CaravanError("model_not_found", `there is no model ${JSON.stringify(name)} here to remove`, {
    hint: "caravan models lists what is here",
  });
}

function removeTree(path: string): RemovedModel {
  try {
    if (lstatSync(path).isSymbolicLink()) {
      unlinkSync(path); // the link is ours, what it points to is not
      return { path, bytes: 0 };
    }
    const bytes = treeBytes(path);
    rmSync(path, { recursive: true });
    return { path, bytes };
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError("permission_denied", `cannot remove the model: ${reason}`, { where: path, cause });
  }
}

/** Disk space of a tree, links not followed. */
function treeBytes(path: string): number {
  const stat = lstatSync(path);
  if (!stat.isDirectory()) return stat.blocks * 512;
  return readdirSync(path).reduce((sum, name) => sum + treeBytes(join(path, name)), 0);
}

function folderNames(folder: string): string[] {
  try {
    return readdirSync(folder)
      .filter((name) => !name.startsWith("."))
      .sort();
  } catch {
    return []; // not there or not readable: no models in it
  }
}

function diskBytes(path: string): number {
  try {
    return lstatSync(path).blocks * 512;
  } catch {
    return 0;
  }
}

function changed(path: string): number {
  return Math.floor(statSync(path).mtimeMs / 1000);
}

function exists(path: string): boolean {
  try {
    lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

function isFolder(path: string): boolean {
  try {
    return statSync(path).isDirectory();
  } catch {
    return false;
  }
}

function isFile(path: string): boolean {
  try {
    return statSync(path).isFile();
  } catch {
    return false;
  }
}
