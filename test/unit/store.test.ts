// The store: which folder a name means, what counts as a whole model, and what removing takes away.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { CaravanError } from "../../src/errors.ts";
import { loadCards } from "../../src/model/card.ts";
import { inspectFolder } from "../../src/model/model-folder.ts";
import {
  listModels,
  type ModelStore,
  type ResolveOptions,
  removeModel,
  resolveModel,
  scanStore,
} from "../../src/model/store.ts";
import { safetensors, tinyModel } from "../tools/tiny-model.ts";

const OLD = "a".repeat(40);
const NEW = "b".repeat(40);
const SCOUT = "mlx-community/Llama-4-Scout-17B-16E-Instruct-4bit";

let root = "";
let store: ModelStore;

beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), "caravan-store-"));
  store = { hub: join(root, "hub"), models: join(root, "models"), cards: loadCards() };
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

function write(path: string, content: string | Uint8Array): void {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, content);
}

function makeModel(folder: string): string {
  for (const file of tinyModel(1000)) write(join(folder, file.path), file.content);
  return folder;
}

const repo = (id: string): string => join(store.hub, `models--${id.replace("/", "--")}`);

/** A snapshot whose files are links into blobs, as on a real disk. */
function makeSnapshot(id: string, commit: string, ref?: string): string {
  const folder = join(repo(id), "snapshots", commit);
  mkdirSync(folder, { recursive: true });
  for (const [n, file] of tinyModel(1000).entries()) {
    write(join(repo(id), "blobs", `${commit.slice(0, 8)}${n}`), file.content);
    symlinkSync(`../../blobs/${commit.slice(0, 8)}${n}`, join(folder, file.path));
  }
  if (ref !== undefined) write(join(repo(id), "refs", ref), commit);
  return folder;
}

function missing(name: string, options?: ResolveOptions): CaravanError {
  try {
    resolveModel(store, name, options);
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error(`${name} was found`);
}

describe("a name means", () => {
  test("an imported model", () => {
    const path = makeModel(join(store.models, "mine"));
    expect(resolveModel(store, "mine")).toMatchObject({ name: "mine", path, source: "imported" });
  });

  test("the hub repository of a card, by the card's name or its own", () => {
    const path = makeSnapshot(SCOUT, OLD, "main");
    for (const name of ["scout-4bit", SCOUT]) {
      expect(resolveModel(store, name)).toMatchObject({
        name: "scout-4bit",
        path,
        source: "hub",
        hubId: SCOUT,
        commit: OLD,
      });
    }
    expect(resolveModel(store, "scout-4bit").card?.n_layers).toBe(48);
  });

  test("an imported model before the pulled one of the same card", () => {
    makeSnapshot("HuggingFaceTB/SmolLM2-135M-Instruct", OLD, "main");
    const path = makeModel(join(store.models, "smollm2"));
    expect(resolveModel(store, "smollm2")).toMatchObject({ path, source: "imported" });
    expect(resolveModel(store, "smollm2").card?.name).toBe("smollm2");
    expect(resolveModel(store, "HuggingFaceTB/SmolLM2-135M-Instruct").source).toBe("hub");
    expect(listModels(store).map((model) => model.name)).toEqual([
      "smollm2",
      "HuggingFaceTB/SmolLM2-135M-Instruct",
    ]);
  });

  test("a hub repository without a card, and one of its revisions", () => {
    makeSnapshot("me/new", NEW, "main");
    const old = makeSnapshot("me/new", OLD, "v1");
    expect(resolveModel(store, "me/new")).toMatchObject({ name: "me/new", commit: NEW });
    expect(resolveModel(store, "me/new@v1")).toMatchObject({ name: "me/new@v1", path: old });
    expect(resolveModel(store, `me/new@${OLD}`).path).toBe(old);
    expect(missing("me/new@v2").hint).toBe("caravan pull me/new@v2");
  });

  test("the newest whole snapshot when main points to one that is not whole", () => {
    const good = makeSnapshot("me/moved", OLD);
    const begun = makeSnapshot("me/moved", NEW, "main");
    rmSync(join(begun, "model.safetensors"));
    utimesSync(good, 1, 1);
    expect(resolveModel(store, "me/moved").path).toBe(good);
  });

  test("a folder, only where the caller allows folders", () => {
    const path = makeModel(join(root, "elsewhere"));
    expect(resolveModel(store, path, { allowFolder: true })).toMatchObject({ path, source: "folder" });
    expect(missing(path).code).toBe("model_not_found");
    expect(missing(path).message).toContain("there is no model");
  });

  test("a folder without a tokenizer, only where none is needed", () => {
    const path = makeModel(join(root, "golden"));
    rmSync(join(path, "tokenizer.json"));
    expect(missing(path, { allowFolder: true }).message).toContain("tokenizer.json (not there)");
    expect(resolveModel(store, path, { allowFolder: true, withoutTokenizer: true }).path).toBe(path);
  });

  test("nothing outside the store, whatever it looks like", () => {
    makeModel(join(root, "secret"));
    for (const name of [
      "../secret",
      "..",
      ".",
      "",
      "/",
      "models/../../secret",
      "a\u0000b",
      "x".repeat(5000),
      "../secret@main",
    ]) {
      expect(missing(name).code).toBe("model_not_found");
    }
  });
});

describe("a model that is not here", () => {
  test("is answered with the exact command that brings it", () => {
    expect(missing("scout-4bit").hint).toBe("caravan pull scout-4bit");
    expect(missing("SCOUT-4bit").hint).toBe("caravan pull scout-4bit");
    expect(missing("me/unknown").hint).toBe("caravan pull me/unknown");
    expect(missing("maverick").hint).toContain("did you mean maverick-4bit?");
    expect(missing("frobnicate").hint).toContain("caravan models");
  });

  test("in part: what is missing is named", () => {
    makeModel(join(store.models, "half"));
    rmSync(join(store.models, "half", "config.json"));
    expect(missing("half").message).toBe("model half is not whole: missing config.json (not there)");
    expect(missing("half").hint).toBe("caravan import FILE.gguf --name half");
    const folder = makeSnapshot(SCOUT, OLD, "main");
    rmSync(join(folder, "tokenizer.json"));
    expect(missing("scout-4bit").hint).toBe("caravan pull scout-4bit");
  });

  test("a GGUF file named as a folder is told how to import it", () => {
    write(join(root, "m.gguf"), "GGUF");
    expect(missing(join(root, "m.gguf"), { allowFolder: true }).hint).toBe(
      `caravan import ${join(root, "m.gguf")}`,
    );
  });
});

describe("a folder is whole only when", () => {
  let folder = "";
  const faults = (): string => inspectFolder(folder).missing.join("; ");
  beforeEach(() => {
    folder = makeModel(join(root, "m"));
  });

  test("config, tokenizer and weights are there", () => {
    expect(inspectFolder(folder)).toEqual({
      missing: [],
      bytes: tinyModel(1000).reduce((n, f) => n + f.content.length, 0),
    });
    rmSync(join(folder, "model.safetensors"));
    expect(faults()).toBe("model.safetensors (not there)");
    expect(inspectFolder(join(root, "none")).missing).toEqual(["the folder"]);
  });

  test("config and tokenizer are JSON objects", () => {
    write(join(folder, "config.json"), "");
    write(join(folder, "tokenizer.json"), "[]");
    expect(faults()).toBe("config.json (not a JSON object); tokenizer.json (not a JSON object)");
  });

  test("weights are as long as their header says", () => {
    const path = join(folder, "model.safetensors");
    truncateSync(path, 900);
    expect(faults()).toBe("model.safetensors (cut short)");
    truncateSync(path, 5);
    expect(faults()).toBe("model.safetensors (cut short)");
    write(path, "<!DOCTYPE html><html>");
    expect(faults()).toBe("model.safetensors (not a safetensors file)");
  });

  test("the header of a shard is read again only when the file changed", () => {
    const folder = makeModel(join(root, "m"));
    const shard = join(folder, "model.safetensors");
    // A large header of nothing but names: reading it takes a while, which shows whether it is read.
    const entries = Array.from({ length: 100_000 }, (_, n) => `"t${n}":{"data_offsets":[0,0]}`).join(",");
    const header = new TextEncoder().encode(`{${entries}}`);
    const file = new Uint8Array(8 + header.length);
    new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
    file.set(header, 8);
    writeFileSync(shard, file);
    const timed = () => {
      const start = performance.now();
      expect(inspectFolder(folder).missing).toEqual([]);
      return performance.now() - start;
    };
    const first = timed();
    const later = Math.min(timed(), timed(), timed());
    expect(later).toBeLessThan(first / 4);
    // The same length and time, another file.
    const { mtimeMs } = statSync(shard);
    const broken = Uint8Array.from(file);
    broken[8] = 0x5b;
    writeFileSync(`${shard}.new`, broken);
    renameSync(`${shard}.new`, shard);
    utimesSync(shard, mtimeMs / 1000, mtimeMs / 1000);
    expect(inspectFolder(folder).missing).toEqual(["model.safetensors (not a safetensors file)"]);
  });

  test("every shard of the index is there and whole", () => {
    rmSync(join(folder, "model.safetensors"));
    const index = (map: Record<string, string>): void =>
      write(join(folder, "model.safetensors.index.json"), JSON.stringify({ metadata: {}, weight_map: map }));
    const shard = (n: number): string => `model-0000${n}-of-00002.safetensors`;
    write(join(folder, shard(1)), safetensors(100));
    expect(faults()).toBe("model.safetensors.index.json (not there)");
    index({ a: shard(1), b: shard(2) });
    expect(faults()).toBe(`${shard(2)} (not there)`);
    write(join(folder, shard(2)), safetensors(100));
    expect(faults()).toBe("");
    symlinkSync("/nowhere", join(folder, "model-extra.safetensors"));
    expect(faults()).toBe("");
    index({ a: "../m2/model.safetensors" });
    expect(faults()).toContain("names a file outside the folder");
    index({});
    expect(faults()).toContain("names no shard");
    write(join(folder, "model.safetensors.index.json"), "{");
    expect(faults()).toContain("not a safetensors index");
  });
});

describe("the list", () => {
  test("of an empty or absent store is empty", () => {
    expect(scanStore(store)).toEqual({ models: [], partial: [] });
  });

  test("holds whole models with name, path, size and source; partial ones and other tools' repositories stay out", () => {
    makeModel(join(store.models, "mine"));
    makeSnapshot(SCOUT, OLD, "main");
    rmSync(join(makeSnapshot("me/half", OLD, "main"), "model.safetensors"));
    write(join(repo("me/begun"), "blobs", "abc.caravan-part"), "x".repeat(5000));
    write(join(repo("openai/whisper"), "refs", "main"), OLD);
    write(join(store.hub, "datasets--a--b", "x"), "");
    const { models, partial } = scanStore(store);
    const bytes = tinyModel(1000).reduce((n, f) => n + f.content.length, 0);
    expect(models.map(({ name, source, bytes }) => ({ name, source, bytes }))).toEqual([
      { name: "mine", source: "imported", bytes },
      { name: "scout-4bit", source: "hub", bytes },
    ]);
    expect(partial.map(({ name, hint }) => ({ name, hint }))).toEqual([
      { name: "me/begun", hint: "caravan pull me/begun" },
      { name: "me/half", hint: "caravan pull me/half" },
    ]);
    expect(partial[0]?.bytes).toBeGreaterThanOrEqual(5000);
  });
});

describe("removing", () => {
  test("takes an imported model's folder and says what came free", () => {
    const path = makeModel(join(store.models, "mine"));
    const removed = removeModel(store, "mine");
    expect(removed.path).toBe(path);
    expect(removed.bytes).toBeGreaterThan(1000);
    expect(existsSync(path)).toBe(false);
  });

  test("takes a repository with its locks, whole or not, by the card's name too", () => {
    makeSnapshot(SCOUT, OLD, "main");
    write(
      join(store.hub, ".locks", "models--mlx-community--Llama-4-Scout-17B-16E-Instruct-4bit", "x.lock"),
      "",
    );
    removeModel(store, "scout-4bit");
    expect(readdirSync(store.hub)).toEqual([".locks"]);
    expect(readdirSync(join(store.hub, ".locks"))).toEqual([]);
    write(join(repo("me/begun"), "blobs", "abc.caravan-part"), "x");
    removeModel(store, "me/begun");
    expect(existsSync(repo("me/begun"))).toBe(false);
  });

  test("of a hub id leaves the import under the card's name alone", () => {
    const path = makeModel(join(store.models, "smollm2"));
    makeSnapshot("HuggingFaceTB/SmolLM2-135M-Instruct", OLD, "main");
    removeModel(store, "HuggingFaceTB/SmolLM2-135M-Instruct");
    expect(existsSync(join(path, "config.json"))).toBe(true);
  });

  test("of a link takes the link, not what it points to", () => {
    const outside = makeModel(join(root, "outside"));
    mkdirSync(store.models, { recursive: true });
    symlinkSync(outside, join(store.models, "linked"));
    expect(removeModel(store, "linked").bytes).toBe(0);
    expect(existsSync(join(outside, "config.json"))).toBe(true);
    expect(existsSync(join(store.models, "linked"))).toBe(false);
  });

  test("never leaves the store", () => {
    const outside = makeModel(join(root, "outside"));
    mkdirSync(store.models, { recursive: true });
    for (const name of ["../outside", outside, "..", ".", "", "org/..", "../../x"]) {
      expect(() => removeModel(store, name)).toThrow(CaravanError);
    }
    expect(existsSync(join(outside, "config.json"))).toBe(true);
    expect(existsSync(store.models)).toBe(true);
  });
});
