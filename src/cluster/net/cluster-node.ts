// This node's part in its cluster: follows the cluster's file (created, joined and left by other processes too), keeps
// the mesh running while there is a cluster, lets new nodes in, and says what it sees. Nothing runs without a cluster.

import { statSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import { VERSION } from "../../version.ts";
import type { Link, NodeId } from "../types.ts";
import type { Channel } from "./channel.ts";
import { type ClusterCredentials, loadCluster, saveCluster, withKnownNode } from "./cluster-file.ts";
import type { Peer, Purpose } from "./hello.ts";
import { type Identity, loadIdentity, nextIncarnation } from "./identity.ts";
import { type JoinRequest, JoinRequests } from "./joining.ts";
import type { Link as PeerLink } from "./link.ts";
import { countProbe, measureBandwidth } from "./link-probe.ts";
import { Mesh, type Stranger } from "./mesh.ts";

/** Port of the control plane: TCP for TLS, and UDP of the same number for beacons. */
export const CLUSTER_PORT = 11712;
const FOLLOW_MS = 500;
const PROBE_PAUSE_MS = 60_000;

/** What lives on the mesh: told of nodes, messages and connections while there is a cluster. */
export interface ClusterWork {
  onUp?(mesh: Mesh, link: PeerLink): void;
  onDown?(mesh: Mesh, link: PeerLink, why: CaravanError, goodbye: boolean): void;
  onSay?(mesh: Mesh, from: NodeId, body: unknown): void;
  /** undefined: not a method of this. */
  onCall?(from: NodeId, method: string, params: unknown): Promise<unknown> | undefined;
  /** Whether it took the connection over. */
  onChannel?(channel: Channel, peer: Peer, purpose: Purpose): boolean;
  /** The mesh is there, or (undefined) no more. */
  onMesh?(mesh: Mesh | undefined, cluster: string | undefined): void;
}

export interface ClusterNodeOptions {
  /** Holds node.pem and cluster.json (identity.ts). */
  folder: string;
  /** Of the control plane; 0 = any free one. */
  port: number;
  /** Address of the control plane; default: all. */
  host?: string;
  peers: readonly string[];
  discovery?: boolean | number;
  name?: string;
  log: Logger;
  work?: readonly ClusterWork[];
  silenceMs?: number;
}

export interface NodeView {
  id: NodeId;
  name: string;
  version: string;
  incarnation: number;
  addresses: string[];
}

export interface ClusterView {
  /** null: this node is in no cluster. */
  cluster: string | null;
  self: NodeView;
  /** Nodes that this one can talk to right now. */
  reachable: NodeView[];
  links: Link[];
  joinRequests: JoinRequest[];
  /** Heard on the network, but no members. */
  strangers: Stranger[];
  /** Addresses that do not answer. */
  problems: { address: string; problem: string }[];
}

const AcceptParams = v.object({ code: v.pipe(v.string(), v.maxLength(64)) });
const AcceptAnswer = v.union([v.object({ name: v.string() }), v.object({ name: v.null() })]);

export class ClusterNode {
  readonly identity: Identity;
  readonly #options: ClusterNodeOptions;
  #incarnation = 0;
  #cluster: ClusterCredentials | undefined;
  #mesh: Mesh | undefined;
  #joins: JoinRequests | undefined;
  #fileStamp = "";
  #timer: ReturnType<typeof setInterval> | undefined;
  #following: Promise<void> = Promise.resolve();
  #closed = false;
  readonly #bandwidth = new Map<NodeId, number>();

  private constructor(options: ClusterNodeOptions) {
    this.#options = options;
    this.identity = loadIdentity(options.folder);
  }

  /** Starts the mesh if this node is in a cluster, and follows the file from now on. Rejects where the port is taken or a
   * file is damaged. */
  static async start(options: ClusterNodeOptions): Promise<ClusterNode> {
    const node = ClusterNode.create(options);
    await node.follow();
    return node;
  }

  /** Only reads the node's key; follow() starts it. */
  static create(options: ClusterNodeOptions): ClusterNode {
    return new ClusterNode(options);
  }

  async follow(): Promise<void> {
    const { log } = this.#options;
    await this.#follow();
    this.#timer = setInterval(() => {
      this.#following = this.#following
        .then(() => this.#follow())
        .catch((thrown) => log.error("the cluster cannot be followed", asCaravanError(thrown).toJSON()));
    }, FOLLOW_MS);
  }

  get mesh(): Mesh | undefined {
    return this.#mesh;
  }

  get clusterName(): string | undefined {
    return this.#cluster?.name;
  }

  get incarnation(): number {
    return this.#incarnation;
  }

  view(): ClusterView {
    const mesh = this.#mesh;
    const { id } = this.identity;
    const address = (port: number) => (port === 0 ? [] : [`${this.#options.host ?? "*"}:${port}`]);
    return {
      cluster: this.#cluster?.name ?? null,
      self: {
        id,
        name: mesh?.name ?? this.#options.name ?? "",
        version: VERSION,
        incarnation: this.#incarnation,
        addresses: address(mesh?.port ?? 0),
      },
      reachable: (mesh?.links ?? []).map(({ peer }) => ({
        id: peer.id,
        name: peer.name,
        version: peer.version,
        incarnation: peer.incarnation,
        addresses: mesh?.addressesOf(peer.id) ?? [],
      })),
      links: this.links(),
      joinRequests: this.#joins?.list() ?? [],
      strangers: [...(mesh?.strangers ?? [])],
      problems: mesh?.problems ?? [],
    };
  }

  /** Links from this node, as far as they are measured. */
  links(): Link[] {
    return (this.#mesh?.links ?? []).flatMap((link) =>
      link.roundTripUs === undefined
        ? []
        : [
            {
              from: this.identity.id,
              to: link.peer.id,
              kind: "tcp" as const,
              latencyUs: link.roundTripUs,
              bandwidth: this.#bandwidth.get(link.peer.id) ?? 0,
            },
          ],
    );
  }

  /** Lets the new node with this code in, wherever in the cluster its request waits; its name. */
  async accept(code: string): Promise<string> {
    if (this.#mesh === undefined || this.#joins === undefined) throw noCluster();
    if (this.#joins.has(code)) return await this.#acceptHere(code);
    const answers = await Promise.allSettled(
      this.#mesh.links.map((link) => link.call("join.accept", { code }, 8000)),
    );
    for (const answer of answers) {
      if (answer.status === "rejected") continue;
      const parsed = v.safeParse(AcceptAnswer, answer.value);
      if (parsed.success && parsed.output.name !== null) return parsed.output.name;
    }
    const refused = answers.find(
      (answer) => answer.status === "rejected" && asCaravanError(answer.reason).code === "permission_denied",
    );
    if (refused?.status === "rejected") throw refused.reason;
    // Says that no such request waits, in the same words as if only this node had been asked.
    return (await this.#joins.accept(code)).name;
  }

  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    await this.#following;
    await this.#leaveMesh();
  }

  async #acceptHere(code: string): Promise<string> {
    if (this.#joins === undefined) throw noCluster();
    const node = await this.#joins.accept(code);
    this.#remember(node);
    this.#options.log.info("a node was let in", { node: node.name, id: node.id.slice(0, 8) });
    return node.name;
  }

  #remember(node: { id: NodeId; name: string; addresses: string[] }): void {
    if (this.#cluster === undefined) return;
    const known = withKnownNode(this.#cluster, node);
    if (known === this.#cluster) return;
    this.#cluster = known;
    saveCluster(this.#options.folder, known);
    this.#fileStamp = this.#stamp();
  }

  /** Brings the mesh in line with the file. */
  async #follow(): Promise<void> {
    const stamp = this.#stamp();
    if (this.#closed || (stamp === this.#fileStamp && (stamp === "") === (this.#mesh === undefined))) return;
    const cluster = loadCluster(this.#options.folder);
    this.#fileStamp = stamp;
    const same = cluster?.name === this.#cluster?.name && cluster?.secret === this.#cluster?.secret;
    if (same && cluster !== undefined && this.#mesh !== undefined) {
      this.#cluster = cluster;
      return;
    }
    await this.#leaveMesh();
    this.#cluster = cluster;
    if (cluster !== undefined) await this.#enterMesh(cluster);
  }

  #stamp(): string {
    try {
      const { mtimeMs, ino, size } = statSync(join(this.#options.folder, "cluster.json"));
      return `${mtimeMs} ${ino} ${size}`;
    } catch {
      return ""; // there is none
    }
  }

  async #enterMesh(cluster: ClusterCredentials): Promise<void> {
    const { folder, port, host, peers, discovery, name, log, silenceMs } = this.#options;
    this.#incarnation = nextIncarnation(folder);
    const credentials = (): ClusterCredentials => {
      if (this.#cluster === undefined) throw noCluster();
      return this.#cluster;
    };
    this.#joins = new JoinRequests({ ownId: this.identity.id, credentials: () => this.#invitation() });
    this.#mesh = await Mesh.start({
      identity: this.identity,
      incarnation: this.#incarnation,
      cluster: credentials,
      port,
      peers,
      log,
      ...(host === undefined ? {} : { host }),
      ...(discovery === undefined ? {} : { discovery }),
      ...(name === undefined ? {} : { name }),
      ...(silenceMs === undefined ? {} : { silenceMs }),
      onUp: (link) => this.#up(link),
      onDown: (link, why, goodbye) => {
        if (this.#mesh !== undefined)
          for (const work of this.#work()) work.onDown?.(this.#mesh, link, why, goodbye);
      },
      onSay: (from, body) => {
        if (this.#mesh !== undefined) for (const work of this.#work()) work.onSay?.(this.#mesh, from, body);
      },
      onCall: (from, method, params) => this.#serve(from, method, params),
      onChannel: (channel, peer, purpose) => this.#take(channel, peer, purpose),
    });
    log.info("in a cluster", {
      cluster: cluster.name,
      port: this.#mesh.port,
      incarnation: this.#incarnation,
    });
    for (const work of this.#work()) work.onMesh?.(this.#mesh, cluster.name);
  }

  #work(): readonly ClusterWork[] {
    return this.#options.work ?? [];
  }

  async #leaveMesh(): Promise<void> {
    const mesh = this.#mesh;
    if (mesh === undefined) return;
    this.#joins?.close();
    this.#joins = undefined;
    for (const work of this.#work()) work.onMesh?.(undefined, undefined);
    this.#mesh = undefined;
    await mesh.close();
    this.#options.log.info("left the cluster's network", { cluster: this.#cluster?.name });
  }

  /** What a new node gets: the cluster, and this node among the known ones. */
  #invitation(): ClusterCredentials {
    const mesh = this.#mesh;
    if (this.#cluster === undefined || mesh === undefined) throw noCluster();
    return withKnownNode(this.#cluster, { id: this.identity.id, name: mesh.name, addresses: [] });
  }

  #up(link: PeerLink): void {
    const { peer } = link;
    const addresses = this.#mesh?.addressesOf(peer.id) ?? [];
    this.#remember({ id: peer.id, name: peer.name, addresses: addresses.slice(0, 4) });
    void this.#probe(link);
    if (this.#mesh !== undefined) for (const work of this.#work()) work.onUp?.(this.#mesh, link);
  }

  /** Measures when nodes meet and then every minute, as long as the link lives. */
  async #probe(link: PeerLink): Promise<void> {
    const { id } = link.peer;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const over = link.ended.then(() => clearTimeout(timer));
    while (link.channel.open && this.#mesh?.linkTo(id) === link) {
      try {
        this.#bandwidth.set(id, await measureBandwidth(await this.#mesh.open(id, "probe")));
      } catch (thrown) {
        this.#options.log.debug("bandwidth not measured", { node: link.peer.name, reason: String(thrown) });
      }
      const pause = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, PROBE_PAUSE_MS);
      });
      await Promise.race([over, pause]);
      clearTimeout(timer);
    }
  }

  #serve(from: NodeId, method: string, params: unknown): Promise<unknown> {
    if (method === "join.accept") {
      const { code } = v.parse(AcceptParams, params);
      if (this.#joins?.has(code) !== true) return Promise.resolve({ name: null });
      return this.#acceptHere(code).then((name) => ({ name }));
    }
    for (const work of this.#work()) {
      const answer = work.onCall?.(from, method, params);
      if (answer !== undefined) return answer;
    }
    return Promise.reject(
      new CaravanError("unknown_url", `this node knows no call "${method}"`, {
        hint: "Install the same version of caravan on all nodes.",
      }),
    );
  }

  #take(channel: Channel, peer: Peer, purpose: Purpose): void {
    if (purpose === "join" && this.#joins !== undefined) {
      void this.#joins.add(channel, peer);
      return;
    }
    if (purpose === "probe") {
      void countProbe(channel);
      return;
    }
    for (const work of this.#work()) if (work.onChannel?.(channel, peer, purpose) === true) return;
    channel.close();
  }
}

function noCluster(): CaravanError {
  return new CaravanError("invalid_argument", "this node is in no cluster", {
    hint: "`caravan cluster create` makes one, `caravan join` joins one.",
  });
}
