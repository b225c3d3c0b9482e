// Reads TOML that people write, and says where in the file a value stands, so that errors can name the line.

import { parse, TomlError } from "smol-toml";
import { CaravanError, type ErrorCode } from "./errors.ts";

export type TomlTable = Record<string, unknown>;

/** Parses `text`; a syntax error becomes a CaravanError of `code` that names `file`, line and column. */
export function parseToml(file: string, text: string, code: ErrorCode): TomlTable {
  try {
    return parse(text, { unsafeKeyBehaviour: "throw", maxDepth: 16 });
  } catch (cause) {
    if (!(cause instanceof TomlError)) throw cause;
    const reason = (cause.message.split("\n")[0] ?? "").replace(/^Invalid TOML document: /, "");
    throw new CaravanError(code, `line ${cause.line}, column ${cause.column}: ${reason}`, {
      where: file,
      hint: "the file must be TOML: https://toml.io",
      cause,
    });
  }
}

/** Splits a dotted key (`a."b.c".d`) into its parts, without quotes; undefined when it is none. */
function keyParts(text: string): string[] | undefined {
  const parts: string[] = [];
  const pattern = /\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(\.|$)/y;
  while (pattern.lastIndex < text.length) {
    const match = pattern.exec(text);
    if (match === null) return undefined;
    parts.push(match[1] ?? match[2] ?? match[3] ?? "");
    if (match[4] === "") return parts;
  }
  return undefined;
}

/**
 * Line (from 1) on which the key `path` is set, or on which its table begins; for a key that is not there, the line of
 * the nearest table around it. undefined when nothing of it is in the text. Looks at headers and assignments at the
 * start of lines, which is where people write them; a key inside an inline table is found by the table's line.
 */
export function lineOfKey(text: string, path: readonly string[]): number | undefined {
  let table: string[] = [];
  let best: { depth: number; line: number } | undefined;
  const consider = (key: string[], line: number): void => {
    if (key.length > path.length || key.some((part, i) => part !== path[i])) return;
    if (best === undefined || key.length > best.depth) best = { depth: key.length, line };
  };
  for (const [index, raw] of text.split("\n").entries()) {
    const line = raw.trim();
    const header = /^\[\[?([^\]]+)\]\]?\s*(?:#.*)?$/.exec(line)?.[1];
    if (header !== undefined) {
      table = keyParts(header.trim()) ?? [];
      consider(table, index + 1);
      continue;
    }
    const assigned = /^((?:"(?:[^"\\]|\\.)*"|'[^']*'|[^=#"'])+)=/.exec(line)?.[1];
    const key = assigned === undefined ? undefined : keyParts(assigned.trim());
    if (key !== undefined) consider([...table, ...key], index + 1);
  }
  return best?.line;
}
