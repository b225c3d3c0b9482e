// The sizes that all ranks of an instance must agree on, from what it was placed for. The same numbers come out on every
// node, whatever memory that has; whether they fit there is for the placement to know. Pure.

import type { LoadPlan } from "../model/load-plan.ts";
import { type KvType, type MemoryPlan, planMemory } from "../model/memory-plan.ts";
import { PROMPT_LOGITS_A_STEP } from "../scheduler/scheduler.ts";
import type { EngineSizes } from "./rank-protocol.ts";

/** New tokens a step: enough for matrix products at full speed, few enough to answer a cancel soon. */
export const STEP_TOKENS = 512;

export interface InstanceTerms {
  /** Longest sequence, tokens. */
  context: number;
  /** Sequences that run at once. */
  streams: number;
  compute: "exact" | "fast";
  kvType: KvType;
}

/** Throws invalid_argument for a context beyond the model's limit. `plan`: of the whole model. */
export function instanceSizes(plan: LoadPlan, terms: InstanceTerms): EngineSizes {
  const { context, streams, compute, kvType } = terms;
  const maxTokens = Math.max(STEP_TOKENS, streams);
  const maxLogits = streams + PROMPT_LOGITS_A_STEP;
  const memory = planMemory(plan, {
    context,
    streams,
    kvType,
    threads: 1,
    maxTokens,
    maxLogits,
    available: Number.POSITIVE_INFINITY,
  });
  return engineSizes(memory, { compute, kvType, streams, maxTokens, maxLogits });
}

/** What an engine is opened with for a memory plan: a row and a slot for each stream. */
export function engineSizes(
  { pageTokens, fullPages, chunkPages }: MemoryPlan,
  terms: Pick<EngineSizes, "compute" | "kvType" | "maxTokens" | "maxLogits"> & { streams: number },
): EngineSizes {
  const { streams, ...same } = terms;
  return { ...same, pageTokens, fullPages, chunkPages, maxRows: streams, slots: streams };
}
