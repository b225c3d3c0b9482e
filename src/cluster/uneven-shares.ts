// Shares for nodes that differ: each takes as much as makes all finish together, but never more than its memory holds;
// what one has no room for goes to the others. Within a stage by weights, between stages by layers. Pure.

import type { ModelProfile } from "./model-profile.ts";
import type { Share } from "./shard.ts";

/** What a share must respect of a node. Bytes, bytes/s. */
export interface NodeStrength {
  /** Bytes that may be planned. */
  usable: number;
  /** Relative speed, above 0: bandwidth where known. */
  speed: number;
}

/** What layers and cache of the model take, for estimates; exact sizes are model-profile.ts's. */
export interface StageCosts {
  /** Bytes by layer, weights and cache of all streams. */
  held: readonly number[];
  /** Bytes by layer that a decode step reads. */
  read: readonly number[];
  /** On the first stage, on every one of its ranks. */
  embedding: number;
  /** On the last stage. */
  head: number;
  /** On every rank. */
  scratch: number;
}

export function stageCosts(
  profile: ModelProfile,
  cache: { full: number; chunked: number },
  scratch: number,
): StageCosts {
  const { config } = profile;
  const touched = config.experts === 0 ? 0 : config.expertsPerToken / config.experts;
  const held: number[] = [];
  const read: number[] = [];
  profile.layers.forEach((layer, i) => {
    const parts = [layer.attention, ...layer.mlps];
    const weights = parts.reduce((sum, part) => sum + part.bytes, layer.fixed);
    held.push(weights + (config.layers[i]?.chunked === true ? cache.chunked : cache.full));
    read.push(parts.reduce((sum, p) => sum + p.bytes * (p.expert ? touched : 1), layer.fixed));
  });
  return { held, read, embedding: profile.embedding, head: profile.head.bytes, scratch };
}

/**
 * Fractions of one whole, in proportion to speed, where nobody's is above its cap; what caps take away goes to the others.
 * Where all caps together are below the whole, each gets its cap, scaled up: the caller finds out what is missing.
 */
export function cappedFractions(speeds: readonly number[], caps: readonly number[]): number[] {
  const total = caps.reduce((sum, cap) => sum + cap, 0);
  if (total <= 1) return total > 0 ? caps.map((cap) => cap / total) : speeds.map(() => 1 / speeds.length);
  const capped = new Set<number>();
  for (;;) {
    const room = caps.reduce((left, cap, i) => (capped.has(i) ? left - cap : left), 1);
    const free = speeds.reduce((sum, speed, i) => (capped.has(i) ? sum : sum + speed), 0);
    const over = speeds.findIndex((speed, i) => !capped.has(i) && (room * speed) / free > (caps[i] ?? 0));
    if (over < 0) return speeds.map((speed, i) => (capped.has(i) ? (caps[i] ?? 0) : (room * speed) / free));
    capped.add(over);
  }
}

/** Weights of a tensor group: 1 for the largest share. Shares that are all nearly equal are all 1. */
export function weightsOf(fractions: readonly number[]): number[] {
  const most = Math.max(...fractions);
  const weights = fractions.map((fraction) => Math.round((fraction / most) * 1000) / 1000);
  return weights.every((weight) => weight > 0.99) ? weights.map(() => 1) : weights;
}

/**
 * Bounds of the stages' layers, of groups of nodes in the order of the pipe. alone: one stream, whose time is the sum
 * over stages; otherwise the slowest stage counts. Layers go where they fit; undefined where they fit nowhere.
 */
export function stageBounds(
  costs: StageCosts,
  groups: readonly (readonly NodeStrength[])[],
  alone: boolean,
): number[] | undefined {
  const layers = costs.held.length;
  const stages = groups.length;
  if (stages > layers) return undefined;
  if (stages === 1) return [0, layers];
  const held = prefixSums(costs.held);
  const read = prefixSums(costs.read);
  const rooms = groups.map((group, s) => {
    const each = costs.scratch + (s === 0 ? costs.embedding : 0);
    return group.reduce((sum, node) => sum + Math.max(0, node.usable - each), 0);
  });
  const speeds = groups.map((group) => group.reduce((sum, { speed }) => sum + speed, 0));
  const time = (first: number, end: number, s: number): number => {
    const head = s === stages - 1 ? costs.head : 0;
    if (span(held, first, end) + head > (rooms[s] ?? 0)) return Number.POSITIVE_INFINITY;
    return (span(read, first, end) + head) / (speeds[s] ?? 1);
  };
  let best = Array.from({ length: layers + 1 }, (_, end) => (end === 0 ? 0 : Number.POSITIVE_INFINITY));
  const from: number[][] = [];
  for (let s = 0; s < stages; s++) {
    const next = new Array<number>(layers + 1).fill(Number.POSITIVE_INFINITY);
    const begins = new Array<number>(layers + 1).fill(-1);
    for (let end = s + 1; end <= layers - (stages - 1 - s); end++)
      for (let first = s === 0 ? 0 : end - 1; first >= s; first--) {
        const own = time(first, end, s);
        // A longer stage only takes longer.
        if (own >= (next[end] ?? 0)) break;
        const before = best[first] ?? 0;
        const whole = alone ? before + own : Math.max(before, own);
        if (whole < (next[end] ?? 0)) {
          next[end] = whole;
          begins[end] = first;
        }
      }
    best = next;
    from.push(begins);
  }
  if (best[layers] === Number.POSITIVE_INFINITY) return undefined;
  const bounds = [layers];
  for (let s = stages - 1; s >= 0; s--) bounds.unshift(from[s]?.[bounds[0] ?? 0] ?? 0);
  return bounds;
}

/** Bounds in proportion to the groups' memory, every stage at least one layer: where nothing fits, to say what is missing. */
export function boundsByMemory(costs: StageCosts, groups: readonly (readonly NodeStrength[])[]): number[] {
  const layers = costs.held.length;
  const rooms = groups.map((group) => group.reduce((sum, { usable }) => sum + Math.max(usable, 1), 0));
  const total = rooms.reduce((sum, room) => sum + room, 0);
  const bounds = [0];
  let sum = 0;
  rooms.forEach((room, s) => {
    sum += room;
    const left = groups.length - 1 - s;
    const target = Math.round((layers * sum) / total);
    bounds.push(left === 0 ? layers : Math.min(layers - left, Math.max((bounds[s] ?? 0) + 1, target)));
  });
  return bounds;
}

/** Weights of one stage's ranks: by speed within memory, or in proportion to memory, which rounds most safely. */
export function stageWeights(
  costs: StageCosts,
  group: readonly NodeStrength[],
  [first, end]: readonly [number, number],
  place: { first: boolean; last: boolean },
  by: "speed" | "memory",
): number[] {
  const divided =
    costs.held.slice(first, end).reduce((sum, bytes) => sum + bytes, 0) + (place.last ? costs.head : 0);
  const each = costs.scratch + (place.first ? costs.embedding : 0);
  const caps = group.map(({ usable }) => Math.max(0, usable - each) / divided);
  const total = caps.reduce((sum, cap) => sum + cap, 0);
  if (by === "memory") return weightsOf(caps.map((cap) => (total > 0 ? cap / total : 1)));
  return weightsOf(
    cappedFractions(
      group.map(({ speed }) => speed),
      caps,
    ),
  );
}

/** Shares of a grid: stage s has layers [bounds[s], bounds[s + 1]), divided among its tensor ranks by weights[s]. */
export function sharesOf(bounds: readonly number[], weights: readonly (readonly number[])[]): Share[] {
  return weights.flatMap((stage, s) =>
    stage.map((weight, tensorRank) => ({
      rank: s * stage.length + tensorRank,
      stage: s,
      tensorRank,
      layers: [bounds[s] ?? 0, bounds[s + 1] ?? 0] as [number, number],
      weight,
    })),
  );
}

function prefixSums(list: readonly number[]): number[] {
  const out = [0];
  for (const n of list) out.push((out.at(-1) ?? 0) + n);
  return out;
}

function span(sums: readonly number[], first: number, end: number): number {
  return (sums[end] ?? 0) - (sums[first] ?? 0);
}
