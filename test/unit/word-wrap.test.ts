// Answers on a terminal: lines break between words, whatever pieces the text comes in.

import { expect, test } from "bun:test";
import fc from "fast-check";
import { WordWrap } from "../../src/cli/word-wrap.ts";

const COLUMNS = 12;

/** To the end of the line. No test's text has an E. */
const ERASE = "\x1b[K";

/** Lines of a terminal of so many columns that was sent the text: the last column is never reached. */
function screen(text: string): string[] {
  const lines: string[][] = [[]];
  let at = 0;
  for (const part of text.replaceAll(ERASE, "E")) {
    const line = lines.at(-1) ?? [];
    if (part === "E") line.length = at;
    else if (part === "\b") at = Math.max(0, at - 1);
    else if (part === "\n") {
      lines.push([]);
      at = 0;
    } else {
      line[at] = part;
      at += 1;
    }
  }
  return lines.map((line) => line.join(""));
}

function wrapped(pieces: readonly string[]): string[] {
  let out = "";
  const wrap = new WordWrap(
    (text) => {
      out += text;
    },
    () => COLUMNS,
  );
  for (const piece of pieces) wrap.push(piece);
  return screen(out);
}

test("a word that does not fit moves to the next line", () => {
  expect(wrapped(["hello wonderful day\n\nof ours"])).toEqual(["hello ", "wonderful ", "day", "", "of ours"]);
  expect(wrapped([..."hello wonderful day"])).toEqual(["hello ", "wonderful ", "day"]);
});

test("a word that is longer than a line is broken at its end", () => {
  expect(wrapped(["a abcdefghijklmnopqrstuvwxyz b"])).toEqual(["a abcdefghi", "jklmnopqrst", "uvwxyz b"]);
});

test("whatever the pieces, the text is the same but for spaces at breaks, and short words stay whole", () => {
  const word = fc.string({ minLength: 1, maxLength: 7, unit: fc.constantFrom("a", "b", "c", "-") });
  fc.assert(
    fc.property(fc.array(word, { maxLength: 30 }), fc.integer({ min: 1, max: 9 }), (words, size) => {
      const text = words.join(" ");
      const pieces = text.match(new RegExp(`.{1,${size}}`, "g")) ?? [];
      const lines = wrapped(pieces);
      expect(lines.join(" ").split(/ +/).filter(Boolean)).toEqual(words);
      for (const line of lines) expect(line.length).toBeLessThan(COLUMNS);
    }),
  );
});
