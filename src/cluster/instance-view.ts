// What the members' records say of an instance: the states of its ranks, whether somebody has ended it, what of it still holds
// memory. Pure.

import type { Member } from "./membership.ts";
import type { InstanceState, NodeId, RankState } from "./types.ts";

/** A rank of an instance as its node tells of it. */
export interface SeenRank {
  node: NodeId;
  /** undefined: the node says nothing of it. */
  state: RankState | undefined;
}

/** The ranks of one owner's epoch, and the nodes of it that this one has lost. */
export function ranksOf(
  { spec, epoch }: InstanceState,
  owner: NodeId,
  members: readonly Member[],
): { ranks: SeenRank[]; lost: NodeId[] } {
  const lost: NodeId[] = [];
  const ranks = spec.ranks.map(({ node, rank }) => {
    const member = members.find(({ record }) => record.info.id === node);
    if (member === undefined || !member.direct) lost.push(node);
    const state = member?.record.info.ranks.find(
      (each) =>
        each.instance === spec.id && each.epoch === epoch && each.owner === owner && each.rank === rank,
    );
    return { node, state };
  });
  return { ranks, lost };
}

/** Changes when a node comes, goes or starts anew. */
export function clusterStamp(members: readonly Member[]): string {
  return members.map(({ record }) => `${record.info.id} ${record.boot}`).join();
}

/** Somebody stopped it, maybe where this node was cut off from. */
export function isEnded(id: string, members: readonly Member[]): boolean {
  return members.some(({ record, self }) => !self && record.info.ended.some((each) => each.id === id));
}

export function isIdle({ phase, outstandingTokens }: InstanceState): boolean {
  return phase === "ready" && outstandingTokens === 0;
}

/** Whether any node that can be asked still holds a rank of an earlier epoch. */
export function hasRanks(instance: string, members: readonly Member[]): boolean {
  return members.some(
    ({ record, direct }) => direct && record.info.ranks.some((rank) => rank.instance === instance),
  );
}

export function nameOf(node: NodeId, members: readonly Member[]): string {
  return (
    members.find(({ record }) => record.info.id === node)?.record.info.name ?? `node ${node.slice(0, 8)}`
  );
}
