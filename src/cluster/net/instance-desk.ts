// What people and other nodes ask this node for: plans, new instances, their end. What another node can answer better is asked there:
// plans where the model's files are, instances of the node that is to own them.

import * as v from "valibot";
import { asCaravanError, CaravanError } from "../../errors.ts";
import type { InstalledModel } from "../../model/store.ts";
import type { ClusterLogic } from "../cluster-logic.ts";
import { ProfilePlacer } from "../instance-placer.ts";
import { chooseOwner } from "../owner-choice.ts";
import { planPlacements } from "../placement.ts";
import { gigabytes } from "../placement-words.ts";
import { planReport } from "../plan-report.ts";
import type { NodeId, PlacementRequest } from "../types.ts";
import type { ModelTermsCache } from "./model-source.ts";
import { InstanceCallSchema, PlacementCallSchema } from "./wire.ts";

export interface InstanceDeskOptions {
  id: NodeId;
  /** Throws invalid_argument where this node is in no cluster. */
  logic: () => ClusterLogic;
  /** The model's files on this node. Throws model_not_found. */
  model: (name: string) => InstalledModel;
  terms: ModelTermsCache;
  /** Other nodes that have all of a model, the nearest first. */
  holders: (model: string) => NodeId[];
  ask: (node: NodeId, method: string, params: object) => Promise<unknown>;
}

export class InstanceDesk {
  readonly #options: InstanceDeskOptions;

  constructor(options: InstanceDeskOptions) {
    this.#options = options;
  }

  /** Every placement of the model on the nodes in view, as GET /cluster/plan shows it; from the hub's headers where no node has it.
   * Rejects with model_not_found or out_of_memory, and as readHubModel does. */
  async plan(model: string, asked: PlacementRequest): Promise<unknown> {
    const { logic, holders, ask, terms, model: find } = this.#options;
    logic();
    if (this.#has(model)) {
      const { name } = find(model);
      return this.#report(name, "this node's disk", await terms.terms(name), asked);
    }
    const [holder] = holders(model);
    if (holder !== undefined) return await ask(holder, "plan", { model, asked });
    const hub = await terms.hubTerms(model).catch((thrown) => {
      // Nobody knows it: that it is not here either says more, and how to get it.
      if (asCaravanError(thrown).code === "model_not_found") find(model);
      throw thrown;
    });
    const read = `the hub, ${gigabytes(hub.readBytes)} of ${gigabytes(hub.totalBytes)}`;
    return this.#report(hub.id, read, hub.terms, asked);
  }

  /** Asks for a new instance, at the node that its plan gives rank 0; its id. Rejects with model_not_found. */
  async create(model: string, asked: PlacementRequest): Promise<string> {
    const { id, logic, holders, ask, terms, model: find } = this.#options;
    logic();
    const forwarded = async (node: NodeId, method: string) =>
      v.parse(v.string(), await ask(node, method, { model, asked }));
    const [holder] = this.#has(model) ? [] : holders(model);
    if (holder !== undefined) return await forwarded(holder, "instance.create");
    const { name } = find(model);
    await terms.terms(name);
    const members = logic().members;
    const owner = chooseOwner(new ProfilePlacer(terms.source), name, asked, members, id);
    if (owner === id) return this.#own(name, asked);
    try {
      return await forwarded(owner, "instance.own");
    } catch (thrown) {
      // The node is gone, or has lost the model: this one can own it as well.
      const { code } = asCaravanError(thrown);
      if (code !== "cluster_degraded" && code !== "model_not_found") throw thrown;
      return this.#own(name, asked);
    }
  }

  /** Ends an instance, whoever owns it. False: nobody here knows it. */
  async stop(id: string): Promise<boolean> {
    const logic = this.#options.logic();
    if (this.#stopOwn(id)) return true;
    const owner = logic.members.find(({ record }) =>
      record.info.instances.some(({ spec }) => spec.id === id),
    );
    if (owner === undefined || owner.self) return false;
    return (await this.#options.ask(owner.record.info.id, "instance.stop", { id })) === true;
  }

  /** Another node asks. undefined: not a question of this kind. */
  onCall(method: string, params: unknown): Promise<unknown> | undefined {
    switch (method) {
      case "instance.stop":
        return Promise.resolve(this.#stopOwn(v.parse(InstanceCallSchema, params).id));
      case "instance.create":
      case "instance.own":
      case "plan": {
        const { model, asked } = v.parse(PlacementCallSchema, params);
        // Only a node that has the model is asked; without it the answer is that it is not there.
        const { name } = this.#options.model(model);
        if (method === "plan") return this.plan(model, asked);
        return method === "instance.own"
          ? Promise.resolve(this.#own(name, asked))
          : this.create(model, asked);
      }
      default:
        return undefined;
    }
  }

  #report(
    name: string,
    headers: string,
    { profile, kvType, threads }: Awaited<ReturnType<ModelTermsCache["terms"]>>,
    asked: PlacementRequest,
  ): unknown {
    const members = this.#options.logic().members.filter(({ direct }) => direct);
    const nodes = members.map(({ record }) => record.info);
    const links = members.flatMap(({ record }) => record.links.filter(({ bandwidth }) => bandwidth > 0));
    const found = planPlacements(profile, nodes, links, { asked, kvType, threads });
    return planReport(name, headers, found, nodes);
  }

  #own(name: string, asked: PlacementRequest): string {
    const logic = this.#options.logic();
    const id = crypto.randomUUID();
    logic.instances.create(id, name, asked);
    logic.turn();
    return id;
  }

  #stopOwn(id: string): boolean {
    const logic = this.#options.logic();
    const stopped = logic.instances.stop(id);
    if (stopped) logic.turn();
    return stopped;
  }

  #has(model: string): boolean {
    try {
      this.#options.model(model);
      return true;
    } catch (thrown) {
      if (thrown instanceof CaravanError && thrown.code === "model_not_found") return false;
      throw thrown;
    }
  }
}
