// What makes a running instance go for others' or its own good: an idle one that is in the way of a model that somebody asked for,
// and one that a node which is back would serve better. Pure.

import { MOST_OWNED, MOVE_GAIN, RETURN_MS } from "./instance-limits.ts";
import type { PlacedSpec, Placer } from "./instance-placer.ts";
import { isIdle } from "./instance-view.ts";
import type { Member } from "./membership.ts";
import type { InstanceState, NodeId, PlacementRequest } from "./types.ts";

/** Ids of idle instances, those used longest ago first, without which `wanted` fits with `first` as its owner; as few as will do.
 * undefined: none would help. */
export function idleInTheWay(
  { spec }: InstanceState,
  members: readonly Member[],
  placer: Placer,
  first: NodeId,
): string[] | undefined {
  const idle = members
    .flatMap(({ record }) => record.info.instances)
    .filter((state) => isIdle(state) && state.spec.id !== spec.id)
    .sort((a, b) => a.usedAt - b.usedAt || (a.spec.id < b.spec.id ? -1 : 1));
  for (let count = 1; count <= Math.min(idle.length, MOST_OWNED); count++) {
    const freed = idle.slice(0, count);
    const result = placer.place(spec.model, spec.asked, members, { first, freed });
    if (result.kind === "placed") return freed.map((state) => state.spec.id);
  }
  return undefined;
}

/** Whether an instance that somebody asked for waits for this one to go. */
export function isInTheWay(state: InstanceState, members: readonly Member[]): boolean {
  if (!isIdle(state)) return false;
  return members.some(({ record }) =>
    record.info.instances.some(({ phase, unload }) => phase === "placing" && unload.includes(state.spec.id)),
  );
}

/** A lost node is back for a while, and with it the instance would be faster, or as it was asked for: where it would go. */
export function worthwhileMove(
  state: InstanceState,
  members: readonly Member[],
  placer: Placer,
  first: NodeId,
): PlacedSpec | undefined {
  const { spec, lost } = state;
  const direct = members.filter((member) => member.direct);
  const here = direct.filter(({ record, sinceMs }) => lost.includes(record.info.id) && sinceMs >= RETURN_MS);
  if (here.length === 0) return undefined;
  const best = placer.place(spec.model, spec.asked, direct, { first, freed: [state] });
  if (best.kind !== "placed") return undefined;
  const { placement, speed } = best;
  const ids = here.map(({ record }) => record.info.id);
  if (!placement.ranks.some(({ node }) => ids.includes(node))) return undefined;
  // What was asked for by its shape is kept to, whatever is predicted of it.
  if (!hasShape(spec, spec.asked) && hasShape(placement, spec.asked)) return placement;
  return speed > MOVE_GAIN * placer.speed(spec, direct) ? placement : undefined;
}

function hasShape(
  placed: { tensor: number; pipeline: number },
  { tensor = placed.tensor, pipeline = placed.pipeline }: PlacementRequest,
): boolean {
  return placed.tensor === tensor && placed.pipeline === pipeline;
}
