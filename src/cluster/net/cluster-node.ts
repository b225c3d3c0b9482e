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
import {
  type ClusterCredentials,
  CredentialsSchema,
  type KnownNode,
  loadCluster,
  saveCluster,
  withKnownNode,
} from "./cluster-file.ts";
import type { Peer, Purpose } from "./hello.ts";
import { type Identity, loadIdentity, nextIncarnation } from "./identity.ts";
import { type JoinRequest, JoinRequests } from "./joining.ts";
import type { Link as PeerLink } from "./link.ts";
import { countProbe, measureBandwidth } from "./link-probe.ts";
import { Mesh, type Stranger } from "./mesh.ts";
import { forNewNode, isKnown, isRemoved, merged, secretsOf, withoutNode } from "./rotation.ts";

/** Port of the control plane: TCP for TLS, and UDP of the same number for beacons. */
export const CLUSTER_PORT = 11712;
const FOLLOW_MS = 500;
const SECRET_LIMIT_MS = 3000;
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
  /** Nodes that are met through others only. */
  known?(): readonly KnownNode[];
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
  /** Members that were met and are not to be reached. */
  away: { id: NodeId; name: string }[];
  links: Link[];
  joinRequests: JoinRequest[];
  /** Heard on the network, but no members. */
  strangers: Stranger[];
  /** Addresses that do not answer. */
  problems: { address: string; problem: string }[];
}

export interface RemovalReport {
  /** Of the removed node. */
  name: string;
  /** Nodes that have the new secret. */
  told: string[];
  /** Nodes that get it when they are there again. */
  away: string[];
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
      away: (this.#cluster?.nodes ?? [])
        .filter(({ id: other }) => mesh?.linkTo(other) === undefined)
        .map(({ id: other, name }) => ({ id: other, name })),
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

  /** Removes a node, by id (or its beginning) or name: the others get a new secret, those that are away at the next contact.
   * Rejects with invalid_argument where no node, or more than one, is called so; with disk_full or bad_file where this node cannot
   * write it down: it holds until this one restarts, and for all that have heard of it. */
  async remove(called: string): Promise<RemovalReport> {
    if (this.#cluster === undefined || this.#mesh === undefined) throw noCluster();
    // Whoever is not on the list that goes with the new secret has to join again.
    for (const work of this.#work())
      for (const node of work.known?.() ?? [])
        if (node.id !== this.identity.id && !isKnown(this.#cluster, node.id)) this.#remember(node);
    const node = this.#nodeCalled(called);
    this.#options.log.warn("removing a node from the cluster", { node: node.name, id: node.id.slice(0, 8) });
    const next = withoutNode(this.#cluster, node);
    let told: Set<NodeId>;
    try {
      this.#renew(next);
    } finally {
      // Also where the file cannot be written: the others keep it.
      told = await this.#tell();
    }
    const away = this.#cluster.nodes.filter(({ id }) => !told.has(id));
    return {
      name: node.name,
      told: this.#cluster.nodes.filter(({ id }) => told.has(id)).map(({ name }) => name),
      away: away.map(({ name }) => name),
    };
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
    this.#save(known);
  }

  /** Not where somebody has left the cluster meanwhile, or joined another: the next look at the file sees it. */
  #save(cluster: ClusterCredentials): void {
    if (this.#stamp() !== this.#fileStamp) return;
    saveCluster(this.#options.folder, cluster);
    this.#fileStamp = this.#stamp();
  }

  #nodeCalled(called: string): KnownNode {
    const { nodes = [] } = this.#cluster ?? {};
    const byId = /^[0-9a-f]{4,64}$/.test(called) ? nodes.filter(({ id }) => id.startsWith(called)) : [];
    const found = byId.length > 0 ? byId : nodes.filter(({ name }) => name === called);
    const [node] = found;
    if (node !== undefined && found.length === 1) return node;
    if (this.identity.id.startsWith(called) || this.#mesh?.name === called)
      throw new CaravanError("invalid_argument", "a node does not remove itself", {
        hint: "`caravan cluster leave` here, or remove it at another node.",
      });
    throw new CaravanError(
      "invalid_argument",
      found.length > 1
        ? `${found.length} nodes are called ${JSON.stringify(called)}: ${found.map(({ id }) => id.slice(0, 8)).join(", ")}`
        : `no node is called ${JSON.stringify(called)}`,
      { hint: "`caravan cluster status` shows names and ids; the first letters of an id are enough." },
    );
  }

  /** Takes over what another member knows of the cluster; tells it on where it is news. Throws where there is no mesh. */
  #learn(theirs: ClusterCredentials): void {
    const { log } = this.#options;
    const own = this.#cluster;
    // Refused rather than passed over: it leaves just now, or only begins, and has to hear it on another connection.
    if (own === undefined || this.#mesh === undefined) throw noCluster();
    if (isRemoved(theirs, this.identity.id)) {
      log.error("this node was removed from the cluster");
      return;
    }
    const next = merged(this.identity.id, own, theirs);
    if (next === own) return;
    log.info("the cluster has a new secret", { removed: next.removed.length });
    try {
      this.#renew(next);
    } catch (thrown) {
      log.error("the cluster's new secret cannot be written down", asCaravanError(thrown).toJSON());
    }
    this.#tell().catch((thrown) =>
      log.error("the cluster's new secret was not told on", asCaravanError(thrown).toJSON()),
    );
  }

  /** Throws where the file cannot be written, when all else is done: a full disk keeps no removed node in. */
  #renew(cluster: ClusterCredentials): void {
    this.#cluster = cluster;
    this.#mesh?.renew();
    this.#save(cluster);
  }

  /** Who has taken the secret over. A link on which that fails ends: the hello of the next one sees to it. */
  async #tell(): Promise<Set<NodeId>> {
    const params = this.#shared();
    const told = new Set<NodeId>();
    await Promise.all(
      (this.#mesh?.links ?? []).map(async (link) => {
        try {
          await link.call("cluster.secret", params, SECRET_LIMIT_MS);
          told.add(link.peer.id);
        } catch {
          link.close(new CaravanError("cluster_degraded", "it has not taken over the cluster's new secret"));
        }
      }),
    );
    return told;
  }

  /** Brings the mesh in line with the file. */
  async #follow(): Promise<void> {
    const stamp = this.#stamp();
    if (this.#closed || (stamp === this.#fileStamp && (stamp === "") === (this.#mesh === undefined))) return;
    const cluster = loadCluster(this.#options.folder);
    const before = this.#cluster;
    const same = cluster?.name === before?.name && before !== undefined && cluster !== undefined;
    if (same && secretsOf(cluster).includes(before.secret) && this.#mesh !== undefined) {
      this.#fileStamp = stamp;
      this.#cluster = cluster;
      this.#mesh.renew();
      return;
    }
    // Until this is over #save must not write the old cluster over what the file says now.
    await this.#leaveMesh();
    this.#fileStamp = stamp;
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
    this.#joins = new JoinRequests({
      ownId: this.identity.id,
      credentials: () => forNewNode(this.#shared()),
    });
    this.#mesh = await Mesh.start({
      identity: this.identity,
      incarnation: this.#incarnation,
      cluster: credentials,
      onCredentials: (theirs) => this.#learn(theirs),
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

  /** The cluster as others are told of it: this node is among the known ones. */
  #shared(): ClusterCredentials {
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
    if (method === "cluster.secret") {
      this.#learn(v.parse(CredentialsSchema, params));
      return Promise.resolve(true);
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
