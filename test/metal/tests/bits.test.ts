// A row's bits on the Metal backend: the same alone, in a batch and behind a known prefix wherever the same kind of kernel computes it
// (steps of at most 16 tokens; steps of more), with every type of cache. Between the kinds: golden.test.ts.

import { expect, test } from "bun:test";
import { join } from "node:path";
import { type LoadedEngine, loadModel } from "../../../src/engine/load-model.ts";
import { GREEDY } from "../../../src/engine/protocol.ts";
import { PagePools, SequencePages } from "../../../src/scheduler/pages.ts";
import type { StepRow } from "../../../src/scheduler/step.ts";

const DATA = join(import.meta.dir, "../../golden/data");
const ready = (process.env.CARAVAN_METAL_LIBRARY ?? "") !== "" && (process.env.MSLC ?? "") !== "";
if (!ready) console.log("skipped: rows' bits on Metal need the fake runtime: bash test/metal/run.sh");
const withFake = test.skipIf(!ready);
const LENGTH = 48;
/** Tokens of a known prefix, and of a page. */
const KNOWN = 32;
const PAGE = 16;
const NOTHING = new Uint32Array(0);

/** A sequence and the logits of its tokens so far. */
class Sequence {
  readonly tokens: Uint32Array;
  readonly pages: SequencePages;
  readonly logits: Float32Array[] = [];
  done = 0;

  constructor(
    readonly slot: number,
    seed: number,
    pools: PagePools,
  ) {
    this.tokens = Uint32Array.from({ length: LENGTH }, (_, i) => (i * 37 + seed * 101) % 500);
    this.pages = new SequencePages(pools);
  }

  row(count: number): StepRow {
    this.pages.dropFinishedChunks(this.done);
    expect(this.pages.fitting(this.done, count)).toBe(count);
    this.pages.extend(this.done + count);
    return {
      ...{
        slot: this.slot,
        firstPosition: this.done,
        tokens: this.tokens.subarray(this.done, this.done + count),
      },
      ...{ fullPages: this.pages.full?.view() ?? NOTHING, chunkPages: this.pages.chunked?.view() ?? NOTHING },
      ...{ chunkBase: this.pages.chunked?.base ?? 0, logits: "all", sample: false, returnLogits: true },
      ...{ logprob: false, topLogprobs: 0, sampling: GREEDY, bias: [], history: NOTHING, xtcKeep: NOTHING },
    };
  }
}

/** A step: sequences, with how many tokens of theirs it has. */
async function feed(model: LoadedEngine, step: readonly (readonly [Sequence, number])[]): Promise<void> {
  const { rows } = await model.engine.submit({ rows: step.map(([each, n]) => each.row(n)), copies: [] });
  for (const [i, [sequence, count]] of step.entries()) {
    sequence.logits.push((rows[i]?.logits ?? new Float32Array(0)).slice());
    sequence.done += count;
  }
}

/** Its logits from token `from` on, as bits. */
function bits(sequence: Sequence, from: number, vocab: number): Uint32Array {
  const all = Float32Array.from(sequence.logits.flatMap((each) => [...each]));
  return new Uint32Array(all.buffer).subarray(all.length - (LENGTH - from) * vocab);
}

for (const [compute, kvBits] of [
  ["fast", 16],
  ["exact", 8],
] as const)
  withFake(
    `rows have the bits that they have alone, in batches and behind a known prefix (${compute}, ${kvBits === 8 ? "8-bit cache" : "the model's cache"})`,
    async () => {
      const model = await loadModel({
        ...{
          model: "scout",
          modelDir: join(DATA, "scout-4bit"),
          context: LENGTH,
          streams: 8,
          compute,
          device: "metal",
        },
        ...(kvBits === 8 ? { kvBits } : {}),
        piece: () => 96,
      });
      const { vocab } = model.limits;
      const pools = new PagePools(model.geometry);
      let slot = 0;
      const make = (seed: number) => new Sequence(slot++, seed, pools);
      try {
        // Few rows a step, over chunk edges: alone in steps of 6, then beside others in steps of up to 16.
        const [alone, batched, other, third] = [make(1), make(1), make(2), make(3)];
        for (let i = 0; i < 8; i++) await feed(model, [[alone, 6]]);
        for (let i = 0; i < 8; i++)
          await feed(model, [
            [other, 1 + (i % 4)],
            [batched, 6],
            [third, 1 + (i % 6)],
          ]);
        expect(bits(batched, 0, vocab)).toEqual(bits(alone, 0, vocab));
        // The same behind a prefix of two pages that another sequence has computed.
        const known = make(1);
        known.pages.adopt(KNOWN, [...(alone.pages.full?.view() ?? [])].slice(0, KNOWN / PAGE), []);
        known.done = KNOWN;
        await feed(model, [[known, 1]]);
        await feed(model, [[known, LENGTH - KNOWN - 1]]);
        expect(bits(known, KNOWN, vocab)).toEqual(bits(alone, KNOWN, vocab));
        // Tiles: whole, in pieces, and beside another prompt.
        const [whole, pieces] = [make(4), make(4)];
        await feed(model, [[whole, LENGTH]]);
        await feed(model, [[pieces, 17]]);
        await feed(model, [
          [other, 20],
          [pieces, LENGTH - 17],
        ]);
        expect(bits(pieces, 0, vocab)).toEqual(bits(whole, 0, vocab));
      } finally {
        await model.close();
      }
    },
    180_000,
  );
