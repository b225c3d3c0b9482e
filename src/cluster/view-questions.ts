// Questions that a node asks of its view: who has a model, who is still fetching, whose devices could reach it. Pure.

import type { Member } from "./membership.ts";
import { hasModel } from "./orphans.ts";
import type { ModelPresence, NodeId, RdmaSurvey } from "./types.ts";

/** Other nodes with a link to this one that have all of the model. */
export function holdersOf(members: readonly Member[], model: string): NodeId[] {
  return members
    .filter(({ self, direct }) => !self && direct)
    .map(({ record }) => record.info.id)
    .filter((id) => hasModel(id, model, members));
}

/** Models that other nodes with a link to this one have all of. */
export function wholeModelsOf(members: readonly Member[]): ModelPresence[] {
  return members
    .filter(({ self, direct }) => !self && direct)
    .flatMap(({ record }) => record.info.models.filter(({ bytes, total }) => bytes >= total));
}

/** Models of instances that have, or had last, a rank on the node. */
export function modelsOfRanks(members: readonly Member[], node: NodeId): ReadonlySet<string> {
  const states = members.flatMap(({ record: { info } }) => [...info.instances, ...info.orphans]);
  const here = states.filter(
    ({ phase, spec }) => phase !== "gone" && spec.ranks.some((rank) => rank.node === node),
  );
  return new Set(here.map(({ spec }) => spec.model));
}

/** Whether any rank of the epoch still gets its files. */
export function isFetching(members: readonly Member[], instance: string, epoch: number): boolean {
  return members.some(({ record }) =>
    record.info.ranks.some(
      (rank) => rank.instance === instance && rank.epoch === epoch && rank.phase === "fetching",
    ),
  );
}

/** Another node as far as RDMA goes. */
export interface Neighbour {
  id: NodeId;
  name: string;
  rdma: RdmaSurvey;
  /** It knows of an RDMA link to this node. */
  linked: boolean;
}

/** Other nodes that `node` talks to. */
export function neighboursOf(members: readonly Member[], node: NodeId): Neighbour[] {
  return members
    .filter(({ self, direct }) => !self && direct)
    .map(({ record: { info, links } }) => ({
      ...{ id: info.id, name: info.name, rdma: info.rdma },
      linked: links.some(({ to, kind }) => kind === "rdma" && to === node),
    }));
}
