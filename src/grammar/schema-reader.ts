// What a JSON Schema (draft 2020-12) says, in the form that the grammar is made from: the schemas that hold at one place
// at once, split into alternatives without anyOf, allOf, oneOf and $ref. A keyword is enforced, or an annotation that
// says nothing about validity, or refused with its path; none is passed over.

import { MOST_ALTERNATIVES, MOST_ENUM_VALUES, SchemaError } from "./limits.ts";
import { canonicalJson } from "./schema-accepts.ts";
import { surelyEmpty } from "./shape.ts";

/** A schema's own keywords. */
export interface Flat {
  readonly id: number;
  readonly path: string;
  readonly keywords: Readonly<Record<string, unknown>>;
}

/** Schemas that hold together, by identity; ids ascending. Empty = anything. */
export type Conjunction = readonly Flat[];

/** Say nothing about validity. */
const ANNOTATIONS: ReadonlySet<string> = new Set([
  "$id",
  "$anchor",
  "$comment",
  "$defs",
  "definitions",
  "title",
  "description",
  "default",
  "examples",
  "deprecated",
  "readOnly",
  "writeOnly",
  "contentEncoding",
  "contentMediaType",
  "contentSchema",
]);

const TYPES: ReadonlySet<unknown> = new Set([
  "null",
  "boolean",
  "integer",
  "number",
  "string",
  "array",
  "object",
]);

/** Other dialects may give keywords another meaning, or none. */
const DIALECTS = /^https?:\/\/json-schema\.org\/(draft\/2020-12|draft\/2019-09|draft-07)\/schema#?$/;

type Check = (value: unknown) => boolean;
const isCount: Check = (value) => typeof value === "number" && Number.isInteger(value) && value >= 0;
const isNumber: Check = (value) => typeof value === "number";
const isString: Check = (value) => typeof value === "string";
const isSchema: Check = (value) => typeof value === "boolean" || isRecord(value);
const isSchemas: Check = (value) => Array.isArray(value) && value.length > 0 && value.every(isSchema);
const isSchemaMap: Check = (value) => isRecord(value) && Object.values(value).every(isSchema);
const isStrings: Check = (value) => Array.isArray(value) && value.every(isString);

/** Keywords that are enforced, and what their value must be. */
const ENFORCED: ReadonlyMap<string, [is: Check, what: string]> = new Map<string, [Check, string]>([
  [
    "type",
    [
      (value) =>
        TYPES.has(value) ||
        (Array.isArray(value) && value.length > 0 && value.every((each) => TYPES.has(each))),
      "a type or a list of types",
    ],
  ],
  ["$schema", [(value) => DIALECTS.test(String(value)), "a dialect of JSON Schema from draft 7 to 2020-12"]],
  [
    "enum",
    [
      (value) => Array.isArray(value) && value.length > 0 && value.length <= MOST_ENUM_VALUES,
      `a list of values, ${MOST_ENUM_VALUES} at most`,
    ],
  ],
  ["const", [() => true, "a value"]],
  ["anyOf", [isSchemas, "a list of schemas"]],
  ["allOf", [isSchemas, "a list of schemas"]],
  ["oneOf", [isSchemas, "a list of schemas"]],
  ["$ref", [isString, "a reference"]],
  ["minimum", [isNumber, "a number"]],
  ["maximum", [isNumber, "a number"]],
  ["exclusiveMinimum", [isNumber, "a number"]],
  ["exclusiveMaximum", [isNumber, "a number"]],
  ["multipleOf", [(value) => typeof value === "number" && value > 0, "a number above 0"]],
  ["minLength", [isCount, "a count"]],
  ["maxLength", [isCount, "a count"]],
  ["pattern", [isString, "a pattern"]],
  ["format", [isString, "a format"]],
  ["minItems", [isCount, "a count"]],
  ["maxItems", [isCount, "a count"]],
  ["prefixItems", [isSchemas, "a list of schemas"]],
  ["items", [isSchema, "a schema"]],
  ["uniqueItems", [(value) => typeof value === "boolean", "true or false"]],
  ["properties", [isSchemaMap, "an object of schemas"]],
  ["patternProperties", [isSchemaMap, "an object of schemas"]],
  ["additionalProperties", [isSchema, "a schema"]],
  ["required", [isStrings, "a list of names"]],
  ["minProperties", [isCount, "a count"]],
  ["maxProperties", [isCount, "a count"]],
]);

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A part of a JSON pointer. */
export function pointerPart(name: string | number): string {
  return encodeURI(String(name).replaceAll("~", "~0").replaceAll("/", "~1"));
}

export class SchemaReader {
  readonly #root: unknown;
  readonly #flats = new Map<object, Flat>();
  readonly #anchors = new Map<string, [value: unknown, path: string]>();
  readonly #disjoint = new Set<string>();
  readonly #values = new Map<object, ReadonlySet<string>>();

  /** Throws SchemaError for identifiers that cannot be resolved. */
  constructor(root: unknown) {
    this.#root = root;
    this.#findAnchors(root, "#");
  }

  get root(): unknown {
    return this.#root;
  }

  /** The ways to satisfy schemas that hold together, each without combining keywords. Throws SchemaError. */
  alternatives(schemas: readonly (readonly [value: unknown, path: string])[]): Conjunction[] {
    let all: Conjunction[] = [[]];
    for (const [value, path] of schemas) all = this.#product(all, this.#flatten(value, path, []), path);
    return all;
  }

  #product(left: readonly Conjunction[], right: readonly Conjunction[], path: string): Conjunction[] {
    if (left.length * right.length > MOST_ALTERNATIVES)
      throw new SchemaError(path, `anyOf and oneOf make more than ${MOST_ALTERNATIVES} alternatives here`);
    const seen = new Map<string, Conjunction>();
    for (const a of left)
      for (const b of right) {
        const joined = [...new Set([...a, ...b])].sort((x, y) => x.id - y.id);
        seen.set(joined.map(({ id }) => id).join(), joined);
      }
    return [...seen.values()];
  }

  /** `trail`: the schemas whose references led here without a value in between. */
  #flatten(schema: unknown, path: string, trail: readonly object[]): Conjunction[] {
    if (schema === true) return [[]];
    if (schema === false) return [];
    const flat = this.#flat(schema, path);
    const { keywords } = flat;
    if (trail.includes(keywords)) throw new SchemaError(path, "it refers to itself without an end");
    const inner = [...trail, keywords];
    let all: Conjunction[] = [[flat]];
    if (typeof keywords.$ref === "string") {
      const [target, at] = this.resolve(keywords.$ref, `${path}/$ref`);
      all = this.#product(all, this.#flatten(target, at, inner), path);
    }
    listOf(keywords.allOf).forEach((part, i) => {
      all = this.#product(all, this.#flatten(part, `${path}/allOf/${i}`, inner), path);
    });
    for (const name of ["anyOf", "oneOf"]) {
      if (keywords[name] === undefined) continue;
      const branches = listOf(keywords[name]).map((part, i) =>
        this.#flatten(part, `${path}/${name}/${i}`, inner),
      );
      if (name === "oneOf") this.#checkDisjoint(branches, `${path}/oneOf`);
      all = this.#product(all, branches.flat(), `${path}/${name}`);
    }
    return all;
  }

  /** oneOf is anyOf where no value can satisfy two branches. Throws SchemaError where that is not plain. */
  #checkDisjoint(branches: readonly Conjunction[][], path: string): void {
    if (this.#disjoint.has(path)) return;
    this.#disjoint.add(path);
    branches.forEach((branch, i) => {
      for (const other of branches.slice(i + 1))
        for (const both of this.#product(branch, other, path))
          if (!surelyEmpty(both, this))
            throw new SchemaError(path, "a value might satisfy two of its branches", "Use anyOf.");
    });
  }

  /** The values of a schema's enum, in canonical form. */
  valuesOf(flat: Flat): ReadonlySet<string> {
    let values = this.#values.get(flat.keywords);
    if (values === undefined) {
      values = new Set(listOf(flat.keywords.enum).map(canonicalJson));
      this.#values.set(flat.keywords, values);
    }
    return values;
  }

  /** The schema's record, its keywords checked once. */
  #flat(schema: unknown, path: string): Flat {
    if (!isRecord(schema)) throw new SchemaError(path, "a schema is an object, true or false");
    const before = this.#flats.get(schema);
    if (before !== undefined) return before;
    for (const [name, value] of Object.entries(schema)) {
      if (ANNOTATIONS.has(name) || name.startsWith("x-")) continue;
      const rule = ENFORCED.get(name);
      const at = `${path}/${pointerPart(name)}`;
      if (rule === undefined)
        throw new SchemaError(at, `the keyword ${JSON.stringify(name.slice(0, 64))} cannot be enforced`);
      if (!rule[0](value)) throw new SchemaError(at, `this must be ${rule[1]}`);
    }
    const flat = { id: this.#flats.size + 1, path, keywords: schema };
    this.#flats.set(schema, flat);
    return flat;
  }

  /** Throws SchemaError where a reference leads nowhere or out of the schema. */
  resolve(reference: string, path: string): [value: unknown, path: string] {
    if (!reference.startsWith("#"))
      throw new SchemaError(path, "only references into the same schema (#/…) can be followed");
    let text: string;
    try {
      text = decodeURIComponent(reference.slice(1));
    } catch {
      throw new SchemaError(path, "it is no reference");
    }
    const missing = new SchemaError(path, `nothing is at ${JSON.stringify(reference.slice(0, 200))}`);
    if (text !== "" && !text.startsWith("/")) {
      const anchored = this.#anchors.get(text);
      if (anchored === undefined) throw missing;
      return anchored;
    }
    let value = this.#root;
    for (const part of text.split("/").slice(1)) {
      const name = part.replaceAll("~1", "/").replaceAll("~0", "~");
      if (Array.isArray(value) && /^(0|[1-9]\d*)$/.test(name)) value = value[Number(name)];
      else if (isRecord(value) && Object.hasOwn(value, name)) value = value[name];
      else throw missing;
      // References behind an $id are relative to it.
      if (isRecord(value) && typeof value.$id === "string")
        throw new SchemaError(path, "references to schemas with an $id of their own cannot be followed");
    }
    if (!isSchema(value)) throw missing;
    return [value, reference];
  }

  #findAnchors(value: unknown, path: string): void {
    if (Array.isArray(value))
      for (const [i, part] of value.entries()) this.#findAnchors(part, `${path}/${i}`);
    if (!isRecord(value)) return;
    if (path !== "#" && typeof value.$id === "string" && holdsReference(value))
      throw new SchemaError(`${path}/$id`, "references below an $id cannot be followed");
    if (typeof value.$anchor === "string" && isSchema(value)) {
      // The same name twice says that at least one is no schema keyword: no reference to it is followed then.
      if (this.#anchors.has(value.$anchor))
        throw new SchemaError(`${path}/$anchor`, "this anchor is there twice");
      this.#anchors.set(value.$anchor, [value, path]);
    }
    for (const [name, part] of Object.entries(value))
      if (name !== "enum" && name !== "const" && name !== "default" && name !== "examples")
        this.#findAnchors(part, `${path}/${pointerPart(name)}`);
  }
}

function holdsReference(value: unknown): boolean {
  if (Array.isArray(value)) return value.some(holdsReference);
  if (!isRecord(value)) return false;
  return typeof value.$ref === "string" || Object.values(value).some(holdsReference);
}

export function listOf(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}
