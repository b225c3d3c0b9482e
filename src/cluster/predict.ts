// How fast a placement will be, from figures that nodes measure: T = a + b/n + c. b is what a step reads of weights and
// cache over the memory bandwidth (or its multiply-adds over the arithmetic, whichever takes longer), a what each layer
// costs beside that on every rank, c the exchange between ranks. Nothing in here is fitted to a model. Pure.

import type { ModelConfig } from "../model/config.ts";
import type { KvType } from "../model/memory-plan.ts";
import { pageBytes } from "../model/memory-plan.ts";
import type { RankWork } from "./model-profile.ts";
import type { Link, NodeId, NodeInfo, NodeSpeed } from "./types.ts";

/** What a prediction reads of a node. */
export type NodeFigures = Pick<NodeInfo, "id" | "name" | "device" | "bandwidth" | "speed">;

export interface PredictTerms {
  streams: number;
  kvType: KvType;
  /** Tokens that stand in the cache while decoding. */
  position: number;
  /** New tokens of a prefill step. */
  piece: number;
}

export interface Prediction {
  /** Tokens/s of one stream that decodes alone, and of all streams together; null where a node's bandwidth is unknown. */
  decode: number | null;
  decodeAll: number | null;
  /** Prompt tokens/s; null where a node's arithmetic is unknown. */
  prefill: number | null;
  /** Where a decoded token's time goes, milliseconds, one stream: reading, fixed cost, exchange. */
  readMs: number;
  overheadMs: number;
  exchangeMs: number;
}

/** Up to this many bytes every rank sends its whole part to every other one; above, parts are reduced where they belong
 * and gathered again. As the transports do it. */
const ONE_SHOT_BYTES: Record<Link["kind"], number> = { tcp: 8192, rdma: 32768 };

/** Where nothing was measured. cpu: what SmolLM2 and a small Scout took beside reading on two cores of a server processor.
 * metal: the engine's budget of 2.5 ms for 48 layers, and the hand-over of an ordinary event; never measured on a Mac. */
export const ASSUMED_SPEED: Record<NodeInfo["device"], NodeSpeed> = {
  cpu: { multiplyAdds: 0, stepUs: 100, denseLayerUs: 55, moeLayerUs: 90, handoverUs: 0 },
  metal: { multiplyAdds: 0, stepUs: 100, denseLayerUs: 50, moeLayerUs: 50, handoverUs: 180 },
};
/** Gigabit Ethernet. */
export const ASSUMED_LINK = { kind: "tcp", latencyUs: 200, bandwidth: 117e6 } as const;

export type LinkFigures = Pick<Link, "kind" | "latencyUs" | "bandwidth">;

/** Links by their ends. The worse direction counts for both; of several cables between two nodes the best. */
export class LinkTable {
  readonly #links = new Map<NodeId, Map<NodeId, LinkFigures>>();
  readonly #given: readonly Link[];
  #tcp: LinkTable | undefined;

  constructor(links: readonly Link[]) {
    this.#given = links;
    for (const { from, to, kind, latencyUs, bandwidth } of links) {
      const link = { kind, latencyUs, bandwidth };
      const known = this.#links.get(from)?.get(to);
      if (known === undefined || exchangeUs(link, 2, 16384) < exchangeUs(known, 2, 16384))
        this.#set(from, to, link);
    }
    for (const [from, ends] of this.#links)
      for (const [to, link] of ends) {
        const back = this.#links.get(to)?.get(from);
        const both = back === undefined ? link : worse(link, back);
        this.#set(from, to, both);
        this.#set(to, from, both);
      }
  }

  #set(from: NodeId, to: NodeId, link: LinkFigures): void {
    const ends = this.#links.get(from) ?? new Map<NodeId, LinkFigures>();
    this.#links.set(from, ends.set(to, link));
  }

  /** The links as these nodes would use them as one group: RDMA only where it is between all of them, as the ranks' vote has it. */
  among(nodes: readonly NodeId[]): LinkTable {
    const all = nodes.every((a, i) => nodes.slice(i + 1).every((b) => this.between(a, b).kind === "rdma"));
    if (all || this.#given.every(({ kind }) => kind === "tcp")) return this;
    this.#tcp ??= new LinkTable(overTcp(this.#given));
    return this.#tcp;
  }

  /** undefined where none was measured. */
  measured(a: NodeId, b: NodeId): LinkFigures | undefined {
    return this.#links.get(a)?.get(b);
  }

  between(a: NodeId, b: NodeId): LinkFigures {
    return this.measured(a, b) ?? ASSUMED_LINK;
  }

  /** What the slowest pair of a group allows. */
  worstAmong(nodes: readonly NodeId[]): LinkFigures | undefined {
    let worst: LinkFigures | undefined;
    nodes.forEach((a, i) => {
      for (const b of nodes.slice(i + 1)) {
        const link = this.between(a, b);
        worst = worst === undefined ? link : worse(worst, link);
      }
    });
    return worst;
  }
}

/** Without RDMA: TCP's own figures, and where only RDMA was measured that cable's. */
function overTcp(links: readonly Link[]): Link[] {
  const key = ({ from, to }: Link) => `${from} ${to}`;
  const measured = new Set(links.filter(({ kind }) => kind === "tcp").map(key));
  return links
    .filter((link) => link.kind === "tcp" || !measured.has(key(link)))
    .map((link) => ({ ...link, kind: "tcp" }));
}

function worse(a: LinkFigures, b: LinkFigures): LinkFigures {
  return {
    kind: a.kind === "rdma" && b.kind === "rdma" ? "rdma" : "tcp",
    latencyUs: Math.max(a.latencyUs, b.latencyUs),
    bandwidth: Math.min(a.bandwidth, b.bandwidth),
  };
}

/** Microseconds of one all-reduce of `bytes` bytes among `ranks` ranks. A rank's sends share its bandwidth. */
export function exchangeUs(link: LinkFigures, ranks: number, bytes: number): number {
  if (ranks < 2) return 0;
  const oneWay = link.latencyUs / 2;
  const transfer = (bytes / link.bandwidth) * 1e6;
  const oneShot = oneWay + (ranks - 1) * transfer;
  if (bytes <= ONE_SHOT_BYTES[link.kind]) return oneShot;
  return 2 * (oneWay + ((ranks - 1) / ranks) * transfer);
}

/** One rank with its node. */
export interface PlacedRank {
  node: NodeFigures;
  work: RankWork;
}

/** ranks: all of a placement, in order. */
export function predict(
  config: ModelConfig,
  ranks: readonly PlacedRank[],
  table: LinkTable,
  terms: PredictTerms,
): Prediction {
  const links = table.among(ranks.map(({ node }) => node.id));
  const stages = stagesOf(ranks);
  const known = ranks.every(({ node }) => node.bandwidth > 0);
  const one = decodeStep(config, stages, links, terms, 1);
  const { streams } = terms;
  // Micro-batches: as many as there are stages to keep busy, or as there are streams.
  const batches = Math.min(stages.length, streams);
  const each = decodeStep(config, stages, links, terms, Math.ceil(streams / batches));
  const cycle = Math.max(each.total, batches * each.slowest);
  return {
    decode: known ? 1e6 / one.total : null,
    decodeAll: known ? (streams * 1e6) / cycle : null,
    prefill: prefillSpeed(config, stages, links, terms),
    readMs: known ? one.read / 1e3 : 0,
    overheadMs: one.overhead / 1e3,
    exchangeMs: one.exchange / 1e3,
  };
}

function stagesOf(ranks: readonly PlacedRank[]): PlacedRank[][] {
  const stages: PlacedRank[][] = [];
  for (const rank of ranks) {
    const { stage } = rank.work.place;
    stages[stage] ??= [];
    stages[stage].push(rank);
  }
  return stages;
}

/** Microseconds. */
interface StepTime {
  total: number;
  read: number;
  overhead: number;
  exchange: number;
  /** Of the slowest stage with its exchange. */
  slowest: number;
}

/** One decode step of `rows` sequences through all stages. */
function decodeStep(
  config: ModelConfig,
  stages: readonly PlacedRank[][],
  links: LinkTable,
  terms: PredictTerms,
  rows: number,
): StepTime {
  const out: StepTime = { total: 0, read: 0, overhead: 0, exchange: 0, slowest: 0 };
  stages.forEach((stage, s) => {
    let slowest = { read: 0, overhead: 0 };
    for (const { node, work } of stage) {
      const read = computeUs(config, node, work, terms, rows, terms.position, true);
      const overhead = overheadUs(config, node, work);
      if (read + overhead >= slowest.read + slowest.overhead) slowest = { read, overhead };
    }
    const exchange = exchangesUs(config, stage, stages[s + 1], links, rows);
    out.read += slowest.read;
    out.overhead += slowest.overhead;
    out.exchange += exchange;
    out.slowest = Math.max(out.slowest, slowest.read + slowest.overhead + exchange);
  });
  out.exchange += descriptorUs(stages, links);
  out.total = out.read + out.overhead + out.exchange;
  return out;
}

/** Reading or multiplying, whichever takes longer. Experts that a step touches are expected values. */
function computeUs(
  config: ModelConfig,
  node: NodeFigures,
  work: RankWork,
  terms: PredictTerms,
  rows: number,
  position: number,
  logits: boolean,
): number {
  const { experts, expertsPerToken } = config;
  const touched = experts === 0 ? 0 : 1 - (1 - expertsPerToken / experts) ** rows;
  const sequences = logits ? rows : 1;
  const bytes =
    work.read + work.readExperts * touched + sequences * cacheReadBytes(config, work, terms, position);
  const reading = node.bandwidth > 0 ? (bytes / node.bandwidth) * 1e6 : 0;
  const products = rows * (work.multiplyAdds + (logits ? work.headMultiplyAdds : 0));
  const speed = speedOf(node).multiplyAdds;
  return Math.max(reading, speed > 0 ? (products / speed) * 1e6 : 0);
}

/** Keys and values that one row reads. */
function cacheReadBytes(
  config: ModelConfig,
  { place }: RankWork,
  { kvType }: PredictTerms,
  position: number,
): number {
  const token = pageBytes(config, kvType, 1, place);
  const inChunk = config.chunk === 0 ? position : position % config.chunk;
  return position * token.full + inChunk * token.chunked;
}

export function speedOf(node: Pick<NodeFigures, "device" | "speed">): NodeSpeed {
  return node.speed ?? ASSUMED_SPEED[node.device];
}

/** Stages of a pipeline begin and end the step one after the other, so each of them adds its stepUs; tensor ranks do so at one time. */
function overheadUs(config: ModelConfig, node: NodeFigures, { place }: RankWork): number {
  const speed = speedOf(node);
  const [first, end] = place.layers;
  let total = speed.stepUs;
  for (let i = first; i < end; i++)
    total += config.layers[i]?.moe === true ? speed.moeLayerUs : speed.denseLayerUs;
  return total;
}

/** Two all-reduces a layer in the stage, and its hidden states to the next stage. Sums and states are float32. */
function exchangesUs(
  config: ModelConfig,
  stage: readonly PlacedRank[],
  next: readonly PlacedRank[] | undefined,
  links: LinkTable,
  rows: number,
): number {
  const bytes = rows * config.hiddenSize * 4;
  const ids = stage.map(({ node }) => node.id);
  const handover = Math.max(...stage.map(({ node }) => speedOf(node).handoverUs));
  const link = links.worstAmong(ids);
  const [first, end] = stage[0]?.work.place.layers ?? [0, 0];
  const reduces =
    link === undefined ? 0 : 2 * (end - first) * (handover + exchangeUs(link, stage.length, bytes));
  if (next === undefined) return reduces;
  const hop = Math.max(
    ...stage.map(({ node }, r) => {
      const to = next[r]?.node.id ?? node.id;
      const { latencyUs, bandwidth } = links.between(node.id, to);
      return latencyUs / 2 + (bytes / bandwidth) * 1e6;
    }),
  );
  return reduces + hop + handover;
}

/** The step's descriptor to the other ranks, and the sampled token back where another stage has the head. */
function descriptorUs(stages: readonly PlacedRank[][], links: LinkTable): number {
  const all = stages.flat();
  const first = all[0];
  if (first === undefined || all.length === 1) return 0;
  const oneWay = all.slice(1).map(({ node }) => links.between(first.node.id, node.id).latencyUs / 2);
  const last = stages.at(-1)?.[0];
  const back =
    stages.length === 1 || last === undefined ? 0 : links.between(first.node.id, last.node.id).latencyUs / 2;
  return Math.max(...oneWay) + back;
}

/** Prompt tokens/s where pieces follow each other down the pipe. Attention within the prompt is not counted. */
function prefillSpeed(
  config: ModelConfig,
  stages: readonly PlacedRank[][],
  links: LinkTable,
  terms: PredictTerms,
): number | null {
  const { piece } = terms;
  if (stages.flat().some(({ node }) => speedOf(node).multiplyAdds <= 0 || node.bandwidth <= 0)) return null;
  let slowest = 0;
  stages.forEach((stage, s) => {
    const compute = Math.max(
      ...stage.map(
        ({ node, work }) =>
          computeUs(config, node, work, terms, piece, 0, false) + overheadUs(config, node, work),
      ),
    );
    slowest = Math.max(slowest, compute + exchangesUs(config, stage, stages[s + 1], links, piece));
  });
  return (piece * 1e6) / slowest;
}
