// What MODEL on the command line means: a card's name, a hub id, an imported model, or a folder.

import { existsSync } from "node:fs";
import { join, resolve } from "node:path";
import { type InstalledModel, openStore, resolveModel } from "../model/store.ts";
import { loadSettings } from "../settings.ts";

/** The installed model that MODEL names. Throws model_not_found with the command that brings it here. */
export function findModel(name: string): InstalledModel {
  return resolveModel(openStore(loadSettings().settings.models_dir), name, { allowFolder: true });
}

/** The same for commands that feed token ids: weights and config.json are enough. */
export function findWeights(name: string): InstalledModel {
  return resolveModel(openStore(loadSettings().settings.models_dir), name, {
    allowFolder: true,
    withoutTokenizer: true,
  });
}

/** The folder of MODEL's tokenizer: a folder with only the tokenizer's files is enough. */
export function textFolder(name: string): string {
  const folder = resolve(name);
  return existsSync(join(folder, "tokenizer.json")) ? folder : findModel(name).path;
}
