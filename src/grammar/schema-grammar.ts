// From a JSON Schema to the nodes of a grammar. Every text that the grammar accepts is JSON that satisfies the schema;
// of all such texts it accepts those in a usual form: members in the order of the schema, none that the schema does
// not speak of where it lists any, white space of a line break with its indentation or one blank.

import { type BuildBudget, combine, type Dfa, Nfa } from "./automaton.ts";
import type { GrammarBuilder, Part } from "./grammar.ts";
import { MOST_ENUM_VALUES, MOST_ITEMS, SchemaError, TooLarge } from "./limits.ts";
import { inRange, numberAutomaton } from "./numbers.ts";
import { ObjectWriter, type OtherNames } from "./object-writer.ts";
import { characterRun, checkPattern, PatternError } from "./pattern.ts";
import { accepts, canonicalJson } from "./schema-accepts.ts";
import { type Conjunction, SchemaReader } from "./schema-reader.ts";
import {
  type ArrayShape,
  arraysOf,
  numbersOf,
  type ObjectShape,
  objectsOf,
  type Placed,
  type Shape,
  shapeOf,
  stringsOf,
} from "./shape.ts";
import { otherNames, stringAutomaton, writeQuoted } from "./strings.ts";

/** Elements that contains may count. */
const MOST_CONTAINED = 100;
/** Values of which no two may be alike: in any order, and in the order of the schema. */
const MOST_DIFFERENT = 8;
const MOST_ORDERED = 100;
/** Ways on, for all numbers of elements together. */
const MOST_ORDERED_WAYS = 20_000;
/** Patterns for names: their combinations are told apart. */
const MOST_NAME_PATTERNS = 4;

export class SchemaGrammar {
  readonly #builder: GrammarBuilder;
  readonly #budget: BuildBudget;
  readonly #reader: SchemaReader;
  readonly #rules = new Map<string, number>();
  readonly #opposites = new Map<object, unknown>();
  /** Tells its flats, which have numbers of their own, from those of other schemas in the builder. */
  readonly #serial: number;
  #enumValues = 0;

  constructor(builder: GrammarBuilder, budget: BuildBudget, schema: unknown) {
    this.#builder = builder;
    this.#serial = builder.serial();
    this.#budget = budget;
    this.#reader = new SchemaReader(schema);
  }

  /** The node that begins a value of the schema; it ends by returning. `beside`: a schema that holds too. */
  root(beside?: Record<string, unknown>): number {
    const placed: Placed[] = [[this.#reader.root, "#"]];
    if (beside !== undefined) placed.push([beside, "#"]);
    return this.#rule(placed);
  }

  #rule(schemas: Placed[]): number {
    this.#budget.spend(20);
    const alternatives = this.#reader.alternatives(schemas);
    const key = alternatives.map((flats) => flats.map(({ id }) => id).join()).join("|");
    const name = alternatives.length === 0 ? "none" : key;
    const before = this.#rules.get(name);
    if (before !== undefined) return before;
    const start = this.#builder.node();
    this.#rules.set(name, start);
    const end = this.#builder.node(true);
    const scalars = new Map<string, Part>();
    for (const flats of alternatives) this.#alternative(flats, start, end, scalars);
    this.#builder.term(start, [...scalars.values()], alternatives[0]?.[0]?.path ?? "#");
    return start;
  }

  #alternative(flats: Conjunction, start: number, end: number, scalars: Map<string, Part>): void {
    this.#budget.spend(20);
    const shape = shapeOf(flats, this.#reader);
    const text = (value: string): void => {
      scalars.set(value, { text: value, target: end });
    };
    if (shape.values !== undefined) {
      this.#enumValues += shape.values.length;
      if (this.#enumValues > MOST_ENUM_VALUES)
        throw new SchemaError(shape.path, `there are more than ${MOST_ENUM_VALUES} values in enums`);
      for (const value of shape.values) text(JSON.stringify(value));
      return;
    }
    const { types } = shape;
    if (types.has("null")) text("null");
    if (types.has("boolean")) for (const value of ["true", "false"]) text(value);
    if (types.has("integer") || types.has("fraction")) this.#number(shape, end, scalars);
    if (types.has("string")) this.#string(shape, start, end, scalars);
    if (types.has("array")) this.#array(arraysOf(shape), shape, start, end);
    if (types.has("object")) this.#object(objectsOf(shape), shape, start, end);
  }

  #number(shape: Shape, end: number, scalars: Map<string, Part>): void {
    const range = numbersOf(shape);
    const key = `number ${JSON.stringify(range)}`;
    const automaton = this.#lazy(shape.path, () => numberAutomaton(range, this.#budget));
    scalars.set(key, { key, write: (nfa, from) => insert(nfa, from, automaton()), target: end });
  }

  #string(shape: Shape, start: number, end: number, scalars: Map<string, Part>): void {
    const strings = stringsOf(shape);
    const { min, max, patterns } = strings;
    const plain = strings.excluded.length === 0 && strings.unmatched.length === 0;
    if (patterns.length === 0 && plain) {
      if (min > 2 ** 30) throw new SchemaError(shape.path, "minLength is too large");
      this.#builder.string(start, min, max > 2 ** 30 ? Number.POSITIVE_INFINITY : max, end);
      return;
    }
    for (const [pattern, path] of patterns) this.#checkPattern(pattern, path);
    const run = patterns.length === 1 && plain ? characterRun(patterns[0]?.[0] ?? "") : undefined;
    if (run !== undefined) {
      this.#builder.string(start, Math.max(min, run.least), Math.min(max, run.most), end, run.set);
      return;
    }
    for (const pattern of strings.unmatched) this.#checkPattern(pattern, shape.path);
    const key = `string ${JSON.stringify([strings, String(max)])}`;
    const automaton = this.#lazy(patterns[0]?.[1] ?? shape.path, () =>
      stringAutomaton(strings, this.#budget),
    );
    scalars.set(key, { key, write: (nfa, from) => writeQuoted(nfa, from, automaton()), target: end });
  }

  #checkPattern(pattern: string, path: string): void {
    try {
      checkPattern(pattern);
    } catch (thrown) {
      if (thrown instanceof PatternError || thrown instanceof TooLarge)
        throw new SchemaError(path, `the pattern cannot be enforced: ${thrown.message}`);
      throw thrown;
    }
  }

  /** An automaton that is built when it is needed, once; its failure names the schema. */
  #lazy(path: string, build: () => Dfa | undefined): () => Dfa | undefined {
    let built: { dfa: Dfa | undefined } | undefined;
    return () => {
      try {
        built ??= { dfa: build() };
        return built.dfa;
      } catch (thrown) {
        if (thrown instanceof TooLarge || thrown instanceof PatternError)
          throw new SchemaError(path, thrown.message);
        throw thrown;
      }
    };
  }

  #array(shape: ArrayShape, { path }: Shape, start: number, end: number): void {
    const { min, prefix, contains } = shape;
    if (shape.unique !== undefined && shape.max > 1) {
      this.#set(shape, shape.unique, start, end);
      return;
    }
    /** Elements of what contains asks for that are counted, and whether others must not be such. */
    const counted =
      contains === undefined ? 0 : contains.max === Number.POSITIVE_INFINITY ? contains.min : contains.max;
    const strict = contains !== undefined && contains.max < Number.POSITIVE_INFINITY;
    if (Math.max(counted, contains?.min ?? 0) > MOST_CONTAINED)
      throw new SchemaError(path, `contains cannot count more than ${MOST_CONTAINED} elements`);
    if (Math.max(min, prefix) > MOST_ITEMS)
      throw new SchemaError(path, `more than ${MOST_ITEMS} elements cannot be asked for`);
    const asked = Math.min(shape.max, shape.open ? Number.POSITIVE_INFINITY : prefix);
    const max = asked === Number.POSITIVE_INFINITY ? asked : Math.min(asked, MOST_ITEMS);
    if (min > max) return;
    /** With so many elements and no limit, it does not matter how many there are. */
    const enough = max === Number.POSITIVE_INFINITY ? Math.max(min, prefix) : max;
    const nodes = new Map<string, number>();
    const open: [node: number, count: number, found: number][] = [];
    const behind = (elements: number, found: number): number => {
      const count = Math.min(elements, enough);
      let node = nodes.get(`${count} ${found}`);
      if (node === undefined) {
        node = this.#builder.node();
        nodes.set(`${count} ${found}`, node);
        open.push([node, count, found]);
      }
      return node;
    };
    const ways = (count: number, found: number, first: boolean): Part[] => {
      const parts: Part[] = [];
      const lead = first ? "[" : ",";
      if (count < max) {
        const element = this.#builder.node();
        const items = shape.items(count);
        const other: Placed[] =
          contains === undefined || !strict ? items : [...items, [this.#without(contains.schema), path]];
        this.#builder.call(element, this.#rule(other), behind(count + 1, found));
        if (contains !== undefined && found < counted)
          this.#builder.call(element, this.#rule([...items, contains.schema]), behind(count + 1, found + 1));
        parts.push({ lead, target: element });
      }
      if (count >= min && found >= (contains?.min ?? 0))
        parts.push({ lead: first ? "[" : "", text: "]", target: end });
      return parts;
    };
    this.#builder.term(start, ways(0, 0, true), path);
    for (let next = open.pop(); next !== undefined; next = open.pop())
      this.#builder.term(next[0], ways(next[1], next[2], false), path);
  }

  /** The schema's opposite, the same object each time. */
  #without([schema]: Placed): unknown {
    if (typeof schema !== "object" || schema === null) return { not: schema };
    let opposite = this.#opposites.get(schema);
    if (opposite === undefined) {
      opposite = { not: schema };
      this.#opposites.set(schema, opposite);
    }
    return opposite;
  }

  /** Different elements out of a few values: of more than some, in their order. */
  #set({ min, max, prefix, items, contains }: ArrayShape, path: string, start: number, end: number): void {
    const values = prefix > 0 || contains !== undefined ? undefined : this.#fewValues(items(0));
    if (values === undefined)
      throw new SchemaError(
        path,
        `uniqueItems can be enforced where the elements are of ${MOST_ORDERED} values at most, and with one element`,
      );
    const counts = Math.min(Math.max(min, max < values.length ? max : 0), values.length) + 1;
    if (values.length ** 2 * counts > 2 * MOST_ORDERED_WAYS && values.length > MOST_DIFFERENT)
      throw new SchemaError(path, "so many different elements cannot be counted");
    const anyOrder = values.length <= MOST_DIFFERENT;
    /** How far an array is: the values used as bits, or the next that may come; elements, where they are counted. */
    const nodes = new Map<string, number>();
    const open: [node: number, used: number, count: number][] = [];
    const behind = (used: number, elements: number): number => {
      const count = Math.min(elements, counts);
      const key = `${used} ${count}`;
      let node = nodes.get(key);
      if (node === undefined) {
        node = this.#builder.node();
        nodes.set(key, node);
        open.push([node, used, count]);
      }
      return node;
    };
    const ways = (used: number, count: number, first: boolean): Part[] => {
      const parts: Part[] = [];
      for (const [i, text] of values.entries()) {
        const free = anyOrder ? (used >> i) % 2 === 0 : i >= used;
        if (count < max && free)
          parts.push({
            ...{ lead: first ? "[" : ",", text },
            target: behind(anyOrder ? used | (1 << i) : i + 1, count + 1),
          });
      }
      if (count >= min) parts.push({ lead: first ? "[" : "", text: "]", target: end });
      return parts;
    };
    this.#builder.term(start, ways(0, 0, true), path);
    for (let next = open.pop(); next !== undefined; next = open.pop())
      this.#builder.term(next[0], ways(next[1], next[2], false), path);
  }

  /** The texts of the values that satisfy the schemas, where they are few. */
  #fewValues(schemas: Placed[]): string[] | undefined {
    const texts = new Map<string, string>();
    for (const flats of this.#reader.alternatives(schemas)) {
      const shape = shapeOf(flats, this.#reader);
      const { types } = shape;
      const numbers = shape.values === undefined && types.has("integer") ? fewNumbers(shape) : [];
      const open = [...types].some((type) => type !== "boolean" && type !== "null" && type !== "integer");
      if (numbers === undefined || (shape.values === undefined && open)) return undefined;
      const all = shape.values ?? [
        ...(types.has("boolean") ? [true, false] : []),
        ...(types.has("null") ? [null] : []),
        ...numbers,
      ];
      for (const value of all) texts.set(canonicalJson(value), JSON.stringify(value));
      if (texts.size > MOST_ORDERED) return undefined;
    }
    return [...texts.values()];
  }

  #object(shape: ObjectShape, { path }: Shape, start: number, end: number): void {
    // Of undeclared members only one is sure to count: their names may be the same.
    if (shape.open && shape.min > shape.names.length + 1)
      throw new SchemaError(
        `${path}/minProperties`,
        "more members than the schema names, and one, cannot be enforced",
      );
    const { nameSchemas, absent, required } = shape;
    const allowed = (name: string): boolean =>
      !absent.has(name) && accepts([...nameSchemas], name, this.#reader);
    if (![...required].every(allowed)) return;
    const named = nameSchemas.length === 0 ? shape : { ...shape, names: shape.names.filter(allowed) };
    new ObjectWriter(this.#builder, named, path, {
      rule: (schemas) => this.#rule(schemas),
      others: this.#others(shape, path),
    }).write(start, end);
  }

  /** Strings that satisfy schemas of names. */
  #names(schemas: Placed[]): Dfa | undefined {
    const nfa = new Nfa(this.#budget);
    const start = nfa.state();
    const end = nfa.state();
    for (const flats of this.#reader.alternatives(schemas)) {
      const shape = shapeOf(flats, this.#reader);
      if (shape.values !== undefined) {
        for (const value of shape.values)
          if (typeof value === "string")
            nfa.epsilon(nfa.text(start, JSON.stringify(value).slice(1, -1)), end);
      } else if (shape.types.has("string")) {
        const strings = stringsOf(shape);
        for (const [pattern, at] of strings.patterns) this.#checkPattern(pattern, at);
        const own = nfa.state();
        nfa.epsilon(start, own);
        const automaton = stringAutomaton(strings, this.#budget);
        if (automaton !== undefined) nfa.insert(own, automaton, [end]);
      }
    }
    return nfa.determinise(start, new Map([[end, 0]]));
  }

  /** Names that are not declared, told apart by the patterns that are found in them. */
  #others(shape: ObjectShape, path: string): OtherNames[] {
    if (!shape.open) return [];
    const { names: declared, absent, nameSchemas, patterns, schemasOfOther } = shape;
    const names = [...declared, ...absent];
    const nameAutomaton =
      nameSchemas.length === 0 ? undefined : this.#lazy(path, () => this.#names([...nameSchemas]));
    // Names of other schemas, and of other grammars in the same builder, may have the same path.
    const namesKey =
      nameSchemas.length === 0
        ? []
        : [this.#serial, this.#reader.alternatives(nameSchemas).map((flats) => flats.map(({ id }) => id))];
    if (patterns.length > MOST_NAME_PATTERNS)
      throw new SchemaError(`${path}/patternProperties`, `more than ${MOST_NAME_PATTERNS} patterns together`);
    for (const pattern of patterns) this.#checkPattern(pattern, `${path}/patternProperties`);
    return Array.from({ length: 2 ** patterns.length }, (_, bits) => {
      const matched = patterns.filter((_, i) => (bits >> i) % 2 === 1);
      const unmatched = patterns.filter((pattern) => !matched.includes(pattern));
      const automaton = this.#lazy(path, () => {
        const others = otherNames(names, matched, unmatched, this.#budget);
        if (nameAutomaton === undefined) return others;
        const satisfying = nameAutomaton();
        return others && satisfying && combine(others, satisfying, "both", this.#budget);
      });
      return {
        key: `names ${JSON.stringify([names, matched, unmatched, namesKey])}`,
        automaton,
        schemas: schemasOfOther(new Set(matched)),
      };
    });
  }
}

/** Whole numbers between bounds, where they are few. */
function fewNumbers(shape: Shape): number[] | undefined {
  const range = numbersOf(shape);
  const [low, high] = [Math.ceil(range.low ?? Number.NaN), Math.floor(range.high ?? Number.NaN)];
  if (!(high - low <= MOST_ORDERED)) return undefined;
  return Array.from({ length: Math.max(0, high - low + 1) }, (_, i) => low + i).filter(
    (value) => inRange(value, range) && range.divisors.every((divisor) => value % divisor === 0),
  );
}

function insert(nfa: Nfa, from: number, dfa: Dfa | undefined): number {
  const end = nfa.state();
  if (dfa !== undefined) nfa.insert(from, dfa, [end]);
  return end;
}
