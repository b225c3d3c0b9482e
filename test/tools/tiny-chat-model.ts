// A whole chat model that can be made in a test: the random Llama 4 of tiny-llama4.ts with the tokenizer and chat
// template of the fixtures. What it says is noise, always the same noise; with temperature 0 it goes on until it is
// stopped, at some thousand tokens a second.

import { copyFileSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { writeTinyLlama4 } from "./tiny-llama4.ts";

const TOKENIZER = join(import.meta.dir, "../fixtures/chat/tiny-bytes");
/** Of the tokenizer, special tokens included; a little more, as real models have. */
export const TINY_CHAT_VOCAB = 720;

/** Tokens that end an answer, of generation_config.json. */
const ENDS = [703];
/** More than a test has time for. */
const CONTEXT = 262_144;

export function writeTinyChatModel(dir: string, seed = 7): string {
  mkdirSync(dir, { recursive: true });
  writeTinyLlama4(dir, seed, { vocab: TINY_CHAT_VOCAB, contextTokens: CONTEXT, never: ENDS });
  for (const name of ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]) {
    copyFileSync(join(TOKENIZER, name), join(dir, name));
  }
  return dir;
}
