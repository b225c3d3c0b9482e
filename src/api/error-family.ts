// Which form an error's body has: clients of each API family read only their own, on paths that do not exist and
// methods that are wrong as well.

import type { CaravanError } from "../errors.ts";
import { anthropicErrorBody } from "./anthropic/errors.ts";
import { ollamaErrorBody } from "./ollama/reply.ts";

export const ANTHROPIC = "/v1/messages";

/** Anthropic's clients read errors in a form of their own, and the request's id under another name. */
export function isAnthropic(path: string): boolean {
  return path === ANTHROPIC || path.startsWith(`${ANTHROPIC}/`);
}

/** The form of error bodies at the path; undefined = OpenAI's. */
export function errorBodyOf(path: string): ((error: CaravanError) => object) | undefined {
  if (isAnthropic(path)) return anthropicErrorBody;
  return path.startsWith("/api/") ? ollamaErrorBody : undefined;
}
