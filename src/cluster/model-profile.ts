// A load plan boiled down to what placement asks of it over and over: bytes and multiply-adds of each layer, by the things
// that tensor ranks divide. Gives for any rank the same bytes as shardPlan would (a test holds it to that), a thousand
// times faster, so that many placements can be compared. Pure.

import type { ModelConfig } from "../model/config.ts";
import { type LoadPlan, type PlannedTensor, tensorMemory } from "../model/load-plan.ts";
import type { RankPlace } from "../model/rank-place.ts";
import { BIAS_OF, SLOT, type Slot } from "../model/tensor-names.ts";
import { FLOAT_UNIT, HEAD_UNIT, headUnit, type Share } from "./shard.ts";
import { commonMultiple, shareBounds } from "./split.ts";

/** Something that tensor ranks divide: KV heads, inner columns of an MLP, rows of the head. */
interface Divided {
  count: number;
  unit: number;
  /** Bytes of the whole, in proportion to the share. */
  bytes: number;
  /** Bytes of every share that is not empty. */
  any: number;
  /** Of the whole, for one token: experts that it does not pick are left out. */
  multiplyAdds: number;
  /** Only the experts that a step's tokens picked are read. */
  expert: boolean;
}

interface LayerProfile {
  /** On every rank of the stage: norms, router. */
  fixed: number;
  /** On tensor rank 0 only: biases that are added to a sum. */
  once: number;
  fixedMultiplyAdds: number;
  attention: Divided;
  mlps: Divided[];
  /** Fewest KV heads that its o may be divided by. */
  headUnit: number;
  moe: boolean;
}

export interface ModelProfile {
  config: ModelConfig;
  layers: LayerProfile[];
  /** Layers that are alike are one kind: its number by layer, and one of each. */
  kindOf: number[];
  kinds: LayerProfile[];
  embedding: number;
  finalNorm: number;
  head: Divided;
  /** A tensor of the plan's widest MLP, to be narrowed to a rank's width. */
  widest: PlannedTensor | undefined;
}

/** What one rank of a placement holds and does. Bytes, multiply-adds a token. */
export interface RankWork {
  place: RankPlace;
  weights: number;
  /** Weights that every decode step reads, and experts' weights, of which it reads those that its tokens picked. */
  read: number;
  readExperts: number;
  multiplyAdds: number;
  headMultiplyAdds: number;
  /** Inner width of the widest MLP. */
  widest: number;
}

const MLPS: readonly { slots: readonly Slot[]; inner: Slot }[] = [
  { slots: [SLOT.gate, SLOT.up, SLOT.down], inner: SLOT.down },
  { slots: [SLOT.expertGate, SLOT.expertUp, SLOT.expertDown], inner: SLOT.expertDown },
  { slots: [SLOT.sharedGate, SLOT.sharedUp, SLOT.sharedDown], inner: SLOT.sharedDown },
];
const ATTENTION: readonly Slot[] = [SLOT.q, SLOT.k, SLOT.v, SLOT.o];
/** What the engine adds behind each vector (tensorMemory). */
const VECTOR_PADDING = 16 * 4;

export function profileModel(plan: LoadPlan): ModelProfile {
  const { config } = plan;
  const byLayer: PlannedTensor[][] = config.layers.map(() => []);
  let embedding = 0;
  let finalNorm = 0;
  let head: Divided | undefined;
  for (const t of plan.tensors) {
    if (t.layer >= 0) byLayer[t.layer]?.push(t);
    else if (t.slot === SLOT.embed) embedding += bytesOf(t);
    else if (t.slot === SLOT.finalNorm) finalNorm += bytesOf(t);
    else head = divided(config, [t], [], t.rows, HEAD_UNIT);
  }
  const widest = plan.tensors
    .filter(({ slot }) => slot === SLOT.gate || slot === SLOT.expertGate || slot === SLOT.sharedGate)
    .sort((a, b) => b.rows - a.rows)[0];
  const layers = byLayer.map((tensors, i) => layerProfile(config, tensors, config.layers[i]?.moe === true));
  const kinds = new Map<string, { number: number; layer: LayerProfile }>();
  const kindOf = layers.map((layer) => {
    const key = JSON.stringify(layer);
    const known = kinds.get(key) ?? { number: kinds.size, layer };
    kinds.set(key, known);
    return known.number;
  });
  return {
    config,
    layers,
    kindOf,
    kinds: [...kinds.values()].map(({ layer }) => layer),
    embedding,
    finalNorm,
    head: head ?? divided(config, [], [], 1, HEAD_UNIT),
    widest,
  };
}

function layerProfile(config: ModelConfig, tensors: readonly PlannedTensor[], moe: boolean): LayerProfile {
  const of = (slots: readonly (Slot | undefined)[]) => tensors.filter(({ slot }) => slots.includes(slot));
  const summed: readonly Slot[] = [SLOT.oBias, SLOT.downBias];
  const fixed = of([SLOT.attnNorm, SLOT.ffnNorm, SLOT.router]);
  const biases = (slots: readonly Slot[]) =>
    of(slots.map((slot) => BIAS_OF[slot])).filter(({ slot }) => !summed.includes(slot));
  const mlps = MLPS.flatMap(({ slots, inner }) => {
    const down = tensors.find(({ slot }) => slot === inner);
    return down === undefined
      ? []
      : [divided(config, of(slots), biases(slots), down.cols, down.group || FLOAT_UNIT)];
  });
  return {
    fixed: sum(fixed.map(bytesOf)),
    once: sum(of(summed).map(bytesOf)),
    fixedMultiplyAdds: sum(of([SLOT.router]).map(({ rows, cols }) => rows * cols)),
    attention: divided(config, of(ATTENTION), biases(ATTENTION), config.kvHeads, 1),
    mlps,
    headUnit: headUnit(config, of([SLOT.o])),
    moe,
  };
}

function divided(
  config: ModelConfig,
  matrices: readonly PlannedTensor[],
  biases: readonly PlannedTensor[],
  count: number,
  unit: number,
): Divided {
  const scales = sum(matrices.map((t) => (t.globalScale === undefined ? 0 : t.experts * 4)));
  const padding = biases.length * VECTOR_PADDING;
  const all = sum([...matrices, ...biases].map(bytesOf));
  const expert = matrices.some(({ experts }) => experts > 1);
  const products = sum(matrices.map((t) => t.experts * t.rows * t.cols));
  return {
    count,
    unit,
    bytes: all - scales - padding,
    any: scales + padding,
    multiplyAdds: expert ? (products * config.expertsPerToken) / config.experts : products,
    expert,
  };
}

function bytesOf(t: PlannedTensor): number {
  const { mapped, copied } = tensorMemory(t);
  return mapped + copied;
}

function sum(list: readonly number[]): number {
  return list.reduce((total, n) => total + n, 0);
}

/** The work of every rank. shares: a grid as shardPlan takes it, in order of ranks. */
export function rankWorks(profile: ModelProfile, shares: readonly Share[]): RankWork[] {
  const stages = (shares.at(-1)?.stage ?? 0) + 1;
  const size = shares.length / stages;
  const works: RankWork[] = [];
  for (let stage = 0; stage < stages; stage++)
    works.push(...stageWorks(profile, shares.slice(stage * size, (stage + 1) * size), stages));
  return works;
}

function stageWorks(profile: ModelProfile, shares: readonly Share[], stages: number): RankWork[] {
  const { config } = profile;
  const [firstLayer, endLayer] = shares[0]?.layers ?? [0, 0];
  const stage = shares[0]?.stage ?? 0;
  const weights = shares.map(({ weight }) => weight);
  const counts = new Array<number>(profile.kinds.length).fill(0);
  for (const kind of profile.kindOf.slice(firstLayer, endLayer)) counts[kind] = (counts[kind] ?? 0) + 1;
  const kinds = profile.kinds.flatMap((layer, kind) => {
    const count = counts[kind] ?? 0;
    return count === 0 ? [] : [{ layer, count }];
  });
  const unit = kinds.reduce((multiple, { layer }) => commonMultiple(multiple, layer.headUnit), 1);
  const known = new Map<number, number[]>();
  const bounds = (count: number, step: number): number[] => {
    const key = count * 65536 + step;
    const found = known.get(key) ?? shareBounds(count, step, weights);
    known.set(key, found);
    return found;
  };
  const heads = bounds(config.kvHeads, unit);
  const last = stage === stages - 1;
  const vocab = last ? bounds(config.vocabSize, HEAD_UNIT) : undefined;
  return shares.map(({ tensorRank: r, layers: range }) => {
    const kvHeads = width(heads, r);
    const rows = vocab === undefined ? 0 : width(vocab, r);
    const work: RankWork = {
      place: {
        tensorRank: r,
        tensorSize: shares.length,
        stage,
        stages,
        layers: range,
        heads: kvHeads * (config.heads / config.kvHeads),
        kvHeads,
        vocabFirst: vocab?.[r] ?? 0,
        vocabRows: rows,
      },
      weights: stage === 0 ? profile.embedding : 0,
      read: 0,
      readExperts: 0,
      multiplyAdds: 0,
      headMultiplyAdds: 0,
      widest: 0,
    };
    for (const { layer, count } of kinds) {
      work.read += count * (layer.fixed + (r === 0 ? layer.once : 0));
      work.multiplyAdds += count * layer.fixedMultiplyAdds;
      add(work, layer.attention, kvHeads, count);
      for (const mlp of layer.mlps) {
        const columns = width(bounds(mlp.count, mlp.unit), r);
        work.widest = Math.max(work.widest, columns);
        add(work, mlp, columns, count);
      }
    }
    if (last) {
      work.read += profile.finalNorm;
      const before = work.multiplyAdds;
      add(work, profile.head, rows, 1);
      work.headMultiplyAdds = work.multiplyAdds - before;
      work.multiplyAdds = before;
    }
    work.weights = Math.round(work.weights + work.read + work.readExperts);
    return work;
  });
}

function width(bounds: readonly number[], r: number): number {
  return (bounds[r + 1] ?? 0) - (bounds[r] ?? 0);
}

/** A share of `times` things that are alike. */
function add(work: RankWork, part: Divided, share: number, times: number): void {
  if (share === 0) return;
  const fraction = share / part.count;
  work[part.expert ? "readExperts" : "read"] += times * (part.bytes * fraction + part.any);
  work.multiplyAdds += times * part.multiplyAdds * fraction;
}
