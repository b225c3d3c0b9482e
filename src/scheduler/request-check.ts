// What a request must satisfy before it may enter a batch: one bad row would fail the step of everybody else.

import type { GenerateRequest, Sampling } from "../engine/protocol.ts";
import { CaravanError } from "../errors.ts";

/** The reason to refuse a request, or undefined. */
export function checkRequest(
  request: GenerateRequest,
  limits: { vocab: number; contextTokens: number },
): CaravanError | undefined {
  const { vocab, contextTokens } = limits;
  const isToken = (token: number): boolean => Number.isInteger(token) && token >= 0 && token < vocab;
  const wrong = (message: string, param: string): CaravanError =>
    new CaravanError("invalid_argument", message, { param });

  if (request.tokens.length === 0) return wrong("the prompt has no tokens", "prompt");
  const bad = request.tokens.find((token) => !isToken(token));
  if (bad !== undefined) return wrong(`token ${bad} is not in the vocabulary of ${vocab}`, "prompt");
  if (!Number.isInteger(request.max_tokens) || request.max_tokens < 1)
    return wrong(`max_tokens is ${request.max_tokens}, it must be a whole number from 1`, "max_tokens");
  const { logprobs } = request;
  if (logprobs !== undefined && !(Number.isInteger(logprobs) && logprobs >= 0 && logprobs <= 20))
    return wrong(`logprobs is ${logprobs}, it must be 0 to 20`, "logprobs");
  if (request.grammar !== undefined && request.ban_stop_tokens === true)
    return wrong("an answer that follows a grammar has to end where the grammar does", "ignore_eos");
  const stop = request.stop_tokens.find((token) => !(Number.isInteger(token) && token >= 0));
  if (stop !== undefined) return wrong(`stop token ${stop} is not a token id`, "stop_tokens");
  // The first new token needs a position of its own.
  if (request.tokens.length >= contextTokens)
    return new CaravanError(
      "context_length_exceeded",
      `the prompt has ${request.tokens.length} tokens, the context holds ${contextTokens} with at least one for the answer`,
      { hint: "shorten the prompt, or load the model with a longer context", param: "messages" },
    );
  return checkSampling(request.sampling, isToken, wrong);
}

function checkSampling(
  sampling: Sampling,
  isToken: (token: number) => boolean,
  wrong: (message: string, param: string) => CaravanError,
): CaravanError | undefined {
  const ranges: [name: Exclude<keyof Sampling, "logit_bias">, low: number, high: number][] = [
    ["temperature", 0, 100],
    ["top_p", 0, 1],
    ["min_p", 0, 1],
    ["top_k", 0, 0xffffffff],
    ["xtc_probability", 0, 1],
    ["xtc_threshold", 0, 1],
    ["repetition_penalty", Number.MIN_VALUE, 1000],
    ["presence_penalty", -1000, 1000],
    ["frequency_penalty", -1000, 1000],
    ["seed", 0, Number.MAX_SAFE_INTEGER],
  ];
  for (const [name, low, high] of ranges) {
    const value = sampling[name];
    if (!(value >= low && value <= high))
      return wrong(`${name} is ${value}, it must be from ${low} to ${high}`, name);
  }
  if (!Number.isInteger(sampling.top_k))
    return wrong(`top_k is ${sampling.top_k}, not a whole number`, "top_k");
  if (!Number.isInteger(sampling.seed)) return wrong(`seed is ${sampling.seed}, not a whole number`, "seed");
  for (const [token, bias] of sampling.logit_bias) {
    if (!isToken(token))
      return wrong(`logit_bias names token ${token}, which is not in the vocabulary`, "logit_bias");
    if (Number.isNaN(bias) || bias === Number.POSITIVE_INFINITY)
      return wrong(`logit_bias of token ${token} is ${bias}`, "logit_bias");
  }
  return undefined;
}
