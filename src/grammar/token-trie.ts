// The vocabulary as a tree of bytes, laid out depth first in shared arrays, so that a walk can skip a whole subtree by
// jumping to where it ends. Built once a model, in the grammar worker; read by any thread.

import { FLAG_ABSENT, FLAG_SPECIAL, type TokenTable } from "../chat/token-table.ts";

/** Node i's subtree is the nodes from i to end[i]; its children begin at i + 1. */
export interface TokenTrie {
  /** The node's byte in the lowest 8 bits; the number of bytes in front of it in the next DEPTH_BITS; HAS_CHILDREN. */
  readonly nodes: Int32Array;
  readonly ends: Int32Array;
  /** A token whose bytes end at the node, or -1. */
  readonly tokens: Int32Array;
  /** [vocab] Another token with the same bytes, or -1; empty where no two tokens are alike. */
  readonly twins: Int32Array;
  /** Largest depth + 1. */
  readonly height: number;
  /** Tokens of the engine's vocabulary. */
  readonly vocab: number;
}

export const DEPTH_BITS = 11;
/** The sign: a node without children is not negative. */
export const HAS_CHILDREN = -(2 ** 31);

/** Longer tokens are left out: no vocabulary has text tokens of this length that it needs. */
const LONGEST_TOKEN = 2 ** (DEPTH_BITS - 1);

/** Special tokens and those from `vocab` on are left out: they never stand for text. */
export function buildTokenTrie({ bytes, offsets, flags }: TokenTable, vocab: number): TokenTrie {
  const start = (id: number): number => offsets[id] ?? 0;
  const length = (id: number): number => (offsets[id + 1] ?? 0) - start(id);
  const ids: number[] = [];
  for (let id = 0; id < Math.min(flags.length, vocab); id++) {
    const usable = ((flags[id] ?? FLAG_ABSENT) & (FLAG_SPECIAL | FLAG_ABSENT)) === 0;
    if (usable && length(id) > 0 && length(id) <= LONGEST_TOKEN) ids.push(id);
  }
  sortByBytes(ids, bytes, offsets);
  const most = ids.reduce((sum, id) => sum + length(id), 0);
  const nodes = {
    bytes: new Uint8Array(most),
    ends: new Int32Array(most),
    depths: new Uint16Array(most),
    tokens: new Int32Array(most).fill(-1),
  };
  const twins = shared(new Int32Array(vocab).fill(-1));
  let alike = false;
  let count = 0;
  let height = 0;
  const path: number[] = [];
  const close = (depth: number): void => {
    while (path.length > depth) nodes.ends[path.pop() ?? 0] = count;
  };
  for (const id of ids) {
    const from = start(id);
    let depth = 0;
    while (depth < path.length && depth < length(id) && nodes.bytes[path[depth] ?? 0] === bytes[from + depth])
      depth++;
    close(depth);
    for (; depth < length(id); depth++) {
      nodes.bytes[count] = bytes[from + depth] ?? 0;
      nodes.depths[count] = depth;
      path.push(count++);
    }
    const node = path.at(-1) ?? 0;
    twins[id] = nodes.tokens[node] ?? -1;
    alike ||= (twins[id] ?? -1) >= 0;
    nodes.tokens[node] = id;
    height = Math.max(height, length(id));
  }
  close(0);
  const packed = new Int32Array(count);
  for (let node = 0; node < count; node++)
    packed[node] =
      (nodes.bytes[node] ?? 0) |
      ((nodes.depths[node] ?? 0) << 8) |
      ((nodes.ends[node] ?? 0) > node + 1 ? HAS_CHILDREN : 0);
  return {
    nodes: shared(packed),
    ends: shared(nodes.ends.subarray(0, count)),
    tokens: shared(nodes.tokens.subarray(0, count)),
    twins: alike ? twins : shared(new Int32Array(0)),
    height,
    vocab,
  };
}

function shared<T extends Uint8Array | Uint16Array | Int32Array>(array: T): T {
  const memory = new SharedArrayBuffer(array.byteLength);
  const copy = new (array.constructor as new (buffer: SharedArrayBuffer) => T)(memory);
  copy.set(array);
  return copy;
}

/** Sorts tokens by their bytes, those that are alike by id. The first bytes as one number settle most comparisons. */
function sortByBytes(ids: number[], bytes: Uint8Array, offsets: Uint32Array): void {
  const heads = new Float64Array(offsets.length);
  for (const id of ids) {
    const from = offsets[id] ?? 0;
    const to = offsets[id + 1] ?? 0;
    let head = 0;
    // One more than the byte, so that a shorter token comes first.
    for (let i = 0; i < HEAD_BYTES; i++) head = head * 257 + (from + i < to ? (bytes[from + i] ?? 0) + 1 : 0);
    heads[id] = head;
  }
  ids.sort((a, b) => {
    const order = (heads[a] as number) - (heads[b] as number);
    return order !== 0 ? order : compareTails(a, b, bytes, offsets);
  });
}

const HEAD_BYTES = 6;

function compareTails(a: number, b: number, bytes: Uint8Array, offsets: Uint32Array): number {
  const startA = offsets[a] ?? 0;
  const startB = offsets[b] ?? 0;
  const lengthA = (offsets[a + 1] ?? 0) - startA;
  const lengthB = (offsets[b + 1] ?? 0) - startB;
  for (let i = HEAD_BYTES; i < Math.min(lengthA, lengthB); i++) {
    const order = (bytes[startA + i] as number) - (bytes[startB + i] as number);
    if (order !== 0) return order;
  }
  return lengthA - lengthB || a - b;
}
