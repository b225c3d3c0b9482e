// A valibot schema as JSON Schema (the dialect of OpenAPI 3.1). Covers what the API's schemas are made of; a kind that is
// not known becomes the schema that allows everything, which says less than is checked but nothing false.

import type * as v from "valibot";

export type JsonSchema = { [key: string]: unknown };

/** What is looked at of a schema or of a step of its pipe; valibot's own types have one type a kind. */
interface Part {
  kind: string;
  type: string;
  pipe?: readonly Part[];
  wrapped?: Part;
  item?: Part;
  items?: readonly Part[];
  entries?: Record<string, Part>;
  key?: Part;
  value?: Part;
  options?: readonly unknown[];
  literal?: unknown;
  requirement?: unknown;
}

export function jsonSchemaOf(schema: v.GenericSchema): JsonSchema {
  // Schemas are plain objects whose fields depend on their type: read as such.
  return convert(schema as unknown as Part);
}

/** Whether the property may be left out. */
function isOptional({ type }: Part): boolean {
  return type === "optional" || type === "nullish" || type === "exact_optional";
}

function convert(part: Part): JsonSchema {
  const base = part.pipe?.[0] ?? part;
  const steps = part.pipe?.slice(1) ?? [];
  const schema = ofType(base);
  for (const step of steps) {
    Object.assign(schema, step.kind === "schema" ? convert(step) : ofStep(step, schema));
  }
  return schema;
}

function ofType(part: Part): JsonSchema {
  switch (part.type) {
    case "string":
    case "number":
    case "boolean":
    case "null":
      return { type: part.type };
    case "literal":
      return { const: part.literal };
    case "picklist":
      return { enum: part.options };
    case "optional":
    case "exact_optional":
      return part.wrapped === undefined ? {} : convert(part.wrapped);
    case "nullish":
    case "nullable":
      return orNull(part.wrapped === undefined ? {} : convert(part.wrapped));
    case "array":
      return { type: "array", ...(part.item === undefined ? {} : { items: convert(part.item) }) };
    case "tuple":
    case "strict_tuple": {
      const items = (part.items ?? []).map(convert);
      return { type: "array", prefixItems: items, minItems: items.length, maxItems: items.length };
    }
    case "record":
      return {
        type: "object",
        ...(part.key?.pipe === undefined ? {} : { propertyNames: convert(part.key) }),
        additionalProperties: part.value === undefined ? true : convert(part.value),
      };
    case "object":
    case "loose_object":
    case "strict_object":
      return ofObject(part.entries ?? {}, part.type === "strict_object");
    case "union":
    case "variant":
      return { anyOf: (part.options ?? []).map((option) => convert(option as Part)) };
    default:
      return {};
  }
}

function ofObject(entries: Record<string, Part>, strict: boolean): JsonSchema {
  const required = Object.keys(entries).filter((name) => {
    const entry = entries[name];
    return entry !== undefined && !isOptional(entry);
  });
  return {
    type: "object",
    properties: Object.fromEntries(Object.entries(entries).map(([name, entry]) => [name, convert(entry)])),
    ...(required.length === 0 ? {} : { required }),
    ...(strict ? { additionalProperties: false } : {}),
  };
}

/** The schema, or null. */
export function orNull(schema: JsonSchema): JsonSchema {
  if (Object.keys(schema).length === 0) return schema;
  return { anyOf: [schema, { type: "null" }] };
}

/** What a step of a pipe adds. */
function ofStep({ type, requirement }: Part, schema: JsonSchema): JsonSchema {
  const list = schema.type === "array";
  switch (type) {
    case "min_length":
      return { [list ? "minItems" : "minLength"]: requirement };
    case "max_length":
      return { [list ? "maxItems" : "maxLength"]: requirement };
    case "length":
      return list
        ? { minItems: requirement, maxItems: requirement }
        : { minLength: requirement, maxLength: requirement };
    case "min_value":
      return { minimum: requirement };
    case "max_value":
      return { maximum: requirement };
    case "gt_value":
      return { exclusiveMinimum: requirement };
    case "integer":
      return { type: "integer" };
    case "safe_integer":
      return {
        minimum: Number.MIN_SAFE_INTEGER,
        maximum: Number.MAX_SAFE_INTEGER,
        ...schema,
        type: "integer",
      };
    case "regex":
      return requirement instanceof RegExp ? { pattern: requirement.source } : {};
    case "url":
      return { format: "uri" };
    default:
      return {};
  }
}
