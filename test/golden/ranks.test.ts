// A model split over ranks, each a process of its own, gives what one rank gives: the logits of the goldens with prompts over
// several chunks in pieces and decoding over chunk edges, and the same tokens with batches, prefixes and every sampler.
// CARAVAN_RANKS=all sweeps every golden, grid and transport (make verify); otherwise a few of them.

import { afterAll, describe, expect, test } from "bun:test";
import { type LoadedEngine, loadModel } from "../../src/engine/load-model.ts";
import type { RankOptions } from "../../src/engine/load-options.ts";
import { runLogits } from "../../src/engine/logits.ts";
import { type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { PromptLookup } from "../../src/scheduler/prompt-lookup.ts";
import { Generator } from "./generate.ts";
import { type GoldenCase, goldenCases } from "./golden-case.ts";
import { goldenFolders, integers, largestDifference, readGolden } from "./read-golden.ts";

const TOLERANCE = 2e-4;
const TIME_LIMIT_MS = 60_000;
const ALL = process.env.CARAVAN_RANKS === "all";

type Grid = Required<Pick<RankOptions, "tensor" | "pipeline" | "transport">>;

const grid = (tensor: number, pipeline: number, transport: Grid["transport"] = "auto"): Grid => ({
  tensor,
  pipeline,
  transport,
});

const GRIDS = [
  ...[grid(2, 1), grid(4, 1), grid(1, 2), grid(1, 3), grid(1, 4), grid(2, 2)],
  ...[grid(2, 1, "tcp"), grid(2, 2, "tcp")],
];
/** For every run of the tests: shapes and formats with unlike slices, one or two grids each. */
const FEW: Record<string, Grid[]> = {
  "scout-4bit": [grid(2, 1), grid(2, 2, "tcp")],
  "scout-hf-bf16": [grid(4, 1)],
  "scout-mixed": [grid(1, 3)],
  "maverick-4bit": [grid(2, 2)],
  "llama-4bit": [grid(2, 1, "tcp")],
  "formats-llama-biases": [grid(2, 1)],
  "formats-3bit": [grid(2, 1)],
  "formats-nvfp4": [grid(2, 1)],
};
/** Prompts whole and in pieces that straddle the edges of the chunks of 16 tokens. */
const PIECES = ALL ? [40, 7] : [7];

const cases = goldenCases()
  .map(({ name, load }) => ({ name, load, grids: ALL ? GRIDS : (FEW[name] ?? []) }))
  .filter(({ grids }) => grids.length > 0);

test("the goldens of the few are there", () => {
  const names = cases.map(({ name }) => name);
  for (const name of Object.keys(FEW)) expect(names).toContain(name);
});

async function logits(
  { dir, tokens, prefill }: GoldenCase,
  piece: number,
  ranks: Grid,
): Promise<Float32Array> {
  const { data } = await runLogits({
    ...{ modelDir: dir, tokens, prefill, piece, compute: "exact", threads: 1 },
    ranks: { ...ranks, checkRanks: true },
  });
  return data;
}

describe.each(cases)("$name", ({ load, grids }) => {
  // A stage needs a layer: the checkpoints of two layers have no third.
  test.each(grids)(
    "on $tensor × $pipeline ranks over $transport has one rank's logits",
    async (ranks) => {
      const golden = await load();
      const layers = await layersOf(golden.dir);
      if (ranks.pipeline > layers) {
        console.log(`skipped: ${ranks.pipeline} stages of ${layers} layers`);
        return;
      }
      const alone = await golden.run({ compute: "exact", piece: 7 });
      for (const piece of PIECES)
        expect(
          largestDifference(await logits(golden, piece, ranks), alone),
          `pieces of ${piece}`,
        ).toBeLessThan(TOLERANCE);
    },
    TIME_LIMIT_MS,
  );
});

describe.skipIf(!ALL).each(ALL ? goldenFolders("golden_edge.safetensors") : [])("$name", ({ dir }) => {
  test.each([grid(2, 1), grid(1, 2), grid(2, 2)])(
    "on $tensor × $pipeline ranks has one rank's logits over the edges of chunks of 8192 tokens",
    async (ranks) => {
      const tokens = integers(await readGolden(`${dir}/golden_edge.safetensors`), "tokens");
      const run = async (more: { ranks?: Grid }) => {
        const options = { modelDir: dir, tokens, prefill: tokens.length - 200, piece: 512, threads: 1 };
        return (await runLogits({ ...options, compute: "exact", ...more })).data;
      };
      expect(largestDifference(await run({ ranks }), await run({}))).toBeLessThan(TOLERANCE);
    },
    300_000,
  );
});

async function layersOf(dir: string): Promise<number> {
  const { num_hidden_layers, text_config } = await Bun.file(`${dir}/config.json`).json();
  return num_hidden_layers ?? text_config.num_hidden_layers;
}

const prompt = (length: number, seed: number): number[] =>
  Array.from({ length }, (_, i) => 4 + ((i * i * 7 + i * seed + seed * 31) % 400));

/** Every option of the sampler, and plain ones, all at once. */
function requests(): GenerateRequest[] {
  const base = { id: "", max_tokens: 24, stop_tokens: [2] };
  const sampling = { ...GREEDY, temperature: 0.9, seed: 11 };
  const samplings = [
    GREEDY,
    sampling,
    { ...sampling, top_k: 7 },
    { ...sampling, top_p: 0.6 },
    { ...sampling, min_p: 0.05, seed: 5 },
    { ...sampling, xtc_probability: 1, xtc_threshold: 0.02 },
    { ...sampling, repetition_penalty: 1.3, presence_penalty: 0.4, frequency_penalty: 0.2 },
    {
      ...GREEDY,
      logit_bias: [
        [7, 4],
        [300, -100],
      ] as [number, number][],
    },
  ];
  return [
    ...samplings.map((each, i) => ({ ...base, tokens: prompt(20 + 9 * i, i), sampling: each })),
    { ...base, tokens: prompt(45, 3), sampling: GREEDY, logprobs: 5 },
    { ...base, tokens: prompt(33, 4), sampling, logprobs: 2, ban_stop_tokens: true },
  ];
}

describe.each(cases.filter(({ name }) => name === "scout-4bit" || (ALL && name === "llama-4bit")))(
  "$name generates",
  ({ load, grids }) => {
    const loaded: LoadedEngine[] = [];
    afterAll(async () => {
      for (const model of loaded) await model.close();
    });

    async function open(ranks?: Grid): Promise<LoadedEngine> {
      const { dir } = await load();
      const model = await loadModel({
        ...{ model: "golden", modelDir: dir, context: 512, streams: 12, threads: 1, compute: "exact" },
        ...(ranks === undefined ? {} : { ...ranks, checkRanks: true }),
      });
      loaded.push(model);
      return model;
    }

    async function answers(model: LoadedEngine): Promise<number[][]> {
      const generator = new Generator(model, { drafter: new PromptLookup() });
      const first = await generator.all(requests());
      // Known beginnings, and a text that drafts are found in.
      const again = await generator.all(
        requests().map((each) => ({ ...each, tokens: [...each.tokens, 9, 8] })),
      );
      const same = await generator.one({
        ...requests()[0],
        tokens: [...prompt(9, 1), ...prompt(9, 1)],
      } as GenerateRequest);
      expect(again.some(({ cached }) => cached > 0)).toBe(true);
      return [...first, ...again, same].map(({ tokens }) => tokens);
    }

    test.each(grids)(
      "the same tokens on $tensor × $pipeline ranks over $transport, in batches, with every sampler",
      async (ranks) => {
        const alone = await answers(await open());
        expect(await answers(await open(ranks))).toEqual(alone);
        expect(alone.flat().length).toBeGreaterThan(200);
      },
      TIME_LIMIT_MS,
    );
  },
);
