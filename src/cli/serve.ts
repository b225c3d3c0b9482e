// caravan serve: the node. Loads models on demand and answers the HTTP API until it is told to stop.

import { release } from "node:os";
import { resolve } from "node:path";
import { createApp } from "../api/app.ts";
import { Lifecycle } from "../api/lifecycle.ts";
import { drainOnSignals, startServer } from "../api/server.ts";
import { type ApiSettings, DEFAULT_SETTINGS } from "../api/settings.ts";
import { asCaravanError } from "../errors.ts";
import { createLogger, type Logger } from "../log.ts";
import { openStore } from "../model/store.ts";
import { LoadedModels } from "../node/loaded-models.ts";
import { modelLibrary } from "../node/model-library.ts";
import { announceNode, newNodeId } from "../node/running-nodes.ts";
import { makeCluster } from "../node/start-cluster.ts";
import { loadSettings, type Settings } from "../settings.ts";
import type { Command } from "./command.ts";
import { startOnMac } from "./mac-start.ts";
import { findModel } from "./model-argument.ts";
import { RUN_OPTIONS, runOptions } from "./run-options.ts";

/** What the API takes from the node's settings. */
function apiSettings(settings: Settings): Partial<ApiSettings> {
  return {
    host: settings.host,
    apiKeys: settings.api_keys,
    adminKeys: settings.admin_keys,
    secure: settings.tls_cert !== "",
    corsOrigins: settings.cors_origins,
    allowedHosts: settings.allowed_hosts,
    maxBodyBytes: settings.max_body_bytes,
    maxTotalBodyBytes: settings.max_total_body_bytes,
    // A bound on sockets and memory; the queue of each model, which is shorter, refuses first.
    maxConcurrentRequests: Math.max(DEFAULT_SETTINGS.maxConcurrentRequests, 2 * settings.max_queue),
    ...(settings.request_seconds === 0 ? {} : { deadlineMs: settings.request_seconds * 1000 }),
  };
}

/** Lets other commands find this node; one that cannot write its folder serves all the same. */
function announce(id: string, url: string, certificate: string, log: Logger): () => void {
  try {
    return announceNode({
      pid: process.pid,
      id,
      url,
      started: Math.floor(Date.now() / 1000),
      ...(certificate === "" ? {} : { tls_cert: resolve(certificate) }),
    });
  } catch (thrown) {
    log.warn("other commands will not find this node by themselves", { ...asCaravanError(thrown).toJSON() });
    return () => undefined;
  }
}

export const serve: Command = {
  name: "serve",
  summary: "start the node and its HTTP API (the default command)",
  positionals: "[MODEL]",
  count: [0, 1],
  options: {
    host: { value: "ADDRESS", help: "address to listen on (default 127.0.0.1)" },
    port: { value: "PORT", help: "port to listen on, 0 for any (default 11711)" },
    ...RUN_OPTIONS,
    "keep-alive": {
      value: "SECONDS",
      help: "unload a model that nobody has used for so long (default: never)",
    },
    "tls-cert": { value: "FILE", help: "certificate in PEM form: serve HTTPS" },
    "tls-key": { value: "FILE", help: "its private key in PEM form" },
    "node-name": { value: "NAME", help: "what other nodes show of this one (default: the machine's name)" },
    "cluster-port": {
      value: "PORT",
      help: "port for other nodes, 0 for any (default 11712); only in a cluster",
    },
    "cluster-host": { value: "ADDRESS", help: "address for other nodes (default: all)" },
    "discovery-port": { value: "PORT", help: "UDP port of beacons, 0 for none (default 11712)" },
    peer: { value: "HOST:PORT", many: true, help: "a node that multicast does not reach; may be repeated" },
    rdma: {
      value: "DEV,…|off",
      help: "RDMA devices that may be used, or none (default: those that connect two nodes)",
    },
    "log-level": { value: "LEVEL", help: "debug, info, warn, error or silent" },
    "log-format": { value: "FORMAT", help: "text or json" },
  },
  details: `MODEL is loaded at once; others are loaded when a request names them. A folder is called by its last part.
Each setting can stand in caravan.toml or in a variable: CARAVAN_HOST, CARAVAN_PORT, CARAVAN_API_KEYS,
CARAVAN_ADMIN_KEYS, CARAVAN_TLS_CERT, CARAVAN_TLS_KEY,
CARAVAN_MODELS_DIR, CARAVAN_THREADS, CARAVAN_CONTEXT, CARAVAN_MAX_QUEUE, CARAVAN_REQUEST_SECONDS,
CARAVAN_KEEP_ALIVE_SECONDS, CARAVAN_DRAIN_SECONDS, CARAVAN_MAX_BODY_BYTES, CARAVAN_MAX_TOTAL_BODY_BYTES, CARAVAN_CORS_ORIGINS, CARAVAN_ALLOWED_HOSTS,
CARAVAN_NODE_NAME, CARAVAN_CLUSTER_PORT, CARAVAN_CLUSTER_HOST, CARAVAN_DISCOVERY_PORT, CARAVAN_PEERS, CARAVAN_RDMA,
CARAVAN_LOG_LEVEL, CARAVAN_LOG_FORMAT.
SIGTERM or Ctrl-C lets running requests finish; the second one ends them.`,
  outlivesOutput: true,
  async run(args) {
    const port = args.integer("port", 0, 65535);
    const keepAlive = args.integer("keep-alive", 0, 10_000_000);
    const clusterPort = args.integer("cluster-port", 0, 65535);
    const discoveryPort = args.integer("discovery-port", 0, 65535);
    const peers = args.list("peer");
    const loaded = loadSettings({
      flags: {
        host: args.text("host"),
        ...(port === undefined ? {} : { port }),
        ...(keepAlive === undefined ? {} : { keep_alive_seconds: keepAlive }),
        ...(clusterPort === undefined ? {} : { cluster_port: clusterPort }),
        ...(discoveryPort === undefined ? {} : { discovery_port: discoveryPort }),
        ...(peers.length === 0 ? {} : { peers }),
        cluster_host: args.text("cluster-host"),
        node_name: args.text("node-name"),
        rdma: args.text("rdma"),
        tls_cert: args.text("tls-cert"),
        tls_key: args.text("tls-key"),
        log_level: args.choice("log-level", ["debug", "info", "warn", "error", "silent"]),
        log_format: args.choice("log-format", ["text", "json"]),
      },
    });
    const { settings } = loaded;
    const options = runOptions(args, loaded);
    const first = args.positionals[0] === undefined ? undefined : findModel(args.positionals[0]);
    const log = createLogger({
      level: settings.log_level,
      format: settings.log_format,
      secrets: [...settings.api_keys, ...settings.admin_keys],
    });
    for (const warning of loaded.warnings) log.warn(warning);
    const models = new LoadedModels({
      store: () => openStore(settings.models_dir),
      run: options,
      log,
      ...(settings.keep_alive_seconds === 0 ? {} : { keepAliveMs: settings.keep_alive_seconds * 1000 }),
    });
    const store = () => openStore(settings.models_dir);
    const cluster = makeCluster({ settings, run: options, store, local: models, log });
    const nodeId = newNodeId();
    const lifecycle = new Lifecycle();
    const app = createApp({
      models: cluster.models,
      cluster,
      lifecycle,
      log,
      nodeId,
      library: modelLibrary(() => openStore(settings.models_dir), log),
      settings: apiSettings(settings),
    });
    const server = startServer({
      app,
      lifecycle,
      host: settings.host,
      port: settings.port,
      drainSeconds: settings.drain_seconds,
      keyed: settings.api_keys.length + settings.admin_keys.length > 0,
      ...(settings.tls_cert === "" ? {} : { tls: { cert: settings.tls_cert, key: settings.tls_key } }),
      log,
    });
    drainOnSignals(server);
    const withdraw = announce(nodeId, server.url, settings.tls_cert, log);
    process.stdout.write(`caravan listens at ${server.url}\n`);
    const maySleep = startOnMac({ log, release: release(), discovers: true });
    try {
      await cluster.start(async (request) => app.fetch(request, { fromMember: true }));
      if (first !== undefined) await Promise.race([models.load(first), server.stopped]);
      await server.stopped;
    } catch (thrown) {
      await server.drain();
      throw thrown;
    } finally {
      withdraw();
      maySleep();
      await cluster.close();
      await models.close();
    }
    return 0;
  },
};
