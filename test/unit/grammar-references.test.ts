import { describe, expect, test } from "bun:test";
import Ajv2020 from "ajv/dist/2020";
import { splitLookahead } from "../../src/grammar/lookahead.ts";
import {
  JSON_WORDS,
  matcherSource,
  randomAnswer,
  refusalOf,
  smallVocabulary,
  takesWhole,
} from "../tools/grammar-walk.ts";
import { seededRandom } from "../tools/seeded-random.ts";

/** The keyword: an object with a member of that name in its text looks like a promise. */
const THEN = "then";
const vocabulary = smallVocabulary(JSON_WORDS);
const source = (schema: unknown) =>
  matcherSource({ type: "json_schema", schema, param: "schema" }, vocabulary);

function takes(schema: unknown, text: string): boolean {
  return takesWhole(source(schema)(), text);
}

const refusal = (schema: unknown) => refusalOf(schema, vocabulary);

/** Random answers, valid all of them. */
function answersOf(schema: object): unknown[] {
  const validate = new Ajv2020({ strict: false, validateFormats: false, logger: false }).compile(schema);
  const start = source(schema);
  const random = seededRandom(5);
  const answers: unknown[] = [];
  for (let i = 0; i < 8; i++) {
    const answer = randomAnswer(start(), vocabulary, random, 200);
    if (answer === undefined) continue;
    const value: unknown = JSON.parse(answer);
    expect([schema, answer, validate(value)]).toEqual([schema, answer, true]);
    answers.push(value);
  }
  expect(answers.length).toBeGreaterThan(3);
  return answers;
}

describe("references", () => {
  const number = { $id: "number.json", type: "integer" };

  test("lead to identifiers and anchors, relative to the identifier around them", () => {
    const cases: [schema: unknown, yes: string, no: string][] = [
      [{ $ref: "number.json", $defs: { number } }, "1", '"a"'],
      [{ $id: "https://example.org/a/root", $ref: "/a/number.json", $defs: { number } }, "1", '"a"'],
      [{ $id: "urn:example:x", $ref: "urn:example:x#n", $defs: { n: { $anchor: "n", const: 1 } } }, "1", "2"],
      [{ $ref: "#n", $defs: { n: { $dynamicAnchor: "n", const: 1 } } }, "1", "2"],
      [
        // The same pointer means another schema below another identifier.
        {
          $defs: {
            a: { const: "outer" },
            inner: { $id: "inner", items: { $ref: "#/$defs/a" }, $defs: { a: { const: "inner" } } },
          },
          $ref: "inner",
        },
        '["inner"]',
        '["outer"]',
      ],
      [
        // Identifiers that are values, not schemas, are none.
        {
          anyOf: [{ const: { $id: "x", type: "null" } }, { $ref: "x" }],
          $defs: { x: { $id: "x", const: 1 } },
        },
        "1",
        "null",
      ],
      [
        { $id: "#/properties/a", type: "object", properties: { a: { $id: "#/properties/a", type: "null" } } },
        '{"a":null}',
        '{"a":1}',
      ],
    ];
    for (const [schema, yes, no] of cases)
      expect([schema, takes(schema, yes), takes(schema, no)]).toEqual([schema, true, false]);
  });

  test("of a tree that knows itself by a dynamic anchor are followed", () => {
    const tree = {
      ...{ $dynamicAnchor: "node", type: "object", required: ["value"] },
      properties: {
        value: { type: "integer" },
        children: { type: "array", items: { $dynamicRef: "#node" } },
      },
    };
    expect(takes(tree, '{"value":1,"children":[{"value":2,"children":[]}]}')).toBe(true);
    expect(takes(tree, '{"value":1,"children":[{"value":null}]}')).toBe(false);
    answersOf(tree);
  });

  test("that lead elsewhere, nowhere or to two places are refused where they stand", () => {
    const twice = { a: { $id: "x", const: 1 }, b: { $id: "x", const: 2 } };
    const anchors = { a: { $anchor: "n", const: 1 }, b: { $anchor: "n", const: 2 } };
    const list = {
      ...{ $id: "list", type: "array", items: { $dynamicRef: "#item" } },
      $defs: { item: { $dynamicAnchor: "item" } },
    };
    const cases: [schema: unknown, start: string][] = [
      [{ $ref: "https://json-schema.org/draft/2020-12/schema" }, "schema: #/$ref: only references into"],
      [{ items: { $ref: "other.json" } }, "schema: #/items/$ref: only references into"],
      [{ $ref: "x", $defs: twice }, "schema: #/$ref: the $id"],
      [{ $ref: "#n", $defs: anchors }, "schema: #/$ref: the anchor"],
      [{ $ref: "#nobody" }, "schema: #/$ref: nothing is at"],
      [{ $id: "x#y" }, "schema: #/$id: an $id has no fragment"],
      [
        { $ref: "#/$defs/a/$defs/b", $defs: { a: { $id: "a", $defs: { b: true } } } },
        "schema: #/$ref: a ref",
      ],
      [
        { $ref: "list", $defs: { list, own: { $dynamicAnchor: "item", const: 1 } } },
        "schema: #/$defs/list/items/$dynamicRef: ",
      ],
    ];
    for (const [schema, start] of cases) expect(refusal(schema)).toStartWith(start);
    // Nobody refers to them.
    expect(takes({ const: 1, $defs: twice }, "1")).toBe(true);
  });
});

describe("what is evaluated", () => {
  test("is closed beside conditions, overlapping oneOf and not", () => {
    const kind = { properties: { kind: { const: "a" } }, required: ["kind"] };
    const conditional: Record<string, unknown> = {
      ...{ type: "object", if: kind, else: { properties: { b: { type: "integer" } } } },
      unevaluatedProperties: false,
    };
    conditional[THEN] = { properties: { a: { type: "integer" } } };
    expect(takes(conditional, '{"kind":"a","a":1}')).toBe(true);
    expect(takes(conditional, '{"kind":"a","b":1}')).toBe(false);
    expect(takes(conditional, '{"b":1}')).toBe(true);
    answersOf(conditional);
    const part = (name: string) => ({ properties: { [name]: { type: "integer" } }, required: [name] });
    const either = { type: "object", oneOf: [part("a"), part("b")], unevaluatedProperties: false };
    expect(takes(either, '{"a":1}')).toBe(true);
    expect(takes(either, '{"a":1,"b":2}')).toBe(false);
    answersOf(either);
    const without = {
      ...{ type: "object", properties: { a: true } },
      not: part("b"),
      unevaluatedProperties: false,
    };
    expect(takes(without, '{"a":1}')).toBe(true);
    expect(takes(without, '{"b":"x"}')).toBe(false);
    answersOf(without);
  });
});

describe("patterns with look-ahead in front", () => {
  test("say the same as their parts", () => {
    const patterns = [
      "^(?=.*[A-Z])(?=.*\\d).{4,8}$",
      "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$",
      "^(?!admin$|root$)[a-z]+$",
      "^(?=[)(])(?!\\))[^a]+",
    ];
    const texts = [
      "Ab1c",
      "abc1",
      "ABCD",
      "A1",
      "+",
      "-1.5",
      "",
      "0",
      "admin",
      "root",
      "adminx",
      "(b",
      ")b",
      "x",
    ];
    for (const pattern of patterns) {
      const { found, unmatched } = splitLookahead(pattern);
      expect(found.length + unmatched.length).toBeGreaterThan(1);
      for (const text of texts) {
        const holds =
          found.every((each) => new RegExp(each, "u").test(text)) &&
          !unmatched.some((each) => new RegExp(each, "u").test(text));
        expect([pattern, text, holds]).toEqual([pattern, text, new RegExp(pattern, "u").test(text)]);
      }
    }
  });

  test("are enforced, and refused where they are not in front", () => {
    for (const answer of answersOf({ type: "string", pattern: "^(?=.*[A-Z])(?=.*\\d).{8,12}$" }))
      expect(String(answer)).toMatch(/\d/);
    for (const pattern of ["(?=a)", "^(?=a)a|b", "^a(?!b)", "^(?=a(?=b))", "^(?<=a)b"])
      expect([pattern, refusal({ type: "string", pattern })]).toEqual([
        pattern,
        expect.stringContaining("the pattern cannot be enforced"),
      ]);
  });
});

describe("numbers", () => {
  test("that are multiples of halves, quarters and the like are exact", () => {
    const cases: [multipleOf: number, yes: string[], no: string[]][] = [
      [0.5, ["1.5", "-2.0", "2", "0", "90000000.5"], ["0.25", "1.50", "1e2", "1."]],
      [1.25, ["1.25", "2.5", "2.50", "-3.75", "10.0"], ["1.0", "11.250", "3"]],
      [0.125, ["0.125", "1", "0.5"], ["0.124", "0.1250", "0.2"]],
    ];
    for (const [multipleOf, yes, no] of cases) {
      for (const text of yes)
        expect([multipleOf, text, takes({ multipleOf }, text)]).toEqual([multipleOf, text, true]);
      for (const text of no)
        expect([multipleOf, text, takes({ multipleOf }, text)]).toEqual([multipleOf, text, false]);
    }
    answersOf({ type: "number", multipleOf: 0.25, minimum: -3, maximum: 1000 });
    expect(takes({ type: "integer", multipleOf: 1.5 }, "3")).toBe(true);
    expect(takes({ type: "integer", multipleOf: 1.5 }, "4")).toBe(false);
    expect(takes({ enum: [1.5, 1.25], multipleOf: 0.5 }, "1.25")).toBe(false);
    // To most validators 5.1 is no multiple of it.
    expect(refusal({ multipleOf: 0.01 })).toStartWith("schema: #/multipleOf: validators do not agree");
  });

  test("keep to the bounds of a typed language's format", () => {
    const cases: [format: string, yes: string[], no: string[]][] = [
      ["uint8", ["0", "255"], ["256", "-1", "1.5"]],
      ["int32", ["2147483647", "-2147483648"], ["2147483648", "0.5"]],
      ["int64", ["123456789012345", "-1"], ["1.5"]],
      ["double", ["1.5", "1e10"], []],
    ];
    for (const [format, yes, no] of cases) {
      const schema = { type: "number", format };
      for (const text of yes) expect([format, text, takes(schema, text)]).toEqual([format, text, true]);
      for (const text of no) expect([format, text, takes(schema, text)]).toEqual([format, text, false]);
    }
    // Numbers of 64 bits are written as text by some.
    expect(takes({ type: "string", format: "int64" }, '"-5"')).toBe(true);
    expect(takes({ type: "string", format: "int64" }, '"x"')).toBe(false);
  });
});

describe("different elements", () => {
  const letters = [..."abcdefghijkl"];

  test("come in any order out of few values, and in the order of the schema out of more", () => {
    const few = { type: "array", uniqueItems: true, items: { enum: ["b", "a", 1] } };
    expect(takes(few, '["a","b"]')).toBe(true);
    expect(takes(few, '["b",1,"a"]')).toBe(true);
    expect(takes(few, '["b","b"]')).toBe(false);
    const many = { type: "array", uniqueItems: true, items: { enum: letters }, minItems: 2, maxItems: 4 };
    expect(takes(many, '["a","c","l"]')).toBe(true);
    expect(takes(many, '["c","a"]')).toBe(false);
    expect(takes(many, '["a","a"]')).toBe(false);
    expect(takes(many, '["a"]')).toBe(false);
    expect(takes(many, '["a","b","c","d","e"]')).toBe(false);
    answersOf(many);
    // What is asked for can still come where little is left of the values.
    const all = { type: "array", uniqueItems: true, items: { enum: letters }, minItems: 12 };
    expect(answersOf(all)).toContainEqual(letters);
    const draw = { type: "array", uniqueItems: true, minItems: 6, maxItems: 6 };
    for (const answer of answersOf({ ...draw, items: { type: "integer", minimum: 1, maximum: 45 } }))
      expect(answer).toHaveLength(6);
  }, 30_000);

  test("out of any values are refused", () => {
    for (const items of [
      { type: "string" },
      { type: "integer" },
      { type: "integer", minimum: 1, maximum: 500 },
    ])
      expect(refusal({ type: "array", uniqueItems: true, items })).toStartWith("schema: #/uniqueItems: ");
    expect(refusal({ type: "array", uniqueItems: true, items: { enum: ["a", "b"] }, minItems: 3 })).toContain(
      "no value can satisfy it",
    );
  });
});
