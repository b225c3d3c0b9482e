// Shares for ranks that are all alike: equal parts of every matrix, and stages that cost about the same. Pure.

import { type LoadPlan, tensorMemory } from "../model/load-plan.ts";
import { SLOT } from "../model/tensor-names.ts";
import type { Share } from "./shard.ts";
import { layerBounds } from "./split.ts";

/** Sequences a step. One alone gains nothing from stages; several touch more of the experts, and so the head weighs less. */
const ROWS = 4;

/**
 * tensor × pipeline ranks of one strength. A stage costs what a decode step of ROWS sequences reads of its weights: as many of the
 * experts as they are expected to touch, and the head on the last one.
 * Throws invalid_argument for more stages than layers.
 */
export function evenShares(plan: LoadPlan, tensor: number, pipeline: number): Share[] {
  const { layers, experts, expertsPerToken } = plan.config;
  const touched = experts === 0 ? 0 : 1 - (1 - expertsPerToken / experts) ** ROWS;
  const costs = new Array<number>(layers.length).fill(0);
  let head = 0;
  for (const t of plan.tensors) {
    const { mapped, copied } = tensorMemory(t);
    const read = (mapped + copied) * (t.experts > 1 ? touched : 1);
    if (t.layer >= 0) costs[t.layer] = (costs[t.layer] ?? 0) + read;
    else if (t.slot !== SLOT.embed) head += read;
  }
  const bounds = layerBounds(costs, pipeline, head);
  return Array.from({ length: tensor * pipeline }, (_, rank) => {
    const stage = Math.floor(rank / tensor);
    return {
      rank,
      stage,
      tensorRank: rank % tensor,
      layers: [bounds[stage] ?? 0, bounds[stage + 1] ?? 0] as [number, number],
      weight: 1,
    };
  });
}
