// What the life of an instance asks of placement: a spec for the nodes in view, or why there is none. Pure but for the
// profiles, which are read from headers elsewhere and may not be here yet.

import { CaravanError } from "../errors.ts";
import { type KvType, PLANNED_SHARE } from "../model/memory-plan.ts";
import type { Member } from "./membership.ts";
import { type ModelProfile, rankWorks } from "./model-profile.ts";
import { type PlacementNode, planPlacements } from "./placement.ts";
import { LinkTable, predict } from "./predict.ts";
import type { InstanceSpec, InstanceState, Link, NodeId, PlacementRequest } from "./types.ts";

export type PlacedSpec = Pick<
  InstanceSpec,
  "tensor" | "pipeline" | "ranks" | "bytes" | "context" | "streams"
>;

export type PlaceResult =
  | { kind: "placed"; placement: PlacedSpec /** Tokens/s of all streams; 0 = unknown. */; speed: number }
  | { kind: "refused"; reason: string }
  /** What is needed to place it is not here yet. */
  | { kind: "pending"; reason: string };

export interface PlaceLimits {
  /** Must have rank 0. */
  first?: NodeId;
  /** Instances whose memory counts as free. */
  freed?: readonly InstanceState[];
}

export interface Placer {
  place(model: string, asked: PlacementRequest, members: readonly Member[], limits: PlaceLimits): PlaceResult;
  /** Predicted tokens/s of all streams of a spec as it is; 0 = unknown. */
  speed(spec: InstanceSpec, members: readonly Member[]): number;
}

export interface ModelTerms {
  profile: ModelProfile;
  kvType: KvType;
  threads: number;
}

/** A model's terms; pending while they are read, refused where the model cannot be had. */
export type ModelSource = (
  model: string,
) => { kind: "known"; terms: ModelTerms } | { kind: "pending" | "refused"; reason: string };

export class ProfilePlacer implements Placer {
  readonly #source: ModelSource;

  constructor(source: ModelSource) {
    this.#source = source;
  }

  place(
    model: string,
    asked: PlacementRequest,
    members: readonly Member[],
    { first, freed = [] }: PlaceLimits,
  ): PlaceResult {
    const found = this.#source(model);
    if (found.kind !== "known") return found;
    const { profile, kvType, threads } = found.terms;
    const here = new Set(members.map(({ record }) => record.info.id));
    // Of the nodes that were asked for, those that are left.
    const nodes = asked.nodes?.filter((id) => here.has(id));
    const shape =
      nodes !== undefined && nodes.length < (asked.nodes?.length ?? 0) ? {} : shapeOf(asked, here.size);
    try {
      const plan = planPlacements(
        profile,
        members.map((member) => nodeOf(member, freed)),
        linksOf(members),
        {
          asked: {
            ...shape,
            ...(nodes === undefined || nodes.length === 0 ? {} : { nodes }),
            ...(asked.context === undefined ? {} : { context: asked.context }),
            ...(asked.streams === undefined ? {} : { streams: asked.streams }),
          },
          kvType,
          threads,
          ...(first === undefined ? {} : { first }),
        },
      );
      const best = plan.placements[0];
      if (best === undefined) return { kind: "refused", reason: plan.reason };
      const { tensor, pipeline, ranks, context, streams, bytes, predicted } = best;
      const placement = { tensor, pipeline, ranks, context, streams, bytes: bytes.map(({ total }) => total) };
      return { kind: "placed", placement, speed: predicted.decodeAll ?? 0 };
    } catch (thrown) {
      if (thrown instanceof CaravanError && ["out_of_memory", "invalid_argument"].includes(thrown.code))
        return { kind: "refused", reason: thrown.message };
      throw thrown;
    }
  }

  speed(spec: InstanceSpec, members: readonly Member[]): number {
    const found = this.#source(spec.model);
    if (found.kind !== "known") return 0;
    const { profile, kvType } = found.terms;
    const works = rankWorks(profile, spec.ranks);
    const placed = spec.ranks.flatMap(({ node }, rank) => {
      const member = members.find(({ record }) => record.info.id === node);
      const work = works[rank];
      return member === undefined || work === undefined ? [] : [{ node: member.record.info, work }];
    });
    if (placed.length < spec.ranks.length) return 0;
    const terms = { streams: spec.streams, kvType, position: Math.min(512, spec.context), piece: 512 };
    return predict(profile.config, placed, new LinkTable(linksOf(members)), terms).decodeAll ?? 0;
  }
}

/** The shape that was asked for, as long as there are enough nodes for it; then whatever they allow. */
function shapeOf({ tensor, pipeline }: PlacementRequest, nodes: number): PlacementRequest {
  if ((tensor ?? 1) * (pipeline ?? 1) > nodes) return {};
  return {
    ...(tensor === undefined ? {} : { tensor }),
    ...(pipeline === undefined ? {} : { pipeline }),
  };
}

function nodeOf({ record }: Member, freed: readonly InstanceState[]): PlacementNode {
  const { info } = record;
  let { available } = info.memory;
  for (const { spec } of freed)
    spec.ranks.forEach(({ node }, rank) => {
      if (node === info.id) available += (spec.bytes[rank] ?? 0) / PLANNED_SHARE;
    });
  return { ...info, memory: { ...info.memory, available } };
}

function linksOf(members: readonly Member[]): Link[] {
  const here = new Set(members.map(({ record }) => record.info.id));
  return members.flatMap(({ record }) =>
    record.links.filter(({ from, to, bandwidth }) => here.has(from) && here.has(to) && bandwidth > 0),
  );
}
