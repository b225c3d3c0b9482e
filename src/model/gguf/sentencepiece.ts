// SentencePiece BPE (Llama 2) as a tokenizer.json: the merges, which SentencePiece does not store, follow from the
// scores of the pieces, and spaces become the mark U+2581.

import type { Json } from "./config.ts";

/**
 * Every way to put a token together from two others, best score first. Among equals the pair whose left, then
 * right part is longer comes first, as the converters of the published tokenizers order them.
 */
export function spmMerges(tokens: readonly string[], scores: readonly number[]): [string, string][] {
  const ids = new Map(tokens.map((t, i) => [t, i]));
  const found: { left: string; right: string; score: number; leftLength: number; rightLength: number }[] = [];
  tokens.forEach((token, id) => {
    const points = Array.from(token);
    const splits: typeof found = [];
    let left = "";
    for (let n = 1; n < points.length; n++) {
      left += points[n - 1] ?? "";
      const right = token.slice(left.length);
      if (!ids.has(left) || !ids.has(right)) continue;
      splits.push({ left, right, score: scores[id] ?? 0, leftLength: n, rightLength: points.length - n });
    }
    const idOf = (piece: string) => ids.get(piece) ?? 0;
    splits.sort((a, b) => idOf(a.left) - idOf(b.left) || idOf(a.right) - idOf(b.right));
    found.push(...splits);
  });
  found.sort((a, b) => b.score - a.score || b.leftLength - a.leftLength || b.rightLength - a.rightLength);
  return found.map(({ left, right }) => [left, right]);
}

/** Normalizer, pre-tokenizer and decoder; `addSpace` puts a space in front of the text, as Llama 2 does. */
export function spmPipeline(addSpace: boolean): { normalizer: Json; preTokenizer: null; decoder: Json } {
  const replace = { type: "Replace", pattern: { String: " " }, content: "▁" };
  const prepend = { type: "Prepend", prepend: "▁" };
  const decoders: Json[] = [
    { type: "Replace", pattern: { String: "▁" }, content: " " },
    { type: "ByteFallback" },
    { type: "Fuse" },
  ];
  if (addSpace) decoders.push({ type: "Strip", content: " ", start: 1, stop: 0 });
  return {
    normalizer: { type: "Sequence", normalizers: addSpace ? [prepend, replace] : [replace] },
    preTokenizer: null,
    decoder: { type: "Sequence", decoders },
  };
}
