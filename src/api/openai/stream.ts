// Writes the chunks of OpenAI's streams. What is the same in every chunk of a stream is serialised once, so that a
// token costs one JSON string.

import { DONE_FRAME } from "../sse.ts";
import type { ChatLogprobs, CompletionLogprobs } from "./logprobs.ts";
import type { UsageBody } from "./usage.ts";

export interface ReplyHead {
  id: string;
  /** Seconds since 1970. */
  created: number;
  model: string;
  fingerprint: string;
}

/** The head of a new reply. `prefix`: `chatcmpl-` or `cmpl-`. */
export function newReplyHead(prefix: string, model: { id: string; fingerprint: string }): ReplyHead {
  return {
    id: `${prefix}${crypto.randomUUID().replaceAll("-", "")}`,
    created: Math.floor(Date.now() / 1000),
    model: model.id,
    fingerprint: model.fingerprint,
  };
}

/** Everything before a chunk's choices and after them. */
class ChunkFrame {
  readonly #before: string;
  readonly #after: string;

  constructor(object: string, head: ReplyHead, includeUsage: boolean) {
    const opening = JSON.stringify({
      id: head.id,
      object,
      created: head.created,
      model: head.model,
      system_fingerprint: head.fingerprint,
    });
    this.#before = `data: ${opening.slice(0, -1)},"choices":[`;
    this.#after = includeUsage ? ',"usage":null}\n\n' : "}\n\n";
  }

  choice(json: string): string {
    return `${this.#before}${json}]${this.#after}`;
  }

  usage(usage: UsageBody): string {
    return `${this.#before}],"usage":${JSON.stringify(usage)}}\n\n`;
  }
}

/** Frames of a `chat.completion.chunk` stream. */
export class ChatChunks {
  readonly #frame: ChunkFrame;
  readonly done = DONE_FRAME;

  constructor(head: ReplyHead, includeUsage: boolean) {
    this.#frame = new ChunkFrame("chat.completion.chunk", head, includeUsage);
  }

  role(index: number): string {
    return this.#delta(index, '{"role":"assistant","content":"","refusal":null}', undefined, null);
  }

  content(index: number, text: string, logprobs?: ChatLogprobs): string {
    return this.#delta(index, `{"content":${JSON.stringify(text)}}`, logprobs, null);
  }

  /** A call of the choice's answer begins. */
  toolCall(index: number, call: number, id: string, name: string): string {
    const opening = { index: call, id, type: "function", function: { name, arguments: "" } };
    return this.#delta(index, `{"tool_calls":[${JSON.stringify(opening)}]}`, undefined, null);
  }

  /** More of a call's arguments. */
  toolArguments(index: number, call: number, json: string): string {
    const more = `{"index":${call},"function":{"arguments":${JSON.stringify(json)}}}`;
    return this.#delta(index, `{"tool_calls":[${more}]}`, undefined, null);
  }

  finish(index: number, reason: string): string {
    return this.#delta(index, "{}", undefined, reason);
  }

  usage(usage: UsageBody): string {
    return this.#frame.usage(usage);
  }

  #delta(index: number, delta: string, logprobs: ChatLogprobs | undefined, reason: string | null): string {
    const shown = logprobs === undefined ? "null" : JSON.stringify(logprobs);
    const ending = reason === null ? "null" : `"${reason}"`;
    return this.#frame.choice(
      `{"index":${index},"delta":${delta},"logprobs":${shown},"finish_reason":${ending}}`,
    );
  }
}

/** Frames of a `text_completion` stream. */
export class CompletionChunks {
  readonly #frame: ChunkFrame;
  readonly done = DONE_FRAME;

  constructor(head: ReplyHead, includeUsage: boolean) {
    this.#frame = new ChunkFrame("text_completion", head, includeUsage);
  }

  text(index: number, text: string, logprobs?: CompletionLogprobs): string {
    return this.#choice(index, text, logprobs, null);
  }

  finish(index: number, reason: string): string {
    return this.#choice(index, "", undefined, reason);
  }

  usage(usage: UsageBody): string {
    return this.#frame.usage(usage);
  }

  #choice(
    index: number,
    text: string,
    logprobs: CompletionLogprobs | undefined,
    reason: string | null,
  ): string {
    const shown = logprobs === undefined ? "null" : JSON.stringify(logprobs);
    const ending = reason === null ? "null" : `"${reason}"`;
    return this.#frame.choice(
      `{"index":${index},"text":${JSON.stringify(text)},"logprobs":${shown},"finish_reason":${ending}}`,
    );
  }
}
