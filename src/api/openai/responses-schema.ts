// The parameters of /v1/responses: what is understood, and what is known but not built. Nothing is kept between
// requests, so whatever refers to an earlier one is refused.

import * as v from "valibot";
import { anyObject, isEmptyArray, isOneOf, objectOf, type Unbuilt, unsupported } from "../parameters.ts";
import { samplingValues } from "../sampling-ranges.ts";
import { textFormatSchema } from "../structured-output.ts";
import { functionName, MAX_TOOLS } from "./schema.ts";

const label = v.optional(v.string());
const id = v.pipe(v.string(), v.minLength(1));
/** A reply's items are often sent back as they came. */
const echoed = { id: v.nullish(v.string()), status: v.nullish(v.string()) };
const nothing = v.nullish(v.pipe(v.array(v.unknown()), v.length(0)));

const textPart = v.variant("type", [
  v.strictObject({ type: v.literal("input_text"), text: v.string() }),
  v.strictObject({
    type: v.literal("output_text"),
    text: v.string(),
    annotations: nothing,
    logprobs: nothing,
  }),
]);
const text = v.union([v.string(), v.array(textPart)]);

const itemSchema = v.union([
  v.strictObject({
    type: v.optional(v.literal("message"), "message"),
    role: v.picklist(["system", "developer", "user", "assistant"]),
    content: text,
    ...echoed,
  }),
  v.strictObject({
    type: v.literal("function_call"),
    call_id: id,
    name: functionName,
    arguments: v.string(),
    ...echoed,
  }),
  v.strictObject({ type: v.literal("function_call_output"), call_id: id, output: text, ...echoed }),
]);

const toolSchema = v.strictObject({
  type: v.literal("function"),
  name: functionName,
  description: v.nullish(v.string()),
  parameters: v.nullish(anyObject),
  strict: v.nullish(v.boolean()),
});

export const responsesSchema = v.strictObject({
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
  input: v.union([v.string(), v.pipe(v.array(itemSchema), v.minLength(1))]),
  instructions: v.optional(v.string()),
  max_output_tokens: v.optional(v.pipe(v.number(), v.safeInteger(), v.minValue(1))),
  temperature: v.optional(samplingValues.temperature),
  top_p: v.optional(samplingValues.top_p),
  tools: v.optional(v.pipe(v.array(toolSchema), v.maxLength(MAX_TOOLS))),
  tool_choice: v.optional(
    v.union([
      v.picklist(["auto", "none", "required"]),
      v.strictObject({ type: v.literal("function"), name: functionName }),
    ]),
  ),
  text: v.optional(
    v.strictObject({
      format: v.nullish(textFormatSchema),
      verbosity: v.nullish(v.literal("medium")),
    }),
  ),
  parallel_tool_calls: v.optional(v.boolean()),
  stream: v.optional(v.boolean()),
  metadata: v.optional(objectOf(v.string())),
  user: label,
  safety_identifier: label,
  prompt_cache_key: label,
});

export type ResponsesRequest = v.InferOutput<typeof responsesSchema>;

export const RESPONSES_UNBUILT: Record<string, Unbuilt> = {
  previous_response_id: { feature: "keeping replies between requests" },
  conversation: { feature: "keeping conversations" },
  store: { feature: "storing replies", harmless: isOneOf(false) },
  background: { feature: "working in the background", harmless: isOneOf(false) },
  prompt: { feature: "stored prompts" },
  reasoning: { feature: "reasoning" },
  include: { feature: "including more in the reply", harmless: isEmptyArray },
  max_tool_calls: { feature: "built-in tools" },
  top_logprobs: { feature: "log-probabilities in this API", harmless: isOneOf(0) },
  truncation: { feature: "cutting the input", harmless: isOneOf("disabled") },
  service_tier: { feature: "choosing a service tier", harmless: isOneOf("auto", "default") },
  stream_options: { feature: "changing the stream" },
  context_management: { feature: "managing the context" },
  moderation: { feature: "moderation" },
  prompt_cache_options: { feature: "setting the prompt cache" },
  prompt_cache_retention: { feature: "setting the prompt cache", harmless: isOneOf("in_memory") },
};

/** Refuses by name what the schema would only call wrong. Throws unsupported_parameter. */
export function refuseUnbuiltItems({ input, tools, tool_choice, text }: Record<string, unknown>): void {
  const verbosity = field(text, "verbosity") ?? "medium";
  if (verbosity !== "medium") throw unsupported("text.verbosity", "setting the verbosity");
  const choice = field(tool_choice, "type");
  if (typeof choice === "string" && choice !== "function")
    throw unsupported("tool_choice.type", `a choice of type ${JSON.stringify(choice)}`);
  eachOf(tools, (tool, index) => {
    const type = field(tool, "type");
    if (typeof type === "string" && type !== "function")
      throw unsupported(`tools[${index}].type`, `a tool of type ${JSON.stringify(type)}`);
  });
  eachOf(input, (item, index) => {
    const type = field(item, "type");
    if (typeof type === "string" && !["message", "function_call", "function_call_output"].includes(type))
      throw unsupported(`input[${index}].type`, `an item of type ${JSON.stringify(type)}`);
    for (const key of ["content", "output"]) {
      eachOf(field(item, key), (part, number) => {
        const kind = field(part, "type");
        if (typeof kind === "string" && !["input_text", "output_text"].includes(kind))
          throw unsupported(
            `input[${index}].${key}[${number}].type`,
            `content of type ${JSON.stringify(kind)}`,
          );
      });
    }
  });
}

function field(value: unknown, key: string): unknown {
  if (typeof value !== "object" || value === null) return undefined;
  return Object.hasOwn(value, key) ? Object.entries(value).find(([name]) => name === key)?.[1] : undefined;
}

function eachOf(value: unknown, visit: (item: unknown, index: number) => void): void {
  if (Array.isArray(value)) value.forEach(visit);
}
