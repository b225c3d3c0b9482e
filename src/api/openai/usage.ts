// Adds up the usage of a request's sequences. Answers to the same prompt count it once, as OpenAI does.

import type { Usage } from "../../engine/protocol.ts";

export interface UsageBody {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details: { cached_tokens: number };
  completion_tokens_details: { reasoning_tokens: number };
}

export class UsageTotals {
  #prompt = 0;
  #completion = 0;
  #cached = 0;

  /** Sequences i*n … i*n + n-1 answer the i-th prompt. */
  constructor(readonly n: number) {}

  add(sequence: number, usage: Usage): void {
    this.#completion += usage.completion_tokens;
    if (sequence % this.n !== 0) return;
    this.#prompt += usage.prompt_tokens;
    this.#cached += usage.cached_tokens;
  }

  body(): UsageBody {
    return {
      prompt_tokens: this.#prompt,
      completion_tokens: this.#completion,
      total_tokens: this.#prompt + this.#completion,
      prompt_tokens_details: { cached_tokens: this.#cached },
      completion_tokens_details: { reasoning_tokens: 0 },
    };
  }
}
