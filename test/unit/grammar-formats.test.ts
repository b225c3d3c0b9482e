// Formats: what is written for one is of it; what is given as an enum or const beside one is judged by the format itself.
import { describe, expect, test } from "bun:test";
import { FORMAT_NAMES, mayBeOfFormat } from "../../src/grammar/formats.ts";
import {
  bySchema,
  JSON_WORDS,
  matcherSource,
  randomAnswer,
  refusalOf,
  smallVocabulary,
  takesWhole,
} from "../tools/grammar-walk.ts";
import { seededRandom } from "../tools/seeded-random.ts";

const vocabulary = smallVocabulary(JSON_WORDS);

function takes(schema: unknown, value: unknown): boolean {
  return takesWhole(matcherSource(bySchema(schema), vocabulary)(), JSON.stringify(value));
}

const refusal = (schema: unknown) => refusalOf(schema, vocabulary);

/** Of the formats, in forms that are not written unless they are asked for; and not of them. */
const STRINGS: [format: string, of: string[], not: string[]][] = [
  ["ipv6", ["::1", "2001:DB8::8a2e:370:7334", "::ffff:10.0.0.1"], ["auto", "1.2.3.4", "fe80::1%eth0", ":::"]],
  ["ipv4", ["127.0.0.1"], ["auto", "256.0.0.1", "1.2.3", "01.2.3.4"]],
  ["uuid", ["123E4567-e89b-12d3-a456-426614174000"], ["", "123e4567e89b12d3a456426614174000"]],
  ["date", ["2024-02-29", "2000-02-29"], ["2023-02-29", "1900-02-29", "2024-13-01", "2024-00-10", "today"]],
  ["time", ["23:59:60z", "10:00:00.123456789+01:00"], ["24:00:00Z", "10:00:00", "noon"]],
  ["date-time", ["2024-02-29t10:00:00z"], ["2023-02-29T10:00:00Z", "2024-01-01", "now"]],
  ["duration", ["P1Y2M10DT2H30M", "PT0S", "P4W"], ["P", "PT", "1h", "P1W2D"]],
  ["email", ['"a b"@example.org', "x@[127.0.0.1]", "o'hara@example.org"], ["nobody", "@x"]],
  ["hostname", ["a.b.c.d.e.f.g.example"], ["a b", "", "a/b"]],
  ["uri", ["urn:isbn:0451450523", "ftp://u@h/#f", "mailto:a@b"], ["/here", "no uri", "http://é/"]],
  ["uri-reference", ["", "#top", "../x?y"], ["a b", "é"]],
  ["iri", ["https://é.example/ü"], ["é"]],
  ["json-pointer", ["/é b/~1", ""], ["a", "/~2"]],
  ["relative-json-pointer", ["0/é", "12#"], ["/a", "-1"]],
  ["byte", ["aGk=", ""], ["a b!", "=a"]],
];

describe("values that are given", () => {
  test("are judged by the format, not by the form that is written of it", () => {
    for (const [format, of, not] of STRINGS) {
      for (const value of of)
        expect([format, value, mayBeOfFormat(value, format)]).toEqual([format, value, true]);
      for (const value of not)
        expect([format, value, mayBeOfFormat(value, format)]).toEqual([format, value, false]);
    }
  });

  test("come from an enum or const beside a format", () => {
    expect(takes({ enum: ["::1"], format: "ipv6" }, "::1")).toBe(true);
    expect(takes({ const: "2024-02-29", type: "string", format: "date" }, "2024-02-29")).toBe(true);
    const some = { type: "string", enum: ["::1", "auto", "fe80::1"], format: "ipv6" };
    expect(["::1", "auto", "fe80::1"].map((value) => takes(some, value))).toEqual([true, false, true]);
    const both = { allOf: [{ enum: ["urn:a", "b c"] }, { format: "uri" }] };
    expect(["urn:a", "b c"].map((value) => takes(both, value))).toEqual([true, false]);
    expect(refusal({ enum: ["auto"], format: "ipv6" })).toContain("no value can satisfy it");
    // Values that are no strings have no format.
    expect(takes({ enum: [1, "::1"], format: "ipv6" }, 1)).toBe(true);
  });

  test("that may be of a format are not taken to be apart from it in oneOf", () => {
    const overlapping = (value: object, format: string): object => ({
      oneOf: [value, { type: "string", format }],
    });
    for (const schema of [
      overlapping({ const: "::1" }, "ipv6"),
      overlapping({ enum: ["auto", "::1"] }, "ipv6"),
      overlapping({ const: "2024-02-29" }, "date"),
      overlapping({ const: "urn:isbn:0451450523" }, "uri"),
    ])
      expect(refusal(schema)).toContain("#/oneOf: a value might satisfy two of its branches");
    // What is surely not of the format is.
    const apart = overlapping({ const: "auto" }, "ipv4");
    expect(["auto", "127.0.0.1", "other"].map((value) => takes(apart, value))).toEqual([true, true, false]);
    const types = { oneOf: [{ enum: [1, null] }, { type: "string", format: "ipv6" }] };
    expect(takes(types, 1)).toBe(true);
  });

  test("in a member's enum or const do not set objects apart by a format", () => {
    const member = (a: object): object => ({ type: "object", properties: { a }, required: ["a"] });
    const schema = (value: string): object => ({
      oneOf: [member({ const: value }), member({ type: "string", format: "ipv6" })],
    });
    expect(refusal(schema("::1"))).toContain("a value might satisfy two of its branches");
    expect(takes(schema("auto"), { a: "auto" })).toBe(true);
  });
});

test("whatever is written for a format may be of it", () => {
  const random = seededRandom(9);
  for (const format of FORMAT_NAMES) {
    const start = matcherSource(bySchema({ type: "string", format }), vocabulary);
    let answers = 0;
    for (let i = 0; i < 12; i++) {
      const answer = randomAnswer(start(), vocabulary, random, 120);
      if (answer === undefined) continue;
      answers++;
      const value: unknown = JSON.parse(answer);
      expect([format, value, mayBeOfFormat(String(value), format)]).toEqual([format, value, true]);
    }
    expect([format, answers > 0]).toEqual([format, true]);
  }
});

test("an ill-formed pattern beside given values is refused by its place", () => {
  for (const schema of [
    { enum: ["a"], pattern: "[" },
    { const: "a", not: { type: "string", pattern: "[" } },
  ])
    expect(() => matcherSource(bySchema(schema), vocabulary)).toThrow(/pattern/);
});
