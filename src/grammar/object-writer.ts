// Objects as nodes of a grammar: members in the order of the schema, then others, counted where a count is asked for.

import type { Dfa, Nfa } from "./automaton.ts";
import type { GrammarBuilder, Part } from "./grammar.ts";
import type { ObjectShape, Placed } from "./shape.ts";
import { writeQuoted } from "./strings.ts";

/** Names that a schema does not declare, and the schemas of their values. */
export interface OtherNames {
  key: string;
  automaton: () => Dfa | undefined;
  schemas: Placed[];
}

interface ObjectParts {
  rule: (schemas: Placed[]) => number;
  others: OtherNames[];
}

/** How far an object is: the last declared member written, members counted for minProperties and for maxProperties
 * (0 where that bounds nothing), whether undeclared ones are being written. */
interface Progress {
  last: number;
  least: number;
  most: number;
  others: boolean;
}

export class ObjectWriter {
  readonly #nodes = new Map<string, number>();
  readonly #open: [node: number, progress: Progress][] = [];
  readonly #countsMost: boolean;

  constructor(
    readonly builder: GrammarBuilder,
    readonly shape: ObjectShape,
    readonly path: string,
    readonly parts: ObjectParts,
  ) {
    this.#countsMost =
      shape.max < Number.POSITIVE_INFINITY && (parts.others.length > 0 || shape.max < shape.names.length);
  }

  write(start: number, end: number): void {
    if (this.shape.max < this.shape.required.size) return;
    this.builder.term(
      start,
      this.#ways({ last: -1, least: 0, most: 0, others: false }, true, end),
      this.path,
    );
    for (let next = this.#open.pop(); next !== undefined; next = this.#open.pop())
      this.builder.term(next[0], this.#ways(next[1], false, end), this.path);
  }

  #ways(progress: Progress, first: boolean, end: number): Part[] {
    const { names, required, min, max } = this.shape;
    const lead = first ? "{" : ",";
    const parts: Part[] = [];
    const full = this.#countsMost && progress.most >= max;
    let needed = false;
    for (let i = progress.last + 1; i < names.length && !needed; i++) {
      const name = names[i] ?? "";
      needed = required.has(name);
      if (full) continue;
      parts.push({
        lead,
        text: JSON.stringify(name),
        write: colon,
        target: this.#value(this.shape.schemasOfName(name), this.#next(progress, i, false)),
      });
    }
    if (needed) return parts;
    for (const { key, automaton, schemas } of full ? [] : this.parts.others)
      parts.push({
        key,
        lead,
        write: (nfa, from) => colon(nfa, writeQuoted(nfa, from, automaton())),
        target: this.#value(schemas, this.#next(progress, names.length, true)),
      });
    // A name may come twice: undeclared members count once.
    if (progress.least >= min) parts.push({ lead: first ? "{" : "", text: "}", target: end });
    return parts;
  }

  #next(progress: Progress, last: number, others: boolean): Progress {
    const counted = progress.others ? 0 : 1;
    return {
      last,
      least: Math.min(progress.least + counted, this.shape.min),
      most: this.#countsMost ? progress.most + 1 : 0,
      others,
    };
  }

  /** A value, and then the object goes on. */
  #value(schemas: Placed[], progress: Progress): number {
    const before = this.builder.node();
    this.builder.call(before, this.parts.rule(schemas), this.#node(progress));
    return before;
  }

  #node(progress: Progress): number {
    const key = `${progress.last} ${progress.least} ${progress.most} ${progress.others}`;
    let node = this.#nodes.get(key);
    if (node === undefined) {
      node = this.builder.node();
      this.#nodes.set(key, node);
      this.#open.push([node, progress]);
    }
    return node;
  }
}

/** A colon, and a blank behind it or none. */
export function colon(nfa: Nfa, from: number): number {
  const at = nfa.text(from, ":");
  const end = nfa.state();
  nfa.epsilon(at, end);
  nfa.range(at, 0x20, 0x20, end);
  return end;
}
