// Formats of strings: what the grammar writes for one, and whether a string that is given may be of one. The grammar keeps
// to a usual form of each, so a string outside of it is not therefore of another format.

import { isIPv4, isIPv6 } from "node:net";
import { SchemaError } from "./limits.ts";

const DATE =
  "(?:\\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|1\\d|2[0-8])))";
const TIME = "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,6})?(?:Z|[+-](?:[01]\\d|2[0-3]):[0-5]\\d)";
const BYTE = "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
const LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,20}[A-Za-z0-9])?";
const WORDS = "[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*";
const POINTER = "(?:/(?:[A-Za-z0-9_.-]|~[01])*)*";
const URI = `https?://${LABEL}(?:\\.${LABEL}){0,4}(?::[1-9]\\d{0,3})?(?:/[A-Za-z0-9_.~-]*)*(?:\\?[A-Za-z0-9_.~=&-]*)?`;
const EMAIL = `^[A-Za-z0-9_+-]+(?:\\.[A-Za-z0-9_+-]+)*@(?:${WORDS}\\.)+[A-Za-z]{2,8}$`;
const HOST = `^${LABEL}(?:\\.${LABEL}){0,4}$`;
const BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$";

const matches =
  (pattern: RegExp) =>
  (value: string): boolean =>
    pattern.test(value);

/** In the calendar, leap years too. */
function isDate(value: string): boolean {
  const [, year, month, day] = /^(\d{4})-(\d\d)-(\d\d)$/.exec(value)?.map(Number) ?? [];
  if (year === undefined || month === undefined || day === undefined) return false;
  const leap = (year % 4 === 0 && year % 100 !== 0) || year % 400 === 0;
  const days = [31, leap ? 29 : 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1] ?? 0;
  return day >= 1 && day <= days;
}
/** With the leap second, whenever it is. */
const isTime = matches(
  /^(?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?(?:z|[+-](?:[01]\d|2[0-3]):[0-5]\d)$/i,
);
const isDuration = matches(
  /^P(?!$)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=\d)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)$/,
);
const mayBeEmail = matches(/^.+@.+$/su);
/** Any uuid of a version: its digits are where they always are. */
const versionOf = (version: string): [string, string, (value: string) => boolean] => [
  `uuid${version}`,
  `^[0-9a-f]{8}-[0-9a-f]{4}-${version}[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`,
  matches(new RegExp(`^[0-9a-f]{8}-[0-9a-f]{4}-${version}[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`, "i")),
];
/** An identifier that is told by its characters and length. */
const spelled = (name: string, pattern: string): [string, string, (value: string) => boolean] => [
  name,
  pattern,
  matches(new RegExp(pattern, "i")),
];
/** No control characters and blanks; those of URIs are ASCII. */
const mayBeUri = matches(/^[A-Za-z][A-Za-z0-9+.-]*:[!-~]*$/);
const mayBeIri = matches(/^[A-Za-z][A-Za-z0-9+.-]*:[^\0-\x20\x7f]*$/u);
const mayBeReference = matches(/^[!-~]*$/);
const mayBeText = matches(/^[^\0-\x20\x7f]*$/u);
const mayBeBase64 = (value: string): boolean => /^[A-Za-z0-9+/_-]*=*$/.test(value.replace(/\s/g, ""));

interface Format {
  /** Strings that are surely of the format; not every one that is. */
  readonly sure: string;
  /** False for strings that are surely not of the format, true for all that are. */
  readonly mayBe: (value: string) => boolean;
}

const FORMATS: ReadonlyMap<string, Format> = new Map(
  (
    [
      ["date", `^${DATE}$`, isDate],
      ["time", `^${TIME}$`, isTime],
      [
        "date-time",
        `^${DATE}T${TIME}$`,
        (value) => isDate(value.slice(0, 10)) && /^[Tt ]$/.test(value.charAt(10)) && isTime(value.slice(11)),
      ],
      [
        "duration",
        "^P(?:\\d{1,4}Y(?:\\d{1,2}M(?:\\d{1,2}D)?)?|\\d{1,4}[DW]|T\\d{1,4}(?:H(?:\\d{1,2}M(?:\\d{1,2}S)?)?|M|S))$",
        isDuration,
      ],
      ["email", EMAIL, mayBeEmail],
      ["idn-email", EMAIL, mayBeEmail],
      ["hostname", HOST, matches(/^[A-Za-z0-9.-]+$/)],
      ["idn-hostname", HOST, mayBeText],
      ["ipv4", `^${BYTE}(?:\\.${BYTE}){3}$`, isIPv4],
      ["ipv6", "^(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$", (value) => isIPv6(value) && !value.includes("%")],
      [
        "uuid",
        "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        matches(/^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i),
      ],
      ["uri", `^${URI}$`, mayBeUri],
      ["url", `^${URI}$`, mayBeUri],
      ["iri", `^${URI}$`, mayBeIri],
      ["uri-reference", `^(?:${URI}|(?:/[A-Za-z0-9_.~-]+)+)$`, mayBeReference],
      ["iri-reference", `^(?:${URI}|(?:/[A-Za-z0-9_.~-]+)+)$`, mayBeText],
      ["uri-template", `^${URI}(?:/\\{[a-z]{1,20}\\})*$`, mayBeText],
      ["json-pointer", `^${POINTER}$`, matches(/^(?:\/(?:[^~/]|~[01])*)*$/u)],
      [
        "relative-json-pointer",
        `^(?:0|[1-9]\\d{0,3})(?:#|${POINTER})$`,
        matches(/^\d+(?:[+-]\d+)?(?:#|(?:\/(?:[^~/]|~[01])*)*)$/u),
      ],
      // Patterns of one dialect or another: any string might be one.
      ["regex", "^[A-Za-z0-9 _-]*$", () => true],
      ["byte", BASE64, mayBeBase64],
      ["base64", BASE64, mayBeBase64],
      ["base64url", "^(?:[A-Za-z0-9_-]{4})*$", mayBeBase64],
      ...["1", "3", "4", "5", "6", "7", "8"].map(versionOf),
      ["ipvanyaddress", `^${BYTE}(?:\\.${BYTE}){3}$`, (value) => isIPv4(value) || isIPv6(value)],
      ["cidrv4", `^${BYTE}(?:\\.${BYTE}){3}/(?:3[0-2]|[12]?\\d)$`, mayBeText],
      spelled("e164", "^\\+[1-9]\\d{6,14}$"),
      spelled("nanoid", "^[A-Za-z0-9_-]{21}$"),
      spelled("cuid2", "^[a-z][0-9a-z]{23}$"),
      spelled("ulid", "^[0-7][0-9A-HJKMNP-TV-Z]{25}$"),
      spelled("xid", "^[0-9a-v]{20}$"),
      spelled("ksuid", "^[A-Za-z0-9]{27}$"),
    ] satisfies [string, string, (value: string) => boolean][]
  ).map(([name, sure, mayBe]) => [name, { sure, mayBe }]),
);

/** Formats that say how a string is to be handled, not what it may be. */
const HINTS: ReadonlySet<string> = new Set(["password", "binary", "path", "file-path", "directory-path"]);

/** Formats of numbers (OpenAPI's, and those of generators for typed languages), with least and most. */
const WHOLE: ReadonlyMap<string, readonly [least: number, most: number]> = new Map([
  ...[8, 16, 32, 53].map((bits): [string, [number, number]] => [
    `int${bits}`,
    bits === 53 ? [-(2 ** 53 - 1), 2 ** 53 - 1] : [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1],
  ]),
  ...[8, 16, 32].map((bits): [string, [number, number]] => [`uint${bits}`, [0, 2 ** bits - 1]]),
  ...["int", "int64"].map((name): [string, [number, number]] => [name, [-(2 ** 63), 2 ** 63]]),
  ...["uint", "uint64"].map((name): [string, [number, number]] => [name, [0, 2 ** 64]]),
]);
const BROKEN: ReadonlySet<string> = new Set(["float", "double"]);

/** Whether a number of the format is whole. */
export function isWholeFormat(format: unknown): boolean {
  return WHOLE.has(String(format));
}

/** Bounds of the numbers of a format. */
export function numberBounds(format: unknown): readonly [least?: number, most?: number] {
  const name = String(format);
  return name === "float" ? [-3.4e38, 3.4e38] : (WHOLE.get(name) ?? []);
}

/** Formats that can be enforced. */
export const FORMAT_NAMES: readonly string[] = [...FORMATS.keys()];

/** Whether the format says nothing about validity. */
export function isHint(format: string): boolean {
  return HINTS.has(format);
}

/** A pattern of strings that are surely of the format. `path`: of the keyword. Throws SchemaError for formats that cannot
 * be enforced. */
export function formatPattern(format: string, path: string): string {
  const pattern = FORMATS.get(format)?.sure;
  if (pattern !== undefined) return pattern;
  const [least, most] = WHOLE.get(format) ?? [];
  // Some write such a number as text.
  if (least !== undefined && most !== undefined)
    return `^${least < 0 ? "-?" : ""}(?:0|[1-9]\\d{0,${String(most).length - 2}})$`;
  if (BROKEN.has(format)) return "^-?(?:0|[1-9]\\d{0,8})(?:\\.\\d{1,6})?$";
  throw new SchemaError(path, `the format ${JSON.stringify(format.slice(0, 64))} cannot be enforced`);
}

/** False only where the string is surely not of the format, one of FORMAT_NAMES. */
export function mayBeOfFormat(value: string, format: string): boolean {
  return FORMATS.get(format)?.mayBe(value) ?? true;
}
