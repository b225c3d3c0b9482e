// What a JSON Schema (draft 2020-12) says, in the form that the grammar is made from: the schemas that hold at one place
// at once, split into alternatives without anyOf, allOf, oneOf and $ref. A keyword is enforced, or an annotation that
// says nothing about validity, or refused with its path; none is passed over.

import { MOST_ALTERNATIVES, MOST_ENUM_VALUES, MOST_PAIRS, SchemaError } from "./limits.ts";
import { ABSENT, MEMBERS, NOT_FOUND, NOT_STRINGS, negated, TYPES_ONLY } from "./negation.ts";
import { canonicalJson } from "./schema-accepts.ts";
import { ANNOTATIONS, isRecord, listOf, pointerPart, recordOf } from "./schema-keywords.ts";
import { SchemaResources, type Target } from "./schema-resources.ts";
import { surelyEmpty, typesOf } from "./shape.ts";

/** A schema's own keywords. */
export interface Flat {
  readonly id: number;
  readonly path: string;
  readonly keywords: Readonly<Record<string, unknown>>;
  /** It stands below a "not": it has no say in which members and elements are evaluated. */
  readonly silent: boolean;
}

/** How a schema was reached: `trail` are the schemas whose references led here without a value in between. */
interface Way {
  readonly trail: readonly object[];
  readonly silent: boolean;
}

/** Schemas that hold together, by identity; ids ascending. Empty = anything. */
export type Conjunction = readonly Flat[];

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

const isNameLists: Check = (value) => isRecord(value) && Object.values(value).every(isStrings);

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
  ["$dynamicRef", [isString, "a reference"]],
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
  ["propertyNames", [isSchema, "a schema"]],
  ["unevaluatedProperties", [isSchema, "a schema"]],
  ["dependentRequired", [isNameLists, "an object of lists of names"]],
  ["dependentSchemas", [isSchemaMap, "an object of schemas"]],
  [
    "dependencies",
    [
      (value) => isRecord(value) && Object.values(value).every((each) => isSchema(each) || isStrings(each)),
      "an object of schemas and lists of names",
    ],
  ],
  ["contains", [isSchema, "a schema"]],
  ["minContains", [isCount, "a count"]],
  ["maxContains", [isCount, "a count"]],
  ["unevaluatedItems", [isSchema, "a schema"]],
  ["not", [isSchema, "a schema"]],
  ["if", [isSchema, "a schema"]],
  ["then", [isSchema, "a schema"]],
  ["else", [isSchema, "a schema"]],
]);

/** What negation.ts says beside them. */
const INTERNAL: ReadonlySet<string> = new Set([TYPES_ONLY, NOT_STRINGS, NOT_FOUND, ABSENT, MEMBERS]);

export class SchemaReader {
  readonly #root: unknown;
  readonly #flats = new Map<object, Flat>();
  /** The same for schemas that are silent. */
  readonly #silentFlats = new Map<object, Flat>();
  readonly #resources: SchemaResources;
  /** By the keywords that oneOf is among: schemas that are made of others may have one path. */
  readonly #disjoint = new Map<object, boolean>();
  /** Schemas that are made of others, by what they are made of. */
  readonly #derived = new Map<object, Map<string, unknown[]>>();
  readonly #values = new Map<object, ReadonlySet<string>>();

  /** Throws SchemaError for identifiers that cannot be resolved. */
  constructor(root: unknown) {
    this.#root = root;
    this.#resources = new SchemaResources(root);
  }

  get root(): unknown {
    return this.#root;
  }

  /** The ways to satisfy schemas that hold together, each without combining keywords. Throws SchemaError. */
  alternatives(schemas: readonly (readonly [value: unknown, path: string])[]): Conjunction[] {
    let all: Conjunction[] = [[]];
    for (const [value, path] of schemas)
      all = this.#product(all, this.#flatten(value, path, { trail: [], silent: false }), path);
    return all;
  }

  #product(left: readonly Conjunction[], right: readonly Conjunction[], path: string): Conjunction[] {
    if (left.length * right.length > MOST_PAIRS)
      throw new SchemaError(path, `there are more than ${MOST_ALTERNATIVES} alternatives here`);
    const seen = new Map<string, Conjunction>();
    for (const a of left)
      for (const b of right) {
        const joined = [...new Set([...a, ...b])].sort((x, y) => x.id - y.id);
        if (typesOf(joined).size === 0) continue;
        seen.set(joined.map(({ id }) => id).join(), joined);
      }
    if (seen.size > MOST_ALTERNATIVES)
      throw new SchemaError(path, `there are more than ${MOST_ALTERNATIVES} alternatives here`);
    return [...seen.values()];
  }

  #flatten(schema: unknown, path: string, way: Way): Conjunction[] {
    if (schema === true) return [[]];
    if (schema === false) return [];
    const flat = this.#flat(schema, path, way.silent);
    const { keywords } = flat;
    if (way.trail.includes(keywords)) throw new SchemaError(path, "it refers to itself without an end");
    const inner: Way = { trail: [...way.trail, keywords], silent: way.silent };
    let all: Conjunction[] = [[flat]];
    for (const [target, at] of this.#references(keywords, path))
      all = this.#product(all, this.#flatten(target, at, inner), path);
    listOf(keywords.allOf).forEach((part, i) => {
      all = this.#product(all, this.#flatten(part, `${path}/allOf/${i}`, inner), path);
    });
    if (keywords.anyOf !== undefined) {
      const branches = listOf(keywords.anyOf).flatMap((part, i) =>
        this.#flatten(part, `${path}/anyOf/${i}`, inner),
      );
      all = this.#product(all, branches, `${path}/anyOf`);
    }
    if (keywords.oneOf !== undefined)
      all = this.#product(all, this.#exactlyOne(keywords, `${path}/oneOf`, inner), `${path}/oneOf`);
    if (keywords.not !== undefined)
      all = this.#product(all, this.#opposite(keywords, "not", keywords.not, `${path}/not`, inner), path);
    if (keywords.if !== undefined && (keywords.then !== undefined || keywords.else !== undefined))
      all = this.#product(all, this.#condition(keywords, path, inner), path);
    for (const [key, ways] of this.#dependencies(keywords)) {
      const made = this.#derive(keywords, key, () => ways);
      all = this.#product(
        all,
        made.flatMap((way) => this.#flatten(way, `${path}/${key}`, inner)),
        path,
      );
    }
    if (keywords.unevaluatedProperties === undefined && keywords.unevaluatedItems === undefined) return all;
    return all.map((conjunction) => this.#closed(flat, conjunction));
  }

  #references(keywords: Flat["keywords"], path: string): Target[] {
    const { $ref, $dynamicRef } = keywords;
    const targets: Target[] = [];
    if (typeof $ref === "string") targets.push(this.#resources.resolve($ref, `${path}/$ref`, keywords));
    if (typeof $dynamicRef === "string")
      targets.push(this.#resources.resolveDynamic($dynamicRef, `${path}/$dynamicRef`, keywords));
    return targets;
  }

  /** With the rest of members and elements that no schema of the conjunction speaks of. A value that satisfies more of the
   * schemas than these may have more evaluated: such values are left out. */
  #closed({ keywords, path, silent }: Flat, conjunction: Conjunction): Conjunction {
    const { unevaluatedProperties: members, unevaluatedItems: elements } = keywords;
    const spoken = conjunction.filter((flat) => !flat.silent);
    const key = `unevaluated ${spoken.map(({ id }) => id).join()}`;
    const [rest] = this.#derive(keywords, key, () => {
      const every = spoken.map((flat) => flat.keywords);
      const all = (name: string): Record<string, true> =>
        Object.fromEntries(
          every.flatMap((each) => Object.keys(recordOf(each[name]))).map((each) => [each, true]),
        );
      const prefix = Math.max(0, ...every.map((each) => listOf(each.prefixItems).length));
      const open = (name: string): boolean => every.some((each) => each[name] !== undefined);
      return [
        {
          ...(members === undefined || open("additionalProperties")
            ? {}
            : {
                ...{ properties: all("properties"), patternProperties: all("patternProperties") },
                additionalProperties: members,
              }),
          ...(elements === undefined || open("items")
            ? {}
            : {
                ...(prefix === 0 ? {} : { prefixItems: Array.from({ length: prefix }, () => true) }),
                items: elements,
              }),
        },
      ];
    });
    return [...conjunction, this.#flat(rest, path, silent)].sort((a, b) => a.id - b.id);
  }

  /** Schemas made of a schema's keywords: the same objects each time, since schemas are told apart by identity. */
  #derive(keywords: object, key: string, make: () => unknown[]): unknown[] {
    let made = this.#derived.get(keywords);
    if (made === undefined) {
      made = new Map();
      this.#derived.set(keywords, made);
    }
    let schemas = made.get(key);
    if (schemas === undefined) {
      schemas = make();
      made.set(key, schemas);
    }
    return schemas;
  }

  /** The ways not to satisfy `schema`, which is `owner`'s. */
  #opposite(owner: object, key: string, schema: unknown, path: string, way: Way): Conjunction[] {
    const ways = this.#derive(owner, `not ${key}`, () =>
      negated(schema, path, (part) => this.#references(part, path).map(([target]) => target)),
    );
    return ways.flatMap((each) => this.#flatten(each, path, { ...way, silent: true }));
  }

  #condition(keywords: Flat["keywords"], path: string, way: Way): Conjunction[] {
    const part = (name: "if" | "then" | "else", silent = way.silent): Conjunction[] =>
      keywords[name] === undefined
        ? [[]]
        : this.#flatten(keywords[name], `${path}/${name}`, { ...way, silent });
    const not = this.#opposite(keywords, "if", keywords.if, `${path}/if`, way);
    // Without a "then" that asks for something, validators do not agree on what "if" has evaluated.
    const asks = Object.keys(recordOf(keywords.then)).some((name) => ENFORCED.has(name));
    return [
      ...this.#product(part("if", way.silent || !asks), part("then"), `${path}/then`),
      ...this.#product(not, part("else"), `${path}/else`),
    ];
  }

  /** Either a member is not there, or the others are as well, or its schema holds. */
  *#dependencies(keywords: Flat["keywords"]): Generator<[key: string, ways: unknown[]]> {
    for (const name of ["dependentRequired", "dependentSchemas", "dependencies"])
      for (const [member, what] of Object.entries(recordOf(keywords[name]))) {
        const then = Array.isArray(what)
          ? { type: "object", required: [member, ...what] }
          : { type: "object", required: [member], allOf: [what] };
        yield [`${name}/${pointerPart(member)}`, [{ [ABSENT]: [member] }, then]];
      }
  }

  /** oneOf is anyOf where no value can satisfy two branches; else each branch holds without the others. */
  #exactlyOne(keywords: Flat["keywords"], path: string, way: Way): Conjunction[] {
    const parts = listOf(keywords.oneOf);
    const branches = parts.map((part, i) => this.#flatten(part, `${path}/${i}`, way));
    if (this.#areDisjoint(branches, keywords, path)) return branches.flat();
    try {
      return branches.flatMap((branch, i) =>
        parts.reduce<Conjunction[]>((left, part, j) => {
          if (i === j) return left;
          const others = this.#opposite(keywords, `oneOf/${j}`, part, `${path}/${j}`, way);
          return this.#product(left, others, path).filter((each) => !surelyEmpty(each, this));
        }, branch),
      );
    } catch (thrown) {
      if (!(thrown instanceof SchemaError)) throw thrown;
      throw new SchemaError(
        path,
        `a value might satisfy two of its branches, and ${thrown.message.slice(thrown.path.length + 2)}`,
        "Use anyOf.",
      );
    }
  }

  #areDisjoint(branches: readonly Conjunction[][], owner: object, path: string): boolean {
    let disjoint = this.#disjoint.get(owner);
    disjoint ??= branches.every((branch, i) =>
      branches
        .slice(i + 1)
        .every((other) => this.#product(branch, other, path).every((both) => surelyEmpty(both, this))),
    );
    this.#disjoint.set(owner, disjoint);
    return disjoint;
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
  #flat(schema: unknown, path: string, silent: boolean): Flat {
    if (!isRecord(schema)) throw new SchemaError(path, "a schema is an object, true or false");
    const flats = silent ? this.#silentFlats : this.#flats;
    const before = flats.get(schema);
    if (before !== undefined) return before;
    for (const [name, value] of Object.entries(schema)) {
      if (ANNOTATIONS.has(name) || name.startsWith("x-") || INTERNAL.has(name)) continue;
      const rule = ENFORCED.get(name);
      const at = `${path}/${pointerPart(name)}`;
      if (rule === undefined)
        throw new SchemaError(at, `the keyword ${JSON.stringify(name.slice(0, 64))} cannot be enforced`);
      if (!rule[0](value)) throw new SchemaError(at, `this must be ${rule[1]}`);
    }
    const flat = { id: this.#flats.size + this.#silentFlats.size + 1, path, keywords: schema, silent };
    flats.set(schema, flat);
    return flat;
  }
}
