// Cards made from a model's files are cards, and say what the files say.

import { afterEach, beforeEach, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseCard } from "../../src/model/card.ts";
import { describeModel, makeCard } from "../../src/model/make-card.ts";
import { writeTinyLlama4 } from "../tools/tiny-llama4.ts";

let folder = "";
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "caravan-card-"));
  writeTinyLlama4(folder);
});
afterEach(() => rmSync(folder, { recursive: true }));

test("a card for a repository without one is made from its config, headers and sampling values", async () => {
  const sampling = { temperature: 0.6, top_p: 0.9 };
  const { card, warnings } = parseCard("tiny.toml", await makeCard(folder, "org/tiny", sampling));
  expect(warnings).toEqual([]);
  expect(card).toMatchObject({
    name: "tiny",
    model_id: "org/tiny",
    n_layers: 4,
    hidden_size: 64,
    num_key_value_heads: 2,
    supports_tensor: true,
    tasks: ["TextGeneration"],
    quantization: "f32",
    context_length: 4096,
    sampling_defaults: { temperature: 0.6, top_p: 0.9 },
  });
  expect(card.storage_bytes).toBeGreaterThan(100_000);
  expect(await describeModel(folder)).toBe("4 layers of 64, 4 experts, f32, context 4096 tokens");
});

test("a model that says nothing of sampling has no sampling defaults", async () => {
  const { card } = parseCard("tiny.toml", await makeCard(folder, "org/tiny"));
  expect(card.sampling_defaults).toEqual({});
});
