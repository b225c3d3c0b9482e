// Where one rank of a model stands: its stage of the pipeline, its place in the stage's tensor group, and how much of each
// layer it computes. A model on one rank is the case of one stage and a tensor group of one.

import type { LayerConfig, ModelConfig } from "./config.ts";

export interface RankPlace {
  tensorRank: number;
  tensorSize: number;
  stage: number;
  stages: number;
  /** Global layer numbers [first, end). */
  layers: readonly [first: number, end: number];
  /** Query heads and KV heads of this rank; both 0 where its share of attention is nothing. */
  heads: number;
  kvHeads: number;
  /** Rows of the head [first, first + rows); no rows where it has none of it. */
  vocabFirst: number;
  vocabRows: number;
}

export function wholeModel(config: ModelConfig): RankPlace {
  return {
    tensorRank: 0,
    tensorSize: 1,
    stage: 0,
    stages: 1,
    layers: [0, config.layers.length],
    heads: config.heads,
    kvHeads: config.kvHeads,
    vocabFirst: 0,
    vocabRows: config.vocabSize,
  };
}

/** The layers that a place computes, in order. */
export function layersAt(config: ModelConfig, { layers: [first, end] }: RankPlace): LayerConfig[] {
  return config.layers.slice(first, end);
}
