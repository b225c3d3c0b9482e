// The node's cluster as the API sees it: puts together the mesh, the cluster's logic and the models of this node, passes
// requests to the nodes that own their models, and answers those that other nodes pass here.

import type { AnswersHere, ClusterService, PassedRequest } from "../api/cluster/service.ts";
import type { ModelDirectory } from "../api/model-directory.ts";
import { callNode, serveCall } from "../cluster/net/call.ts";
import type { Channel } from "../cluster/net/channel.ts";
import { ClusterDriver, type ClusterDriverOptions } from "../cluster/net/cluster-driver.ts";
import type { KnownNode } from "../cluster/net/cluster-file.ts";
import {
  ClusterNode,
  type ClusterNodeOptions,
  type ClusterWork,
  type RemovalReport,
} from "../cluster/net/cluster-node.ts";
import type { Peer, Purpose } from "../cluster/net/hello.ts";
import { stateJson } from "../cluster/net/state-json.ts";
import type { NodeId, PlacementRequest } from "../cluster/types.ts";
import { CaravanError } from "../errors.ts";
import { ClusterModels } from "./cluster-models.ts";

export interface NodeClusterOptions {
  node: Omit<ClusterNodeOptions, "work">;
  driver: Omit<ClusterDriverOptions, "id" | "incarnation" | "links" | "onChange" | "log">;
  /** What this node loads by itself. */
  local: ModelDirectory;
  maxBodyBytes: number;
}

/** This node answers, by no instance. */
const UNCOUNTED: AnswersHere = { release: () => undefined };

export class NodeCluster implements ClusterService {
  /** Everything that this node answers for. */
  readonly models: ClusterModels;
  readonly #options: NodeClusterOptions;
  readonly #watchers = new Set<() => void>();
  #node: ClusterNode | undefined;
  #driver: ClusterDriver | undefined;
  #handle: ((request: Request) => Promise<Response>) | undefined;

  constructor(options: NodeClusterOptions) {
    this.#options = options;
    this.models = new ClusterModels(options.local, {
      open: () => this.#driver?.open() ?? [],
      members: () => this.#driver?.members() ?? [],
    });
  }

  /** `handle`: answers a request that a member passed here, without asking for a key. */
  async start(handle: (request: Request) => Promise<Response>): Promise<void> {
    this.#handle = handle;
    const { node, driver } = this.#options;
    const calls: ClusterWork = {
      onChannel: (channel, peer, purpose) => this.#take(channel, peer, purpose),
    };
    const lazy: ClusterWork = {
      onMesh: (mesh, cluster) => this.#driver?.onMesh(mesh, cluster),
      onUp: (mesh, link) => this.#driver?.onUp(mesh, link),
      onDown: (mesh, link, why, goodbye) => this.#driver?.onDown(mesh, link, why, goodbye),
      onSay: (mesh, from, body) => this.#driver?.onSay(mesh, from, body),
      onCall: (from, method, params) => this.#driver?.onCall(from, method, params),
      known: () => this.#known(),
      onChannel: (channel, peer, purpose) => this.#driver?.onChannel(channel, peer, purpose) ?? false,
    };
    const started = ClusterNode.create({ ...node, work: [lazy, calls] });
    this.#node = started;
    this.#driver = new ClusterDriver({
      ...driver,
      id: started.identity.id,
      incarnation: () => started.incarnation,
      links: () => started.links(),
      onChange: () => this.#changed(),
      log: node.log,
    });
    await started.follow();
  }

  get driver(): ClusterDriver | undefined {
    return this.#driver;
  }

  async close(): Promise<void> {
    await this.#node?.close();
  }

  state(): Record<string, unknown> {
    if (this.#node === undefined) return { cluster: null };
    const members = this.#driver?.members() ?? [];
    const conflict = this.#driver?.conflict ?? this.#node.mesh?.conflict;
    return {
      ...stateJson(
        this.#node.view(),
        members.map(({ record }) => record.info),
        this.#driver?.ledgers() ?? new Map(),
      ),
      links: members.flatMap(({ record }) =>
        record.links.map(({ from, to, kind, latencyUs, bandwidth, devices }) => ({
          from,
          to,
          kind,
          round_trip_us: latencyUs,
          bandwidth,
          ...(devices === undefined ? {} : { devices }),
        })),
      ),
      instances: members.flatMap(({ record }) =>
        record.info.instances.map(({ spec, phase, epoch, progress, reason, outstandingTokens }) => ({
          id: spec.id,
          model: spec.model,
          owner: record.info.id,
          phase,
          epoch,
          progress,
          reason,
          tensor: spec.tensor,
          pipeline: spec.pipeline,
          context: spec.context,
          streams: spec.streams,
          outstanding_tokens: outstandingTokens,
          ranks: spec.ranks.map(({ node, rank, stage, layers }) => ({
            node,
            rank,
            stage,
            layers,
            bytes: spec.bytes[rank] ?? 0,
          })),
        })),
      ),
      parts: (this.#driver?.parts.list() ?? []).map(({ model, bytes, inUse, idleHours }) => ({
        model,
        bytes,
        in_use: inUse,
        idle_hours: idleHours,
      })),
      ...(conflict === undefined ? {} : { conflict }),
    };
  }

  watch(onChange: () => void): () => void {
    this.#watchers.add(onChange);
    return () => this.#watchers.delete(onChange);
  }

  accept(code: string): Promise<string> {
    return this.#started().accept(code);
  }

  removeNode(called: string): Promise<RemovalReport> {
    return this.#started().remove(called);
  }

  plan(model: string, asked: PlacementRequest): Promise<unknown> {
    return this.#clusterDriver().desk.plan(model, asked);
  }

  createInstance(model: string, asked: PlacementRequest): Promise<string> {
    return this.#clusterDriver().desk.create(model, asked);
  }

  stopInstance(id: string): Promise<boolean> {
    return this.#clusterDriver().desk.stop(id);
  }

  cleanParts(model: string | undefined): Promise<number> {
    return this.#clusterDriver().parts.clean(model);
  }

  mayPass(): boolean {
    const members = this.#driver?.members() ?? [];
    return members.length > 1 || members.some(({ record }) => record.info.instances.length > 0);
  }

  async pass(request: PassedRequest): Promise<Response | AnswersHere> {
    const driver = this.#clusterDriver();
    const model = this.#nameOf(request.model);
    const known = driver
      .members()
      .some(({ record }) =>
        record.info.instances.some(({ spec, phase }) => spec.model === model && phase !== "gone"),
      );
    if (!known) return await this.#passToFiles(request, model);
    let give: (error: CaravanError) => void = () => undefined;
    const lost = new Promise<CaravanError>((resolve) => {
      give = resolve;
    });
    let owner: NodeId;
    try {
      ({ owner } = driver.startRequest(request.id, model, request.tokens, give));
    } catch (thrown) {
      // No instance answers; this node may have loaded the model for itself.
      if (this.#options.local.list().some(({ id, state }) => id === model && state === "ready"))
        return UNCOUNTED;
      throw thrown;
    }
    const done = () => driver.finishRequest(request.id);
    if (owner === this.#started().identity.id) return { release: done };
    return await this.#call(owner, request, () => driver.heardRequest(request.id), done, lost);
  }

  /** A model that only others have: the one with the most free memory loads it. */
  async #passToFiles(request: PassedRequest, model: string): Promise<Response | AnswersHere> {
    if (this.#options.local.list().some(({ id }) => id === model)) return UNCOUNTED;
    const [best] = (this.#driver?.members() ?? [])
      .filter(
        ({ self, direct, record }) =>
          !self &&
          direct &&
          record.info.models.some((each) => each.model === model && each.bytes >= each.total),
      )
      .sort((a, b) => b.record.info.memory.available - a.record.info.memory.available);
    if (best === undefined) return UNCOUNTED;
    const nothing = () => undefined;
    return await this.#call(best.record.info.id, request, nothing, nothing, undefined);
  }

  async #call(
    to: NodeId,
    request: PassedRequest,
    onHeard: () => void,
    done: () => void,
    lost: Promise<CaravanError> | undefined,
  ): Promise<Response> {
    const mesh = this.#started().mesh;
    let channel: Channel;
    try {
      if (mesh === undefined) throw new CaravanError("cluster_degraded", "this node has left the cluster");
      channel = await mesh.open(to, "call", request.signal);
    } catch (thrown) {
      done();
      throw thrown;
    }
    const leave = () => channel.close(new CaravanError("cancelled", "The client closed the connection."));
    request.signal.addEventListener("abort", leave, { once: true });
    if (request.signal.aborted) leave();
    lost?.then((why) => channel.close(why));
    return await callNode({
      channel,
      request,
      onHeard,
      onBroken: request.onBroken,
      onEnd: () => {
        request.signal.removeEventListener("abort", leave);
        done();
        request.onEnd();
      },
    });
  }

  #known(): KnownNode[] {
    return (this.#driver?.members() ?? []).map(({ record: { info } }) => ({
      ...{ id: info.id, name: info.name, addresses: info.addresses.slice(0, 4) },
    }));
  }

  /** The name under which instances know a model that goes by several. */
  #nameOf(name: string): string {
    const { local } = this.#options;
    return local.list().find(({ id, aliases = [] }) => id === name || aliases.includes(name))?.id ?? name;
  }

  #take(channel: Channel, _peer: Peer, purpose: Purpose): boolean {
    const handle = this.#handle;
    if (purpose !== "call" || handle === undefined) return false;
    void serveCall({ channel, maxBodyBytes: this.#options.maxBodyBytes, handle });
    return true;
  }

  #started(): ClusterNode {
    if (this.#node === undefined) throw new CaravanError("internal_error", "the cluster is not started");
    return this.#node;
  }

  #clusterDriver(): ClusterDriver {
    if (this.#driver === undefined) throw new CaravanError("internal_error", "the cluster is not started");
    return this.#driver;
  }

  #changed(): void {
    for (const watcher of this.#watchers) watcher();
  }
}
