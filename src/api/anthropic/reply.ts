// Writes an answer in Anthropic's form: content blocks of text and tool calls, as one message or as events.

import type { Usage } from "../../engine/protocol.ts";
import type { LoadedModel } from "../model-directory.ts";
import { prefillFrame } from "../sse.ts";
import type { AnswerEvent, GroupAnswerEvent } from "../tool-answers.ts";

type Finish = Extract<AnswerEvent, { type: "finish" }>;

const STOP_REASONS = { tool_calls: "tool_use", length: "max_tokens", stop: "end_turn" } as const;

function ending(event: Finish): { stop_reason: string; stop_sequence: string | null } {
  if (event.reason === "stop" && event.stop !== undefined)
    return { stop_reason: "stop_sequence", stop_sequence: event.stop };
  return { stop_reason: STOP_REASONS[event.reason], stop_sequence: null };
}

/** Cached prompt tokens are counted apart from the others, as Anthropic does. */
function usageBody({ prompt_tokens, completion_tokens, cached_tokens }: Usage): object {
  return {
    input_tokens: prompt_tokens - cached_tokens,
    cache_creation_input_tokens: 0,
    cache_read_input_tokens: cached_tokens,
    output_tokens: completion_tokens,
  };
}

function messageBody(model: LoadedModel, content: object[], rest: object, usage: object): object {
  return {
    id: `msg_${crypto.randomUUID().replaceAll("-", "")}`,
    type: "message",
    role: "assistant",
    model: model.id,
    content,
    ...rest,
    usage,
  };
}

/** A call's arguments as a value; text that was cut off before it was JSON is shown under a key that says so. */
function inputOf(json: string): unknown {
  try {
    return JSON.parse(json);
  } catch {
    return { INVALID_JSON: json };
  }
}

export async function messageReply(
  events: AsyncIterable<GroupAnswerEvent>,
  model: LoadedModel,
): Promise<object> {
  const blocks: ({ text: string } | { id: string; name: string; json: string })[] = [];
  let finish: Finish | undefined;
  for await (const { event } of events) {
    const last = blocks.at(-1);
    if (event.type === "text") {
      if (event.text === "") continue;
      if (last !== undefined && "text" in last) last.text += event.text;
      else blocks.push({ text: event.text });
    } else if (event.type === "call") blocks.push({ id: event.id, name: event.name, json: "" });
    else if (event.type === "arguments") {
      if (last !== undefined && "json" in last) last.json += event.json;
    } else if (event.type === "finish") finish = event;
  }
  if (finish === undefined) throw new Error("a generation ended without a finish event");
  const content = blocks.map((block) =>
    "text" in block
      ? { type: "text", text: block.text, citations: null }
      : { type: "tool_use", id: block.id, name: block.name, input: inputOf(block.json) },
  );
  return messageBody(model, content, ending(finish), usageBody(finish.usage));
}

const EMPTY_TEXT = { type: "text" as const, text: "", citations: null };

function frame(type: string, fields: object): string {
  return `event: ${type}\ndata: ${JSON.stringify({ type, ...fields })}\n\n`;
}

/** `promptTokens`: said at the start, when it is not known yet how many of them are cached. */
export async function* messageFrames(
  events: AsyncIterable<GroupAnswerEvent>,
  model: LoadedModel,
  promptTokens: number,
): AsyncGenerator<string, void, void> {
  let index = -1;
  let open: "text" | "tool_use" | undefined;
  const close = (): string => {
    if (open === undefined) return "";
    open = undefined;
    return frame("content_block_stop", { index });
  };
  const start = (content_block: { type: "text" | "tool_use" }): string => {
    const before = close();
    open = content_block.type;
    index += 1;
    return before + frame("content_block_start", { index, content_block });
  };
  const delta = (fields: object): string => frame("content_block_delta", { index, delta: fields });

  const empty = usageBody({ prompt_tokens: promptTokens, completion_tokens: 0, cached_tokens: 0 });
  let begun = false;
  for await (const { event } of events) {
    if (!begun) {
      begun = true;
      const rest = { stop_reason: null, stop_sequence: null };
      yield frame("message_start", { message: messageBody(model, [], rest, empty) });
    }
    if (event.type === "progress") yield prefillFrame(event.done, event.total);
    else if (event.type === "text" && event.text !== "") {
      const opening = open === "text" ? "" : start(EMPTY_TEXT);
      yield opening + delta({ type: "text_delta", text: event.text });
    } else if (event.type === "call") {
      const block = { type: "tool_use" as const, id: event.id, name: event.name, input: {} };
      yield start(block);
    } else if (event.type === "arguments") {
      yield delta({ type: "input_json_delta", partial_json: event.json });
    } else if (event.type === "finish") {
      const last = frame("message_delta", { delta: ending(event), usage: usageBody(event.usage) });
      yield close() + last + frame("message_stop", {});
    }
  }
}
