// A CaravanError as the record that crosses the boundary between runner and node.

import { asCaravanError } from "../errors.ts";
import type { ErrorRecord } from "./protocol.ts";

/** Anything thrown, as a record; stack and cause stay behind. */
export function errorRecord(thrown: unknown): ErrorRecord {
  const error = asCaravanError(thrown);
  return {
    code: error.code,
    message: error.message,
    ...(error.where === undefined ? {} : { where: error.where }),
    ...(error.hint === undefined ? {} : { hint: error.hint }),
    ...(error.param === undefined ? {} : { param: error.param }),
    ...(error.retryAfterSeconds === undefined ? {} : { retry_after_seconds: error.retryAfterSeconds }),
  };
}
