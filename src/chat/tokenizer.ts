// A model's tokenizer, from its own files: text to ids, ids to text, equal to Hugging Face's tokenizers library.
//
// Two ways to encode. `encodeText` is for what users write: nothing in it ever becomes an added token (special or not).
// `encodeWithSpecials` is for text that is trusted to name special tokens: raw completions, and a chat template's own
// words. Both are linear in the text, and both exist as generators (`…Steps`) that can be paused between small steps.
//
// The library @huggingface/tokenizers only translates regular expressions here (pretokenizer.ts): its encoder works on a
// whole text at once, so one long request would hold up all others, and its string-keyed tables take far more memory.
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { AddedTokens } from "./added-tokens.ts";
import { Bpe, byteLevelBytes } from "./bpe.ts";
import { isByteLevel, makeNormalizer, makePreTokenizer, type Normalize } from "./pretokenizer.ts";
import {
  buildTokenTable,
  bytesOf,
  FLAG_BYTE,
  FLAG_SPECIAL,
  isSpecialId,
  type TableEntry,
  type TokenTable,
  tableSize,
} from "./token-table.ts";
import {
  type AddedToken,
  type Component,
  checkTokenizerFiles,
  type RawTokenizerFiles,
  readTokenizerFiles,
  type TokenizerFiles,
} from "./tokenizer-files.ts";

/** Pieces encoded between two pauses (well under a millisecond). */
const STEP = 512;
/** Short pieces whose ids are remembered; the cache is emptied when it is full. */
const CACHE_ENTRIES = 16384;
const CACHED_LENGTH = 24;

const utf8 = new TextEncoder();
const lossy = new TextDecoder("utf-8", { ignoreBOM: true });
const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

/** A paused encoder: call next() until done; the value is the list of ids. */
export type Encoding = Generator<void, number[]>;

export class Tokenizer {
  /** Bytes and flags of every token, in shared memory. */
  readonly table: TokenTable;
  /** Largest id + 1, over vocabulary and added tokens. A model's logits may have more rows (padding). */
  readonly vocabSize: number;
  /** Beginning-of-sequence token, as generation_config.json or else tokenizer_config.json names it. */
  readonly bosId: number | null;
  /** Tokens that end a reply, as generation_config.json or else tokenizer_config.json names them. */
  readonly eosIds: readonly number[];
  /** Ids that the post-processor puts before a raw text (BOS for Llama 4, nothing for SmolLM2). */
  readonly beginIds: readonly number[];

  readonly #bpe: Bpe;
  readonly #normalize: Normalize | null;
  readonly #preTokenize: (text: string, first: boolean) => Iterable<string>;
  /** Added tokens looked for in the raw text, and those looked for after normalization. */
  readonly #rawAdded: AddedTokens;
  readonly #normalizedAdded: AddedTokens | null;
  readonly #addedIds = new Map<string, number>();
  readonly #cache = new Map<string, readonly number[]>();
  #scratch = new Uint8Array(1024);

  /** Reads a model folder. Errors: bad_file (missing or damaged), unsupported_model. */
  static async load(dir: string): Promise<Tokenizer> {
    return new Tokenizer(await readTokenizerFiles(dir));
  }

  /** From parsed JSON. Errors as `load`. */
  static fromJson(raw: RawTokenizerFiles): Tokenizer {
    return new Tokenizer(checkTokenizerFiles(raw));
  }

  constructor(files: TokenizerFiles) {
    const { where, model, addedTokens } = files;
    const byteLevel = isByteLevel(files.preTokenizer);
    const special = new Set(addedTokens.filter((token) => token.special).map((token) => token.content));
    this.#bpe = new Bpe(model, byteLevel, special, where);
    this.#normalize = makeNormalizer(files.normalizer, where);
    this.#preTokenize = makePreTokenizer(files.preTokenizer, where);

    for (const token of addedTokens) this.#addedIds.set(token.content, token.id);
    const afterNormalizing = addedTokens.filter((token) => token.normalized);
    this.#rawAdded = new AddedTokens(addedTokens.filter((token) => !token.normalized));
    this.#normalizedAdded =
      afterNormalizing.length === 0
        ? null
        : new AddedTokens(
            afterNormalizing.map((token) => ({
              ...token,
              content: this.#normalize === null ? token.content : this.#normalize(token.content),
            })),
          );

    this.table = makeTable(files, this.#bpe.size);
    this.vocabSize = tableSize(this.table);
    const idOf = (token: string | null): number | null => {
      if (token === null) return null;
      const added = this.#addedIds.get(token);
      if (added !== undefined) return added;
      const known = Object.hasOwn(model.vocab, token) ? model.vocab[token] : undefined;
      return typeof known === "number" ? known : null;
    };
    const eos = idOf(files.namedTokens.eos_token);
    this.bosId = files.generationBosId ?? idOf(files.namedTokens.bos_token);
    this.eosIds = files.generationEosIds ?? (eos === null ? [] : [eos]);
    this.beginIds = readBeginIds(files.postProcessor, where);
  }

  /** Ids of user text: no added token is recognised, no BOS is put before it. */
  encodeText(text: string): number[] {
    return drain(this.encodeTextSteps(text));
  }

  /** Ids of trusted text: the text of an added token becomes that token. No BOS is put before it (see beginIds). */
  encodeWithSpecials(text: string): number[] {
    return drain(this.encodeWithSpecialsSteps(text));
  }

  *encodeTextSteps(text: string): Encoding {
    const ids: number[] = [];
    const plain = text.toWellFormed();
    yield* this.#encodePlain(this.#normalize === null ? plain : this.#normalize(plain), true, ids);
    return ids;
  }

  /**
   * @param guard a string that is removed from the text after added tokens were looked for: where it stands inside the
   *   text of an added token, that text stays ordinary (template.ts marks what users wrote this way).
   */
  *encodeWithSpecialsSteps(text: string, guard = ""): Encoding {
    const ids: number[] = [];
    const whole = text.toWellFormed();
    const bare = (piece: string): string => (guard === "" ? piece : piece.replaceAll(guard, ""));
    for (const section of this.#rawAdded.sections(whole, guard)) {
      if (section === undefined) {
        yield;
        continue;
      }
      if (section.token !== null) {
        ids.push(section.token.id);
        continue;
      }
      const first = section.start === 0;
      const piece = whole.slice(section.start, section.end);
      if (this.#normalizedAdded === null) {
        const plain = bare(piece);
        yield* this.#encodePlain(this.#normalize === null ? plain : this.#normalize(plain), first, ids);
        continue;
      }
      const normalized = this.#normalize === null ? piece : this.#normalize(piece);
      for (const inner of this.#normalizedAdded.sections(normalized, guard)) {
        if (inner === undefined) yield;
        else if (inner.token !== null) ids.push(inner.token.id);
        else {
          const plain = bare(normalized.slice(inner.start, inner.end));
          yield* this.#encodePlain(plain, first && inner.start === 0, ids);
        }
      }
    }
    return ids;
  }

  /** Text of ids, special tokens included; invalid UTF-8 becomes U+FFFD; ids that do not exist are left out. */
  decode(ids: readonly number[] | Uint32Array): string {
    const { table } = this;
    let text = "";
    let length = 0;
    for (const id of ids) length += bytesOf(table, id).length;
    const bytes = new Uint8Array(length);
    let end = 0;
    let runStart = -1; // where a run of byte-fallback tokens began
    const endRun = (): void => {
      if (runStart < 0) return;
      // Such a run is text only as a whole: one bad byte, and each byte becomes U+FFFD.
      text += lossy.decode(bytes.subarray(0, runStart));
      const run = bytes.subarray(runStart, end);
      try {
        text += strict.decode(run);
      } catch {
        text += "\ufffd".repeat(run.length);
      }
      end = 0;
      runStart = -1;
    };
    for (const id of ids) {
      const isByte = ((table.flags[id] ?? 0) & FLAG_BYTE) !== 0;
      if (!isByte) endRun();
      else if (runStart < 0) runStart = end;
      const token = bytesOf(table, id);
      bytes.set(token, end);
      end += token.length;
    }
    endRun();
    text += lossy.decode(bytes.subarray(0, end));
    return table.stripsFirstSpace && text.startsWith(" ") ? text.slice(1) : text;
  }

  /** Raw bytes of a token (a view of shared memory); empty for ids that do not exist. */
  tokenBytes(id: number): Uint8Array {
    return bytesOf(this.table, id);
  }

  isSpecial(id: number): boolean {
    return isSpecialId(this.table, id);
  }

  /** Id of an added token by its exact text, e.g. `<|eot|>`; null if the tokenizer has none of that name. */
  addedId(content: string): number | null {
    return this.#addedIds.get(content) ?? null;
  }

  *#encodePlain(text: string, first: boolean, ids: number[]): Generator<void, void> {
    if (text === "") return;
    let count = 0;
    for (const piece of this.#preTokenize(text, first)) {
      if (++count % STEP === 0) yield;
      const cached = piece.length <= CACHED_LENGTH ? this.#cache.get(piece) : undefined;
      if (cached !== undefined) {
        for (const id of cached) ids.push(id);
        continue;
      }
      if (piece.length > this.#scratch.length / 3) {
        const bytes = utf8.encode(piece);
        if (!this.#bpe.encodeShort(bytes, bytes.length, ids))
          yield* this.#bpe.encodeLong(bytes, bytes.length, ids);
        yield;
        continue;
      }
      const { written } = utf8.encodeInto(piece, this.#scratch);
      const before = ids.length;
      if (!this.#bpe.encodeShort(this.#scratch, written, ids)) {
        // Another text may be encoded during a pause: the long path gets bytes of its own.
        yield* this.#bpe.encodeLong(this.#scratch.slice(0, written), written, ids);
        continue;
      }
      if (piece.length <= CACHED_LENGTH) {
        if (this.#cache.size >= CACHE_ENTRIES) this.#cache.clear();
        // A fresh string: a slice would keep the whole request's text in memory.
        this.#cache.set(lossy.decode(this.#scratch.subarray(0, written)), ids.slice(before));
      }
    }
  }
}

function drain(encoding: Encoding): number[] {
  for (;;) {
    const step = encoding.next();
    if (step.done) return step.value;
  }
}

/** How the decoder turns a token's name into bytes. */
interface DecodeRule {
  entry(token: string): TableEntry;
  stripsFirstSpace: boolean;
}

const ReplaceSchema = v.looseObject({ pattern: v.object({ String: v.string() }), content: v.string() });
const StripSchema = v.looseObject({ content: v.literal(" "), start: v.literal(1), stop: v.literal(0) });
const PartsSchema = v.looseObject({ decoders: v.array(v.looseObject({ type: v.string() })) });

function readDecoder(decoder: Component | null, where: string): DecodeRule {
  const type = decoder?.type ?? "none";
  if (type === "ByteLevel") {
    // A name with a character outside the byte alphabet stands for its own UTF-8.
    return {
      entry: (token) => ({ bytes: byteLevelBytes(token) ?? utf8.encode(token), flags: 0 }),
      stripsFirstSpace: false,
    };
  }
  const unsupported = (what: string): CaravanError =>
    new CaravanError("unsupported_model", `decoder "${what}" is not supported`, {
      where,
      hint: "caravan reads ByteLevel decoders and SentencePiece ones (Replace, ByteFallback, Fuse, Strip).",
    });
  const parsed = v.safeParse(PartsSchema, decoder);
  if (type !== "Sequence" || !parsed.success) throw unsupported(type);
  const replacements: [string, string][] = [];
  let byteFallback = false;
  let stripsFirstSpace = false;
  for (const part of parsed.output.decoders) {
    const replace = v.safeParse(ReplaceSchema, part);
    if (part.type === "Replace" && replace.success && !byteFallback) {
      replacements.push([replace.output.pattern.String, replace.output.content]);
    } else if (part.type === "ByteFallback") byteFallback = true;
    else if (part.type === "Strip" && v.is(StripSchema, part)) stripsFirstSpace = true;
    else if (part.type !== "Fuse") throw unsupported(`Sequence with ${part.type}`);
  }
  return {
    stripsFirstSpace,
    entry: (token) => {
      let text = token;
      for (const [from, to] of replacements) text = text.replaceAll(from, to);
      const hex = byteFallback ? /^<0x([0-9A-Fa-f]{2})>$/.exec(text)?.[1] : undefined;
      if (hex !== undefined) return { bytes: Uint8Array.of(Number.parseInt(hex, 16)), flags: FLAG_BYTE };
      return { bytes: utf8.encode(text), flags: 0 };
    },
  };
}

/** The bytes of every token, without the rest of a tokenizer. */
export function makeTable(files: TokenizerFiles, vocabularySize = 0): TokenTable {
  const rule = readDecoder(files.decoder, files.where);
  const entries = new Array<TableEntry | undefined>(vocabularySize).fill(undefined);
  const { vocab } = files.model;
  for (const token in vocab) entries[Number(vocab[token])] = rule.entry(token);
  const put = (token: AddedToken): void => {
    while (entries.length <= token.id) entries.push(undefined);
    const { bytes, flags } = rule.entry(token.content);
    entries[token.id] = { bytes, flags: flags | (token.special ? FLAG_SPECIAL : 0) };
  };
  for (const token of files.addedTokens) put(token);
  return buildTokenTable(entries, rule.stripsFirstSpace);
}

const TemplateSchema = v.looseObject({
  type: v.literal("TemplateProcessing"),
  single: v.array(v.looseObject({ SpecialToken: v.optional(v.looseObject({ id: v.string() })) })),
  special_tokens: v.record(v.string(), v.looseObject({ ids: v.array(v.number()) })),
});
const ProcessorsSchema = v.looseObject({ processors: v.array(v.looseObject({ type: v.string() })) });

function readBeginIds(processor: Component | null, where: string): number[] {
  if (processor === null) return [];
  if (processor.type === "Sequence") {
    const parts = v.safeParse(ProcessorsSchema, processor);
    return parts.success ? parts.output.processors.flatMap((part) => readBeginIds(part, where)) : [];
  }
  if (processor.type !== "TemplateProcessing") return [];
  const parsed = v.safeParse(TemplateSchema, processor);
  if (!parsed.success) {
    throw new CaravanError("bad_file", `post_processor: ${parsed.issues[0]?.message ?? "not valid"}`, {
      where,
    });
  }
  const ids: number[] = [];
  for (const part of parsed.output.single) {
    if (part.SpecialToken === undefined) break;
    ids.push(...(parsed.output.special_tokens[part.SpecialToken.id]?.ids ?? []));
  }
  return ids;
}
