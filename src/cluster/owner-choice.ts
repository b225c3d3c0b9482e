// Which node is to own a new instance: the owner computes rank 0, so the placement decides, not the node that happened to be asked. Pure.

import type { Placer } from "./instance-placer.ts";
import type { Member } from "./membership.ts";
import { hasModel } from "./orphans.ts";
import type { NodeId, PlacementRequest } from "./types.ts";

/** Planning for each of many nodes that have a model would take too long; the fastest ones are enough. */
const MOST_TRIED = 4;

/**
 * The node of rank 0 in the best placement, if it has the model; else of those that have it the one with which the best placement
 * begins. self: answers where nothing is to be gained elsewhere, and where nothing fits: it has the model and can say why.
 */
export function chooseOwner(
  placer: Placer,
  model: string,
  asked: PlacementRequest,
  members: readonly Member[],
  self: NodeId,
): NodeId {
  const direct = members.filter((member) => member.direct);
  const best = placer.place(model, asked, direct, {});
  const first = best.kind === "placed" ? best.placement.ranks[0]?.node : undefined;
  if (first === undefined || first === self) return self;
  if (hasModel(first, model, direct)) return first;
  const holders = direct
    .filter(({ record: { info } }) => info.id !== self && hasModel(info.id, model, direct))
    .sort((a, b) => b.record.info.bandwidth - a.record.info.bandwidth)
    .slice(0, MOST_TRIED)
    .map(({ record }) => record.info.id);
  let owner = self;
  let fastest = speedWith(placer, model, asked, direct, self);
  for (const holder of holders) {
    const speed = speedWith(placer, model, asked, direct, holder);
    if (speed <= fastest) continue;
    fastest = speed;
    owner = holder;
  }
  return owner;
}

/** Tokens/s of the best placement whose rank 0 is the node's; -1 where there is none. */
function speedWith(
  placer: Placer,
  model: string,
  asked: PlacementRequest,
  members: readonly Member[],
  first: NodeId,
): number {
  const result = placer.place(model, asked, members, { first });
  return result.kind === "placed" ? result.speed : -1;
}
