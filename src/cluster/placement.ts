// Where a model could run: every shape of tensor × pipeline that the nodes allow, with bytes for each node and predicted
// speed; which one is best, why, and where splitting costs more than it brings. Refuses with what is missing on which node. Pure.

import { CaravanError } from "../errors.ts";
import { type KvType, PLANNED_SHARE } from "../model/memory-plan.ts";
import { type ModelProfile, type RankWork, rankWorks } from "./model-profile.ts";
import {
  allArrangements,
  allOrders,
  arrangements,
  type Candidate,
  neighbourGroups,
  nodeGroups,
} from "./node-groups.ts";
import { PlacementWords, speedOf } from "./placement-words.ts";
import { LinkTable, type NodeFigures, type Prediction, predict } from "./predict.ts";
import { longestContext, type MemoryTerms, type RankMemory, rankMemory } from "./rank-memory.ts";
import type { Share } from "./shard.ts";
import type { Link, NodeId, NodeInfo, PlacementRequest, RankShare } from "./types.ts";
import {
  boundsByMemory,
  type StageCosts,
  sharesOf,
  stageBounds,
  stageCosts,
  stageWeights,
} from "./uneven-shares.ts";

/** What a placement reads of a node. */
export type PlacementNode = NodeFigures & Pick<NodeInfo, "memory">;

export interface PlacementTerms {
  asked: PlacementRequest;
  kvType: KvType;
  /** Compute threads of a node, for its scratch. */
  threads: number;
  /** Rank 0 must be this node's: it owns the instance already. */
  first?: NodeId;
}

export interface NodeBytes extends RankMemory {
  node: NodeId;
  rank: number;
  total: number;
  /** What may be planned on the node. */
  usable: number;
}

export interface Placement {
  tensor: number;
  pipeline: number;
  ranks: RankShare[];
  /** By rank. */
  bytes: NodeBytes[];
  context: number;
  streams: number;
  /** The longest context for that many streams. */
  longestContext: number;
  predicted: Prediction;
  warnings: string[];
}

/** A shape that no group of nodes can hold: the one that misses least. */
export interface RefusedShape {
  tensor: number;
  pipeline: number;
  bytes: NodeBytes[];
  reason: string;
}

export interface PlacementPlan {
  /** Fastest first. Never empty. */
  placements: Placement[];
  refused: RefusedShape[];
  /** Of placements[0]: why it and not another. */
  reason: string;
  /** What the figures rest on where nothing was measured. */
  assumptions: string[];
}

export const MOST_NODES = 16;
/** Of so many nodes all arrangements are tried: 381 of five. Of more nodes those of shapes that have few. */
const EXHAUSTIVE_NODES = 5;
const MOST_ARRANGEMENTS = 400;
/** Exchanges of nodes in all; a thousand take a tenth of a second. */
const MOST_TRIES = 1000;
/** Contexts that most conversations fit into. */
export const DEFAULT_CONTEXT = 8192;
/** Tokens of a step at most, and rows of logits beside the streams' (engine/load-model.ts). */
export const STEP_TOKENS = 512;
const PROMPT_LOGITS = 8;
/** Cache position that speeds are predicted at. */
const PREDICTED_POSITION = 512;
/** A placement on more nodes must be this much faster to be preferred. */
const WORTHWHILE = 1.03;

/** Bytes of a node that may be planned. */
export function usableBytes(node: Pick<NodeInfo, "memory">): number {
  return Math.floor(node.memory.available * PLANNED_SHARE);
}

/**
 * Throws out_of_memory with what is missing where, and invalid_argument for requests that no cluster can meet.
 * nodes: 1 to 16. links: those that were measured.
 */
export function planPlacements(
  profile: ModelProfile,
  nodes: readonly PlacementNode[],
  links: readonly Link[],
  terms: PlacementTerms,
): PlacementPlan {
  return new Planner(profile, nodes, links, terms).plan();
}

/** Of one grid on these nodes in this order, as planPlacements judges it: tokens/s of all streams, or undefined where it does not fit. */
export function placementSpeed(
  profile: ModelProfile,
  nodes: readonly PlacementNode[],
  links: readonly Link[],
  terms: PlacementTerms,
  [tensor, pipeline]: [tensor: number, pipeline: number],
): number | undefined {
  return new Planner(profile, nodes, links, terms).speedOn(tensor, pipeline);
}

interface Tried {
  ranks: RankShare[];
  bytes: NodeBytes[];
  works: RankWork[];
  nodes: PlacementNode[];
  missing: number;
}

type Member = Candidate & { node: PlacementNode };

/** Of one shape. */
interface Best {
  tensor: number;
  pipeline: number;
  group: readonly Member[];
  tried: Tried;
  predicted: Prediction | undefined;
}

class Planner {
  readonly #members: Member[];
  readonly #links: LinkTable;
  readonly #memory: MemoryTerms;
  readonly #costs: StageCosts;
  readonly #words: PlacementWords;

  constructor(
    readonly profile: ModelProfile,
    nodes: readonly PlacementNode[],
    links: readonly Link[],
    readonly terms: PlacementTerms,
  ) {
    const { asked } = terms;
    const { config } = profile;
    const wanted = asked.nodes === undefined ? nodes : nodes.filter(({ id }) => asked.nodes?.includes(id));
    checkRequest(profile, wanted, terms);
    const slowest = Math.min(...wanted.map(({ bandwidth }) => bandwidth).filter((b) => b > 0), 1e15);
    this.#members = wanted.map((node) => ({
      id: node.id,
      usable: usableBytes(node),
      speed: node.bandwidth > 0 ? node.bandwidth : slowest,
      node,
    }));
    this.#links = new LinkTable(links);
    const usable = this.#members.reduce((sum, member) => sum + member.usable, 0);
    this.#words = new PlacementWords(wanted, usable, this.#links, config.where);
    const streams = asked.streams ?? 1;
    this.#memory = {
      context: asked.context ?? Math.min(DEFAULT_CONTEXT, config.contextLength),
      streams,
      kvType: terms.kvType,
      threads: terms.threads,
      maxTokens: Math.max(STEP_TOKENS, streams),
      maxLogits: streams + PROMPT_LOGITS,
    };
    // One rank that had everything tells what each layer's cache and any rank's scratch are.
    const whole = rankWorks(profile, sharesOf([0, config.layers.length], [[1]]))[0] as RankWork;
    const all = rankMemory(profile, whole, this.#memory);
    const chunked = config.layers.filter((layer) => layer.chunked).length;
    const perLayer = cacheByKind(profile, whole, this.#memory, all.kv, chunked);
    // What several ranks keep to exchange comes on top (scratchBytes).
    const exchanged =
      (2 * this.#memory.maxTokens * config.hiddenSize + this.#memory.maxLogits * config.vocabSize) * 4;
    this.#costs = stageCosts(profile, perLayer, all.scratch + exchanged);
  }

  plan(): PlacementPlan {
    const found: Placement[] = [];
    const refused: RefusedShape[] = [];
    const best = this.#search();
    for (const { tensor, pipeline, tried, predicted } of best.values()) {
      if (predicted === undefined)
        refused.push({ tensor, pipeline, bytes: tried.bytes, reason: this.#words.missing(tried.bytes) });
      else found.push(this.#placement(tensor, pipeline, tried, predicted));
    }
    if (found.length === 0) throw this.#words.tooLarge(refused);
    found.sort((a, b) => speedOf(b) - speedOf(a) || a.ranks.length - b.ranks.length);
    const reason = this.#words.reason(this.#recommend(found), found, WORTHWHILE);
    for (const placement of found) placement.warnings = this.#words.warnings(placement, found);
    return { placements: found, refused, reason, assumptions: this.#words.assumptions(found) };
  }

  /**
   * Of every shape the best group of nodes that is found: of all in every order that matters where they are few. Of others those that could be
   * best, and from there on whatever one exchange of nodes makes better, the shapes first that are fastest so far.
   */
  #search(): Map<string, Best> {
    const best = new Map<string, Best>();
    const many = new Set<string>();
    const { first } = this.terms;
    const count = this.#members.length;
    for (let size = 1; size <= count; size++)
      for (const [tensor, pipeline] of this.#shapes(size)) {
        if (count <= EXHAUSTIVE_NODES) {
          for (const group of allOrders(this.#members, size, first))
            this.#consider(best, group, tensor, pipeline);
          continue;
        }
        many.add(`${tensor}x${pipeline}`);
        if (arrangements(count, tensor, pipeline) <= MOST_ARRANGEMENTS)
          for (const group of allArrangements(this.#members, tensor, pipeline, first))
            this.#consider(best, group, tensor, pipeline);
      }
    if (many.size === 0) return best;
    for (const group of nodeGroups(this.#members, this.#links, first))
      for (const [tensor, pipeline] of this.#shapes(group.length))
        if (many.has(`${tensor}x${pipeline}`)) this.#consider(best, group, tensor, pipeline);
    let tries = 0;
    const order = [...best].sort(
      ([, a], [, b]) =>
        (b.predicted?.decodeAll ?? 0) - (a.predicted?.decodeAll ?? 0) || a.tried.missing - b.tried.missing,
    );
    for (const [shape, { tensor, pipeline, group: begin }] of order) {
      if (!many.has(shape)) continue;
      let group = begin;
      for (let better = true; better && tries < MOST_TRIES; ) {
        better = false;
        for (const next of neighbourGroups(group, this.#members, first)) {
          if (tries++ >= MOST_TRIES) break;
          if (!this.#consider(best, next, tensor, pipeline)) continue;
          group = next;
          better = true;
          break;
        }
      }
    }
    return best;
  }

  #shapes(size: number): [tensor: number, pipeline: number][] {
    return shapes(size, this.terms.asked).filter(([, pipeline]) => pipeline <= this.profile.layers.length);
  }

  /** Whether it is the best of its shape so far. */
  #consider(best: Map<string, Best>, group: readonly Member[], tensor: number, pipeline: number): boolean {
    const tried = this.#try(group, tensor, pipeline);
    const predicted = tried.missing === 0 ? this.#predict(tried) : undefined;
    const key = `${tensor}x${pipeline}`;
    const known = best.get(key);
    if (known !== undefined && !this.#isBetter({ tried, predicted }, known)) return false;
    best.set(key, { tensor, pipeline, group, tried, predicted });
    return true;
  }

  /** Tokens/s of all streams on all nodes in just this order; undefined where it does not fit. */
  speedOn(tensor: number, pipeline: number): number | undefined {
    const tried = this.#try(this.#members, tensor, pipeline);
    return tried.missing === 0 ? (this.#predict(tried).decodeAll ?? 0) : undefined;
  }

  /** The model on these nodes in this order: layers to stages, then shares within each. */
  #try(group: readonly Member[], tensor: number, pipeline: number): Tried {
    const stages = Array.from({ length: pipeline }, (_, s) => group.slice(s * tensor, (s + 1) * tensor));
    const alone = this.#memory.streams === 1;
    let usable = stages.map((stage) => stage.map((member) => member.usable));
    let least: Tried | undefined;
    // Whole layers, heads and groups may put a share above its node's memory: then the node is taken for a little smaller.
    for (let attempt = 0; attempt < 4; attempt++) {
      const strengths = stages.map((stage, s) =>
        stage.map(({ speed }, r) => ({ speed, usable: usable[s]?.[r] ?? 0 })),
      );
      const bounds = stageBounds(this.#costs, strengths, alone) ?? boundsByMemory(this.#costs, strengths);
      const weights = strengths.map((stage, s) =>
        stageWeights(
          this.#costs,
          stage,
          [bounds[s] ?? 0, bounds[s + 1] ?? 0],
          { first: s === 0, last: s === pipeline - 1 },
          attempt === 3 ? "memory" : "speed",
        ),
      );
      const tried = this.#measure(group, sharesOf(bounds, weights));
      if (least === undefined || tried.missing < least.missing) least = tried;
      if (tried.missing === 0 || group.length === 1) break;
      usable = usable.map((stage, s) =>
        stage.map((bytes, r) => {
          const over = tried.bytes[s * tensor + r];
          return over === undefined ? bytes : bytes - 1.5 * Math.max(0, over.total - over.usable);
        }),
      );
    }
    return least as Tried;
  }

  #measure(group: readonly Member[], shares: readonly Share[]): Tried {
    const works = rankWorks(this.profile, shares);
    let missing = 0;
    const bytes = works.map((work, rank): NodeBytes => {
      const memory = rankMemory(this.profile, work, this.#memory);
      const total = memory.weights + memory.kv + memory.scratch;
      const usable = group[rank]?.usable ?? 0;
      missing += Math.max(0, total - usable);
      return { node: group[rank]?.id ?? "", rank, ...memory, total, usable };
    });
    const ranks = shares.map((share, rank): RankShare => ({ ...share, node: group[rank]?.id ?? "" }));
    return { ranks, bytes, works, nodes: group.map(({ node }) => node), missing };
  }

  #predict({ works, nodes }: Tried): Prediction {
    const placed = works.map((work, rank) => ({ work, node: nodes[rank] as PlacementNode }));
    const { streams, kvType } = this.#memory;
    const position = Math.min(PREDICTED_POSITION, this.#memory.context);
    return predict(this.profile.config, placed, this.#links, {
      streams,
      kvType,
      position,
      piece: STEP_TOKENS,
    });
  }

  #isBetter(
    a: { tried: Tried; predicted: Prediction | undefined },
    b: { tried: Tried; predicted: Prediction | undefined },
  ): boolean {
    if (a.predicted === undefined || b.predicted === undefined)
      return a.predicted === undefined
        ? b.predicted === undefined && a.tried.missing < b.tried.missing
        : true;
    return (a.predicted.decodeAll ?? 0) > (b.predicted.decodeAll ?? 0) * 1.0001;
  }

  #placement(tensor: number, pipeline: number, tried: Tried, predicted: Prediction): Placement {
    const { context, streams, kvType } = this.#memory;
    const rooms = tried.bytes.map(({ usable, weights, scratch }) => usable - weights - scratch);
    return {
      tensor,
      pipeline,
      ranks: tried.ranks,
      bytes: tried.bytes,
      context,
      streams,
      longestContext: longestContext(this.profile, tried.works, rooms, { streams, kvType }),
      predicted,
      warnings: [],
    };
  }

  /** Puts the recommended placement first: the one with the fewest nodes of those that are nearly the fastest. */
  #recommend(found: Placement[]): Placement {
    const fastest = found[0] as Placement;
    const few = found
      .filter((p) => speedOf(p) * WORTHWHILE >= speedOf(fastest))
      .sort((a, b) => a.ranks.length - b.ranks.length || speedOf(b) - speedOf(a))[0] as Placement;
    found.splice(found.indexOf(few), 1);
    found.unshift(few);
    return few;
  }
}

function shapes(count: number, asked: PlacementRequest): [tensor: number, pipeline: number][] {
  const out: [number, number][] = [];
  for (let pipeline = 1; pipeline <= count; pipeline++) {
    if (count % pipeline !== 0) continue;
    const tensor = count / pipeline;
    if (asked.tensor !== undefined && asked.tensor !== tensor) continue;
    if (asked.pipeline !== undefined && asked.pipeline !== pipeline) continue;
    out.push([tensor, pipeline]);
  }
  return out;
}

function checkRequest(
  profile: ModelProfile,
  nodes: readonly PlacementNode[],
  { asked }: PlacementTerms,
): void {
  const { config } = profile;
  const wrong = (message: string, param: string) => new CaravanError("invalid_argument", message, { param });
  if (nodes.length === 0) throw wrong("none of the nodes that were asked for is here", "nodes");
  if (nodes.length > MOST_NODES)
    throw wrong(`${nodes.length} nodes; a model is placed on at most ${MOST_NODES}`, "nodes");
  if (new Set(nodes.map(({ id }) => id)).size < nodes.length)
    throw wrong("two nodes have the same id", "nodes");
  if (asked.context !== undefined && asked.context > config.contextLength)
    throw wrong(
      `a context of ${asked.context} tokens was asked for; the model's limit is ${config.contextLength}`,
      "context",
    );
  if ((asked.tensor ?? 1) * (asked.pipeline ?? 1) > nodes.length)
    throw wrong(
      `tensor ${asked.tensor ?? 1} × pipeline ${asked.pipeline ?? 1} needs ${(asked.tensor ?? 1) * (asked.pipeline ?? 1)} nodes, there are ${nodes.length}`,
      "tensor",
    );
  if ((asked.pipeline ?? 1) > config.layers.length)
    throw wrong(`${config.layers.length} layers cannot be split into ${asked.pipeline} stages`, "pipeline");
}

/** Cache bytes of all streams in one layer of each kind. */
function cacheByKind(
  profile: ModelProfile,
  whole: RankWork,
  terms: MemoryTerms,
  kv: number,
  chunked: number,
): { full: number; chunked: number } {
  const full = profile.config.layers.length - chunked;
  if (chunked === 0) return { full: kv / full, chunked: 0 };
  if (full === 0) return { full: 0, chunked: kv / chunked };
  // A first layer of each kind alone: the same terms, one layer.
  const alone = (wanted: boolean) => {
    const i = profile.config.layers.findIndex((layer) => layer.chunked === wanted);
    const work = { ...whole, place: { ...whole.place, layers: [i, i + 1] as const } };
    return rankMemory(profile, work, terms).kv;
  };
  return { full: alone(false), chunked: alone(true) };
}
