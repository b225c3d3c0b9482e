// Whether a value satisfies a schema: for the values of enum and const, which must satisfy what stands beside them.

import { type Flat, isRecord, listOf, type SchemaReader } from "./schema-reader.ts";
import { arraysOf, numbersOf, objectsOf, type Placed, type Shape, shapeOf, stringsOf } from "./shape.ts";

/** The flat's own keywords only: what it refers to stands beside it in its conjunction. Throws SchemaError. */
export function acceptsFlat(flat: Flat, value: unknown, reader: SchemaReader): boolean {
  const { keywords } = flat;
  if (Object.hasOwn(keywords, "const") && !sameJson(keywords.const, value)) return false;
  if (keywords.enum !== undefined && !listOf(keywords.enum).some((each) => sameJson(each, value)))
    return false;
  const plain: Flat = { ...flat, keywords: { ...keywords, enum: undefined } };
  const { const: _, enum: __, ...rest } = plain.keywords;
  const shape = shapeOf([{ ...plain, keywords: rest }], reader);
  return acceptsShape(shape, value, reader);
}

function accepts(schemas: Placed[], value: unknown, reader: SchemaReader): boolean {
  return reader.alternatives(schemas).some((all) => all.every((flat) => acceptsFlat(flat, value, reader)));
}

function acceptsShape(shape: Shape, value: unknown, reader: SchemaReader): boolean {
  const { types } = shape;
  if (value === null) return types.has("null");
  if (typeof value === "boolean") return types.has("boolean");
  if (typeof value === "number") {
    if (!types.has(Number.isInteger(value) ? "integer" : "fraction")) return false;
    const { low, high, lowExcluded, highExcluded, divisors } = numbersOf(shape);
    if (low !== undefined && (value < low || (value === low && lowExcluded === true))) return false;
    if (high !== undefined && (value > high || (value === high && highExcluded === true))) return false;
    return divisors.every((divisor) => value % divisor === 0);
  }
  if (typeof value === "string") {
    if (!types.has("string")) return false;
    const { min, max, patterns } = stringsOf(shape);
    const length = [...value].length;
    if (length < min || length > max) return false;
    return patterns.every(([pattern]) => new RegExp(pattern, "u").test(value));
  }
  if (Array.isArray(value)) {
    if (!types.has("array")) return false;
    const { min, max, items } = arraysOf(shape);
    if (value.length < min || value.length > max) return false;
    return value.every((item, i) => accepts(items(i), item, reader));
  }
  if (!isRecord(value) || !types.has("object")) return false;
  const { min, max, required, schemasOfName } = objectsOf(shape);
  const names = Object.keys(value);
  if (names.length < min || names.length > max) return false;
  if (![...required].every((name) => Object.hasOwn(value, name))) return false;
  return names.every((name) => accepts(schemasOfName(name), value[name], reader));
}

/** Whether two JSON values are equal; members of objects in any order. */
export function sameJson(a: unknown, b: unknown): boolean {
  if (Array.isArray(a))
    return Array.isArray(b) && a.length === b.length && a.every((each, i) => sameJson(each, b[i]));
  if (!isRecord(a)) return a === b;
  if (!isRecord(b)) return false;
  const names = Object.keys(a);
  return (
    names.length === Object.keys(b).length &&
    names.every((name) => Object.hasOwn(b, name) && sameJson(a[name], b[name]))
  );
}
