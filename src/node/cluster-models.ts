// The models that this node answers for by itself: those that it loads on demand, and the instances over several nodes that it
// owns. What other nodes own is theirs to answer (api/cluster/forwarding.ts); here it is only listed.

import type {
  FindOptions,
  LoadedModel,
  ModelDirectory,
  ModelInfo,
  ModelState,
} from "../api/model-directory.ts";
import type { Member } from "../cluster/membership.ts";
import type { OpenInstance } from "../cluster/net/cluster-driver.ts";
import type { InstancePhase, InstanceState } from "../cluster/types.ts";
import type { EngineStatus } from "../engine/protocol.ts";

export interface ClusterInstances {
  /** Of this node, those that answer. */
  open(): readonly OpenInstance[];
  members(): readonly Member[];
}

const STATES: Record<InstancePhase, ModelState> = {
  placing: "loading",
  fetching: "loading",
  loading: "loading",
  ready: "ready",
  failed: "failed",
  stopping: "loading",
  gone: "available",
};

export class ClusterModels implements ModelDirectory {
  constructor(
    private readonly local: ModelDirectory,
    private readonly cluster: ClusterInstances,
  ) {}

  list(): ModelInfo[] {
    const infos = new Map(this.local.list().map((info) => [info.id, info]));
    for (const { record } of this.cluster.members()) {
      for (const { model } of record.info.models)
        if (!infos.has(model))
          infos.set(model, { id: model, created: 0, ownedBy: "cluster", state: "available" });
      for (const state of record.info.instances) this.#merge(infos, state);
    }
    return [...infos.values()];
  }

  /** An instance says more than files that are merely there. */
  #merge(infos: Map<string, ModelInfo>, { spec, phase, progress, reason }: InstanceState): void {
    if (phase === "gone") return;
    const known = infos.get(spec.model);
    const state = STATES[phase];
    if (known?.state === "ready" || (known?.state === "loading" && state !== "ready")) return;
    const {
      error: _,
      progress: __,
      ...base
    } = known ?? {
      id: spec.model,
      created: 0,
      ownedBy: "cluster",
    };
    infos.set(spec.model, {
      ...base,
      state,
      ...(spec.context > 0 ? { contextLength: spec.context } : {}),
      ...(state === "loading" ? { progress } : {}),
      ...(state === "failed" ? { error: reason } : {}),
    });
  }

  statuses(): EngineStatus[] {
    const own = this.cluster.open().map(({ model }) => ({ ...model.engine.status(), model: model.id }));
    return [...own, ...this.local.statuses()];
  }

  async find(name: string, options?: FindOptions): Promise<LoadedModel> {
    return this.#instance(name) ?? (await this.local.find(name, options));
  }

  /** Instances are ended through the cluster (DELETE /cluster/instances/:id), not by the name of their model. */
  unload(name: string): Promise<boolean> {
    return this.local.unload(name);
  }

  /** Of this node's instances that answer, the one with the least to do. */
  #instance(name: string): LoadedModel | undefined {
    const aliases = this.local.list().find(({ id, aliases = [] }) => id === name || aliases.includes(name));
    const busy = ({ model }: OpenInstance): number => {
      const { running, waiting } = model.engine.status();
      return running + waiting;
    };
    return this.cluster
      .open()
      .filter(({ order, model }) => {
        const { model: of } = order.spec;
        return (of === name || of === aliases?.id) && model.engine.status().state === "ready";
      })
      .sort((a, b) => busy(a) - busy(b))[0]?.model;
  }
}
