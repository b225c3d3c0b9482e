// What the API needs of this node's part in a cluster, as a structural type: the node process fills it in, tests script it.

export interface ClusterService {
  /** JSON of GET /cluster/state. */
  state(): Record<string, unknown>;
  /** Lets a new node in by the code that it shows; its name. */
  accept(code: string): Promise<string>;
}
