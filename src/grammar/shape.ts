// What a conjunction of schemas allows, by type of value: the sum of its keywords.

import type { Json } from "../chat/messages.ts";
import { formatPattern, isHint, isWholeFormat, numberBounds } from "./formats.ts";
import { SchemaError } from "./limits.ts";
import { splitLookahead } from "./lookahead.ts";
import { exactPlaces } from "./multiples.ts";
import { ABSENT, MEMBERS, NOT_FOUND, NOT_STRINGS, TYPES_ONLY } from "./negation.ts";
import type { NumberRange } from "./numbers.ts";
import { acceptsFlat } from "./schema-accepts.ts";
import { ALL_TYPES, listOf, pointerPart, recordOf, typesNamed, type ValueType } from "./schema-keywords.ts";
import type { Conjunction, Flat, SchemaReader } from "./schema-reader.ts";

/** A schema and where it is. */
export type Placed = readonly [schema: unknown, path: string];

export interface Shape {
  readonly types: ReadonlySet<ValueType>;
  /** The only values, from enum and const; they satisfy everything else. */
  readonly values: readonly Json[] | undefined;
  readonly path: string;
  readonly flats: Conjunction;
}

export function shapeOf(flats: Conjunction, reader: SchemaReader): Shape {
  const types = typesOf(flats);
  if (flats.some(({ keywords }) => isWhole(keywords.multipleOf) || isWholeFormat(keywords.format)))
    types.delete("fraction");
  return { types, values: valuesOf(flats, reader), path: flats[0]?.path ?? "#", flats };
}

const isWhole = (value: unknown): boolean => typeof value === "number" && Number.isInteger(value);

export function typesOf(flats: Conjunction): Set<ValueType> {
  let types = new Set(ALL_TYPES);
  for (const { keywords } of flats) {
    if (keywords.type !== undefined)
      types = types.intersection(new Set([keywords.type].flat().flatMap(typesNamed)));
    if (keywords[TYPES_ONLY] !== undefined) types = types.intersection(new Set(listOf(keywords[TYPES_ONLY])));
  }
  return types;
}

function valuesOf(flats: Conjunction, reader: SchemaReader): Json[] | undefined {
  const source = flats.find(
    ({ keywords }) => Object.hasOwn(keywords, "const") || Object.hasOwn(keywords, "enum"),
  );
  if (source === undefined) return undefined;
  const { keywords } = source;
  const values = Object.hasOwn(keywords, "const") ? [keywords.const] : listOf(keywords.enum);
  return values.filter((value) => flats.every((flat) => acceptsFlat(flat, value, reader))) as Json[];
}

/** Numbers that the shape allows. Throws SchemaError. */
export function numbersOf({ flats, types }: Shape): NumberRange {
  const range: NumberRange & { divisors: number[] } = {
    whole: !types.has("fraction"),
    broken: !types.has("integer"),
    divisors: [],
  };
  for (const { keywords, path } of flats) {
    const { minimum, exclusiveMinimum, maximum, exclusiveMaximum, multipleOf } = keywords;
    const [least, most] = numberBounds(keywords.format);
    for (const [bound, excluded] of [
      [minimum, false],
      [exclusiveMinimum, true],
      [least, false],
    ] as const)
      if (
        typeof bound === "number" &&
        (range.low === undefined || bound > range.low || (bound === range.low && excluded))
      ) {
        range.low = bound;
        range.lowExcluded = excluded;
      }
    for (const [bound, excluded] of [
      [maximum, false],
      [exclusiveMaximum, true],
      [most, false],
    ] as const)
      if (
        typeof bound === "number" &&
        (range.high === undefined || bound < range.high || (bound === range.high && excluded))
      ) {
        range.high = bound;
        range.highExcluded = excluded;
      }
    if (multipleOf === undefined) continue;
    if (typeof multipleOf !== "number" || exactPlaces(multipleOf) === undefined)
      throw new SchemaError(
        `${path}/multipleOf`,
        "validators do not agree on the multiples of this number: only whole numbers and halves of them, quarters and so on can be enforced",
        "Count in whole numbers (cents), or ask for a string with a pattern.",
      );
    range.divisors.push(multipleOf);
  }
  return range;
}

export interface StringShape {
  min: number;
  /** Infinity = none. */
  max: number;
  /** With the paths of their keywords. A format's is narrower than the format: whether a string that is given may be of it
   * is for formats.ts to say. */
  patterns: [pattern: string, path: string, format?: string][];
  /** What it is not, and patterns that are not found in it. */
  excluded: string[];
  unmatched: string[];
}

export function stringsOf({ flats }: Shape): StringShape {
  const shape: StringShape = {
    ...{ min: 0, max: Number.POSITIVE_INFINITY },
    ...{ patterns: [], excluded: [], unmatched: [] },
  };
  for (const { keywords, path } of flats) {
    if (typeof keywords.minLength === "number") shape.min = Math.max(shape.min, keywords.minLength);
    if (typeof keywords.maxLength === "number") shape.max = Math.min(shape.max, keywords.maxLength);
    if (typeof keywords.pattern === "string") {
      const { found, unmatched } = splitLookahead(keywords.pattern);
      for (const pattern of found) shape.patterns.push([pattern, `${path}/pattern`]);
      shape.unmatched.push(...unmatched);
    }
    if (typeof keywords.format === "string" && !isHint(keywords.format)) {
      const at = `${path}/format`;
      shape.patterns.push([formatPattern(keywords.format, at), at, keywords.format]);
    }
    shape.excluded.push(...listOf(keywords[NOT_STRINGS]).map(String));
    shape.unmatched.push(...listOf(keywords[NOT_FOUND]).map(String));
  }
  return shape;
}

export interface ArrayShape {
  min: number;
  /** Infinity = none. */
  max: number;
  /** Elements with schemas of their own. */
  prefix: number;
  /** Whether elements behind the prefix are spoken of; when not, none are written. */
  open: boolean;
  /** Schemas of the element at an index; the same from `prefix` on. */
  items(index: number): Placed[];
  /** So many elements satisfy a schema; Infinity = any number. */
  contains: { schema: Placed; min: number; max: number } | undefined;
  /** Where it is said that no two elements are alike. */
  unique: string | undefined;
}

/** Throws SchemaError. */
export function arraysOf({ flats }: Shape): ArrayShape {
  let min = 0;
  let max = Number.POSITIVE_INFINITY;
  let prefix = 0;
  let unique: string | undefined;
  let contains: ArrayShape["contains"];
  for (const { keywords, path } of flats) {
    if (keywords.contains !== undefined) {
      if (contains !== undefined)
        throw new SchemaError(`${path}/contains`, "contains can be enforced once at a place");
      contains = {
        schema: [keywords.contains, `${path}/contains`],
        min: typeof keywords.minContains === "number" ? keywords.minContains : 1,
        max: typeof keywords.maxContains === "number" ? keywords.maxContains : Number.POSITIVE_INFINITY,
      };
    }
    if (typeof keywords.minItems === "number") min = Math.max(min, keywords.minItems);
    if (typeof keywords.maxItems === "number") max = Math.min(max, keywords.maxItems);
    prefix = Math.max(prefix, listOf(keywords.prefixItems).length);
    if (keywords.uniqueItems === true) unique ??= `${path}/uniqueItems`;
  }
  const items = (index: number): Placed[] =>
    flats.flatMap(({ keywords, path }): Placed[] => {
      const own = listOf(keywords.prefixItems);
      if (index < own.length) return [[own[index], `${path}/prefixItems/${index}`]];
      return keywords.items === undefined ? [] : [[keywords.items, `${path}/items`]];
    });
  const spoken = flats.some(({ keywords }) => keywords.items !== undefined);
  const open = prefix === 0 || spoken || min > prefix || contains !== undefined;
  return { min, max, prefix, open, items, contains, unique };
}

export interface ObjectShape {
  min: number;
  /** Infinity = none. */
  max: number;
  /** Declared or required names, in the order of the schemas. */
  names: string[];
  required: ReadonlySet<string>;
  /** Whether other names are spoken of; when not, none are written. */
  open: boolean;
  patterns: readonly string[];
  /** Names that are not there, and what every name satisfies. */
  absent: ReadonlySet<string>;
  nameSchemas: readonly Placed[];
  /** Schemas of the value under a declared name. */
  schemasOfName(name: string): Placed[];
  /** Schemas of the value under another name, which exactly these patterns are found in. */
  schemasOfOther(matched: ReadonlySet<string>): Placed[];
}

/** Throws SchemaError. */
export function objectsOf({ flats }: Shape): ObjectShape {
  let min = 0;
  let max = Number.POSITIVE_INFINITY;
  const names = new Set<string>();
  const required = new Set<string>();
  const patterns = new Set<string>();
  const absent = new Set<string>();
  const nameSchemas: Placed[] = [];
  let spoken = false;
  for (const { keywords, path } of flats) {
    for (const name of listOf(keywords[ABSENT])) absent.add(String(name));
    if (keywords.propertyNames !== undefined) {
      nameSchemas.push([keywords.propertyNames, `${path}/propertyNames`]);
      spoken = true;
    }
    if (typeof keywords.minProperties === "number") min = Math.max(min, keywords.minProperties);
    if (typeof keywords.maxProperties === "number") max = Math.min(max, keywords.maxProperties);
    for (const name of Object.keys(recordOf(keywords.properties))) names.add(name);
    for (const pattern of Object.keys(recordOf(keywords.patternProperties))) patterns.add(pattern);
    spoken ||= keywords.additionalProperties !== undefined || keywords.patternProperties !== undefined;
  }
  for (const { keywords } of flats)
    for (const name of listOf(keywords.required)) {
      required.add(String(name));
      names.add(String(name));
    }
  const schemasOfName = (name: string): Placed[] =>
    flats.flatMap((flat) => {
      const matched = Object.keys(recordOf(flat.keywords.patternProperties)).filter((pattern) =>
        found(pattern, name, flat),
      );
      return schemasOf(flat, name, new Set(matched));
    });
  const schemasOfOther = (matched: ReadonlySet<string>): Placed[] =>
    flats.flatMap((flat) => schemasOf(flat, undefined, matched));
  const declared = flats.some(({ keywords }) => keywords.properties !== undefined);
  const open = spoken || !declared || min > names.size;
  return {
    min,
    max,
    names: [...names].filter((name) => !absent.has(name) || required.has(name)),
    required,
    open,
    patterns: [...patterns],
    absent,
    nameSchemas,
    schemasOfName,
    schemasOfOther,
  };
}

function schemasOf(
  { keywords, path }: Flat,
  name: string | undefined,
  matched: ReadonlySet<string>,
): Placed[] {
  const own = recordOf(keywords.properties);
  const schemas: Placed[] = [];
  const members = recordOf(keywords[MEMBERS]);
  if (name !== undefined && Object.hasOwn(members, name)) return [[members[name], path]];
  if (name !== undefined && Object.hasOwn(own, name))
    schemas.push([own[name], `${path}/properties/${pointerPart(name)}`]);
  for (const [pattern, schema] of Object.entries(recordOf(keywords.patternProperties)))
    if (matched.has(pattern)) schemas.push([schema, `${path}/patternProperties/${pointerPart(pattern)}`]);
  if (schemas.length === 0 && keywords.additionalProperties !== undefined)
    schemas.push([keywords.additionalProperties, `${path}/additionalProperties`]);
  return schemas;
}

/** Throws SchemaError for what is no pattern. */
function found(pattern: string, name: string, { path }: Flat): boolean {
  try {
    return new RegExp(pattern, "u").test(name);
  } catch {
    throw new SchemaError(`${path}/patternProperties/${pointerPart(pattern)}`, "this is no pattern");
  }
}

/** How deep a proof looks into required properties. */
const PROOF_DEPTH = 3;

/** Whether nothing can satisfy the conjunction, as far as that is easily seen. */
export function surelyEmpty(flats: Conjunction, reader: SchemaReader, depth = PROOF_DEPTH): boolean {
  const shape = shapeOf(flats, reader);
  if (shape.values !== undefined) return shape.values.length === 0;
  return [...shape.types].every((type) => {
    if (type === "integer" || type === "fraction") {
      const { low, high, lowExcluded, highExcluded } = numbersOf(shape);
      if (low === undefined || high === undefined) return false;
      return low > high || (low === high && (lowExcluded === true || highExcluded === true));
    }
    if (type === "string") {
      const { min, max } = stringsOf(shape);
      return min > max;
    }
    if (type === "array") {
      const { min, max } = arraysOf(shape);
      return min > max;
    }
    if (type !== "object" || depth === 0) return false;
    const { required, absent, schemasOfName } = objectsOf(shape);
    return [...required].some(
      (name) =>
        absent.has(name) ||
        reader.alternatives(schemasOfName(name)).every((value) => surelyEmpty(value, reader, depth - 1)),
    );
  });
}
