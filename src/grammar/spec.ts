// What an answer may be made to follow, as it travels from the API to the runner.

import * as v from "valibot";

const param = v.string();

/** Any JSON object. */
const objectSpec = v.strictObject({ type: v.literal("json_object"), param });
/** A JSON value that satisfies a JSON Schema. `param`: the request's parameter, for errors. */
const valueSpec = v.strictObject({ type: v.literal("json_schema"), schema: v.unknown(), param });

export const GrammarSpecSchema = v.variant("type", [
  objectSpec,
  valueSpec,
  /** Calls of these functions, one to `most`, as {"name": …, "parameters": {…}}. */
  v.strictObject({
    type: v.literal("tool_calls"),
    tools: v.pipe(
      v.array(v.strictObject({ name: v.string(), parameters: v.exactOptional(v.unknown()), param })),
      v.minLength(1),
    ),
    /** Text that does not look like a call will do, too. */
    orText: v.exactOptional(v.boolean()),
    /** A value of this form will do, too. */
    orForm: v.exactOptional(v.variant("type", [objectSpec, valueSpec])),
    most: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(128)),
  }),
]);

export type GrammarSpec = v.InferOutput<typeof GrammarSpecSchema>;
