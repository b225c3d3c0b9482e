// Runs the cluster's logic (../cluster-logic.ts) on this node: its messages go over the mesh, its orders become processes, its
// clock is the monotonic one, and what it reads of this machine is kept up to date.

import { randomBytes } from "node:crypto";
import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { Logger } from "../../log.ts";
import { availableMemory } from "../../model/machine-memory.ts";
import type { InstalledModel } from "../../model/store.ts";
import type { OpenModel, RunOptions } from "../../node/open-model.ts";
import { ClusterLogic } from "../cluster-logic.ts";
import { ProfilePlacer } from "../instance-placer.ts";
import { ledgersOf, type NodeLedger } from "../ledger-view.ts";
import { BEAT_MS, type Member } from "../membership.ts";
import { MemoryLedger } from "../memory-ledger.ts";
import { CARAVAN_PROTOCOL } from "../protocol-version.ts";
import type { RankOrder } from "../rank-host.ts";
import type { RunningRequest } from "../requests.ts";
import type { Link, ModelPresence, NodeId, NodeSpeed } from "../types.ts";
import { holdersOf, isFetching, modelsOfRanks, neighboursOf, wholeModelsOf } from "../view-questions.ts";
import type { Channel } from "./channel.ts";
import type { ClusterWork } from "./cluster-node.ts";
import { FileVerdicts } from "./file-verdicts.ts";
import type { Peer, Purpose } from "./hello.ts";
import { InstanceDesk } from "./instance-desk.ts";
import type { Link as PeerLink } from "./link.ts";
import type { Mesh } from "./mesh.ts";
import { serveModelFiles } from "./model-files.ts";
import { ModelNeeds } from "./model-needs.ts";
import { ModelParts } from "./model-parts.ts";
import { ModelTermsCache } from "./model-source.ts";
import { OwnRecord } from "./own-record.ts";
import { ProcessRanks } from "./rank-runner.ts";
import { RdmaLinks } from "./rdma-links.ts";
import { ExchangeSchema } from "./wire.ts";

/** The slow parts of this node's record (memory, models, links) are read anew this often. */
const REFRESH_MS = 2000;
/** Beats in a refresh. */
const REFRESH_BEATS = Math.round(REFRESH_MS / BEAT_MS);
/** How much of a request's work counts where only the number of requests is known. */
const TOKENS_A_REQUEST = 512;
/** Reading a large model's headers takes a moment. */
const ASK_LIMIT_MS = 20_000;

export interface ClusterDriverOptions {
  id: NodeId;
  incarnation: () => number;
  /** The model's files on this node. Throws model_not_found. */
  model: (name: string) => InstalledModel;
  /** Where parts of models that other nodes have are kept. */
  partsFolder: string;
  /** Remembers which files have the content that the hub states (file-verdicts.ts). */
  verdictsFile: string;
  models: () => ModelPresence[];
  links: () => Link[];
  run: RunOptions;
  /** RDMA devices that may be used; empty: all. */
  rdma: readonly string[] | "off";
  /** Cores that a rank computes with, and on what. */
  compute: () => { threads: number; device: "cpu" | "metal" };
  /** Measured once: bytes/s, and what else predictions need. */
  figures: () => { bandwidth: number; speed: NodeSpeed | null };
  /** The view or an instance changed. */
  onChange: () => void;
  log: Logger;
  /** Command line of a rank process; replaced in tests. */
  rankCommand?: readonly string[];
}

/** An instance of this node that answers. */
export interface OpenInstance {
  order: RankOrder;
  model: OpenModel;
}

export class ClusterDriver implements ClusterWork {
  readonly #options: ClusterDriverOptions;
  readonly #ranks: ProcessRanks;
  readonly #rdma: RdmaLinks;
  readonly #ledger: MemoryLedger;
  readonly #record: OwnRecord;
  readonly #terms: ModelTermsCache;
  readonly #needs: ModelNeeds;
  readonly #open = new Map<string, OpenInstance>();
  readonly #verdicts: FileVerdicts;
  /** Plans and instances that somebody asks for. */
  readonly desk: InstanceDesk;
  /** Parts of models that were fetched for ranks. */
  readonly parts: ModelParts;
  /** Ends the answer of a request that this node passed on. */
  readonly #failRequest = new Map<string, (error: CaravanError) => void>();
  #logic: ClusterLogic | undefined;
  #mesh: Mesh | undefined;
  #timer: ReturnType<typeof setInterval> | undefined;
  #beats = 0;
  #conflict: string | undefined;

  constructor(options: ClusterDriverOptions) {
    this.#options = options;
    this.#ledger = new MemoryLedger(availableMemory().available);
    this.#record = new OwnRecord({
      ...options,
      links: () => [...options.links(), ...this.#rdma.links()],
      rdma: () => this.#rdma.survey,
      ledger: this.#ledger,
    });
    this.#verdicts = new FileVerdicts(options.verdictsFile);
    this.parts = new ModelParts({
      folder: options.partsFolder,
      holders: (model) => this.#holdersOf(model),
      open: (node, signal) => this.#openMesh(node, "file", signal),
      nameOf: (id) => this.nameOf(id),
      inUse: () => modelsOfRanks(this.members(), options.id),
      log: options.log,
    });
    this.#terms = new ModelTermsCache(
      (name) => this.#model(name),
      options.run,
      () => this.#logic?.turn(),
    );
    this.#needs = new ModelNeeds({
      own: options.models,
      others: () => wholeModelsOf(this.members()),
      source: this.#terms.source,
      holders: (model) => this.#holdersOf(model),
      ask: (node, method, params) => this.#ask(node, method, params),
      onChange: options.onChange,
      log: options.log,
    });
    this.desk = new InstanceDesk({
      id: options.id,
      logic: () => this.#cluster(),
      model: options.model,
      terms: this.#terms,
      holders: (model) => this.#holdersOf(model),
      ask: (node, method, params) => this.#ask(node, method, params),
    });
    this.#rdma = new RdmaLinks({
      id: options.id,
      wanted: options.rdma,
      others: () => neighboursOf(this.members(), options.id),
      open: (node) => this.#openMesh(node, "rdma"),
      onChange: () => this.#refresh(),
      log: options.log,
      ...(options.rankCommand === undefined ? {} : { command: options.rankCommand }),
    });
    const turn = () => this.#logic?.turn();
    this.#ranks = new ProcessRanks({
      prepare: (order, onProgress, signal) => this.#prepare(order, onProgress, signal),
      fetching: (instance, epoch) => isFetching(this.members(), instance, epoch),
      run: options.run,
      compute: options.compute,
      nodeName: (id) => this.nameOf(id),
      rdma: (nodes, rank) => this.#rdma.groupOptions(nodes, rank),
      progress: (instance, epoch, phase, fraction) => {
        this.#logic?.ranks.progress(instance, epoch, phase, fraction);
      },
      ready: (instance, epoch) => {
        this.#logic?.ranks.ready(instance, epoch);
        turn();
      },
      failed: (instance, epoch, cause, reason) => {
        this.#logic?.ranks.failed(instance, epoch, cause, reason);
        if (this.#isMine(instance)) this.#logic?.instances.engineFailed(instance, epoch, reason);
        turn();
      },
      stopped: (instance, epoch) => {
        this.#logic?.ranks.stopped(instance, epoch);
        turn();
      },
      onOpen: (order, model) => {
        this.#open.set(order.spec.id, { order, model });
        options.onChange();
      },
      onClosed: (order) => {
        const { id } = order.spec;
        if (this.#open.get(id)?.order.epoch === order.epoch) this.#open.delete(id);
        options.onChange();
      },
      log: options.log,
      ...(options.rankCommand === undefined ? {} : { command: options.rankCommand }),
    });
  }

  /** This node first; empty without a cluster. */
  members(): Member[] {
    return this.#logic?.members ?? [];
  }

  /** Why this node must not take part; undefined: all is well. */
  get conflict(): string | undefined {
    return this.#logic?.membership.conflict;
  }

  /** Instances of this node that answer. */
  open(): OpenInstance[] {
    return [...this.#open.values()];
  }

  /** Every node's memory, for people; with the cluster's models of which is known by then what they need. */
  ledgers(): Map<NodeId, NodeLedger> {
    return ledgersOf(this.members(), this.#needs.all());
  }

  /** Process ids of ranks > 0. */
  rankPids(): number[] {
    return this.#ranks.pids();
  }

  nameOf(id: NodeId): string {
    const member = this.members().find(({ record }) => record.info.id === id);
    return member?.record.info.name ?? `node ${id.slice(0, 8)}`;
  }

  /** Chooses an instance for a request and counts it; `fail` is called when it cannot be answered any more. Throws model_loading,
   * cluster_degraded or model_not_found. */
  startRequest(
    id: string,
    model: string,
    tokens: number,
    fail: (error: CaravanError) => void,
  ): RunningRequest {
    const logic = this.#cluster();
    this.#reportLoad();
    const request = logic.requests.start(id, model, tokens, logic.members);
    this.#failRequest.set(id, fail);
    return request;
  }

  heardRequest(id: string): void {
    this.#logic?.requests.heard(id);
  }

  finishRequest(id: string): void {
    this.#failRequest.delete(id);
    this.#logic?.requests.finish(id);
  }

  onMesh(mesh: Mesh | undefined, cluster: string | undefined): void {
    clearInterval(this.#timer);
    this.#logic?.membership.leave();
    this.#ranks.onMesh(mesh);
    this.#logic = undefined;
    this.#mesh = mesh;
    for (const fail of this.#failRequest.values())
      fail(new CaravanError("cluster_degraded", "this node has left the cluster", { retryAfterSeconds: 2 }));
    this.#failRequest.clear();
    if (mesh === undefined || cluster === undefined) {
      this.#options.onChange();
      return;
    }
    this.#logic = new ClusterLogic({
      cluster,
      protocol: CARAVAN_PROTOCOL,
      boot: randomBytes(8).toString("hex"),
      info: this.#record.info(mesh),
      ledger: this.#ledger,
      placer: new ProfilePlacer(this.#terms.source),
      runner: this.#ranks,
      now: () => performance.now(),
      send: (to, message) => mesh.say(to, message),
      failRequest: ({ id }, error) => {
        const fail = this.#failRequest.get(id);
        this.#failRequest.delete(id);
        fail?.(error);
      },
      // Those of other nodes' clients too: they run in this node's API.
      endRequests: (instance, epoch, error) => {
        const open = this.#open.get(instance);
        if (open?.order.epoch === epoch) open.model.endRequests(error);
      },
    });
    for (const link of mesh.links) this.#logic.membership.peerUp(link.peer.id);
    this.#timer = setInterval(() => this.#tick(), BEAT_MS);
    this.#options.onChange();
  }

  onUp(_mesh: Mesh, link: PeerLink): void {
    this.#logic?.membership.peerUp(link.peer.id);
    this.#logic?.turn();
  }

  onDown(mesh: Mesh, link: PeerLink, _why: unknown, goodbye: boolean): void {
    // A restarted node has its new link already.
    if (mesh.linkTo(link.peer.id) === undefined) this.#logic?.membership.peerDown(link.peer.id, goodbye);
    this.#logic?.turn();
    this.#options.onChange();
  }

  onSay(_mesh: Mesh, from: NodeId, body: unknown): void {
    this.#logic?.membership.receive(from, v.parse(ExchangeSchema, body));
    this.#options.onChange();
  }

  onCall(_from: NodeId, method: string, params: unknown): Promise<unknown> | undefined {
    if (this.#logic === undefined) return undefined;
    return this.#needs.onCall(method, params) ?? this.desk.onCall(method, params);
  }

  onChannel(channel: Channel, peer: Peer, purpose: Purpose): boolean {
    if (purpose === "file") {
      const folderOf = (model: string) => this.#options.model(model).path;
      void serveModelFiles(channel, { folderOf, verdicts: this.#verdicts });
      return true;
    }
    if (purpose === "rdma") {
      this.#rdma.answer(channel, peer.id);
      return true;
    }
    return this.#ranks.onChannel(channel, peer, purpose);
  }

  async #openMesh(node: NodeId, purpose: Purpose, signal?: AbortSignal): Promise<Channel> {
    if (this.#mesh === undefined)
      throw new CaravanError("cluster_degraded", "this node has left the cluster");
    return await this.#mesh.open(node, purpose, signal);
  }

  #cluster(): ClusterLogic {
    if (this.#logic === undefined) {
      throw new CaravanError("invalid_argument", "This node is in no cluster.", {
        hint: "`caravan cluster create` makes one, `caravan join` joins one.",
      });
    }
    return this.#logic;
  }

  /** A model whose files, or a part of them, are here. Throws model_not_found. */
  #model(name: string): InstalledModel {
    try {
      return this.#options.model(name);
    } catch (thrown) {
      const part = this.parts.find(name);
      if (part === undefined) throw thrown;
      return part;
    }
  }

  async #prepare(
    order: RankOrder,
    onProgress: (fraction: number) => void,
    signal: AbortSignal,
  ): Promise<InstalledModel> {
    const { model: name, ranks } = order.spec;
    try {
      return this.#options.model(name);
    } catch (thrown) {
      const missing = asCaravanError(thrown);
      if (missing.code !== "model_not_found") throw thrown;
      const { rank } = order;
      return await this.parts.prepare({ model: name, shares: ranks, rank, onProgress, signal }, missing);
    }
  }

  /** Nodes that have all of the model, the nearest first. */
  #holdersOf(model: string): NodeId[] {
    const trip = (id: NodeId) => this.#mesh?.linkTo(id)?.roundTripUs ?? Number.POSITIVE_INFINITY;
    return holdersOf(this.members(), model).sort((a, b) => trip(a) - trip(b));
  }

  #ask(node: NodeId, method: string, params: object): Promise<unknown> {
    if (this.#mesh === undefined)
      return Promise.reject(new CaravanError("cluster_degraded", "this node has left the cluster"));
    return this.#mesh.call(node, method, params, ASK_LIMIT_MS);
  }

  #isMine(instance: string): boolean {
    return this.#logic?.instances.states().some(({ spec }) => spec.id === instance) ?? false;
  }

  #tick(): void {
    try {
      if (this.#beats++ % REFRESH_BEATS === 0) {
        this.#rdma.step();
        this.#refresh();
        this.parts.age(performance.now()).catch((thrown) => {
          this.#options.log.warn("parts of models are not kept in order", asCaravanError(thrown).toJSON());
        });
      }
      this.#reportLoad();
      this.#logic?.tick();
      const conflict = this.conflict;
      if (conflict !== undefined && conflict !== this.#conflict) this.#options.log.error(conflict);
      this.#conflict = conflict;
    } catch (thrown) {
      // The next turn goes on from what is there; a fault that stays is seen in the log.
      this.#options.log.error("a turn of the cluster failed", asCaravanError(thrown).toJSON());
    }
  }

  /** Outstanding work of this node's own instances, for the balance between instances. */
  #reportLoad(): void {
    for (const { order, model } of this.#open.values()) {
      const busy = model.engine.outstanding();
      const state = this.#logic?.instances.states().find(({ spec }) => spec.id === order.spec.id);
      if (state === undefined) continue;
      const tokens = busy * TOKENS_A_REQUEST;
      if (tokens !== state.outstandingTokens) this.#logic?.instances.load(order.spec.id, tokens, Date.now());
    }
  }

  #refresh(): void {
    if (this.#logic !== undefined && this.#mesh !== undefined) this.#record.refresh(this.#logic, this.#mesh);
  }
}
