// What a rank process is told and what it says: one JSON object a line, as a runner's (protocol.ts). Whoever makes the ranks
// of an instance (the process of rank 0 on one machine, nodes on several) carries the addresses from each to all, has all of
// them connect at once, and then load.

import * as v from "valibot";
import type { ErrorRecord } from "./protocol.ts";

export const TRANSPORTS = ["auto", "shm", "rdma", "tcp"] as const;
export type TransportChoice = (typeof TRANSPORTS)[number];

export const RDMA_QUEUE_PAIRS = ["uc", "rc", "uc-apple-rules"] as const;

const count = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(most));
const index = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(most));
const hex = (bytes: number) => v.pipe(v.string(), v.regex(new RegExp(`^[0-9a-f]{${2 * bytes}}$`)));

/** Most ranks of an instance (cv_group_options). */
export const MOST_RANKS = 64;

/** This rank's end of the group: first line on a rank's stdin. */
export const GroupOptionsSchema = v.strictObject({
  rank: index(MOST_RANKS - 1),
  size: count(MOST_RANKS),
  transport: v.picklist(TRANSPORTS),
  /** Counts up when the ranks of an instance are connected anew. */
  epoch: index(Number.MAX_SAFE_INTEGER),
  /** Session key and instance id, hexadecimal; the same on all ranks. */
  key: hex(32),
  instance: hex(16),
  /** Under which the other ranks reach this one over TCP; absent = loopback only. */
  host: v.exactOptional(v.pipe(v.string(), v.maxLength(255))),
  /** By rank with commas, or one for all (cv_group_options); absent = any that has a port that is up. */
  rdmaDevice: v.exactOptional(v.pipe(v.string(), v.maxLength(511))),
  /** Why this rank takes no part in RDMA; absent = it may. */
  noRdma: v.exactOptional(v.pipe(v.string(), v.maxLength(199))),
  /** Queue pairs, the same on all ranks: unreliable (under the rules of Apple's devices, too) or reliable. Absent = the system's. */
  rdmaQueuePairs: v.exactOptional(v.picklist(RDMA_QUEUE_PAIRS)),
  /** A peer that sends nothing for so long while somebody waits is dead. */
  silenceMs: v.exactOptional(count(600_000)),
});
export type GroupOptions = v.InferOutput<typeof GroupOptionsSchema>;

const ShareSchema = v.strictObject({
  rank: index(MOST_RANKS - 1),
  stage: index(MOST_RANKS - 1),
  tensorRank: index(MOST_RANKS - 1),
  layers: v.strictTuple([index(4096), index(4096)]),
  weight: v.pipe(v.number(), v.finite(), v.minValue(0)),
});

/** What all ranks of a model must agree on; chosen once, where rank 0 is. */
export const EngineSizesSchema = v.strictObject({
  compute: v.picklist(["exact", "fast"]),
  pageTokens: count(128),
  fullPages: index(2 ** 31),
  chunkPages: index(2 ** 31),
  kvType: v.picklist(["f32", "f16", "bf16", "q8"]),
  maxRows: count(4096),
  maxTokens: count(65536),
  maxLogits: count(65536),
  slots: count(65536),
  checkRanks: v.exactOptional(v.boolean()),
});
export type EngineSizes = v.InferOutput<typeof EngineSizesSchema>;

/** Every rank of the model, in order. */
const SharesSchema = v.pipe(v.array(ShareSchema), v.minLength(1), v.maxLength(MOST_RANKS));

/** What rank 0's process is told where nodes start the ranks, instead of how many to start itself. */
export const InstanceSchema = v.strictObject({
  group: GroupOptionsSchema,
  shares: SharesSchema,
  sizes: EngineSizesSchema,
});
export type Instance = v.InferOutput<typeof InstanceSchema>;

export const RankLoadSchema = v.strictObject({
  /** Folder with config.json and safetensors files on the rank's machine. */
  modelDir: v.string(),
  shares: SharesSchema,
  sizes: EngineSizesSchema,
  threads: count(256),
  device: v.exactOptional(v.picklist(["cpu", "metal"])),
  /** CV_CPU_*; absent = the machine's best. */
  cpuLevel: v.exactOptional(index(255)),
});
export type RankLoad = v.InferOutput<typeof RankLoadSchema>;

/** addresses: of all ranks, in order, as they came in their `address` messages. */
export const ConnectSchema = v.strictObject({
  type: v.literal("connect"),
  addresses: v.pipe(v.array(v.pipe(v.string(), v.base64())), v.maxLength(MOST_RANKS)),
  timeout_ms: count(600_000),
});

export const RankCommandSchema = v.variant("type", [
  ConnectSchema,
  v.strictObject({ type: v.literal("load"), load: RankLoadSchema }),
  /** Between two ranks that are connected, both at the same time. */
  v.strictObject({ type: v.literal("measure"), most_ms: count(10_000) }),
  v.strictObject({ type: v.literal("status") }),
  v.strictObject({ type: v.literal("shutdown") }),
]);
export type RankCommand = v.InferOutput<typeof RankCommandSchema>;

/** Bytes, as a rank's engine counts them. */
export interface RankMemory {
  weights_mapped: number;
  weights_copied: number;
  kv: number;
  scratch: number;
}

/** What connecting chose. */
export interface Connection {
  transport: "shm" | "rdma" | "tcp";
  /** Why a faster transport was not taken; "" when there is nothing to say. */
  note: string;
  /** Median round trip to the farthest rank, microseconds. */
  round_trip_us: number;
}

/** What a connection of two ranks gives. */
export interface LinkMeasure {
  /** Median, microseconds. */
  roundTripUs: number;
  /** Bytes/s, one way. */
  bandwidth: number;
}

export function addressText(address: Uint8Array): string {
  return Buffer.from(address).toString("base64");
}

export function addressBytes(text: string): Uint8Array {
  return new Uint8Array(Buffer.from(text, "base64"));
}

export type RankMessage =
  /** base64 */
  | { type: "address"; address: string }
  | ({ type: "connected" } & Connection)
  | { type: "measured"; round_trip_us: number; bandwidth: number }
  | { type: "loading"; bytes: number }
  | { type: "ready"; memory: RankMemory; threads: number; cpu: string }
  | { type: "status"; rank: number; exchange_ns: number; compute_ns: number; peak_resident_bytes: number }
  | { type: "fatal"; error: ErrorRecord };
