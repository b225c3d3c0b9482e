// The environment of the processes that compute: this one's without the keys and tokens that only the node needs. They
// read files that strangers made; what they do not have, a fault in them cannot give away. On a Mac they are told where
// compiled kernels are kept.

import { join } from "node:path";
import { resolvePaths } from "../paths.ts";

const SECRETS = new Set([
  "CARAVAN_API_KEY",
  "CARAVAN_API_KEYS",
  "CARAVAN_ADMIN_KEYS",
  "HF_TOKEN",
  "HUGGING_FACE_HUB_TOKEN",
]);

/** CARAVAN_METAL_CACHE as it is set, empty for none; else a folder of the cache. */
export function childEnvironment(
  environment: Readonly<Record<string, string | undefined>> = process.env,
  platform: string = process.platform,
): Record<string, string> {
  const kept: Record<string, string> = {};
  if (platform === "darwin") kept.CARAVAN_METAL_CACHE = join(resolvePaths(environment).cache, "metal");
  for (const [name, value] of Object.entries(environment)) {
    if (value !== undefined && !SECRETS.has(name)) kept[name] = value;
  }
  return kept;
}
