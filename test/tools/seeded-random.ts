// A small seeded generator, so that a fuzzing failure can be repeated from its seed.

/** Numbers in [0, 1) from a 32-bit seed (mulberry32). */
export function seededRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** A damaged copy: bytes changed, cut, repeated or overwritten with numbers that parsers trip over. */
export function mutate(bytes: Uint8Array, random: () => number): Uint8Array<ArrayBuffer> {
  const pick = (n: number) => Math.floor(random() * n);
  let out = Uint8Array.from(bytes);
  for (let n = 1 + pick(3); n > 0; n--) {
    const at = pick(out.length);
    switch (pick(5)) {
      case 0:
        out[at] = pick(256);
        break;
      case 1:
        out = out.slice(0, at);
        break;
      case 2:
        if (at + 8 <= out.length)
          new DataView(out.buffer).setBigUint64(at, BIG[pick(BIG.length)] ?? 0n, true);
        break;
      case 3:
        out[at] = (out[at] ?? 0) ^ (1 << pick(8));
        break;
      default:
        out = Uint8Array.from([...out.subarray(0, at), ...out.subarray(Math.max(0, at - pick(64)))]);
    }
    if (out.length === 0) return out;
  }
  return out;
}

const BIG = [
  0n,
  1n,
  0xffffffffn,
  0x100000000n,
  0x7fffffffffffffffn,
  0xffffffffffffffffn,
  1n << 53n,
  1n << 40n,
];
