import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { completeLength, Detokenizer } from "../../src/chat/detokenizer.ts";
import { Tokenizer } from "../../src/chat/tokenizer.ts";
import { REAL_MODELS, TINY_BYTES, TINY_FALLBACK } from "./chat-folders.ts";

function stream(detokenizer: Detokenizer, ids: readonly number[]): string[] {
  return [...ids.map((id) => detokenizer.push(id)), detokenizer.flush()];
}

async function expectStreamsEqual(dir: string): Promise<void> {
  const tokenizer = await Tokenizer.load(dir);
  const { vocabSize } = tokenizer;
  // Half of the ids from the beginning of the vocabulary, where the single bytes are: broken characters are frequent.
  const id = fc.oneof(fc.nat(Math.min(300, vocabSize - 1)), fc.nat(vocabSize + 5));
  fc.assert(
    fc.property(fc.array(id, { maxLength: 60, size: "max" }), (ids) => {
      const pieces = stream(new Detokenizer(tokenizer.table), ids);
      expect(pieces.join("")).toBe(tokenizer.decode(ids));
      for (const piece of pieces) expect(piece.isWellFormed()).toBe(true);
    }),
    { numRuns: 500 },
  );
}

describe("streaming gives what decoding all at once gives, for any ids", () => {
  test("of a byte-level tokenizer", () => expectStreamsEqual(TINY_BYTES));
  test("of a tokenizer with byte fallback", () => expectStreamsEqual(TINY_FALLBACK));
  for (const model of REAL_MODELS) {
    test.skipIf(model.missing !== null)(`of ${model.name}`, () => expectStreamsEqual(model.dir));
  }
});

test("no piece holds half a character, and each character comes with its last byte", async () => {
  const tokenizer = await Tokenizer.load(TINY_BYTES);
  const text = "né 你好 👩‍👩‍👧 𝄞!";
  fc.assert(
    fc.property(fc.constantFrom(text, "😀".repeat(5), "\u0301\ud7ff\ue000\uffff\u{10ffff}"), (sample) => {
      const detokenizer = new Detokenizer(tokenizer.table);
      let seen = "";
      for (const byte of new TextEncoder().encode(sample)) {
        // Byte by byte: the tokens of single bytes.
        seen += detokenizer.push(byteId(tokenizer, byte));
        expect(sample.startsWith(seen)).toBe(true);
        expect(seen).not.toContain("\ufffd");
      }
      expect(seen).toBe(sample);
      expect(detokenizer.flush()).toBe("");
    }),
  );
});

function byteId(tokenizer: Tokenizer, byte: number): number {
  for (let id = 0; id < tokenizer.vocabSize; id++) {
    const bytes = tokenizer.tokenBytes(id);
    if (bytes.length === 1 && bytes[0] === byte) return id;
  }
  throw new Error(`no token for byte ${byte}`);
}

test("an unfinished character becomes U+FFFD at the end", async () => {
  const tokenizer = await Tokenizer.load(TINY_BYTES);
  const detokenizer = new Detokenizer(tokenizer.table);
  expect(detokenizer.push(byteId(tokenizer, 0xf0))).toBe("");
  expect(detokenizer.push(byteId(tokenizer, 0x9f))).toBe("");
  expect(detokenizer.flush()).toBe("\ufffd");
  expect(detokenizer.flush()).toBe("");
});

test("special tokens can be left out, and do not cut a character", async () => {
  const tokenizer = await Tokenizer.load(TINY_BYTES);
  const end = tokenizer.addedId("<|end|>") ?? -1;
  const [first = -1, second = -1] = [0xc3, 0xa9].map((byte) => byteId(tokenizer, byte));
  const skipping = new Detokenizer(tokenizer.table, { skipSpecials: true });
  expect(stream(skipping, [first, end, second, end]).join("")).toBe("é");
  expect(stream(new Detokenizer(tokenizer.table), [first, second, end]).join("")).toBe("é<|end|>");
});

test("the held back ending is exactly what more bytes can complete", () => {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  // The definition: an ending is unfinished if some continuation makes one character of it.
  const completions = [
    [0x80],
    [0xbf],
    [0x80, 0x80],
    [0xbf, 0xbf],
    [0x90, 0x80, 0x80],
    [0x8f, 0x80, 0x80],
    [0xa0, 0x80],
    [0x9f, 0x80],
    [0x80, 0x80, 0x80],
  ];
  const completable = (bytes: readonly number[]): boolean =>
    completions.some((rest) => {
      const text = decoder.decode(Uint8Array.from([...bytes, ...rest]));
      return [...text].length === 1 && text !== "\ufffd" && bytes.length > 0;
    });
  const byte = fc.constantFrom(
    0x41,
    0x80,
    0x8f,
    0x90,
    0x9f,
    0xa0,
    0xbf,
    0xc1,
    0xc3,
    0xe0,
    0xe4,
    0xed,
    0xef,
    0xf0,
    0xf1,
    0xf4,
    0xf5,
    0xff,
  );
  fc.assert(
    fc.property(fc.array(byte, { maxLength: 6 }), (bytes) => {
      const whole = completeLength(Uint8Array.from(bytes), bytes.length);
      const held = [1, 2, 3].filter((n) => n <= bytes.length && completable(bytes.slice(-n)));
      expect(bytes.length - whole).toBe(held[0] ?? 0);
    }),
    { numRuns: 3000 },
  );
});

test("a text that goes on where a prompt ended keeps the space that it begins with", async () => {
  const tokenizer = await Tokenizer.load(TINY_FALLBACK);
  const ids = tokenizer.encodeText("a");
  expect(tokenizer.table.stripsFirstSpace).toBe(true);
  expect(stream(new Detokenizer(tokenizer.table), ids).join("")).toBe("a");
  const whole = stream(new Detokenizer(tokenizer.table, { continues: true }), ids).join("");
  expect(whole).toBe(" a");
});
