// The form of the lines that a runner accepts (protocol.ts). Values are checked where their limits are known: token ids
// and sampling ranges by the scheduler.

import * as v from "valibot";
import { GrammarSpecSchema } from "../grammar/spec.ts";
import { ConnectSchema } from "./rank-protocol.ts";

const numbers = v.custom<number[]>(
  (value) => Array.isArray(value) && value.every((each) => typeof each === "number"),
);
const pairs = v.array(v.tuple([v.number(), v.number()]));

const SamplingSchema = v.strictObject({
  temperature: v.number(),
  top_p: v.number(),
  top_k: v.number(),
  min_p: v.number(),
  repetition_penalty: v.number(),
  presence_penalty: v.number(),
  frequency_penalty: v.number(),
  xtc_probability: v.number(),
  xtc_threshold: v.number(),
  logit_bias: pairs,
  seed: v.number(),
});

const RequestSchema = v.strictObject({
  id: v.string(),
  // One pass over what may be a million numbers, instead of a validator a number.
  tokens: numbers,
  max_tokens: v.number(),
  stop_tokens: numbers,
  ban_stop_tokens: v.exactOptional(v.boolean()),
  sampling: SamplingSchema,
  logprobs: v.exactOptional(v.number()),
  prompt_logprobs: v.exactOptional(v.boolean()),
  deadline_ms: v.exactOptional(v.number()),
  grammar: v.exactOptional(GrammarSpecSchema),
});

export const RunnerCommandSchema = v.variant("type", [
  v.strictObject({ type: v.literal("generate"), request: RequestSchema }),
  v.strictObject({ type: v.literal("cancel"), id: v.string() }),
  v.strictObject({ type: v.literal("status") }),
  ConnectSchema,
  v.strictObject({
    type: v.literal("lost"),
    error: v.looseObject({ code: v.string(), message: v.string() }),
  }),
  v.strictObject({ type: v.literal("shutdown") }),
]);
