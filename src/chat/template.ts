// Chat messages to a prompt by the model's own template, and to ids in which only the template's own words are special
// tokens.
//
// How: before rendering, every string that a client wrote is searched for the text of added tokens. Where there is one
// (or the beginning of one at the end of the string, which the next string could complete), a *guard* character is put
// after its first character: a private-use character that occurs nowhere in the input. The rendered text is cut at added
// tokens (a guard inside breaks the match), the guards are taken out, and what lies between is encoded as ordinary text.
// Strings without such text are not touched, so an ordinary conversation is exactly what Hugging Face makes of it.
import { CaravanError } from "../errors.ts";
import { AddedTokens, characterLength } from "./added-tokens.ts";
import { SandboxedTemplate, type SandboxLimits } from "./jinja-sandbox.ts";
import { type Json, normaliseMessages, normaliseTools, type TemplateMessage, toJson } from "./messages.ts";
import type { Tokenizer } from "./tokenizer.ts";
import type { AddedToken, TokenizerFiles } from "./tokenizer-files.ts";

/** What a client asks for; further keys are variables of the template (`date_string`, `tools_in_user_message` …). */
export interface ChatInput {
  readonly messages: unknown;
  readonly tools?: unknown;
  /** End the prompt with the beginning of a reply (default true). */
  readonly add_generation_prompt?: boolean;
  readonly [variable: string]: unknown;
}

export interface RenderedChat {
  readonly text: string;
  readonly ids: number[];
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

export class ChatTemplate {
  readonly #tokenizer: Tokenizer;
  /** Only these: the rest of the files (vocabulary, merges) is large and must not stay in memory. */
  readonly #files: Pick<TokenizerFiles, "where" | "namedTokens" | "chatTemplates">;
  readonly #compiled = new Map<string, SandboxedTemplate>();
  readonly #all: AddedTokens;
  readonly #specials: AddedTokens;
  readonly #limits: SandboxLimits | undefined;

  constructor(files: TokenizerFiles, tokenizer: Tokenizer, limits?: SandboxLimits) {
    const { where, namedTokens, chatTemplates } = files;
    this.#files = { where, namedTokens, chatTemplates };
    this.#tokenizer = tokenizer;
    this.#limits = limits;
    const whole = (token: AddedToken): AddedToken => ({ ...token, single_word: false });
    this.#all = new AddedTokens(files.addedTokens.map(whole));
    this.#specials = new AddedTokens(files.addedTokens.filter((token) => token.special).map(whole));
  }

  /** Whether the model's folder has a template at all. */
  get exists(): boolean {
    return Object.keys(this.#files.chatTemplates).length > 0;
  }

  /**
   * Errors: invalid_argument (messages), unsupported_parameter (tools, where the template takes none),
   * unsupported_model (no template), bad_file (broken template).
   */
  renderChat(input: ChatInput): RenderedChat {
    const steps = this.renderChatSteps(input);
    for (;;) {
      const step = steps.next();
      if (step.done) return step.value;
    }
  }

  /** The same, with pauses while the text is encoded (not while it is rendered). */
  *renderChatSteps(input: ChatInput): Generator<void, RenderedChat> {
    const { text, guard } = this.#render(input);
    yield;
    const ids = yield* this.#tokenizer.encodeWithSpecialsSteps(text, guard);
    return { text: guard === "" ? text : text.replaceAll(guard, ""), ids };
  }

  #render(input: ChatInput): { text: string; guard: string } {
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
    const [source, template] = this.#template(checkedTools !== null);
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
    const run = (mark: MarkString): string => {
      const variables: Record<string, unknown> = {
        ...(mapStrings(extra, null, mark) as Record<string, Json>),
        messages: checked.map((message) => markMessage(message, mark)),
        tools: mapStrings(checkedTools, null, mark),
        documents: null,
        add_generation_prompt,
      };
      for (const [name, value] of Object.entries(this.#files.namedTokens))
        if (value !== null) variables[name] = value;
      return template.render(variables, inputLength, this.#limits);
    };

    const used = new Set<string>();
    let hostile = false;
    const inspect: MarkString = (text) => {
      for (const character of text.match(PRIVATE_USE) ?? []) used.add(character);
      hostile ||= this.#cuts(text, this.#all, true).length > 0;
      return text;
    };
    inspect(source, null);
    hostile = false;
    for (const message of checked) markMessage(message, inspect);
    mapStrings(checkedTools, null, inspect);
    mapStrings(extra, null, inspect);
    const plain = run((text) => text);
    if (!hostile) return { text: plain, guard: "" };

    const guard = unusedCharacter(used);
    const marked = run((text) => this.#guarded(text, this.#all, guard));
    if (marked.replaceAll(guard, "") === plain) return { text: marked, guard };
    // The template looks into the text, typically for `</think>` in an earlier reply, and the guard is in its way. In
    // replies, which the model wrote, only special tokens need a guard.
    const lenient = run((text, role) =>
      this.#guarded(text, role === "assistant" ? this.#specials : this.#all, guard),
    );
    return { text: lenient.replaceAll(guard, "") === plain ? lenient : marked, guard };
  }

  /** Where guards go in `text`, in order. `onlyFirst`: stop at the first (to see whether there is any). */
  #cuts(text: string, tokens: AddedTokens, onlyFirst: boolean): number[] {
    const cuts: number[] = [];
    for (let at = 0; at < text.length && !(onlyFirst && cuts.length > 0); at++) {
      if (tokens.matchAt(text, at) !== null) cuts.push(at + characterLength(text, at));
    }
    // Templates trim: what the text ends with then counts too.
    for (const ending of new Set([text, text.trimEnd()])) {
      for (const at of tokens.partialEndings(ending)) cuts.push(at + characterLength(text, at));
    }
    return [...new Set(cuts)].sort((a, b) => a - b);
  }

  /** `text` with a guard in every added token's text and in every beginning of one at its end. */
  #guarded(text: string, tokens: AddedTokens, guard: string): string {
    const cuts = this.#cuts(text, tokens, false);
    if (cuts.length === 0) return text;
    const pieces: string[] = [];
    let done = 0;
    for (const cut of cuts) {
      pieces.push(text.slice(done, cut));
      done = cut;
    }
    pieces.push(text.slice(done));
    return pieces.join(guard);
  }

  #template(withTools: boolean): [source: string, compiled: SandboxedTemplate] {
    const { chatTemplates, where } = this.#files;
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
      compiled = new SandboxedTemplate(source, where);
      this.#compiled.set(name, compiled);
    }
    return [source, compiled];
  }
}

const PRIVATE_USE = /\p{Co}/gu;

/** A private-use character that is not in `used`. */
function unusedCharacter(used: ReadonlySet<string>): string {
  for (let code = 0xe000; code <= 0x10fffd; code++) {
    if (code === 0xf900) code = 0xf0000;
    if ((code & 0xfffe) === 0xfffe) continue;
    const character = String.fromCodePoint(code);
    if (!used.has(character)) return character;
  }
  throw new CaravanError("invalid_argument", "the messages use every private-use character of Unicode", {
    param: "messages",
  });
}

/** Roles are from a fixed list and templates build names from them: they stay as they are. */
function markMessage(message: TemplateMessage, mark: MarkString): Json {
  const { role, ...rest } = message;
  return { role, ...(mapStrings(rest, role, mark) as { [key: string]: Json }) };
}

/** Copy of a JSON value with every string and key replaced. */
function mapStrings(value: Json, role: string | null, mark: MarkString): Json {
  if (typeof value === "string") return mark(value, role);
  if (Array.isArray(value)) return value.map((item) => mapStrings(item, role, mark));
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [mark(key, role), mapStrings(item, role, mark)]),
  );
}

/** Characters in all strings and keys, and one for every other value. */
function textLength(value: Json): number {
  if (typeof value === "string") return value.length;
  if (Array.isArray(value)) return value.reduce<number>((sum, item) => sum + textLength(item), 1);
  if (typeof value !== "object" || value === null) return 1;
  return Object.entries(value).reduce((sum, [key, item]) => sum + key.length + textLength(item) + 1, 1);
}
