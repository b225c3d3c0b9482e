// Reads the tokenizer's files of a model folder and checks their shape once:
// tokenizer.json, tokenizer_config.json, generation_config.json (optional) and the chat template, wherever it is.
import { join } from "node:path";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";

/** Largest file that is read: Llama 4's tokenizer.json has 12 MB (28 MB when indented). */
const MAX_FILE_BYTES = 256 * 1024 * 1024;
/** Ids are array indices everywhere; a file with a larger one is hostile or broken. */
export const MAX_TOKEN_ID = 1 << 22;

const TokenId = v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(MAX_TOKEN_ID));

const AddedTokenSchema = v.object({
  id: TokenId,
  content: v.pipe(v.string(), v.minLength(1)),
  single_word: v.optional(v.boolean(), false),
  lstrip: v.optional(v.boolean(), false),
  rstrip: v.optional(v.boolean(), false),
  normalized: v.optional(v.boolean(), true),
  special: v.optional(v.boolean(), false),
});
export type AddedToken = v.InferOutput<typeof AddedTokenSchema>;

/** A component (normalizer, pre-tokenizer, decoder …): its type decides what else must be in it. */
const ComponentSchema = v.looseObject({ type: v.string() });
export type Component = v.InferOutput<typeof ComponentSchema>;

// The vocabulary and the merges have hundreds of thousands of entries: their elements are checked where they are
// packed into tables (bpe.ts), so that no second copy of them is made here.
const isPlainObject = (value: unknown): boolean =>
  typeof value === "object" && value !== null && !Array.isArray(value);

const BpeSchema = v.object({
  type: v.optional(v.string(), "BPE"),
  vocab: v.custom<Record<string, unknown>>(isPlainObject, "expected an object of token → id"),
  merges: v.custom<unknown[]>((value) => Array.isArray(value), "expected a list of merges"),
  unk_token: v.nullish(v.string()),
  byte_fallback: v.nullish(v.boolean()),
  ignore_merges: v.nullish(v.boolean()),
  fuse_unk: v.nullish(v.boolean()),
  dropout: v.nullish(v.number()),
  continuing_subword_prefix: v.nullish(v.string()),
  end_of_word_suffix: v.nullish(v.string()),
});
export type BpeDefinition = v.InferOutput<typeof BpeSchema>;

const TokenizerJsonSchema = v.object({
  added_tokens: v.optional(v.array(AddedTokenSchema), []),
  normalizer: v.nullish(ComponentSchema),
  pre_tokenizer: v.nullish(ComponentSchema),
  post_processor: v.nullish(ComponentSchema),
  decoder: v.nullish(ComponentSchema),
  model: v.looseObject({ type: v.optional(v.string(), "BPE") }),
});

/** A special token's name: a string, or an object that holds it. */
const NamedToken = v.nullish(
  v.union([
    v.string(),
    v.pipe(
      v.looseObject({ content: v.string() }),
      v.transform((token) => token.content),
    ),
  ]),
);
const TemplateList = v.array(v.object({ name: v.string(), template: v.string() }));

const TokenizerConfigSchema = v.object({
  bos_token: NamedToken,
  eos_token: NamedToken,
  unk_token: NamedToken,
  pad_token: NamedToken,
  chat_template: v.nullish(v.union([v.string(), TemplateList])),
});

const GenerationConfigSchema = v.object({
  bos_token_id: v.nullish(TokenId),
  eos_token_id: v.nullish(v.union([TokenId, v.array(TokenId)])),
});

/** What the checkpoint says about its text: the input of Tokenizer and ChatTemplate. */
export interface TokenizerFiles {
  /** Folder or file named in error messages. */
  readonly where: string;
  readonly addedTokens: readonly AddedToken[];
  readonly normalizer: Component | null;
  readonly preTokenizer: Component | null;
  readonly postProcessor: Component | null;
  readonly decoder: Component | null;
  readonly model: BpeDefinition;
  /** Names of special tokens, for templates (`bos_token` …). */
  readonly namedTokens: Readonly<
    Record<"bos_token" | "eos_token" | "unk_token" | "pad_token", string | null>
  >;
  /** From generation_config.json; null where that file is absent or silent. */
  readonly generationBosId: number | null;
  readonly generationEosIds: readonly number[] | null;
  /** Chat templates by name; "default" is the one without a name. Empty when the model has none. */
  readonly chatTemplates: Readonly<Record<string, string>>;
}

/** The raw JSON values of the files, for callers that have them in memory. */
export interface RawTokenizerFiles {
  where: string;
  tokenizer: unknown;
  tokenizerConfig: unknown;
  generationConfig?: unknown;
  /** Text of chat_template.jinja; it goes before the one in tokenizer_config.json. */
  chatTemplate?: string;
}

function check<S extends v.GenericSchema>(schema: S, value: unknown, where: string): v.InferOutput<S> {
  const result = v.safeParse(schema, value);
  if (result.success) return result.output;
  const issue = result.issues[0];
  const path = issue === undefined ? "" : (v.getDotPath(issue) ?? "");
  throw new CaravanError("bad_file", `${path === "" ? "" : `${path}: `}${issue?.message ?? "not valid"}`, {
    where,
    hint: "The file is damaged or not from a Hugging Face tokenizer; download the model again.",
  });
}

/** Checks raw JSON values. Errors: bad_file, or unsupported_model for a tokenizer that is not BPE. */
export function checkTokenizerFiles(raw: RawTokenizerFiles): TokenizerFiles {
  const where = join(raw.where, "tokenizer.json");
  const tokenizer = check(TokenizerJsonSchema, raw.tokenizer, where);
  if (tokenizer.model.type !== "BPE") {
    throw new CaravanError(
      "unsupported_model",
      `tokenizer model "${tokenizer.model.type}" is not supported`,
      {
        where,
        hint: "caravan reads BPE tokenizers (Llama 2, 3 and 4, SmolLM2 and their kin).",
      },
    );
  }
  const model = check(BpeSchema, tokenizer.model, `${where} (model)`);
  const config = check(TokenizerConfigSchema, raw.tokenizerConfig, join(raw.where, "tokenizer_config.json"));
  const generation = check(
    GenerationConfigSchema,
    raw.generationConfig ?? {},
    join(raw.where, "generation_config.json"),
  );
  const chatTemplates: Record<string, string> = Object.create(null);
  if (typeof config.chat_template === "string") chatTemplates.default = config.chat_template;
  else for (const { name, template } of config.chat_template ?? []) chatTemplates[name] = template;
  if (raw.chatTemplate !== undefined) chatTemplates.default = raw.chatTemplate;
  const eos = generation.eos_token_id ?? null;
  return {
    where: raw.where,
    addedTokens: tokenizer.added_tokens,
    normalizer: tokenizer.normalizer ?? null,
    preTokenizer: tokenizer.pre_tokenizer ?? null,
    postProcessor: tokenizer.post_processor ?? null,
    decoder: tokenizer.decoder ?? null,
    model,
    namedTokens: {
      bos_token: config.bos_token ?? null,
      eos_token: config.eos_token ?? null,
      unk_token: config.unk_token ?? null,
      pad_token: config.pad_token ?? null,
    },
    generationBosId: generation.bos_token_id ?? null,
    generationEosIds: eos === null ? null : Array.isArray(eos) ? eos : [eos],
    chatTemplates,
  };
}

async function readText(path: string): Promise<string | undefined> {
  const file = Bun.file(path);
  if (!(await file.exists())) return undefined;
  if (file.size > MAX_FILE_BYTES) {
    throw new CaravanError("bad_file", `the file has ${file.size} bytes, more than ${MAX_FILE_BYTES}`, {
      where: path,
    });
  }
  return await file.text();
}

async function readJson(path: string): Promise<unknown> {
  const text = await readText(path);
  if (text === undefined) return undefined;
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new CaravanError("bad_file", `not valid JSON: ${cause instanceof Error ? cause.message : cause}`, {
      where: path,
      hint: "The file is damaged or was cut short; download the model again.",
      cause,
    });
  }
}

/** Reads a model folder. Only tokenizer.json is required. Errors: bad_file, unsupported_model. */
export async function readTokenizerFiles(dir: string): Promise<TokenizerFiles> {
  const tokenizerPath = join(dir, "tokenizer.json");
  const tokenizer = await readJson(tokenizerPath);
  if (tokenizer === undefined) {
    throw new CaravanError("bad_file", "the model folder has no tokenizer.json", {
      where: dir,
      hint: "Download the model again, or copy tokenizer.json and tokenizer_config.json into the folder.",
    });
  }
  let chatTemplate = await readText(join(dir, "chat_template.jinja"));
  if (chatTemplate === undefined) {
    const path = join(dir, "chat_template.json");
    const wrapped = await readJson(path);
    if (wrapped !== undefined)
      chatTemplate = check(v.object({ chat_template: v.string() }), wrapped, path).chat_template;
  }
  return checkTokenizerFiles({
    where: dir,
    tokenizer,
    tokenizerConfig: (await readJson(join(dir, "tokenizer_config.json"))) ?? {},
    generationConfig: await readJson(join(dir, "generation_config.json")),
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
  });
}
