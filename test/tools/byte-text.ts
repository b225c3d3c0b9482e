// A text service with 256 byte tokens and a few control tokens: every text has an obvious tokenization, so tests of the
// API can say what they expect without a real vocabulary. Characters beyond ASCII take several tokens.

import type {
  Detokenizer,
  DetokenizerOptions,
  RenderInput,
  TextService,
} from "../../src/api/model-directory.ts";

export const BEGIN = 256;
export const END = 257;
export const HEADER = 258;
export const PYTHON_START = 259;
export const PYTHON_END = 260;
export const VOCABULARY = 261;

const SPECIALS = new Map<number, string>([
  [BEGIN, "<|begin|>"],
  [END, "<|end|>"],
  [HEADER, "<|header|>"],
  [PYTHON_START, "<|python_start|>"],
  [PYTHON_END, "<|python_end|>"],
]);

const encoder = new TextEncoder();

/** The ids of a text, as plain bytes. */
export function bytesOf(text: string): number[] {
  return Array.from(encoder.encode(text));
}

function tokenBytes(id: number): Uint8Array {
  const special = SPECIALS.get(id);
  return special === undefined ? Uint8Array.of(id) : encoder.encode(special);
}

function encode(text: string, { specials }: { specials: boolean }): number[] {
  if (!specials) return bytesOf(text);
  const ids: number[] = [];
  for (const piece of text.split(/(<\|\w+\|>)/)) {
    const special = [...SPECIALS].find(([, name]) => name === piece);
    if (special === undefined) ids.push(...bytesOf(piece));
    else ids.push(special[0]);
  }
  return ids;
}

/**
 * Renders `<|begin|>`, then for each message `<|header|>role:content<|end|>`; tools come first, as a message of their own,
 * and calls after their message's content, both as JSON.
 */
export const byteText: TextService = {
  renderChat({ messages, addGenerationPrompt, tools }: RenderInput) {
    const ids = [BEGIN];
    if (tools !== undefined) ids.push(HEADER, ...bytesOf(`tools:${JSON.stringify(tools)}`), END);
    for (const { role, content, tool_calls } of messages) {
      const calls = tool_calls === undefined ? "" : JSON.stringify(tool_calls);
      ids.push(HEADER, ...bytesOf(`${role}:${content}${calls}`), END);
    }
    if (addGenerationPrompt) ids.push(HEADER, ...bytesOf("assistant:"));
    return { text: byteText.decode(ids), ids };
  },
  encode,
  decode: (ids) => Buffer.concat(ids.map(tokenBytes)).toString("utf8"),
  tokenBytes,
};

export function newByteDetokenizer({ skipSpecials, keep = [] }: DetokenizerOptions): Detokenizer {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return {
    push: (id) =>
      skipSpecials && SPECIALS.has(id) && !keep.includes(SPECIALS.get(id) ?? "")
        ? ""
        : decoder.decode(tokenBytes(id), { stream: true }),
    flush: () => decoder.decode(),
  };
}
