// Text from tokens as they come: whole characters only, and in sum exactly what decoding all ids at once gives.
// Works on the shared token table, so the thread that streams needs no tokenizer.
import { bytesOf, FLAG_BYTE, FLAG_SPECIAL, type TokenTable } from "./token-table.ts";

export interface DetokenizerOptions {
  /** Leave special tokens out of the text (default: they are kept, as decoding keeps them). */
  skipSpecials?: boolean;
  /** Special tokens that are kept all the same, by name. */
  keep?: readonly string[];
  /** The text goes on where another one ended: a space that it begins with belongs to it, also where decoding a whole text
   * would drop it (SentencePiece vocabularies). */
  continues?: boolean;
}

const lossy = new TextDecoder("utf-8", { ignoreBOM: true });
const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

export class Detokenizer {
  readonly #table: TokenTable;
  readonly #skipSpecials: boolean;
  readonly #keep: readonly string[];
  readonly #stripsFirstSpace: boolean;
  /** Bytes that are not text yet: the beginning of a character, or a run of byte-fallback tokens. */
  #held = new Uint8Array(64);
  #heldLength = 0;
  /** The held bytes come from byte-fallback tokens: such a run is valid or not as a whole. */
  #inByteRun = false;
  #atStart = true;

  constructor(table: TokenTable, options: DetokenizerOptions = {}) {
    this.#table = table;
    this.#skipSpecials = options.skipSpecials ?? false;
    this.#keep = options.keep ?? [];
    this.#stripsFirstSpace = table.stripsFirstSpace && options.continues !== true;
  }

  /** Text that this token completes; "" while a character is unfinished. Ids that do not exist give nothing. */
  push(id: number): string {
    const flags = this.#table.flags[id] ?? 0;
    const bytes = bytesOf(this.#table, id);
    if (this.#skipSpecials && (flags & FLAG_SPECIAL) !== 0 && !this.#keep.includes(lossy.decode(bytes)))
      return "";
    if ((flags & FLAG_BYTE) !== 0) {
      const before = this.#inByteRun ? "" : this.#end();
      this.#inByteRun = true;
      this.#hold(bytes);
      return this.#emit(before);
    }
    const before = this.#inByteRun ? this.#end() : "";
    if (bytes.length === 0) return this.#emit(before);
    if (this.#heldLength === 0) {
      const whole = completeLength(bytes, bytes.length);
      const text = lossy.decode(bytes.subarray(0, whole));
      this.#hold(bytes.subarray(whole));
      return this.#emit(before + text);
    }
    this.#hold(bytes);
    const whole = completeLength(this.#held, this.#heldLength);
    const text = lossy.decode(this.#held.subarray(0, whole));
    this.#held.copyWithin(0, whole, this.#heldLength);
    this.#heldLength -= whole;
    return this.#emit(before + text);
  }

  /** What is still held, at the end: an unfinished character becomes U+FFFD. The detokenizer may be used anew after. */
  flush(): string {
    const text = this.#emit(this.#end());
    this.#atStart = true;
    return text;
  }

  #hold(bytes: Uint8Array): void {
    const length = this.#heldLength + bytes.length;
    if (length > this.#held.length) {
      const larger = new Uint8Array(2 * length);
      larger.set(this.#held.subarray(0, this.#heldLength));
      this.#held = larger;
    }
    this.#held.set(bytes, this.#heldLength);
    this.#heldLength = length;
  }

  #end(): string {
    const bytes = this.#held.subarray(0, this.#heldLength);
    const wasRun = this.#inByteRun;
    this.#heldLength = 0;
    this.#inByteRun = false;
    if (bytes.length === 0) return "";
    if (!wasRun) return lossy.decode(bytes);
    try {
      return strict.decode(bytes);
    } catch {
      return "\ufffd".repeat(bytes.length);
    }
  }

  #emit(text: string): string {
    if (!this.#atStart || text === "") return text;
    this.#atStart = false;
    return this.#stripsFirstSpace && text.startsWith(" ") ? text.slice(1) : text;
  }
}

/**
 * Length of `bytes[0 .. length)` without an unfinished character at its end. Only an ending that later bytes could
 * complete is left out; what is invalid already counts as complete (it decodes to U+FFFD whatever follows).
 */
export function completeLength(bytes: Uint8Array, length: number): number {
  for (let back = 1; back <= 3 && back <= length; back++) {
    const lead = bytes[length - back] ?? 0;
    if ((lead & 0xc0) === 0x80) continue; // a continuation byte: its lead is further left
    const width =
      lead >= 0xf0 && lead <= 0xf4
        ? 4
        : lead >= 0xe0 && lead < 0xf0
          ? 3
          : lead >= 0xc2 && lead < 0xe0
            ? 2
            : 1;
    if (width <= back) return length;
    // The second byte of some leads has a narrower range (Unicode, table 3-7): outside of it nothing can complete it.
    if (back >= 2) {
      const second = bytes[length - back + 1] ?? 0;
      const low = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
      const high = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
      if (second < low || second > high) return length;
    }
    return length - back;
  }
  return length;
}
