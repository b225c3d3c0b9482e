// Chat messages as templates expect them. Clients send more shapes than templates can take (text in parts, null content,
// empty tool_calls, arguments as a JSON string): everything is brought to one shape here, or refused with its path.
import * as v from "valibot";
import { CaravanError } from "../errors.ts";

export type Json = string | number | boolean | null | Json[] | { [key: string]: Json };

/** Nesting of tools, arguments and object contents. */
const MAX_DEPTH = 64;

const ContentPart = v.looseObject({ type: v.string(), text: v.optional(v.string()) });
const ToolCall = v.looseObject({
  id: v.optional(v.string()),
  type: v.optional(v.string(), "function"),
  function: v.looseObject({ name: v.string(), arguments: v.optional(v.unknown()) }),
});
const Message = v.looseObject({
  role: v.string(),
  content: v.optional(v.unknown()),
  name: v.nullish(v.string()),
  tool_call_id: v.nullish(v.string()),
  reasoning_content: v.nullish(v.string()),
  tool_calls: v.nullish(v.array(ToolCall)),
});

/** Roles of the clients' APIs and what templates call them. */
const ROLES: ReadonlyMap<string, string> = new Map([
  ["system", "system"],
  ["developer", "system"],
  ["user", "user"],
  ["assistant", "assistant"],
  ["tool", "tool"],
  ["function", "tool"],
  ["ipython", "ipython"],
]);

/** A message ready for a template: only fields that are there, content a string (or an object, from a tool). */
export interface TemplateMessage {
  readonly [key: string]: Json;
  readonly role: string;
  readonly content: Json;
}

function invalid(path: string, message: string): CaravanError {
  return new CaravanError("invalid_argument", `${path}: ${message}`, { param: path });
}

/** Copies a JSON value; refuses what JSON cannot hold and what is nested too deeply. */
export function toJson(value: unknown, path: string, depth = 0): Json {
  if (depth > MAX_DEPTH) throw invalid(path, `nested more than ${MAX_DEPTH} deep`);
  if (value === null || typeof value === "string" || typeof value === "boolean") return value;
  if (typeof value === "number" && Number.isFinite(value)) return value;
  if (Array.isArray(value)) return value.map((item, i) => toJson(item, `${path}[${i}]`, depth + 1));
  if (typeof value === "object") {
    const entries = Object.entries(value).filter(([, item]) => item !== undefined);
    return Object.fromEntries(entries.map(([key, item]) => [key, toJson(item, `${path}.${key}`, depth + 1)]));
  }
  throw invalid(path, `a value of type ${typeof value} is not JSON`);
}

function readContent(content: unknown, role: string, path: string): Json {
  if (content === undefined || content === null) return "";
  if (typeof content === "string") return content;
  if (Array.isArray(content)) {
    let text = "";
    content.forEach((part, i) => {
      const parsed = v.safeParse(ContentPart, part);
      const where = `${path}[${i}]`;
      if (!parsed.success) throw invalid(where, parsed.issues[0].message);
      const { type, text: piece } = parsed.output;
      if (!/^(text|input_text|output_text)$/.test(type) || piece === undefined) {
        throw invalid(where, `content of type "${type}" is not supported: this server takes text only`);
      }
      text += piece;
    });
    return text;
  }
  if (role === "tool" || role === "ipython") return toJson(content, path);
  throw invalid(path, "expected a string or a list of text parts");
}

/** Arguments are a JSON string in OpenAI's API and an object in templates; a string that is no JSON object stays one. */
function readArguments(value: unknown, path: string): Json {
  if (value === undefined || value === null || value === "") return {};
  if (typeof value !== "string") return toJson(value, path);
  try {
    const parsed: unknown = JSON.parse(value);
    if (typeof parsed === "object" && parsed !== null && !Array.isArray(parsed)) return toJson(parsed, path);
  } catch (thrown) {
    if (!(thrown instanceof SyntaxError)) throw thrown;
  }
  return value;
}

/** Errors: invalid_argument, with `param` the path of what is wrong. */
export function normaliseMessages(messages: unknown): TemplateMessage[] {
  if (!Array.isArray(messages) || messages.length === 0) {
    throw invalid("messages", "expected a list with at least one message");
  }
  return messages.map((raw: unknown, i) => {
    const path = `messages[${i}]`;
    const parsed = v.safeParse(Message, raw);
    if (!parsed.success) {
      const issue = parsed.issues[0];
      const at = v.getDotPath(issue);
      throw invalid(at === null ? path : `${path}.${at}`, issue.message);
    }
    const { role, content, name, tool_call_id, reasoning_content, tool_calls } = parsed.output;
    const known = ROLES.get(role);
    if (known === undefined)
      throw invalid(`${path}.role`, `unknown role ${JSON.stringify(role.slice(0, 40))}`);
    const calls = (tool_calls ?? []).map((call, j) => ({
      ...(call.id === undefined ? {} : { id: call.id }),
      type: call.type,
      function: {
        name: call.function.name,
        arguments: readArguments(call.function.arguments, `${path}.tool_calls[${j}].function.arguments`),
      },
    }));
    return {
      role: known,
      content: readContent(content, known, `${path}.content`),
      ...(name == null ? {} : { name }),
      ...(tool_call_id == null ? {} : { tool_call_id }),
      ...(reasoning_content == null ? {} : { reasoning_content }),
      // An empty list makes Llama 4's template drop the message.
      ...(calls.length === 0 ? {} : { tool_calls: calls }),
    };
  });
}

/** Tools as a list of objects; null when there are none (an empty list would still announce tools). */
export function normaliseTools(tools: unknown): Json[] | null {
  if (tools === undefined || tools === null) return null;
  if (!Array.isArray(tools)) throw invalid("tools", "expected a list");
  if (tools.length === 0) return null;
  return tools.map((tool: unknown, i) => {
    if (typeof tool !== "object" || tool === null || Array.isArray(tool)) {
      throw invalid(`tools[${i}]`, "expected an object");
    }
    return toJson(tool, `tools[${i}]`);
  });
}
