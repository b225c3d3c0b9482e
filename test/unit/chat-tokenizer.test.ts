import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { Tokenizer } from "../../src/chat/tokenizer.ts";
import { CaravanError } from "../../src/errors.ts";
import { processorMsOf } from "../tools/in-time.ts";
import { byteTokenizer, REAL_MODELS, TINY_BYTES, TINY_FALLBACK } from "./chat-folders.ts";

interface EncodeCase {
  readonly text: string;
  readonly ids: number[];
  readonly with_specials?: number[];
  readonly ids_with_specials?: number[];
}
interface DecodeCase {
  readonly ids: number[];
  readonly text: string;
}

async function expectFixture(tokenizer: Tokenizer, path: string): Promise<void> {
  const fixture: { encode: EncodeCase[]; decode: DecodeCase[] } = await Bun.file(path).json();
  expect(fixture.encode.length).toBeGreaterThan(50);
  for (const { text, ids, with_specials, ids_with_specials } of fixture.encode) {
    expect({ text, ids: tokenizer.encodeText(text) }).toEqual({ text, ids });
    const special = with_specials ?? ids_with_specials ?? ids;
    expect({ text, ids: tokenizer.encodeWithSpecials(text) }).toEqual({ text, ids: special });
  }
  for (const { ids, text } of fixture.decode)
    expect({ ids, text: tokenizer.decode(ids) }).toEqual({ ids, text });
}

describe("a tokenizer equals Hugging Face's", () => {
  test("on the byte-level fixture", async () => {
    await expectFixture(await Tokenizer.load(TINY_BYTES), join(TINY_BYTES, "expected.json"));
  });
  test("on the fixture with byte fallback", async () => {
    await expectFixture(await Tokenizer.load(TINY_FALLBACK), join(TINY_FALLBACK, "expected.json"));
  });
  for (const model of REAL_MODELS) {
    test.skipIf(model.missing !== null)(`on every ${model.name} fixture`, async () => {
      await expectFixture(await Tokenizer.load(model.dir), model.encodePath);
    });
  }
});

describe("special tokens", () => {
  test("never come from user text, whatever it holds", async () => {
    const tokenizer = await Tokenizer.load(TINY_BYTES);
    const piece = fc.constantFrom("<|begin|>", "<|end|>", "<|", "|>", "end", "<think>", " ", "é", "<");
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 20 }), (pieces) => {
        const text = pieces.join("");
        const ids = tokenizer.encodeText(text);
        expect(ids.some((id) => tokenizer.isSpecial(id))).toBe(false);
        expect(tokenizer.decode(ids)).toBe(text);
      }),
    );
  });
  test("do not come from user text even when the vocabulary and its merges hold them", () => {
    const files = byteTokenizer([["<", "s"]], [{ content: "<s", special: true, id: 2 }], "<s");
    const tokenizer = new Tokenizer(files);
    expect(tokenizer.encodeText("<s")).toEqual([0, 1]);
    expect(tokenizer.encodeWithSpecials("<s")).toEqual([2]);
  });
  test("are matched leftmost, then longest, with the flags of tokenizer.json", () => {
    const added = [
      { content: "<a", special: true },
      { content: "<ab>", special: true },
      { content: "x", special: false, single_word: true },
      { content: "<l", special: true, lstrip: true, rstrip: true },
    ];
    const tokenizer = new Tokenizer(byteTokenizer([], added, "<abx>lĠ"));
    expect(tokenizer.encodeWithSpecials("<ab><a")).toEqual([8, 7]);
    expect(tokenizer.encodeWithSpecials("xa<x")).toEqual([3, 1, 0, 9]);
    expect(tokenizer.encodeWithSpecials("a  <l  b")).toEqual([1, 10, 2]);
  });
  test("name the beginning and the end of a text", async () => {
    const tokenizer = await Tokenizer.load(TINY_BYTES);
    const begin = tokenizer.addedId("<|begin|>");
    expect(tokenizer.bosId).toBe(begin);
    expect(tokenizer.beginIds).toEqual([begin ?? -1]);
    expect(tokenizer.eosIds).toEqual([tokenizer.addedId("<|end|>") ?? -1]);
    const fallback = await Tokenizer.load(TINY_FALLBACK);
    expect([fallback.bosId, ...fallback.eosIds, ...fallback.beginIds]).toEqual([1, 2, 1]);
  });
});

test("token bytes are raw bytes, also of tokens that are half a character", async () => {
  const tokenizer = await Tokenizer.load(TINY_BYTES);
  const ids = tokenizer.encodeText("𝄞 né");
  const bytes = ids.flatMap((id) => [...tokenizer.tokenBytes(id)]);
  expect(bytes).toEqual([...new TextEncoder().encode("𝄞 né")]);
  expect(tokenizer.tokenBytes(tokenizer.vocabSize)).toHaveLength(0);
  expect(tokenizer.tokenBytes(-1)).toHaveLength(0);
});

test("lone surrogates are encoded as U+FFFD", async () => {
  const tokenizer = await Tokenizer.load(TINY_BYTES);
  expect(tokenizer.decode(tokenizer.encodeText("a\ud800b"))).toBe("a\ufffdb");
});

test("a long piece is merged as a short one is: lowest rank first, leftmost of equals", () => {
  // A small alphabet with many merges; the reference looks at every pair again after each merge.
  const merges: [string, string][] = [
    ["b", "a"],
    ["a", "a"],
    ["ba", "aa"],
    ["a", "b"],
    ["aa", "aa"],
    ["ab", "ba"],
    ["aa", "b"],
  ];
  const files = byteTokenizer(merges, [], "ab");
  const tokenizer = new Tokenizer(files);
  const reference = (text: string): string[] => {
    const symbols = [...text];
    for (;;) {
      const ranks = symbols
        .slice(1)
        .map((right, i) => merges.findIndex(([l, r]) => l === symbols[i] && r === right));
      const best = Math.min(...ranks.filter((rank) => rank >= 0));
      if (best === Number.POSITIVE_INFINITY) return symbols;
      const at = ranks.indexOf(best);
      symbols.splice(at, 2, `${symbols[at]}${symbols[at + 1]}`);
    }
  };
  fc.assert(
    fc.property(
      fc.string({ unit: fc.constantFrom("a", "b"), minLength: 1, maxLength: 150, size: "max" }),
      (text) => {
        const pieces = tokenizer.encodeText(text).map((id) => tokenizer.decode([id]));
        expect(pieces).toEqual(reference(text));
      },
    ),
  );
});

describe("a megabyte takes linear time and pauses often:", () => {
  const size = 1 << 20;
  const random = (): string => {
    let state = 7;
    const next = (below: number): number => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      return (state >>> 8) % below;
    };
    return Array.from({ length: size / 4 }, () => String.fromCodePoint(0x20 + next(0xa000))).join("");
  };
  const texts: [string, () => string][] = [
    ["one letter", () => "a".repeat(size)],
    ["one capital letter", () => "A".repeat(size)],
    ["spaces", () => " ".repeat(size)],
    ["spaces before a letter", () => `${" ".repeat(size)}x`],
    ["line ends", () => "\n".repeat(size)],
    ["digits", () => "7".repeat(size)],
    ["beginnings of special tokens", () => "<|".repeat(size / 2)],
    ["random Unicode", random],
  ];
  for (const [name, make] of texts) {
    test(name, async () => {
      const tokenizer = await Tokenizer.load(TINY_BYTES);
      const text = make();
      const time = (part: string): { ms: number; pauses: number; ids: number[] } => {
        const steps = tokenizer.encodeWithSpecialsSteps(part);
        let pauses = 0;
        let step = steps.next();
        const ms = processorMsOf(() => {
          for (; !step.done; pauses++) step = steps.next();
        });
        return { ms, pauses, ids: step.done ? step.value : [] };
      };
      time(text.slice(0, size / 16));
      const eighth = time(text.slice(0, size / 8));
      const whole = time(text);
      expect(tokenizer.decode(whole.ids)).toBe(text);
      expect(whole.pauses).toBeGreaterThan(40);
      // Eight times the text: quadratic work would take 64 times as long.
      expect(whole.ms).toBeLessThan(24 * eighth.ms + 200);
    });
  }
});

describe("broken files are refused with bad_file:", () => {
  const dir = mkdtempSync(join(tmpdir(), "caravan-tokenizer-"));
  afterAll(() => rmSync(dir, { recursive: true }));

  const good = {
    model: { type: "BPE", vocab: { a: 0, b: 1, ab: 2 }, merges: [["a", "b"]] },
    decoder: { type: "ByteLevel" },
    pre_tokenizer: { type: "ByteLevel", use_regex: false },
  };
  const refusal = async (text: string): Promise<CaravanError> => {
    writeFileSync(join(dir, "tokenizer.json"), text);
    try {
      await Tokenizer.load(dir);
    } catch (error) {
      if (error instanceof CaravanError) return error;
      throw error;
    }
    throw new Error("the file was accepted");
  };
  const cases: [string, string][] = [
    ["cut short", JSON.stringify(good).slice(0, 40)],
    ["empty", ""],
    ["not an object", "[]"],
    ["no model", JSON.stringify({ decoder: good.decoder })],
    ["an empty vocabulary", JSON.stringify({ ...good, model: { ...good.model, vocab: {}, merges: [] } })],
    ["an id that is no number", JSON.stringify({ ...good, model: { ...good.model, vocab: { a: "0" } } })],
    [
      "an id far too large",
      JSON.stringify({ ...good, model: { ...good.model, vocab: { a: 1e12 }, merges: [] } }),
    ],
    [
      "a merge of unknown tokens",
      JSON.stringify({ ...good, model: { ...good.model, merges: [["a", "z"]] } }),
    ],
    ["a merge that is no pair", JSON.stringify({ ...good, model: { ...good.model, merges: ["a"] } })],
    [
      "a bad expression",
      JSON.stringify({
        ...good,
        pre_tokenizer: { type: "Split", pattern: { Regex: "(" }, behavior: "Isolated" },
      }),
    ],
    ["added tokens without ids", JSON.stringify({ ...good, added_tokens: [{ content: "<s>" }] })],
  ];
  for (const [name, text] of cases) {
    test(name, async () => {
      const error = await refusal(text);
      expect(error.code).toBe("bad_file");
      expect(error.where).toContain(dir);
    });
  }
  test("missing", async () => {
    await expect(Tokenizer.load(join(dir, "nowhere"))).rejects.toMatchObject({ code: "bad_file" });
  });
  test("while kinds that are not built are unsupported_model", async () => {
    const unigram = await refusal(JSON.stringify({ ...good, model: { type: "Unigram", vocab: [] } }));
    expect(unigram.code).toBe("unsupported_model");
    const suffix = await refusal(
      JSON.stringify({ ...good, model: { ...good.model, end_of_word_suffix: "</w>" } }),
    );
    expect(suffix.code).toBe("unsupported_model");
    const decoder = await refusal(JSON.stringify({ ...good, decoder: { type: "WordPiece" } }));
    expect(decoder.code).toBe("unsupported_model");
  });
  test("the repaired file loads from tokenizer.json alone", async () => {
    writeFileSync(join(dir, "tokenizer.json"), JSON.stringify(good));
    const tokenizer = await Tokenizer.load(dir);
    expect(tokenizer.encodeText("abba")).toEqual([2, 1, 0]);
    expect(tokenizer.bosId).toBeNull();
    expect(tokenizer.eosIds).toEqual([]);
  });
});
