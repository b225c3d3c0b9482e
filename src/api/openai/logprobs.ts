// Log-probabilities in the two forms of OpenAI's API: a list with bytes for chat, parallel arrays for completions.

import type { TopLogprobs } from "../../engine/protocol.ts";
import type { TextService } from "../model-directory.ts";

/** A token to show; the first token of an echoed prompt has no log-probability. */
export interface ShownToken {
  id: number;
  logprob: number | null;
  top: TopLogprobs | null;
  /** UTF-16 units from the start of the reply's text. */
  offset: number;
}

interface ChatToken {
  token: string;
  logprob: number;
  bytes: number[];
}

export interface ChatLogprobs {
  content: (ChatToken & { top_logprobs: ChatToken[] })[];
  refusal: null;
}

export interface CompletionLogprobs {
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs: (Record<string, number> | null)[];
  text_offset: number[];
}

/** JSON has no -Infinity; a banned token that was reported anyway gets OpenAI's stand-in. */
const LOWEST_LOGPROB = -9999;

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A token's bytes as text; those of part of a character in the form `bytes:\xe2\x80`, as OpenAI writes them. */
export function tokenText(bytes: Uint8Array): string {
  try {
    return utf8.decode(bytes);
  } catch {
    return `bytes:${Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")}`;
  }
}

function chatToken(text: TextService, id: number, logprob: number): ChatToken {
  const bytes = text.tokenBytes(id);
  return { token: tokenText(bytes), logprob: Math.max(logprob, LOWEST_LOGPROB), bytes: Array.from(bytes) };
}

export function chatLogprobs(text: TextService, tokens: readonly ShownToken[]): ChatLogprobs {
  return {
    content: tokens.map(({ id, logprob, top }) => ({
      ...chatToken(text, id, logprob ?? 0),
      top_logprobs: (top ?? []).map(([other, value]) => chatToken(text, other, value)),
    })),
    refusal: null,
  };
}

/** top_logprobs holds the token itself too, so it may have one entry more than was asked for (as OpenAI's). */
export function completionLogprobs(text: TextService, tokens: readonly ShownToken[]): CompletionLogprobs {
  const shown = tokens.map(({ id }) => tokenText(text.tokenBytes(id)));
  return {
    tokens: shown,
    token_logprobs: tokens.map(({ logprob }) =>
      logprob === null ? null : Math.max(logprob, LOWEST_LOGPROB),
    ),
    top_logprobs: tokens.map(({ logprob, top }, index) => {
      if (top === null) return null;
      const entries = new Map<string, number>();
      for (const [other, value] of top) {
        const name = tokenText(text.tokenBytes(other));
        // Two ids can have the same text; the more probable one comes first and stays.
        if (!entries.has(name)) entries.set(name, Math.max(value, LOWEST_LOGPROB));
      }
      const own = shown[index];
      if (own !== undefined && logprob !== null && !entries.has(own))
        entries.set(own, Math.max(logprob, LOWEST_LOGPROB));
      return Object.fromEntries(entries);
    }),
    text_offset: tokens.map(({ offset }) => offset),
  };
}
