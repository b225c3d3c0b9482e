// The real chunk size: 16,500 tokens through a tiny Llama 4 with chunks of 8192, against Hugging Face transformers.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { runLogits } from "../../src/engine/logits.ts";
import { topOf } from "./logit-closeness.ts";
import { floats, goldenFolders, integers, readGolden } from "./read-golden.ts";

/** Largest difference between two other implementations is 6e-4: few keys are left right behind an edge. */
const TOLERANCE = 1e-3;
const ONE_BY_ONE = 300;

describe.each(goldenFolders("golden_edge.safetensors"))("$name", ({ dir }) => {
  test.each([
    { how: "whole", piece: 16500, last: 0 },
    { how: "in pieces of 512", piece: 512, last: 0 },
    { how: `with the last ${ONE_BY_ONE} tokens one at a time`, piece: 512, last: ONE_BY_ONE },
  ])(
    "gives the reference's logits around both chunk edges, $how",
    async ({ piece, last }) => {
      const golden = await readGolden(join(dir, "golden_edge.safetensors"));
      const tokens = integers(golden, "tokens");
      const places = new Map(integers(golden, "positions").map((position, i) => [position, i]));
      const wanted = floats(golden, "logits_at") ?? new Float32Array(0);
      let first = 0;
      let compared = 0;
      const wrong: string[] = [];
      await runLogits({
        modelDir: dir,
        tokens,
        prefill: tokens.length - last,
        piece,
        compute: "exact",
        threads: 2,
        onLogits: (rows, vocab) => {
          for (let r = 0; r < rows.length / vocab; r++) {
            const place = places.get(first + r);
            if (place === undefined) continue;
            compared++;
            const mine = rows.subarray(r * vocab, (r + 1) * vocab);
            const theirs = wanted.subarray(place * vocab, (place + 1) * vocab);
            const most = mine.reduce(
              (worst, x, i) => Math.max(worst, Math.abs(x - (theirs[i] ?? Number.NaN))),
              0,
            );
            if (!(most < TOLERANCE) || topOf(mine).top !== topOf(theirs).top)
              wrong.push(
                `position ${first + r}: off by ${most}, top ${topOf(mine).top} for ${topOf(theirs).top}`,
              );
          }
          first += rows.length / vocab;
        },
      });
      expect(first).toBe(tokens.length);
      expect(compared).toBe(places.size);
      expect(wrong).toEqual([]);
    },
    180_000,
  );
});

test("the long golden is there", () => {
  expect(goldenFolders("golden_edge.safetensors").length).toBeGreaterThan(0);
});
