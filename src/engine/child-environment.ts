// The environment of the processes that compute: this one's without the keys and tokens that only the node needs. They
// read files that strangers made; what they do not have, a fault in them cannot give away.

const SECRETS = new Set([
  "CARAVAN_API_KEY",
  "CARAVAN_API_KEYS",
  "CARAVAN_ADMIN_KEYS",
  "HF_TOKEN",
  "HUGGING_FACE_HUB_TOKEN",
]);

export function childEnvironment(
  environment: Readonly<Record<string, string | undefined>> = process.env,
): Record<string, string> {
  const kept: Record<string, string> = {};
  for (const [name, value] of Object.entries(environment)) {
    if (value !== undefined && !SECRETS.has(name)) kept[name] = value;
  }
  return kept;
}
