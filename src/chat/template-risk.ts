// Whether a chat template could put the text of an added token together out of strings none of which has it: by writing the
// beginning of one before a client's text ("<|" ~ name ~ "|>"), or by changing texts (replace, upper). Judged
// from its syntax, once; templates in use mostly cannot.
import type { AddedTokens } from "./added-tokens.ts";

/** Filters and methods that give a text whose characters did not stand beside each other, or other characters. Slices do, too,
 * but guards would change what they cut out. */
const CHANGING = new Set([
  ...["replace", "lower", "upper", "title", "capitalize", "split", "rsplit", "format", "reverse", "join"],
  ...["map", "batch", "list", "escape", "urlencode"],
]);

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null;

/** `program`: the parsed template. */
export function buildsText(program: unknown, tokens: AddedTokens): boolean {
  const seen = new Set<unknown>();
  const visit = (node: unknown): boolean => {
    if (!isObject(node) || seen.has(node)) return false;
    seen.add(node);
    return builds(node, tokens) || Object.values(node).flat().some(visit);
  };
  return visit(program);
}

function builds(node: Record<string, unknown>, tokens: AddedTokens): boolean {
  if (node.type === "StringLiteral")
    return typeof node.value === "string" && tokens.partialEndings(node.value).length > 0;
  if (node.type === "FilterExpression" || node.type === "FilterStatement") return changes(node.filter);
  if (node.type === "CallExpression" && isObject(node.callee) && node.callee.type === "MemberExpression")
    return changes(node.callee.property);
  return false;
}

/** `called`: an identifier, or a call of one. */
function changes(called: unknown): boolean {
  if (!isObject(called)) return false;
  return called.type === "CallExpression" ? changes(called.callee) : CHANGING.has(String(called.value));
}
