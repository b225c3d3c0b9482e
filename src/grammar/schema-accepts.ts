// Whether a value satisfies a schema: for the values of enum and const, which must satisfy what stands beside them.

import { mayBeOfFormat } from "./formats.ts";
import { SchemaError } from "./limits.ts";
import { inRange } from "./numbers.ts";
import { isRecord } from "./schema-keywords.ts";
import type { Flat, SchemaReader } from "./schema-reader.ts";
import { arraysOf, numbersOf, objectsOf, type Placed, type Shape, shapeOf, stringsOf } from "./shape.ts";

/** The flat's own keywords only: what it refers to stands beside it in its conjunction. Throws SchemaError. */
export function acceptsFlat(flat: Flat, value: unknown, reader: SchemaReader): boolean {
  const { keywords } = flat;
  if (Object.hasOwn(keywords, "const") && canonicalJson(keywords.const) !== canonicalJson(value))
    return false;
  if (keywords.enum !== undefined && !reader.valuesOf(flat).has(canonicalJson(value))) return false;
  const plain: Flat = { ...flat, keywords: { ...keywords, enum: undefined } };
  const { const: _, enum: __, ...rest } = plain.keywords;
  const shape = shapeOf([{ ...plain, keywords: rest }], reader);
  return acceptsShape(shape, value, reader);
}

export function accepts(schemas: Placed[], value: unknown, reader: SchemaReader): boolean {
  return reader.alternatives(schemas).some((all) => all.every((flat) => acceptsFlat(flat, value, reader)));
}

function acceptsShape(shape: Shape, value: unknown, reader: SchemaReader): boolean {
  const { types } = shape;
  if (value === null) return types.has("null");
  if (typeof value === "boolean") return types.has("boolean");
  if (typeof value === "number") {
    if (!types.has(Number.isInteger(value) ? "integer" : "fraction")) return false;
    const range = numbersOf(shape);
    return inRange(value, range) && range.divisors.every((divisor) => value % divisor === 0);
  }
  if (typeof value === "string") {
    if (!types.has("string")) return false;
    const { min, max, patterns, excluded, unmatched } = stringsOf(shape);
    const found = (pattern: string, at: string): boolean => expression(pattern, at).test(value);
    if (excluded.includes(value) || unmatched.some((pattern) => found(pattern, "not/pattern"))) return false;
    const length = [...value].length;
    if (length < min || length > max) return false;
    return patterns.every(([pattern, at, format]) =>
      format === undefined ? found(pattern, at) : mayBeOfFormat(value, format),
    );
  }
  if (Array.isArray(value)) {
    if (!types.has("array")) return false;
    const { min, max, items, contains, unique } = arraysOf(shape);
    if (value.length < min || value.length > max) return false;
    if (unique !== undefined && new Set(value.map(canonicalJson)).size < value.length) return false;
    if (contains !== undefined) {
      const count = value.filter((item) => accepts([contains.schema], item, reader)).length;
      if (count < contains.min || count > contains.max) return false;
    }
    return value.every((item, i) => accepts(items(i), item, reader));
  }
  if (!isRecord(value) || !types.has("object")) return false;
  const { min, max, required, absent, nameSchemas, schemasOfName } = objectsOf(shape);
  const names = Object.keys(value);
  if (names.length < min || names.length > max || names.some((name) => absent.has(name))) return false;
  if (!names.every((name) => accepts([...nameSchemas], name, reader))) return false;
  if (![...required].every((name) => Object.hasOwn(value, name))) return false;
  return names.every((name) => accepts(schemasOfName(name), value[name], reader));
}

/** The same text for equal JSON values: members of objects in one order. */
export function canonicalJson(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join()}]`;
  if (!isRecord(value)) return JSON.stringify(value);
  const names = Object.keys(value).sort();
  return `{${names.map((name) => `${JSON.stringify(name)}:${canonicalJson(value[name])}`).join()}}`;
}

/** Throws SchemaError for what is no pattern. */
function expression(pattern: string, at: string): RegExp {
  try {
    return new RegExp(pattern, "u");
  } catch {
    throw new SchemaError(at, "this is no pattern");
  }
}
