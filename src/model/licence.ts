// Under whose terms a model may be used, as far as its repository tells: named when it is pulled, so that nobody accepts
// a licence without having seen its name.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";

export interface Licence {
  name: string;
  url?: string;
}

/** Meta's licences by the names that the hub uses. */
const LLAMA: Record<string, Licence> = Object.fromEntries(
  [
    ["llama4", "Llama 4", "llama4"],
    ["llama3.3", "Llama 3.3", "llama3_3"],
    ["llama3.2", "Llama 3.2", "llama3_2"],
    ["llama3.1", "Llama 3.1", "llama3_1"],
    ["llama3", "Meta Llama 3", "llama3"],
  ].map(([key, name, path]) => [
    key,
    { name: `${name} Community License Agreement`, url: `https://www.llama.com/${path}/license/` },
  ]),
);

/** What the hub says of a repository's licence. */
export interface HubLicence {
  /** Of the repository's page: `license`, or `license_name` where that is "other". */
  name: string | undefined;
}

const CONFIG = v.looseObject({ model_type: v.nullish(v.string()) });

/**
 * The licence of the model in `folder`: what the hub says, else what follows from its kind (llama4), else from what
 * its card says that it was made of ("Llama 3.1 8B"). Undefined when nothing is known.
 */
export function licenceOf(
  folder: string,
  hub: HubLicence | undefined,
  baseModel: string | undefined,
): Licence | undefined {
  const named = hub?.name?.toLowerCase();
  const known = named === undefined ? undefined : LLAMA[named];
  if (known !== undefined) return known;
  const type = modelType(folder);
  if (type === "llama4" || type === "llama4_text") return LLAMA.llama4;
  const version = /^Llama (\d(?:\.\d)?)/.exec(baseModel ?? "")?.[1];
  const made = version === undefined ? undefined : LLAMA[`llama${version}`];
  if (made !== undefined) return made;
  return named === undefined || named === "other" || named === "unknown" ? undefined : { name: named };
}

function modelType(folder: string): string | undefined {
  try {
    const parsed = v.safeParse(CONFIG, JSON.parse(readFileSync(join(folder, "config.json"), "utf8")));
    return parsed.success ? (parsed.output.model_type ?? undefined) : undefined;
  } catch {
    return undefined; // whoever loads the model says what is wrong with its config
  }
}

/** What a person is told, in one or two lines. */
export function licenceText(licence: Licence): string {
  const accepted = licence.name.includes("Llama")
    ? "Whoever uses the model accepts it. Built with Llama."
    : "";
  return [`licence: ${licence.name}${licence.url === undefined ? "" : `, ${licence.url}`}`, accepted]
    .filter((line) => line !== "")
    .join("\n  ");
}
