// Resuming behind known prefixes: where, with which pages, and what happens when pages are wanted elsewhere. The toy
// engine's tokens depend on every key that a query reads, so a wrong page changes them.

import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { type GenerateEvent, type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { CaravanError } from "../../src/errors.ts";
import { PagePools } from "../../src/scheduler/pages.ts";
import { PrefixTree } from "../../src/scheduler/prefix-tree.ts";
import { Scheduler, type SchedulerOptions } from "../../src/scheduler/scheduler.ts";
import { StepLoop } from "../../src/scheduler/step-loop.ts";
import { FakeEngine, type FakeModel, generateAlone, turn } from "./fake-engine.ts";

/** Pages of 4 tokens, chunks of 16. */
const MODEL: FakeModel = {
  geometry: { pageTokens: 4, chunk: 16, fullPages: 64, chunkPages: 64 },
  limits: { maxRows: 8, maxTokens: 32, maxLogits: 16, slots: 8, vocab: 97 },
};

interface Answer {
  tokens: number[];
  cached: number;
}

function place(options: Partial<SchedulerOptions> = {}, model = MODEL) {
  const events: GenerateEvent[] = [];
  const engine = new FakeEngine(model);
  const scheduler = new Scheduler({
    geometry: model.geometry,
    limits: model.limits,
    contextTokens: 1000,
    mode: "batched",
    maxWaiting: 100,
    now: () => 0,
    emit: (event) => events.push(event),
    ...options,
  });
  const loop = new StepLoop({
    scheduler,
    engine,
    depth: 2,
    onFatal: (error) => {
      throw error;
    },
  });
  /** Runs requests to their ends, together. */
  const ask = async (...requests: GenerateRequest[]): Promise<Answer[]> => {
    events.length = 0;
    for (const each of requests) loop.add(each);
    for (let i = 0; i < 5000 && events.filter(isEnd).length < requests.length; i++) {
      await turn();
      engine.run();
    }
    return requests.map(({ id }) => {
      const mine = events.filter((event) => event.id === id);
      const end = mine.find(isEnd);
      return {
        tokens: mine.flatMap((event) => (event.type === "token" ? [event.token] : [])),
        cached: end?.type === "finish" ? end.usage.cached_tokens : Number.NaN,
      };
    });
  };
  return { scheduler, engine, loop, ask };
}

const isEnd = (event: GenerateEvent): boolean => event.type === "finish" || event.type === "error";
const range = (length: number, seed = 0): number[] =>
  Array.from({ length }, (_, i) => (i * 7 + seed * 13) % 97);
const request = (tokens: number[], more: Partial<GenerateRequest> = {}): GenerateRequest => ({
  ...{ id: `${tokens.length}/${tokens.at(-1)}/${JSON.stringify(more)}`, tokens, max_tokens: 6 },
  ...{ stop_tokens: [], sampling: GREEDY, ...more },
});
const alone = (each: GenerateRequest, model = MODEL): number[] => generateAlone(model, each, 1000).tokens;

describe("a prompt", () => {
  test("is computed whole the first time, and all but its last token the second time", async () => {
    const { ask } = place();
    const each = request(range(42));
    expect(await ask(each)).toEqual([{ tokens: alone(each), cached: 0 }]);
    expect(await ask(each)).toEqual([{ tokens: alone(each), cached: 41 }]);
    const edge = request(range(40));
    // One token is always left to compute.
    expect(await ask(edge)).toEqual([{ tokens: alone(edge), cached: 39 }]);
  });

  test("resumes at the last token that it shares, in the middle of a chunk, behind its edge and inside a page", async () => {
    const { ask } = place();
    await ask(request(range(60)));
    for (const shared of [3, 4, 9, 16, 17, 31, 32, 50]) {
      const each = request([...range(shared), ...range(20, 5)]);
      expect(await ask(each)).toEqual([{ tokens: alone(each), cached: shared }]);
    }
  });

  test("takes over the answers of earlier turns, and rewinds to any of them", async () => {
    const { ask } = place();
    const first = request(range(10), { max_tokens: 13 });
    await ask(first);
    const conversation = [...first.tokens, ...alone(first)];
    const second = request([...conversation, ...range(9, 3)], { max_tokens: 20 });
    // The last token of an answer is never fed: 22 of 23 tokens have keys.
    expect(await ask(second)).toEqual([{ tokens: alone(second), cached: 22 }]);
    const other = request([...conversation, ...range(9, 4)], { max_tokens: 20 });
    expect(await ask(other)).toEqual([{ tokens: alone(other), cached: 23 }]);
    const edited = request([...range(9), 1, 2, 3, ...range(30, 1)]);
    expect(await ask(edited)).toEqual([{ tokens: alone(edited), cached: 9 }]);
  });

  test("resumes inside a page through a copy, and leaves what it copied as it was", async () => {
    const { ask, engine } = place();
    const first = request(range(42));
    await ask(first);
    const second = request([...range(38), ...range(6, 2)]);
    expect(await ask(second)).toEqual([{ tokens: alone(second), cached: 38 }]);
    expect(engine.copies).toEqual({ full: 1, chunked: 1 });
    expect(await ask(first)).toEqual([{ tokens: alone(first), cached: 41 }]);
  });

  test("is not shared where that is switched off", async () => {
    const { ask, scheduler } = place({ prefixCache: false });
    const each = request(range(42));
    await ask(each);
    expect(await ask(each)).toEqual([{ tokens: alone(each), cached: 0 }]);
    expect(scheduler.pools.full.free).toBe(64);
  });

  test("whose own log-probabilities are asked for is computed whole", async () => {
    const { ask } = place();
    await ask(request(range(42)));
    const each = request(range(42), { prompt_logprobs: true });
    expect(await ask(each)).toEqual([{ tokens: alone(each), cached: 0 }]);
  });

  test("is computed once for several answers that are asked for together", async () => {
    const { ask, engine } = place();
    const list = [1, 2, 3, 4].map((seed) =>
      request(range(42), { sampling: { ...GREEDY, temperature: 1, seed } }),
    );
    const answers = await ask(...list);
    expect(answers).toEqual(list.map((each, i) => ({ tokens: alone(each), cached: i === 0 ? 0 : 40 })));
    const computed = engine.seen.flatMap((step) => step.rows.filter((row) => row.count > 1));
    expect(computed.reduce((sum, row) => sum + row.count, 0)).toBe(42 + 3 * 2);
  });

  test("does not wait for ever for another one that ends early", async () => {
    const { ask, loop } = place();
    const first = request(range(90), { max_tokens: 1 });
    const second = request(range(90), { max_tokens: 2 });
    const answers = ask(first, second);
    loop.cancel(first.id);
    expect((await answers)[1]).toEqual({ tokens: alone(second), cached: 0 });
  });
});

describe("pages that others need", () => {
  test("are taken from the prefixes unused for longest, never from what is in use", async () => {
    const model = { ...MODEL, geometry: { ...MODEL.geometry, fullPages: 16 } };
    const { ask, scheduler } = place({}, model);
    const [a, b, c] = [request(range(22)), request(range(22, 1)), request(range(22, 2))];
    await ask(a);
    await ask(b);
    await ask(a);
    // Each fills 6 pages and begins a seventh, which is remembered too: c takes the 2 free ones and the end of b, which is the
    // oldest now; what a then copies and grows by comes from b too.
    await ask(c);
    expect(await ask(a)).toEqual([{ tokens: alone(a, model), cached: 21 }]);
    const [answer] = await ask(b);
    expect(answer?.tokens).toEqual(alone(b, model));
    expect(answer?.cached).toBe(4);
    expect(scheduler.preemptions).toBe(0);
  });

  test("leave a chunk's edge to resume at when the chunk's own pages are gone", async () => {
    // One and a half chunks of pages, and another prompt that uses them all.
    const model = { ...MODEL, geometry: { ...MODEL.geometry, chunkPages: 6 } };
    const { ask } = place({}, model);
    const each = request(range(58));
    await ask(each);
    const other = request(range(24, 9), { max_tokens: 1 });
    await ask(other);
    const [again] = await ask(each);
    expect(again?.tokens).toEqual(alone(each, model));
    // The chunk from 48 on lost its pages to the other prompt; 48 itself needs none of them.
    expect(again?.cached).toBe(48);
    const inside = request([...range(30), ...range(12, 4)]);
    const [answer] = await ask(inside);
    expect(answer).toEqual({ tokens: alone(inside, model), cached: 16 });
  });

  test("are all given back by a failed step, and nothing of it is remembered", async () => {
    const { ask, engine } = place();
    engine.failures.set(1, new CaravanError("engine_failed", "no luck"));
    const each = request(range(60));
    await ask(each);
    const [again] = await ask(each);
    // The first step's 32 tokens are good.
    expect(again).toEqual({ tokens: alone(each), cached: 32 });
  });
});

describe("a prefix tree", () => {
  test("finds what the definition says, and loses no page, for any adding, using and taking", () => {
    const step = fc.record({
      what: fc.constantFrom("store", "store", "store", "use", "take"),
      length: fc.integer({ min: 1, max: 40 }),
      branch: fc.nat(3),
      at: fc.nat(40),
      count: fc.nat(12),
    });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), fc.boolean(), (steps, hasFull) => {
        const pools = new PagePools({ pageTokens: 2, chunk: 6, fullPages: hasFull ? 24 : 0, chunkPages: 12 });
        const tree = new PrefixTree(pools);
        /** What each page holds: the sequence up to its end. */
        const contents = { full: new Map<number, string>(), chunked: new Map<number, string>() };
        const tokensOf = ({ length, branch, at }: (typeof steps)[number]): Uint32Array =>
          Uint32Array.from({ length }, (_, i) => (i < at % length ? i : i * 4 + branch));
        for (const each of steps) {
          const tokens = tokensOf(each);
          if (each.what === "take") {
            const taken = [pools.full, pools.chunked].flatMap((pool) =>
              Array.from(
                { length: Math.min(each.count, pool.available) },
                () => [pool, pool.take()] as const,
              ),
            );
            for (const [pool, page] of taken) pool.release(page);
            continue;
          }
          const match = tree.match(tokens);
          const chunkStart = match.position - (match.position % 6);
          expect(match.position % 2).toBe(0);
          expect(match.position).toBeLessThanOrEqual(tokens.length);
          const ends = (from: number): string[] => {
            const list: string[] = [];
            for (let end = from + 2; end <= match.position; end += 2)
              list.push(String(tokens.subarray(0, end)));
            return list;
          };
          expect(match.full.map((page) => contents.full.get(page))).toEqual(hasFull ? ends(0) : []);
          expect(match.chunked.map((page) => contents.chunked.get(page))).toEqual(ends(chunkStart));
          for (const page of match.full) pools.full.retain(page);
          for (const page of match.chunked) pools.chunked.retain(page);
          const full = [...match.full];
          const chunked = [...match.chunked];
          let node = match.node;
          for (let start = match.position; each.what === "store" && start + 2 <= tokens.length; start += 2) {
            if ((hasFull && pools.full.available === 0) || pools.chunked.available === 0) break;
            if (!node.attached) break;
            const pages = { full: hasFull ? pools.full.take() : undefined, chunked: pools.chunked.take() };
            const end = String(tokens.subarray(0, start + 2));
            if (pages.full !== undefined) {
              contents.full.set(pages.full, end);
              full.push(pages.full);
            }
            contents.chunked.set(pages.chunked, end);
            chunked.push(pages.chunked);
            if (!node.attached) break;
            node = tree.add(node, tokens.subarray(start, start + 2), pages.full, pages.chunked);
          }
          for (const page of full.reverse()) pools.full.release(page);
          for (const page of chunked.reverse()) pools.chunked.release(page);
          expect(pools.full.available).toBe(pools.full.capacity);
          expect(pools.chunked.available).toBe(pools.chunked.capacity);
          expect(tree.pages).toEqual({ full: pools.full.idle, chunked: pools.chunked.idle });
        }
        tree.clear();
        expect(pools.full.free).toBe(pools.full.capacity);
        expect(pools.chunked.free).toBe(pools.chunked.capacity);
        expect(tree.root.children.size).toBe(0);
      }),
      { numRuns: 500, seed: 20260802 },
    );
  });
});
