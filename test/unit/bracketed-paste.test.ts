// Pastes in the terminal's line editor: what the editor gets of them, and what is sent in the end.

import { expect, test } from "bun:test";
import fc from "fast-check";
import { PasteFilter, Pastes } from "../../src/cli/bracketed-paste.ts";

const BEGIN = "\x1b[200~";
const END = "\x1b[201~";

/** What a line editor is given of the keys, however they are cut. */
async function editorGets(keys: string, pastes: Pastes, size = keys.length): Promise<string> {
  const filter = new PasteFilter(process.stdin, pastes);
  const bytes = Buffer.from(keys);
  for (let at = 0; at < bytes.length; at += size) filter.write(bytes.subarray(at, at + size));
  filter.end();
  let text = "";
  for await (const chunk of filter) text += String(chunk);
  return text;
}

test("a long paste, or one of lines, is a note in the editor and itself in the message", async () => {
  const pastes = new Pastes();
  const long = "word ".repeat(10_000);
  const keys = `Look: ${BEGIN}${long}${END} and ${BEGIN}a\rb\r\nc${END}, ${BEGIN}short${END}.`;
  const line = await editorGets(keys, pastes);
  expect(line).toBe("Look: [paste 1: 50000 characters] and [paste 2: 3 lines], short.");
  expect(pastes.filled(line)).toBe(`Look: ${long} and a\nb\nc, short.`);
  expect(pastes.filled("[paste 9: 1 lines] stays")).toBe("[paste 9: 1 lines] stays");
});

test("keys pass unchanged, wherever their bytes are cut", async () => {
  const key = fc.constantFrom("a", "é", "\x1b[A", "\x1b[200", "\x1b", "\r", "\x03", "😀", `${BEGIN}x${END}`);
  await fc.assert(
    fc.asyncProperty(fc.array(key, { maxLength: 12 }), fc.integer({ min: 1, max: 9 }), async (keys, size) => {
      const typed = `${keys.join("")}.`;
      const expected = keys.map((each) => (each.startsWith(BEGIN) ? "x" : each)).join("");
      fc.pre(!typed.replaceAll(`${BEGIN}x${END}`, "").includes(BEGIN));
      expect(await editorGets(typed, new Pastes(), size)).toBe(`${expected}.`);
    }),
  );
});
