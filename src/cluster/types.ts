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
  /** What else the prediction needs; null = not measured. */
  speed: NodeSpeed | null;
  /** RDMA devices of this node, or why it takes no part in RDMA. */
  rdma: RdmaSurvey;
  models: ModelPresence[];
  /** Instances that this node owns. */
  instances: InstanceState[];
  /** Ranks that this node computes, for whichever owner. */
  ranks: RankState[];
  /** Instances whose owner is gone, as this node knew them last: one of the survivors places them again. */
  orphans: InstanceState[];
  /** Instances that were stopped on purpose, so that nobody places them again. */
  ended: EndedInstance[];
}

/** A device as its node sees it. One that is no use says why in `problem`. */
export interface RdmaDevice {
  name: string;
  /** Its port is up: a cable is in. */
  active: boolean;
  /** IPv4 address of its GID; "" = none. */
  address: string;
  /** "" = none. */
  problem: string;
}

export type RdmaSurvey = { devices: RdmaDevice[] } | { reason: string };

/** Speed of a node beside its bandwidth. Microseconds unless said otherwise. */
export interface NodeSpeed {
  /** Multiply-adds/s of a prompt's matrix products; 0 = unknown. */
  multiplyAdds: number;
  /** What a decode step takes beside reading weights and cache: once on the node (taking up the step, the first launch, handing the result
   * on), for each dense layer, for each layer with experts. */
  stepUs: number;
  denseLayerUs: number;
  moeLayerUs: number;
  /** Handing a hidden state from the device to the transport and back, for each exchange. */
  handoverUs: number;
}

/** What a node has of a model. */
export interface ModelPresence {
  model: string;
  /** Bytes on disk and bytes of the whole checkpoint. */
  bytes: number;
  total: number;
}

/** Measured from one node to another when they meet; tcp again every minute. */
export interface Link {
  from: NodeId;
  to: NodeId;
  kind: "tcp" | "rdma";
  /** Round trip, microseconds, median. */
  latencyUs: number;
  /** Bytes/s. */
  bandwidth: number;
  /** rdma: the devices at both ends of the cable. */
  devices?: [from: string, to: string];
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

/** What was asked for. Placing the instance again starts from it; absent = chosen by the plan. */
export interface PlacementRequest {
  tensor?: number;
  pipeline?: number;
  /** Only these nodes. */
  nodes?: NodeId[];
  context?: number;
  streams?: number;
}

export interface InstanceSpec {
  /** UUID. */
  id: string;
  model: string;
  asked: PlacementRequest;
  tensor: number;
  pipeline: number;
  /** By rank. ranks[0].node owns the instance. */
  ranks: RankShare[];
  /** By rank: what it takes of its node's memory by plan. */
  bytes: number[];
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
  /** Nodes that it ran on and lost; when they are back it may move to them again. */
  lost: NodeId[];
  /** Idle instances whose memory it waits for: their owners stop them. */
  unload: string[];
  /** When its last request ended, by the owner's clock: the one that was used longest ago is unloaded first. */
  usedAt: number;
}

/** Written by the node that computes the rank. */
export interface RankState {
  instance: string;
  /** Of the instance; of an older epoch it means nothing any more. */
  epoch: number;
  /** Who asked for it: after a partition two nodes may own the same instance for a moment. */
  owner: NodeId;
  rank: number;
  phase: "fetching" | "loading" | "ready" | "failed";
  /** 0 to 1 while fetching or loading. */
  progress: number;
  /** Where it failed: why, and of what kind. group: the ranks lost each other; process: the runner died. */
  reason: string;
  cause: "none" | "memory" | "files" | "group" | "process";
  /** Planned bytes that the node's ledger holds for it. */
  bytes: number;
}

/** Ids are never used again, so whatever epoch somebody else may have brought it to, it is to stop. */
export interface EndedInstance {
  id: string;
  /** When it was stopped, for people. */
  epoch: number;
}

/** One node's last value. Newer = higher incarnation, then higher boot, then higher version. */
export interface NodeRecord {
  info: NodeInfo;
  links: Link[];
  /** Random text of one run of the node: tells two nodes with one key apart. */
  boot: string;
  /** Counts up with every change of the record. */
  version: number;
}

/** What a node knows of another one's record without the record itself. */
export interface Digest {
  id: NodeId;
  incarnation: number;
  boot: string;
  version: number;
  /** Counts up while the node lives. */
  beat: number;
  /** Since the sender saw the beat rise, by its monotonic clock. */
  ageMs: number;
}

/** The only message of the membership. Any of them may be lost, doubled or late. */
export interface Exchange {
  cluster: string;
  protocol: number;
  from: NodeId;
  boot: string;
  /** Of the sender first, then of all nodes in its view. */
  digests: Digest[];
  records: NodeRecord[];
  /** Nodes whose newer records the sender asks for. */
  want: NodeId[];
  /** The sender is going away. */
  leaving: boolean;
}
