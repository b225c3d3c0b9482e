// The API over a real loopback socket with one scripted model, for tests with other people's clients.

import { createApp } from "../../src/api/app.ts";
import { Lifecycle } from "../../src/api/lifecycle.ts";
import { type RunningServer, startServer } from "../../src/api/server.ts";
import type { ApiSettings } from "../../src/api/settings.ts";
import { createLogger } from "../../src/log.ts";
import type { Script } from "./scripted-engine.ts";
import { type ScriptedModels, scriptedModels } from "./scripted-models.ts";

export interface LoopbackApi {
  models: ScriptedModels;
  /** Drain it at the end of the test. */
  server: RunningServer;
}

export function loopbackApi(script: Script, settings: Partial<ApiSettings> = {}): LoopbackApi {
  const models = scriptedModels(script);
  const lifecycle = new Lifecycle();
  const server = startServer({
    app: createApp({ models, lifecycle, settings }),
    lifecycle,
    host: "127.0.0.1",
    port: 0,
    drainSeconds: 0,
    keyed: true,
    log: createLogger({ level: "silent" }),
  });
  return { models, server };
}
