// Rebuilds tokenizer.json and tokenizer_config.json from GGUF metadata: GPT-2 style byte-level BPE (Llama 3 and 4,
// SmolLM) and SentencePiece BPE (Llama 2), with special tokens and chat templates.

import * as v from "valibot";
import type { Json, TokenIds } from "./config.ts";
import { Count, Flag, type Metadata, Real, Text } from "./metadata.ts";
import { preTokenizer } from "./pre-tokenizer.ts";
import { spmMerges, spmPipeline } from "./sentencepiece.ts";

export interface ImportedTokenizer {
  tokenizer: Json;
  tokenizerConfig: Json;
  ids: TokenIds;
  tokenCount: number;
  notes: string[];
}

export interface Vocabulary {
  tokens: string[];
  types: number[];
  /** Only SentencePiece files have them. */
  scores: number[] | undefined;
}

/** Token types of GGUF. */
const UNKNOWN = 2;
const CONTROL = 3;
const USER_DEFINED = 4;
const UNUSED = 5;

/** Tokens that end a turn or a message in Llama 3 and 4, beside the one the file names. */
const END_TOKENS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>"];

/** @throws CaravanError bad_file for damaged tables, unsupported_model for other kinds of tokenizers */
export function importTokenizer(meta: Metadata): ImportedTokenizer {
  const kind = meta.required("tokenizer.ggml.model", Text);
  if (kind !== "gpt2" && kind !== "llama") {
    throw meta.unsupported(
      `has a tokenizer of kind ${JSON.stringify(kind.slice(0, 80))}; gpt2 and llama are supported`,
    );
  }
  const vocabulary = readVocabulary(meta);
  const ids = readIds(meta, vocabulary);
  const parts = kind === "gpt2" ? bytePairParts(meta, vocabulary) : sentencePieceParts(meta, vocabulary);
  const addBos = meta.optional("tokenizer.ggml.add_bos_token", Flag) ?? parts.addBosByDefault;
  const tokenizer: Json = {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: addedTokens(vocabulary),
    normalizer: parts.normalizer,
    pre_tokenizer: parts.preTokenizer,
    post_processor: postProcessor(addBos, kind === "gpt2", vocabulary, ids),
    decoder: parts.decoder,
    model: parts.model,
  };
  const tokenizerConfig = makeTokenizerConfig(meta, vocabulary, ids, addBos);
  return { tokenizer, tokenizerConfig, ids, tokenCount: vocabulary.tokens.length, notes: parts.notes };
}

interface TokenizerParts {
  normalizer: Json | null;
  preTokenizer: Json | null;
  decoder: Json;
  model: Json;
  addBosByDefault: boolean;
  notes: string[];
}

function readVocabulary(meta: Metadata): Vocabulary {
  const tokens = meta.required("tokenizer.ggml.tokens", v.array(Text));
  const types = meta.optional("tokenizer.ggml.token_type", v.array(Count)) ?? tokens.map(() => 1);
  const scores = meta.optional("tokenizer.ggml.scores", v.array(Real));
  if (tokens.length === 0) throw meta.bad("tokenizer.ggml.tokens is empty");
  if (types.length !== tokens.length)
    throw meta.bad(`${tokens.length} tokens have ${types.length} token types`);
  if (scores !== undefined && scores.length !== tokens.length) {
    throw meta.bad(`${tokens.length} tokens have ${scores.length} scores`);
  }
  if (new Set(tokens).size !== tokens.length) {
    const twice = tokens.find((t, i) => tokens.indexOf(t) !== i);
    throw meta.bad(`token ${JSON.stringify(twice?.slice(0, 80))} occurs twice`);
  }
  return { tokens, types, scores };
}

function readIds(meta: Metadata, { tokens, types }: Vocabulary): TokenIds {
  const id = (name: string): number | undefined => {
    const value = meta.optional(`tokenizer.ggml.${name}`, Count);
    if (value !== undefined && value >= tokens.length)
      throw meta.bad(`tokenizer.ggml.${name} ${value} is no token`);
    return value;
  };
  const named = [id("eos_token_id"), id("eot_token_id"), id("eom_token_id")];
  const byText = END_TOKENS.map((text) => tokens.indexOf(text)).filter((i) => i >= 0 && types[i] === CONTROL);
  const eos = [...new Set([...named, ...byText])].filter((i) => i !== undefined);
  return { bos: id("bos_token_id"), eos, pad: id("padding_token_id") };
}

/** Control tokens are special, user-defined ones are matched before everything else too but are ordinary text. */
function addedTokens({ tokens, types }: Vocabulary): Json[] {
  const added: Json[] = [];
  tokens.forEach((content, id) => {
    const type = types[id];
    if (type !== CONTROL && type !== USER_DEFINED && type !== UNKNOWN) return;
    const special = type !== USER_DEFINED;
    added.push({ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special });
  });
  return added;
}

/**
 * Token to id. Control tokens at the end of the table are left out, as in the published tokenizers: user text must
 * not reach them through the model. UNUSED entries only fill gaps in the numbering.
 */
function vocabularyMap({ tokens, types }: Vocabulary): Json {
  let end = tokens.length;
  while (end > 0 && (types[end - 1] === CONTROL || types[end - 1] === UNUSED)) end--;
  const map: Json = Object.create(null) as Json;
  for (let id = 0; id < end; id++) if (types[id] !== UNUSED) map[tokens[id] ?? ""] = id;
  return map;
}

function bytePairParts(meta: Metadata, vocabulary: Vocabulary): TokenizerParts {
  const pre = preTokenizer(meta);
  const merges = meta.required("tokenizer.ggml.merges", v.array(Text));
  const known = new Set(vocabulary.tokens);
  const pairs = merges.map((merge) => {
    const at = merge.indexOf(" ", 1);
    const pair = [merge.slice(0, at), merge.slice(at + 1)] as const;
    if (at < 0 || !known.has(pair[0]) || !known.has(pair[1]) || !known.has(pair[0] + pair[1])) {
      throw meta.bad(`merge ${JSON.stringify(merge.slice(0, 80))} is not of tokens in the vocabulary`);
    }
    return pair;
  });
  return {
    normalizer: null,
    preTokenizer: pre.json,
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: bpeModel(
      { unk_token: null, byte_fallback: false, ignore_merges: pre.ignoreMerges, fuse_unk: false },
      vocabulary,
      pairs,
    ),
    addBosByDefault: pre.addBosByDefault,
    notes: pre.notes,
  };
}

function sentencePieceParts(meta: Metadata, vocabulary: Vocabulary): TokenizerParts {
  if (vocabulary.scores === undefined) throw meta.bad("metadata has no tokenizer.ggml.scores");
  const addSpace = meta.optional("tokenizer.ggml.add_space_prefix", Flag) ?? true;
  const unknown = vocabulary.types.indexOf(UNKNOWN);
  const unk_token = unknown < 0 ? null : (vocabulary.tokens[unknown] ?? null);
  return {
    ...spmPipeline(addSpace),
    model: bpeModel(
      { unk_token, byte_fallback: true, ignore_merges: false, fuse_unk: true },
      vocabulary,
      spmMerges(vocabulary.tokens, vocabulary.scores),
    ),
    addBosByDefault: true,
    notes: [],
  };
}

function bpeModel(
  options: Json,
  vocabulary: Vocabulary,
  merges: readonly (readonly [string, string])[],
): Json {
  return {
    type: "BPE",
    dropout: null,
    continuing_subword_prefix: null,
    end_of_word_suffix: null,
    ...options,
    vocab: vocabularyMap(vocabulary),
    merges,
  };
}

function postProcessor(
  addBos: boolean,
  byteLevel: boolean,
  { tokens }: Vocabulary,
  { bos }: TokenIds,
): Json | null {
  const bytes = { type: "ByteLevel", add_prefix_space: true, trim_offsets: false, use_regex: true };
  if (!addBos || bos === undefined) return byteLevel ? bytes : null;
  const content = tokens[bos] ?? "";
  const special = (type_id: number) => ({ SpecialToken: { id: content, type_id } });
  const sequence = (id: string, type_id: number) => ({ Sequence: { id, type_id } });
  const template = {
    type: "TemplateProcessing",
    single: [special(0), sequence("A", 0)],
    pair: [special(0), sequence("A", 0), special(1), sequence("B", 1)],
    special_tokens: { [content]: { id: content, ids: [bos], tokens: [content] } },
  };
  return byteLevel ? { type: "Sequence", processors: [bytes, template] } : template;
}

function makeTokenizerConfig(
  meta: Metadata,
  { tokens, types }: Vocabulary,
  ids: TokenIds,
  addBos: boolean,
): Json {
  const text = (key: string, id: number | undefined): Json => {
    const token = id === undefined ? undefined : tokens[id];
    return token === undefined ? {} : { [key]: token };
  };
  const unknown = meta.optional("tokenizer.ggml.unknown_token_id", Count) ?? types.indexOf(UNKNOWN);
  const contextLength = meta.optional(`${meta.required("general.architecture", Text)}.context_length`, Count);
  const template = chatTemplate(meta);
  return {
    tokenizer_class: "PreTrainedTokenizerFast",
    ...text("bos_token", ids.bos),
    ...text("eos_token", ids.eos[0]),
    ...text("pad_token", ids.pad),
    ...text("unk_token", unknown),
    add_bos_token: addBos,
    clean_up_tokenization_spaces: false,
    ...(contextLength === undefined ? {} : { model_max_length: contextLength }),
    ...(template === undefined ? {} : { chat_template: template }),
  };
}

/** One template as text; several (`tokenizer.chat_template.NAME`) as a list of named ones. */
function chatTemplate(meta: Metadata): string | Json[] | undefined {
  const main = meta.optional("tokenizer.chat_template", Text);
  const names = meta.optional("tokenizer.chat_templates", v.array(Text)) ?? [];
  const named: Json[] = [];
  for (const name of names) {
    const template = meta.optional(`tokenizer.chat_template.${name}`, Text);
    if (template !== undefined) named.push({ name, template });
  }
  if (named.length === 0) return main;
  return main === undefined ? named : [{ name: "default", template: main }, ...named];
}
