// Model cards: one TOML file says what a model is before any of it has been downloaded. The keys are those of exo's
// cards, so that a card written for either works in both. Cards come with the executable and from the user's own
// folder; a user's card replaces one of the same name.

import { readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { lineOfKey, parseToml } from "../toml.ts";
import { EMBEDDED_CARDS } from "./cards-embedded.ts";

/** What commands use when no model is named. */
export const DEFAULT_MODEL = "smollm2";

const positive = v.pipe(v.number(), v.safeInteger(), v.minValue(1));
const fraction = v.pipe(v.number(), v.minValue(0), v.maxValue(1));
const penalty = v.pipe(v.number(), v.minValue(-2), v.maxValue(2));

const SAMPLING_VALUES = {
  temperature: v.optional(v.pipe(v.number(), v.minValue(0), v.maxValue(100))),
  top_p: v.optional(fraction),
  top_k: v.optional(v.pipe(v.number(), v.safeInteger(), v.minValue(0))),
  min_p: v.optional(fraction),
  repetition_penalty: v.optional(v.pipe(v.number(), v.gtValue(0), v.maxValue(100))),
  presence_penalty: v.optional(penalty),
  frequency_penalty: v.optional(penalty),
};

/** A hub repository: `org/name`. The hub allows no `..` and no `--` (its cache writes `/` as `--`). */
export const HUB_ID = /^(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]*\/[A-Za-z0-9_][\w.-]*$/;

/** Short names of cards and imported models. */
export const SHORT_NAME = /^[A-Za-z0-9][\w.-]{0,95}$/;

const CARD_SCHEMA = v.looseObject({
  /** Hub repository that holds the files. */
  model_id: v.pipe(v.string(), v.maxLength(200), v.regex(HUB_ID, "must be a hub repository, org/name")),
  n_layers: positive,
  hidden_size: positive,
  /** Bounds the ranks of tensor parallelism. Old cards of exo lack it. */
  num_key_value_heads: v.optional(positive),
  supports_tensor: v.boolean(),
  tasks: v.pipe(v.array(v.picklist(["TextGeneration", "TextToImage", "ImageToImage"])), v.minLength(1)),
  family: v.optional(v.string(), ""),
  quantization: v.optional(v.string(), ""),
  base_model: v.optional(v.string(), ""),
  capabilities: v.optional(v.array(v.string()), []),
  /** In tokens; 0 or absent: not known before the model's own config is read. */
  context_length: v.optional(v.pipe(v.number(), v.safeInteger(), v.minValue(0)), 0),
  /** Bytes of the weights: an estimate for people; the plan reads the files' headers. */
  storage_size: v.looseObject({ in_bytes: positive }),
  sampling_defaults: v.optional(
    v.looseObject({
      ...SAMPLING_VALUES,
      thinking: v.optional(v.looseObject(SAMPLING_VALUES)),
      non_thinking: v.optional(v.looseObject(SAMPLING_VALUES)),
    }),
    {},
  ),
});

/** Keys of exo's cards that mean nothing here: no warning, no effect. */
const EXO_ONLY = new Set([
  "backends",
  "components",
  "coupled_drafter",
  "drafter_eligible_nodes",
  "drafter_model_ids",
  "is_custom",
  "prefill_eligible_nodes",
  "reasoning_dialect",
  "trust_remote_code",
  "uses_cfg",
  "vision",
]);

export interface SamplingDefaults {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
}

export interface Card {
  /** The file's name without .toml: what the command line accepts. */
  name: string;
  /** Where the card came from, for messages. */
  file: string;
  model_id: string;
  n_layers: number;
  hidden_size: number;
  num_key_value_heads: number | undefined;
  supports_tensor: boolean;
  tasks: ("TextGeneration" | "TextToImage" | "ImageToImage")[];
  family: string;
  quantization: string;
  base_model: string;
  capabilities: string[];
  /** In tokens; 0: unknown. */
  context_length: number;
  storage_bytes: number;
  sampling_defaults: SamplingDefaults;
}

export interface ParsedCard {
  card: Card;
  /** Unknown keys and the like, each naming the file. */
  warnings: string[];
}

/** The path, as a person writes it: `storage_size.in_bytes`, `tasks[0]`. */
function keyText(path: readonly unknown[]): string {
  return path
    .map((part) => (typeof part === "number" ? `[${part}]` : `.${String(part)}`))
    .join("")
    .slice(1);
}

function reasonOf(issue: v.BaseIssue<unknown>): string {
  if (issue.type === "regex") return `${issue.message}, not ${issue.received}`;
  if (issue.received === "undefined") return "is missing";
  return `must be ${issue.expected ?? "another value"}, not ${issue.received}`;
}

function unknownKeys(table: object, known: readonly string[], prefix: string): string[] {
  return Object.keys(table)
    .filter((key) => !known.includes(key))
    .map((key) => `${prefix}${key}`);
}

/** Reads the text of one card. Throws bad_card, naming the file, the key (with its line) and the reason. */
export function parseCard(file: string, text: string): ParsedCard {
  const name = basename(file).replace(/\.toml$/, "");
  if (!SHORT_NAME.test(name)) {
    throw new CaravanError(
      "bad_card",
      "a card's file name may hold letters, digits, dots, dashes and underscores",
      {
        where: file,
        hint: "rename it, for example to my-model.toml",
      },
    );
  }
  const table = parseToml(file, text, "bad_card");
  const result = v.safeParse(CARD_SCHEMA, table);
  if (!result.success) {
    const issue = result.issues[0];
    const path = issue.path?.map((item) => item.key) ?? [];
    const line = lineOfKey(
      text,
      path.filter((part) => typeof part === "string"),
    );
    const at = issue.received === "undefined" || line === undefined ? "" : ` (line ${line})`;
    throw new CaravanError("bad_card", `${keyText(path)}${at}: ${reasonOf(issue)}`, {
      where: file,
      hint: "cards/ in caravan's source has examples; the keys are those of exo's cards",
      param: keyText(path),
    });
  }
  const { storage_size, sampling_defaults, ...rest } = result.output;
  const { thinking, non_thinking, ...sampling } = sampling_defaults;
  const samplingKeys = Object.keys(SAMPLING_VALUES);
  const unknown = [
    ...unknownKeys(rest, [...Object.keys(CARD_SCHEMA.entries), ...EXO_ONLY], ""),
    ...unknownKeys(storage_size, ["in_bytes"], "storage_size."),
    ...unknownKeys(sampling, samplingKeys, "sampling_defaults."),
    ...unknownKeys(thinking ?? {}, samplingKeys, "sampling_defaults.thinking."),
    ...unknownKeys(non_thinking ?? {}, samplingKeys, "sampling_defaults.non_thinking."),
  ];
  const warnings = unknown.map((key) => {
    const line = lineOfKey(text, key.split("."));
    return `${file}: ${line === undefined ? "" : `line ${line}: `}unknown key ${key} is ignored`;
  });
  // caravan's models do not think before they answer: the values for that mode, where a card has them, are the ones.
  const values = Object.entries({ ...sampling, ...non_thinking });
  const card: Card = {
    name,
    file,
    model_id: rest.model_id,
    n_layers: rest.n_layers,
    hidden_size: rest.hidden_size,
    num_key_value_heads: rest.num_key_value_heads,
    supports_tensor: rest.supports_tensor,
    tasks: rest.tasks,
    family: rest.family,
    quantization: rest.quantization,
    base_model: rest.base_model,
    capabilities: rest.capabilities,
    context_length: rest.context_length,
    storage_bytes: storage_size.in_bytes,
    sampling_defaults: Object.fromEntries(
      values.filter(([key, value]) => value !== undefined && samplingKeys.includes(key)),
    ),
  };
  return { card, warnings };
}

/** All cards of this machine. A card that cannot be read is kept as its error, so that the others still work. */
export class CardSet {
  /** By short name, sorted. */
  readonly cards: readonly Card[];
  readonly warnings: readonly string[];
  /** Errors (bad_card) of the user's files, by short name. */
  readonly bad: ReadonlyMap<string, CaravanError>;

  constructor(cards: readonly Card[], warnings: readonly string[], bad: ReadonlyMap<string, CaravanError>) {
    this.cards = [...cards].sort((a, b) => (a.name < b.name ? -1 : 1));
    this.warnings = warnings;
    this.bad = bad;
  }

  /** The card with this short name or hub repository (case is ignored where nothing matches exactly).
   * Throws the card's own error when the name is that of a bad file. */
  find(name: string): Card | undefined {
    const error = this.bad.get(name);
    if (error !== undefined) throw error;
    const lower = name.toLowerCase();
    return (
      this.cards.find((card) => card.name === name) ??
      this.cards.find((card) => card.model_id === name) ??
      this.cards.find((card) => card.name.toLowerCase() === lower || card.model_id.toLowerCase() === lower)
    );
  }
}

/** The cards that come with caravan, and those in `userFolder` (which need not exist). */
export function loadCards(userFolder?: string): CardSet {
  const cards = new Map<string, Card>();
  const warnings: string[] = [];
  const bad = new Map<string, CaravanError>();
  const add = (parsed: ParsedCard): void => {
    cards.set(parsed.card.name, parsed.card);
    warnings.push(...parsed.warnings);
  };
  for (const [file, text] of Object.entries(EMBEDDED_CARDS)) add(parseCard(`cards/${file}`, text));
  for (const file of userFolder === undefined ? [] : userCardFiles(userFolder)) {
    const name = basename(file).replace(/\.toml$/, "");
    try {
      add(parseCard(file, readFileSync(file, "utf8")));
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      const known =
        error instanceof CaravanError
          ? error
          : new CaravanError("bad_card", `cannot be read: ${reason}`, { where: file });
      bad.set(name, known);
      warnings.push(known.toText());
    }
  }
  return new CardSet([...cards.values()], warnings, bad);
}

function userCardFiles(folder: string): string[] {
  try {
    const names = readdirSync(folder).filter((name) => name.endsWith(".toml") && !name.startsWith("."));
    return names.sort().map((name) => join(folder, name));
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT" || code === "ENOTDIR") return [];
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError("bad_card", `cannot list the cards: ${reason}`, { where: folder, cause });
  }
}
