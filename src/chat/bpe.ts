// Byte-pair encoding over token ids. All tables are flat integer arrays (Llama 4: 200,000 tokens and 440,000 merges in
// about 15 MB), a long piece is merged with a heap in O(n log n), and long work is a generator that can be paused:
// a megabyte of one character neither takes quadratic time nor keeps the thread.
//
// The merge rule is that of Hugging Face's tokenizers: among all neighbouring pairs, the one with the lowest rank is
// merged first; of equal ones, the leftmost.
import { CaravanError } from "../errors.ts";
import { type BpeDefinition, MAX_TOKEN_ID } from "./tokenizer-files.ts";

/** Pieces of more symbols than this are merged with a heap; shorter ones by looking at every pair again. */
const SMALL_PIECE = 48;
/** Heap operations between two pauses (about a millisecond). */
const STEP = 4096;
/** Heap keys are rank · 2^26 + position in a double, so a piece has at most 2^26 bytes. */
const MAX_PIECE_BYTES = 1 << 26;
/** Largest hash table load is 1/2. */
const hashSize = (count: number): number => 2 ** Math.ceil(Math.log2(Math.max(16, count * 2)));

const utf8 = new TextEncoder();
const latin = /^[\0-\u{17f}]*$/u;

/** GPT-2's alphabet: each byte as one printable character. Index: byte, value: character code. */
export const BYTE_TO_CHAR: Uint16Array = (() => {
  const codes = new Uint16Array(256);
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    codes[byte] = printable ? byte : next++;
  }
  return codes;
})();
const CHAR_TO_BYTE: Int16Array = (() => {
  const bytes = new Int16Array(0x180).fill(-1);
  BYTE_TO_CHAR.forEach((code, byte) => {
    bytes[code] = byte;
  });
  return bytes;
})();

/** Bytes that a token in GPT-2's alphabet stands for; null if a character is not of that alphabet. */
export function byteLevelBytes(token: string): Uint8Array | null {
  if (!latin.test(token)) return null;
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = CHAR_TO_BYTE[token.charCodeAt(i)] ?? -1;
    if (byte < 0) return null;
    bytes[i] = byte;
  }
  return bytes;
}

/** Bytes → id by open addressing. Keys lie end to end in one array. */
class ByteMap {
  readonly #bytes: Uint8Array;
  readonly #starts: Uint32Array;
  readonly #ends: Uint32Array;
  readonly #ids: Int32Array;
  readonly #slots: Int32Array;
  #count = 0;
  #used = 0;

  constructor(capacity: number, totalBytes: number) {
    this.#bytes = new Uint8Array(totalBytes);
    this.#starts = new Uint32Array(capacity);
    this.#ends = new Uint32Array(capacity);
    this.#ids = new Int32Array(capacity);
    this.#slots = new Int32Array(hashSize(capacity)).fill(-1);
  }

  /** Slot of the key: its own, or the empty one where it would go. */
  #find(key: Uint8Array, start: number, end: number): number {
    let hash = 0x811c9dc5;
    for (let i = start; i < end; i++) hash = Math.imul(hash ^ (key[i] ?? 0), 0x01000193);
    hash ^= hash >>> 15;
    const mask = this.#slots.length - 1;
    for (let slot = hash & mask; ; slot = (slot + 1) & mask) {
      const entry = this.#slots[slot] ?? -1;
      if (entry < 0) return slot;
      const from = this.#starts[entry] ?? 0;
      if ((this.#ends[entry] ?? 0) - from !== end - start) continue;
      let i = start;
      while (i < end && key[i] === this.#bytes[from + i - start]) i++;
      if (i === end) return slot;
    }
  }

  set(key: Uint8Array, id: number): void {
    const slot = this.#find(key, 0, key.length);
    const entry = this.#slots[slot] ?? -1;
    if (entry >= 0) {
      this.#ids[entry] = id;
      return;
    }
    this.#bytes.set(key, this.#used);
    this.#starts[this.#count] = this.#used;
    this.#used += key.length;
    this.#ends[this.#count] = this.#used;
    this.#ids[this.#count] = id;
    this.#slots[slot] = this.#count++;
  }

  /** Id of `key[start .. end)`, or -1. */
  get(key: Uint8Array, start: number, end: number): number {
    const entry = this.#slots[this.#find(key, start, end)] ?? -1;
    return entry < 0 ? -1 : (this.#ids[entry] ?? -1);
  }
}

/** (left id, right id) → rank and merged id. Rank is the place in the file's list. */
class MergeTable {
  readonly #left: Int32Array;
  readonly #right: Int32Array;
  readonly #result: Int32Array;
  readonly #slots: Int32Array;

  constructor(count: number) {
    this.#left = new Int32Array(count);
    this.#right = new Int32Array(count);
    this.#result = new Int32Array(count);
    this.#slots = new Int32Array(hashSize(count)).fill(-1);
  }

  #find(left: number, right: number): number {
    let hash = Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b);
    hash ^= hash >>> 15;
    const mask = this.#slots.length - 1;
    for (let slot = hash & mask; ; slot = (slot + 1) & mask) {
      const rank = this.#slots[slot] ?? -1;
      if (rank < 0 || (this.#left[rank] === left && this.#right[rank] === right)) return slot;
    }
  }

  set(rank: number, left: number, right: number, result: number): void {
    this.#left[rank] = left;
    this.#right[rank] = right;
    this.#result[rank] = result;
    this.#slots[this.#find(left, right)] = rank;
  }

  /** Rank of the pair, or -1. */
  rank(left: number, right: number): number {
    return this.#slots[this.#find(left, right)] ?? -1;
  }

  result(rank: number): number {
    return this.#result[rank] ?? 0;
  }
}

/** Smallest-first heap of doubles, sized once. */
class Heap {
  readonly #keys: Float64Array;
  #size = 0;

  constructor(capacity: number) {
    this.#keys = new Float64Array(capacity);
  }

  get size(): number {
    return this.#size;
  }

  push(key: number): void {
    const keys = this.#keys;
    let at = this.#size++;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      const above = keys[parent] ?? 0;
      if (above <= key) break;
      keys[at] = above;
      at = parent;
    }
    keys[at] = key;
  }

  pop(): number {
    const keys = this.#keys;
    const top = keys[0] ?? 0;
    const key = keys[--this.#size] ?? 0;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= this.#size) break;
      if (child + 1 < this.#size && (keys[child + 1] ?? 0) < (keys[child] ?? 0)) child++;
      const below = keys[child] ?? 0;
      if (below >= key) break;
      keys[at] = below;
      at = child;
    }
    keys[at] = key;
    return top;
  }
}

export class Bpe {
  /** Largest id of the vocabulary + 1. */
  readonly size: number;
  readonly #pieces: ByteMap;
  readonly #merges: MergeTable;
  readonly #byteLevel: boolean;
  readonly #ignoreMerges: boolean;
  readonly #fuseUnknown: boolean;
  readonly #unknownId: number;
  /** [256] Byte level: the byte's own token. Otherwise its `<0xNN>` token, if there is byte fallback. -1: none. */
  readonly #byteIds = new Int32Array(256).fill(-1);
  // Symbols of the piece at work, reused for all short pieces.
  readonly #symbols = new Int32Array(SMALL_PIECE);
  readonly #ranks = new Int32Array(SMALL_PIECE);

  /**
   * @param hidden tokens that text must never become (special ones): they and the merges that make them are left out.
   * Errors: bad_file when vocabulary and merges do not fit together, unsupported_model for BPE variants not read here.
   */
  constructor(definition: BpeDefinition, byteLevel: boolean, hidden: ReadonlySet<string>, where: string) {
    const variant =
      (definition.continuing_subword_prefix ?? "") !== ""
        ? "continuing_subword_prefix"
        : (definition.end_of_word_suffix ?? "") !== ""
          ? "end_of_word_suffix"
          : (definition.dropout ?? 0) !== 0
            ? "dropout"
            : null;
    if (variant !== null) {
      throw new CaravanError("unsupported_model", `BPE with ${variant} is not supported`, { where });
    }
    this.#byteLevel = byteLevel;
    this.#ignoreMerges = definition.ignore_merges ?? false;
    this.#fuseUnknown = definition.fuse_unk ?? false;

    const ids = readVocabulary(definition.vocab, where);
    let size = 0;
    let total = 0;
    for (const [token, id] of ids) {
      size = Math.max(size, id + 1);
      total += byteLevel ? token.length : token.length * 3;
    }
    this.size = size;
    this.#unknownId = definition.unk_token == null ? -1 : (ids.get(definition.unk_token) ?? -1);
    this.#pieces = new ByteMap(ids.size, total);
    for (const [token, id] of ids) {
      if (hidden.has(token)) continue;
      const bytes = byteLevel ? byteLevelBytes(token) : utf8.encode(token);
      if (bytes !== null) this.#pieces.set(bytes, id);
    }
    for (let byte = 0; byte < 256; byte++) {
      const name = byteLevel
        ? String.fromCharCode(BYTE_TO_CHAR[byte] ?? 0)
        : `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
      if (byteLevel || definition.byte_fallback) this.#byteIds[byte] = ids.get(name) ?? -1;
    }
    this.#merges = readMerges(definition.merges, ids, hidden, where);
  }

  /** Appends the ids of a short piece to `out` and returns true; false when it is long: then use `encodeLong`. */
  encodeShort(piece: Uint8Array, length: number, out: number[]): boolean {
    if (length === 0) return true;
    if (this.#ignoreMerges) {
      const whole = this.#pieces.get(piece, 0, length);
      if (whole >= 0) {
        out.push(whole);
        return true;
      }
    }
    if (length > SMALL_PIECE) return false;
    const symbols = this.#symbols;
    const ranks = this.#ranks;
    let count = this.#toSymbols(piece, length, symbols);
    for (let i = 0; i + 1 < count; i++) ranks[i] = this.#merges.rank(symbols[i] ?? 0, symbols[i + 1] ?? 0);
    for (;;) {
      let best = -1;
      let bestRank = 0x7fffffff;
      for (let i = 0; i + 1 < count; i++) {
        const rank = ranks[i] ?? -1;
        if (rank >= 0 && rank < bestRank) {
          bestRank = rank;
          best = i;
        }
      }
      if (best < 0) break;
      symbols[best] = this.#merges.result(bestRank);
      symbols.copyWithin(best + 1, best + 2, count);
      ranks.copyWithin(best + 1, best + 2, count);
      count--;
      if (best > 0) ranks[best - 1] = this.#merges.rank(symbols[best - 1] ?? 0, symbols[best] ?? 0);
      if (best + 1 < count) ranks[best] = this.#merges.rank(symbols[best] ?? 0, symbols[best + 1] ?? 0);
    }
    for (let i = 0; i < count; i++) out.push(symbols[i] ?? 0);
    return true;
  }

  /** Appends the ids of a piece of any length to `out`; pauses after every few thousand operations. */
  *encodeLong(piece: Uint8Array, length: number, out: number[]): Generator<void, void> {
    if (length > MAX_PIECE_BYTES) {
      throw new CaravanError("request_too_large", `a run of text without a break has ${length} bytes`, {
        hint: `At most ${MAX_PIECE_BYTES} are allowed.`,
      });
    }
    const symbols = new Int32Array(length);
    const count = this.#toSymbols(piece, length, symbols);
    const next = new Int32Array(count);
    const previous = new Int32Array(count);
    // Every merge takes one key out and puts at most two in: never more than 2 · count at a time.
    const heap = new Heap(2 * count);
    let work = 0;
    for (let i = 0; i < count; i++) {
      next[i] = i + 1 < count ? i + 1 : -1;
      previous[i] = i - 1;
      if (i + 1 < count) this.#offer(heap, symbols[i] ?? 0, symbols[i + 1] ?? 0, i);
      if (++work % STEP === 0) yield;
    }
    while (heap.size > 0) {
      if (++work % STEP === 0) yield;
      const key = heap.pop();
      const rank = Math.floor(key / MAX_PIECE_BYTES);
      const at = key - rank * MAX_PIECE_BYTES;
      const left = symbols[at] ?? -1;
      const right = next[at] ?? -1;
      // A stale key: one of the two symbols has been merged since.
      if (left < 0 || right < 0 || this.#merges.rank(left, symbols[right] ?? 0) !== rank) continue;
      const merged = this.#merges.result(rank);
      const after = next[right] ?? -1;
      const before = previous[at] ?? -1;
      symbols[at] = merged;
      symbols[right] = -1;
      next[at] = after;
      if (after >= 0) {
        previous[after] = at;
        this.#offer(heap, merged, symbols[after] ?? 0, at);
      }
      if (before >= 0) this.#offer(heap, symbols[before] ?? 0, merged, before);
    }
    for (let at = count > 0 ? 0 : -1; at >= 0; at = next[at] ?? -1) {
      out.push(symbols[at] ?? 0);
      if (++work % STEP === 0) yield;
    }
  }

  #offer(heap: Heap, left: number, right: number, at: number): void {
    const rank = this.#merges.rank(left, right);
    if (rank >= 0) heap.push(rank * MAX_PIECE_BYTES + at);
  }

  /** First symbols of a piece: its bytes, or its characters with byte fallback. Returns their number. */
  #toSymbols(piece: Uint8Array, length: number, symbols: Int32Array): number {
    let count = 0;
    if (this.#byteLevel) {
      for (let i = 0; i < length; i++) {
        const id = this.#byteIds[piece[i] ?? 0] ?? -1;
        if (id >= 0) symbols[count++] = id;
      }
      return count;
    }
    let unknown = false;
    for (let i = 0; i < length; ) {
      const lead = piece[i] ?? 0;
      const width = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
      const id = this.#pieces.get(piece, i, i + width);
      if (id >= 0) {
        symbols[count++] = id;
        unknown = false;
      } else if (this.#hasBytes(piece, i, i + width)) {
        for (let j = i; j < i + width; j++) symbols[count++] = this.#byteIds[piece[j] ?? 0] ?? 0;
        unknown = false;
      } else if (this.#unknownId >= 0) {
        if (!(unknown && this.#fuseUnknown)) symbols[count++] = this.#unknownId;
        unknown = true;
      }
      i += width;
    }
    return count;
  }

  #hasBytes(piece: Uint8Array, start: number, end: number): boolean {
    for (let i = start; i < end; i++) if ((this.#byteIds[piece[i] ?? 0] ?? -1) < 0) return false;
    return true;
  }
}

function readVocabulary(vocab: Record<string, unknown>, where: string): Map<string, number> {
  const ids = new Map<string, number>();
  // Not Object.entries: its pairs would take 30 MB for Llama 4. The object comes from JSON.parse: all keys are its own.
  for (const token in vocab) {
    const id = vocab[token];
    if (typeof id !== "number" || !Number.isInteger(id) || id < 0 || id > MAX_TOKEN_ID) {
      throw new CaravanError("bad_file", `token ${JSON.stringify(token)} has the id ${JSON.stringify(id)}`, {
        where,
      });
    }
    ids.set(token, id);
  }
  if (ids.size === 0) throw new CaravanError("bad_file", "the vocabulary is empty", { where });
  return ids;
}

function readMerges(
  merges: readonly unknown[],
  ids: ReadonlyMap<string, number>,
  hidden: ReadonlySet<string>,
  where: string,
): MergeTable {
  const table = new MergeTable(merges.length);
  for (let rank = 0; rank < merges.length; rank++) {
    const merge = merges[rank];
    const pair: unknown = typeof merge === "string" ? merge.split(" ") : merge;
    const [left, right]: unknown[] = Array.isArray(pair) && pair.length === 2 ? pair : [];
    if (typeof left !== "string" || typeof right !== "string") {
      throw new CaravanError("bad_file", `merge ${rank} is not a pair of tokens`, { where });
    }
    const result = ids.get(left + right);
    const leftId = ids.get(left);
    const rightId = ids.get(right);
    if (leftId === undefined || rightId === undefined || result === undefined) {
      const name = JSON.stringify([left, right]);
      throw new CaravanError(
        "bad_file",
        `merge ${rank} (${name}) names a token that is not in the vocabulary`,
        {
          where,
        },
      );
    }
    if (!hidden.has(left + right)) table.set(rank, leftId, rightId, result);
  }
  return table;
}
