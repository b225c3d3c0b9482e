import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { Detokenizer } from "../../src/chat/detokenizer.ts";
import { ChatTemplate } from "../../src/chat/template.ts";
import { Tokenizer } from "../../src/chat/tokenizer.ts";
import { readTokenizerFiles } from "../../src/chat/tokenizer-files.ts";
import { TOOL_CALL_MARKERS, ToolCallParser } from "../../src/chat/tool-calls.ts";
import { REAL_MODELS } from "./chat-folders.ts";

interface Found {
  text: string;
  calls: { name: string; arguments: string }[];
}

/** Of the real models, those whose template tells of tools. */
const TAKES_TOOLS = new Set(["llama4"]);
const NAMES = ["get_weather", "add", "brave_search", "ns.read"];

function parsePieces(pieces: readonly string[]): Found {
  const parser = new ToolCallParser(NAMES);
  const found: Found = { text: "", calls: [] };
  for (const event of [...pieces.flatMap((piece) => parser.push(piece)), ...parser.end()]) {
    if (event.type === "text") found.text += event.text;
    else if (event.type === "call") {
      expect(event.index).toBe(found.calls.length);
      found.calls.push({ name: event.name, arguments: "" });
    } else {
      const call = found.calls[event.index];
      if (call === undefined) throw new Error("arguments before their call");
      call.arguments += event.json;
    }
  }
  expect(parser.calls).toBe(found.calls.length);
  return found;
}

/** Calls with their arguments as values. */
function parse(text: string): [string, unknown][] {
  const found = parsePieces([text]);
  expect(found.text).toBe("");
  return found.calls.map((call) => [call.name, JSON.parse(call.arguments)]);
}

const WEATHER: [string, unknown] = ["get_weather", { city: "Rome" }];
const ADD: [string, unknown] = ["add", { a: 1, b: -2.5 }];

const FORMS: [text: string, calls: [string, unknown][]][] = [
  ['[get_weather(city="Rome")]', [WEATHER]],
  ["[get_weather(city='Rome'), add(a=1, b=-2.5)]", [WEATHER, ADD]],
  ["[add()]", [["add", {}]]],
  ['{"name": "get_weather", "parameters": {"city": "Rome"}}', [WEATHER]],
  ['{"type": "function", "name": "get_weather", "arguments": {"city": "Rome"}}', [WEATHER]],
  ['{"parameters": {"city": "Rome"}, "name": "get_weather"}', [WEATHER]],
  ['{"name": "add"}', [["add", {}]]],
  ['{"name": "add", "parameters": null}', [["add", {}]]],
  [
    '{"name": "get_weather", "parameters": {"city": "Rome"}}{"name": "add", "parameters": {"a": 1, "b": -2.5}}',
    [WEATHER, ADD],
  ],
  [
    '{"name": "get_weather", "parameters": {"city": "Rome"}};\n{"name": "add", "parameters": {"a": 1, "b": -2.5}}\n',
    [WEATHER, ADD],
  ],
  [
    '[{"name": "get_weather", "parameters": {"city": "Rome"}}, {"name": "add", "arguments": {"a": 1, "b": -2.5}}]',
    [WEATHER, ADD],
  ],
  ['<function=get_weather>{"city": "Rome"}</function>', [WEATHER]],
  ['<function=get_weather>{"city": "Rome"}</function>\n<function=add>{"a": 1, "b": -2.5}', [WEATHER, ADD]],
  ['<|python_start|>[get_weather(city="Rome")]<|python_end|>', [WEATHER]],
  ['<|python_start|><|python_end|>{"name": "get_weather", "parameters": {"city": "Rome"}}', [WEATHER]],
  ['<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}', [WEATHER]],
  ['<|python_tag|>brave_search.call(query="x")', [["brave_search", { query: "x" }]]],
  ['<|python_start|>get_weather(city="Rome")<|python_end|>', [WEATHER]],
  ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>', [WEATHER]],
  ['[ns.read(path="a")]', [["ns.read", { path: "a" }]]],
  [
    "[add(a=[True, false, None, null, {'x': \"it's\"}], b=1_000, c=.5, d=+2, e=1e3,)]",
    [["add", { a: [true, false, null, null, { x: "it's" }], b: 1000, c: 0.5, d: 2, e: 1000 }]],
  ],
  [
    String.raw`[add(a="q\"\\\n\u00e9\x41\d", b='''tri"ple''s''')]`,
    [["add", { a: 'q"\\\néA\\d', b: "tri\"ple''s" }]],
  ],
  ['[add(a="line\nbreak\ttab 😀", b="")]', [["add", { a: "line\nbreak\ttab 😀", b: "" }]]],
];

const TEXTS = [
  "",
  "Hello.",
  "  Hello",
  "[1] is a reference",
  "[get_weather]",
  "[get_weather(city)]",
  "[get_weather(city=Rome)]",
  "[get_weather('Rome')]",
  '[no_such(city="Rome")]',
  '{"name": "no_such", "parameters": {"city": "Rome"}}',
  '{"city": "Rome"}',
  '{"name": "get_weather", "city": "Rome"}',
  '{"name": "get_weather", "parameters": "Rome"}',
  '{"name": "get_weather"',
  "<function=no_such>{}</function>",
  "<function=get_weather>no</function>",
  "<b>bold</b> a < b <",
  "<tool_call>nothing</tool_call>",
  'I would call [get_weather(city="Rome")] here',
  "get_weather(city='Rome')",
];

describe("calls are found in", () => {
  for (const [text, calls] of FORMS) test(JSON.stringify(text), () => expect(parse(text)).toEqual(calls));
});

describe("text stays as it is:", () => {
  for (const text of TEXTS)
    test(JSON.stringify(text), () => expect(parsePieces([text])).toEqual({ text, calls: [] }));
});

test("text before a marker or a function tag and after a call is passed on", () => {
  const call = { name: "add", arguments: "{}" };
  expect(parsePieces(["Let me see. <|python_start|>[add()]<|python_end|>"])).toEqual({
    text: "Let me see. ",
    calls: [call],
  });
  expect(parsePieces(["First <function=add>{}</function> then"])).toEqual({
    text: "First  then",
    calls: [call],
  });
  expect(parsePieces(["<|python_start|>Thinking<|python_end|>[add()], done"])).toEqual({
    text: "Thinking, done",
    calls: [call],
  });
});

test("text is held back only until it is settled, and arguments stream", () => {
  const parser = new ToolCallParser(NAMES);
  expect(parser.push("Hel")).toEqual([{ type: "text", text: "Hel" }]);
  expect(parser.push("lo <")).toEqual([{ type: "text", text: "lo " }]);
  expect(parser.push("3")).toEqual([{ type: "text", text: "<3" }]);
  const calling = new ToolCallParser(NAMES);
  expect(calling.push('{"name": "get_weather", "param')).toEqual([]);
  expect(calling.push('eters": {"city": "Ro')).toEqual([
    { type: "call", index: 0, name: "get_weather" },
    { type: "arguments", index: 0, json: '{"city":"Ro' },
  ]);
  expect(calling.push("me")).toEqual([{ type: "arguments", index: 0, json: "me" }]);
  expect(calling.push('"}}')).toEqual([{ type: "arguments", index: 0, json: '"}' }]);
  expect(calling.end()).toEqual([]);
});

test("a call that breaks after its arguments began keeps them, and the rest is text", () => {
  expect(parsePieces(['[get_weather(city="Rome", days=soon)] ok'])).toEqual({
    text: ")] ok",
    calls: [{ name: "get_weather", arguments: '{"city":"Rome"' }],
  });
  expect(parsePieces(['{"name": "add", "parameters": {"a": 1'])).toEqual({
    text: "",
    calls: [{ name: "add", arguments: '{"a":1' }],
  });
});

for (const model of REAL_MODELS) {
  test.skipIf(model.missing !== null)(`with ${model.name}'s own template and tokens`, async () => {
    const files = await readTokenizerFiles(model.dir);
    const tokenizer = new Tokenizer(files);
    const template = new ChatTemplate(files, tokenizer);
    const input = {
      messages: [{ role: "user", content: "Add." }],
      tools: [{ type: "function", function: { name: "add" } }],
    };
    if (!TAKES_TOOLS.has(model.name)) {
      expect(() => template.renderChat(input)).toThrow("no place for tools");
      return;
    }
    expect(template.renderChat(input).text).toContain('"name": "add"');
    const answer = 'See: <|python_start|>[add(a=1, b="é😀")]<|python_end|>';
    const detokenizer = new Detokenizer(tokenizer.table, { skipSpecials: true, keep: TOOL_CALL_MARKERS });
    const pieces = tokenizer.encodeWithSpecials(answer).map((id) => detokenizer.push(id));
    expect(parsePieces([...pieces, detokenizer.flush()])).toEqual({
      text: "See: ",
      calls: [{ name: "add", arguments: '{"a":1,"b":"é😀"}' }],
    });
  });
}

const PIECES = [
  ...FORMS.map(([text]) => text),
  ...TEXTS,
  ..."[]{}()<>=,:;'\"\\ \n".split(""),
  "<|python_start|>",
  "<|python_end|>",
  "<function=",
  "</function>",
  "<tool_call>",
  "add(",
  '{"name":',
  '"parameters":',
  "[add(a=1",
  "True",
  "-",
];
const answers = fc
  .array(fc.oneof(fc.constantFrom(...PIECES), fc.string({ maxLength: 4 })), { maxLength: 8 })
  .map((pieces) => pieces.join(""));

test("any split of the stream gives the same result", () => {
  fc.assert(
    fc.property(answers, fc.array(fc.nat(200), { maxLength: 12 }), (text, cuts) => {
      const whole = parsePieces([text]);
      expect(parsePieces(text.split(""))).toEqual(whole);
      const at = [0, ...cuts.filter((cut) => cut < text.length).sort((a, b) => a - b), text.length];
      expect(parsePieces(at.slice(1).map((end, i) => text.slice(at[i], end)))).toEqual(whole);
    }),
    { numRuns: 1500 },
  );
});

test("whatever the model writes, every complete call has arguments that are a JSON object", () => {
  const value = fc.jsonValue({ maxDepth: 3 });
  fc.assert(
    fc.property(fc.dictionary(fc.string({ maxLength: 5 }), value, { maxKeys: 4 }), (given) => {
      const json = JSON.stringify(given);
      for (const text of [`{"name":"add","parameters":${json}}`, `<function=add>${json}</function>`])
        expect(parse(text)).toEqual([["add", JSON.parse(json)]]);
    }),
    { numRuns: 300 },
  );
});

test("long and deep answers take linear time and bounded depth", () => {
  const long = "x".repeat(300_000);
  expect(parse(`[add(a="${long}")]`)).toEqual([["add", { a: long }]]);
  const deep = "[".repeat(100_000);
  expect(parsePieces([deep]).text).toBe(deep);
  const early = `{"parameters": {"a": "${long}`;
  expect(parsePieces([early])).toEqual({ text: early, calls: [] });
});
