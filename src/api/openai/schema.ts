// The parameters of /v1/chat/completions and /v1/completions: what is understood, what is known but not built, and
// what is only a label. Anything else is refused by name (parameters.ts).

import * as v from "valibot";
import { MAX_CHOICES } from "../generation-group.ts";
import { anyObject, isEmptyArray, isOneOf, objectOf, type Unbuilt, unsupported } from "../parameters.ts";
import type { SamplingRequest } from "../sampling-defaults.ts";
import { range, samplingValues, whole } from "../sampling-ranges.ts";
import { responseFormatSchema } from "../structured-output.ts";

const MAX_STOPS = 16;
const MAX_STOP_LENGTH = 1024;
export const MAX_TOP_LOGPROBS = 20;

const label = v.optional(v.string());
const stopString = v.pipe(v.string(), v.minLength(1), v.maxLength(MAX_STOP_LENGTH));

/** Sampling, in both routes. top_k, min_p, repetition_penalty and xtc_* are extensions, named as in vLLM. */
const samplingEntries = {
  temperature: v.optional(samplingValues.temperature),
  top_p: v.optional(samplingValues.top_p),
  top_k: v.optional(samplingValues.top_k),
  min_p: v.optional(samplingValues.min_p),
  frequency_penalty: v.optional(samplingValues.frequency_penalty),
  presence_penalty: v.optional(samplingValues.presence_penalty),
  repetition_penalty: v.optional(samplingValues.repetition_penalty),
  xtc_probability: v.optional(samplingValues.xtc_probability),
  xtc_threshold: v.optional(samplingValues.xtc_threshold),
  seed: v.optional(samplingValues.seed),
  logit_bias: v.optional(
    objectOf(range(-100, 100), v.pipe(v.string(), v.regex(/^\d{1,9}$/, "Keys are token ids"))),
  ),
};

const commonEntries = {
  ...samplingEntries,
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
  n: v.optional(whole(1, MAX_CHOICES)),
  stop: v.optional(v.union([stopString, v.pipe(v.array(stopString), v.maxLength(MAX_STOPS))])),
  stream: v.optional(v.boolean()),
  stream_options: v.optional(
    v.strictObject({
      include_usage: v.nullish(v.boolean()),
      include_obfuscation: v.nullish(v.literal(false)),
    }),
  ),
  /** Extension: end tokens are never sampled. */
  ignore_eos: v.optional(v.boolean()),
  user: label,
};

const textPart = v.strictObject({ type: v.literal("text"), text: v.string() });
const textContent = v.union([v.string(), v.pipe(v.array(textPart), v.minLength(1))]);
const nothing = v.nullish(v.union([v.null(), v.pipe(v.array(v.unknown()), v.length(0))]));

/** openai-node refuses call indexes from 128 on. */
export const MAX_TOOLS = 128;
export const functionName = v.pipe(
  v.string(),
  v.regex(/^[\w.-]{1,64}$/, "Names are 1 to 64 letters, digits, _, - or ."),
);

const toolCall = v.strictObject({
  id: v.pipe(v.string(), v.minLength(1)),
  type: v.optional(v.literal("function"), "function"),
  function: v.strictObject({ name: functionName, arguments: v.string() }),
  /** Written by streams that were put together; means nothing. */
  index: v.optional(v.number()),
});

const toolSchema = v.strictObject({
  type: v.literal("function"),
  function: v.strictObject({
    name: functionName,
    description: v.nullish(v.string()),
    parameters: v.nullish(anyObject),
    strict: v.nullish(v.boolean()),
  }),
});
export const toolsSchema = v.pipe(v.array(toolSchema), v.maxLength(MAX_TOOLS));

export const messageSchema = v.variant("role", [
  v.strictObject({ role: v.picklist(["system", "developer", "user"]), content: textContent }),
  v.strictObject({
    role: v.literal("assistant"),
    // Absent or null next to tool_calls (messages.ts checks that there are some).
    content: v.nullish(v.union([textContent, v.pipe(v.array(textPart), v.length(0))])),
    tool_calls: v.nullish(v.pipe(v.array(toolCall), v.maxLength(MAX_TOOLS))),
    // A reply's message is often sent back as it came; these say nothing when empty.
    refusal: nothing,
    function_call: nothing,
    annotations: nothing,
    audio: nothing,
  }),
  v.strictObject({
    role: v.literal("tool"),
    content: textContent,
    tool_call_id: v.pipe(v.string(), v.minLength(1)),
    name: v.optional(functionName),
  }),
]);

export const chatSchema = v.strictObject({
  ...commonEntries,
  messages: v.pipe(v.array(messageSchema), v.minLength(1)),
  max_tokens: v.optional(whole(1)),
  max_completion_tokens: v.optional(whole(1)),
  logprobs: v.optional(v.boolean()),
  top_logprobs: v.optional(whole(0, MAX_TOP_LOGPROBS)),
  tools: v.optional(toolsSchema),
  tool_choice: v.optional(
    v.union([
      v.picklist(["auto", "none", "required"]),
      v.strictObject({
        type: v.literal("function"),
        function: v.strictObject({ name: functionName }),
      }),
    ]),
  ),
  response_format: v.optional(responseFormatSchema),
  parallel_tool_calls: v.optional(v.boolean()),
  metadata: v.optional(objectOf(v.string())),
  safety_identifier: label,
  prompt_cache_key: label,
});

export type ChatRequest = v.InferOutput<typeof chatSchema>;

const isTextOnly = (value: unknown): boolean =>
  Array.isArray(value) && value.every((item) => item === "text");

export const CHAT_UNBUILT: Record<string, Unbuilt> = {
  functions: { feature: "the old form of tools", harmless: isEmptyArray },
  function_call: { feature: "the old form of tool_choice", harmless: isOneOf("none", "auto") },
  modalities: { feature: "output other than text", harmless: isTextOnly },
  audio: { feature: "audio" },
  prediction: { feature: "predicted output" },
  reasoning_effort: { feature: "reasoning", harmless: isOneOf("none") },
  verbosity: { feature: "setting the verbosity", harmless: isOneOf("medium") },
  service_tier: { feature: "choosing a service tier", harmless: isOneOf("auto", "default") },
  store: { feature: "storing replies", harmless: isOneOf(false) },
  web_search_options: { feature: "web search" },
  moderation: { feature: "moderation" },
  prompt_cache_options: { feature: "setting the prompt cache" },
  prompt_cache_retention: { feature: "setting the prompt cache", harmless: isOneOf("in_memory") },
};

/** Throws unsupported_parameter for tools that are no functions, and choices among some of them. */
export function refuseUnbuiltTools({ tools, tool_choice }: Record<string, unknown>): void {
  const choice = typeOf(tool_choice);
  if (choice !== undefined && choice !== "function")
    throw unsupported("tool_choice.type", `a choice of type ${JSON.stringify(choice)}`);
  if (!Array.isArray(tools)) return;
  tools.forEach((tool: unknown, index) => {
    const type = typeOf(tool);
    if (type !== undefined && type !== "function")
      throw unsupported(`tools[${index}].type`, `a tool of type ${JSON.stringify(type)}`);
  });
}

function typeOf(value: unknown): string | undefined {
  if (typeof value !== "object" || value === null || !("type" in value)) return undefined;
  return typeof value.type === "string" ? value.type : undefined;
}

/**
 * Refuses by name what a message may hold in OpenAI's API but not here yet; the schema would only call it wrong.
 * Throws unsupported_parameter.
 */
export function refuseUnbuiltMessages(messages: unknown): void {
  if (!Array.isArray(messages)) return;
  messages.forEach((message: unknown, index) => {
    if (typeof message !== "object" || message === null) return;
    const at = `messages[${index}]`;
    const { role, content, function_call, name } = message as Record<string, unknown>;
    if (role === "function") throw unsupported(`${at}.role`, "the old form of tool results");
    if (function_call !== undefined && function_call !== null)
      throw unsupported(`${at}.function_call`, "the old form of tool calls");
    if (name !== undefined && role !== "tool") throw unsupported(`${at}.name`, "naming participants");
    if (!Array.isArray(content)) return;
    content.forEach((part: unknown, number) => {
      if (typeof part !== "object" || part === null || !("type" in part) || part.type === "text") return;
      throw unsupported(`${at}.content[${number}].type`, `content of type ${JSON.stringify(part.type)}`);
    });
  });
}

const tokenIds = v.pipe(v.array(whole(0, 2 ** 31)), v.minLength(1));

export const completionSchema = v.strictObject({
  ...commonEntries,
  prompt: v.union([
    v.string(),
    tokenIds,
    v.pipe(v.array(v.union([v.string(), tokenIds])), v.minLength(1), v.maxLength(MAX_CHOICES)),
  ]),
  /** 0 only together with echo: the prompt is scored and nothing is generated. */
  max_tokens: v.optional(whole(0)),
  logprobs: v.optional(whole(0, MAX_TOP_LOGPROBS)),
  /** Extension, as in chat. */
  response_format: v.optional(responseFormatSchema),
  echo: v.optional(v.boolean()),
  best_of: v.optional(whole(1, MAX_CHOICES)),
});

export type CompletionRequest = v.InferOutput<typeof completionSchema>;

export const COMPLETION_UNBUILT: Record<string, Unbuilt> = {
  suffix: { feature: "inserting text before a suffix", harmless: isOneOf("") },
};

/** The sampling part of a request, in the form that resolveSampling takes. */
export function samplingOf(request: ChatRequest | CompletionRequest): SamplingRequest {
  const { temperature, top_p, top_k, min_p, frequency_penalty, presence_penalty, repetition_penalty } =
    request;
  const { xtc_probability, xtc_threshold, seed, logit_bias } = request;
  const values = {
    temperature,
    top_p,
    // vLLM's spelling of "off".
    top_k: top_k === -1 ? 0 : top_k,
    min_p,
    frequency_penalty,
    presence_penalty,
    repetition_penalty,
    xtc_probability,
    xtc_threshold,
    seed,
  };
  const bias = Object.entries(logit_bias ?? {}).map(([id, value]): [number, number] => [Number(id), value]);
  const given = Object.entries(values).filter(([, value]) => value !== undefined);
  return { ...Object.fromEntries(given), logit_bias: bias };
}

export function stopsOf(request: ChatRequest | CompletionRequest): string[] {
  if (request.stop === undefined) return [];
  return typeof request.stop === "string" ? [request.stop] : request.stop;
}
