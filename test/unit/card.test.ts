// Cards: the ones that come with caravan, the ones that people bring, and the ones that are wrong.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { CaravanError } from "../../src/errors.ts";
import { DEFAULT_MODEL, loadCards, parseCard } from "../../src/model/card.ts";
import { EMBEDDED_CARDS } from "../../src/model/cards-embedded.ts";

const CARDS = join(import.meta.dir, "..", "..", "cards");

/** The shape of a card as exo writes it. */
const EXO = `model_id = "mlx-community/Some-Llama-4bit"
n_layers = 16
hidden_size = 2048
num_key_value_heads = 8
supports_tensor = true
tasks = ["TextGeneration"]
family = "llama"
quantization = "4bit"
base_model = "Some Llama"
capabilities = ["text"]

context_length = 131072
backends = ["MlxMetal", "MlxCpu"]
[storage_size]
in_bytes = 729808896

[sampling_defaults]
temperature = 0.6
top_p = 0.9

[sampling_defaults.non_thinking]
top_p = 0.8
`;

function badCard(text: string, file = "cards/mine.toml"): CaravanError {
  try {
    parseCard(file, text);
  } catch (error) {
    if (error instanceof CaravanError) return error;
    throw error;
  }
  throw new Error("the card was accepted");
}

describe("the cards that come with caravan", () => {
  test("every file in cards/ is embedded, with its text, and nothing else is", () => {
    const files = readdirSync(CARDS).filter((name) => name.endsWith(".toml"));
    expect(Object.keys(EMBEDDED_CARDS).sort()).toEqual(files.sort());
    for (const file of files) expect(EMBEDDED_CARDS[file]).toBe(readFileSync(join(CARDS, file), "utf8"));
  });

  test("they parse without a warning and can be run", () => {
    const { cards, warnings } = loadCards();
    expect(warnings).toEqual([]);
    expect(cards.every((card) => card.tasks.includes("TextGeneration") && card.context_length > 0)).toBe(
      true,
    );
    expect(new Set(cards.map((card) => card.model_id)).size).toBe(cards.length);
  });

  test("Llama 4's sizes are those of the published files", () => {
    const sizes = Object.fromEntries(loadCards().cards.map((card) => [card.name, card.storage_bytes]));
    expect(sizes).toMatchObject({
      "scout-4bit": 61_115_340_220,
      "scout-6bit": 88_275_096_777,
      "scout-8bit": 115_434_854_619,
      "maverick-4bit": 225_895_164_876,
      "maverick-6bit": 326_290_418_609,
    });
  });

  test("a card is found by its short name and by its repository, in any case", () => {
    const cards = loadCards();
    expect(cards.find(DEFAULT_MODEL)?.model_id).toBe("HuggingFaceTB/SmolLM2-135M-Instruct");
    expect(cards.find("Scout-4bit")?.name).toBe("scout-4bit");
    expect(cards.find("mlx-community/llama-4-scout-17b-16e-instruct-8bit")?.name).toBe("scout-8bit");
    expect(cards.find("scout")).toBeUndefined();
  });

  test("the bundler puts their text into the program", async () => {
    const folder = mkdtempSync(join(tmpdir(), "caravan-cards-"));
    try {
      const entry = join(folder, "main.ts");
      const source = join(import.meta.dir, "..", "..", "src", "model", "cards-embedded.ts");
      writeFileSync(
        entry,
        `import { EMBEDDED_CARDS } from ${JSON.stringify(source)};\nconsole.log(EMBEDDED_CARDS["smollm2.toml"]);`,
      );
      const built = await Bun.build({ entrypoints: [entry], target: "bun" });
      const text = (await built.outputs[0]?.text()) ?? "";
      expect(text).toContain("HuggingFaceTB/SmolLM2-135M-Instruct");
      expect(text).not.toContain(CARDS);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});

describe("a card that somebody brings", () => {
  test("in exo's form is accepted without a word about exo's own keys", () => {
    const { card, warnings } = parseCard("mlx-community--Some-Llama-4bit.toml", EXO);
    expect(warnings).toEqual([]);
    expect(card).toMatchObject({
      name: "mlx-community--Some-Llama-4bit",
      n_layers: 16,
      storage_bytes: 729808896,
    });
  });

  test("brings sampling defaults, those for answers without thinking first", () => {
    expect(parseCard("a.toml", EXO).card.sampling_defaults).toEqual({ temperature: 0.6, top_p: 0.8 });
  });

  test("may lack what old cards of exo lack", () => {
    const old = `model_id = "a/b"\nn_layers = 1\nhidden_size = 8\nsupports_tensor = true\ntasks = ["TextGeneration"]\n[storage_size]\nin_bytes = 5\n`;
    const { card, warnings } = parseCard("old.toml", old);
    expect(warnings).toEqual([]);
    expect(card).toMatchObject({
      num_key_value_heads: undefined,
      context_length: 0,
      family: "",
      capabilities: [],
    });
  });

  test("with unknown keys works and warns, naming file, line and key", () => {
    const text = EXO.replace("family", "familiy").replace("temperature", "temprature");
    const { card, warnings } = parseCard("x/mine.toml", text);
    expect(card.family).toBe("");
    expect(warnings).toEqual([
      "x/mine.toml: line 7: unknown key familiy is ignored",
      "x/mine.toml: line 18: unknown key sampling_defaults.temprature is ignored",
    ]);
  });
});

describe("a bad card names the file, the key and the reason", () => {
  const cases: [string, string, RegExp][] = [
    ["a missing key", EXO.replace(/n_layers.*\n/, ""), /^n_layers: is missing$/],
    ["a missing table", EXO.replace(/\[storage_size\]\nin_bytes.*\n/, ""), /^storage_size: is missing$/],
    [
      "a wrong type",
      EXO.replace("n_layers = 16", 'n_layers = "16"'),
      /^n_layers \(line 2\): must be number, not "16"$/,
    ],
    [
      "a value out of range",
      EXO.replace("n_layers = 16", "n_layers = 0"),
      /^n_layers \(line 2\): must be >=1, not 0$/,
    ],
    ["a fraction of a byte", EXO.replace("729808896", "1.5"), /^storage_size\.in_bytes \(line 15\): must be/],
    [
      "an unknown task",
      EXO.replace("TextGeneration", "Dancing"),
      /^tasks\[0\] \(line 6\): must be .*TextGeneration/,
    ],
    [
      "no repository",
      EXO.replace("mlx-community/Some-Llama-4bit", "Some-Llama"),
      /^model_id \(line 1\): must be a hub repository/,
    ],
    ["a repository that leads elsewhere", EXO.replace("mlx-community/", "../../"), /^model_id \(line 1\)/],
    [
      "a bad sampling value",
      EXO.replace("temperature = 0.6", "temperature = -1"),
      /^sampling_defaults\.temperature \(line 18\)/,
    ],
    ["no TOML", "model_id = \n", /^line 1, column 12: /],
    ["a key set twice", `${EXO}\n[storage_size]\n`, /line 2\d, column/],
    ["an unsafe key", `${EXO}\n[__proto__]\nx = 1\n`, /line 2\d, column/],
  ];
  for (const [what, text, message] of cases) {
    test(what, () => {
      const error = badCard(text);
      expect(error.code).toBe("bad_card");
      expect(error.where).toBe("cards/mine.toml");
      expect(error.message).toMatch(message);
    });
  }

  test("a file name that is no name", () => {
    expect(badCard(EXO, "my model.toml").message).toContain("file name");
  });

  test("whatever the text, the answer is a card or a bad_card", () => {
    const lines = EXO.split("\n");
    const mutated = fc
      .tuple(fc.nat(lines.length - 1), fc.string({ maxLength: 40 }))
      .map(([at, line]) => lines.with(at, line).join("\n"));
    fc.assert(
      fc.property(fc.oneof(fc.string(), mutated), (text) => {
        try {
          expect(parseCard("f.toml", text).card.n_layers).toBeGreaterThan(0);
        } catch (error) {
          expect(error).toBeInstanceOf(CaravanError);
          expect((error as CaravanError).code).toBe("bad_card");
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe("the user's folder of cards", () => {
  let folder = "";
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "caravan-cards-"));
  });
  afterEach(() => rmSync(folder, { recursive: true }));

  test("need not be there", () => {
    expect(loadCards(join(folder, "none")).cards.length).toBe(loadCards().cards.length);
  });

  test("adds cards, replaces those of the same name, and ignores other files", () => {
    writeFileSync(join(folder, "mine.toml"), EXO);
    writeFileSync(join(folder, "scout-4bit.toml"), EXO.replace("Some-Llama", "Other"));
    writeFileSync(join(folder, "notes.txt"), "x");
    mkdirSync(join(folder, "sub"));
    const cards = loadCards(folder);
    expect(cards.find("mine")?.file).toBe(join(folder, "mine.toml"));
    expect(cards.find("scout-4bit")?.model_id).toBe("mlx-community/Other-4bit");
    expect(cards.cards.length).toBe(loadCards().cards.length + 1);
  });

  test("a bad card there is a warning until it is asked for", () => {
    writeFileSync(join(folder, "broken.toml"), "n_layers = 3");
    const cards = loadCards(folder);
    expect(cards.warnings.join()).toContain("broken.toml: model_id: is missing");
    expect(cards.find("smollm2")).toBeDefined();
    expect(() => cards.find("broken")).toThrow("model_id: is missing");
  });
});
