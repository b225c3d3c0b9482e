// Where the references of a schema lead: schemas in it may have identifiers ($id) that references below them are relative
// to, and names (anchors) in the part of the schema that an identifier covers. Nothing is ever fetched.

import { SchemaError } from "./limits.ts";
import { isRecord, pointerPart } from "./schema-keywords.ts";

/** The base of a schema without an identifier. */
const NAMELESS = "https://schema.invalid/";

/** Keywords whose value is a schema, a list of schemas, or an object of schemas: identifiers elsewhere are none. */
const ONE: ReadonlySet<string> = new Set([
  ...["items", "contains", "additionalProperties", "propertyNames", "unevaluatedItems", "contentSchema"],
  ...["unevaluatedProperties", "not", "if", "then", "else"],
]);
const LISTED: ReadonlySet<string> = new Set(["allOf", "anyOf", "oneOf", "prefixItems"]);
const NAMED: ReadonlySet<string> = new Set([
  ...["$defs", "definitions", "properties", "patternProperties", "dependentSchemas", "dependencies"],
]);

/** A schema with an identifier, and what belongs to it down to the next ones. */
interface Resource {
  readonly uri: string;
  readonly root: unknown;
  readonly path: string;
  readonly anchors: Map<string, Anchor>;
  /** Another schema has the same identifier. */
  ambiguous: boolean;
}

interface Anchor {
  readonly schema: unknown;
  readonly path: string;
  readonly dynamic: boolean;
  ambiguous: boolean;
}

export type Target = readonly [schema: unknown, path: string];

export class SchemaResources {
  readonly #byUri = new Map<string, Resource>();
  /** The resource that a schema belongs to; those at places that are no schemas of keywords are added when a reference leads there. */
  readonly #owners = new Map<object, Resource>();
  /** In how many resources an anchor is dynamic. */
  readonly #dynamic = new Map<string, number>();
  readonly #root: Resource;

  /** Throws SchemaError for identifiers that are none. */
  constructor(root: unknown) {
    this.#root = this.#resource(root, "#", NAMELESS);
    this.#walk(root, "#", this.#root);
  }

  /** What `$ref` refers to in the schema `owner`. Throws SchemaError where it leads nowhere or out of the schema. */
  resolve(reference: string, path: string, owner: object): Target {
    const [resource, fragment] = this.#place(reference, path, owner);
    return this.#at(resource, fragment, reference, path);
  }

  /** As `resolve`, for `$dynamicRef`, where it is the same as `$ref` and validators agree on that: one that leads to the
   * root's own dynamic anchor, the only one of that name. */
  resolveDynamic(reference: string, path: string, owner: object): Target {
    const [resource, fragment] = this.#place(reference, path, owner);
    const anchor = resource.anchors.get(fragment);
    if (anchor?.dynamic !== true || anchor.schema !== this.#root.root || this.#dynamic.get(fragment) !== 1)
      throw new SchemaError(
        path,
        "$dynamicRef can be enforced where it leads to the $dynamicAnchor of the whole schema, and no other has that name",
        "Use $ref.",
      );
    return this.#at(resource, fragment, reference, path);
  }

  #place(reference: string, path: string, owner: object): [resource: Resource, fragment: string] {
    const base = this.#owners.get(owner) ?? this.#root;
    let url: URL;
    let fragment: string;
    try {
      url = new URL(reference, base.uri);
      fragment = decodeURIComponent(url.hash.slice(1));
    } catch {
      throw new SchemaError(path, "it is no reference");
    }
    url.hash = "";
    const uri = url.href.replace(/#$/, "");
    const resource = uri === base.uri ? base : this.#byUri.get(uri);
    if (resource === undefined)
      throw new SchemaError(
        path,
        "only references into the same schema can be followed: #/…, #name, or an $id in it",
      );
    if (resource.ambiguous) throw new SchemaError(path, "the $id that it leads to is there twice");
    return [resource, fragment];
  }

  #at(resource: Resource, fragment: string, reference: string, path: string): Target {
    const missing = new SchemaError(path, `nothing is at ${JSON.stringify(reference.slice(0, 200))}`);
    if (fragment !== "" && !fragment.startsWith("/")) {
      const anchor = resource.anchors.get(fragment);
      if (anchor === undefined) throw missing;
      if (anchor.ambiguous) throw new SchemaError(path, "the anchor that it leads to is there twice");
      return [anchor.schema, anchor.path];
    }
    let value = resource.root;
    let at = resource.path;
    const parts = fragment.split("/").slice(1);
    for (const [i, part] of parts.entries()) {
      const name = part.replaceAll("~1", "/").replaceAll("~0", "~");
      if (Array.isArray(value) && /^(0|[1-9]\d*)$/.test(name)) value = value[Number(name)];
      else if (isRecord(value) && Object.hasOwn(value, name)) value = value[name];
      else throw missing;
      at += `/${pointerPart(name)}`;
      // What stands below another $id is to be referred to by that.
      const inner = isRecord(value) ? this.#owners.get(value) : undefined;
      if (inner !== undefined && inner !== resource && i < parts.length - 1)
        throw new SchemaError(path, "a reference cannot lead through a schema with an $id of its own");
    }
    if (typeof value !== "boolean" && !isRecord(value)) throw missing;
    if (isRecord(value) && !this.#owners.has(value)) this.#walk(value, at, resource);
    return [value, at];
  }

  #resource(root: unknown, path: string, base: string): Resource {
    const uri = isRecord(root) ? identifier(root, path, base) : undefined;
    const resource: Resource = { uri: uri ?? base, root, path, anchors: new Map(), ambiguous: false };
    const before = this.#byUri.get(resource.uri);
    if (before === undefined) this.#byUri.set(resource.uri, resource);
    else before.ambiguous = true;
    return resource;
  }

  /** Notes the schema and those in it. */
  #walk(schema: unknown, path: string, outer: Resource): void {
    if (!isRecord(schema) || this.#owners.has(schema)) return;
    let resource = outer;
    if (schema !== outer.root && identifier(schema, path, outer.uri) !== undefined)
      resource = this.#resource(schema, path, outer.uri);
    this.#owners.set(schema, resource);
    this.#anchor(schema, path, resource);
    for (const [name, value] of Object.entries(schema)) {
      const at = `${path}/${pointerPart(name)}`;
      if (ONE.has(name)) this.#walk(value, at, resource);
      else if (LISTED.has(name) && Array.isArray(value))
        for (const [i, part] of value.entries()) this.#walk(part, `${at}/${i}`, resource);
      else if (NAMED.has(name) && isRecord(value))
        for (const [key, part] of Object.entries(value))
          this.#walk(part, `${at}/${pointerPart(key)}`, resource);
    }
  }

  #anchor(schema: Readonly<Record<string, unknown>>, path: string, resource: Resource): void {
    for (const keyword of ["$anchor", "$dynamicAnchor"]) {
      const name = schema[keyword];
      if (typeof name !== "string") continue;
      const dynamic = keyword === "$dynamicAnchor";
      const before = resource.anchors.get(name);
      if (before === undefined) resource.anchors.set(name, { schema, path, dynamic, ambiguous: false });
      else if (before.schema !== schema || before.dynamic !== dynamic) before.ambiguous = true;
      if (dynamic) this.#dynamic.set(name, (this.#dynamic.get(name) ?? 0) + 1);
    }
  }
}

/** The absolute identifier that the schema gives itself. One that is only a fragment names nothing in this dialect. */
function identifier(
  schema: Readonly<Record<string, unknown>>,
  path: string,
  base: string,
): string | undefined {
  const { $id } = schema;
  if (typeof $id !== "string" || $id === "" || $id.startsWith("#")) return undefined;
  try {
    const url = new URL($id, base);
    if (url.hash.length > 1) throw new SchemaError(`${path}/$id`, "an $id has no fragment");
    return url.href.replace(/#$/, "");
  } catch (thrown) {
    if (thrown instanceof SchemaError) throw thrown;
    throw new SchemaError(`${path}/$id`, "this is no identifier");
  }
}
