// How a node is removed from a cluster: its id goes on a list, and the others get a new secret. Two sides that have different
// secrets (one was away, or both removed a node at the same time) come to the same cluster by merged(), whoever speaks first.
// Pure but for random secrets.

import { CaravanError } from "../../errors.ts";
import type { NodeId } from "../types.ts";
import {
  type ClusterCredentials,
  MAX_PREVIOUS,
  MAX_REMOVED,
  newSecret,
  type RemovedNode,
  secretName,
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
    generation: cluster.generation + 1,
    previous: secretsOf(cluster).slice(0, MAX_PREVIOUS),
    removed: [...cluster.removed.filter(({ id }) => id !== node.id), { id: node.id, name: node.name }],
    nodes: cluster.nodes.filter(({ id }) => id !== node.id),
  };
}

/**
 * What node `self` makes of its cluster and that of another member. Removed are all that either has removed. The secret is one that
 * no removed node can have: it was made by a side that had removed all of them; of two such the later one, then the one with the
 * higher name, so that all choose alike; where there is none, a new one. Known nodes are those of the side whose secret it is: who
 * was let in by an older secret meanwhile has to prove this one, or join again. The same object as `own` where nothing is new.
 */
export function merged(self: NodeId, own: ClusterCredentials, other: ClusterCredentials): ClusterCredentials {
  if (own.name !== other.name) return own;
  const removed = [...own.removed, ...other.removed.filter(({ id }) => !isRemoved(own, id))];
  if (removed.length > MAX_REMOVED) return own;
  const able = [own, other].filter((side) => removed.every(({ id }) => isRemoved(side, id)));
  const [best] = able.toSorted((a, b) => b.generation - a.generation || compareNames(b.secret, a.secret));
  if (best === own || best?.secret === own.secret) return own;
  const secret = best?.secret ?? newSecret();
  const generation = best?.generation ?? Math.max(own.generation, other.generation) + 1;
  const nodes = (best ?? other).nodes.filter(
    ({ id }) =>
      id !== self && !removed.some((each) => each.id === id) && (best !== undefined || isKnown(own, id)),
  );
  const known = new Set([...secretsOf(own), ...secretsOf(other)]);
  known.delete(secret);
  return {
    ...{ name: own.name, secret, generation, removed },
    previous: [...known].slice(0, MAX_PREVIOUS),
    // Where they were met from here says more than where others met them.
    nodes: nodes.map((node) => own.nodes.find(({ id }) => id === node.id) ?? node),
  };
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

function compareNames(a: string, b: string): number {
  const [first, second] = [secretName(a), secretName(b)];
  return first < second ? -1 : first > second ? 1 : 0;
}
