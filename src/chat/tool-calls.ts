// Finds tool calls in a model's answer while it arrives. Three forms, alone, in a row or in a list, with or without the
// markers that model families put around them (Llama 4's python_start and python_end, Llama 3's python_tag, tool_call):
//
//   [f(a=1), g(b="x")]    {"name": "f", "parameters": {"a": 1}}    <function=f>{"a": 1}</function>
//
// A call begins at the start of the answer, after a marker or after another call; the function tag and tool_call begin one
// anywhere. Text is held back only while it may still be the beginning of a call. A call is settled once its name is one
// of the offered functions and its arguments have begun: from there its arguments are passed on as they come. What breaks
// before that, or names another function, stays text; a call that breaks later keeps the arguments that it had, and what
// follows is text.
import { CallReader, type JsonSink, NotACall, type Reading } from "./tool-calls-reader.ts";

export type ToolCallEvent =
  | { type: "text"; text: string }
  /** A call begins. `index` counts the answer's calls from 0. */
  | { type: "call"; index: number; name: string }
  /** More of the JSON text of its arguments. */
  | { type: "arguments"; index: number; json: string };

/** Control tokens around calls: never text themselves, so a detokenizer has to show them to the parser. */
export const TOOL_CALL_MARKERS: readonly string[] = ["<|python_start|>", "<|python_end|>", "<|python_tag|>"];
const CLOSERS: readonly string[] = ["</function>", "</tool_call>"];
const OPENERS: readonly string[] = ["<function=", "<tool_call>"];
const NAME = /[\w.-]/;

/** Where the parser is: what may begin here besides text. */
type Place = "start" | "marked" | "after call" | "text";

export class ToolCallParser {
  readonly #names: ReadonlySet<string>;
  readonly #orForm: boolean;
  readonly #reader = new CallReader();
  readonly #reading: Reading<void>;
  #events: ToolCallEvent[] = [];
  #calls = 0;
  #settled = false;

  /** `names`: the functions that were offered. `orForm`: the answer is either calls, as {"name": …, "parameters": {…}}, or a JSON
   * value, in whose strings anything may stand; a value that begins as a call is one. */
  constructor(names: Iterable<string>, { orForm = false }: { orForm?: boolean } = {}) {
    this.#names = new Set(names);
    this.#orForm = orForm;
    this.#reading = this.#read();
  }

  /** Calls that have begun so far. */
  get calls(): number {
    return this.#calls;
  }

  /** Takes the next piece of the answer, cut anywhere. */
  push(text: string): ToolCallEvent[] {
    this.#reader.push(text);
    return this.#advance();
  }

  /** The answer is over: what was held back after all. Nothing may be pushed any more. */
  end(): ToolCallEvent[] {
    this.#reader.end();
    return this.#advance();
  }

  #advance(): ToolCallEvent[] {
    this.#reading.next();
    return this.#events.splice(0);
  }

  *#read(): Reading<void> {
    const reader = this.#reader;
    let place: Place = "start";
    for (;;) {
      if ((yield* reader.peek()) === "") return;
      if (place === "text") {
        this.#text(reader.takeUntil("<"));
        if ((yield* reader.peek()) !== "<") continue;
        reader.begin();
        const opens: boolean = !this.#orForm && (yield* this.#takeAny([...TOOL_CALL_MARKERS, ...OPENERS]));
        reader.rewind();
        reader.commit();
        if (opens) place = "start";
        else this.#text(yield* reader.take());
        continue;
      }
      reader.begin();
      this.#settled = false;
      try {
        place = yield* this.#marked(place);
        reader.commit();
      } catch (thrown) {
        if (!(thrown instanceof NotACall)) throw thrown;
        if (!this.#settled) reader.rewind();
        reader.commit();
        place = "text";
        // Its first character cannot begin a call a second time.
        if (!this.#settled) this.#text(yield* reader.take());
      }
    }
  }

  /** A marker or calls; the place after it. Throws NotACall. */
  *#marked(place: Place): Reading<Place> {
    const reader = this.#reader;
    yield* reader.space();
    if (place === "after call") {
      if (yield* this.#takeAny(CLOSERS)) return place;
      if (/^[;,]$/.test(yield* reader.peek())) {
        yield* reader.take();
        yield* reader.space();
      }
      if ((yield* reader.peek()) === "") return place;
    }
    if (yield* this.#takeAny(TOOL_CALL_MARKERS)) return "marked";
    yield* this.#form(place);
    return "after call";
  }

  *#form(place: Place): Reading<void> {
    const reader = this.#reader;
    if (this.#orForm) return yield* this.#jsonCall();
    let bare = place === "marked";
    if (yield* reader.literal("<tool_call>")) {
      yield* reader.space();
      bare = true;
    }
    const first = yield* reader.peek();
    if (first === "{") return yield* this.#jsonCall();
    if (first === "[") return yield* this.#list();
    if (first === "<") return yield* this.#tagCall();
    if (!bare) throw new NotACall();
    yield* this.#pythonCall();
  }

  *#list(): Reading<void> {
    const reader = this.#reader;
    yield* reader.expect("[");
    do {
      yield* reader.space();
      const first = yield* reader.peek();
      if (first === "]" && this.#settled) break;
      if (first === "{") yield* this.#jsonCall();
      else yield* this.#pythonCall();
      yield* reader.space();
    } while (yield* reader.literal(","));
    yield* reader.expect("]");
  }

  /** `{"name": …, "parameters": {…}}` in any order; `arguments` is another name for the parameters. */
  *#jsonCall(): Reading<void> {
    const reader = this.#reader;
    yield* reader.expect("{");
    let name: string | undefined;
    let sink: JsonSink | undefined;
    let early: string | undefined;
    for (;;) {
      yield* reader.space();
      if ((yield* reader.peek()) === "}") break;
      const spelled = yield* this.#collect((out) => reader.string(out));
      const key: unknown = JSON.parse(spelled);
      yield* reader.space();
      yield* reader.expect(":");
      yield* reader.space();
      // A form's strings may spell the same otherwise.
      if (this.#orForm && spelled !== (name === undefined ? '"name"' : '"parameters"')) throw new NotACall();
      if (key === "name" && name === undefined) {
        const text = yield* this.#collect((out) => reader.string(out));
        name = this.#known(JSON.parse(text));
        if (this.#orForm && text !== JSON.stringify(name)) throw new NotACall();
      } else if (key === "type" || (sink !== undefined && key !== "name" && !isArguments(key))) {
        yield* this.#collect((out) => reader.value(out));
      } else if (isArguments(key) && sink === undefined && early === undefined) {
        if (yield* reader.literal("null")) early = "{}";
        else if ((yield* reader.peek()) !== "{") throw new NotACall();
        else if (name === undefined) early = yield* this.#collect((out) => reader.object(out));
        else {
          sink = this.#settle(name);
          yield* reader.object(sink);
        }
      } else throw new NotACall();
      yield* reader.space();
      if (!(yield* reader.literal(","))) break;
    }
    yield* reader.expect("}");
    if (name === undefined || (this.#orForm && sink === undefined)) throw new NotACall();
    if (sink === undefined) this.#settle(name)(early ?? "{}");
  }

  /** `<function=f>{…}`; the closing tag may follow. */
  *#tagCall(): Reading<void> {
    const reader = this.#reader;
    if (!(yield* reader.literal("<function="))) throw new NotACall();
    const name = this.#known(yield* reader.word(NAME));
    yield* reader.expect(">");
    yield* reader.space();
    if ((yield* reader.peek()) !== "{") throw new NotACall();
    yield* reader.object(this.#settle(name));
  }

  /** `f(a=1, b="x")`: keyword arguments with literal values only. */
  *#pythonCall(): Reading<void> {
    const reader = this.#reader;
    const name = this.#known(yield* reader.word(NAME));
    yield* reader.expect("(");
    yield* reader.space();
    let sink: JsonSink | undefined;
    const seen = new Set<string>();
    while ((yield* reader.peek()) !== ")") {
      const keyword = yield* reader.word(/\w/);
      if (seen.has(keyword)) throw new NotACall();
      yield* reader.space();
      yield* reader.expect("=");
      yield* reader.space();
      const start = `${seen.size === 0 ? "{" : ","}${JSON.stringify(keyword)}:`;
      seen.add(keyword);
      if (/^["'[{]$/.test(yield* reader.peek())) {
        sink ??= this.#settle(name);
        sink(start);
        yield* reader.value(sink);
      } else {
        // A word or number says only at its end whether it is a literal.
        const value: string = yield* this.#collect((out) => reader.value(out));
        sink ??= this.#settle(name);
        sink(start + value);
      }
      yield* reader.space();
      if (!(yield* reader.literal(","))) break;
      yield* reader.space();
    }
    yield* reader.expect(")");
    sink ??= this.#settle(name);
    sink(seen.size === 0 ? "{}" : "}");
  }

  *#collect(read: (out: JsonSink) => Reading<void>): Reading<string> {
    let json = "";
    yield* read((piece) => {
      json += piece;
    });
    return json;
  }

  *#takeAny(words: readonly string[]): Reading<boolean> {
    for (const word of words) if (yield* this.#reader.literal(word)) return true;
    return false;
  }

  /** The offered function of that name; built-in tools are written `name.call(…)`. Throws NotACall. */
  #known(name: unknown): string {
    if (typeof name === "string") {
      if (this.#names.has(name)) return name;
      const base = name.replace(/\.call$/, "");
      if (this.#names.has(base)) return base;
    }
    throw new NotACall();
  }

  /** From here on it is a call. The result takes its arguments. */
  #settle(name: string): JsonSink {
    const index = this.#calls;
    this.#calls += 1;
    this.#settled = true;
    this.#reader.commit();
    this.#events.push({ type: "call", index, name });
    return (json) => {
      const last = this.#events.at(-1);
      if (last?.type === "arguments" && last.index === index) last.json += json;
      else this.#events.push({ type: "arguments", index, json });
    };
  }

  #text(text: string): void {
    if (text === "") return;
    const last = this.#events.at(-1);
    if (last?.type === "text") last.text += text;
    else this.#events.push({ type: "text", text });
  }
}

function isArguments(key: unknown): boolean {
  return key === "parameters" || key === "arguments";
}
