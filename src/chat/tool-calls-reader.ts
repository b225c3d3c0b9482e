// Reads text that is still arriving, character by character, as generators that pause where the text ends: words, and
// the literal values of a tool call, which come out as JSON while they are read. Python's and JSON's spellings are both
// taken (True and true, None and null, either quote), because models mix them.

/** Pauses (yields) when more text is needed. */
export type Reading<T> = Generator<void, T>;

/** Takes a piece of JSON. */
export type JsonSink = (json: string) => void;

/** Thrown inside the readers where the text is no call; the parser catches it, nobody else sees it. */
export class NotACall extends Error {}

/** Lists and objects inside each other. */
const MAX_DEPTH = 64;
/** Characters that may be held back before it is known whether they are a call. */
const MAX_HELD = 64 * 1024;
/** No number and no name is longer. */
const MAX_WORD = 128;

const WORDS: ReadonlyMap<string, string> = new Map([
  ["true", "true"],
  ["True", "true"],
  ["false", "false"],
  ["False", "false"],
  ["null", "null"],
  ["None", "null"],
]);
const ESCAPES: ReadonlyMap<string, string> = new Map([
  ["n", "\\n"],
  ["t", "\\t"],
  ["r", "\\r"],
  ["b", "\\b"],
  ["f", "\\f"],
  ["0", "\\u0000"],
  ["a", "\\u0007"],
  ["v", "\\u000b"],
  ["/", "/"],
  ["'", "'"],
  ['"', '\\"'],
  ["\\", "\\\\"],
  ["\n", ""],
]);
const JSON_NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;
const LOOSE_NUMBER = /^[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?$/;

function escaped(character: string): string {
  if (character === '"') return '\\"';
  if (character === "\\") return "\\\\";
  if (character >= " ") return character;
  return `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
}

export class CallReader {
  #text = "";
  #at = 0;
  #mark: number | undefined;
  #ended = false;

  push(text: string): void {
    const from = this.#mark ?? this.#at;
    this.#text = this.#text.slice(from) + text;
    this.#at -= from;
    if (this.#mark !== undefined) this.#mark = 0;
  }

  /** No more text comes: readers see "" at the end instead of pausing. */
  end(): void {
    this.#ended = true;
  }

  /** Remembers this place for rewind(). */
  begin(): void {
    this.#mark = this.#at;
  }

  rewind(): void {
    this.#at = this.#mark ?? this.#at;
  }

  /** What was read since begin() is final. */
  commit(): void {
    this.#mark = undefined;
  }

  /** The text at hand, up to `stop` or its end, without pausing; "" if there is none or it begins with `stop`. */
  takeUntil(stop: string): string {
    const found = this.#text.indexOf(stop, this.#at);
    const text = this.#text.slice(this.#at, found < 0 ? undefined : found);
    this.#at += text.length;
    return text;
  }

  /** The character `ahead` of this place; "" after the end. */
  *peek(ahead = 0): Reading<string> {
    if (this.#mark !== undefined && this.#at - this.#mark > MAX_HELD) throw new NotACall();
    while (this.#at + ahead >= this.#text.length) {
      if (this.#ended) return "";
      yield;
    }
    return this.#text.charAt(this.#at + ahead);
  }

  *take(): Reading<string> {
    const character = yield* this.peek();
    this.#at += character.length;
    return character;
  }

  *expect(character: string): Reading<void> {
    if ((yield* this.take()) !== character) throw new NotACall();
  }

  *space(): Reading<void> {
    while (/^\s$/.test(yield* this.peek())) this.#at += 1;
  }

  /** Takes `word` if it comes next; pauses only while it still may. */
  *literal(word: string): Reading<boolean> {
    for (let i = 0; i < word.length; i++) {
      if ((yield* this.peek(i)) !== word.charAt(i)) return false;
    }
    this.#at += word.length;
    return true;
  }

  /** Characters that match, at least one. */
  *word(pattern: RegExp): Reading<string> {
    let word = "";
    for (;;) {
      const character = yield* this.peek();
      if (character === "" || !pattern.test(character)) break;
      if (word.length >= MAX_WORD) throw new NotACall();
      word += character;
      this.#at += 1;
    }
    if (word === "") throw new NotACall();
    return word;
  }

  /** Any literal value. */
  *value(out: JsonSink, depth = 0): Reading<void> {
    if (depth > MAX_DEPTH) throw new NotACall();
    const first = yield* this.peek();
    if (first === '"' || first === "'") return yield* this.string(out);
    if (first === "{") return yield* this.object(out, depth);
    if (first === "[") return yield* this.#list(out, depth);
    if (/^[-+.\d]$/.test(first)) out(numberJson(yield* this.word(/[-+.\w]/)));
    else {
      const json = WORDS.get(yield* this.word(/\w/));
      if (json === undefined) throw new NotACall();
      out(json);
    }
  }

  *object(out: JsonSink, depth = 0): Reading<void> {
    yield* this.expect("{");
    out("{");
    for (let count = 0; ; count++) {
      yield* this.space();
      if ((yield* this.peek()) === "}") break;
      if (count > 0) out(",");
      yield* this.string(out);
      yield* this.space();
      yield* this.expect(":");
      out(":");
      yield* this.space();
      yield* this.value(out, depth + 1);
      yield* this.space();
      if (!(yield* this.literal(","))) break;
    }
    yield* this.expect("}");
    out("}");
  }

  *#list(out: JsonSink, depth: number): Reading<void> {
    yield* this.expect("[");
    out("[");
    for (let count = 0; ; count++) {
      yield* this.space();
      if ((yield* this.peek()) === "]") break;
      if (count > 0) out(",");
      yield* this.value(out, depth + 1);
      yield* this.space();
      if (!(yield* this.literal(","))) break;
    }
    yield* this.expect("]");
    out("]");
  }

  /** In either quotes, or three of them. Raw line breaks are taken: models write them. */
  *string(out: JsonSink): Reading<void> {
    const quote = yield* this.take();
    if (quote !== '"' && quote !== "'") throw new NotACall();
    out('"');
    let triple = false;
    if (yield* this.literal(quote)) {
      triple = yield* this.literal(quote);
      if (!triple) return out('"');
    }
    for (;;) {
      const character = yield* this.take();
      if (character === "") throw new NotACall();
      if (character === "\\") yield* this.#escape(out);
      else if (character !== quote) out(escaped(character));
      else if (!triple || (yield* this.literal(quote + quote))) return out('"');
      else out(escaped(character));
    }
  }

  *#escape(out: JsonSink): Reading<void> {
    const kind = yield* this.take();
    if (kind === "") throw new NotACall();
    if (kind === "u" || kind === "x") {
      let digits = "";
      while (digits.length < (kind === "u" ? 4 : 2)) digits += yield* this.#hexDigit();
      out(`\\u${digits.padStart(4, "0")}`);
      return;
    }
    // An unknown escape is its two characters, as in Python.
    out(ESCAPES.get(kind) ?? `\\\\${escaped(kind)}`);
  }

  *#hexDigit(): Reading<string> {
    const digit = yield* this.take();
    if (!/^[0-9a-fA-F]$/.test(digit)) throw new NotACall();
    return digit;
  }
}

function numberJson(text: string): string {
  if (JSON_NUMBER.test(text)) return text;
  const value = LOOSE_NUMBER.test(text) ? Number(text.replaceAll("_", "")) : Number.NaN;
  if (!Number.isFinite(value)) throw new NotACall();
  return String(value);
}
