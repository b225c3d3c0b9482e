// caravan models: what is on this machine, and which cards there are.

import { existsSync } from "node:fs";
import { basename, join } from "node:path";
import * as v from "valibot";
import { samplingFromGenerationConfig } from "../api/sampling-defaults.ts";
import { makeCard } from "../model/make-card.ts";
import { type InstalledModel, openStore, removeModel, resolveModel, scanStore } from "../model/store.ts";
import { loadSettings } from "../settings.ts";
import type { Command } from "./command.ts";
import { readJsonFile } from "./json-file.ts";
import { formatBytes } from "./progress.ts";
import { table } from "./table.ts";

/** A card of the model, made from its files. */
async function cardOf(model: InstalledModel): Promise<string> {
  const path = join(model.path, "generation_config.json");
  const sampling = existsSync(path)
    ? samplingFromGenerationConfig(readJsonFile(path, v.unknown()), path)
    : {};
  const id = model.hubId ?? model.card?.model_id ?? `local/${basename(model.path)}`;
  return await makeCard(model.path, id, sampling);
}

export const models: Command = {
  name: "models",
  summary: "list the models on this machine",
  positionals: "",
  count: [0, 0],
  options: {
    cards: { help: "list the models that caravan knows by name instead" },
    card: { value: "NAME", help: "print a card for a model that is here, made from its files" },
    remove: { value: "NAME", help: "delete a model from this machine" },
    json: { help: "print JSON" },
  },
  async run(args) {
    const store = openStore(loadSettings().settings.models_dir);
    const remove = args.text("remove");
    if (remove !== undefined) {
      const removed = removeModel(store, remove);
      process.stdout.write(args.flag("json") ? `${JSON.stringify(removed)}\n` : `removed ${removed.path}\n`);
      return 0;
    }
    const wanted = args.text("card");
    if (wanted !== undefined) {
      const model = resolveModel(store, wanted, { allowFolder: true });
      process.stdout.write(await cardOf(model));
      return 0;
    }
    for (const warning of store.cards.warnings) process.stderr.write(`caravan: ${warning}\n`);
    for (const error of store.cards.bad.values()) process.stderr.write(`caravan: ${error.toText()}\n`);
    if (args.flag("cards")) {
      const cards = store.cards.cards;
      if (args.flag("json")) {
        process.stdout.write(`${JSON.stringify(cards)}\n`);
      } else {
        const rows = cards.map((card) => [
          card.name,
          card.model_id,
          card.storage_bytes === undefined ? "" : formatBytes(card.storage_bytes),
        ]);
        process.stdout.write(table([["NAME", "REPOSITORY", "SIZE"], ...rows]));
      }
      return 0;
    }
    const { models: whole, partial } = scanStore(store);
    if (args.flag("json")) {
      process.stdout.write(`${JSON.stringify({ models: whole, partial })}\n`);
      return 0;
    }
    if (whole.length === 0 && partial.length === 0) {
      process.stdout.write(
        "no models here yet: `caravan pull MODEL` gets one, `caravan models --cards` lists names\n",
      );
      return 0;
    }
    const rows = whole.map((model) => [model.name, formatBytes(model.bytes), model.source, model.path]);
    process.stdout.write(table([["NAME", "SIZE", "SOURCE", "FOLDER"], ...rows]));
    for (const one of partial) {
      process.stdout.write(`${one.name} is incomplete (${formatBytes(one.bytes)} here): ${one.hint}\n`);
    }
    return 0;
  },
};
