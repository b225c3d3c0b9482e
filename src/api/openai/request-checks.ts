// Checks that both OpenAI routes make beyond the schema: parameters that only make sense together, and with the model.

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
