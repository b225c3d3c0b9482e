// Parses JSON in slices, so that a body of tens of megabytes holds up no stream: between two slices the event loop turns.
// The text is cut at the commas of its large lists and objects; what lies between goes to JSON.parse, which thereby judges
// the syntax of everything but the cuts.

import {
  BACKSLASH,
  CLOSE_LIST,
  CLOSE_OBJECT,
  COMMA,
  OPEN_LIST,
  OPEN_OBJECT,
  QUOTE,
} from "./json-characters.ts";

/** Longest stretch that is parsed at once, in UTF-16 units. Worst known: 40 ns a unit, for short texts that all differ. */
const PIECE = 1 << 16;
/** Time for one slice. */
const SLICE_MS = 4;
/** Characters that are looked at between two looks at the clock. */
const STRIDE = 1 << 14;

const LETTER_U = 0x75;

type Steps<T> = Generator<void, T, void>;

/** What JSON.parse gives; rejects with its SyntaxError, whose position may be that in a piece. The text may be nested no
 * deeper than the stack allows (json-bounds.ts). */
export async function parseInSlices(text: string): Promise<unknown> {
  if (text.length <= PIECE) return JSON.parse(text);
  const steps = parse(text);
  let start = performance.now();
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
    if (performance.now() - start < SLICE_MS) continue;
    await new Promise<void>((resolve) => setImmediate(resolve));
    start = performance.now();
  }
}

function* parse(text: string): Steps<unknown> {
  const large = yield* largeValues(text);
  const at = text.search(/[^ \t\n\r]/);
  const end = large.get(at);
  if (end === undefined) return JSON.parse(text);
  const value = yield* new LargeParser(text, large).value(at, end);
  if (!isBlank(text, end, text.length)) throw new SyntaxError("Unexpected text behind the JSON value");
  return value;
}

/** Where each list, object and string of more than PIECE characters begins, and where it ends (behind its last character). */
function* largeValues(text: string): Steps<Map<number, number>> {
  const large = new Map<number, number>();
  const open: number[] = [];
  let looked = 0;
  for (let at = 0; at < text.length; at++) {
    if (at - looked >= STRIDE) {
      looked = at;
      yield;
    }
    const unit = text.charCodeAt(at);
    let start: number | undefined;
    if (unit === QUOTE) {
      start = at;
      at = (yield* stringEnd(text, at)) - 1;
    } else if (unit === OPEN_LIST || unit === OPEN_OBJECT) open.push(at);
    else if (unit === CLOSE_LIST || unit === CLOSE_OBJECT) {
      start = open.pop();
      // Brackets of one kind are two apart in ASCII.
      if (start === undefined || text.charCodeAt(start) !== unit - 2)
        throw new SyntaxError("Unexpected bracket");
    }
    if (start !== undefined && at - start > PIECE) large.set(start, at + 1);
  }
  if (open.length > 0) throw new SyntaxError("Unexpected end of the text");
  return large;
}

/** Behind the closing quote of the string that begins at `start`. */
function* stringEnd(text: string, start: number): Steps<number> {
  let looked = start;
  for (let at = text.indexOf('"', start + 1); at >= 0; at = text.indexOf('"', at + 1)) {
    if (backslashesBefore(text, at, start) % 2 === 0) return at + 1;
    if (at - looked < STRIDE) continue;
    looked = at;
    yield;
  }
  throw new SyntaxError("Unterminated string");
}

/** How many stand right before `at`, but none before `least`. */
function backslashesBefore(text: string, at: number, least: number): number {
  let from = at;
  while (from > least && text.charCodeAt(from - 1) === BACKSLASH) from--;
  return at - from;
}

function isBlank(text: string, from: number, to: number): boolean {
  return !/[^ \t\n\r]/.test(text.slice(from, to));
}

class LargeParser {
  readonly #text: string;
  readonly #large: ReadonlyMap<number, number>;

  constructor(text: string, large: ReadonlyMap<number, number>) {
    this.#text = text;
    this.#large = large;
  }

  /** The large value from `start` to `end`. */
  *value(start: number, end: number): Steps<unknown> {
    const first = this.#text.charCodeAt(start);
    if (first === QUOTE) return yield* this.#string(start, end);
    return first === OPEN_LIST ? yield* this.#list(start, end) : yield* this.#object(start, end);
  }

  /** In parts, which are cut where no escape is. */
  *#string(start: number, end: number): Steps<string> {
    const parts: string[] = [];
    for (let from = start + 1; from < end - 1; ) {
      const to = Math.min(end - 1, this.#behindEscape(from + PIECE, from));
      parts.push(String(JSON.parse(`"${this.#text.slice(from, to)}"`)));
      from = to;
      yield;
    }
    return parts.join("");
  }

  /** `at`, or the end of the escape that it is in. No escape reaches over `least`, so nothing before it is looked at again. */
  #behindEscape(at: number, least: number): number {
    const text = this.#text;
    if (backslashesBefore(text, at, least) % 2 === 1) return at + (text.charCodeAt(at) === LETTER_U ? 5 : 1);
    for (let back = 1; back <= 4; back++)
      if (text.charCodeAt(at - back) === LETTER_U && backslashesBefore(text, at - back, least) % 2 === 1)
        return at - back + 5;
    return at;
  }

  *#list(start: number, end: number): Steps<unknown[]> {
    const list: unknown[] = [];
    for (const stretch of this.#stretches(start, end)) {
      if (stretch === undefined) yield;
      else if (!stretch.large) {
        const piece = JSON.parse(`[${this.#text.slice(stretch.from, stretch.to)}]`) as unknown[];
        if (piece.length === 0 && !isAll(stretch, start, end))
          throw new SyntaxError("Unexpected comma in a list");
        for (const each of piece) list.push(each);
        yield;
      } else {
        if (!isBlank(this.#text, stretch.before, stretch.from))
          throw new SyntaxError("Unexpected text in a list");
        list.push(yield* this.value(stretch.from, stretch.to));
      }
    }
    return list;
  }

  *#object(start: number, end: number): Steps<Record<string, unknown>> {
    const object: Record<string, unknown> = {};
    for (const stretch of this.#stretches(start, end)) {
      if (stretch === undefined) yield;
      else if (!stretch.large) {
        const piece = JSON.parse(`{${this.#text.slice(stretch.from, stretch.to)}}`) as object;
        const entries = Object.entries(piece);
        if (entries.length === 0 && !isAll(stretch, start, end))
          throw new SyntaxError("Unexpected comma in an object");
        for (const [key, value] of entries) put(object, key, value);
        yield;
      } else {
        // `null` goes on with nothing that may have begun before it, as a digit would.
        const head = JSON.parse(`{${this.#text.slice(stretch.before, stretch.from)}null}`) as object;
        const [key, ...more] = Object.keys(head);
        if (key === undefined || more.length > 0) throw new SyntaxError("Unexpected text in an object");
        put(object, key, yield* this.value(stretch.from, stretch.to));
      }
    }
    return object;
  }

  /**
   * The elements of a large list or object: stretches of whole elements that fit a piece, and single large values, of which
   * `before` says where their element begins (with its key, in an object). `undefined` is a pause.
   */
  *#stretches(start: number, end: number): Generator<Stretch | undefined> {
    const text = this.#text;
    /** Where the elements begin that have not been handed out, and the last of them. */
    let from = start + 1;
    let element = from;
    let depth = 0;
    let looked = from;
    /** The element is a large value that has been handed out: only a comma or the end may follow. */
    let behindLarge = -1;
    for (let at = from; at < end; at++) {
      if (at - looked >= STRIDE) {
        looked = at;
        yield undefined;
      }
      const unit = text.charCodeAt(at);
      const large = this.#large.get(at);
      const isValue = large !== undefined && (unit !== QUOTE || !isKey(text, large));
      if (isValue) {
        if (depth > 0 || behindLarge >= 0) throw new SyntaxError("Unexpected value");
        if (element > from) yield { large: false, from, to: element - 1 };
        yield { large: true, before: element, from: at, to: large };
        at = large - 1;
        looked = at;
        behindLarge = large;
      } else if (unit === QUOTE) at = (large ?? (yield* pauses(stringEnd(text, at)))) - 1;
      else if (unit === OPEN_LIST || unit === OPEN_OBJECT) depth++;
      else if (unit === CLOSE_LIST || unit === CLOSE_OBJECT) depth--;
      const ended = depth < 0;
      if (!ended && (depth > 0 || unit !== COMMA || isValue)) continue;
      if (behindLarge >= 0) {
        if (!isBlank(text, behindLarge, at)) throw new SyntaxError("Unexpected text behind a value");
        behindLarge = -1;
        if (ended) return;
        from = at + 1;
      } else if (ended || at - from > PIECE) {
        yield { large: false, from, to: at };
        from = at + 1;
      }
      element = at + 1;
    }
  }
}

type Stretch =
  | { large: false; from: number; to: number }
  | { large: true; before: number; from: number; to: number };

/** Whether a stretch is all that stands between the brackets at `start` and before `end`: only then may it be blank. */
function isAll({ from, to }: Stretch, start: number, end: number): boolean {
  return from === start + 1 && to === end - 1;
}

/** Whether a colon follows the string that ends at `end`. */
function isKey(text: string, end: number): boolean {
  let at = end;
  while (at < text.length && " \t\n\r".includes(text.charAt(at))) at++;
  return text.charAt(at) === ":";
}

/** The steps' pauses as pauses of a generator that also gives something else. */
function* pauses<T>(steps: Steps<T>): Generator<undefined, T, void> {
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
    yield undefined;
  }
}

/** As JSON.parse does it: `__proto__` is a key like any other, the last of equal keys counts. */
function put(object: Record<string, unknown>, key: string, value: unknown): void {
  if (key !== "__proto__") object[key] = value;
  else Object.defineProperty(object, key, { value, enumerable: true, configurable: true, writable: true });
}
