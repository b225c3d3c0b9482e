// Every node's memory as a person asks for it: what is loaded, what is left, and for each model what context would fit there, now or after
// which idle instances went. From the nodes' records alone, so any node can tell it of all. Pure.

import { PLANNED_SHARE } from "../model/memory-plan.ts";
import type { Member } from "./membership.ts";
import { MemoryLedger } from "./memory-ledger.ts";
import { contextFor, type ModelNeed, neededBytes } from "./model-need.ts";
import { usableBytes } from "./placement.ts";
import type { InstanceState, NodeId } from "./types.ts";

/** Bytes. */
export interface NodeLedger {
  /** What models may have in all; of it promised to ranks; what is left. */
  planned: number;
  reserved: number;
  free: number;
  loaded: LoadedRank[];
  next: NextModel[];
}

export interface LoadedRank {
  instance: string;
  model: string;
  rank: number;
  bytes: number;
  /** Runs requests, or loads. */
  busy: boolean;
}

/** A model on this node alone, with one stream. */
export interface NextModel {
  model: string;
  /** With the context that is planned where none is asked for. */
  bytes: number;
  default_context: number;
  /** The longest context that fits into what is free; 0: the model does not. */
  context_that_fits: number;
  /** Instances that would be unloaded for it, those used longest ago first; empty: none has to go. */
  unload: string[];
  /** Bytes that are missing even then; 0: it fits. */
  missing: number;
}

/** models: what is known of them, by name. */
export function ledgersOf(
  members: readonly Member[],
  models: ReadonlyMap<string, ModelNeed>,
): Map<NodeId, NodeLedger> {
  const instances = new Map<string, InstanceState>();
  for (const { record } of members)
    for (const state of record.info.instances) {
      const other = instances.get(state.spec.id);
      if (other === undefined || state.epoch > other.epoch) instances.set(state.spec.id, state);
    }
  return new Map(
    members.map(({ record: { info } }) => {
      const free = usableBytes(info);
      const ranks = info.ranks.filter(({ bytes }) => bytes > 0);
      const reserved = ranks.reduce((sum, { bytes }) => sum + bytes, 0);
      const loaded = ranks.map(({ instance, rank, bytes }): LoadedRank => {
        const state = instances.get(instance);
        return { instance, model: state?.spec.model ?? "", rank, bytes, busy: !isIdle(state) };
      });
      const ledger = new MemoryLedger((free + reserved) / PLANNED_SHARE + 1);
      for (const { instance, model, bytes, busy } of loaded)
        ledger.reserve({
          ...{ key: instance, label: model, bytes, busy },
          usedAt: instances.get(instance)?.usedAt ?? 0,
        });
      const next = [...models].map(([model, need]): NextModel => {
        const bytes = neededBytes(need, need.defaultContext);
        const unload = bytes <= free ? [] : ledger.wouldUnload(bytes);
        const idle = loaded.reduce((sum, rank) => sum + (rank.busy ? 0 : rank.bytes), 0);
        return {
          ...{ model, bytes, default_context: need.defaultContext },
          context_that_fits: contextFor(need, free),
          unload: unload?.map(({ key }) => key) ?? [],
          missing: unload === undefined ? bytes - free - idle : 0,
        };
      });
      return [info.id, { planned: free + reserved, reserved, free, loaded, next }];
    }),
  );
}

/** As the owners of instances judge (instance-life.ts): ready, and nothing runs. */
function isIdle(state: InstanceState | undefined): boolean {
  return state?.phase === "ready" && state.outstandingTokens === 0;
}
