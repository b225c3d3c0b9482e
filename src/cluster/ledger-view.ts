// Every node's memory as a person asks for it: what is loaded, what is left, and for each model what context would fit there, now or after
// which idle instances went. From the nodes' records alone, so any node can tell it of all. Pure.

import { PLANNED_SHARE } from "../model/memory-plan.ts";
import type { ModelTerms } from "./instance-placer.ts";
import type { Member } from "./membership.ts";
import { MemoryLedger } from "./memory-ledger.ts";
import { rankWorks } from "./model-profile.ts";
import { DEFAULT_CONTEXT, STEP_TOKENS, usableBytes } from "./placement.ts";
import { longestContext, rankMemory } from "./rank-memory.ts";
import type { InstanceState, NodeId } from "./types.ts";
import { sharesOf } from "./uneven-shares.ts";

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

/** models: whose headers are known, by name. */
export function ledgersOf(
  members: readonly Member[],
  models: ReadonlyMap<string, ModelTerms>,
): Map<NodeId, NodeLedger> {
  const instances = new Map<string, InstanceState>();
  for (const { record } of members)
    for (const state of record.info.instances) {
      const other = instances.get(state.spec.id);
      if (other === undefined || state.epoch > other.epoch) instances.set(state.spec.id, state);
    }
  const needs = [...models].map(([model, terms]) => ({ model, ...needOf(terms) }));
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
      const next = needs.map(({ model, fixed, kv, context, longest }): NextModel => {
        const bytes = fixed + kv;
        const unload = bytes <= free ? [] : ledger.wouldUnload(bytes);
        const idle = loaded.reduce((sum, rank) => sum + (rank.busy ? 0 : rank.bytes), 0);
        return {
          ...{ model, bytes, default_context: context, context_that_fits: longest(free - fixed) },
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

/** What the whole model takes on one node: beside its cache, its cache at the default context, and the context for a room in bytes. */
function needOf(terms: ModelTerms): Need {
  const known = NEEDS.get(terms) ?? measure(terms);
  NEEDS.set(terms, known);
  return known;
}

interface Need {
  fixed: number;
  kv: number;
  context: number;
  longest: (room: number) => number;
}

/** Adding up a model's tensors takes a millisecond, and states are asked for often. */
const NEEDS = new WeakMap<ModelTerms, Need>();

function measure({ profile, kvType, threads }: ModelTerms): Need {
  const { config } = profile;
  const works = rankWorks(profile, sharesOf([0, config.layers.length], [[1]]));
  const [whole] = works;
  const context = Math.min(DEFAULT_CONTEXT, config.contextLength);
  if (whole === undefined) return { fixed: 0, kv: 0, context, longest: () => 0 };
  const terms = { context, streams: 1, kvType, threads, maxTokens: STEP_TOKENS, maxLogits: 1 };
  const { weights, kv, scratch } = rankMemory(profile, whole, terms);
  return {
    ...{ fixed: weights + scratch, kv, context },
    longest: (room) => (room <= 0 ? 0 : longestContext(profile, works, [room], terms)),
  };
}
