// Which nodes to try together: of all subsets of up to 16 nodes only those that could be best, the fastest, the largest,
// and the neighbours of each node by their links; in an order that puts good links inside tensor groups. Pure.

import { exchangeUs, type LinkTable } from "./predict.ts";
import type { NodeId } from "./types.ts";

export interface Candidate {
  id: NodeId;
  usable: number;
  speed: number;
}

/** How bad a link is: a small and a middling exchange. */
function distance(links: LinkTable, a: NodeId, b: NodeId): number {
  const link = links.between(a, b);
  return exchangeUs(link, 2, 20480) + exchangeUs(link, 2, 1 << 20) / 64;
}

/** Ordered groups of nodes of every size, without doubles. first: only groups that begin with this node. Deterministic: ties
 * go by id. */
export function nodeGroups<T extends Candidate>(
  nodes: readonly T[],
  links: LinkTable,
  first?: NodeId,
): T[][] {
  const byId = nodes.toSorted((a, b) => (a.id < b.id ? -1 : 1));
  const orders = [
    byId.toSorted((a, b) => b.speed - a.speed || b.usable - a.usable),
    byId.toSorted((a, b) => b.usable - a.usable || b.speed - a.speed),
  ];
  for (const seed of byId) {
    const near = byId
      .filter((node) => node !== seed)
      .map((node) => ({ node, far: distance(links, seed.id, node.id) }))
      .sort((a, b) => a.far - b.far || b.node.speed - a.node.speed || b.node.usable - a.node.usable);
    orders.push([seed, ...near.map(({ node }) => node)]);
  }
  const seen = new Set<string>();
  const groups: T[][] = [];
  for (let size = 1; size <= nodes.length; size++)
    for (const order of orders) {
      const group = groupOf(order, size, first);
      if (group === undefined) continue;
      const key = group
        .map(({ id }) => id)
        .sort()
        .join(" ");
      if (seen.has(key)) continue;
      seen.add(key);
      groups.push(chained(group, links, first));
    }
  return groups;
}

/** The first `size` nodes of the order, `first` among them. */
function groupOf<T extends Candidate>(order: readonly T[], size: number, first?: NodeId): T[] | undefined {
  if (first === undefined) return order.slice(0, size);
  const owner = order.find(({ id }) => id === first);
  if (owner === undefined) return undefined;
  return [owner, ...order.filter((node) => node !== owner).slice(0, size - 1)];
}

/** The same nodes so that each one's nearest unused neighbour follows it. The strongest comes first: it owns the instance. */
function chained<T extends Candidate>(group: readonly T[], links: LinkTable, first?: NodeId): T[] {
  const isFirst = ({ id }: T) => (id === first ? 0 : 1);
  const left = group.toSorted(
    (a, b) => isFirst(a) - isFirst(b) || b.speed - a.speed || b.usable - a.usable || (a.id < b.id ? -1 : 1),
  );
  const out: T[] = [];
  let at = left.shift();
  while (at !== undefined) {
    out.push(at);
    const here = at;
    let nearest = 0;
    let least = Number.POSITIVE_INFINITY;
    left.forEach((node, i) => {
      const far = distance(links, here.id, node.id);
      if (far < least) {
        least = far;
        nearest = i;
      }
    });
    at = left.splice(nearest, 1)[0];
  }
  return out;
}
