// The node's standing connections to all nodes of its cluster: it listens, dials whom it hears of, keeps one link to
// each node, and hands over connections of other purposes. Who is a member of what view is decided elsewhere
// (membership.ts); this says only whom it can talk to right now.

import { hostname, networkInterfaces } from "node:os";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import { VERSION } from "../../version.ts";
import { CARAVAN_PROTOCOL } from "../protocol-version.ts";
import type { NodeId } from "../types.ts";
import { AddressBook, type Candidate } from "./address-book.ts";
import type { Channel } from "./channel.ts";
import { type ClusterCredentials, secretName, withKnownNode } from "./cluster-file.ts";
import { exchangeCredentials } from "./credentials-exchange.ts";
import { dial, joinAddress, splitAddress } from "./dial.ts";
import { Discovery, type DiscoveryStatus } from "./discovery.ts";
import { type HelloSettings, type Peer, type Purpose, REMOVED } from "./hello.ts";
import type { Identity } from "./identity.ts";
import { decline, Link } from "./link.ts";
import { type Listener, type ListenerCounters, listen } from "./listener.ts";
import { isKnown, isRemoved } from "./rotation.ts";

const TURN_MS = 200;
const CALL_LIMIT_MS = 3000;

export interface MeshOptions {
  identity: Identity;
  incarnation: number;
  /** Shown to people; default: this machine's name. */
  name?: string;
  /** Read anew when needed: its list of known nodes grows, and its secret changes when a node is removed. */
  cluster: () => ClusterCredentials;
  /** A member has another secret; what it knows of the cluster. */
  onCredentials: (theirs: ClusterCredentials) => void;
  /** Address to listen on; default: all. */
  host?: string;
  port: number;
  /** host:port of nodes that multicast does not reach. */
  peers: readonly string[];
  /** false: no beacons. A number: another UDP port (tests). */
  discovery?: boolean | number;
  log: Logger;
  /** A link to a node is there, or is gone and why. `goodbye`: the node said that it goes. */
  onUp: (link: Link) => void;
  onDown: (link: Link, why: CaravanError, goodbye: boolean) => void;
  onSay: (from: NodeId, body: unknown) => void;
  onCall: (from: NodeId, method: string, params: unknown) => Promise<unknown>;
  /** A connection of a purpose other than "control"; it belongs to the callee. */
  onChannel: (channel: Channel, peer: Peer, purpose: Purpose) => void;
  silenceMs?: number;
}

/** Nodes that were heard but do not belong here, and why; for doctor. */
export interface Stranger {
  address: string;
  name: string;
  reason: string;
}

const MAX_STRANGERS = 64;
const EARLIER =
  "has an earlier secret and is not known here: `caravan cluster leave` and `caravan join` there";
const DOUBLE =
  "another running node has this node's identity: its key file was copied; delete cluster/node.pem on one of them and join again";

export class Mesh {
  readonly name: string;
  readonly #options: MeshOptions;
  readonly #book = new AddressBook();
  readonly #links = new Map<NodeId, Link>();
  readonly #strangers = new Map<string, Stranger>();
  /** Connections of other purposes, by node. */
  readonly #channels = new Map<NodeId, Set<Channel>>();
  readonly #stop = new AbortController();
  #conflict: string | undefined;
  #listener: Listener | undefined;
  #discovery: Discovery | undefined;
  #timer: ReturnType<typeof setInterval> | undefined;

  private constructor(options: MeshOptions) {
    this.#options = options;
    this.name = (options.name ?? hostname()).slice(0, 120) || "node";
  }

  /** Listens and begins to look for nodes. Rejects with invalid_argument when the port cannot be had. */
  static async start(options: MeshOptions): Promise<Mesh> {
    const mesh = new Mesh(options);
    await mesh.#start();
    return mesh;
  }

  get port(): number {
    return this.#listener?.port ?? 0;
  }

  get links(): readonly Link[] {
    return [...this.#links.values()];
  }

  get counters(): Readonly<ListenerCounters> | undefined {
    return this.#listener?.counters;
  }

  get discovery(): DiscoveryStatus | undefined {
    return this.#discovery?.status;
  }

  /** Why other nodes do not want this one; undefined: all is well. */
  get conflict(): string | undefined {
    return this.#conflict;
  }

  get strangers(): readonly Stranger[] {
    return [...this.#strangers.values()];
  }

  /** Addresses that do not answer as they should. */
  get problems(): { address: string; problem: string }[] {
    return this.#book.problems();
  }

  linkTo(id: NodeId): Link | undefined {
    return this.#links.get(id);
  }

  /** host:port at which the node's control plane was reached. */
  addressesOf(id: NodeId): string[] {
    return this.#book.addressesOf(id);
  }

  /** Sends to the node if there is a link to it. */
  say(to: NodeId, body: unknown): void {
    this.#links.get(to)?.say(body);
  }

  /** Rejects with cluster_degraded when there is no link. */
  call(to: NodeId, method: string, params: unknown, limitMs = CALL_LIMIT_MS): Promise<unknown> {
    const link = this.#links.get(to);
    if (link === undefined) return Promise.reject(unreachable(to));
    return link.call(method, params, limitMs);
  }

  /** Opens a connection of its own to a node. Rejects with cluster_degraded. */
  async open(to: NodeId, purpose: Purpose, signal?: AbortSignal): Promise<Channel> {
    const link = this.#links.get(to);
    if (link === undefined) throw unreachable(to);
    let last: unknown = unreachable(to);
    for (const address of this.#book.addressesOf(to)) {
      try {
        const { channel, peer } = await dial({
          identity: this.#options.identity,
          settings: this.#settings(),
          address,
          purpose,
          expected: to,
          ...(signal === undefined ? {} : { signal }),
        });
        if (!this.#isCurrent(channel, peer)) continue;
        this.#tie(to, channel);
        return channel;
      } catch (thrown) {
        last = thrown;
        if (signal?.aborted || link !== this.#links.get(to)) break;
      }
    }
    throw last;
  }

  /** The cluster's secret has changed: links to nodes that it does not know any more end, those that were removed are told. */
  renew(): void {
    const cluster = this.#options.cluster();
    this.#book.forget((id) => isRemoved(cluster, id));
    for (const link of this.#links.values())
      if (isRemoved(cluster, link.peer.id)) link.dismiss(REMOVED);
      else if (!isKnown(cluster, link.peer.id))
        link.close(new CaravanError("cluster_degraded", "it has to prove the cluster's new secret"));
  }

  /** Tells every node that this one goes, and closes everything. */
  async close(): Promise<void> {
    this.#stop.abort();
    clearInterval(this.#timer);
    this.#discovery?.stop();
    for (const link of this.#links.values()) link.goodbye();
    const over = new CaravanError("shutting_down", "this node is shutting down");
    for (const channels of this.#channels.values()) for (const channel of channels) channel.close(over);
    await this.#listener?.close();
  }

  async #start(): Promise<void> {
    const { identity, host, port, log, cluster, peers, discovery = true } = this.#options;
    // Said at once: a typing mistake is not a node that does not answer.
    for (const peer of peers) splitAddress(peer);
    const listenAt = (address: string) =>
      listen({
        identity,
        settings: () => this.#settings(),
        host: address,
        port,
        log,
        onPeer: (channel, peer, purpose) => this.#accept(channel, peer, purpose),
      });
    this.#listener = await listenAt(host ?? "::").catch((thrown) => {
      const cause = thrown instanceof Error ? thrown.cause : undefined;
      const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
      // A system without IPv6.
      if (host === undefined && (code === "EAFNOSUPPORT" || code === "EADDRNOTAVAIL"))
        return listenAt("0.0.0.0");
      throw thrown;
    });
    const now = performance.now();
    for (const peer of peers) this.#book.learn(peer, undefined, true, now);
    for (const { id, addresses } of cluster().nodes)
      for (const address of addresses) if (isAddress(address)) this.#book.learn(address, id, true, now);
    this.#timer = setInterval(() => this.#dialDue(), TURN_MS);
    this.#dialDue();
    if (discovery === false) return;
    this.#discovery = new Discovery({
      announce: () => {
        const { name, secret } = cluster();
        const { id } = identity;
        const { incarnation } = this.#options;
        const beacon = { cluster: name, id, name: this.name, version: VERSION, port: this.port, incarnation };
        return { beacon, secret };
      },
      cluster,
      onHeard: (heard, address) => {
        if (heard.kind === "member" && isRemoved(cluster(), heard.beacon.id)) {
          this.#note({ address, name: heard.beacon.name, reason: "was removed from this cluster" });
        } else if (heard.kind === "member" && heard.earlier) {
          // A node that missed a change of the secret; any other one would be refused.
          if (isKnown(cluster(), heard.beacon.id))
            this.#book.hint(address, heard.beacon.id, performance.now());
          else this.#note({ address, name: heard.beacon.name, reason: EARLIER });
        } else if (heard.kind === "member") {
          this.#book.learn(address, heard.beacon.id, false, performance.now());
          this.#strangers.delete(address);
        } else this.#noteStranger(heard, address);
      },
      log,
      ...(typeof discovery === "number" ? { port: discovery } : {}),
    });
    await this.#discovery.start();
  }

  #settings(): HelloSettings {
    const { identity, incarnation, cluster } = this.#options;
    return {
      cluster: cluster(),
      node: { id: identity.id, name: this.name, version: VERSION, incarnation, port: this.port },
    };
  }

  #noteStranger(
    heard: Parameters<ConstructorParameters<typeof Discovery>[0]["onHeard"]>[0],
    address: string,
  ) {
    if (heard.kind === "member") return;
    const stranger =
      heard.kind === "version"
        ? {
            name: "?",
            reason: `speaks cluster protocol ${heard.protocol} (caravan ${heard.version}), this node protocol ${CARAVAN_PROTOCOL} (caravan ${VERSION}): install the same version on both`,
          }
        : heard.reason === "name"
          ? { name: heard.beacon.name, reason: `belongs to the cluster "${heard.beacon.cluster}"` }
          : {
              name: heard.beacon.name,
              reason: `has another secret although its cluster is called the same: \`caravan cluster leave\` and \`caravan join\` there`,
            };
    this.#note({ address, ...stranger });
  }

  #note(stranger: Stranger): void {
    const { address } = stranger;
    const known = this.#strangers.has(address);
    if (this.#strangers.size >= MAX_STRANGERS && !known) return;
    if (!known) this.#options.log.info("a node that is no member", { ...stranger });
    this.#strangers.set(address, stranger);
  }

  #dialDue(): void {
    const due = this.#book.due(performance.now(), (id) => this.#links.has(id));
    for (const candidate of due) {
      if (candidate.id === this.#options.identity.id || this.#isOwn(candidate.address)) {
        candidate.id = this.#options.identity.id;
        continue;
      }
      candidate.dialling = true;
      void this.#dial(candidate);
    }
  }

  /** This node's own port at an address of this machine: a list of peers may name every node. */
  #isOwn(address: string): boolean {
    const { host, port } = splitAddress(address);
    if (port !== this.port) return false;
    const own = Object.values(networkInterfaces()).flatMap((each) => each ?? []);
    return host === "localhost" || own.some((each) => each.address === host.replace(/%.*$/, ""));
  }

  async #dial(candidate: Candidate): Promise<void> {
    try {
      const { channel, peer } = await dial({
        identity: this.#options.identity,
        settings: this.#settings(),
        address: candidate.address,
        purpose: "control",
        ...(candidate.id === undefined ? {} : { expected: candidate.id }),
        signal: this.#stop.signal,
      });
      if (!this.#isCurrent(channel, peer)) {
        this.#book.failed(candidate, "the cluster's secret has changed", performance.now());
        return;
      }
      if (peer.secretsDiffer) {
        await this.#compare(channel, peer);
        this.#book.failed(
          candidate,
          "it has another secret of this cluster; they were compared",
          performance.now(),
        );
        return;
      }
      this.#book.succeeded(candidate, peer.id);
      this.#adopt(channel, peer, true);
    } catch (thrown) {
      if (this.#stop.signal.aborted) return;
      const { message } = asCaravanError(thrown);
      if (message !== candidate.problem)
        this.#options.log.debug("cannot reach a node", { address: candidate.address, reason: message });
      this.#book.failed(candidate, message, performance.now());
      // Said by a node whose key this one knows.
      if (message === REMOVED && candidate.id !== undefined) this.#unwanted(message, candidate.address);
    }
  }

  /** Whether the cluster's secret is still what it was while the hello was under way. Otherwise the connection ends; a removed node
   * hears why, others call again. */
  #isCurrent(channel: Channel, peer: Peer): boolean {
    const cluster = this.#options.cluster();
    const current =
      peer.proved === secretName(cluster.secret) || (peer.secretsDiffer && isKnown(cluster, peer.id));
    if (current && !isRemoved(cluster, peer.id)) return true;
    if (isRemoved(cluster, peer.id)) decline(channel, REMOVED);
    else channel.finish();
    return false;
  }

  /** Both sides learn what the other one knows of the cluster, and meet again under one secret. */
  async #compare(channel: Channel, peer: Peer): Promise<void> {
    const { cluster, identity } = this.#options;
    const self = { id: identity.id, name: this.name, addresses: [] };
    const theirs = await exchangeCredentials(channel, withKnownNode(cluster(), self));
    this.#options.log.info("compared secrets of the cluster", { node: peer.name });
    this.#options.onCredentials(theirs);
  }

  /** Heartbeats of the link notice a node that has stopped; other connections have none, and end with it. */
  #tie(id: NodeId, channel: Channel): void {
    const channels = this.#channels.get(id) ?? new Set();
    this.#channels.set(id, channels.add(channel));
    channel.closed.then(() => channels.delete(channel));
  }

  #accept(channel: Channel, peer: Peer, purpose: Purpose): void {
    if (this.#stop.signal.aborted) {
      channel.close();
      return;
    }
    if (purpose !== "join" && !this.#isCurrent(channel, peer)) return;
    if (purpose !== "control") {
      if (purpose !== "join") this.#tie(peer.id, channel);
      this.#options.onChannel(channel, peer, purpose);
      return;
    }
    if (peer.secretsDiffer) {
      this.#compare(channel, peer).catch((thrown) =>
        this.#options.log.info("secrets were not compared", {
          node: peer.name,
          reason: asCaravanError(thrown).message,
        }),
      );
      return;
    }
    const { remoteAddress } = channel.socket;
    if (remoteAddress !== undefined && peer.port > 0) {
      const address = joinAddress(remoteAddress.replace(/^::ffff:/, ""), peer.port);
      this.#book.learn(address, peer.id, false, performance.now());
    }
    this.#adopt(channel, peer, false);
  }

  /** Of two links between the same nodes both ends keep the same one: that which the node with the lower id dialled. */
  #adopt(channel: Channel, peer: Peer, dialled: boolean): void {
    const before = this.#links.get(peer.id);
    if (before?.channel.open && before.peer.incarnation > peer.incarnation) {
      // Either its files were restored from a backup, and the old link is about to be missed; or there are two of it.
      decline(channel, DOUBLE);
      return;
    }
    if (before?.channel.open && before.peer.incarnation === peer.incarnation && before.dialled !== dialled) {
      const oursWins = this.#options.identity.id < peer.id;
      if (before.dialled === oursWins) {
        channel.finish();
        return;
      }
    }
    if (this.#stop.signal.aborted) {
      channel.close();
      return;
    }
    const link: Link = new Link({
      channel,
      peer,
      dialled,
      onSay: (body) => this.#options.onSay(peer.id, body),
      onCall: (method, params) => this.#options.onCall(peer.id, method, params),
      ...(this.#options.silenceMs === undefined ? {} : { silenceMs: this.#options.silenceMs }),
    });
    this.#links.set(peer.id, link);
    const restarted = before !== undefined && before.peer.incarnation !== peer.incarnation;
    before?.close(
      new CaravanError(
        "cluster_degraded",
        restarted ? `${peer.name} was restarted` : "replaced by another link",
      ),
    );
    link.ended.then((why) => this.#ended(link, why));
    if (before === undefined || restarted) {
      this.#options.log.info("node is there", { node: peer.name, id: peer.id.slice(0, 8) });
    }
    this.#options.onUp(link);
  }

  #unwanted(reason: string, saidBy: string): void {
    if (this.#conflict === reason) return;
    this.#conflict = reason;
    this.#options.log.error(reason, { said_by: saidBy });
  }

  #ended(link: Link, why: CaravanError): void {
    const { peer } = link;
    // Replaced by a newer one: the node is still there, unless it was restarted in between.
    const now = this.#links.get(peer.id);
    if (now === link) this.#links.delete(peer.id);
    else if (now === undefined || now.peer.incarnation === peer.incarnation) return;
    for (const channel of this.#channels.get(peer.id) ?? []) channel.close(why);
    if (why.code === "permission_denied") this.#unwanted(why.message, peer.name);
    if (this.#stop.signal.aborted) return;
    if (now === link) {
      this.#options.log.info("node is gone", {
        node: peer.name,
        id: peer.id.slice(0, 8),
        reason: link.saidGoodbye ? "it said goodbye" : why.message,
      });
    }
    this.#options.onDown(link, why, link.saidGoodbye || isRemoved(this.#options.cluster(), peer.id));
  }
}

function isAddress(text: string): boolean {
  try {
    splitAddress(text);
    return true;
  } catch {
    return false;
  }
}

function unreachable(id: NodeId): CaravanError {
  return new CaravanError("cluster_degraded", `there is no connection to node ${id.slice(0, 8)}`, {
    retryAfterSeconds: 2,
  });
}
