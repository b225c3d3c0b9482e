// The pre-tokenizers that GGUF only names (tokenizer.ggml.pre). Each is a list of patterns; a text is cut by the
// first, its pieces by the next, and so on, then bytes become the visible alphabet of byte-level BPE.

import type { Json } from "./config.ts";
import { type Metadata, Text } from "./metadata.ts";

export interface PreTokenizer {
  json: Json;
  /** A piece that is itself a token is taken whole, whatever the merges say. */
  ignoreMerges: boolean;
  addBosByDefault: boolean;
  notes: string[];
}

const GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const LLAMA3 =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" +
  "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const WORD_START = "[^\\r\\n\\p{L}\\p{N}]?";
const UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
const LLAMA4 =
  `${WORD_START}${UPPER}*${LOWER}+${CONTRACTION}|${WORD_START}${UPPER}+${LOWER}*${CONTRACTION}|\\p{N}{1,3}|` +
  " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

interface Recipe {
  patterns: string[];
  ignoreMerges?: boolean;
  addBos?: boolean;
}

const LLAMA3_RECIPE: Recipe = { patterns: [LLAMA3], ignoreMerges: true, addBos: true };
const LLAMA4_RECIPE: Recipe = { patterns: [LLAMA4], ignoreMerges: true };

const RECIPES: ReadonlyMap<string, Recipe> = new Map([
  // single digits first; \p{N} instead of a Digits entry, which not every library applies to all numerals
  ["smollm", { patterns: ["\\p{N}", GPT2] }],
  ["gpt-2", { patterns: [GPT2] }],
  ["llama-bpe", LLAMA3_RECIPE],
  ["llama3", LLAMA3_RECIPE],
  ["llama-v3", LLAMA3_RECIPE],
  ["falcon3", LLAMA3_RECIPE],
  ["llama4", LLAMA4_RECIPE],
  ["gpt-4o", LLAMA4_RECIPE],
  ["default", { patterns: ["[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"] }],
]);

/** @throws CaravanError unsupported_model for a name that is not known: guessing would give other tokens */
export function preTokenizer(meta: Metadata): PreTokenizer {
  const name = meta.optional("tokenizer.ggml.pre", Text) ?? "default";
  const recipe = RECIPES.get(name);
  if (recipe === undefined) {
    throw meta.unsupported(
      `has the pre-tokenizer ${JSON.stringify(name.slice(0, 80))}; supported are ${[...RECIPES.keys()].join(", ")}`,
    );
  }
  const splits = recipe.patterns.map((Regex) => ({
    type: "Split",
    pattern: { Regex },
    behavior: "Isolated",
    invert: false,
  }));
  const bytes = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false };
  return {
    json: { type: "Sequence", pretokenizers: [...splits, bytes] },
    ignoreMerges: recipe.ignoreMerges ?? false,
    addBosByDefault: recipe.addBos ?? false,
    notes:
      name === "default"
        ? ["tokenizer: the file names no pre-tokenizer, llama.cpp's default patterns are used"]
        : [],
  };
}
