// Grammars in one builder share automata by the names of their languages: what merely looks alike must not be shared.
import { expect, test } from "bun:test";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import {
  JSON_WORDS,
  matcherSource,
  randomAnswer,
  smallVocabulary,
  takesWhole,
} from "../tools/grammar-walk.ts";
import { seededRandom } from "../tools/seeded-random.ts";

const vocabulary = smallVocabulary(JSON_WORDS);

/** Members under `p` whose names match a pattern. */
const named = (pattern: string): object => ({
  type: "object",
  properties: {
    p: { type: "object", propertyNames: { pattern }, additionalProperties: { type: "integer" } },
  },
  required: ["p"],
});
const calls = (tools: Record<string, object>, more: object = {}): GrammarSpec => ({
  type: "tool_calls",
  tools: Object.entries(tools).map(([name, parameters]) => ({ name, parameters, param: "tools" })),
  most: 1,
  ...more,
});

function takes(spec: GrammarSpec, text: string): boolean {
  return takesWhole(matcherSource(spec, vocabulary)(), text);
}

function check(spec: GrammarSpec, yes: string[], no: string[]): void {
  for (const text of yes) expect([text, takes(spec, text)]).toEqual([text, true]);
  for (const text of no) expect([text, takes(spec, text)]).toEqual([text, false]);
}

const call = (name: string, parameters: string): string => `{"name": "${name}", "parameters": ${parameters}}`;

test("two tools with names of members at the same path keep their own patterns", () => {
  const spec = calls({ first: named("^a+$"), second: named("^b+$") });
  check(
    spec,
    [call("first", '{"p": {"aa": 1}}'), call("second", '{"p": {"b": 1, "bb": 2}}')],
    [call("first", '{"p": {"b": 1}}'), call("second", '{"p": {"a": 1}}')],
  );
  const start = matcherSource(spec, vocabulary);
  const random = seededRandom(5);
  const seen = new Map<string, number>();
  for (let i = 0; i < 200; i++) {
    const answer = randomAnswer(start(), vocabulary, random);
    if (answer === undefined) continue;
    const { name, parameters } = JSON.parse(answer);
    const names = Object.keys(parameters.p);
    for (const each of names) expect(each).toMatch(name === "first" ? /^a+$/ : /^b+$/);
    if (names.length > 0) seen.set(name, (seen.get(name) ?? 0) + 1);
  }
  expect([...seen.keys()].sort()).toEqual(["first", "second"]);
});

test("a tool and a form with names of members at the same path keep their own patterns", () => {
  const orForm = { type: "json_schema", schema: named("^b+$"), param: "format" };
  check(
    calls({ only: named("^a+$") }, { orForm }),
    [call("only", '{"p": {"a": 1}}'), '{"p": {"b": 1}}'],
    [call("only", '{"p": {"b": 1}}'), '{"p": {"a": 1}}'],
  );
});

/** Either of two schemas, in words that give both the same path. */
const either = (a: object, b: object): GrammarSpec => ({
  type: "json_schema",
  schema: { not: { allOf: [{ not: a }, { not: b }] } },
  param: "schema",
});

test("schemas made of others, with one path, keep their own patterns of names", () => {
  const members = (pattern: string, type: string): object => ({
    type: "object",
    propertyNames: { pattern },
    additionalProperties: { type },
    minProperties: 1,
  });
  check(
    either(members("^a+$", "integer"), members("^b+$", "boolean")),
    ['{"a": 1}', '{"b": true}'],
    ['{"a": true}', '{"b": 1}', '{"c": 1}'],
  );
});

test("propertyNames that nothing satisfies is not taken for one that everything does", () => {
  const open = { type: "object", propertyNames: true };
  const shut = { type: "object", propertyNames: false };
  check(
    calls({ open, shut }),
    [call("open", '{"a": 1}'), call("open", "{}"), call("shut", "{}")],
    [call("shut", '{"a": 1}')],
  );
});

test("oneOf in schemas made of others, with one path, is judged by its own branches", () => {
  const apart = { oneOf: [{ type: "string" }, { type: "null" }] };
  const together = {
    oneOf: [
      { type: "integer", minimum: 0 },
      { type: "integer", maximum: 10 },
    ],
  };
  check(either(apart, together), ['"x"', "null", "-1", "11"], ["0", "5", "10", "true"]);
});
