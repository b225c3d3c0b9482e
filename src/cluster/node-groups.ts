// Which nodes to try together, and in what order: of few nodes all; of up to 16 only those that could be best, the fastest, the largest, and
// the neighbours of each node by their links, in an order that puts good links inside tensor groups; and what is one exchange away. Pure.

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

/** Every ordered choice of `size` nodes: of five at most 120. The order within a tensor group decides who gets which whole heads and groups, and
 * which node the vocabulary's remainder goes to: where few heads are shared out that was up to 13 % of the speed. first: has rank 0. */
export function* allOrders<T extends Candidate>(
  nodes: readonly T[],
  size: number,
  first?: NodeId,
): Generator<T[]> {
  if (size === 0) {
    yield [];
    return;
  }
  for (const node of nodes) {
    if (first !== undefined && node.id !== first) continue;
    for (const rest of allOrders(
      nodes.filter((other) => other !== node),
      size - 1,
    ))
      yield [node, ...rest];
  }
}

/** Every way to fill `stages` tensor groups of `tensor` nodes each; within a group one order, the strongest first.
 * Of 5 nodes at most 120 for one shape. first: has rank 0. */
export function* allArrangements<T extends Candidate>(
  nodes: readonly T[],
  tensor: number,
  stages: number,
  first?: NodeId,
): Generator<T[]> {
  if (stages === 0) {
    yield [];
    return;
  }
  const strongest = nodes.toSorted(
    (a, b) => Number(b.id === first) - Number(a.id === first) || b.speed - a.speed || (a.id < b.id ? -1 : 1),
  );
  for (const group of combinations(strongest, tensor)) {
    if (first !== undefined && group[0]?.id !== first) continue;
    const left = strongest.filter((node) => !group.includes(node));
    for (const rest of allArrangements(left, tensor, stages - 1)) yield [...group, ...rest];
  }
}

/** How many allArrangements gives, of `count` nodes. */
export function arrangements(count: number, tensor: number, stages: number): number {
  let ways = 1;
  for (let stage = 0; stage < stages; stage++)
    for (let i = 0; i < tensor; i++) ways *= (count - stage * tensor - i) / (i + 1);
  return Math.round(ways);
}

function* combinations<T>(list: readonly T[], count: number): Generator<T[]> {
  if (count === 0) {
    yield [];
    return;
  }
  for (let i = 0; i + count <= list.length; i++)
    for (const rest of combinations(list.slice(i + 1), count - 1)) yield [list[i] as T, ...rest];
}

/** Arrangements that differ by one exchange: of a node for one that is outside, or of two nodes for each other's place. */
export function* neighbourGroups<T extends Candidate>(
  group: readonly T[],
  nodes: readonly T[],
  first?: NodeId,
): Generator<T[]> {
  const begin = first === undefined ? 0 : 1;
  for (let i = begin; i < group.length; i++)
    for (const other of nodes) if (!group.includes(other)) yield group.with(i, other);
  for (let i = begin; i < group.length; i++)
    for (let j = i + 1; j < group.length; j++) yield group.with(i, group[j] as T).with(j, group[i] as T);
}
