// Anthropic's form of errors, as a body and as the last event of a stream.

import type { CaravanError } from "../../errors.ts";
import { errorBody } from "../error-response.ts";

const TYPES: ReadonlyMap<number, string> = new Map([
  [401, "authentication_error"],
  [403, "permission_error"],
  [404, "not_found_error"],
  [413, "request_too_large"],
  [429, "rate_limit_error"],
  [503, "overloaded_error"],
]);

/** The parameter at fault leads the message: Anthropic's errors have no field for it. */
export function anthropicErrorBody(error: CaravanError): object {
  const { message } = errorBody(error).error;
  const type = TYPES.get(error.status) ?? (error.status >= 500 ? "api_error" : "invalid_request_error");
  return { type: "error", error: { type, message } };
}

export function anthropicErrorFrame(error: CaravanError): string {
  return `event: error\ndata: ${JSON.stringify(anthropicErrorBody(error))}\n\n`;
}
