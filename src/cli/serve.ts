// caravan serve: the node. Loads models on demand and answers the HTTP API until it is told to stop.

import { createApp } from "../api/app.ts";
import { Lifecycle } from "../api/lifecycle.ts";
import { drainOnSignals, startServer } from "../api/server.ts";
import { createLogger } from "../log.ts";
import { openStore, resolveModel } from "../model/store.ts";
import { LoadedModels } from "../node/loaded-models.ts";
import { loadSettings } from "../settings.ts";
import type { Command } from "./command.ts";
import { RUN_OPTIONS, runOptions } from "./run-options.ts";

const DRAIN_SECONDS = 30;

export const serve: Command = {
  name: "serve",
  summary: "start the node and its HTTP API (the default command)",
  positionals: "[MODEL]",
  count: [0, 1],
  options: {
    host: { value: "ADDRESS", help: "address to listen on (default 127.0.0.1)" },
    port: { value: "PORT", help: "port to listen on (default 11711)" },
    ...RUN_OPTIONS,
    "log-level": { value: "LEVEL", help: "debug, info, warn, error or silent" },
    "log-format": { value: "FORMAT", help: "text or json" },
  },
  details: "MODEL is loaded at once; others are loaded when a request names them.",
  async run(args) {
    const port = args.integer("port", 0, 65535);
    const loaded = loadSettings({
      flags: {
        host: args.text("host"),
        ...(port === undefined ? {} : { port }),
        log_level: args.choice("log-level", ["debug", "info", "warn", "error", "silent"]),
        log_format: args.choice("log-format", ["text", "json"]),
      },
    });
    const { settings } = loaded;
    const log = createLogger({ level: settings.log_level, format: settings.log_format });
    for (const warning of loaded.warnings) log.warn(warning);
    const store = () => openStore(settings.models_dir);
    const models = new LoadedModels(store, runOptions(args, loaded), log);
    const lifecycle = new Lifecycle();
    const app = createApp({
      models,
      lifecycle,
      log,
      settings: { host: settings.host, apiKeys: settings.api_keys },
    });
    const server = startServer({
      app,
      lifecycle,
      host: settings.host,
      port: settings.port,
      drainSeconds: DRAIN_SECONDS,
      keyed: settings.api_keys.length > 0,
      log,
    });
    drainOnSignals(server);
    process.stdout.write(`caravan listens at ${server.url}\n`);
    const first = args.positionals[0];
    try {
      if (first !== undefined) await models.load(resolveModel(store(), first, { allowFolder: true }));
      await server.stopped;
    } catch (thrown) {
      await server.drain();
      throw thrown;
    } finally {
      await models.close();
    }
    return 0;
  },
};
