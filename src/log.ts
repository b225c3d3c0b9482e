// The one logger: lines to standard error, as text for people or JSON for machines. Secrets never reach a line:
// values under telling names and the known forms of keys and tokens are masked before anything is written.

import { writeSync } from "node:fs";
import { CaravanError } from "./errors.ts";

export const LOG_LEVELS = ["debug", "info", "warn", "error", "silent"] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];
export const LOG_FORMATS = ["text", "json"] as const;
export type LogFormat = (typeof LOG_FORMATS)[number];
export type LogFields = Readonly<Record<string, unknown>>;

export interface Logger {
  debug(message: string, fields?: LogFields): void;
  info(message: string, fields?: LogFields): void;
  warn(message: string, fields?: LogFields): void;
  error(message: string, fields?: LogFields): void;
  /** A logger whose every line carries these fields too (a request's id, a model's name). */
  child(fields: LogFields): Logger;
}

export interface LoggerOptions {
  /** Least severe level that is written. */
  level?: LogLevel;
  format?: LogFormat;
  /** Takes one line with its newline. Default: standard error. */
  write?: (line: string) => void;
  now?: () => Date;
  /** Texts that are masked wherever they appear: the node's own keys. Shorter than 6 characters they are left, or
   * ordinary words would vanish. */
  secrets?: readonly string[];
}

const MIN_SECRET = 6;
const MASK = "[redacted]";
const MAX_DEPTH = 6;
const MAX_TEXT = 8192;

/** Field names whose text is a secret. Numbers under such names (`tokens: 12`) are not. */
const SECRET_NAME =
  /^(?:.*[_-])?(?:authorization|cookies?|(?:api|private|secret|access|signing)[_-]?keys?|tokens?|secrets?|passwords?|passphrase|credentials?)$/i;

/** Masks keys and tokens inside text: bearer credentials, hub and OpenAI keys, user:password@ in URLs, token=… queries. */
export function redactText(text: string): string {
  return text
    .replace(/\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{4,}/gi, `$1 ${MASK}`)
    .replace(/\b(?:hf_|sk-)[A-Za-z0-9_-]{8,}/g, MASK)
    .replace(/(\w:\/\/)[^\s/@:]*:[^\s/@]+@/g, `$1${MASK}@`)
    .replace(
      /([?&](?:[\w-]*(?:token|signature|api[-_]?key|key-pair-id|policy|credential)[\w-]*)=)[^&\s"']+/gi,
      `$1${MASK}`,
    );
}

/** `value` as plain data that JSON can hold, secrets masked, depth and text length bounded, cycles cut. */
function plain(value: unknown, name: string, depth: number, seen: readonly object[]): unknown {
  if (typeof value === "string") {
    if (SECRET_NAME.test(name) && value !== "") return MASK;
    const text = redactText(value);
    return text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}…` : text;
  }
  if (typeof value === "bigint") return value.toString();
  if (typeof value === "number") return Number.isFinite(value) ? value : String(value);
  if (typeof value === "function" || typeof value === "symbol") return `[${typeof value}]`;
  if (typeof value !== "object" || value === null) return value;
  if (depth >= MAX_DEPTH || seen.includes(value)) return "[…]";
  const inner = [...seen, value];
  if (value instanceof CaravanError) return plain(value.toJSON(), name, depth + 1, inner);
  if (value instanceof Error) return { name: value.name, message: redactText(value.message) };
  if (value instanceof Date) return Number.isNaN(value.getTime()) ? "invalid date" : value.toISOString();
  if (value instanceof Headers || value instanceof Map) {
    return plain(Object.fromEntries(value.entries()), name, depth + 1, inner);
  }
  if (ArrayBuffer.isView(value)) return `[${value.byteLength} bytes]`;
  if (Array.isArray(value)) return value.slice(0, 100).map((item) => plain(item, name, depth + 1, inner));
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [key, plain(item, key, depth + 1, inner)]),
  );
}

/** Escapes what could forge a line or drive a terminal. */
function printable(text: string): string {
  return text.replace(/[\p{Cc}\u2028\u2029]/gu, (c) =>
    c === "\n" ? "\\n" : c === "\t" ? "\\t" : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

function textValue(value: unknown): string {
  if (typeof value === "string")
    return /^[\w./:@+%-]+$/.test(value) ? value : printable(JSON.stringify(value));
  return printable(JSON.stringify(value) ?? "undefined");
}

function standardError(line: string): void {
  const bytes = Buffer.from(line);
  let offset = 0;
  try {
    while (offset < bytes.length) offset += writeSync(2, bytes, offset);
  } catch {
    // A closed or full standard error must not take the program down, and there is nowhere to report it.
  }
}

export function createLogger(options: LoggerOptions = {}): Logger {
  const least = LOG_LEVELS.indexOf(options.level ?? "info");
  const format = options.format ?? "text";
  const secrets = (options.secrets ?? [])
    .filter((secret) => secret.length >= MIN_SECRET)
    // As it is, and as JSON writes it.
    .flatMap((secret) => [secret, JSON.stringify(secret).slice(1, -1)]);
  const writeLine = options.write ?? standardError;
  const write = (text: string) =>
    writeLine(secrets.reduce((masked, secret) => masked.replaceAll(secret, MASK), text));
  const now = options.now ?? (() => new Date());

  const line = (level: LogLevel, message: string, fields: LogFields): string => {
    const time = now().toISOString();
    const safe = plain(fields, "", 0, []) as Record<string, unknown>;
    const text = redactText(message);
    if (format === "json") return `${JSON.stringify({ ...safe, time, level, message: text })}\n`;
    const pairs = Object.entries(safe).filter(([, value]) => value !== undefined);
    const tail = pairs.map(([key, value]) => ` ${printable(key)}=${textValue(value)}`).join("");
    return `${time} ${level.toUpperCase().padEnd(5)} ${printable(text)}${tail}\n`;
  };

  const make = (bound: LogFields): Logger => {
    const at =
      (level: Exclude<LogLevel, "silent">) =>
      (message: string, fields: LogFields = {}): void => {
        if (LOG_LEVELS.indexOf(level) >= least) write(line(level, message, { ...bound, ...fields }));
      };
    return {
      debug: at("debug"),
      info: at("info"),
      warn: at("warn"),
      error: at("error"),
      child: (fields) => make({ ...bound, ...fields }),
    };
  };
  return make({});
}
