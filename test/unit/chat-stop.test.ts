import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { StopMatcher } from "../../src/chat/stop.ts";
import { CaravanError } from "../../src/errors.ts";
import { processorMsOf } from "../tools/in-time.ts";

function run(
  stops: readonly string[],
  pieces: readonly string[],
): { text: string; matched: string | undefined } {
  const matcher = new StopMatcher(stops);
  let text = "";
  for (const piece of pieces) {
    const result = matcher.push(piece);
    text += result.text;
    if (result.stopped) return { text, matched: result.matched };
  }
  return { text: text + matcher.flush(), matched: undefined };
}

/** The definition: the first position where a stop string ends; of those that end there the longest. */
function definition(stops: readonly string[], text: string): { text: string; matched: string | undefined } {
  for (let end = 1; end <= text.length; end++) {
    const found = stops
      .filter((stop) => text.slice(0, end).endsWith(stop))
      .sort((a, b) => b.length - a.length)[0];
    if (found !== undefined) return { text: text.slice(0, end - found.length), matched: found };
  }
  return { text, matched: undefined };
}

const letters = fc.string({ unit: fc.constantFrom("a", "b", "\n", "😀"), maxLength: 12 });
const stopStrings = fc.array(
  fc.string({ unit: fc.constantFrom("a", "b", "\n", "😀"), minLength: 1, maxLength: 5 }),
  { maxLength: 4 },
);

describe("stop strings", () => {
  test("are found across any pieces, as in the whole text", () => {
    fc.assert(
      fc.property(stopStrings, fc.array(letters, { maxLength: 10 }), (stops, pieces) => {
        expect(run(stops, pieces)).toEqual(definition(stops, pieces.join("")));
      }),
      { numRuns: 2000 },
    );
  });
  test("hold back exactly the longest ending that may become one", () => {
    fc.assert(
      fc.property(stopStrings, fc.array(letters, { maxLength: 8 }), (stops, pieces) => {
        const matcher = new StopMatcher(stops);
        let seen = "";
        let sent = "";
        for (const piece of pieces) {
          const result = matcher.push(piece);
          if (result.stopped) return;
          seen += piece;
          sent += result.text;
          const open = (n: number): boolean =>
            stops.some((stop) => stop.length > n && stop.startsWith(seen.slice(seen.length - n)));
          let longest = 0;
          for (let n = 1; n <= seen.length; n++) if (open(n)) longest = n;
          expect(sent).toBe(seen.slice(0, seen.length - longest));
        }
      }),
      { numRuns: 1000 },
    );
  });
  test("without any, text passes at once", () => {
    expect(new StopMatcher([]).push("abc")).toEqual({ text: "abc", stopped: false });
  });
  test("end the stream: nothing comes after one", () => {
    const matcher = new StopMatcher(["END"]);
    expect(matcher.push("one EN")).toEqual({ text: "one ", stopped: false });
    expect(matcher.push("D two")).toEqual({ text: "", stopped: true, matched: "END" });
    expect(matcher.push("three")).toEqual({ text: "", stopped: true });
    expect(matcher.flush()).toBe("");
  });
  test("that are empty are refused", () => {
    expect(() => new StopMatcher(["a", ""])).toThrow(CaravanError);
  });
  test("of one repeated character take linear time", () => {
    const matcher = new StopMatcher([`${"a".repeat(5000)}b`]);
    let sent = 0;
    const ms = processorMsOf(() => {
      for (let i = 0; i < 200_000; i++) sent += matcher.push("a").text.length;
    });
    expect(sent).toBe(195_000);
    expect(ms).toBeLessThan(4000);
  });
});
