// Guards: marks in text that clients wrote, so that it never becomes a special token. A *guard* is a private-use character
// that occurs nowhere in the input. Where it stands inside the text of an added token, that text stays ordinary; before
// the text is encoded it is taken out.
import { CaravanError } from "../errors.ts";
import { type AddedTokens, characterLength } from "./added-tokens.ts";

/** Where a guard goes to break every added token in `text`, and every beginning of one at its end, in order.
 * `onlyFirst`: stop at the first (to see whether there is any). */
export function cuts(text: string, tokens: AddedTokens, onlyFirst: boolean): number[] {
  const found: number[] = [];
  for (let at = 0; at < text.length && !(onlyFirst && found.length > 0); at++) {
    if (tokens.matchAt(text, at) !== null) found.push(at + characterLength(text, at));
  }
  // Templates trim: what the text ends with then counts too.
  for (const ending of new Set([text, text.trimEnd()])) {
    for (const at of tokens.partialEndings(ending)) found.push(at + characterLength(text, at));
  }
  return [...new Set(found)].sort((a, b) => a - b);
}

/** `text` with a guard at every cut. */
export function guarded(text: string, tokens: AddedTokens, guard: string): string {
  const found = cuts(text, tokens, false);
  if (found.length === 0) return text;
  const pieces: string[] = [];
  let done = 0;
  for (const cut of found) {
    pieces.push(text.slice(done, cut));
    done = cut;
  }
  pieces.push(text.slice(done));
  return pieces.join(guard);
}

/** `text` with guards around every character but white space, which templates trim: whatever is cut out of it or put
 * together with other text, no character of it can be part of an added token. */
export function guardedEverywhere(text: string, guard: string): string {
  return text.replace(/\S/gu, (character) => guard + character + guard);
}

/**
 * Stand-ins for the characters of added tokens, one for one, so that a text keeps its length and its positions: for
 * templates that cut texts at positions, where guards would be in the way. White space keeps its place: templates trim.
 */
export class StandIns {
  readonly #to = new Map<string, string>();
  readonly #from = new Map<string, string>();

  /** `contents`: the texts of the added tokens. `used`: private-use characters that are taken. Undefined: there are too few. */
  static of(contents: Iterable<string>, used: ReadonlySet<string>): StandIns | undefined {
    const standIns = new StandIns();
    let code = 0xe000;
    for (const content of contents)
      for (const character of content) {
        // Two units stay two: positions count units here and characters there.
        if (character.length > 1 || /\s/u.test(character) || standIns.#to.has(character)) continue;
        while (used.has(String.fromCharCode(code))) code++;
        if (code > 0xf8ff) return undefined;
        const mark = String.fromCharCode(code++);
        standIns.#to.set(character, mark);
        standIns.#from.set(mark, character);
      }
    return standIns;
  }

  put(text: string): string {
    return exchanged(text, this.#to);
  }

  /** `text` with a guard on both sides of every character that has a stand-in, and that instead of it. */
  guarded(text: string, guard: string): string {
    const marks = new Map([...this.#from].map(([mark, character]) => [mark, guard + character + guard]));
    return exchanged(text, marks);
  }
}

/** `text` with characters (of one unit) replaced. */
function exchanged(text: string, by: ReadonlyMap<string, string>): string {
  const pieces: string[] = [];
  let done = 0;
  for (let at = 0; at < text.length; at++) {
    const other = by.get(text.charAt(at));
    if (other === undefined) continue;
    pieces.push(text.slice(done, at), other);
    done = at + 1;
  }
  return done === 0 ? text : pieces.join("") + text.slice(done);
}

const PRIVATE_USE = /\p{Co}/gu;

/** The private-use characters of a text: none of them can be the guard. */
export function privateUse(text: string): readonly string[] {
  return text.match(PRIVATE_USE) ?? [];
}

/** A private-use character that is not in `used`. */
export function unusedCharacter(used: ReadonlySet<string>): string {
  for (let code = 0xe000; code <= 0x10fffd; code++) {
    if (code === 0xf900) code = 0xf0000;
    if ((code & 0xfffe) === 0xfffe) continue;
    const character = String.fromCodePoint(code);
    if (!used.has(character)) return character;
  }
  throw new CaravanError("invalid_argument", "the messages use every private-use character of Unicode", {
    param: "messages",
  });
}
