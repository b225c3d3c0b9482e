// Real weights over ranks: SmolLM2 (3 KV heads), the same model with experts, and scout-mini where CARAVAN_SCOUT_MINI names it
// answer with the tokens of one rank. The full sweep is `CARAVAN_RANKS=all` (make verify).

import { describe, expect, test } from "bun:test";
import { type LoadedEngine, loadModel } from "../../src/engine/load-model.ts";
import type { RankOptions } from "../../src/engine/load-options.ts";
import { type GenerateRequest, GREEDY } from "../../src/engine/protocol.ts";
import { Generator } from "./generate.ts";
import { SMOLLM2, SMOLLM2_ANSWERS, smolScout } from "./smollm2-model.ts";

const ALL = process.env.CARAVAN_RANKS === "all";
const TIME_LIMIT_MS = 300_000;
const ANSWERS = ALL ? 6 : 2;
const TOKENS = ALL ? 48 : 12;

interface Model {
  name: string;
  dir: string | undefined;
  missing: string;
  prompts: number[][];
  grids: RankOptions[];
}

const answers = SMOLLM2_ANSWERS.slice(0, ANSWERS).map(({ ids }) => ids);
const grids: RankOptions[] = ALL
  ? [{ tensor: 3 }, { pipeline: 2 }, { pipeline: 3 }, { pipeline: 5 }, { tensor: 2, pipeline: 2 }]
  : [{ tensor: 3 }];
const scout = ALL ? smolScout() : { missing: "it takes CARAVAN_RANKS=all" };
const mini = process.env.CARAVAN_SCOUT_MINI;
const count = (length: number, seed: number) =>
  Array.from({ length }, (_, i) => (i * i * seed + 17 * i) % 49000);

const models: Model[] = [
  { name: "SmolLM2", dir: SMOLLM2, missing: "it is not here (make fixtures)", prompts: answers, grids },
  {
    name: "smol-scout",
    dir: "dir" in scout ? scout.dir : undefined,
    missing: "missing" in scout ? scout.missing : "",
    prompts: answers,
    grids,
  },
  {
    name: "scout-mini",
    dir: mini,
    missing: "CARAVAN_SCOUT_MINI does not name its folder",
    prompts: [count(70, 3), count(150, 5)],
    grids: [{ tensor: 2 }, { tensor: 4 }, { pipeline: 2 }, { pipeline: 4 }, { tensor: 2, pipeline: 2 }],
  },
];

for (const { name, dir, missing } of models)
  if (dir === undefined) console.log(`skipped: ${name}, since ${missing}`);

async function greedy(model: LoadedEngine, prompts: readonly number[][]): Promise<number[][]> {
  const requests = prompts.map(
    (tokens): GenerateRequest => ({ id: "", tokens, max_tokens: TOKENS, stop_tokens: [], sampling: GREEDY }),
  );
  return (await new Generator(model).all(requests)).map(({ tokens }) => tokens);
}

async function answer(dir: string, prompts: readonly number[][], ranks: RankOptions): Promise<number[][]> {
  const model = await loadModel({
    ...{ model: "text", modelDir: dir, context: 1024, streams: prompts.length, compute: "exact", threads: 1 },
    ...ranks,
  });
  try {
    return await greedy(model, prompts);
  } finally {
    await model.close();
  }
}

describe.each(models.filter(({ dir }) => dir !== undefined))("$name", ({ dir, prompts, grids }) => {
  let alone: Promise<number[][]> | undefined;

  test.each(grids)(
    "answers on the ranks of %j with the tokens of one rank",
    async (ranks) => {
      alone ??= answer(dir ?? "", prompts, {});
      expect(await answer(dir ?? "", prompts, ranks)).toEqual(await alone);
      expect((await alone).flat().length).toBe(prompts.length * TOKENS);
    },
    TIME_LIMIT_MS,
  );
});
