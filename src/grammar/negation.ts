// What does not satisfy a schema, as schemas of which it has to satisfy one. Where that is not exact within the keywords that
// are enforced, the keyword is refused. Some of what is needed has no keyword of its own: those below, whose names no
// schema has by chance.

import { SchemaError } from "./limits.ts";
import { ALL_TYPES, ANNOTATIONS, isRecord, listOf, pointerPart, typesNamed } from "./schema-keywords.ts";

/** Types of value, whole numbers and fractions apart. */
export const TYPES_ONLY = "\0types";
/** Strings that the value is not. */
export const NOT_STRINGS = "\0not strings";
/** Patterns that are not found in a string. */
export const NOT_FOUND = "\0not found";
/** Names that an object does not have. */
export const ABSENT = "\0absent";
/** Schemas of members, without the say of `properties` in which members there are. */
export const MEMBERS = "\0members";

type Keywords = Readonly<Record<string, unknown>>;

/** `targets`: what the references of a schema lead to. Throws SchemaError. */
export function negated(
  schema: unknown,
  path: string,
  targets: (schema: Keywords) => readonly unknown[],
): unknown[] {
  if (schema === true) return [];
  if (schema === false) return [true];
  if (!isRecord(schema)) throw new SchemaError(path, "a schema is an object, true or false");
  const out: unknown[] = [];
  for (const [name, value] of Object.entries(schema)) {
    if (ANNOTATIONS.has(name) || name.startsWith("x-") || name === "$schema") continue;
    // One list for both keywords of references.
    if (name === "$dynamicRef" && schema.$ref !== undefined) continue;
    const found = opposite(name, value, schema, targets);
    if (found === undefined)
      throw new SchemaError(
        `${path}/${pointerPart(name)}`,
        `the opposite of ${JSON.stringify(name.slice(0, 64))} cannot be enforced`,
      );
    out.push(...found);
  }
  return out;
}

/** Undefined: it cannot be said. */
function opposite(
  name: string,
  value: unknown,
  schema: Keywords,
  targets: (schema: Keywords) => readonly unknown[],
): unknown[] | undefined {
  const not = (part: unknown): unknown => ({ not: part });
  const count = Number(value);
  switch (name) {
    case "type": {
      const named = new Set([value].flat().flatMap(typesNamed));
      return [{ [TYPES_ONLY]: ALL_TYPES.filter((type) => !named.has(type)) }];
    }
    case "const":
      return notOneOf([value]);
    case "enum":
      return notOneOf(listOf(value));
    case "minimum":
      return [{ type: "number", exclusiveMaximum: value }];
    case "exclusiveMinimum":
      return [{ type: "number", maximum: value }];
    case "maximum":
      return [{ type: "number", exclusiveMinimum: value }];
    case "exclusiveMaximum":
      return [{ type: "number", minimum: value }];
    case "minLength":
      return count > 0 ? [{ type: "string", maxLength: count - 1 }] : [];
    case "maxLength":
      return [{ type: "string", minLength: count + 1 }];
    case "pattern":
      return [{ type: "string", [NOT_FOUND]: [value] }];
    case "minItems":
      return count > 0 ? [{ type: "array", maxItems: count - 1 }] : [];
    case "maxItems":
      return [{ type: "array", minItems: count + 1 }];
    case "minProperties":
      return count > 0 ? [{ type: "object", maxProperties: count - 1 }] : [];
    case "maxProperties":
      return [{ type: "object", minProperties: count + 1 }];
    case "required":
      return listOf(value).map((member) => ({ type: "object", [ABSENT]: [member] }));
    case "properties":
      return Object.entries(isRecord(value) ? value : {}).map(([member, part]) => ({
        type: "object",
        required: [member],
        [MEMBERS]: { [member]: not(part) },
      }));
    case "items":
      if (schema.prefixItems !== undefined) return undefined;
      return [{ type: "array", contains: not(value) }];
    case "prefixItems":
      return listOf(value).map((part, i) => ({
        type: "array",
        minItems: i + 1,
        prefixItems: [...Array.from({ length: i }, () => true), not(part)],
        items: true,
      }));
    case "contains":
      if (schema.minContains !== undefined || schema.maxContains !== undefined) return undefined;
      return [{ type: "array", items: not(value) }];
    case "uniqueItems":
      return value === true ? undefined : [];
    case "dependentRequired":
      return Object.entries(isRecord(value) ? value : {}).flatMap(([member, others]) =>
        listOf(others).map((other) => ({ type: "object", required: [member], [ABSENT]: [other] })),
      );
    case "not":
      return [value];
    case "anyOf":
      return [{ allOf: listOf(value).map(not) }];
    case "allOf":
      return listOf(value).map(not);
    case "oneOf": {
      const parts = listOf(value);
      const pairs = parts.flatMap((one, i) => parts.slice(i + 1).map((other) => ({ allOf: [one, other] })));
      return [{ allOf: parts.map(not) }, ...pairs];
    }
    case "if":
      return [
        ...(schema.then === undefined ? [] : [{ allOf: [value, not(schema.then)] }]),
        ...(schema.else === undefined ? [] : [{ allOf: [not(value), not(schema.else)] }]),
      ];
    case "then":
    case "else":
      return [];
    case "dependentSchemas":
      return Object.entries(isRecord(value) ? value : {}).map(([member, part]) => ({
        type: "object",
        required: [member],
        allOf: [not(part)],
      }));
    case "$ref":
    case "$dynamicRef":
      return targets(schema).map(not);
    default:
      return undefined;
  }
}

/** Undefined for lists and objects: they are not told apart by their text. */
function notOneOf(values: readonly unknown[]): unknown[] | undefined {
  if (values.some((value) => typeof value === "object" && value !== null)) return undefined;
  const strings = values.filter((value) => typeof value === "string");
  const numbers = values.filter((value) => typeof value === "number").sort((a, b) => a - b);
  const out: unknown[] = [{ [TYPES_ONLY]: ["array", "object"] }];
  out.push(strings.length === 0 ? { type: "string" } : { type: "string", [NOT_STRINGS]: strings });
  // A number has many spellings: what lies between those that are excluded.
  for (let i = 0; i <= numbers.length; i++)
    out.push({
      type: "number",
      ...(i > 0 ? { exclusiveMinimum: numbers[i - 1] } : {}),
      ...(i < numbers.length ? { exclusiveMaximum: numbers[i] } : {}),
    });
  for (const value of [true, false, null]) if (!values.includes(value)) out.push({ const: value });
  return out;
}
