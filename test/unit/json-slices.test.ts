// JSON in slices: the same values and refusals as JSON.parse, whatever the text, and turns of the event loop in between.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { parseInSlices } from "../../src/api/json-slices.ts";

/** Longer than a piece, so that what holds it is cut. */
const LONG = "x".repeat(70_000);

async function outcome(text: string): Promise<unknown> {
  try {
    return { value: await parseInSlices(text) };
  } catch (thrown) {
    expect(thrown).toBeInstanceOf(SyntaxError);
    return "refused";
  }
}

function expected(text: string): unknown {
  try {
    return { value: JSON.parse(text) };
  } catch {
    return "refused";
  }
}

async function agrees(text: string): Promise<void> {
  expect(await outcome(text)).toEqual(expected(text));
}

describe("JSON in slices", () => {
  test("gives what JSON.parse gives for large values of every kind", async () => {
    const many = Array.from({ length: 30_000 }, (_, i) => i);
    const values: unknown[] = [
      LONG,
      many,
      [many, LONG, many],
      { a: many, [LONG]: LONG, b: { c: LONG, d: many } },
      Object.fromEntries(many.map((i) => [`key ${i}`, { i, s: '[{,"}]' }])),
      Array.from({ length: 4000 }, (_, i) => ({ role: "user", content: `\u0000"\\\n é 😀 ${i}` })),
      '\\u"\n\u2028😀\ud800'.repeat(30_000),
      [[[[[many]]]]],
    ];
    for (const value of values) {
      await agrees(JSON.stringify(value));
      await agrees(`\n ${JSON.stringify(value, null, 2)}\t`);
      // Escapes of every letter, so that cuts fall into them.
      const escaped = JSON.stringify(value).replaceAll("x", "\\u0078");
      for (const shift of ["", " ", "  ", "   ", "    ", "     "]) await agrees(shift + escaped);
    }
  });

  test("keeps __proto__ as a key, and the last of equal keys", async () => {
    const text = `{"a":1,"__proto__":{"polluted":"${LONG}"},"a":"${LONG}","b":2,"__proto__":3}`;
    const value = (await parseInSlices(text)) as Record<string, unknown>;
    expect(Object.keys(value)).toEqual(Object.keys(JSON.parse(text)));
    expect(value.a).toBe(LONG);
    expect(Object.getPrototypeOf(value)).toBe(Object.prototype);
  });

  test("refuses what JSON.parse refuses around the cuts", async () => {
    const broken = [
      `["${LONG}",]`,
      `[,"${LONG}"]`,
      `["${LONG}" 1]`,
      `["${LONG}" "${LONG}"]`,
      `[1 "${LONG}"]`,
      `{"a":"${LONG}",}`,
      `{,"a":"${LONG}"}`,
      `{"a" "${LONG}"}`,
      `{"a":"${LONG}" "b":1}`,
      `{"${LONG}"}`,
      `{"${LONG}":}`,
      `{a:"${LONG}"}`,
      `{"a":1:"${LONG}"}`,
      `{"a":1,"b":2 "c":"${LONG}"}`,
      `["${LONG}"}`,
      `{"a":"${LONG}"]`,
      `["${LONG}"`,
      `"${LONG}`,
      `["${LONG}"]]`,
      `["${LONG}"] x`,
      `"${LONG}\u0001"`,
      `"${LONG}\\q"`,
      `"${LONG}\\u12"`,
      `"${LONG}\\"`,
      `[[1,2],["${LONG}"],,3]`,
      `${LONG}`,
      `[${"1,".repeat(40_000)}]`,
      `[${"1,".repeat(40_000)},1]`,
      `{${'"a":1,'.repeat(20_000)}}`,
      `[${'{"a":[1]} '.repeat(8000)}]`,
    ];
    for (const text of broken) {
      expect(expected(text)).toBe("refused");
      expect({ text: text.slice(0, 20), was: await outcome(text) }).toEqual({
        text: text.slice(0, 20),
        was: "refused",
      });
    }
  });

  test("agrees with JSON.parse on any text with a character changed", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.jsonValue({ maxDepth: 3 }), { minLength: 1, maxLength: 6 }),
        fc.nat(),
        fc.constantFrom('"', "\\", ",", "[", "]", "{", "}", ":", " ", "1", ""),
        async (values, where, character) => {
          const filled = values.flatMap((value) => [value, LONG, { inner: [value, LONG] }]);
          const text = JSON.stringify(filled);
          await agrees(text);
          // Mostly near the ends of the long texts, where the cuts are.
          const near = [...text.matchAll(/x{70000}/g)].flatMap(({ index }) => [index, index + 70_000]);
          const at = Math.max(0, (near[where % near.length] ?? 0) + ((where >> 4) % 9) - 4);
          await agrees(text.slice(0, at) + character + text.slice(at + 1));
        },
      ),
      { numRuns: 60 },
    );
  }, 120_000);

  test("takes large lists and objects of blanks, and no blanks for an element", async () => {
    const blanks = " \n\t\r".repeat(20_000);
    for (const text of [`[${blanks}]`, `{${blanks}}`, `[[${blanks}],{${blanks}}]`, `{"a":{${blanks}}}`]) {
      expect(expected(text)).not.toBe("refused");
      await agrees(text);
    }
    for (const text of [`[${blanks},]`, `[1,${blanks}]`, `{${blanks},}`, `["${LONG}",${blanks}]`]) {
      expect(expected(text)).toBe("refused");
      await agrees(text);
    }
  });

  test("refuses a large value behind the beginning of another one", async () => {
    for (const begun of ["1", "-", "1e", "1.", "0", "nul", "tru", "null", '"b"', "[]"])
      for (const large of [`"${LONG}"`, `["${LONG}"]`, `{"b":"${LONG}"}`])
        for (const text of [`{"a":${begun}${large}}`, `{"a":${begun} ${large}}`, `[${begun}${large}]`]) {
          expect(expected(text)).toBe("refused");
          expect({ begun, was: await outcome(text) }).toEqual({ begun, was: "refused" });
        }
  });

  test("agrees with JSON.parse on large values with any token put in, left out or replaced", async () => {
    const blanks = " ".repeat(70_000);
    const scalar = fc.constantFrom("1", "-0.5e3", "true", "null", '"s"', `"${LONG}"`, '"\\\\"');
    const gap = fc.constantFrom("", "", "", " ", blanks);
    const { value } = fc.letrec<{ value: string[] }>((tie) => ({
      value: fc.oneof(
        { maxDepth: 3, withCrossShrink: true },
        scalar.map((text) => [text]),
        fc.tuple(gap, fc.array(tie("value"), { maxLength: 3 })).map(([blank, all]) => {
          return ["[", blank, ...all.flatMap((each, i) => (i === 0 ? each : [",", ...each])), "]"];
        }),
        fc
          .tuple(
            gap,
            fc.array(fc.tuple(fc.constantFrom("a", "b", "__proto__", LONG), tie("value")), { maxLength: 3 }),
          )
          .map(([blank, all]) => {
            const entries = all.map(([key, each]) => [`"${key}"`, ":", ...each]);
            return ["{", blank, ...entries.flatMap((each, i) => (i === 0 ? each : [",", ...each])), "}"];
          }),
      ),
    }));
    const token = fc.constantFrom(
      ...["", ",", ":", "[", "]", "{", "}", "1", "-", "1e", "1.", "nul", "null", '"', "\\", '"a"', "x"],
      ...[blanks, `"${LONG}"`, `["${LONG}"]`, `[${blanks}]`, `{${blanks}}`],
    );
    const change = fc.record({ where: fc.nat(), token, replaces: fc.boolean() });
    let valid = 0;
    let refused = 0;
    await fc.assert(
      fc.asyncProperty(value, fc.array(change, { maxLength: 2 }), async (tokens, changes) => {
        const changed = [...tokens];
        for (const { where, token: other, replaces } of changes)
          changed.splice(where % changed.length, replaces ? 1 : 0, other);
        const text = changed.join("");
        const right = expected(text);
        if (text.length > 65_536) right === "refused" ? refused++ : valid++;
        expect(JSON.stringify(await outcome(text))).toBe(JSON.stringify(right));
      }),
      { numRuns: 1500 },
    );
    // The large ones are what this is about.
    expect(valid).toBeGreaterThan(50);
    expect(refused).toBeGreaterThan(50);
  }, 120_000);

  test("looks at each of many backslashes a few times only", async () => {
    const text = JSON.stringify("\\".repeat(1_000_000));
    const charCodeAt = String.prototype.charCodeAt;
    let looks = 0;
    String.prototype.charCodeAt = function (index) {
      looks++;
      return charCodeAt.call(this, index);
    };
    try {
      expect(await parseInSlices(text)).toHaveLength(1_000_000);
    } finally {
      String.prototype.charCodeAt = charCodeAt;
    }
    expect(looks).toBeGreaterThan(0);
    expect(looks).toBeLessThan(4 * text.length);
  });

  test("lets the event loop turn while it works", async () => {
    const text = JSON.stringify(Array.from({ length: 400_000 }, (_, i) => `text ${i}`));
    let turns = 0;
    const timer = setInterval(() => turns++, 1);
    expect(await parseInSlices(text)).toHaveLength(400_000);
    clearInterval(timer);
    expect(turns).toBeGreaterThan(3);
  });
});
