// Writes answers in Ollama's form: one JSON object a line, the last of which has the statistics.

import type { Timing, Usage } from "../../engine/protocol.ts";
import type { CaravanError } from "../../errors.ts";
import { errorBody } from "../error-response.ts";
import type { StreamWire } from "../sse.ts";
import type { GroupAnswerEvent } from "../tool-answers.ts";

export function ollamaErrorBody(error: CaravanError): object {
  return { error: errorBody(error).error.message };
}

/** Space before a line's object means nothing. */
const BLANK = " ";

export const OLLAMA_WIRE: StreamWire = {
  contentType: "application/x-ndjson",
  errorFrame: (error) => `${JSON.stringify(ollamaErrorBody(error))}\n`,
  // Space before the next object: lines of nothing else would confuse clients.
  keepAliveFrame: BLANK,
};

interface OllamaCall {
  id: string;
  function: { name: string; arguments: unknown };
}

/** What a piece of an answer holds: where it goes differs between chat and generate. */
export type PieceOf = (text: string, calls: OllamaCall[]) => object;

export const chatPiece: PieceOf = (text, calls) => ({
  message: { role: "assistant", content: text, ...(calls.length === 0 ? {} : { tool_calls: calls }) },
});
export const generatePiece: PieceOf = (text) => ({ response: text });

const NS_PER_MS = 1_000_000;

function statistics(usage: Usage, timing: Timing | undefined): object {
  const { queue_ms = 0, prefill_ms = 0, decode_ms = 0 } = timing ?? {};
  return {
    prompt_eval_count: usage.prompt_tokens,
    eval_count: usage.completion_tokens,
    ...(timing === undefined
      ? {}
      : {
          total_duration: Math.round((queue_ms + prefill_ms + decode_ms) * NS_PER_MS),
          load_duration: 0,
          prompt_eval_duration: Math.round(prefill_ms * NS_PER_MS),
          eval_duration: Math.round(decode_ms * NS_PER_MS),
        }),
  };
}

function head(model: string): object {
  return { model, created_at: new Date().toISOString() };
}

/** The answer to a request without a prompt, which only loads the model. */
export function loadedReply(model: string, piece: PieceOf): object {
  return { ...head(model), ...piece("", []), done: true, done_reason: "load" };
}

type Line = { text: string; calls: OllamaCall[]; end?: object; accepted?: boolean };

/** Text as it comes; a call when it is complete, because Ollama's arguments are values, not text. */
async function* lines(events: AsyncIterable<GroupAnswerEvent>): AsyncGenerator<Line> {
  let open: { id: string; name: string; json: string } | undefined;
  const complete = (): OllamaCall[] => {
    if (open === undefined) return [];
    const { id, name, json } = open;
    open = undefined;
    return [{ id, function: { name, arguments: argumentsOf(json) } }];
  };
  for await (const { event } of events) {
    if (event.type === "progress") {
      // The request was accepted: the stream can begin before there is something to say.
      if (event.done === 0) yield { text: "", calls: [], accepted: true };
    } else if (event.type === "arguments") {
      if (open !== undefined) open.json += event.json;
    } else if (event.type === "text") {
      if (event.text !== "") yield { text: event.text, calls: complete() };
    } else if (event.type === "call") {
      const calls = complete();
      open = { id: event.id, name: event.name, json: "" };
      if (calls.length > 0) yield { text: "", calls };
    } else if (event.type === "finish") {
      const calls = complete();
      if (calls.length > 0) yield { text: "", calls };
      const done_reason = event.reason === "length" ? "length" : "stop";
      yield { text: "", calls: [], end: { done_reason, ...statistics(event.usage, event.timing) } };
    }
  }
}

/** Text that was cut off before it was JSON is shown under a key that says so. */
function argumentsOf(json: string): unknown {
  try {
    return JSON.parse(json);
  } catch {
    return { INVALID_JSON: json };
  }
}

export async function* ollamaFrames(
  events: AsyncIterable<GroupAnswerEvent>,
  model: string,
  piece: PieceOf,
): AsyncGenerator<string, void, void> {
  for await (const { text, calls, end, accepted } of lines(events)) {
    if (accepted) {
      yield BLANK;
      continue;
    }
    const done = end !== undefined;
    yield `${JSON.stringify({ ...head(model), ...piece(text, calls), done, ...end })}\n`;
  }
}

export async function ollamaReply(
  events: AsyncIterable<GroupAnswerEvent>,
  model: string,
  piece: PieceOf,
): Promise<object> {
  let whole = "";
  const made: OllamaCall[] = [];
  let last: object = {};
  for await (const { text, calls, end } of lines(events)) {
    whole += text;
    made.push(...calls);
    last = end ?? last;
  }
  return { ...head(model), ...piece(whole, made), done: true, ...last };
}
