// `echo` of /v1/completions: the prompt comes first in the reply, with its log-probabilities when they are asked for.
// With max_tokens 0 it is all of the reply, which is how evaluation harnesses score text.

import type { Usage } from "../../engine/protocol.ts";
import type { GroupEvent } from "../generation-group.ts";
import type { LoadedModel } from "../model-directory.ts";
import type { ShownToken } from "./logprobs.ts";

/** What a completion's reply is made of, in order for each index. */
export type ReplyEvent =
  | { type: "progress"; done: number; total: number }
  | { type: "text"; index: number; text: string; tokens: ShownToken[] }
  | { type: "finish"; index: number; reason: string; usage: Usage };

export interface EchoedPrompt {
  text: string;
  ids: number[];
  /** Where each token's text begins in `text`, UTF-16 units. */
  offsets: number[];
}

/** `original` is the prompt as it was sent, if it was text: what was put before it by us is not echoed. */
export function echoPrompt(ids: number[], original: string | undefined, model: LoadedModel): EchoedPrompt {
  const detokenizer = model.newDetokenizer({ skipSpecials: false });
  const offsets: number[] = [];
  let text = "";
  const writtenOut = original?.startsWith(model.text.decode([...model.beginIds])) ?? true;
  const added = writtenOut ? 0 : model.beginIds.length;
  ids.forEach((id, index) => {
    offsets.push(text.length);
    const piece = detokenizer.push(id);
    if (index >= added) text += piece;
  });
  text += detokenizer.flush();
  return { text: original ?? text, ids, offsets };
}

export interface EchoOptions {
  /** One a prompt; empty without echo. */
  echoes: EchoedPrompt[];
  /** Answers a prompt. */
  n: number;
  /** Nothing but the prompt is wanted (max_tokens 0). */
  scoring: boolean;
  wantsLogprobs: boolean;
}

/** Puts each prompt before its answers and moves the answers' offsets behind it. */
export async function* replyEvents(
  events: AsyncIterable<GroupEvent>,
  { echoes, n, scoring, wantsLogprobs }: EchoOptions,
): AsyncGenerator<ReplyEvent, void, void> {
  const echoed = new Set<number>();
  for await (const { index, event } of events) {
    if (event.type === "progress") {
      yield event;
      continue;
    }
    const echo = echoes[Math.floor(index / n)];
    if (echo !== undefined && !echoed.has(index)) {
      // With logprobs the first event that counts is the prompt's; without, anything.
      const scores = event.type === "prompt_logprobs" ? event : undefined;
      if (!wantsLogprobs || scores !== undefined) {
        echoed.add(index);
        const tokens = scores === undefined ? [] : promptTokens(echo, scores);
        yield { type: "text", index, text: echo.text, tokens };
      }
    }
    if (event.type === "text" && !scoring) {
      const shift = echo?.text.length ?? 0;
      const tokens = event.tokens.map((token) => ({ ...token, offset: token.offset + shift }));
      yield { type: "text", index, text: event.text, tokens };
    } else if (event.type === "finish") {
      if (scoring)
        yield { type: "finish", index, reason: "length", usage: { ...event.usage, completion_tokens: 0 } };
      else yield { type: "finish", index, reason: event.reason, usage: event.usage };
    }
  }
}

function promptTokens(
  echo: EchoedPrompt,
  scores: { logprobs: (number | null)[]; top: ShownToken["top"][] },
): ShownToken[] {
  return echo.ids.map((id, position) => ({
    id,
    logprob: scores.logprobs[position] ?? null,
    top: scores.top[position] ?? null,
    offset: echo.offsets[position] ?? 0,
  }));
}
