// The parameters of Ollama's /api/chat and /api/generate: what is understood, and what is known but not built.

import * as v from "valibot";
import { CaravanError } from "../../errors.ts";
import { anyObject, isEmptyArray, isOneOf, type Unbuilt, unsupported } from "../parameters.ts";
import type { SamplingRequest } from "../sampling-defaults.ts";
import { samplingValues, whole } from "../sampling-ranges.ts";

const stopString = v.pipe(v.string(), v.minLength(1), v.maxLength(1024));
const functionName = v.pipe(
  v.string(),
  v.regex(/^[\w.-]{1,64}$/, "Names are 1 to 64 letters, digits, _, - or ."),
);

const optionsSchema = v.strictObject({
  temperature: v.nullish(samplingValues.temperature),
  top_k: v.nullish(samplingValues.top_k),
  top_p: v.nullish(samplingValues.top_p),
  min_p: v.nullish(samplingValues.min_p),
  seed: v.nullish(samplingValues.seed),
  repeat_penalty: v.nullish(samplingValues.repetition_penalty),
  presence_penalty: v.nullish(samplingValues.presence_penalty),
  frequency_penalty: v.nullish(samplingValues.frequency_penalty),
  /** -1 and -2: as many as fit. */
  num_predict: v.nullish(
    v.union([v.literal(-1), v.literal(-2), v.pipe(v.number(), v.safeInteger(), v.minValue(1))]),
  ),
  stop: v.nullish(v.union([stopString, v.pipe(v.array(stopString), v.maxLength(16))])),
  /** Let through if the loaded context is at least as long. */
  num_ctx: v.nullish(whole(1)),
});

const commonEntries = {
  model: v.pipe(v.string(), v.minLength(1), v.maxLength(512)),
  stream: v.optional(v.boolean()),
  options: v.optional(optionsSchema),
  /** "json": any object; or a JSON Schema. */
  format: v.optional(v.union([v.picklist(["", "json"]), anyObject])),
  /** How long a model stays loaded is the node's setting; only 0 in a request without a prompt has an effect. */
  keep_alive: v.optional(v.union([v.string(), v.number()])),
};

const toolCall = v.strictObject({
  id: v.nullish(v.string()),
  type: v.nullish(v.literal("function")),
  function: v.strictObject({
    index: v.nullish(v.number()),
    name: functionName,
    arguments: anyObject,
  }),
});

const messageSchema = v.variant("role", [
  v.strictObject({ role: v.picklist(["system", "user"]), content: v.string() }),
  v.strictObject({
    role: v.literal("assistant"),
    content: v.nullish(v.string()),
    tool_calls: v.nullish(v.pipe(v.array(toolCall), v.maxLength(128))),
  }),
  v.strictObject({
    role: v.literal("tool"),
    content: v.string(),
    tool_name: v.nullish(functionName),
    tool_call_id: v.nullish(v.string()),
  }),
]);

const toolSchema = v.strictObject({
  type: v.literal("function"),
  function: v.strictObject({
    name: functionName,
    type: v.nullish(v.string()),
    description: v.nullish(v.string()),
    parameters: v.nullish(anyObject),
  }),
});

export const chatSchema = v.strictObject({
  ...commonEntries,
  messages: v.optional(v.array(messageSchema)),
  tools: v.optional(v.pipe(v.array(toolSchema), v.maxLength(128))),
});

export const generateSchema = v.strictObject({
  ...commonEntries,
  prompt: v.optional(v.string()),
  system: v.optional(v.string()),
  /** The prompt is used as it is, without the model's template. */
  raw: v.optional(v.boolean()),
});

export type OllamaChatRequest = v.InferOutput<typeof chatSchema>;
export type OllamaGenerateRequest = v.InferOutput<typeof generateSchema>;
type Options = v.InferOutput<typeof optionsSchema>;

const COMMON_UNBUILT: Record<string, Unbuilt> = {
  think: { feature: "thinking", harmless: isOneOf(false) },
  logprobs: { feature: "showing log-probabilities", harmless: isOneOf(false) },
  top_logprobs: { feature: "showing log-probabilities", harmless: isOneOf(0) },
};

export const CHAT_UNBUILT: Record<string, Unbuilt> = {
  ...COMMON_UNBUILT,
};

export const GENERATE_UNBUILT: Record<string, Unbuilt> = {
  ...COMMON_UNBUILT,
  images: { feature: "reading images", harmless: isEmptyArray },
  suffix: { feature: "inserting text before a suffix", harmless: isOneOf("") },
  template: { feature: "replacing the model's template", harmless: isOneOf("") },
  context: { feature: "continuing from a context", harmless: isEmptyArray },
};

/**
 * Takes out the fields of messages that are known and empty, and refuses those that are known and not built.
 * Throws unsupported_parameter.
 */
export function cleanMessages(messages: unknown): unknown {
  if (!Array.isArray(messages)) return messages;
  return messages.map((message: unknown, index) => {
    if (typeof message !== "object" || message === null) return message;
    const { images, thinking, ...rest } = message as Record<string, unknown>;
    if (images != null && !isEmptyArray(images))
      throw unsupported(`messages[${index}].images`, "reading images");
    if (thinking != null && thinking !== "") throw unsupported(`messages[${index}].thinking`, "thinking");
    return rest;
  });
}

export function samplingOf(options: Options | undefined): SamplingRequest {
  const { temperature, top_k, top_p, min_p, seed, repeat_penalty, presence_penalty, frequency_penalty } =
    options ?? {};
  const values = { temperature, top_k, top_p, min_p, seed, presence_penalty, frequency_penalty };
  const given = Object.entries({ ...values, repetition_penalty: repeat_penalty });
  return Object.fromEntries(given.filter(([, value]) => typeof value === "number"));
}

/** Tokens that were asked for; undefined = as many as the model's own limit and the context allow. */
export function maxTokensOf(options: Options | undefined): number | undefined {
  const asked = options?.num_predict ?? -1;
  return asked < 0 ? undefined : asked;
}

export function stopsOf(options: Options | undefined): string[] {
  const stop = options?.stop ?? [];
  return typeof stop === "string" ? [stop] : stop;
}

/** Throws invalid_argument when more context is asked for than the model was loaded with. */
export function checkContext(options: Options | undefined, contextLength: number): void {
  if ((options?.num_ctx ?? 0) <= contextLength) return;
  throw new CaravanError(
    "invalid_argument",
    `options.num_ctx: the model is loaded with a context of ${contextLength} tokens, and requests cannot change it.`,
    { param: "options.num_ctx" },
  );
}
