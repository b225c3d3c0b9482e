// Reading a request's JSON body within limits of size and time.

import { CaravanError } from "../errors.ts";
import type { BodyLease } from "./body-budget.ts";
import { JsonBounds } from "./json-bounds.ts";
import { parseInSlices } from "./json-slices.ts";
import type { ApiContext } from "./routes.ts";

/** Bytes that are looked at before the event loop turns. */
const LOOK_BYTES = 1 << 20;
/** More than any route has parameters: what has more is not checked one by one. */
const MOST_PARAMETERS = 256;

export interface BodyLimits {
  maxBodyBytes: number;
  bodyTimeoutMs: number;
}

function tooLarge(limit: number): CaravanError {
  return new CaravanError(
    "request_too_large",
    `The request's body is larger than ${limit} bytes, which is the limit.`,
    {
      hint: "The limit is the server's max body size.",
    },
  );
}

/** Collects the body; stops reading at a limit. Throws request_too_large, queue_full (too much in all bodies together) or
 * invalid_argument (too slow, cut off). */
export async function readBody(
  request: Request,
  limits: BodyLimits,
  lease: BodyLease | undefined,
): Promise<Uint8Array> {
  const declared = Number(request.headers.get("content-length") ?? Number.NaN);
  if (declared > limits.maxBodyBytes) throw tooLarge(limits.maxBodyBytes);
  if (request.body === null) return new Uint8Array();
  const reader = request.body.getReader();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    void reader.cancel();
  }, limits.bodyTimeoutMs);
  const pieces: Uint8Array[] = [];
  const bounds = new JsonBounds();
  let size = 0;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      size += value.byteLength;
      if (size > limits.maxBodyBytes) throw tooLarge(limits.maxBodyBytes);
      lease?.grow(size);
      for (let from = 0; from < value.length; from += LOOK_BYTES) {
        if (from > 0) await new Promise<void>((resolve) => setImmediate(resolve));
        bounds.add(value.subarray(from, from + LOOK_BYTES));
      }
      pieces.push(value);
    }
  } catch (thrown) {
    if (thrown instanceof CaravanError) {
      void reader.cancel();
      throw thrown;
    }
    throw new CaravanError("invalid_argument", "The request's body could not be read to its end.", {
      cause: thrown,
    });
  } finally {
    clearTimeout(timer);
  }
  if (late) {
    throw new CaravanError(
      "invalid_argument",
      `The request's body did not arrive within ${limits.bodyTimeoutMs} ms.`,
    );
  }
  const [only] = pieces;
  return pieces.length === 1 && only !== undefined ? only : Buffer.concat(pieces, size);
}

/** JSON that JsonBounds has let through. Throws SyntaxError, or TypeError for what is no UTF-8. */
export async function parseJson(bytes: Uint8Array): Promise<unknown> {
  return await parseInSlices(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
}

/** The JSON object in a request's body. Throws invalid_json besides what readBody throws. */
export async function readJsonObject(
  context: ApiContext,
  limits: BodyLimits,
): Promise<Record<string, unknown>> {
  const request = context.req.raw;
  const encoding = request.headers.get("content-encoding");
  if (encoding !== null && encoding !== "identity") {
    throw new CaravanError("invalid_argument", `Bodies with content-encoding ${encoding} are not read.`, {
      hint: "Send the JSON uncompressed.",
    });
  }
  const bytes = await readBody(request, limits, context.get("body"));
  let value: unknown;
  try {
    value = await parseJson(bytes);
  } catch (thrown) {
    const reason =
      bytes.byteLength === 0 ? "it is empty" : thrown instanceof Error ? thrown.message : String(thrown);
    throw new CaravanError("invalid_json", `The request's body is not JSON: ${reason}.`, {
      hint: "Send a JSON object with content-type: application/json.",
    });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new CaravanError("invalid_json", "The request's body is JSON, but not an object.");
  }
  if (Object.keys(value).length > MOST_PARAMETERS) {
    throw new CaravanError("invalid_json", `The request's body has more than ${MOST_PARAMETERS} parameters.`);
  }
  return value as Record<string, unknown>;
}
