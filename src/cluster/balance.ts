// Which of several instances of a model a request goes to: the ready one with the fewest outstanding tokens.
// An owner's own count is late by a beat, so what this node sent itself counts from the moment it is sent, and what its own
// instances do from the moment it is known here. Pure.

import type { Member } from "./membership.ts";
import type { InstanceState, NodeId } from "./types.ts";

export interface Choice {
  instance: string;
  epoch: number;
  owner: NodeId;
}

/** Instances that may get a request for the model: ready, and their owner reachable from here. */
export function readyInstances(
  model: string,
  members: readonly Member[],
): (InstanceState & { owner: NodeId })[] {
  return members.flatMap(({ direct, record }) =>
    direct
      ? record.info.instances
          .filter(({ phase, spec }) => phase === "ready" && spec.model === model)
          .map((state) => ({ ...state, owner: record.info.id }))
      : [],
  );
}

/** Tokens that this node has sent to each instance and that are not answered yet. */
export class Outstanding {
  readonly #sent = new Map<string, number>();

  add(instance: string, tokens: number): void {
    this.#sent.set(instance, this.of(instance) + tokens);
  }

  remove(instance: string, tokens: number): void {
    const left = this.of(instance) - tokens;
    if (left > 0) this.#sent.set(instance, left);
    else this.#sent.delete(instance);
  }

  of(instance: string): number {
    return this.#sent.get(instance) ?? 0;
  }
}

/** undefined: none is ready. What the owner reports includes what this node sent long ago, so the larger count holds. */
export function chooseInstance(
  model: string,
  members: readonly Member[],
  outstanding: Outstanding,
  own: (instance: string) => number = () => 0,
): Choice | undefined {
  let best: (Choice & { load: number }) | undefined;
  for (const { spec, epoch, owner, outstandingTokens } of readyInstances(model, members)) {
    const load = Math.max(outstandingTokens, outstanding.of(spec.id), own(spec.id));
    if (best === undefined || load < best.load || (load === best.load && spec.id < best.instance))
      best = { instance: spec.id, epoch, owner, load };
  }
  return best === undefined ? undefined : { instance: best.instance, epoch: best.epoch, owner: best.owner };
}
