// Templates that multiply: refused before they have made what would fill the memory.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { SandboxedTemplate } from "../../src/chat/jinja-sandbox.ts";
import { growthOf } from "../../src/chat/template-growth.ts";
import { CaravanError } from "../../src/errors.ts";
import { processorMsOf } from "../tools/in-time.ts";

function render(source: string, variables: Record<string, unknown> = {}, inputLength = 0): string {
  return new SandboxedTemplate(source, "test").render(variables, inputLength);
}

function refusal(source: string, variables: Record<string, unknown> = {}): string {
  try {
    render(source, variables);
  } catch (thrown) {
    if (thrown instanceof CaravanError) return thrown.message;
    throw thrown;
  }
  throw new Error("it was not refused");
}

/** 2^25 ones in a list that takes 25 steps to make. */
const NESTED = `{% set ns = namespace(l=[1,1]) %}{% for i in range(24) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}`;

describe("what would fill the memory is refused at once:", () => {
  const s = "a".repeat(30_000);
  for (const [name, source] of Object.entries({
    "replace as a method": "{{ s.replace('a', s) }}",
    "replace as a filter": "{{ s|replace('a', s) }}",
    "replace of nothing": "{{ s.replace('', s) }}",
    "replace with an unpacked list": "{{ s.replace(*['a', s]) }}",
    "join of a text": "{{ s|join(s) }}",
    "join with a keyword": "{{ s|join(separator=s) }}",
    "join of nested lists": `${NESTED}{{ [ns.l]|join }}`,
    "tojson of nested lists": `${NESTED}{{ ns.l|tojson }}`,
    "tojson with separators": "{{ range(10000)|list|tojson(separators=(s, s)) }}",
    "nested lists, printed": `${NESTED}{{ ns.l }}`,
    "nested lists, printed in a branch": `${NESTED}{% if true %}{{ ns.l }}{% endif %}`,
    "nested lists beside text": `${NESTED}{{ ns.l ~ 'x' }}`,
    "nested lists as text": `${NESTED}{{ ns.l|string }}`,
    "a hundred thousand pieces": "{{ (s ~ s ~ s ~ s ~ s).split('a')|length }}",
    "copies that are kept":
      "{% set ns = namespace(l=[]) %}{% for i in range(20000) %}{% set ns.l = ns.l + [s|upper] %}{% endfor %}",
    "slices that are kept":
      "{% set ns = namespace(l=[]) %}{% for i in range(20000) %}{% set ns.l = ns.l + [s[i:]] %}{% endfor %}",
    "slices in a loop in a loop":
      "{% for i in range(30000) %}{% for j in range(30000) %}{% set x = s[j:i] %}{% endfor %}{% endfor %}",
    "a filter around a block": "{% filter replace('a', s) %}{{ s }}{% endfilter %}",
  })) {
    test(name, () => {
      // The least of a few attempts: what else this process collects or keeps at the moment counts too.
      let growth = Number.POSITIVE_INFINITY;
      for (let attempt = 0; attempt < 4 && growth >= 200e6; attempt++) {
        Bun.gc(true);
        const before = process.memoryUsage.rss();
        const ms = processorMsOf(() =>
          expect(refusal(source, { s })).toMatch(
            /a text of|a list of|characters in all|not supported|Cannot unpack/,
          ),
        );
        expect(ms).toBeLessThan(2000);
        growth = process.memoryUsage.rss() - before;
      }
      expect(growth).toBeLessThan(200e6);
    });
  }
});

describe("what templates really do works as before:", () => {
  const messages = [
    { role: "user", content: "Hi <b>" },
    { role: "assistant", content: "a</think>b" },
  ];
  for (const [source, expected] of [
    ["{{ messages[0].content.replace('<', '[') }}", "Hi [b>"],
    ["{{ messages[0].content|replace('Hi', 'Hello') }}", "Hello <b>"],
    ["{{ messages[1].content.split('</think>')[-1] }}", "b"],
    ["{{ messages|map(attribute='role')|join(', ') }}", "user, assistant"],
    ["{{ messages[0]|tojson }}", '{"role": "user", "content": "Hi <b>"}'],
    ["{{ {'a': [1, 2]}|tojson(indent=2) }}", '{\n  "a": [\n    1,\n    2\n  ]\n}'],
    ["{{ 'x' ~ 1 ~ 'y' }}{{ ['a'] + ['b'] }}", 'x1y["a", "b"]'],
  ] as const) {
    test(source, () => expect(render(source, { messages }, 100)).toBe(expected));
  }

  test("a long conversation", () => {
    const long = Array.from({ length: 1000 }, (_, i) => ({ role: "user", content: `text ${i} `.repeat(50) }));
    const source =
      "{% set ns = namespace(kept=[]) %}{% for m in messages %}{% set ns.kept = ns.kept + [m] %}" +
      "<{{ m.role }}>{{ m.content|trim|replace('text', 'TEXT') }}{% endfor %}{{ ns.kept|length }}";
    const length = long.reduce((sum, { content }) => sum + content.length, 0);
    const text = render(source, { messages: long }, length);
    expect(text).toStartWith("<user>TEXT 0 TEXT 0");
    expect(text).toEndWith("1000");
  });
});

test("the growth that is worked out is never less than what is made", () => {
  const text = fc.string({ maxLength: 12 });
  const value = (given: unknown): { type: string; value: unknown } => {
    if (Array.isArray(given)) return { type: "ArrayValue", value: given.map(value) };
    return { type: "", value: given };
  };
  const made = (source: string, variables: Record<string, unknown>) => render(source, variables, 1000).length;
  fc.assert(
    fc.property(
      text,
      text,
      text,
      fc.array(fc.array(text, { maxLength: 4 }), { maxLength: 4 }),
      (a, b, c, lists) => {
        const replaced = growthOf("replace", value(a), [value(b), value(c)], 1e6).characters;
        expect(replaced).toBeGreaterThanOrEqual(made("{{ a.replace(b, c) }}", { a, b, c }));
        const joined = growthOf("join", value(lists.flat()), [value(a)], 1e6).characters;
        expect(joined).toBeGreaterThanOrEqual(made("{{ lists|join(a) }}", { lists: lists.flat(), a }));
      },
    ),
  );
});
