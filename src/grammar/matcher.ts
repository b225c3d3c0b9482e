// Follows one answer through a grammar: which tokens may come next, and what the grammar thinks of one that came. An
// answer may be read in several ways at once; each is a state of an automaton and the stack of values around it.
// Stacks are shared: equal stacks are one object, so equal readings are found by identity.

import { bytesOf, isSpecialId, type TokenTable } from "../chat/token-table.ts";
import { CaravanError } from "../errors.ts";
import { EDGE_CALL, EDGE_DECIDE, EDGE_SIZE, EDGE_STRING } from "./grammar.ts";
import { type Automata, COUNTED_BODY, type InsideTokens } from "./inside-tokens.ts";
import { MOST_READINGS } from "./limits.ts";

/** Bytes followed to make one mask. */
const MOST_MASK_STEPS = 200_000;

/** What follows when a value has ended: the node to go on in, and what follows that. `node` -1: the answer's end. */
class Stack {
  readonly #inner = new Map<number, Stack>();
  readonly #frames = new Map<number, Frame>();

  constructor(
    readonly node: number,
    readonly below: Stack | undefined,
  ) {}

  with(node: number): Stack {
    let inner = this.#inner.get(node);
    if (inner === undefined) {
      inner = new Stack(node, this);
      this.#inner.set(node, inner);
    }
    return inner;
  }

  /** `characters`: those of the string so far, where they are counted. */
  frame(edge: number, characters: number): Frame {
    const key = edge * 2 ** 22 + characters;
    let frame = this.#frames.get(key);
    if (frame === undefined) {
      frame = new Frame(edge, characters, this);
      // Counts are passed once each: an endless string must not fill the memory.
      if (this.#frames.size > 256) this.#frames.clear();
      this.#frames.set(key, frame);
    }
    return frame;
  }
}

/** An automaton at work: the edge that it belongs to, and the stack behind it. */
class Frame {
  readonly readings = new Map<number, Reading>();
  /** Tokens that leave the automaton, by state. */
  readonly leaving = new Map<number, Int32Array>();
  /** The readings behind the automaton, by label. */
  readonly behind = new Map<number, Readings>();

  constructor(
    readonly edge: number,
    readonly characters: number,
    readonly stack: Stack,
  ) {}

  reading(state: number): Reading {
    let reading = this.readings.get(state);
    if (reading === undefined) {
      reading = { state, frame: this };
      this.readings.set(state, reading);
    }
    return reading;
  }
}

interface Reading {
  readonly state: number;
  readonly frame: Frame;
}

class Readings {
  readonly all = new Set<Reading>();
  /** The answer may end here. */
  ends = false;
  /** [256] Bytes that may come next; made when it is asked for. */
  bytes: Uint8Array | undefined;
  /** The readings behind a byte, while one mask is made. */
  next: (Readings | undefined)[] | undefined;

  get alive(): boolean {
    return this.ends || this.all.size > 0;
  }
}

export class GrammarMatcher {
  readonly #automata: Automata;
  readonly #table: TokenTable;
  readonly #mask: Uint32Array;
  /** One reading's share of a mask. */
  #own: Uint32Array | undefined;
  #readings: Readings;
  #steps = 0;
  /** Readings that remember what is behind them. */
  readonly #followed: Readings[] = [];

  constructor(automata: Automata, table: TokenTable) {
    this.#automata = automata;
    this.#table = table;
    this.#mask = new Uint32Array(Math.ceil(automata.trie.vocab / 32));
    this.#readings = new Readings();
    this.#enter(this.#readings, automata.grammar.root, new Stack(-1, undefined));
  }

  /** The answer may end here. */
  get mayEnd(): boolean {
    return this.#readings.ends;
  }

  /** Nothing may follow: the answer is complete. */
  get complete(): boolean {
    return this.#readings.ends && this.#readings.all.size === 0;
  }

  /** Takes a token of the answer. False: the grammar has no place for it, and nothing may be asked any more. */
  accept(token: number): boolean {
    this.#steps = 0;
    this.#readings = this.#behindToken(this.#readings, token);
    return this.#readings.alive;
  }

  #behindToken(readings: Readings, token: number): Readings {
    let behind = readings;
    // A special token stands for no text, whatever its name looks like.
    if (isSpecialId(this.#table, token)) return new Readings();
    for (const byte of bytesOf(this.#table, token)) behind = this.#advance(behind, byte);
    return behind;
  }

  /** As many of the drafted tokens, from the first on, as the grammar has a place for. Nothing is taken. */
  fitting(drafts: readonly number[]): readonly number[] {
    this.#steps = 0;
    let readings = this.#readings;
    for (const [i, draft] of drafts.entries()) {
      readings = this.#behindToken(readings, draft);
      if (!readings.alive) return drafts.slice(0, i);
      if (readings.all.size === 0) return drafts.slice(0, i + 1);
    }
    return drafts;
  }

  /** [drafts + 1][(vocab + 31) / 32] Masks of what may come next and behind each of the drafted tokens, which fit; else as
   * `mask`. */
  masks(ends: Iterable<number>, drafts: readonly number[] = []): Uint32Array {
    if (drafts.length === 0) return this.mask(ends);
    const { length } = this.#mask;
    const all = new Uint32Array(length * (drafts.length + 1));
    const here = this.#readings;
    try {
      all.set(this.mask(ends));
      for (const [i, draft] of drafts.entries()) {
        const own = this.#maskBehind(draft, ends);
        if (own === undefined) {
          all.fill(0xffffffff, (i + 1) * length);
          break;
        }
        all.set(own, (i + 1) * length);
      }
    } finally {
      this.#readings = here;
    }
    return all;
  }

  /** Takes a drafted token and gives the mask behind it; undefined where nothing will be taken of what comes behind: the answer
   * is complete, or cannot be followed there. The model may refuse the draft, so that is no error yet. */
  #maskBehind(draft: number, ends: Iterable<number>): Uint32Array | undefined {
    try {
      this.#steps = 0;
      this.#readings = this.#behindToken(this.#readings, draft);
      return this.complete ? undefined : this.mask(ends);
    } catch {
      return undefined;
    }
  }

  /** [(vocab + 31) / 32] Bit set = the token may come next; `ends` are those that end the answer. Valid until the next
   * call. Throws engine_failed when there is none, or when the answer can be read in too many ways. */
  mask(ends: Iterable<number>): Uint32Array {
    const mask = this.#mask.fill(0);
    this.#steps = 0;
    for (const reading of this.#readings.all) this.#addTokens(mask, reading);
    if (this.#readings.all.size > 1)
      for (const reading of this.#readings.all) if (this.#decides(reading.frame)) this.#decide(mask, reading);
    for (const readings of this.#followed.splice(0)) readings.next = undefined;
    if (this.#readings.ends) for (const token of ends) set(mask, token);
    if (mask.every((word) => word === 0))
      throw new CaravanError(
        "engine_failed",
        "no token of the model's vocabulary can follow what the schema asks for",
      );
    return mask;
  }

  /** Takes away the tokens in the midst of which the reading decides how to read the text, but goes on otherwise. */
  #decide(mask: Uint32Array, reading: Reading): void {
    const { ends, tokens, twins } = this.#automata.trie;
    const { exits } = this.#automata.inside(reading.state);
    if (exits.length === 0) return;
    const own = new Uint32Array(mask.length);
    this.#addTokens(own, reading);
    for (let i = 0; i < exits.length; i += 3) {
      const exit = exits[i] as number;
      for (let node = exit + 1; node < (ends[exit] as number); node++)
        for (let id = tokens[node] as number; id >= 0; id = twins[id] ?? -1)
          if ((((own[id >> 5] as number) >>> (id & 31)) & 1) === 0) clear(mask, id);
    }
  }

  #addTokens(mask: Uint32Array, { state, frame }: Reading): void {
    const inside = this.#automata.inside(state);
    const limits = this.#limitsOf(frame);
    const counted =
      limits !== undefined && !(frame.characters >= limits[0] && frame.characters + inside.most <= limits[1]);
    if (!counted) {
      if (inside.bits === undefined) for (const token of inside.list) set(mask, token);
      else for (let i = 0; i < mask.length; i++) mask[i] = (mask[i] as number) | (inside.bits[i] as number);
      // The same tokens leave from here however many characters there were.
      const home = limits === undefined ? frame : frame.stack.frame(frame.edge, 0);
      let leaving = home.leaving.get(state);
      if (leaving === undefined) {
        leaving = this.#leaving(frame, inside, 0, Number.POSITIVE_INFINITY);
        home.leaving.set(state, leaving);
      }
      for (const token of leaving) set(mask, token);
      return;
    }
    const least = limits[0] - frame.characters;
    const most = limits[1] - frame.characters;
    if (this.#readings.all.size === 1) addCounted(mask, inside, least, most);
    else {
      // What does not fit this reading may fit another.
      this.#own ??= new Uint32Array(mask.length);
      const own = this.#own.fill(0);
      addCounted(own, inside, least, most);
      for (let i = 0; i < mask.length; i++) mask[i] = (mask[i] as number) | (own[i] as number);
    }
    for (const token of this.#leaving(frame, inside, least, most)) set(mask, token);
  }

  /** Least and most characters of a string that has limits. */
  #limitsOf(frame: Frame): readonly [least: number, most: number] | undefined {
    const { edges, targets } = this.#automata.grammar;
    const at = frame.edge * EDGE_SIZE;
    if (edges[at] !== EDGE_STRING) return undefined;
    const limits = edges[at + 2] ?? 0;
    const least = targets[limits] ?? 0;
    const most = targets[limits + 1] ?? -1;
    if (least === 0 && most < 0) return undefined;
    return [least, most < 0 ? Number.POSITIVE_INFINITY : most];
  }

  /** Tokens that leave the automaton behind `least` to `most` characters and go on. */
  #leaving(frame: Frame, { exits }: InsideTokens, least: number, most: number): Int32Array {
    const found: number[] = [];
    for (let i = 0; i < exits.length; i += 3) {
      const characters = exits[i + 2] as number;
      if (characters < least || characters > most) continue;
      this.#follow(exits[i] as number, this.#behind(frame, exits[i + 1] as number), found);
    }
    return Int32Array.from(found);
  }

  #behind(frame: Frame, label: number): Readings {
    let behind = frame.behind.get(label);
    if (behind === undefined) {
      behind = new Readings();
      this.#leave(behind, frame, label);
      frame.behind.set(label, behind);
    }
    return behind;
  }

  /** Tokens below a node of the tree that the readings allow. */
  #follow(node: number, readings: Readings, found: number[]): void {
    const { nodes, ends, tokens, twins } = this.#automata.trie;
    if (readings.all.size === 0) return;
    const allowed = this.#bytes(readings);
    const end = ends[node] as number;
    for (let child = node + 1; child < end; child = ends[child] as number) {
      const packed = nodes[child] as number;
      const byte = packed & 255;
      if (allowed[byte] === 0) continue;
      // Many places in the tree go on alike.
      let next = readings.next?.[byte];
      if (next === undefined) {
        next = this.#advance(readings, byte);
        readings.next ??= [];
        readings.next[byte] = next;
        this.#followed.push(readings);
      }
      if (!next.alive) continue;
      for (let id = tokens[child] as number; id >= 0; id = twins[id] ?? -1) found.push(id);
      if (packed < 0) this.#follow(child, next, found);
    }
  }

  #bytes(readings: Readings): Uint8Array {
    if (readings.bytes !== undefined) return readings.bytes;
    const bytes = new Uint8Array(256);
    for (const { state } of readings.all) this.#automata.addBytes(state, bytes);
    readings.bytes = bytes;
    return bytes;
  }

  /** `decided`: only what is read as a decision counts. */
  #advance(readings: Readings, byte: number, decided = false): Readings {
    const next = new Readings();
    this.#steps += readings.all.size + 1;
    if (this.#steps > MOST_MASK_STEPS) throw tooAmbiguous();
    for (const { state, frame } of readings.all) {
      if (decided && !this.#decides(frame)) continue;
      const to = this.#automata.next(state, byte);
      if (to < 0) continue;
      const label = this.#automata.label(to);
      if (!decided && label >= 0 && readings.all.size > 1 && this.#decides(frame))
        return this.#advance(readings, byte, true);
      const limits = this.#limitsOf(frame);
      let inner = frame;
      if (limits !== undefined) {
        if (label >= 0 && frame.characters < limits[0]) continue;
        if (this.#automata.grammar.counted[state] === COUNTED_BODY && label < 0) {
          if (frame.characters >= limits[1]) continue;
          inner = frame.stack.frame(frame.edge, frame.characters + 1);
        }
      }
      // A state that is only an end has nothing to stay for.
      if (label < 0 || this.#automata.goesOn(to)) next.all.add(inner.reading(to));
      if (label >= 0) this.#leave(next, frame, label);
    }
    if (next.all.size > MOST_READINGS) throw tooAmbiguous();
    return next;
  }

  #decides({ edge }: Frame): boolean {
    return this.#automata.grammar.edges[edge * EDGE_SIZE] === EDGE_DECIDE;
  }

  /** Adds the readings behind an automaton that accepted with `label`. */
  #leave(readings: Readings, { edge, stack }: Frame, label: number): void {
    const { edges, targets } = this.#automata.grammar;
    const at = edge * EDGE_SIZE;
    const place = (edges[at + 2] ?? 0) + (edges[at] === EDGE_STRING ? 2 : label);
    const target = targets[place] ?? 0;
    this.#enter(readings, target, stack);
  }

  /** Adds the readings that begin in a node. */
  #enter(readings: Readings, node: number, stack: Stack): void {
    const { accepts, firstEdge, edges } = this.#automata.grammar;
    for (let edge = firstEdge[node] ?? 0; edge < (firstEdge[node + 1] ?? 0); edge++) {
      const at = edge * EDGE_SIZE;
      const kind = edges[at];
      const one = edges[at + 1] ?? 0;
      const two = edges[at + 2] ?? 0;
      if (kind === EDGE_CALL) this.#enter(readings, one, this.#onlyEnds(two) ? stack : stack.with(two));
      else readings.all.add(stack.frame(edge, 0).reading(one));
    }
    if (accepts[node] !== 1) return;
    if (stack.node < 0) readings.ends = true;
    else if (stack.below !== undefined) this.#enter(readings, stack.node, stack.below);
  }

  /** The node does nothing but return, so the stack need not remember it. */
  #onlyEnds(node: number): boolean {
    const { accepts, firstEdge } = this.#automata.grammar;
    return accepts[node] === 1 && firstEdge[node] === firstEdge[node + 1];
  }
}

/** Tokens inside a string with room for `most` characters that may close behind `least`. */
function addCounted(
  mask: Uint32Array,
  { bits, list, counted, longer, closing, most: all }: InsideTokens,
  least: number,
  most: number,
): void {
  if (bits === undefined) for (const token of list) set(mask, token);
  else for (let i = 0; i < mask.length; i++) mask[i] = (mask[i] as number) | (bits[i] as number);
  for (let i = 0; i < closing.length; i += 2) {
    const characters = closing[i + 1] as number;
    if (characters < least || characters > most) clear(mask, closing[i] as number);
  }
  const tooLong = most < 0 ? counted.length : most > all ? 0 : (longer[most] as number);
  for (let i = 0; i < tooLong; i++) clear(mask, counted[i] as number);
}

function set(mask: Uint32Array, token: number): void {
  mask[token >> 5] = (mask[token >> 5] ?? 0) | (1 << (token & 31));
}

function clear(mask: Uint32Array, token: number): void {
  mask[token >> 5] = (mask[token >> 5] ?? 0) & ~(1 << (token & 31));
}

function tooAmbiguous(): CaravanError {
  return new CaravanError(
    "unsupported_parameter",
    "the answer can be read in too many ways under this schema",
    {
      hint: "Make the branches of anyOf differ early, or have fewer of them.",
    },
  );
}
