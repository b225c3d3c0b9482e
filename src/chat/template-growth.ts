// How long a text or list becomes that a template is about to make. Some operations of templates multiply: one call of
// replace or tojson can turn kilobytes into gigabytes before anybody sees the result. So their size is worked out from
// what goes in.

/** A value of the interpreter, as far as it is looked at. */
export interface TemplateValue {
  readonly type: string;
  readonly value: unknown;
}

/** Operations whose result is not bounded by what goes in, times a few. */
export const GROWING = new Set(["replace", "join", "tojson", "string", "split", "rsplit"]);

const isValue = (value: unknown): value is TemplateValue =>
  typeof value === "object" && value !== null && "type" in value && "value" in value;

/** Lists, tuples, objects and namespaces. */
export function isComposite({ value }: TemplateValue): boolean {
  return Array.isArray(value) || value instanceof Map;
}

/** What a list or a mapping holds. */
export function elementsOf({ value }: TemplateValue): TemplateValue[] {
  const inner: unknown[] = Array.isArray(value) ? value : value instanceof Map ? [...value.values()] : [];
  return inner.filter(isValue);
}

/**
 * At least the characters of `value` as text, counting what occurs twice twice; stops above `limit`. `each` is added for
 * every element and `indent` for every element and level.
 */
export function textLengthOf(value: TemplateValue, limit: number, each = 2, indent = 0): number {
  let total = 0;
  const visit = (one: unknown, depth: number): void => {
    if (total > limit || !isValue(one)) return;
    const inner = one.value;
    if (typeof inner === "string") total += inner.length + 2;
    else if (Array.isArray(inner)) {
      for (const item of inner) {
        if (total > limit) return;
        total += each + indent * (depth + 1);
        visit(item, depth + 1);
      }
    } else if (inner instanceof Map) {
      for (const [key, item] of inner) {
        if (total > limit) return;
        total += String(key).length + each + 2 + indent * (depth + 1);
        visit(item, depth + 1);
      }
    } else total += 4;
  };
  visit(value, 0);
  return total;
}

/** How often `part` occurs in `text`, none overlapping; an empty part occurs around every character. */
function occurrences(text: string, part: string): number {
  if (part === "") return text.length + 1;
  let count = 0;
  for (let at = text.indexOf(part); at >= 0; at = text.indexOf(part, at + part.length)) count++;
  return count;
}

export interface Growth {
  characters: number;
  elements: number;
}

/** What the operation gives at most, from its operand and those of its arguments that are known by now. */
export function growthOf(
  operation: string,
  operand: TemplateValue,
  args: readonly TemplateValue[],
  limit: number,
): Growth {
  const texts = args.flatMap(({ value }) => (typeof value === "string" ? [value] : []));
  const [first, second] = texts;
  switch (operation) {
    case "replace": {
      if (typeof operand.value !== "string" || first === undefined || second === undefined) break;
      const more = second.length - first.length;
      const grown = more <= 0 ? 0 : occurrences(operand.value, first) * more;
      return { characters: operand.value.length + grown, elements: 0 };
    }
    case "split":
    case "rsplit": {
      if (typeof operand.value !== "string") break;
      const pieces = occurrences(operand.value, first ?? " ") + 1;
      return { characters: 0, elements: pieces };
    }
    case "join": {
      const separator = first?.length ?? 0;
      if (typeof operand.value === "string")
        return { characters: operand.value.length * (1 + separator), elements: 0 };
      return { characters: textLengthOf(operand, limit, separator), elements: 0 };
    }
    case "tojson":
    case "string": {
      const numbers = args.flatMap(({ value }) => (typeof value === "number" ? [value] : []));
      const separators = args.reduce(
        (sum, arg) => sum + (isComposite(arg) ? textLengthOf(arg, limit) : 0),
        0,
      );
      return {
        characters: textLengthOf(operand, limit, 2 + separators, Math.max(0, ...numbers)),
        elements: 0,
      };
    }
  }
  return { characters: 0, elements: 0 };
}
