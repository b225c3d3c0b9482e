// Checks that both OpenAI routes make beyond the schema: parameters that only make sense together, and with the model.

import type { Sampling } from "../../engine/protocol.ts";
import { CaravanError } from "../../errors.ts";
import type { LoadedModel } from "../model-directory.ts";
import type { ChatRequest, CompletionRequest } from "./schema.ts";

export function invalid(param: string, message: string): CaravanError {
  return new CaravanError("invalid_argument", `${param}: ${message}`, { param });
}

/** Throws invalid_argument. */
export function checkTogether(request: ChatRequest | CompletionRequest): void {
  if (request.stream_options !== undefined && request.stream !== true) {
    throw invalid("stream_options", "this is only for requests with stream: true.");
  }
}

/** Token ids must be of the model's vocabulary. Throws invalid_argument. */
export function checkTokenIds(ids: readonly number[], model: LoadedModel, param: string): void {
  const wrong = ids.find((id) => id >= model.vocabSize);
  if (wrong === undefined) return;
  throw invalid(param, `${wrong} is no token of ${model.id}, whose vocabulary has ${model.vocabSize}.`);
}

/**
 * The biases must name tokens of the model and leave at least one that may be chosen: the engine has nothing to choose
 * from otherwise, which fails the step that other requests share. Throws invalid_argument.
 */
export function checkBias(bias: Sampling["logit_bias"], model: LoadedModel, ignoreEos: boolean): void {
  checkTokenIds(
    bias.map(([id]) => id),
    model,
    "logit_bias",
  );
  // Ids may repeat ("7" and "07"), so the list is no shorter than the set of what it bans.
  if (bias.length + model.eosIds.length < model.vocabSize) return;
  const banned = new Set(bias.filter(([, value]) => value <= -100).map(([id]) => id));
  if (ignoreEos) for (const id of model.eosIds) banned.add(id);
  if (banned.size < model.vocabSize) return;
  throw invalid("logit_bias", `it bans every token of ${model.id}.`);
}

/**
 * Every message takes a token at least. A template is rendered in one go, seconds for a hundred thousand messages, and
 * other prompts wait meanwhile: what cannot fit is refused before. Throws context_length_exceeded.
 */
export function checkMessageCount(
  messages: readonly unknown[],
  model: Pick<LoadedModel, "id" | "contextLength">,
  param = "messages",
): void {
  if (messages.length < model.contextLength) return;
  throw new CaravanError(
    "context_length_exceeded",
    `The context of ${model.id} is ${model.contextLength} tokens; the prompt has ${messages.length} messages.`,
    { hint: "Shorten the prompt.", param },
  );
}
