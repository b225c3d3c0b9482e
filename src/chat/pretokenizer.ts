// Normalizers and pre-tokenizers of tokenizer.json, as lazy left-to-right scans: a text of any length is cut piece by
// piece, so that the caller can pause between two pieces. @huggingface/tokenizers translates the files' Oniguruma
// expressions to JavaScript's; everything else is done here because that library cuts a whole text in one go.
import { SplitPreTokenizer } from "@huggingface/tokenizers";
import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import type { Component } from "./tokenizer-files.ts";

const PatternSchema = v.union([v.object({ Regex: v.string() }), v.object({ String: v.string() })]);
type Pattern = v.InferOutput<typeof PatternSchema>;

function unsupported(kind: string, type: string, where: string): CaravanError {
  return new CaravanError("unsupported_model", `${kind} "${type}" is not supported`, {
    where,
    hint: "caravan reads the tokenizers of Llama 2, 3 and 4, SmolLM2 and their kin.",
  });
}

function fields<S extends v.GenericSchema>(schema: S, component: Component, where: string): v.InferOutput<S> {
  const result = v.safeParse(schema, component);
  if (result.success) return result.output;
  const issue = result.issues[0];
  throw new CaravanError("bad_file", `${component.type}: ${issue?.message ?? "not valid"}`, { where });
}

function compile(pattern: Pattern, where: string): RegExp {
  try {
    const { pattern: compiled } = new SplitPreTokenizer({
      type: "Split",
      pattern,
      behavior: "Isolated",
      invert: false,
    });
    if (compiled !== null) return compiled;
  } catch (cause) {
    const message = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError("bad_file", `regular expression cannot be read: ${message}`, { where, cause });
  }
  throw new CaravanError("bad_file", "a pattern is empty", { where });
}

// ---- normalizers ----

export type Normalize = (text: string) => string;

/** Function of a `normalizer` entry; null leaves the text as it is. */
export function makeNormalizer(component: Component | null, where: string): Normalize | null {
  if (component === null) return null;
  switch (component.type) {
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD": {
      const form = component.type;
      return (text) => text.normalize(form);
    }
    case "Prepend": {
      const { prepend } = fields(v.looseObject({ prepend: v.string() }), component, where);
      return (text) => (text === "" ? "" : prepend + text);
    }
    case "Replace": {
      const schema = v.looseObject({ pattern: PatternSchema, content: v.string() });
      const { pattern, content } = fields(schema, component, where);
      const regex = compile(pattern, where);
      return (text) => text.replace(regex, () => content);
    }
    case "Sequence": {
      const schema = v.looseObject({ normalizers: v.array(v.looseObject({ type: v.string() })) });
      const parts = fields(schema, component, where).normalizers.map((part) => makeNormalizer(part, where));
      return (text) => parts.reduce((done, part) => (part === null ? done : part(done)), text);
    }
    default:
      throw unsupported("normalizer", component.type, where);
  }
}

// ---- pre-tokenizers ----

type Behavior = "Removed" | "Isolated" | "MergedWithPrevious" | "MergedWithNext" | "Contiguous";

/** Cuts one piece into smaller ones. `first`: the piece begins the text. */
type Stage = (piece: string, first: boolean) => Iterable<string>;

/** Cuts a text lazily; pieces in order, none empty. */
export type PreTokenize = (text: string) => Iterable<string>;

/** Pieces of `text` and whether each is a match. Sets lastIndex itself: scans of several texts may be interleaved. */
function* segments(text: string, regex: RegExp, invert: boolean): Generator<[string, boolean]> {
  let at = 0;
  let from = 0;
  while (from <= text.length) {
    regex.lastIndex = from;
    const match = regex.exec(text);
    if (match === null) break;
    const found = match[0];
    from = match.index + found.length;
    if (found === "") {
      from += (text.codePointAt(from) ?? 0) > 0xffff ? 2 : 1;
      continue;
    }
    if (match.index > at) yield [text.slice(at, match.index), invert];
    yield [found, !invert];
    at = from;
  }
  if (at < text.length) yield [text.slice(at), invert];
}

/** The usual case, Isolated, without the bookkeeping of the others: matches and what lies between them. */
function* isolated(text: string, regex: RegExp): Generator<string> {
  for (const [piece] of segments(text, regex, false)) yield piece;
}

function* merged(text: string, regex: RegExp, behavior: Behavior, invert: boolean): Generator<string> {
  let held = "";
  let heldIsMatch = false;
  for (const [piece, isMatch] of segments(text, regex, invert)) {
    const joins =
      held !== "" &&
      (behavior === "MergedWithPrevious"
        ? isMatch && !heldIsMatch
        : behavior === "MergedWithNext"
          ? heldIsMatch && !isMatch
          : behavior === "Contiguous" && heldIsMatch === isMatch);
    if (joins) {
      held += piece;
      if (behavior !== "Contiguous") heldIsMatch = behavior === "MergedWithPrevious";
      continue;
    }
    if (held !== "") yield held;
    held = behavior === "Removed" && isMatch ? "" : piece;
    heldIsMatch = isMatch;
  }
  if (held !== "") yield held;
}

function splitStage(pattern: Pattern, behavior: Behavior, invert: boolean, where: string): Stage {
  const regex = compile(pattern, where);
  if (behavior === "Isolated") return (piece) => isolated(piece, regex);
  return (piece) => merged(piece, regex, behavior, invert);
}

/** GPT-2's expression, which a ByteLevel entry with use_regex stands for. */
const BYTE_LEVEL_REGEX = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

const BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"] as const;

function stagesOf(component: Component, where: string): Stage[] {
  switch (component.type) {
    case "Sequence": {
      const schema = v.looseObject({ pretokenizers: v.array(v.looseObject({ type: v.string() })) });
      return fields(schema, component, where).pretokenizers.flatMap((part) => stagesOf(part, where));
    }
    case "Split": {
      const schema = v.looseObject({
        pattern: PatternSchema,
        behavior: v.picklist(BEHAVIORS),
        invert: v.optional(v.boolean(), false),
      });
      const { pattern, behavior, invert } = fields(schema, component, where);
      return [splitStage(pattern, behavior, invert, where)];
    }
    case "Digits": {
      // Rust's char::is_numeric: all of category N, not only decimal digits.
      const schema = v.looseObject({ individual_digits: v.optional(v.boolean(), false) });
      const { individual_digits } = fields(schema, component, where);
      return [splitStage({ Regex: "\\p{N}" }, individual_digits ? "Isolated" : "Contiguous", false, where)];
    }
    case "ByteLevel": {
      const schema = v.looseObject({
        add_prefix_space: v.optional(v.boolean(), false),
        use_regex: v.optional(v.boolean(), true),
      });
      const { add_prefix_space, use_regex } = fields(schema, component, where);
      const prefix: Stage = (piece) => [piece.startsWith(" ") ? piece : ` ${piece}`];
      return [
        ...(add_prefix_space ? [prefix] : []),
        ...(use_regex ? [splitStage({ Regex: BYTE_LEVEL_REGEX }, "Isolated", false, where)] : []),
      ];
    }
    case "Metaspace": {
      const schema = v.looseObject({
        replacement: v.optional(v.string(), "▁"),
        prepend_scheme: v.optional(v.picklist(["always", "first", "never"]), "always"),
        split: v.optional(v.boolean(), true),
      });
      const { replacement, prepend_scheme, split } = fields(schema, component, where);
      const replace: Stage = (piece, first) => {
        const text = piece.replaceAll(" ", replacement);
        const prepends = prepend_scheme === "always" || (prepend_scheme === "first" && first);
        return [prepends && !text.startsWith(replacement) ? replacement + text : text];
      };
      return [
        replace,
        ...(split ? [splitStage({ String: replacement }, "MergedWithNext", false, where)] : []),
      ];
    }
    default:
      throw unsupported("pre-tokenizer", component.type, where);
  }
}

function* runStages(
  text: string,
  stages: readonly Stage[],
  index: number,
  first: boolean,
): Generator<string> {
  const stage = stages[index];
  if (stage === undefined) {
    yield text;
    return;
  }
  const last = index === stages.length - 1;
  let begins = first;
  for (const piece of stage(text, first)) {
    if (last) yield piece;
    else yield* runStages(piece, stages, index + 1, begins);
    begins = false;
  }
}

/** Function of a `pre_tokenizer` entry. Its second argument: the text is the beginning of the whole input. */
export function makePreTokenizer(
  component: Component | null,
  where: string,
): (text: string, first: boolean) => Iterable<string> {
  const stages = component === null ? [] : stagesOf(component, where);
  const only = stages[0];
  if (only === undefined) return (text) => [text];
  if (stages.length === 1) return only;
  return (text, first) => runStages(text, stages, 0, first);
}

/** Whether the pre-tokenizer works on bytes (GPT-2's alphabet) rather than on characters. */
export function isByteLevel(component: Component | null): boolean {
  if (component === null) return false;
  if (component.type === "ByteLevel") return true;
  const parts = component.pretokenizers;
  return Array.isArray(parts) && parts.some((part) => typeof part === "object" && part?.type === "ByteLevel");
}
