// The dashboard's Markdown: what it makes of lines, and that no answer takes long, whatever a model writes.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";

/** As much of an element as the program uses. */
class Node {
  readonly parts: (Node | string)[] = [];
  tabIndex = 0;
  constructor(readonly name: string) {}
  append(...parts: (Node | string)[]): void {
    for (const part of parts) this.parts.push(part);
  }
  set textContent(text: string) {
    this.parts.splice(0, this.parts.length, text);
  }
  setAttribute(): void {}
  addEventListener(): void {}
  createTHead(): Node {
    return this.#added("thead");
  }
  createTBody(): Node {
    return this.#added("tbody");
  }
  insertRow(): Node {
    return this.#added("tr");
  }
  #added(name: string): Node {
    const node = new Node(name);
    this.append(node);
    return node;
  }
  toString(): string {
    return `<${this.name}>${this.parts.map(String).join("")}</>`;
  }
}

let show: (parent: Node, text: string, before: unknown[]) => unknown;
beforeAll(async () => {
  Object.defineProperty(globalThis, "document", {
    configurable: true,
    value: { createElement: (name: string) => new Node(name) },
  });
  const program: unknown = await import(join(import.meta.dir, "../../src/dashboard/markdown.client.js"));
  show = (program as { showMarkdown: typeof show }).showMarkdown;
});
afterAll(() => {
  Reflect.deleteProperty(globalThis, "document");
});

function shown(text: string): string {
  const parent = new Node("div");
  show(parent, text, []);
  return parent.parts.map(String).join("");
}

describe("Markdown of an answer", () => {
  test("has headings with and without closing marks", () => {
    expect(shown("# a\n##  b ##\n### c #d# \n#e\n\n# #\n####### f")).toBe(
      "<h3>a</><h4>b</><h5>c #d#</><p>#e</><h3></><p>####### f</>",
    );
  });

  test("has rules of three marks of a kind", () => {
    for (const text of ["---", " * * *  ", "___ _"]) expect(shown(text)).toBe("<hr></>");
    for (const text of ["--", "    ---", "-*-", "--- a"]) expect(shown(text)).not.toContain("<hr>");
  });

  test("has fences with a language, and none with a mark behind it", () => {
    const code = (name: string, text: string) =>
      `<div><div><span>${name}</><button>Copy</></><pre><code>${text}</></></>`;
    expect(shown("```c++ x\na\n\n# b\n```\nd")).toBe(`${code("c++", "a\n\n# b")}<p>d</>`);
    expect(shown("~~~~\n~~~\n~~~~")).toBe(code("text", "~~~"));
    expect(shown("```a``` b")).toBe("<p><code>a</> b</>");
  });

  test("has tables, and none under a line that is no rule", () => {
    const table = (rule: string) => shown(`| a | b |\n${rule}\n| c | d |`);
    const made = "<div><table><thead><tr><th>a</><th>b</></></><tbody><tr><td>c</><td>d</></></></></>";
    for (const rule of ["|---|---|", "---|---", " | :-: | -- ", "-|-|"]) expect(table(rule)).toBe(made);
    for (const rule of ["|-- -|--|", "||-|", "|a-|-|", "|-|-||"]) expect(table(rule)).toStartWith("<p>");
  });

  test("keeps a list together over blank lines", () => {
    expect(shown("- a\n\n\n- b\n\n  c\n\nd")).toBe("<ul><li>a</><li>b<p>c</></></><p>d</>");
    expect(shown("- a\n\n")).toBe("<ul><li>a</></>");
  });

  const N = 100_000;
  const [blanks, letters] = [" ".repeat(N), "a".repeat(N)];
  const slow: [string, string][] = [
    ["a heading with blanks inside", `# a${blanks}b`],
    ["a heading of blanks and a line separator", `# ${blanks.slice(0, 2000)}a\u2028b`],
    ["a heading of marks", `# ${"#".repeat(N)}a`],
    ["a fence of many marks", `${"~".repeat(N)}\``],
    ["a fence with a long language", `~~~${letters}\``],
    ["a fence with blanks", `~~~${blanks}\``],
    ["blank lines in a list", `- a${"\n".repeat(N)}- b`],
    ["an item with blanks and a line separator", `- ${blanks}a\u2028b`],
    ["a table's rule with blanks before it", `a|\n${blanks}x-|`],
    ["a table's rule with blanks in it", `a|\n-${blanks}x|`],
    ["marks of code", "`".repeat(N)],
    ["marks of code before a text", `${"`".repeat(N)}${letters}`],
    ["a rule with blanks", `${"- ".repeat(N / 2)}x`],
    ["stars", `${"*".repeat(N)}${letters}`],
    ["brackets", `${"[".repeat(N)}](https://`],
  ];
  for (const [what, text] of slow)
    test(`takes no time for ${what}`, () => {
      const before = process.cpuUsage();
      expect(shown(text).length).toBeGreaterThan(0);
      const { user, system } = process.cpuUsage(before);
      expect((user + system) / 1e6).toBeLessThan(1);
    });
});
