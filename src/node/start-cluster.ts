// This node's part in a cluster as `caravan serve` starts it: settings and machine put together. Without a cluster's file
// it costs nothing but a look at the disk twice a second.

import { availableParallelism, hostname } from "node:os";
import { join } from "node:path";
import type { ModelDirectory } from "../api/model-directory.ts";
import { clusterFolder } from "../cluster/net/identity.ts";
import { ASSUMED_SPEED } from "../cluster/predict.ts";
import type { ModelPresence, NodeSpeed } from "../cluster/types.ts";
import { measureBandwidth, measureVectorInt8, performanceCores } from "../engine/binding.ts";
import type { Logger } from "../log.ts";
import { availableMemory } from "../model/machine-memory.ts";
import { type ModelStore, resolveModel, scanStore } from "../model/store.ts";
import { resolvePaths } from "../paths.ts";
import { rdmaChoice, type Settings } from "../settings.ts";
import { NodeCluster } from "./cluster-service.ts";
import type { RunOptions } from "./open-model.ts";

/** Bytes that are read once to measure the memory's bandwidth: some milliseconds. */
const READ_BYTES = 1 << 27;
/** Share of the int8 peak that prompts reach, everything beside the products included (cli/plan.ts). */
const PROMPT_SHARE = 0.3;
/** The models' folders are listed anew this often. */
const MODELS_MS = 5000;

export interface StartClusterOptions {
  settings: Settings;
  run: RunOptions;
  store: () => ModelStore;
  /** What this node loads by itself. */
  local: ModelDirectory;
  log: Logger;
}

export function makeCluster({ settings, run, store, local, log }: StartClusterOptions): NodeCluster {
  const threads = run.threads ?? (performanceCores() || availableParallelism());
  let figures: { bandwidth: number; speed: NodeSpeed | null } | undefined;
  let listed: { atMs: number; models: ModelPresence[] } | undefined;
  return new NodeCluster({
    node: {
      folder: clusterFolder(resolvePaths().data),
      port: settings.cluster_port,
      ...(settings.cluster_host === "" ? {} : { host: settings.cluster_host }),
      peers: settings.peers,
      discovery: settings.discovery_port === 0 ? false : settings.discovery_port,
      name: settings.node_name === "" ? hostname() : settings.node_name,
      log,
    },
    driver: {
      // By name only: what another node says must not open any folder of this machine.
      model: (name) => resolveModel(store(), name),
      partsFolder: join(resolvePaths().data, "parts"),
      verdictsFile: join(resolvePaths().data, "checked-files.json"),
      models: () => {
        const now = performance.now();
        if (listed === undefined || now - listed.atMs > MODELS_MS)
          listed = { atMs: now, models: presence(store()) };
        return listed.models;
      },
      run,
      rdma: rdmaChoice(settings.rdma),
      compute: () => ({ threads, device: run.device === "metal" ? "metal" : "cpu" }),
      figures: () => {
        figures ??= {
          bandwidth: measureBandwidth(Math.min(READ_BYTES, availableMemory().available / 4), threads),
          speed: { ...ASSUMED_SPEED.cpu, multiplyAdds: PROMPT_SHARE * (measureVectorInt8(threads) ?? 0) },
        };
        return figures;
      },
    },
    local,
    maxBodyBytes: settings.max_body_bytes,
  });
}

function presence(store: ModelStore): ModelPresence[] {
  const { models } = scanStore(store);
  return models.map(({ name, bytes }) => ({ model: name, bytes, total: bytes }));
}
