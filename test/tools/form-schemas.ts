// Sixteen schemas as programs send them, and those whose masks take the most work: for the benches of answers in a form.

const string = { type: "string" };
const object = (properties: Record<string, unknown>, more: object = {}): Record<string, unknown> => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
  ...more,
});

export interface FormSchema {
  name: string;
  schema: Record<string, unknown>;
}

export const FORM_SCHEMAS: readonly FormSchema[] = [
  { name: "any object", schema: { type: "object" } },
  { name: "person", schema: object({ name: string, age: { type: "integer" }, email: string }) },
  { name: "list of strings", schema: object({ items: { type: "array", items: string, maxItems: 20 } }) },
  {
    name: "sentiment",
    schema: object({
      label: { enum: ["positive", "negative", "neutral"] },
      score: { type: "number", minimum: 0, maximum: 1 },
    }),
  },
  { name: "text of 10 to 400", schema: object({ text: { type: "string", minLength: 10, maxLength: 400 } }) },
  {
    name: "event",
    schema: object({
      title: string,
      date: { type: "string", format: "date" },
      time: { type: "string", format: "time" },
      place: object({ city: string, country: { type: "string", pattern: "^[A-Z]{2}$" } }),
    }),
  },
  {
    name: "tree",
    schema: {
      $ref: "#/$defs/node",
      $defs: {
        node: object({ value: string, children: { type: "array", items: { $ref: "#/$defs/node" } } }),
      },
    },
  },
  {
    name: "one of three shapes",
    schema: {
      anyOf: [
        object({ kind: { const: "circle" }, radius: { type: "number" } }),
        object({ kind: { const: "square" }, side: { type: "number" } }),
        object({ kind: { const: "text" }, text: string }),
      ],
    },
  },
  {
    name: "scores by name",
    schema: { type: "object", additionalProperties: { type: "integer", minimum: 0, maximum: 100 } },
  },
  {
    name: "twelve optional members",
    schema: {
      type: "object",
      properties: Object.fromEntries(Array.from({ length: 12 }, (_, i) => [`field_${i}`, string])),
    },
  },
  {
    name: "identifier",
    schema: object({
      id: { type: "string", format: "uuid" },
      version: { type: "string", pattern: "^\\d+\\.\\d+\\.\\d+$" },
    }),
  },
  {
    name: "e-mail",
    schema: object({ email: { type: "string", format: "email" }, url: { type: "string", format: "uri" } }),
  },
  {
    name: "matrix",
    schema: object({
      rows: { type: "array", items: { type: "array", items: { type: "number" }, minItems: 3, maxItems: 3 } },
    }),
  },
  { name: "name of letters", schema: object({ name: { type: "string", pattern: "^[A-Za-z ]{1,80}$" } }) },
  { name: "line of 1 to 200", schema: object({ line: { type: "string", pattern: "^.{1,200}$" } }) },
  {
    name: "words with numbers",
    schema: object({ code: { type: "string", pattern: "^(?:\\p{L}+ \\d{1,3} ){1,30}$" } }),
  },
];
