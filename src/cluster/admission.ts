// Why a node is not one of this cluster's, as a sentence that names both sides; the proof of the secret is the
// connection's (net/hello.ts), and comes before this. Pure.

export interface ClusterName {
  cluster: string;
  protocol: number;
}

/** undefined: it belongs here. */
export function sameCluster(own: ClusterName, theirs: ClusterName): string | undefined {
  if (theirs.protocol !== own.protocol)
    return `speaks cluster protocol ${theirs.protocol}, this node ${own.protocol}: install the same version of caravan on both`;
  if (theirs.cluster !== own.cluster)
    return `belongs to the cluster "${theirs.cluster}", this node to "${own.cluster}"`;
  return undefined;
}
