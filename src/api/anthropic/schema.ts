// The parameters of Anthropic's /v1/messages and /v1/messages/count_tokens: what is understood, and what is known but
// not built.

import * as v from "valibot";
import { anyObject, isEmptyArray, isOneOf, type Unbuilt, unsupported } from "../parameters.ts";
import { range, samplingValues, whole } from "../sampling-ranges.ts";

const name = v.pipe(v.string(), v.regex(/^[\w.-]{1,64}$/, "Names are 1 to 64 letters, digits, _, - or ."));
const id = v.pipe(v.string(), v.minLength(1));
/** Says what may be cached; here every prefix is, so it changes nothing. */
const cacheControl = v.nullish(v.looseObject({ type: v.literal("ephemeral") }));

const textBlock = v.strictObject({
  type: v.literal("text"),
  text: v.string(),
  cache_control: cacheControl,
  citations: v.nullish(v.pipe(v.array(v.unknown()), v.length(0))),
});
const toolUseBlock = v.strictObject({
  type: v.literal("tool_use"),
  id,
  name,
  input: anyObject,
  cache_control: cacheControl,
  caller: v.nullish(v.strictObject({ type: v.literal("direct") })),
});
const toolResultBlock = v.strictObject({
  type: v.literal("tool_result"),
  tool_use_id: id,
  content: v.nullish(v.union([v.string(), v.array(textBlock)])),
  is_error: v.nullish(v.boolean()),
  cache_control: cacheControl,
});
const blocks = <Block extends v.GenericSchema>(block: Block) => v.pipe(v.array(block), v.minLength(1));

const messageSchema = v.variant("role", [
  v.strictObject({
    role: v.literal("user"),
    content: v.union([v.string(), blocks(v.variant("type", [textBlock, toolResultBlock]))]),
  }),
  v.strictObject({
    role: v.literal("assistant"),
    content: v.union([v.string(), blocks(v.variant("type", [textBlock, toolUseBlock]))]),
  }),
]);

const toolSchema = v.strictObject({
  type: v.nullish(v.literal("custom")),
  name,
  description: v.nullish(v.string()),
  input_schema: anyObject,
  strict: v.nullish(v.boolean()),
  cache_control: cacheControl,
});

const promptEntries = {
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
  messages: v.pipe(v.array(messageSchema), v.minLength(1)),
  system: v.optional(v.union([v.string(), v.array(textBlock)])),
  tools: v.optional(v.pipe(v.array(toolSchema), v.maxLength(128))),
  tool_choice: v.optional(
    v.variant("type", [
      v.strictObject({
        type: v.picklist(["auto", "none", "any"]),
        disable_parallel_tool_use: v.nullish(v.boolean()),
      }),
      v.strictObject({
        type: v.literal("tool"),
        name,
        disable_parallel_tool_use: v.nullish(v.boolean()),
      }),
    ]),
  ),
  cache_control: cacheControl,
};

export const countSchema = v.strictObject(promptEntries);

export const messagesSchema = v.strictObject({
  ...promptEntries,
  max_tokens: whole(1),
  stop_sequences: v.optional(
    v.pipe(v.array(v.pipe(v.string(), v.minLength(1), v.maxLength(1024))), v.maxLength(16)),
  ),
  stream: v.optional(v.boolean()),
  temperature: v.optional(range(0, 1)),
  top_p: v.optional(samplingValues.top_p),
  top_k: v.optional(samplingValues.top_k),
  output_config: v.optional(
    v.strictObject({
      format: v.nullish(v.strictObject({ type: v.literal("json_schema"), schema: anyObject })),
    }),
  ),
  metadata: v.optional(v.strictObject({ user_id: v.nullish(v.string()) })),
});

export type CountRequest = v.InferOutput<typeof countSchema>;
export type MessagesRequest = v.InferOutput<typeof messagesSchema>;

const isDisabled = (value: unknown): boolean =>
  typeof value === "object" && value !== null && "type" in value && value.type === "disabled";

export const MESSAGES_UNBUILT: Record<string, Unbuilt> = {
  thinking: { feature: "thinking", harmless: isDisabled },
  service_tier: { feature: "choosing a service tier", harmless: isOneOf("auto", "standard_only") },
  container: { feature: "running code" },
  mcp_servers: { feature: "calling MCP servers", harmless: isEmptyArray },
  speed: { feature: "choosing a speed", harmless: isOneOf("standard") },
};

/** Refuses by name what the schema would only call wrong. Throws unsupported_parameter. */
export function refuseUnbuilt({ messages, tools, output_config }: Record<string, unknown>): void {
  if (field(output_config, "effort") != null) throw unsupported("output_config.effort", "setting the effort");
  eachOf(tools, (tool, index) => {
    const type = field(tool, "type");
    if (typeof type === "string" && type !== "custom")
      throw unsupported(`tools[${index}].type`, `a tool of type ${JSON.stringify(type)}`);
  });
  eachOf(messages, (message, index) => {
    const refuse = (content: unknown, path: string): void =>
      eachOf(content, (block, number) => {
        const type = field(block, "type");
        if (typeof type !== "string") return;
        const at = `${path}[${number}]`;
        if (!["text", "tool_use", "tool_result"].includes(type))
          throw unsupported(`${at}.type`, `content of type ${JSON.stringify(type)}`);
        if (type === "tool_result") refuse(field(block, "content"), `${at}.content`);
      });
    refuse(field(message, "content"), `messages[${index}].content`);
  });
  if (Array.isArray(messages) && field(messages.at(-1), "role") === "assistant")
    throw unsupported(`messages[${messages.length - 1}].role`, "continuing an assistant message");
}

function field(value: unknown, key: string): unknown {
  return typeof value === "object" && value !== null
    ? Object.entries(value).find(([k]) => k === key)?.[1]
    : undefined;
}

function eachOf(value: unknown, visit: (item: unknown, index: number) => void): void {
  if (Array.isArray(value)) value.forEach(visit);
}
