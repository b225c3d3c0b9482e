// What the environment says about the hub: which server, which token, and whether to go online at all. The variables
// are those of the hub's own library.

import { readFileSync } from "node:fs";
import { CaravanError } from "../../errors.ts";
import { type Environment, resolvePaths } from "../../paths.ts";

export interface HubEnvironment {
  /** Base URL without a slash at the end. */
  endpoint: string;
  token: string | undefined;
  offline: boolean;
}

/** Reads HF_ENDPOINT, HF_TOKEN (or the token file that `hf auth login` writes) and HF_HUB_OFFLINE. */
export function hubEnvironment(env: Environment = process.env): HubEnvironment {
  const offline = /^(1|true|yes|on)$/i.test(env.HF_HUB_OFFLINE ?? "");
  const token = env.HF_TOKEN || env.HUGGING_FACE_HUB_TOKEN || tokenFile(resolvePaths(env).hubTokenFile);
  return {
    endpoint: checkEndpoint(env.HF_ENDPOINT || "https://huggingface.co"),
    token: token === undefined ? undefined : checkToken(token),
    offline,
  };
}

/** The endpoint without a slash at its end. Throws invalid_argument unless it is an http(s) URL. */
export function checkEndpoint(endpoint: string): string {
  const url = URL.canParse(endpoint) ? new URL(endpoint) : undefined;
  if (url?.protocol !== "https:" && url?.protocol !== "http:") {
    throw new CaravanError("invalid_argument", `the hub's address ${JSON.stringify(endpoint)} is not a URL`, {
      where: "HF_ENDPOINT",
      hint: "unset it, or give https://…",
    });
  }
  return endpoint.replace(/\/+$/, "");
}

/** The token trimmed. Throws invalid_argument, without showing it, when it cannot be sent in a header. */
export function checkToken(token: string): string | undefined {
  const trimmed = token.trim();
  if (trimmed === "") return undefined;
  if (/^[\x21-\x7e]+$/.test(trimmed)) return trimmed;
  throw new CaravanError("invalid_argument", "the hub token holds characters that no token has", {
    where: "HF_TOKEN",
    hint: "copy it again from https://huggingface.co/settings/tokens",
  });
}

function tokenFile(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined; // most people have none, and public models need none
  }
}
