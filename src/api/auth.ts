// API keys. Every route but /health asks for one when any is set.

import { createHash, timingSafeEqual } from "node:crypto";
import { CaravanError } from "../errors.ts";

function digest(text: string): Uint8Array {
  return createHash("sha256").update(text).digest();
}

/** The key in `authorization: Bearer …` or, as Anthropic's clients send it, `x-api-key`. */
function presentedKey(headers: Headers): string | undefined {
  const bearer = /^bearer +(.+)$/i.exec(headers.get("authorization") ?? "");
  return bearer?.[1]?.trim() ?? headers.get("x-api-key") ?? undefined;
}

/** Returns a check that throws invalid_api_key. Digests are compared, in constant time and with every key. */
export function keyCheck(apiKeys: readonly string[]): (headers: Headers) => void {
  const accepted = apiKeys.map(digest);
  return (headers) => {
    if (accepted.length === 0) return;
    const presented = presentedKey(headers);
    if (presented === undefined) {
      throw new CaravanError("invalid_api_key", "This server needs an API key and the request has none.", {
        hint: "Send it as `authorization: Bearer KEY`.",
      });
    }
    const candidate = digest(presented);
    let matches = 0;
    for (const key of accepted) matches += timingSafeEqual(key, candidate) ? 1 : 0;
    if (matches === 0) throw new CaravanError("invalid_api_key", "The API key is not one of this server's.");
  };
}
