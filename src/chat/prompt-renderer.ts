// Chat messages to a prompt's text by the model's own template. What clients wrote is marked in it where it must not become
// a special token.
//
// How: before rendering, every string that a client wrote is searched for the text of added tokens. Where there is one
// (or the beginning of one at the end of the string, which the next string could complete), a guard (guards.ts) breaks it.
// The rendered text is cut at added tokens, the guards are taken out, and what lies between is encoded as ordinary text.
// Strings without such text are not touched, so an ordinary conversation is exactly what Hugging Face makes of it. A
// template that could put a token together out of harmless strings (template-risk.ts) gets them guarded everywhere; one that
// turns out to cut texts at positions gets them with stand-ins, which keep all positions.
import { CaravanError } from "../errors.ts";
import { WorkLimit } from "../work-limit.ts";
import { AddedTokens } from "./added-tokens.ts";
import { cuts, guarded, guardedEverywhere, privateUse, StandIns, unusedCharacter } from "./guards.ts";
import { DEFAULT_LIMITS, SandboxedTemplate, type SandboxLimits, TimeLimitError } from "./jinja-sandbox.ts";
import { type Json, normaliseMessages, normaliseTools, type TemplateMessage, toJson } from "./messages.ts";
import { makeNormalizer, type Normalize } from "./pretokenizer.ts";
import { buildsText } from "./template-risk.ts";
import type { AddedToken, TokenizerFiles } from "./tokenizer-files.ts";

/** What a client asks for; further keys are variables of the template (`date_string`, `tools_in_user_message` …). */
export interface ChatInput {
  readonly messages: unknown;
  readonly tools?: unknown;
  /** End the prompt with the beginning of a reply (default true). */
  readonly add_generation_prompt?: boolean;
  readonly [variable: string]: unknown;
}

/** A prompt whose text still has its guards; "": there are none. */
export interface GuardedText {
  readonly text: string;
  readonly guard: string;
}

/** What a renderer is made from: of the tokenizer's files the small part. Can be posted to another thread. */
export type TemplateFiles = Pick<
  TokenizerFiles,
  "where" | "namedTokens" | "chatTemplates" | "addedTokens" | "normalizer"
>;

export function templateFiles(files: TokenizerFiles): TemplateFiles {
  const { where, namedTokens, chatTemplates, addedTokens, normalizer } = files;
  return { where, namedTokens, chatTemplates, addedTokens, normalizer };
}

const RESERVED = new Set([
  "messages",
  "tools",
  "documents",
  "bos_token",
  "eos_token",
  "unk_token",
  "pad_token",
]);

type MarkString = (text: string, role: string | null) => string;

/** How a client's text is marked before the template has it, and how that becomes guards in what the template makes of it. */
interface Way {
  readonly mark: MarkString;
  readonly finish: (text: string) => string;
}

interface Compiled {
  readonly source: string;
  readonly template: SandboxedTemplate;
  /** It may build the text of a special token out of strings that have none. */
  readonly risky: boolean;
}

export class PromptRenderer {
  readonly files: TemplateFiles;
  readonly #compiled = new Map<string, Compiled>();
  readonly #all: AddedTokens;
  readonly #specials: AddedTokens;
  /** Only where added tokens are looked for in normalized text. */
  readonly #normalize: Normalize | null;

  constructor(files: TemplateFiles) {
    this.files = files;
    const whole = (token: AddedToken): AddedToken => ({ ...token, single_word: false });
    this.#all = new AddedTokens(files.addedTokens.map(whole));
    this.#specials = new AddedTokens(files.addedTokens.filter((token) => token.special).map(whole));
    this.#normalize = files.addedTokens.some((token) => token.normalized)
      ? makeNormalizer(files.normalizer, files.where)
      : null;
  }

  /** Whether the model's folder has a template at all. */
  get exists(): boolean {
    return Object.keys(this.files.chatTemplates).length > 0;
  }

  /**
   * `limits.maxTimeMs` is for all of it. Errors: invalid_argument (messages), unsupported_parameter (tools, where the
   * template takes none), unsupported_model (no template), bad_file (broken template, or one that passes a limit).
   */
  render(input: ChatInput, limits: SandboxLimits = DEFAULT_LIMITS): GuardedText {
    const time = new WorkLimit(limits.maxTimeMs);
    const { messages, tools, add_generation_prompt = true, ...rest } = input;
    const checked = normaliseMessages(messages);
    const checkedTools = normaliseTools(tools);
    const extra: Record<string, Json> = {};
    for (const [name, value] of Object.entries(rest)) {
      if (RESERVED.has(name)) {
        throw new CaravanError("invalid_argument", `the template variable ${name} is set by the server`, {
          param: name,
        });
      }
      if (value !== undefined) extra[name] = toJson(value, name);
    }
    const { source, template, risky } = this.#template(checkedTools !== null);
    if (checkedTools !== null && !/\btools\b/.test(source)) {
      throw new CaravanError(
        "unsupported_parameter",
        "tools: the model's chat template has no place for tools",
        {
          param: "tools",
          hint: "Choose a model that was trained to call tools, or describe them in the system message.",
        },
      );
    }
    const inputLength = textLength([checked as Json[], checkedTools, extra]);
    const observed = { cutsText: false };
    const run = (mark: MarkString): string => {
      const variables: Record<string, unknown> = {
        ...(mapStrings(extra, null, mark) as Record<string, Json>),
        messages: checked.map((message) => markMessage(message, mark)),
        tools: mapStrings(checkedTools, null, mark),
        documents: null,
        add_generation_prompt,
      };
      for (const [name, value] of Object.entries(this.files.namedTokens))
        if (value !== null) variables[name] = value;
      const left = { ...limits, maxTimeMs: time.leftMs };
      return template.render(variables, inputLength, left, observed);
    };

    const used = new Set<string>();
    let hostile = false;
    const inspect: MarkString = (text) => {
      for (const character of privateUse(text)) used.add(character);
      hostile ||= cuts(text, this.#all, true).length > 0 || this.#becomesHostile(text);
      return text;
    };
    inspect(source, null);
    hostile = false;
    for (const message of checked) markMessage(message, inspect);
    mapStrings(checkedTools, null, inspect);
    mapStrings(extra, null, inspect);
    const plain = run((text) => text);
    if (!hostile && !risky && !observed.cutsText) return { text: plain, guard: "" };

    const guard = unusedCharacter(used);
    const mark = (text: string, tokens: AddedTokens): string =>
      this.#becomesHostile(text) ? guardedEverywhere(text, guard) : guarded(text, tokens, guard);
    // The template may look into the text, typically for `</think>` in an earlier reply, and guards are in its way: then
    // the next way is tried, with fewer of them. In replies, which the model wrote, only special tokens need a guard.
    const replies: MarkString = (text, role) => mark(text, role === "assistant" ? this.#specials : this.#all);
    const asGuarded = (way: MarkString): Way => ({ mark: way, finish: (text) => text });
    const ways: Way[] = [];
    if (risky)
      ways.push(
        asGuarded((text) => guardedEverywhere(text, guard)),
        asGuarded((text, role) =>
          role === "assistant" ? replies(text, role) : guardedEverywhere(text, guard),
        ),
      );
    if (observed.cutsText) ways.push(...this.#standInWays(new Set([...used, guard]), guard));
    const usual =
      ways.push(
        asGuarded((text) => mark(text, this.#all)),
        asGuarded(replies),
      ) - 2;
    let fallback: string | undefined;
    for (const [index, way] of ways.entries()) {
      let marked: string;
      try {
        marked = way.finish(run(way.mark));
      } catch (thrown) {
        // It looked for something that marks hide, and took it for granted.
        if (index < usual && !isTimeLimit(thrown)) continue;
        throw thrown;
      }
      if (marked.replaceAll(guard, "") === plain) return { text: marked, guard };
      if (index === usual) fallback = marked;
    }
    // None leaves the prompt as it was: what is marked stays ordinary, whatever the template then makes of the rest.
    return { text: fallback ?? plain, guard };
  }

  /** Ways with stand-ins: everywhere, and everywhere but in harmless replies, which templates look into. */
  #standInWays(used: ReadonlySet<string>, guard: string): Way[] {
    const contents = this.files.addedTokens.map(({ content }) => content);
    const standIns = StandIns.of(contents, used);
    if (standIns === undefined) return [];
    const finish = (text: string): string => standIns.guarded(text, guard);
    const put = (text: string): string =>
      this.#becomesHostile(text) ? guardedEverywhere(text, guard) : standIns.put(text);
    const replies: MarkString = (text, role) =>
      role === "assistant" && cuts(text, this.#specials, true).length === 0 ? text : put(text);
    return [
      { mark: put, finish },
      { mark: replies, finish },
    ];
  }

  /** Whether there is an added token's text in what the normalizer makes of `text`. */
  #becomesHostile(text: string): boolean {
    if (this.#normalize === null) return false;
    const normal = this.#normalize(text);
    return normal !== text && cuts(normal, this.#all, true).length > 0;
  }

  #template(withTools: boolean): Compiled {
    const { chatTemplates, where } = this.files;
    const names = Object.keys(chatTemplates);
    const wanted = withTools ? ["tool_use", "default"] : ["default"];
    const name = wanted.find((candidate) => names.includes(candidate)) ?? names[0];
    const source = name === undefined ? undefined : chatTemplates[name];
    if (name === undefined || source === undefined) {
      throw new CaravanError("unsupported_model", "the model has no chat template", {
        where,
        hint: "It is a base model: use /v1/completions, or put a chat_template.jinja into its folder.",
      });
    }
    let compiled = this.#compiled.get(name);
    if (compiled === undefined) {
      const template = new SandboxedTemplate(source, where);
      compiled = { source, template, risky: buildsText(template.program, this.#all) };
      this.#compiled.set(name, compiled);
    }
    return compiled;
  }
}

/** Whether `thrown` says that the template took too long. */
export function isTimeLimit(thrown: unknown): boolean {
  return thrown instanceof CaravanError && thrown.cause instanceof TimeLimitError;
}

/** Roles are from a fixed list and templates build names from them: they stay as they are. */
function markMessage(message: TemplateMessage, mark: MarkString): Json {
  const { role, ...rest } = message;
  return { role, ...(mapStrings(rest, role, mark) as { [key: string]: Json }) };
}

/** Keys that templates look up: words of the API and of JSON Schema. */
const FIELDS = new Set([
  ...["role", "content", "name", "reasoning_content", "tool_call_id", "tool_calls", "id", "type", "function"],
  ...[
    "arguments",
    "description",
    "parameters",
    "properties",
    "required",
    "items",
    "enum",
    "default",
    "strict",
  ],
  ...["anyOf", "oneOf", "allOf", "$defs", "$ref", "additionalProperties", "format", "title", "return"],
]);

/** Copy of a JSON value with every string replaced, and every key that a client made up. */
function mapStrings(value: Json, role: string | null, mark: MarkString): Json {
  if (typeof value === "string") return mark(value, role);
  if (Array.isArray(value)) return value.map((item) => mapStrings(item, role, mark));
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [
      FIELDS.has(key) ? key : mark(key, role),
      mapStrings(item, role, mark),
    ]),
  );
}

/** Characters in all strings and keys, and one for every other value. */
function textLength(value: Json): number {
  if (typeof value === "string") return value.length;
  if (Array.isArray(value)) return value.reduce<number>((sum, item) => sum + textLength(item), 1);
  if (typeof value !== "object" || value === null) return 1;
  return Object.entries(value).reduce((sum, [key, item]) => sum + key.length + textLength(item) + 1, 1);
}
