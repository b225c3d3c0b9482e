// What MODEL on the command line means: a card's name, a hub id, an imported model, or a folder.

import { existsSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { type InstalledModel, openStore, type ResolveOptions, resolveModel } from "../model/store.ts";
import { loadSettings } from "../settings.ts";

function find(name: string, options: ResolveOptions): InstalledModel {
  const model = resolveModel(openStore(loadSettings().settings.models_dir), name, {
    ...options,
    allowFolder: true,
  });
  // A folder elsewhere is called by its last part: clients should not need this machine's paths.
  return model.source === "folder" ? { ...model, name: basename(model.path) || model.path } : model;
}

/** The installed model that MODEL names. Throws model_not_found with the command that brings it here. */
export function findModel(name: string): InstalledModel {
  return find(name, {});
}

/** The same for commands that feed token ids: weights and config.json are enough. */
export function findWeights(name: string): InstalledModel {
  return find(name, { withoutTokenizer: true });
}

/** The folder of MODEL's tokenizer: a folder with only the tokenizer's files is enough. */
export function textFolder(name: string): string {
  const folder = resolve(name);
  return existsSync(join(folder, "tokenizer.json")) ? folder : findModel(name).path;
}
