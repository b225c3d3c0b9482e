// What a runner is told about the model to load: the first line on its stdin.

import * as v from "valibot";
import { InstanceSchema, MOST_RANKS, TRANSPORTS } from "./rank-protocol.ts";

const count = (high: number) => v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(high));

export const LoadOptionsSchema = v.strictObject({
  /** Name that requests use. */
  model: v.string(),
  /** Folder with config.json and safetensors files. */
  modelDir: v.string(),
  /** Longest sequence in tokens; default: what the model and memory allow. */
  context: v.exactOptional(count(1 << 28)),
  /** Sequences that run at once; default: chosen from the context and memory. */
  streams: v.exactOptional(count(4096)),
  /** Requests that may wait beside those that run. */
  maxQueue: v.exactOptional(v.pipe(v.number(), v.integer(), v.minValue(0))),
  threads: v.exactOptional(count(256)),
  device: v.exactOptional(v.picklist(["auto", "cpu", "metal"])),
  compute: v.exactOptional(v.picklist(["fast", "exact"])),
  /** Kernel set to force, by name (see cv_cpu_name). */
  cpu: v.exactOptional(v.string()),
  /** Bits of the cache's elements: 16 (the model's own type) or 8. */
  kvBits: v.exactOptional(v.picklist([8, 16])),
  /** Whether prefixes that are still in the cache's pages are used again; default true. */
  prefixCache: v.exactOptional(v.boolean()),
  /** Whether drafts are looked up in the text so far and checked several at a time; default true. */
  speculate: v.exactOptional(v.boolean()),
  scheduling: v.exactOptional(v.picklist(["auto", "sequential", "batched"])),
  /** Ranks on this machine, processes of their own: tensor ranks a stage, and stages of a pipeline; default 1 and 1. */
  tensor: v.exactOptional(count(MOST_RANKS)),
  pipeline: v.exactOptional(count(MOST_RANKS)),
  /** Between ranks; default auto. */
  transport: v.exactOptional(v.picklist(TRANSPORTS)),
  /** Ranks of a stage compare checksums of their hidden states after every step (tests). */
  checkRanks: v.exactOptional(v.boolean()),
  /** Rank 0 of ranks that nodes start, instead of ranks on this machine. `context` and what the sizes hold are the instance's. */
  instance: v.exactOptional(InstanceSchema),
});

export type LoadOptions = v.InferOutput<typeof LoadOptionsSchema>;

/** How a model is split over ranks of this machine. */
export type RankOptions = Pick<LoadOptions, "tensor" | "pipeline" | "transport" | "checkRanks">;
