// Checks a request's parameters: what is unknown or not built is refused by name, never ignored.

import * as v from "valibot";
import { CaravanError } from "../errors.ts";

/** A parameter that is known but not built: only values that ask for nothing are let through. */
export interface Unbuilt {
  /** What the parameter is for, in words that end "… is not built yet." */
  feature: string;
  /** Values that ask for nothing. null always is one. */
  harmless?: (value: unknown) => boolean;
}

export const isEmptyArray = (value: unknown): boolean => Array.isArray(value) && value.length === 0;
export const isOneOf =
  (...values: unknown[]) =>
  (value: unknown): boolean =>
    values.includes(value);

export function unsupported(param: string, feature: string): CaravanError {
  return new CaravanError("unsupported_parameter", `${param}: ${feature} is not built yet.`, {
    param,
    hint: "Leave the parameter out.",
  });
}

/** Objects with more keys take tens of milliseconds to check. */
const MOST_KEYS = 1 << 16;

/** A JSON object with values of one kind. valibot's record alone takes lists, too, as objects with "0", "1" … */
export function objectOf<Value extends v.GenericSchema>(
  value: Value,
  key: v.GenericSchema<string, string> = v.string(),
) {
  const isObject = (given: unknown): boolean =>
    typeof given === "object" && given !== null && !Array.isArray(given);
  const fits = (given: Record<string, unknown>): boolean => Object.keys(given).length <= MOST_KEYS;
  return v.pipe(
    v.custom<Record<string, unknown>>(isObject, "Expected an object"),
    v.check(fits, `Expected at most ${MOST_KEYS} keys`),
    v.record(key, value),
  );
}
/** Any JSON object. */
export const anyObject = objectOf(v.unknown());

/**
 * Validates the body against the schema after taking out nulls (null = absent, as in OpenAI's API) and harmless
 * values of unbuilt parameters. Throws unsupported_parameter, or invalid_argument with `param` set.
 */
export function parseParameters<Schema extends v.GenericSchema>(
  schema: Schema,
  unbuilt: Record<string, Unbuilt>,
  body: Record<string, unknown>,
): v.InferOutput<Schema> {
  const given: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(body)) {
    // Assigned, it would be the record's prototype, and pass unseen.
    if (name === "__proto__")
      throw new CaravanError("unsupported_parameter", `${name}: there is no such parameter.`, {
        param: name,
      });
    if (value === null) continue;
    const rule = Object.hasOwn(unbuilt, name) ? unbuilt[name] : undefined;
    if (rule === undefined) given[name] = value;
    else if (!rule.harmless?.(value)) throw unsupported(name, rule.feature);
  }
  const parsed = v.safeParse(schema, given, { abortPipeEarly: true, abortEarly: true });
  if (parsed.success) return parsed.output;
  throw issueError(parsed.issues[0]);
}

/** Of a value that may be of several forms, what is wrong inside the one that it has; the path goes on there. */
function innermost(issue: v.BaseIssue<unknown>): v.BaseIssue<unknown> {
  const inside = issue.type === "union" ? (issue.issues ?? []).filter(({ path }) => path !== undefined) : [];
  const [only] = inside;
  if (only === undefined || inside.length > 1) return issue;
  const inner = innermost(only);
  const path = [...(issue.path ?? []), ...(inner.path ?? [])];
  const [first, ...rest] = path;
  return first === undefined ? inner : { ...inner, path: [first, ...rest] };
}

function issueError(outer: v.BaseIssue<unknown>): CaravanError {
  const issue = innermost(outer);
  const param = pathText(issue);
  if (issue.type === "strict_object" && issue.expected === "never") {
    return new CaravanError("unsupported_parameter", `${param}: there is no such parameter.`, { param });
  }
  if (issue.received === "undefined") {
    return new CaravanError("invalid_argument", `${param}: this parameter is required.`, { param });
  }
  return new CaravanError("invalid_argument", `${param}: ${issue.message}.`, { param });
}

/** Names come from the client. */
const LONGEST_NAME = 200;

/** `messages[0].content`. */
function pathText(issue: v.BaseIssue<unknown>): string {
  let text = "";
  for (const { key } of issue.path ?? []) {
    if (typeof key === "number") text += `[${key}]`;
    else text += text === "" ? String(key) : `.${String(key)}`;
  }
  if (text.length > LONGEST_NAME) return `${text.slice(0, LONGEST_NAME)}…`;
  return text === "" ? "body" : text;
}
