// Finds added tokens (special and other) in a text: leftmost first, then longest, with the whitespace and word rules of
// tokenizer.json. A trie over UTF-16 units; the time is linear in the text for any set of tokens of bounded length.
import type { AddedToken } from "./tokenizer-files.ts";

/** Characters scanned between two pauses. */
const STEP = 1 << 16;

interface Node {
  readonly children: Map<number, Node>;
  token: AddedToken | null;
}

/** A stretch of ordinary text (id null) or one added token. Positions are UTF-16 units of the text. */
export interface Section {
  readonly start: number;
  readonly end: number;
  readonly token: AddedToken | null;
}

// As in the reference library: word characters of a regular expression, Unicode's White_Space.
const WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}]/u;
const SPACE = /\p{White_Space}/u;

export class AddedTokens {
  readonly #root: Node = { children: new Map(), token: null };
  readonly #empty: boolean;
  #longest = 0;

  constructor(tokens: readonly AddedToken[]) {
    this.#empty = tokens.length === 0;
    for (const token of tokens) {
      this.#longest = Math.max(this.#longest, token.content.length);
      let node = this.#root;
      for (let i = 0; i < token.content.length; i++) {
        const unit = token.content.charCodeAt(i);
        let child = node.children.get(unit);
        if (child === undefined) {
          child = { children: new Map(), token: null };
          node.children.set(unit, child);
        }
        node = child;
      }
      node.token = token;
    }
  }

  /** Longest added token that begins exactly at `at`, or null. */
  matchAt(text: string, at: number): AddedToken | null {
    let node = this.#root.children.get(text.charCodeAt(at));
    let found: AddedToken | null = null;
    for (let i = at + 1; node !== undefined; i++) {
      if (node.token !== null) found = node.token;
      if (i >= text.length) break;
      node = node.children.get(text.charCodeAt(i));
    }
    return found;
  }

  /** Starts of all endings of `text` that are the beginning, but not all, of an added token. */
  partialEndings(text: string): number[] {
    const starts: number[] = [];
    for (let at = Math.max(0, text.length - this.#longest); at < text.length; at++) {
      let node: Node | undefined = this.#root;
      for (let i = at; i < text.length && node !== undefined; i++)
        node = node.children.get(text.charCodeAt(i));
      if (node !== undefined && node.children.size > 0) starts.push(at);
    }
    return starts;
  }

  /**
   * Sections of `text` in order, none empty. `undefined` is a pause.
   * @param guard "" or a mark that keeps text ordinary (see template.ts): inside a token's text it breaks the match as
   *   any other character does; a token of one character cannot be broken, so there the mark follows it.
   */
  *sections(text: string, guard: string): Generator<Section | undefined> {
    let done = 0;
    if (!this.#empty) {
      for (let at = 0; at < text.length; at++) {
        if (at % STEP === STEP - 1) yield undefined;
        if (!this.#root.children.has(text.charCodeAt(at))) continue;
        const token = this.matchAt(text, at);
        if (token === null) continue;
        const tokenEnd = at + token.content.length;
        const single = token.content.length === characterLength(token.content, 0);
        if (guard !== "" && single && text.startsWith(guard, tokenEnd)) continue;
        if (token.single_word && (isWordBefore(text, at) || isWordAfter(text, tokenEnd))) {
          at = tokenEnd - 1;
          continue;
        }
        let start = at;
        let end = tokenEnd;
        while (token.lstrip && start > done && SPACE.test(text.charAt(start - 1))) start--;
        while (token.rstrip && end < text.length && SPACE.test(text.charAt(end))) end++;
        if (start > done) yield { start: done, end: start, token: null };
        yield { start, end, token };
        done = end;
        at = end - 1;
      }
    }
    if (done < text.length) yield { start: done, end: text.length, token: null };
  }
}

/** UTF-16 units of the character that begins at `at`. */
export function characterLength(text: string, at: number): number {
  return (text.codePointAt(at) ?? 0) > 0xffff ? 2 : 1;
}

function isWordBefore(text: string, at: number): boolean {
  return at > 0 && WORD.test(String.fromCodePoint(text.codePointAt(at - 1) ?? 0));
}

function isWordAfter(text: string, at: number): boolean {
  return at < text.length && WORD.test(String.fromCodePoint(text.codePointAt(at) ?? 0));
}
