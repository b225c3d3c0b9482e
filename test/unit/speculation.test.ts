// Drafts from earlier text, and how many of them a row carries by what they cost and how often they are right.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { GREEDY } from "../../src/engine/protocol.ts";
import type { Drafter } from "../../src/scheduler/drafter.ts";
import { PagePools } from "../../src/scheduler/pages.ts";
import { PromptLookup } from "../../src/scheduler/prompt-lookup.ts";
import { Sequence } from "../../src/scheduler/sequence.ts";
import { LONGEST_DRAFT, Speculation } from "../../src/scheduler/speculation.ts";

const draft = (known: number[], most: number): readonly number[] =>
  new PromptLookup().draft("a", Uint32Array.from(known), most);

describe("prompt lookup", () => {
  test("drafts what followed the last three tokens when they came before, the latest time", () => {
    expect(draft([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 1, 2, 3], 3)).toEqual([6, 7, 8]);
    expect(draft([1, 2, 3, 4, 5, 9, 1, 2, 3], 2)).toEqual([4, 5]);
  });

  test("drafts nothing without an earlier occurrence", () => {
    expect(draft([], 4)).toEqual([]);
    expect(draft([1, 2, 3], 4)).toEqual([]);
    expect(draft([1, 2, 3, 4, 5, 6], 4)).toEqual([]);
    expect(draft([1, 2, 3, 4, 5, 0, 2, 3], 4)).toEqual([]);
  });

  test("goes on with a period that is shorter than the draft", () => {
    expect(draft([7, 8, 7, 8, 7, 8], 5)).toEqual([7, 8, 7, 8, 7]);
    expect(draft([5, 5, 5, 5], 3)).toEqual([5, 5, 5]);
  });

  test("finds the same while a sequence grows as when it is seen whole", () => {
    fc.assert(
      fc.property(fc.array(fc.nat(3), { maxLength: 3000 }), fc.nat(40), (tokens, step) => {
        const growing = new PromptLookup();
        const known = Uint32Array.from(tokens);
        for (let length = 0; length <= known.length; length += step + 1) {
          const part = known.subarray(0, length);
          const found = growing.draft("a", part, 4);
          expect(found).toEqual(draft([...part], 4));
          if (found.length === 0) continue;
          // Whatever is drafted did follow the same three tokens.
          const text = [...part].join("");
          expect(text.slice(0, -1) + found[0]).toContain(text.slice(-3) + found[0]);
        }
      }),
      { numRuns: 60, seed: 20260803 },
    );
  });
});

const pools = new PagePools({ pageTokens: 4, chunk: 0, fullPages: 8, chunkPages: 0 });
const sequence = (more: { logprobs?: number; presence?: number } = {}): Sequence =>
  new Sequence(
    {
      ...{ id: "a", tokens: [1, 2, 3], max_tokens: 9, stop_tokens: [] },
      sampling: { ...GREEDY, presence_penalty: more.presence ?? 0 },
      ...(more.logprobs === undefined ? {} : { logprobs: more.logprobs }),
    },
    ...([0, 0, pools, 97] as const),
  );
const always: Drafter = { draft: (_id, _known, most) => new Array<number>(most).fill(5), end: () => {} };

describe("the length of drafts", () => {
  test("grows while drafts are accepted and cheap", () => {
    const speculation = new Speculation(always);
    const one = sequence();
    speculation.observe(3, 10.3, 10);
    for (let i = 0; i < 40; i++) {
      const { length } = speculation.draft(one, 20, 1, 10);
      speculation.accepted(one, length, length);
    }
    expect(speculation.draft(one, 20, 1, 10).length).toBe(LONGEST_DRAFT);
    expect(speculation.draft(one, 2, 1, 10).length).toBe(2);
  });

  test("falls to nothing where drafts are wrong, with ever rarer attempts", () => {
    const speculation = new Speculation(always);
    const one = sequence();
    speculation.observe(3, 16, 10);
    let attempts = 0;
    for (let i = 0; i < 4000; i++) {
      const { length } = speculation.draft(one, 20, 1, 10);
      if (length > 0) {
        attempts++;
        speculation.accepted(one, length, 0);
      } else speculation.passed(one);
    }
    expect(attempts).toBeLessThan(40);
    expect(speculation.wants(one)).toBe(false);
    expect(speculation.statistics.accepted).toBe(0);
  });

  test("falls to nothing where a grammar forbids every draft, though none was ever measured", () => {
    const speculation = new Speculation(always);
    const one = sequence();
    let attempts = 0;
    for (let i = 0; i < 4000; i++) {
      if (speculation.draft(one, 20, 1, 10).length > 0) {
        attempts++;
        speculation.forbidden(one);
      } else speculation.passed(one);
    }
    expect(attempts).toBeGreaterThan(3);
    expect(attempts).toBeLessThan(40);
    // So nothing waits for its last token.
    expect(speculation.wants(one)).toBe(false);
  });

  test("is nothing in a batch whose tokens cost no less than drafts", () => {
    const speculation = new Speculation(always);
    speculation.observe(2, 22, 20);
    // A step of 16 rows in 20 ms: 1.25 ms a token, and a drafted one adds 1 ms and may be wrong.
    expect(speculation.draft(sequence(), 20, 16, 20)).toEqual([]);
    expect(new Speculation(always).draft(sequence(), 20, 1, 20).length).toBeGreaterThan(0);
  });

  test("is nothing before the step without drafts is measured, and with penalties or alternatives", () => {
    const speculation = new Speculation(always);
    expect(speculation.draft(sequence(), 20, 1, undefined)).toEqual([]);
    expect(speculation.draft(sequence({ presence: 0.5 }), 20, 1, 10)).toEqual([]);
    expect(speculation.draft(sequence({ logprobs: 2 }), 20, 1, 10)).toEqual([]);
    expect(speculation.draft(sequence({ logprobs: 0 }), 20, 1, 10).length).toBeGreaterThan(0);
    expect(new Speculation(undefined).wants(sequence())).toBe(false);
  });
});
