// What the node of a rank and the owner of its instance say to each other, on a connection of purpose "rank" that the
// rank's node opens when it has read the owner's record. It lives as long as the rank: its end is the rank's end, on both sides.
//
//   rank's node                     owner (node of rank 0)
//   which rank it is          →
//                             ←     session key, shares and sizes
//   its address in the group  →
//                             ←     all addresses: connect, then load
//   connected, ready          →
//   memory, now and then      →
//   ended, with the reason    →  or  ←  the connection ends

import * as v from "valibot";
import {
  EngineSizesSchema,
  GroupOptionsSchema,
  InstanceSchema,
  MOST_RANKS,
} from "../../engine/rank-protocol.ts";

const index = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const error = v.record(v.string(), v.unknown());

export const RankAskSchema = v.object({
  instance: v.pipe(v.string(), v.uuid()),
  epoch: index,
  rank: v.pipe(index, v.minValue(1), v.maxValue(MOST_RANKS - 1)),
});
export type RankAsk = v.InferOutput<typeof RankAskSchema>;

const address = v.pipe(v.string(), v.base64(), v.maxLength(8192));

/** Frames from the owner. */
export const OwnerFrameSchema = v.variant("type", [
  v.object({
    type: v.literal("begin"),
    /** Without `host`: a rank's node knows best under which address the others reach it. */
    group: GroupOptionsSchema,
    shares: InstanceSchema.entries.shares,
    sizes: EngineSizesSchema,
  }),
  v.object({
    type: v.literal("connect"),
    addresses: v.pipe(v.array(address), v.maxLength(MOST_RANKS)),
    timeout_ms: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(600_000)),
  }),
  /** Why there is no such rank to compute (any more). */
  v.object({ type: v.literal("refused"), error }),
]);
export type OwnerFrame = v.InferOutput<typeof OwnerFrameSchema>;

/** Frames from the rank's node, after RankAsk. */
export const RankFrameSchema = v.variant("type", [
  v.object({ type: v.literal("address"), address }),
  v.object({ type: v.literal("connected") }),
  v.object({ type: v.literal("ready") }),
  /** Most that the rank's process had resident so far. */
  v.object({ type: v.literal("memory"), peak_resident_bytes: index }),
  v.object({ type: v.literal("ended"), error }),
]);
export type RankFrame = v.InferOutput<typeof RankFrameSchema>;

/** How long the ranks have to connect once all have started. */
export const CONNECT_LIMIT_MS = 20_000;
/** How long all ranks of an epoch have to start and give their addresses. */
export const START_LIMIT_MS = 30_000;
