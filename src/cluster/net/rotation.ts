// How a node is removed from a cluster: its id goes on a list, and the others get a new secret. Two sides that have different
// secrets (one was away, or both removed a node at the same time) come to the same cluster by merged(), whoever speaks first.
// Pure but for random secrets.

import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";
import {
  type ClusterCredentials,
  MAX_GENERATION,
  MAX_PREVIOUS,
  MAX_REMOVED,
  newSecret,
  purposeKey,
  type RemovedNode,
} from "./cluster-file.ts";

/** The cluster without a node: under a new secret, which that node does not learn. Throws invalid_argument where too many
 * were removed. */
export function withoutNode(cluster: ClusterCredentials, node: RemovedNode): ClusterCredentials {
  if (cluster.removed.length >= MAX_REMOVED)
    throw new CaravanError(
      "invalid_argument",
      `${MAX_REMOVED} nodes were removed from this cluster already`,
      {
        hint: "Make a new one: `caravan cluster leave` on all machines, then `caravan cluster create` and `caravan join`.",
      },
    );
  return {
    ...cluster,
    secret: newSecret(),
    generation: generationAfter(cluster),
    previous: secretsOf(cluster).slice(0, MAX_PREVIOUS),
    removed: [...cluster.removed.filter(({ id }) => id !== node.id), { id: node.id, name: node.name }],
    nodes: cluster.nodes.filter(({ id }) => id !== node.id),
  };
}

/**
 * What node `self` makes of its cluster and that of another member. Removed are all that either has removed. A secret that follows
 * another one (who made it had that one, so it is in `previous`) replaces it, together with its known nodes: who was let in by the
 * older secret meanwhile has to prove this one, or join again. Where neither follows the other, no claim of either side decides, as
 * a removed node may have made it up: the secret comes from both, so that who lacks one of them lacks the result, and is a new one
 * where a side had not removed all, whose nodes between them may have both. Both ends make the same of two that had; known nodes
 * are those that both know. The same object as `own` where nothing is new, and beyond MAX_REMOVED.
 */
export function merged(self: NodeId, own: ClusterCredentials, other: ClusterCredentials): ClusterCredentials {
  if (own.name !== other.name || own.secret === other.secret) return own;
  const removed = [...own.removed, ...other.removed.filter(({ id }) => !isRemoved(own, id))];
  if (removed.length > MAX_REMOVED) return own;
  const hasRemovedAll = (side: ClusterCredentials) => removed.every(({ id }) => isRemoved(side, id));
  const ownFollows = own.previous.includes(other.secret);
  const otherFollows = other.previous.includes(own.secret);
  if (ownFollows && !otherFollows && hasRemovedAll(own)) return own;
  const replaced = otherFollows && !ownFollows && hasRemovedAll(other);
  const fresh = () =>
    hasRemovedAll(own) && hasRemovedAll(other) ? secretOfBoth(own.secret, other.secret) : newSecret();
  const secret = replaced ? other.secret : fresh();
  const generation = replaced ? other.generation : generationAfter(own, other);
  const nodes = other.nodes.filter(
    ({ id }) => id !== self && !removed.some((each) => each.id === id) && (replaced || isKnown(own, id)),
  );
  // The two that were merged first: whoever has only one of them is to see that this one follows it.
  const known = new Set([own.secret, other.secret, ...own.previous, ...other.previous]);
  known.delete(secret);
  return {
    ...{ name: own.name, secret, generation, removed },
    previous: [...known].slice(0, MAX_PREVIOUS),
    // Where they were met from here says more than where others met them.
    nodes: nodes.map((node) => own.nodes.find(({ id }) => id === node.id) ?? node),
  };
}

/** The same whichever comes first; tells nothing to who has only one of them. */
function secretOfBoth(a: string, b: string): string {
  const [first, second] = a < b ? [a, b] : [b, a];
  return purposeKey(first, `secret after this one and ${second}`).toString("base64");
}

/** Says only how often the secret has changed; at the limit it stays, so that the file can be read again. */
function generationAfter(...clusters: readonly ClusterCredentials[]): number {
  return Math.min(Math.max(...clusters.map(({ generation }) => generation)) + 1, MAX_GENERATION);
}

export function isRemoved({ removed }: ClusterCredentials, id: NodeId): boolean {
  return removed.some((each) => each.id === id);
}

export function isKnown({ nodes }: ClusterCredentials, id: NodeId): boolean {
  return nodes.some((each) => each.id === id);
}

/** The latest first. */
export function secretsOf({ secret, previous }: ClusterCredentials): string[] {
  return [secret, ...previous];
}

/** What a new node gets: nothing of the past but who must stay out. */
export function forNewNode(cluster: ClusterCredentials): ClusterCredentials {
  return { ...cluster, previous: [] };
}
