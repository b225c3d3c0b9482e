// A model that knows nothing but the masks of a grammar: draws tokens of a small vocabulary until the answer ends.

import { buildTokenTable, bytesOf, FLAG_SPECIAL, type TokenTable } from "../../src/chat/token-table.ts";
import { asCaravanError } from "../../src/errors.ts";
import { compileGrammar } from "../../src/grammar/compile.ts";
import { Automata, type InsideTokens, stringStates } from "../../src/grammar/inside-tokens.ts";
import { GrammarMatcher } from "../../src/grammar/matcher.ts";
import type { GrammarSpec } from "../../src/grammar/spec.ts";
import { buildTokenTrie, type TokenTrie } from "../../src/grammar/token-trie.ts";

export interface SmallVocabulary {
  table: TokenTable;
  trie: TokenTrie;
  /** Ends answers. */
  end: number;
  strings: Map<number, InsideTokens>;
  stringStates: number;
}

/** Every byte, the words given, and an end token. */
export function smallVocabulary(words: readonly string[]): SmallVocabulary {
  const encoder = new TextEncoder();
  const entries = [
    ...Array.from({ length: 256 }, (_, byte) => ({ bytes: Uint8Array.of(byte), flags: 0 })),
    ...words.map((word) => ({ bytes: encoder.encode(word), flags: 0 })),
    { bytes: encoder.encode("<end>"), flags: FLAG_SPECIAL },
  ];
  const table = buildTokenTable(entries, false);
  return {
    table,
    trie: buildTokenTrie(table, entries.length),
    end: entries.length - 1,
    strings: new Map(),
    stringStates: stringStates(),
  };
}

/** Pieces of JSON and text as vocabularies have them, across the borders of values too. */
export const JSON_WORDS: readonly string[] = [
  ...[
    '{"',
    '":',
    '": "',
    '","',
    '", "',
    '"}',
    '"]',
    '"},',
    "}}",
    "]]",
    "[]",
    "{}",
    "},",
    "],",
    ":[",
    ': "',
    "\n  ",
  ],
  ...[
    "true",
    "false",
    "null",
    "tru",
    "nul",
    "12",
    "123",
    "0.",
    ".5",
    "-1",
    "e1",
    "10",
    "000",
    "\n",
    "  ",
    "    ",
  ],
  ...[
    "name",
    '"name',
    "kind",
    "value",
    "a",
    "ab",
    "abc",
    "foo",
    "é",
    "日本",
    "😀",
    "\\n",
    '\\"',
    "\\u00",
    "x-",
  ],
];

/** Matchers of one grammar. */
export function matcherSource(spec: GrammarSpec, vocabulary: SmallVocabulary): () => GrammarMatcher {
  const grammar = compileGrammar(spec);
  const automata = new Automata(grammar, vocabulary.trie, vocabulary.strings, vocabulary.stringStates);
  return () => new GrammarMatcher(automata, vocabulary.table);
}

/** Tokens whose bit is set. */
export function allowed(mask: Uint32Array): number[] {
  const ids: number[] = [];
  mask.forEach((word, i) => {
    for (let bit = 0; bit < 32; bit++) if ((word >>> bit) % 2 === 1) ids.push(32 * i + bit);
  });
  return ids;
}

/** The text of a random answer, or undefined when it has not ended within `most` tokens. Long texts are pressed to end:
 * from half of `most` on, the token that closes most is taken. */
export function randomAnswer(
  matcher: GrammarMatcher,
  vocabulary: SmallVocabulary,
  random: () => number,
  most = 400,
): string | undefined {
  const bytes: number[] = [];
  for (let step = 0; step < most && !matcher.complete; step++) {
    const tokens = allowed(matcher.mask([vocabulary.end]));
    const pressed = step > most / 2;
    const closing = pressed ? closest(tokens, vocabulary) : undefined;
    const token = closing ?? tokens[Math.floor(random() * tokens.length)];
    if (token === undefined) throw new Error("an empty mask");
    if (token === vocabulary.end) return text(bytes);
    if (!matcher.accept(token)) throw new Error(`the matcher refuses ${token}, which its mask allows`);
    bytes.push(...bytesOf(vocabulary.table, token));
  }
  return matcher.mayEnd ? text(bytes) : undefined;
}

function closest(tokens: readonly number[], { end, table }: SmallVocabulary): number | undefined {
  if (tokens.includes(end)) return end;
  for (const mark of '"}]') {
    const found = tokens.find((token) => new TextDecoder().decode(bytesOf(table, token)) === mark);
    if (found !== undefined) return found;
  }
  return undefined;
}

function text(bytes: readonly number[]): string {
  return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes));
}

/** Of a schema that a request gives as its parameter "schema". */
export function bySchema(schema: unknown): GrammarSpec {
  return { type: "json_schema", schema, param: "schema" };
}

/** Whether the matcher takes the text whole, byte by byte. */
export function takesWhole(matcher: GrammarMatcher, text: string): boolean {
  for (const byte of new TextEncoder().encode(text)) if (!matcher.accept(byte)) return false;
  return matcher.mayEnd;
}

/** What is said of a schema that is refused; "": it is enforced. Throws where it is refused in another way. */
export function refusalOf(schema: unknown, vocabulary: Parameters<typeof matcherSource>[1]): string {
  try {
    matcherSource(bySchema(schema), vocabulary);
    return "";
  } catch (thrown) {
    const { code, param } = asCaravanError(thrown);
    if (code !== "unsupported_parameter" || param !== "schema") throw thrown;
    return thrown instanceof Error ? thrown.message : String(thrown);
  }
}
