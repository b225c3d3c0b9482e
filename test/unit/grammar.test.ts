import { describe, expect, test } from "bun:test";
import Ajv2020 from "ajv/dist/2020";
import fc from "fast-check";
import { ToolCallParser } from "../../src/chat/tool-calls.ts";
import { BuildBudget, type Dfa, Nfa } from "../../src/grammar/automaton.ts";
import { numberAutomaton } from "../../src/grammar/numbers.ts";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import { patternAutomaton } from "../../src/grammar/strings.ts";
import {
  allowed,
  bySchema,
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
const ajv = () => new Ajv2020({ strict: false, validateFormats: false, ownProperties: true, logger: false });

function accepts(dfa: Dfa | undefined, text: string): boolean {
  if (dfa === undefined) return false;
  let state = 0;
  for (const byte of new TextEncoder().encode(text)) {
    const edges = dfa.edges[state] ?? [];
    let next = -1;
    for (let i = 0; i < edges.length; i += 3)
      if (byte >= (edges[i] ?? 0) && byte <= (edges[i + 1] ?? 0)) next = edges[i + 2] ?? -1;
    if (next < 0) return false;
    state = next;
  }
  return (dfa.labels[state] ?? -1) >= 0;
}

/** Whether the grammar takes the text whole, byte by byte. */
function takes(spec: GrammarSpec, text: string): boolean {
  return takesWhole(matcherSource(spec, vocabulary)(), text);
}

const refusal = (schema: unknown) => refusalOf(schema, vocabulary);

describe("automata", () => {
  test("accept the strings in which a pattern is found, as the platform does", () => {
    const patterns = [
      ...[
        "abc",
        "^abc",
        "abc$",
        "^abc$",
        "^$",
        "",
        "a|b",
        "^a|b$",
        "^(a|b)*c$",
        "a{2}",
        "^a{2,3}$",
        "^a{2,}$",
        "a+?b",
      ],
      ...[
        "[a-c]",
        "^[^a-c]+$",
        "\\d",
        "^\\w+$",
        "^\\W$",
        "\\s",
        "^\\S+$",
        ".",
        "^.$",
        "^(?:ab)+$",
        "^(?<n>a)b$",
        "\\.",
      ],
      ...[
        "^[\\d_-]+$",
        "^\\x61\\u0062\\u{63}$",
        "^a\\nb$",
        "^\\u{1F600}$",
        "(^a|b)c",
        "^(a$|ab)",
        "a*",
        "^(a*)*$",
        "()",
      ],
      ...[
        "^\\p{Lu}+$",
        "^\\P{L}$",
        "^[\\p{Nd}a]$",
        "a\\/b",
        "^[\\]\\\\]+$",
        "^é$",
        "[^]",
        "^(?:a?){5}$",
        "(a|^)(b|$)",
      ],
    ];
    const texts = fc.oneof(
      fc.string({ maxLength: 6, unit: fc.constantFrom(..."aAbc1_-. é\n/]\\É") }),
      fc.string({ maxLength: 4, unit: "grapheme" }),
      fc.constantFrom("😀", "abc", "ab", "aab", "", "aa", "aaa"),
    );
    for (const pattern of patterns) {
      const dfa = patternAutomaton(pattern, new BuildBudget());
      const real = new RegExp(pattern, "u");
      fc.assert(
        fc.property(texts, (text) => {
          expect([pattern, text, accepts(dfa, JSON.stringify(text).slice(1, -1))]).toEqual([
            pattern,
            text,
            real.test(text),
          ]);
        }),
        { numRuns: 60, seed: 7 },
      );
    }
  });

  test("accept the numbers within bounds and no others", () => {
    const bound = fc.oneof(
      fc.integer({ min: -120, max: 120 }),
      fc.integer({ min: -1200, max: 1200 }).map((n) => n / 8),
      fc.constantFrom(0, -0, 0.1, -0.1, 1e-7, 99.99, 1e6, -1e6),
    );
    const option = fc.option(bound, { nil: undefined });
    const text = fc.oneof(
      fc.integer({ min: -1300, max: 1300 }).map(String),
      fc.integer({ min: -13000, max: 13000 }).map((n) => String(n / 100)),
      fc.integer({ min: -1300, max: 1300 }).map((n) => (n / 8).toFixed(4)),
    );
    fc.assert(
      fc.property(
        option,
        option,
        fc.boolean(),
        fc.boolean(),
        fc.boolean(),
        fc.array(text, { minLength: 20, maxLength: 20 }),
        (low, high, lowExcluded, highExcluded, whole, texts) => {
          const range = {
            ...(low === undefined ? {} : { low, lowExcluded }),
            ...(high === undefined ? {} : { high, highExcluded }),
          };
          const dfa = numberAutomaton({ ...range, whole, divisors: [] }, new BuildBudget());
          const edges = [low, high].filter((edge) => edge !== undefined).map(String);
          for (const each of [...texts, ...edges]) {
            const value = Number(each);
            const inside =
              (low === undefined || value > low || (value === low && !lowExcluded)) &&
              (high === undefined || value < high || (value === high && !highExcluded)) &&
              (!whole || Number.isInteger(value));
            const got = accepts(dfa, each);
            // Soundness always; and nothing in a usual spelling is left out.
            if (got) expect([range, whole, each, inside]).toEqual([range, whole, each, true]);
            const usual =
              !(each.startsWith("-") && value === 0) && !each.includes("e") && !(whole && each.includes("."));
            if (inside && usual) expect([range, whole, each, got]).toEqual([range, whole, each, true]);
          }
        },
      ),
      { numRuns: 150, seed: 3 },
    );
  });

  test("accept the multiples of whole numbers", () => {
    const dfa = numberAutomaton({ low: -50, high: 50, whole: true, divisors: [3, 4] }, new BuildBudget());
    for (let n = -60; n <= 60; n++)
      expect([n, accepts(dfa, String(n))]).toEqual([n, Math.abs(n) <= 50 && n % 12 === 0]);
  });

  test("keep no state that leads nowhere", () => {
    const nfa = new Nfa(new BuildBudget());
    const start = nfa.state();
    const end = nfa.text(start, "ab");
    nfa.text(start, "axyz");
    const dfa = nfa.determinise(start, new Map([[end, 0]]));
    expect(dfa?.edges).toHaveLength(3);
    expect(nfa.determinise(start, new Map())).toBeUndefined();
  });
});

describe("schemas", () => {
  test("take what they allow and nothing else", () => {
    const cases: [schema: unknown, yes: string[], no: string[]][] = [
      [
        { type: "string", minLength: 2, maxLength: 3 },
        ['"ab"', '"é😀b"', '"\\u0061\\n"', '"\\ud83d\\ude00a"'],
        ['"a"', '"abcd"', '"\\ud83d\\ude00"', "1"],
      ],
      [{ type: "string", pattern: "^a+$", maxLength: 2 }, ['"a"', '"aa"'], ['""', '"aaa"', '"b"']],
      [
        { type: "string", pattern: "^(?:[é\\n-])*$", minLength: 2, maxLength: 3 },
        ['"é-"', '"\\n\\né"'],
        ['"é"', '"éééé"', '"éa"', '"\\u000a-"'],
      ],
      [{ type: "string", pattern: "^.{0,600}$" }, ['""', `"${"é".repeat(500)}"`], ['"a\\n"']],
      [
        {
          anyOf: [
            { type: "string", pattern: "^[a-c]{1,3}$" },
            { type: "string", pattern: "^.{5}$" },
          ],
        },
        ['"abc"', '"abcab"', '"xyzxy"'],
        ['"abca"', '"x"', '"abcabc"'],
      ],
      [
        { type: ["integer", "null"], minimum: -3, exclusiveMaximum: 12 },
        ["-3", "0", "11", "null"],
        ["-4", "12", "1.5", "01", "-0"],
      ],
      [{ enum: [1, "a", null, { b: [1] }] }, ["1", '"a"', "null", '{"b":[1]}'], ["2", '{"b":[]}']],
      [{ const: 'é"\n' }, ['"é\\"\\n"'], ['"é"']],
      [{ enum: [1, 2, "x"], type: "integer", minimum: 2 }, ["2"], ["1", '"x"']],
      [
        { type: "array", items: { type: "boolean" }, minItems: 1, maxItems: 2 },
        ["[true]", "[true, false]", "[\n  true\n]"],
        ["[]", "[true,true,true]", "[1]", "[true,]"],
      ],
      [
        { type: "array", prefixItems: [{ const: 1 }, { const: 2 }], items: { const: 3 } },
        ["[]", "[1]", "[1,2,3,3]"],
        ["[2]", "[1,2,1]"],
      ],
      [
        { type: "object", properties: { a: { const: 1 }, b: { const: 2 } }, required: ["b"] },
        ['{"b":2}', '{"a": 1, "b": 2}'],
        ["{}", '{"a":1}', '{"b":2,"a":1}', '{"b":2,"c":1}'],
      ],
      [
        { type: "object", properties: { a: { const: 1 } }, additionalProperties: { const: 2 } },
        ["{}", '{"a":1,"x":2}', '{"x":2,"y":2}'],
        ['{"x":1}', '{"x":2,"a":2}', '{"\\u0061":2}'],
      ],
      [
        { type: "object", patternProperties: { "^x": { const: 1 } }, additionalProperties: false },
        ["{}", '{"x":1,"xy":1}'],
        ['{"y":1}', '{"x":2}'],
      ],
      [{ type: "object", required: ["a"], maxProperties: 1 }, ['{"a":[]}'], ["{}", '{"a":1,"b":1}']],
      [
        { anyOf: [{ type: "integer" }, { type: "array", items: { $ref: "#" } }] },
        ["1", "[[1],[]]"],
        ["true", "[true]"],
      ],
      [
        {
          $defs: {
            n: {
              type: "object",
              properties: { next: { anyOf: [{ $ref: "#/$defs/n" }, { type: "null" }] } },
              required: ["next"],
            },
          },
          $ref: "#/$defs/n",
        },
        ['{"next":null}', '{"next":{"next":null}}'],
        ["null", '{"next":1}'],
      ],
      [{ allOf: [{ minimum: 2 }, { maximum: 4 }], type: "integer" }, ["2", "4"], ["1", "5"]],
      [
        {
          allOf: [
            { properties: { a: { type: "integer" } }, required: ["a"] },
            { properties: { a: { minimum: 5 } }, additionalProperties: false },
          ],
          type: "object",
        },
        ['{"a":5}'],
        ['{"a":4}', '{"a":"x"}'],
      ],
      [
        {
          oneOf: [
            { type: "object", properties: { k: { const: "a" }, v: { type: "null" } }, required: ["k"] },
            { type: "object", properties: { k: { const: "b" } }, required: ["k"] },
          ],
        },
        ['{"k":"a","v":null}', '{"k":"b"}'],
        ['{"k":"b","v":null}', '{"k":"c"}'],
      ],
      [
        { type: "number", minimum: 0.5, maximum: 1 },
        ["0.5", "0.75", "1", "1.0"],
        ["0.49", "1.01", "5e-1", "0"],
      ],
      [{ type: "string", format: "date" }, ['"2024-02-28"'], ['"2024-02-30"', '"x"']],
      [true, ["1", '{"a":[null]}', "-1.5e+10"], ["", "[", "nul"]],
      [
        { properties: { a: false }, type: "object", additionalProperties: true },
        ["{}", '{"b":1}'],
        ['{"a":1}'],
      ],
    ];
    for (const [schema, yes, no] of cases) {
      const validate = ajv().compile(schema as object);
      for (const text of yes) {
        expect([schema, text, takes(bySchema(schema), text)]).toEqual([schema, text, true]);
        expect([schema, text, validate(JSON.parse(text))]).toEqual([schema, text, true]);
      }
      for (const text of no)
        expect([schema, text, takes(bySchema(schema), text)]).toEqual([schema, text, false]);
    }
  });

  test("take what stands beside not, if, dependencies, contains and the like", () => {
    const cases: [schema: unknown, yes: string[], no: string[]][] = [
      [{ not: { type: ["string", "integer"] } }, ["1.5", "null", "[]"], ['"a"', "1", "1.0", "1e3"]],
      [
        { not: { enum: ["a", 3, true] } },
        ['"b"', '""', "2", "3.5", "false", "null"],
        ['"a"', "3", "3.0", "true"],
      ],
      [{ type: "string", not: { pattern: "^a" } }, ['"b"', '""'], ['"a"', '"ab"', "1"]],
      [{ type: "string", minLength: 1, not: { maxLength: 2 } }, ['"abc"'], ['"ab"']],
      [{ type: "object", not: { required: ["a"] } }, ["{}", '{"b":1}'], ['{"a":1}']],
      [
        { type: "integer", not: { anyOf: [{ minimum: 5 }, { const: 2 }] } },
        ["1", "3", "4", "-7"],
        ["2", "5"],
      ],
      [
        {
          type: "object",
          properties: { kind: { enum: ["card", "cash"] }, number: { type: "string" } },
          required: ["kind"],
          if: { properties: { kind: { const: "card" } }, required: ["kind"] },
          // biome-ignore lint/suspicious/noThenProperty: the keyword
          then: { required: ["number"] },
          else: { properties: { number: false } },
        },
        ['{"kind":"card","number":"1"}', '{"kind":"cash"}'],
        ['{"kind":"card"}', '{"kind":"cash","number":"1"}'],
      ],
      [
        {
          type: "object",
          properties: { a: { const: 1 }, b: { const: 2 }, c: { const: 3 } },
          dependentRequired: { a: ["b"] },
          dependentSchemas: { c: { required: ["a"] } },
        },
        ["{}", '{"b":2}', '{"a":1,"b":2}', '{"a":1,"b":2,"c":3}'],
        ['{"a":1}', '{"c":3}', '{"b":2,"c":3}', '{"a":1,"c":3}'],
      ],
      [
        {
          type: "object",
          propertyNames: { pattern: "^[a-c]+$", maxLength: 2 },
          additionalProperties: { const: 1 },
        },
        ["{}", '{"a":1,"bc":1}'],
        ['{"d":1}', '{"abc":1}', '{"a":2}'],
      ],
      [
        { type: "object", properties: { x: { const: 1 }, y: {} }, propertyNames: { enum: ["x", "z"] } },
        ['{"x":1}', '{"x":1,"z":2}'],
        ['{"y":1}', '{"w":1}'],
      ],
      [
        { type: "array", items: { type: "integer" }, contains: { minimum: 5 }, maxItems: 3 },
        ["[5]", "[1,2,9]", "[7,8,9]"],
        ["[]", "[1,2,3]"],
      ],
      [
        { type: "array", items: { enum: [1, 2] }, contains: { const: 1 }, minContains: 2, maxContains: 3 },
        ["[1,1]", "[2,1,2,1,2,1]"],
        ["[1]", "[2,2]", "[1,1,1,1]"],
      ],
      [
        { type: "array", items: { enum: ["a", "b", "c"] }, uniqueItems: true, minItems: 1 },
        ['["a"]', '["b","a","c"]'],
        ["[]", '["a","a"]', '["a","b","a"]'],
      ],
      [
        {
          oneOf: [
            { type: "integer", minimum: 2 },
            { type: "integer", maximum: 5 },
          ],
        },
        ["1", "6"],
        ["2", "3", "5", '"a"'],
      ],
      [
        {
          type: "object",
          properties: { a: { const: 1 } },
          anyOf: [{ properties: { b: { const: 2 } }, required: ["b"] }, true],
          unevaluatedProperties: false,
        },
        ["{}", '{"a":1}', '{"a":1,"b":2}'],
        ['{"c":1}', '{"a":1,"b":2,"c":3}'],
      ],
      [
        {
          type: "array",
          prefixItems: [{ const: 1 }],
          allOf: [{ prefixItems: [true, { const: 2 }] }],
          unevaluatedItems: false,
        },
        ["[]", "[1]", "[1,2]"],
        ["[1,3]", "[1,2,3]"],
      ],
      [
        { type: "number", not: { type: "integer" }, minimum: 1, maximum: 2 },
        ["1.5", "1.25"],
        ["1", "1.0", "2"],
      ],
    ];
    for (const [schema, yes, no] of cases) {
      const validate = ajv().compile(schema as object);
      for (const text of yes) {
        expect([schema, text, takes(bySchema(schema), text)]).toEqual([schema, text, true]);
        expect([schema, text, validate(JSON.parse(text))]).toEqual([schema, text, true]);
      }
      for (const text of no) {
        expect([schema, text, takes(bySchema(schema), text)]).toEqual([schema, text, false]);
        expect([schema, text, validate(JSON.parse(text))]).toEqual([schema, text, false]);
      }
    }
  });

  test("are refused with the keyword and its path where they cannot be enforced", () => {
    const at = (schema: unknown) => ({ type: "object", properties: { "a/b": schema } });
    const path = "schema: #/properties/a~1b";
    const cases: [schema: unknown, start: string][] = [
      [at({ $dynamicRef: "#a" }), `${path}/$dynamicRef: $dynamicRef can be enforced where`],
      [at({ not: { multipleOf: 3 } }), `${path}/not/multipleOf: the opposite of "multipleOf"`],
      [at({ not: { const: [1] } }), `${path}/not/const: the opposite of "const"`],
      // biome-ignore lint/suspicious/noThenProperty: the keyword
      [at({ if: { format: "date" }, then: {} }), `${path}/if/format: the opposite of "format"`],
      [at({ allOf: [{ contains: { const: 1 } }, { contains: { const: 2 } }] }), `${path}/allOf/1/contains: `],
      [at({ not: { unevaluatedProperties: false } }), `${path}/not/unevaluatedProperties: the opposite`],
      [at({ uniqueItems: true, type: "array" }), `${path}/uniqueItems: `],
      [at({ multipleOf: 0.1 }), `${path}/multipleOf: `],
      [at({ pattern: "(?=a)" }), `${path}/pattern: the pattern cannot be enforced: look-around`],
      [at({ pattern: "(a)\\1" }), `${path}/pattern: `],
      [at({ pattern: "a(" }), `${path}/pattern: `],
      [at({ pattern: "\\bx" }), `${path}/pattern: `],
      [at({ pattern: "a{3000}" }), `${path}/pattern: `],
      [at({ format: "colour" }), `${path}/format: `],
      [at({ $ref: "#/$defs/none" }), `${path}/$ref: nothing is at`],
      [at({ $ref: "https://example.org/x" }), `${path}/$ref: `],
      [at({ type: "text" }), `${path}/type: this must be`],
      [at({ minLength: -1 }), `${path}/minLength: this must be`],
      [at({ colour: "red" }), `${path}/colour: the keyword "colour"`],
      [at({ oneOf: [{ multipleOf: 2 }, { multipleOf: 3 }] }), `${path}/oneOf: a value might satisfy two`],
      [at({ minItems: 5000, type: "array" }), path],
      [at(7), "schema: #/properties: this must be"],
      [{ $ref: "#" }, "schema: #: it refers to itself"],
      [{ anyOf: [{ $ref: "#" }, { type: "null" }] }, "schema: #: it refers to itself"],
      [false, "schema: #: no value can satisfy it"],
      [{ type: "string", minLength: 3, maxLength: 2 }, "schema: #: no value can satisfy it"],
      [
        { type: "object", properties: { a: { $ref: "#" } }, required: ["a"] },
        "schema: #: no value can satisfy it",
      ],
      [{ $schema: "http://json-schema.org/draft-04/schema#" }, "schema: #/$schema: "],
      [{ type: "object", minProperties: 3 }, "schema: #/minProperties: "],
    ];
    for (const [schema, start] of cases) expect(refusal(schema)).toStartWith(start);
  });

  test("that ask for too much are refused, whatever it is", () => {
    const deep = (n: number): unknown => (n === 0 ? {} : { anyOf: [deep(n - 1), deep(n - 1)] });
    const wide = Array.from({ length: 400 }, (_, i) => ({ type: "object", properties: { [`k${i}`]: {} } }));
    const hostile: unknown[] = [
      { pattern: "^(a|b)*a(a|b){25}$", type: "string" },
      { pattern: `${"(a?){50}".repeat(40)}`, type: "string" },
      { pattern: "^(..){450}$", minLength: 3, maxLength: 100_000, type: "string" },
      { anyOf: wide },
      deep(9),
      { enum: Array.from({ length: 20_000 }, (_, i) => i) },
      {
        allOf: Array.from({ length: 12 }, () => ({
          anyOf: [{ minimum: 1 }, { maximum: 5 }, { type: "null" }],
        })),
      },
      {
        type: "object",
        properties: Object.fromEntries(wide.map((_, i) => [`some long name of a property ${i}`, {}])),
      },
    ];
    for (const schema of hostile) expect(refusal(schema)).toMatch(/^schema: /);
  }, 120_000);
});

describe("masks", () => {
  test("allow a token exactly where the grammar takes its bytes", () => {
    const random = seededRandom(5);
    const schemas: unknown[] = [
      {},
      { type: "string", minLength: 1, maxLength: 4 },
      {
        type: "object",
        properties: { name: { type: "string", maxLength: 3 }, kind: { enum: ["a", "ab"] } },
        required: ["name"],
      },
      { type: "array", items: { anyOf: [{ type: "integer" }, { type: "string", pattern: "^a" }] } },
      { type: "object", additionalProperties: { type: "number", maximum: 12 } },
    ];
    for (const schema of schemas) {
      const start = matcherSource(bySchema(schema), vocabulary);
      for (let walk = 0; walk < 3; walk++) {
        const so_far: number[] = [];
        for (let step = 0; step < 12; step++) {
          const replay = () => {
            const matcher = start();
            for (const token of so_far) matcher.accept(token);
            return matcher;
          };
          const matcher = replay();
          if (matcher.complete) break;
          const mask = new Set(allowed(matcher.mask([vocabulary.end])));
          for (let token = 0; token < vocabulary.end; token++)
            expect([schema, so_far, token, mask.has(token)]).toEqual([
              schema,
              so_far,
              token,
              replay().accept(token),
            ]);
          expect(mask.has(vocabulary.end)).toBe(matcher.mayEnd);
          const choices = [...mask].filter((token) => token !== vocabulary.end);
          so_far.push(choices[Math.floor(random() * choices.length)] ?? 0);
        }
      }
    }
  }, 120_000);

  test("of several counted strings allow what fits any of them", () => {
    const schema = {
      anyOf: [
        { type: "string", maxLength: 1 },
        { type: "string", pattern: "^[a-c]{3,4}$" },
        { type: "string", minLength: 6, maxLength: 9 },
      ],
    };
    const start = matcherSource(bySchema(schema), vocabulary);
    const validate = ajv().compile(schema);
    const random = seededRandom(11);
    const lengths = new Set<number>();
    for (let i = 0; i < 60; i++) {
      const answer = randomAnswer(start(), vocabulary, random, 40);
      if (answer === undefined) continue;
      expect([answer, validate(JSON.parse(answer))]).toEqual([answer, true]);
      lengths.add([...JSON.parse(answer)].length);
    }
    expect(lengths.size).toBeGreaterThan(3);
  });

  test("let random answers to random schemas with conditions be valid", () => {
    const scalar = fc.constantFrom<unknown>(1, 2, "a", "b", true, null);
    const name = fc.constantFrom("a", "b", "c");
    const schema: fc.Arbitrary<unknown> = fc.letrec((tie) => ({
      any: fc.oneof(
        { maxDepth: 4, depthSize: "small" },
        fc.constantFrom<unknown>(
          { type: "integer" },
          { type: "number" },
          { type: "string" },
          { type: "boolean" },
          true,
        ),
        scalar.map((value) => ({ const: value })),
        fc.uniqueArray(scalar, { minLength: 1, maxLength: 3 }).map((values) => ({ enum: values })),
        fc.integer({ min: -3, max: 3 }).map((minimum) => ({ minimum })),
        fc.nat(2).map((minLength) => ({ minLength, maxLength: 2 + minLength })),
        tie("any").map((not) => ({ not })),
        fc.tuple(tie("any"), tie("any"), fc.option(tie("any"))).map(([when, then, other]) => ({
          ...{ if: when, [THEN]: then },
          ...(other === null ? {} : { else: other }),
        })),
        fc.array(tie("any"), { minLength: 1, maxLength: 3 }).map((oneOf) => ({ oneOf })),
        fc.array(tie("any"), { minLength: 1, maxLength: 3 }).map((anyOf) => ({ anyOf })),
        fc.tuple(tie("any"), fc.option(tie("any")), fc.nat(2)).map(([contains, items, max]) => ({
          ...{ type: "array", contains, maxItems: 3 },
          ...(items === null ? {} : { items }),
          ...(max === 0 ? {} : { maxContains: max }),
        })),
        fc.array(tie("any"), { minLength: 1, maxLength: 2 }).map((prefixItems) => ({
          ...{ type: "array", prefixItems, unevaluatedItems: false },
        })),
        fc
          .record(
            {
              properties: fc.dictionary(name, tie("any"), { maxKeys: 3 }),
              required: fc.subarray(["a", "b"]),
              additionalProperties: tie("any"),
              propertyNames: fc.constantFrom<unknown>(
                { maxLength: 1 },
                { enum: ["a", "b", "x"] },
                { not: { const: "a" } },
              ),
              dependentRequired: fc.dictionary(name, fc.subarray(["a", "b", "c"]), { maxKeys: 2 }),
              dependentSchemas: fc.dictionary(name, tie("any"), { maxKeys: 1 }),
              unevaluatedProperties: tie("any"),
              maxProperties: fc.nat(3),
            },
            { requiredKeys: [] },
          )
          .map((each) => ({ type: "object", ...each })),
        fc.tuple(tie("any"), tie("any")).map((allOf) => ({ allOf })),
      ),
    })).any;
    const random = seededRandom(12);
    let answers = 0;
    let refused = 0;
    fc.assert(
      fc.property(schema, (made) => {
        const each: unknown = JSON.parse(JSON.stringify(made));
        const validate = ajv().compile(each as object);
        let start: ReturnType<typeof matcherSource>;
        try {
          start = matcherSource(bySchema(each), vocabulary);
        } catch (thrown) {
          expect(thrown).toMatchObject({ code: "unsupported_parameter" });
          refused++;
          return;
        }
        for (let i = 0; i < 3; i++) {
          const answer = randomAnswer(start(), vocabulary, random, 80);
          if (answer === undefined) continue;
          answers++;
          expect([each, answer, validate(JSON.parse(answer))]).toEqual([each, answer, true]);
        }
      }),
      { numRuns: Number(process.env.CARAVAN_TEST_RUNS ?? "100"), seed: 2 },
    );
    console.log(`random schemas with conditions: ${answers} answers valid, ${refused} schemas refused`);
    expect(answers).toBeGreaterThan(100);
  }, 120_000);

  test("let random answers to random schemas be valid", () => {
    const name = fc.constantFrom("a", "b", "name", "é", "x-y", 'q"');
    const bounds = fc.tuple(fc.nat(4), fc.nat(4));
    const schema: fc.Arbitrary<unknown> = fc.letrec((tie) => ({
      any: fc.oneof(
        { maxDepth: 3, depthSize: "small" },
        fc.constantFrom(
          { type: "boolean" },
          { type: "null" },
          { type: ["string", "integer"] },
          { const: "k" },
          true,
        ),
        bounds.map(([min, more]) => ({ type: "string", minLength: min, maxLength: min + more })),
        fc
          .constantFrom("^a+b?$", "foo", '^[^"]{2,4}$', "^(x|y)\\d$", "\\\\", "^é")
          .map((pattern) => ({ type: "string", pattern })),
        fc.tuple(fc.integer({ min: -30, max: 30 }), fc.nat(40), fc.boolean()).map(([low, more, whole]) => ({
          type: whole ? "integer" : "number",
          minimum: low / (whole ? 1 : 4),
          maximum: (low + more) / (whole ? 1 : 4),
        })),
        fc
          .uniqueArray(fc.jsonValue({ maxDepth: 1 }), { minLength: 1, maxLength: 4 })
          .map((values) => ({ enum: values })),
        fc.tuple(tie("any"), bounds).map(([items, [min, more]]) => ({
          type: "array",
          items,
          minItems: Math.min(min, 2),
          maxItems: min + more,
        })),
        fc
          .tuple(
            fc.dictionary(name, tie("any"), { maxKeys: 3 }),
            fc.subarray(["a", "b", "name"]),
            fc.option(tie("any")),
          )
          .map(([properties, required, others]) => ({
            type: "object",
            properties,
            required: required.filter((each) => Object.hasOwn(properties, each)),
            additionalProperties: others ?? false,
          })),
        fc.array(tie("any"), { minLength: 1, maxLength: 3 }).map((anyOf) => ({ anyOf })),
        fc.tuple(tie("any"), tie("any")).map((allOf) => ({ allOf })),
      ),
    })).any;
    const random = seededRandom(11);
    let answers = 0;
    let refused = 0;
    fc.assert(
      fc.property(schema, (each) => {
        const validate = ajv().compile(each as object);
        let start: ReturnType<typeof matcherSource>;
        try {
          start = matcherSource(bySchema(each), vocabulary);
        } catch (thrown) {
          expect(thrown).toMatchObject({ code: "unsupported_parameter" });
          refused++;
          return;
        }
        for (let i = 0; i < 3; i++) {
          const answer = randomAnswer(start(), vocabulary, random, 120);
          if (answer === undefined) continue;
          answers++;
          expect([each, answer, validate(JSON.parse(answer))]).toEqual([each, answer, true]);
        }
      }),
      { numRuns: 120, seed: 1 },
    );
    console.log(`random schemas: ${answers} answers valid, ${refused} schemas refused`);
    expect(answers).toBeGreaterThan(150);
  }, 120_000);
});

describe("calls", () => {
  const tools = [
    {
      name: "f",
      parameters: { type: "object", properties: { a: { type: "integer" } }, required: ["a"] },
      param: "t",
    },
    { name: "g", param: "t" },
  ];

  test("have a name and parameters that satisfy its schema, one or several", () => {
    const several: GrammarSpec = { type: "tool_calls", tools, most: 2 };
    const call = '{"name": "f", "parameters": {"a": 1}}';
    expect(takes(several, call)).toBe(true);
    expect(takes(several, '{"name":"g","parameters":{}}')).toBe(true);
    expect(takes(several, `${call}; ${call}`)).toBe(true);
    expect(takes(several, `${call}${call}${call}`)).toBe(false);
    expect(takes({ ...several, most: 1 }, `${call}${call}`)).toBe(false);
    for (const wrong of ['{"name": "h", "parameters": {}}', '{"name": "f", "parameters": {}}', "hello", ""])
      expect([wrong, takes(several, wrong)]).toEqual([wrong, false]);
  });

  test("may be left out where text will do, but not be imitated by it", () => {
    const either: GrammarSpec = { type: "tool_calls", tools, most: 1, orText: true };
    for (const text of ["hello", "a { b [", "1", '{"name": "g", "parameters": {}}', "a <functio x"])
      expect([text, takes(either, text)]).toEqual([text, true]);
    for (const text of ["[f(a=1)]", " {", "a <function=f>", "x<tool_call>", '{"name": "f"'])
      expect([text, takes(either, text)]).toEqual([text, false]);
  });

  test("stand beside a form: an answer is either the one or the other, and a call has parameters that satisfy its schema", () => {
    const either: GrammarSpec = {
      type: "tool_calls",
      tools,
      most: 2,
      orForm: { type: "json_object", param: "r" },
    };
    const yes = [
      '{"a":1}',
      '{"name":"x"}',
      '{"name": "f"}',
      '{"name":"f","b":{}}',
      '{"name": "h", "parameters": 1}',
    ];
    const calls = ['{"name":"f","parameters":{"a":1}}', '{"name": "g", "parameters": {}}'];
    const respelled = ['{"name":"\\u0066","parameters":{"a":"x"}}'];
    for (const text of [...yes, ...calls, ...respelled])
      expect([text, takes(either, text)]).toEqual([text, true]);
    const no = [
      '{"name":"f","parameters":{"a":"x"}}',
      '{"name": "f", "parameters": 1}',
      "hello",
      "[1]",
      '{"a":1}{"a":1}',
    ];
    for (const text of no) expect([text, takes(either, text)]).toEqual([text, false]);
  });

  test("are told from values of the form by the parser of answers", () => {
    const pieces = [
      '{"name":',
      '"f"',
      '": "f',
      '","para',
      'meters":',
      '":{"a',
      '":[',
      'meters": {"',
      '"g","parameters":{}}',
    ];
    const words = smallVocabulary([...JSON_WORDS, ...pieces, "<function=f>", "<tool_call>", '\\u0066"']);
    const schema = {
      type: "object",
      properties: {
        name: { type: "string", maxLength: 8 },
        parameters: { type: ["array", "object"] },
        a: {},
      },
    };
    const forms: GrammarSpec[] = [
      { type: "json_object", param: "r" },
      { type: "json_schema", schema, param: "r" },
    ];
    const random = seededRandom(3);
    let called = 0;
    let plain = 0;
    for (const orForm of forms) {
      if (orForm.type === "tool_calls") continue;
      const start = matcherSource({ type: "tool_calls", tools, most: 2, orForm }, words);
      const validate = ajv().compile(
        orForm.type === "json_schema" ? (orForm.schema as object) : { type: "object" },
      );
      for (let i = 0; i < 300; i++) {
        const answer = randomAnswer(start(), words, random, 60);
        if (answer === undefined) continue;
        const parser = new ToolCallParser(["f", "g"], { orForm: true });
        const events = [...parser.push(answer), ...parser.end()];
        const found = events.filter(({ type }) => type === "call").length;
        const text = events.map((event) => (event.type === "text" ? event.text : "")).join("");
        if (found === 0) {
          plain++;
          expect([answer, text]).toEqual([answer, answer]);
          expect([answer, validate(JSON.parse(answer))]).toEqual([answer, true]);
          continue;
        }
        called++;
        expect([answer, text]).toEqual([answer, ""]);
        for (const event of events) {
          if (event.type !== "call") continue;
          const json = events
            .map((e) => (e.type === "arguments" && e.index === event.index ? e.json : ""))
            .join("");
          const value = JSON.parse(json) as { a?: unknown };
          expect([answer, event.name === "f" ? Number.isInteger(value.a) : json === "{}"]).toEqual([
            answer,
            true,
          ]);
        }
      }
    }
    expect(called).toBeGreaterThan(5);
    expect(plain).toBeGreaterThan(20);
  });
});
