// Where the chat tests find tokenizers: tiny ones in the repository, real ones when they were made (see the skip reasons).
import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  checkTokenizerFiles,
  readTokenizerFiles,
  type TokenizerFiles,
} from "../../src/chat/tokenizer-files.ts";

const root = join(import.meta.dir, "../..");

export const TINY_BYTES = join(root, "test/fixtures/chat/tiny-bytes");
export const TINY_FALLBACK = join(root, "test/fixtures/chat/tiny-fallback");

export interface RealModel {
  readonly name: string;
  readonly dir: string;
  readonly encodePath: string;
  readonly chatPath: string;
  /** Why the model cannot be tested here; null if it can. */
  readonly missing: string | null;
}

function real(name: string, folder: string, how: string): RealModel {
  const dir = join(root, "build", folder);
  const fixtures = join(root, "../shared/fixtures");
  const missing = !existsSync(join(dir, "tokenizer.json"))
    ? `no build/${folder}: ${how}`
    : !existsSync(fixtures)
      ? "no ../shared/fixtures"
      : null;
  if (missing !== null) console.log(`skipped: ${name}'s tokenizer (${missing})`);
  return {
    name,
    dir,
    encodePath: join(fixtures, `${name}-encode.json`),
    chatPath: join(fixtures, `${name}-chat.json`),
    missing,
  };
}

export const REAL_MODELS: readonly RealModel[] = [
  real("llama4", "llama4-tokenizer", "run test/tools/make_llama4_tokenizer.py build/llama4-tokenizer"),
  real("smollm2", "smollm2", "convert SmolLM2's GGUF into it"),
];

/** The tiny byte-level tokenizer with another chat template. */
export async function withTemplate(template: string): Promise<TokenizerFiles> {
  const files = await readTokenizerFiles(TINY_BYTES);
  return { ...files, chatTemplates: { default: template } };
}

/** A tokenizer of the 256 bytes (ids 0 to 255), the merges given, and added tokens after them. */
export function byteTokenizer(
  merges: readonly [string, string][],
  added: readonly { content: string; special: boolean; [flag: string]: unknown }[],
  alphabet: string,
): TokenizerFiles {
  const vocab: Record<string, number> = {};
  for (const letter of alphabet) vocab[letter] = Object.keys(vocab).length;
  for (const [left, right] of merges) vocab[left + right] = Object.keys(vocab).length;
  const base = Object.keys(vocab).length;
  return checkTokenizerFiles({
    where: "memory",
    tokenizer: {
      added_tokens: added.map((token, i) => ({ id: base + i, normalized: false, ...token })),
      normalizer: null,
      pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, use_regex: false },
      decoder: { type: "ByteLevel" },
      model: { type: "BPE", vocab, merges },
    },
    tokenizerConfig: {},
  });
}
