// Schemas of what nodes tell each other of themselves (types.ts). Everything from another node passes here once; every
// text and every list is bounded. A field that this version does not know is dropped.

import * as v from "valibot";
import type { Exchange, InstanceSpec, InstanceState, NodeInfo, NodeRecord } from "../types.ts";
import { AddressSchema, NameSchema, NodeIdSchema } from "./cluster-file.ts";

const MOST_NODES = 256;
const MOST_RANKS = 64;
const MOST_INSTANCES = 64;
const MOST_MODELS = 512;
const MOST_DEVICES = 32;

const count = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const amount = v.pipe(v.number(), v.finite(), v.minValue(0));
const fraction = v.pipe(v.number(), v.minValue(0), v.maxValue(1));
const sentence = v.pipe(v.string(), v.maxLength(2000));
const word = v.pipe(v.string(), v.maxLength(120));
const modelName = v.pipe(v.string(), v.minLength(1), v.maxLength(512));
const uuid = v.pipe(v.string(), v.uuid());
const positive = (most: number) => v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(most));
const listOf = <T>(item: v.GenericSchema<unknown, T>, most: number) =>
  v.pipe(v.array(item), v.maxLength(most));

const RankShareSchema = v.object({
  node: NodeIdSchema,
  rank: count,
  stage: count,
  tensorRank: count,
  layers: v.tuple([count, count]),
  weight: amount,
});

/** What was asked of a placement, from a person or another node. */
export const PlacementRequestSchema = v.object({
  tensor: v.exactOptional(positive(MOST_RANKS)),
  pipeline: v.exactOptional(positive(MOST_RANKS)),
  nodes: v.exactOptional(listOf(NodeIdSchema, MOST_NODES)),
  context: v.exactOptional(positive(1 << 28)),
  streams: v.exactOptional(positive(4096)),
});

export const InstanceSpecSchema: v.GenericSchema<unknown, InstanceSpec> = v.object({
  id: uuid,
  model: modelName,
  asked: PlacementRequestSchema,
  tensor: positive(MOST_RANKS),
  pipeline: positive(MOST_RANKS),
  /** Empty before it is placed for the first time. */
  ranks: listOf(RankShareSchema, MOST_RANKS),
  bytes: listOf(amount, MOST_RANKS),
  context: v.pipe(count, v.maxValue(1 << 28)),
  streams: positive(4096),
  transport: v.picklist(["auto", "shm", "rdma", "tcp"]),
});

const InstanceStateSchema: v.GenericSchema<unknown, InstanceState> = v.object({
  spec: InstanceSpecSchema,
  phase: v.picklist(["placing", "fetching", "loading", "ready", "failed", "stopping", "gone"]),
  epoch: count,
  progress: fraction,
  reason: sentence,
  outstandingTokens: amount,
  lost: listOf(NodeIdSchema, MOST_NODES),
  unload: listOf(uuid, MOST_INSTANCES),
  usedAt: amount,
});

const RankStateSchema = v.object({
  instance: uuid,
  epoch: count,
  owner: NodeIdSchema,
  rank: count,
  phase: v.picklist(["fetching", "loading", "ready", "failed"]),
  progress: fraction,
  reason: sentence,
  cause: v.picklist(["none", "memory", "files", "group", "process"]),
  bytes: amount,
});

const NodeInfoSchema: v.GenericSchema<unknown, NodeInfo> = v.object({
  id: NodeIdSchema,
  name: NameSchema,
  protocol: count,
  version: word,
  incarnation: count,
  addresses: listOf(AddressSchema, 32),
  os: word,
  chip: word,
  device: v.picklist(["cpu", "metal"]),
  memory: v.object({ total: amount, available: amount }),
  bandwidth: amount,
  speed: v.nullable(
    v.object({
      multiplyAdds: amount,
      stepUs: amount,
      denseLayerUs: amount,
      moeLayerUs: amount,
      handoverUs: amount,
    }),
  ),
  rdma: v.union([
    v.object({
      devices: listOf(
        v.object({ name: word, active: v.boolean(), address: word, problem: sentence }),
        MOST_DEVICES,
      ),
    }),
    v.object({ reason: sentence }),
  ]),
  models: listOf(v.object({ model: modelName, bytes: amount, total: amount }), MOST_MODELS),
  instances: listOf(InstanceStateSchema, MOST_INSTANCES),
  ranks: listOf(RankStateSchema, MOST_INSTANCES),
  orphans: listOf(InstanceStateSchema, MOST_INSTANCES),
  ended: listOf(v.object({ id: uuid, epoch: count }), 1024),
});

const boot = v.pipe(v.string(), v.maxLength(64));

const NodeRecordSchema: v.GenericSchema<unknown, NodeRecord> = v.object({
  info: NodeInfoSchema,
  links: listOf(
    v.object({
      from: NodeIdSchema,
      to: NodeIdSchema,
      kind: v.picklist(["tcp", "rdma"]),
      latencyUs: amount,
      bandwidth: amount,
      devices: v.exactOptional(v.tuple([word, word])),
    }),
    2 * MOST_NODES,
  ),
  boot,
  version: count,
});

/** Parameters of calls that ask for a placement. */
export const PlacementCallSchema = v.object({ model: modelName, asked: PlacementRequestSchema });

/** Parameters of calls that name an instance. */
export const InstanceCallSchema = v.object({ id: uuid });

/** The membership's message. */
export const ExchangeSchema: v.GenericSchema<unknown, Exchange> = v.object({
  cluster: word,
  protocol: count,
  from: NodeIdSchema,
  boot,
  digests: listOf(
    v.object({
      id: NodeIdSchema,
      incarnation: count,
      boot,
      version: count,
      beat: count,
      ageMs: amount,
    }),
    MOST_NODES,
  ),
  records: listOf(NodeRecordSchema, MOST_NODES),
  want: listOf(NodeIdSchema, MOST_NODES),
  leaving: v.boolean(),
});
