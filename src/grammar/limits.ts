// Bounds on what a schema may ask for. Every one has an error of its own that names it; none is silently rounded.

import { CaravanError } from "../errors.ts";

/** Characters of a schema's JSON text. */
export const MOST_SCHEMA_CHARACTERS = 256 * 1024;
/** Nesting of a schema's JSON text. */
export const MOST_SCHEMA_DEPTH = 64;
/** Ways in which anyOf, oneOf and lists of types may be combined at one place. */
export const MOST_ALTERNATIVES = 256;
/** Combinations that are looked at for them. */
export const MOST_PAIRS = 4096;
/** Values of all enums together. */
export const MOST_ENUM_VALUES = 10_000;
/** States of one automaton, of all together, and steps to build them. */
export const MOST_AUTOMATON_STATES = 100_000;
export const MOST_STATES = 300_000;
export const MOST_BUILD_STEPS = 30_000_000;
/** Nodes of the grammar above the automata. */
export const MOST_NODES = 100_000;
/** Elements of an array; a larger maxItems allows this many, a larger minItems is refused. */
export const MOST_ITEMS = 2000;
/** Copies that the quantifiers of a pattern make. */
export const MOST_REPEATS = 2000;
/** Ways in which the text so far can be read at once. */
export const MOST_READINGS = 256;
/** Processor time to compile one grammar. */
export const COMPILE_LIMIT_MS = 2000;
/** After so many times that time a thread that has not ended by itself is ended. */
export const COMPILE_PATIENCE = 5;

/** A schema that is refused: `path` is a JSON pointer into it, as a fragment. */
export class SchemaError extends CaravanError {
  readonly path: string;

  constructor(path: string, message: string, hint?: string) {
    super("unsupported_parameter", `${path}: ${message}`, hint === undefined ? {} : { hint });
    this.path = path;
  }
}

/** What a schema asks for is too much; the place is known further out. */
export class TooLarge extends Error {}
