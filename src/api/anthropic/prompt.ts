// Anthropic's system text, messages and tools as the turns and functions that templates take.

import type { ChatMessage, ChatTool, ChatToolCall, RenderInput } from "../model-directory.ts";
import { invalid } from "../openai/request-checks.ts";
import type { CountRequest } from "./schema.ts";

type Blocks = string | readonly { type: string; text?: string }[] | null | undefined;

function textOf(content: Blocks): string {
  if (typeof content === "string") return content;
  return (content ?? []).map((block) => block.text ?? "").join("");
}

/** Throws invalid_argument where a result answers a call that nobody made. */
export function promptOf(request: CountRequest): { input: RenderInput; tools: ChatTool[] } {
  const messages: ChatMessage[] = [];
  if (request.system !== undefined) messages.push({ role: "system", content: textOf(request.system) });
  const called = new Map<string, string>();
  request.messages.forEach(({ role, content }, index) => {
    if (typeof content === "string") {
      messages.push({ role, content });
      return;
    }
    let text = "";
    const calls: ChatToolCall[] = [];
    content.forEach((block, number) => {
      if (block.type === "text") text += block.text;
      else if (block.type === "tool_use") {
        called.set(block.id, block.name);
        const json = JSON.stringify(block.input);
        calls.push({ id: block.id, type: "function", function: { name: block.name, arguments: json } });
      } else {
        const name = called.get(block.tool_use_id);
        if (name === undefined) {
          const at = `messages[${index}].content[${number}].tool_use_id`;
          throw invalid(at, "no earlier message has a call with this id.");
        }
        // Templates have no other place for the mark of a failure.
        const result = `${block.is_error ? "Error: " : ""}${textOf(block.content)}`;
        messages.push({ role: "tool", content: result, tool_call_id: block.tool_use_id, name });
      }
    });
    if (calls.length > 0) messages.push({ role: "assistant", content: text, tool_calls: calls });
    else if (text !== "" || content.every((block) => block.type === "text"))
      messages.push({ role, content: text });
  });
  const tools = offered(request);
  return {
    input: { messages, addGenerationPrompt: true, ...(tools.length === 0 ? {} : { tools }) },
    tools,
  };
}

function offered({ tools = [], tool_choice }: CountRequest): ChatTool[] {
  if (tool_choice?.type === "none") return [];
  const names = new Set<string>();
  return tools.map(({ name, description, input_schema }, index) => {
    if (names.has(name)) throw invalid(`tools[${index}].name`, `${name} is there twice.`);
    names.add(name);
    return {
      type: "function",
      function: { name, ...(description == null ? {} : { description }), parameters: input_schema },
    };
  });
}
