// Looks at JSON as it arrives and refuses what would be expensive to build: parsing and checking happen on the thread
// that also serves every stream, and their time and memory follow the number of values, not of bytes. Syntax is left to
// the parser; this only has to count no less than the parser would build.

import { CaravanError } from "../errors.ts";
import {
  BACKSLASH,
  CLOSE_LIST,
  CLOSE_OBJECT,
  COMMA,
  OPEN_LIST,
  OPEN_OBJECT,
  QUOTE,
} from "./json-characters.ts";

export interface JsonLimits {
  /** Values in lists and objects together. */
  maxValues: number;
  maxObjects: number;
  maxDepth: number;
}

/** A second at most to parse and check the worst of them; a prompt of a million token ids still fits. */
export const JSON_LIMITS: JsonLimits = { maxValues: 1_000_000, maxObjects: 100_000, maxDepth: 128 };

export class JsonBounds {
  #inString = false;
  #escaped = false;
  #depth = 0;
  #values = 0;
  #objects = 0;

  constructor(private readonly limits: JsonLimits = JSON_LIMITS) {}

  /** Takes the next bytes. Throws request_too_large. */
  add(bytes: Uint8Array): void {
    const { maxValues, maxObjects, maxDepth } = this.limits;
    let inString = this.#inString;
    let escaped = this.#escaped;
    for (let at = 0; at < bytes.length; at += 1) {
      const byte = bytes[at];
      if (inString) {
        if (escaped) escaped = false;
        else if (byte === BACKSLASH) escaped = true;
        else if (byte === QUOTE) inString = false;
        continue;
      }
      switch (byte) {
        case QUOTE:
          inString = true;
          break;
        case COMMA:
          this.#values += 1;
          break;
        case OPEN_OBJECT:
          this.#objects += 1;
          this.#values += 1;
          this.#depth += 1;
          break;
        case OPEN_LIST:
          this.#values += 1;
          this.#depth += 1;
          break;
        case CLOSE_LIST:
        case CLOSE_OBJECT:
          this.#depth -= 1;
      }
      if (this.#depth > maxDepth) throw tooComplex(`nested more than ${maxDepth} deep`);
    }
    if (this.#values > maxValues) throw tooComplex(`of more than ${maxValues} values`);
    if (this.#objects > maxObjects) throw tooComplex(`of more than ${maxObjects} objects`);
    this.#inString = inString;
    this.#escaped = escaped;
  }
}

function tooComplex(what: string): CaravanError {
  return new CaravanError("request_too_large", `The request's body is JSON ${what}, which is the limit.`, {
    hint: "Send fewer or simpler values; the length of a text has its own, larger limit.",
  });
}
