// Writes an answer in the form of /v1/responses: output items, each with the events that tell of it.

import type { Usage } from "../../engine/protocol.ts";
import type { AnswerEvent } from "../tool-answers.ts";

interface MessageItem {
  type: "message";
  id: string;
  role: "assistant";
  status: string;
  content: { type: "output_text"; text: string; annotations: never[]; logprobs: never[] }[];
}

interface CallItem {
  type: "function_call";
  id: string;
  call_id: string;
  name: string;
  arguments: string;
  status: string;
}

/** An event of the stream without its number. */
export type ResponseEvent = { type: string } & Record<string, unknown>;

export type ResponseEnd = { status: "completed" | "incomplete"; usage: object };

function newId(prefix: string): string {
  return `${prefix}${crypto.randomUUID().replaceAll("-", "")}`;
}

function usageBody({ prompt_tokens, completion_tokens, cached_tokens }: Usage): object {
  return {
    input_tokens: prompt_tokens,
    input_tokens_details: { cached_tokens, cache_write_tokens: 0 },
    output_tokens: completion_tokens,
    output_tokens_details: { reasoning_tokens: 0 },
    total_tokens: prompt_tokens + completion_tokens,
  };
}

export class ResponseOutput {
  readonly items: (MessageItem | CallItem)[] = [];
  /** Set by the finish event. */
  end: ResponseEnd | undefined;

  take(event: AnswerEvent): ResponseEvent[] {
    if (event.type === "text") return event.text === "" ? [] : this.#text(event.text);
    if (event.type === "call") {
      const before = this.#close("completed");
      const { id: call_id, name } = event;
      const item: CallItem = {
        type: "function_call",
        id: newId("fc_"),
        call_id,
        name,
        arguments: "",
        status: "in_progress",
      };
      this.items.push(item);
      return [...before, this.#item("response.output_item.added", item)];
    }
    if (event.type === "arguments") {
      const item = this.items.at(-1);
      if (item?.type !== "function_call") return [];
      item.arguments += event.json;
      return [this.#at("response.function_call_arguments.delta", item, { delta: event.json })];
    }
    if (event.type !== "finish") return [];
    const status = event.reason === "length" ? "incomplete" : "completed";
    this.end = { status, usage: usageBody(event.usage) };
    return this.#close(status);
  }

  #text(delta: string): ResponseEvent[] {
    let item = this.items.at(-1);
    const events: ResponseEvent[] = [];
    if (item?.type !== "message") {
      events.push(...this.#close("completed"));
      item = { type: "message", id: newId("msg_"), role: "assistant", status: "in_progress", content: [] };
      this.items.push(item);
      events.push(this.#item("response.output_item.added", item));
    }
    let [part] = item.content;
    if (part === undefined) {
      part = { type: "output_text", text: "", annotations: [], logprobs: [] };
      item.content.push(part);
      events.push(this.#at("response.content_part.added", item, { content_index: 0, part: { ...part } }));
    }
    part.text += delta;
    const fields = { content_index: 0, delta, logprobs: [] };
    events.push(this.#at("response.output_text.delta", item, fields));
    return events;
  }

  /** The last item is complete, or cut off. */
  #close(status: string): ResponseEvent[] {
    const item = this.items.at(-1);
    if (item === undefined || item.status !== "in_progress") return [];
    item.status = status;
    const done = this.#item("response.output_item.done", item);
    if (item.type === "function_call") {
      const { name, arguments: json } = item;
      return [this.#at("response.function_call_arguments.done", item, { name, arguments: json }), done];
    }
    const [part] = item.content;
    if (part === undefined) return [done];
    const { text } = part;
    return [
      this.#at("response.output_text.done", item, { content_index: 0, text, logprobs: [] }),
      this.#at("response.content_part.done", item, { content_index: 0, part: { ...part } }),
      done,
    ];
  }

  #item(type: string, item: MessageItem | CallItem): ResponseEvent {
    return { type, output_index: this.items.length - 1, item: structuredClone(item) };
  }

  #at(type: string, item: { id: string }, fields: object): ResponseEvent {
    return { type, item_id: item.id, output_index: this.items.length - 1, ...fields };
  }
}
