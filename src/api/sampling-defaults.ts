// Which sampling values a request runs with: its own, then the model's generation_config.json, then its card,
// then the defaults of OpenAI's API. One place, so that every API family and the terminal chat agree.

import * as v from "valibot";
import type { Sampling } from "../engine/protocol.ts";
import { CaravanError } from "../errors.ts";
import type { LoadedModel, SamplingDefaults } from "./model-directory.ts";
import { fileValues, samplingValues } from "./sampling-ranges.ts";

/** Used when nobody says otherwise: OpenAI's documented defaults; what OpenAI does not have is off. */
export const OPENAI_DEFAULTS: Required<Omit<SamplingDefaults, "max_tokens">> = {
  temperature: 1,
  top_p: 1,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  presence_penalty: 0,
  frequency_penalty: 0,
  xtc_probability: 0,
  xtc_threshold: 0.1,
};

/** OpenAI's `max_tokens` of /v1/completions; chat has no such limit but the context. */
export const COMPLETION_MAX_TOKENS = 16;

export interface SamplingRequest extends SamplingDefaults {
  /** Any safe integer; absent = drawn at random. */
  seed?: number;
  logit_bias?: [token: number, bias: number][];
}

const SEED_RANGE = 2 ** 53;

/** Maps any safe integer to an unsigned seed below 2^53 (negative ones wrap). */
export function unsignedSeed(seed: number): number {
  return seed < 0 ? seed + SEED_RANGE : seed;
}

function randomSeed(): number {
  const [high = 0, low = 0] = crypto.getRandomValues(new Uint32Array(2));
  return (high & 0x1fffff) * 2 ** 32 + low;
}

function clean(values: SamplingDefaults): SamplingDefaults {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));
}

/** All sampling values of one request, every one filled in. */
export function resolveSampling(request: SamplingRequest, defaults: LoadedModel["defaults"]): Sampling {
  const { seed, logit_bias, ...asked } = request;
  const { max_tokens: _, ...values } = {
    ...OPENAI_DEFAULTS,
    ...clean(defaults.card),
    ...clean(defaults.generationConfig),
    ...clean(asked),
  };
  return {
    ...values,
    top_k: Math.max(0, values.top_k),
    seed: seed === undefined ? randomSeed() : unsignedSeed(seed),
    logit_bias: logit_bias ?? [],
  };
}

/** The sampling of the i-th of several answers to one prompt: seed + i, wrapping. */
export function samplingOfChoice(sampling: Sampling, index: number): Sampling {
  return { ...sampling, seed: (sampling.seed + index) % SEED_RANGE };
}

/**
 * How many tokens may be generated after a prompt of `promptLength`: what the request says, then the model's
 * own limit, then `fallback`, then all that the context has left. Only an explicit limit can be too large;
 * the others are cut to fit. Throws context_length_exceeded.
 */
export function resolveMaxTokens(
  asked: number | undefined,
  model: Pick<LoadedModel, "id" | "contextLength" | "defaults">,
  promptLength: number,
  { fallback, promptParam }: { fallback?: number; promptParam: string },
): number {
  const room = model.contextLength - promptLength;
  if (room < 1 || (asked ?? 1) > room) {
    const wanted = asked === undefined ? "" : `, and ${asked} more were asked for`;
    throw new CaravanError(
      "context_length_exceeded",
      `The context of ${model.id} is ${model.contextLength} tokens; the prompt has ${promptLength}${wanted}.`,
      {
        hint: room < 1 ? "Shorten the prompt." : `Shorten the prompt, or ask for at most ${room} tokens.`,
        param: promptParam,
      },
    );
  }
  if (asked !== undefined) return asked;
  const limit =
    model.defaults.generationConfig.max_tokens ?? model.defaults.card.max_tokens ?? fallback ?? room;
  return Math.min(limit, room);
}

const generationConfigSchema = v.looseObject({
  do_sample: v.nullish(v.boolean()),
  temperature: v.nullish(fileValues.temperature),
  top_p: v.nullish(samplingValues.top_p),
  top_k: v.nullish(samplingValues.top_k),
  min_p: v.nullish(samplingValues.min_p),
  repetition_penalty: v.nullish(fileValues.repetition_penalty),
  max_new_tokens: v.nullish(v.pipe(v.number(), v.integer(), v.minValue(1))),
});

/**
 * The sampling values in a generation_config.json. `do_sample: false` means greedy, whatever else it says; a file
 * without `do_sample` keeps its values, as vLLM does (transformers would be greedy). Throws bad_file.
 */
export function samplingFromGenerationConfig(json: unknown, where: string): SamplingDefaults {
  const parsed = v.safeParse(generationConfigSchema, json);
  if (!parsed.success) {
    const issue = parsed.issues[0];
    const path = issue.path?.map((item) => String(item.key)).join(".");
    throw new CaravanError("bad_file", `${path ?? "the document"}: ${issue.message}`, { where });
  }
  const { do_sample, max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty } = parsed.output;
  const limit = typeof max_new_tokens === "number" ? { max_tokens: max_new_tokens } : {};
  if (do_sample === false) return { temperature: 0, ...limit };
  const values = { temperature, top_p, top_k, min_p, repetition_penalty };
  return {
    ...Object.fromEntries(Object.entries(values).filter(([, value]) => typeof value === "number")),
    ...limit,
  };
}
