// What one rank loads of a model: a function from the whole model's load plan and everybody's shares to the rank's own plan.
// Attention is divided by KV heads (a query group stays with its key), MLPs and every expert by groups of their inner
// width, the head by rows of the vocabulary; router, norms and embedding are on every rank that needs them. Pure.

import { CaravanError } from "../errors.ts";
import type { ModelConfig } from "../model/config.ts";
import type { LoadPlan, PlannedTensor } from "../model/load-plan.ts";
import type { RankPlace } from "../model/rank-place.ts";
import { SLOT, type Slot } from "../model/tensor-names.ts";
import { columnSlice, rowSlice } from "../model/tensor-slice.ts";
import { commonMultiple, shareBounds } from "./split.ts";
import type { RankShare } from "./types.ts";

/** What a shard needs to know of each rank. */
export type Share = Pick<RankShare, "rank" | "stage" | "tensorRank" | "layers" | "weight">;

/** Columns that stay together in float tensors; quantized ones have their groups. Whole vectors of every kernel set. */
export const FLOAT_UNIT = 32;
/** Rows of the head that stay together. */
export const HEAD_UNIT = 16;

type Range = readonly [first: number, end: number];
type Slots = readonly Slot[];

/** Matrices whose rows (outputs) are divided like the columns (inputs) of the last one. */
const MLPS: readonly { rows: Slots; biases: Slots; columns: Slot }[] = [
  { rows: [SLOT.gate, SLOT.up], biases: [SLOT.gateBias, SLOT.upBias], columns: SLOT.down },
  { rows: [SLOT.expertGate, SLOT.expertUp], biases: [], columns: SLOT.expertDown },
  { rows: [SLOT.sharedGate, SLOT.sharedUp], biases: [], columns: SLOT.sharedDown },
];

/**
 * The plan of rank `rank`. `shares` has every rank of the model once, in order.
 * Throws invalid_argument where the shares do not make a grid of the model's layers.
 */
export function shardPlan(plan: LoadPlan, shares: readonly Share[], rank: number): LoadPlan {
  const { config } = plan;
  const { stages, tensorSize } = checkGrid(config, shares);
  const mine = shares[rank];
  if (mine === undefined || plan.place !== undefined)
    throw new CaravanError("internal_error", `rank ${rank} of ${shares.length} cannot be cut from this plan`);
  const weights = shares.slice(mine.stage * tensorSize, (mine.stage + 1) * tensorSize).map((s) => s.weight);
  const [firstLayer, endLayer] = mine.layers;
  const layered = plan.tensors.filter(({ layer }) => layer >= firstLayer && layer < endLayer);
  const range = (count: number, unit: number): Range => rangeOf(shareBounds(count, unit, weights), mine);
  const [firstHead, endHead] = range(config.kvHeads, headUnit(config, layered));
  const vocab = mine.stage === stages - 1 ? range(config.vocabSize, HEAD_UNIT) : ([0, 0] as const);
  const cut = new LayerCutter(
    config,
    [firstHead, endHead],
    (count, unit) => shareBounds(count, unit, weights),
    mine,
  );
  const tensors = [
    ...plan.tensors.filter(({ layer }) => layer < 0).map((t) => globalPart(t, mine.stage, stages, vocab)),
    ...layered.map((t) => cut.part(t, layered)),
  ];
  const kvHeads = endHead - firstHead;
  const place: RankPlace = {
    tensorRank: mine.tensorRank,
    tensorSize,
    stage: mine.stage,
    stages,
    layers: mine.layers,
    heads: kvHeads * (config.heads / config.kvHeads),
    kvHeads,
    vocabFirst: vocab[0],
    vocabRows: vocab[1] - vocab[0],
  };
  return {
    ...plan,
    place,
    tensors: tensors.flatMap((t) =>
      t === undefined ? [] : [t.layer < 0 ? t : { ...t, layer: t.layer - firstLayer }],
    ),
  };
}

/** Number of stages and ranks a stage. */
function checkGrid(config: ModelConfig, shares: readonly Share[]): { stages: number; tensorSize: number } {
  const stages = (shares.at(-1)?.stage ?? -1) + 1;
  const tensorSize = shares.length / stages;
  const wrong = (what: string) =>
    new CaravanError("invalid_argument", `the ranks do not make a grid: ${what}`, { where: config.where });
  if (!Number.isInteger(tensorSize) || tensorSize < 1)
    throw wrong(`${shares.length} ranks in ${stages} stages`);
  let next = 0;
  shares.forEach((share, r) => {
    const { rank, stage, tensorRank, layers } = share;
    if (rank !== r || stage * tensorSize + tensorRank !== r || tensorRank >= tensorSize)
      throw wrong(`rank ${rank} stands at place ${r} as tensor rank ${tensorRank} of stage ${stage}`);
    const [first, end] = layers;
    const before = shares[r - 1]?.layers;
    if (tensorRank > 0 ? first !== before?.[0] || end !== before[1] : first !== next || end <= first)
      throw wrong(`rank ${r} has layers ${first} to ${end}`);
    next = end;
  });
  if (next !== config.layers.length) throw wrong(`${next} of ${config.layers.length} layers have a rank`);
  return { stages, tensorSize };
}

function rangeOf(bounds: readonly number[], { tensorRank }: Share): Range {
  return [bounds[tensorRank] ?? 0, bounds[tensorRank + 1] ?? 0];
}

/** Fewest KV heads whose part of every o begins and ends with a quantization group. */
export function headUnit(config: ModelConfig, layered: readonly PlannedTensor[]): number {
  const width = (config.heads / config.kvHeads) * config.headDim;
  const groups = layered.filter(({ slot }) => slot === SLOT.o).map(({ group }) => group || 1);
  return commonMultiple(groups.reduce(commonMultiple, 1), width) / width;
}

/** Embedding on the first stage, final norm and head on the last. */
function globalPart(
  t: PlannedTensor,
  stage: number,
  stages: number,
  [first, end]: Range,
): PlannedTensor | undefined {
  const last = stage === stages - 1;
  switch (t.slot) {
    case SLOT.embed:
      return stage === 0 ? t : undefined;
    case SLOT.finalNorm:
      return last ? t : undefined;
    case SLOT.head:
      return last ? rowSlice(t, first, end) : undefined;
    default:
      throw new CaravanError("internal_error", `${t.name} has no rule for tensor parallelism`);
  }
}

class LayerCutter {
  constructor(
    private readonly config: ModelConfig,
    /** KV heads of the rank. */
    private readonly heads: Range,
    private readonly bounds: (count: number, unit: number) => number[],
    private readonly share: Share,
  ) {}

  /** The rank's part of one layer's tensor. all: the stage's tensors, to find the ones that go with it. */
  part(t: PlannedTensor, all: readonly PlannedTensor[]): PlannedTensor | undefined {
    const { headDim, heads, kvHeads } = this.config;
    const [first, end] = this.heads;
    const q = (heads / kvHeads) * headDim;
    switch (t.slot) {
      case SLOT.attnNorm:
      case SLOT.ffnNorm:
      case SLOT.router:
        return t;
      case SLOT.q:
        return rowSlice(t, first * q, end * q);
      case SLOT.k:
      case SLOT.v:
        return rowSlice(t, first * headDim, end * headDim);
      case SLOT.o:
        return columnSlice(t, first * q, end * q);
      case SLOT.qBias:
        return columnSlice(t, first * q, end * q);
      case SLOT.kBias:
      case SLOT.vBias:
        return columnSlice(t, first * headDim, end * headDim);
      // Added to a sum over ranks: once.
      case SLOT.oBias:
      case SLOT.downBias:
        return this.share.tensorRank === 0 ? t : undefined;
      default:
        return this.#mlpPart(t, all);
    }
  }

  #mlpPart(t: PlannedTensor, all: readonly PlannedTensor[]): PlannedTensor | undefined {
    for (const { rows, biases, columns } of MLPS) {
      if (![...rows, ...biases, columns].includes(t.slot)) continue;
      const down = all.find(({ slot, layer }) => slot === columns && layer === t.layer);
      if (down === undefined) throw new CaravanError("internal_error", `${t.name} has no matrix behind it`);
      const [first, end] = rangeOf(this.bounds(down.cols, down.group || FLOAT_UNIT), this.share);
      return rows.includes(t.slot) ? rowSlice(t, first, end) : columnSlice(t, first, end);
    }
    throw new CaravanError("internal_error", `${t.name} has no rule for tensor parallelism`);
  }
}
