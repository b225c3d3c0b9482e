// GET /cluster/state: what this node sees of its cluster, in the API's spelling.

import type { NodeLedger } from "../ledger-view.ts";
import type { NodeId, NodeInfo } from "../types.ts";
import type { ClusterView, NodeView } from "./cluster-node.ts";

/** infos: what nodes, this one among them, have said of themselves last. ledgers: their memory. */
export function stateJson(
  view: ClusterView,
  infos: readonly NodeInfo[],
  ledgers: ReadonlyMap<NodeId, NodeLedger> = new Map(),
): Record<string, unknown> {
  const nodes = new Map<string, NodeView & { reachable: boolean }>();
  if (view.cluster !== null) nodes.set(view.self.id, { ...view.self, reachable: true });
  for (const node of view.reachable) nodes.set(node.id, { ...node, reachable: true });
  for (const info of infos)
    if (!nodes.has(info.id)) nodes.set(info.id, { ...info, reachable: info.id === view.self.id });
  return {
    cluster: view.cluster,
    self: { id: view.self.id, name: view.self.name },
    nodes: [...nodes.values()].map((node) => {
      const info = infos.find(({ id }) => id === node.id);
      const link = view.links.find(({ to }) => to === node.id);
      return {
        id: node.id,
        name: node.name,
        version: node.version,
        reachable: node.reachable,
        addresses: node.addresses,
        ...(info === undefined
          ? {}
          : {
              os: info.os,
              chip: info.chip,
              device: info.device,
              memory: info.memory,
              memory_bandwidth: info.bandwidth,
              rdma: info.rdma,
              models: info.models,
            }),
        ...(ledgers.has(node.id) ? { ledger: ledgers.get(node.id) } : {}),
        ...(link === undefined ? {} : { round_trip_us: link.latencyUs, bandwidth: link.bandwidth }),
      };
    }),
    away: view.away.filter(({ id }) => !nodes.has(id)),
    join_requests: view.joinRequests.map(({ name, from, waitingSeconds }) => ({
      name,
      from,
      waiting_seconds: waitingSeconds,
    })),
    strangers: view.strangers,
    problems: view.problems,
  };
}
