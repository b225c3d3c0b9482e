// What a request says about the form of its answer, as the grammar that the engine masks tokens by: response formats and
// forced or strict tool calls, for every API family.

import * as v from "valibot";
import { CaravanError } from "../errors.ts";
import { MOST_SCHEMA_CHARACTERS } from "../grammar/limits.ts";
import type { GrammarSpec } from "../grammar/spec.ts";
import { anyObject } from "./parameters.ts";

/** Calls in one answer when a call is asked for and several are allowed. */
const MOST_CALLS = 16;

const description = v.nullish(v.string());
const strict = v.nullish(v.boolean());
const formatName = v.pipe(v.string(), v.minLength(1), v.maxLength(64));

/** `response_format` of chat and completions. */
export const responseFormatSchema = v.variant("type", [
  v.strictObject({ type: v.literal("text") }),
  v.strictObject({ type: v.literal("json_object") }),
  v.strictObject({
    type: v.literal("json_schema"),
    json_schema: v.strictObject({ name: formatName, description, schema: v.nullish(anyObject), strict }),
  }),
]);

/** `text.format` of responses. */
export const textFormatSchema = v.variant("type", [
  v.strictObject({ type: v.literal("text") }),
  v.strictObject({ type: v.literal("json_object") }),
  v.strictObject({
    type: v.literal("json_schema"),
    name: formatName,
    description,
    schema: anyObject,
    strict,
  }),
]);

/** The form of a whole answer. */
export type FormSpec = Exclude<GrammarSpec, { type: "tool_calls" }>;

/** An answer that satisfies the schema; without one, any JSON object. Throws unsupported_parameter. */
export function schemaGrammar(schema: unknown, param: string): FormSpec {
  if (schema == null) return { type: "json_object", param };
  checkSize(schema, param);
  return { type: "json_schema", schema, param };
}

export function responseGrammar(
  format: v.InferOutput<typeof responseFormatSchema> | undefined,
): FormSpec | undefined {
  if (format === undefined || format.type === "text") return undefined;
  if (format.type === "json_object") return { type: "json_object", param: "response_format" };
  return schemaGrammar(format.json_schema.schema, "response_format.json_schema.schema");
}

export function textGrammar(
  format: v.InferOutput<typeof textFormatSchema> | undefined,
): FormSpec | undefined {
  if (format === undefined || format.type === "text") return undefined;
  return schemaGrammar(format.type === "json_schema" ? format.schema : undefined, "text.format.schema");
}

/** A function that the model may call. */
export interface CallableTool {
  name: string;
  parameters: unknown;
  /** Its arguments have to satisfy `parameters` even where no call is asked for. */
  strict: boolean;
  /** Where its parameters are in the request. */
  param: string;
}

export interface CallChoice {
  tools: readonly CallableTool[];
  /** "required": at least one call; a name: one call of that function. */
  choice: "auto" | "none" | "required" | { name: string };
  /** Where the choice is in the request. */
  param: string;
  /** Whether several calls may follow each other. */
  parallel: boolean;
}

/** What an answer has to follow that may have a form and may call tools: where calls are left to the model, it is either the
 * one or the other; where they are asked for, the form has no part in it. Nothing: text as it comes will do. Throws
 * invalid_argument, unsupported_parameter. */
export function answerGrammar(form: FormSpec | undefined, calls: CallChoice): { grammar?: GrammarSpec } {
  const { tools, choice } = calls;
  const named = typeof choice === "object" ? tools.filter(({ name }) => name === choice.name) : tools;
  if (choice === "none" || (choice === "auto" && tools.length === 0))
    return form === undefined ? {} : { grammar: form };
  if (choice === "auto" && form === undefined && !tools.some(({ strict: isStrict }) => isStrict)) return {};
  if (named.length === 0) {
    const { param } = calls;
    const missing = typeof choice === "object" ? `there is no tool ${choice.name}` : "there are no tools";
    throw new CaravanError("invalid_argument", `${param}: ${missing}.`, { param });
  }
  const grammar: GrammarSpec = {
    type: "tool_calls",
    tools: named.map((tool) => calledTool(tool, choice === "auto")),
    most: calls.parallel && typeof choice === "string" ? MOST_CALLS : 1,
    ...(choice !== "auto" ? {} : form === undefined ? { orText: true } : { orForm: form }),
  };
  return { grammar };
}

/** `mayCall`: a call is not asked for, and only strict tools are held to their parameters. */
function calledTool(
  { name, parameters, strict: isStrict, param }: CallableTool,
  mayCall: boolean,
): Extract<GrammarSpec, { type: "tool_calls" }>["tools"][number] {
  if (mayCall && !isStrict) return { name, parameters: { type: "object" }, param };
  if (parameters == null) return { name, param };
  checkSize(parameters, param);
  return { name, parameters, param };
}

function checkSize(schema: unknown, param: string): void {
  const size = JSON.stringify(schema).length;
  if (size <= MOST_SCHEMA_CHARACTERS) return;
  throw new CaravanError(
    "unsupported_parameter",
    `${param}: the schema has ${size} characters, more than the ${MOST_SCHEMA_CHARACTERS} that can be enforced.`,
    { param },
  );
}
