// The messages of a chat request in the form that templates take, and the checks between them.

import type { ChatMessage, ChatTool } from "../model-directory.ts";
import { invalid } from "./request-checks.ts";
import type { ChatRequest } from "./schema.ts";

/** Throws invalid_argument where a message says nothing, or answers a call that nobody made. */
export function toChatMessages(messages: ChatRequest["messages"]): ChatMessage[] {
  const called = new Set<string>();
  return messages.map((message, index): ChatMessage => {
    const content = textOf(message.content);
    if (message.role === "tool") {
      const { tool_call_id, name } = message;
      if (!called.has(tool_call_id))
        throw invalid(`messages[${index}].tool_call_id`, "no earlier message has a call with this id.");
      return { role: "tool", content, tool_call_id, ...(name === undefined ? {} : { name }) };
    }
    if (message.role !== "assistant")
      return { role: message.role === "developer" ? "system" : message.role, content };
    const calls = (message.tool_calls ?? []).map(({ id, type, function: { name, arguments: json } }) => {
      called.add(id);
      return { id, type, function: { name, arguments: json } };
    });
    if (calls.length > 0) return { role: "assistant", content, tool_calls: calls };
    if (typeof message.content !== "string" && content === "")
      throw invalid(`messages[${index}].content`, "an assistant message without tool_calls needs content.");
    return { role: "assistant", content };
  });
}

function textOf(content: ChatRequest["messages"][number]["content"]): string {
  if (typeof content === "string") return content;
  return (content ?? []).map((part) => part.text).join("");
}

/** The functions that the model may call: none where tool_choice says so, since then it is not told of any. */
export function offeredTools(request: Partial<Pick<ChatRequest, "tools" | "tool_choice">>): ChatTool[] {
  if (request.tool_choice === "none") return [];
  const names = new Set<string>();
  return (request.tools ?? []).map(({ function: { name, description, parameters } }, index) => {
    if (names.has(name)) throw invalid(`tools[${index}].function.name`, `${name} is there twice.`);
    names.add(name);
    return {
      type: "function",
      function: {
        name,
        ...(description == null ? {} : { description }),
        ...(parameters == null ? {} : { parameters }),
      },
    };
  });
}
