// Small facts about JSON Schema that its readers share.

/** Whole numbers and others are kept apart. */
export type ValueType = "null" | "boolean" | "integer" | "fraction" | "string" | "array" | "object";
export const ALL_TYPES: readonly ValueType[] = [
  "null",
  "boolean",
  "integer",
  "fraction",
  "string",
  "array",
  "object",
];

export function typesNamed(name: unknown): ValueType[] {
  if (name === "number") return ["integer", "fraction"];
  return ALL_TYPES.filter((type) => type === name && type !== "fraction");
}

/** Say nothing about validity. */
export const ANNOTATIONS: ReadonlySet<string> = new Set([
  "$id",
  "$anchor",
  "$dynamicAnchor",
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

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

export function recordOf(value: unknown): Readonly<Record<string, unknown>> {
  return isRecord(value) ? value : {};
}

export function listOf(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

/** A part of a JSON pointer. */
export function pointerPart(name: string | number): string {
  return encodeURI(String(name).replaceAll("~", "~0").replaceAll("/", "~1"));
}
