// What the parts of the cluster say to each other: nodes, links, models on disk, instances. Pure data, sent as JSON between
// nodes after valibot has checked it (wire.ts). Bytes are numbers of bytes, times are milliseconds since 1970 of the node that wrote them.

/** Lower-case hex of the SHA-256 of a node's public key; persistent. */
export type NodeId = string;

export interface NodeInfo {
  id: NodeId;
  /** Shown to people; not unique. */
  name: string;
  /** CARAVAN_PROTOCOL of the build, see protocol-version.ts. */
  protocol: number;
  version: string;
  /** Counts up at every start of the node, so that a restarted node replaces itself. */
  incarnation: number;
  /** host:port of the control plane (TLS), most preferred first. */
  addresses: string[];
  os: string;
  /** Processor or chip, as a person would name it. */
  chip: string;
  device: "cpu" | "metal";
  memory: { total: number; available: number };
  /** Bytes/s that one decode step can read; measured, 0 = unknown. */
  bandwidth: number;
  /** Can this node take part in RDMA: device name, or why not. */
  rdma: { device: string } | { reason: string };
  models: ModelPresence[];
  instances: InstanceState[];
}

/** What a node has of a model. */
export interface ModelPresence {
  model: string;
  /** Bytes on disk and bytes of the whole checkpoint. */
  bytes: number;
  total: number;
}

/** Measured from one node to another when they meet and every minute. */
export interface Link {
  from: NodeId;
  to: NodeId;
  kind: "tcp" | "rdma";
  /** Round trip, microseconds, median. */
  latencyUs: number;
  /** Bytes/s. */
  bandwidth: number;
}

/** One rank of an instance: what it computes. */
export interface RankShare {
  node: NodeId;
  rank: number;
  stage: number;
  tensorRank: number;
  /** Global layer numbers [first, end). */
  layers: [first: number, end: number];
  /** Share of the tensor group in units (KV heads, groups) relative to the others; equal shares are all 1. */
  weight: number;
}

export interface InstanceSpec {
  /** UUID. */
  id: string;
  model: string;
  tensor: number;
  pipeline: number;
  /** By rank. ranks[0].node owns the instance. */
  ranks: RankShare[];
  context: number;
  streams: number;
  transport: "auto" | "shm" | "rdma" | "tcp";
}

export type InstancePhase = "placing" | "fetching" | "loading" | "ready" | "failed" | "stopping" | "gone";

/** Written by the owner only; others repeat it. */
export interface InstanceState {
  spec: InstanceSpec;
  phase: InstancePhase;
  /** Counts up when the ranks are connected anew. */
  epoch: number;
  /** 0 to 1 while fetching or loading. */
  progress: number;
  /** Why it failed, or what is missing; a sentence. */
  reason: string;
  outstandingTokens: number;
}
