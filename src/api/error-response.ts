// The OpenAI error body: every failure of the API leaves through here, as a response or, once a stream has begun,
// as a frame of it.

import { asCaravanError, type CaravanError } from "../errors.ts";

export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: string | null };
}

/** OpenAI's `type` follows from the status. */
function typeOfStatus(status: number): string {
  if (status === 401) return "authentication_error";
  if (status === 403) return "permission_error";
  if (status === 429) return "rate_limit_error";
  return status >= 500 ? "server_error" : "invalid_request_error";
}

/** Codes ≥ 500 that the same request meets again: OpenAI's clients would retry them for nothing. */
const PERMANENT = new Set(["not_built_yet", "bad_file", "bad_card", "disk_full"]);

/** Messages and hints are written without a full stop where the terminal shows them on lines of their own. */
function sentence(text: string): string {
  return /[.!?:`]$/.test(text) ? text : `${text}.`;
}

export function errorBody(error: CaravanError): ErrorBody {
  // An internal error's text may hold anything; it belongs in the log, next to the request id.
  const message =
    error.code === "internal_error"
      ? "Something went wrong inside caravan; the log has the details under this request's x-request-id."
      : [error.message, error.hint].flatMap((part) => (part === undefined ? [] : [sentence(part)])).join(" ");
  return {
    error: {
      message,
      type: typeOfStatus(error.status),
      param: error.param ?? null,
      code: error.code,
    },
  };
}

/** `bodyOf`: the form of the error; absent = OpenAI's. */
export function errorResponse(
  thrown: unknown,
  headers: Record<string, string> = {},
  bodyOf: (error: CaravanError) => object = errorBody,
): Response {
  const error = asCaravanError(thrown);
  const extra: Record<string, string> = { ...headers };
  if (error.retryAfterSeconds !== undefined)
    extra["retry-after"] = String(Math.ceil(error.retryAfterSeconds));
  if (PERMANENT.has(error.code)) extra["x-should-retry"] = "false";
  if (error.status === 401) extra["www-authenticate"] = 'Bearer realm="caravan"';
  return Response.json(bodyOf(error), { status: error.status, headers: extra });
}

/** `data: {"error":…}`: what a stream ends with when it fails after its headers were sent. */
export function errorFrame(thrown: unknown): string {
  return `data: ${JSON.stringify(errorBody(asCaravanError(thrown)))}\n\n`;
}
